"""Muon, and steps that leave out a gradient that is not finite."""

import math
import sys

import torch


class Muon(torch.optim.Muon):
    """torch's Muon, in fp32 and with matrices of one shape orthogonalised together.

    torch 2.13 orthogonalises one matrix at a time and in bf16, which a CPU without bf16 units
    multiplies far slower than fp32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            by_shape: dict = {}
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    grad = p.grad
                    if found_inf is not None:  # then nothing changes, and nobody waits to know
                        grad = torch.where(found_inf > 0, momentum, grad)
                    momentum.lerp_(grad, 1 - group["momentum"])
                    nesterov = grad.lerp(momentum, group["momentum"])
                    by_shape.setdefault(p.shape, []).append((p, nesterov))
            for (rows, columns), pairs in by_shape.items():
                g = torch.stack([nesterov for _, nesterov in pairs])  # (m, rows, columns)
                updates = orthogonalise(g, group["ns_coefficients"], group["ns_steps"])
                decay = group["lr"] * group["weight_decay"]
                if found_inf is not None:
                    updates = updates * (1 - found_inf)
                    decay = decay * (1 - found_inf)
                size = max(1, rows / columns) ** 0.5
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - decay).add_(update, alpha=-group["lr"] * size)


def orthogonalise(g, coefficients, steps):
    """Newton-Schulz: pushes the singular values of each matrix of g (m, rows, cols) towards 1."""
    a, b, c = coefficients
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


class Guard:
    """Optimizer steps that leave out what is not finite, in every process alike.

    Whether a step was left out is known when `check` is called: until then nobody waits for the
    device. clips_of: step -> the clips of its batch, for the message. skipped: steps left out so
    far, at most `allowed` of them.
    """

    def __init__(self, clips_of, allowed, skipped):
        self.clips_of, self.allowed, self.skipped = clips_of, allowed, list(skipped)
        self.norms = {}  # of the steps since the last check

    def step(self, norm, step, optimizers):
        """Steps all optimizers and empties the gradients. norm: that of the gradient."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.norms[step] = norm
        for optimizer in optimizers:
            # The mark that torch.amp's GradScaler sets; fused Adam then changes nothing.
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()

    def check(self, stage):
        """How many steps of the run were left out, and the norm of the last gradient.

        Raises FloatingPointError where more than `allowed` were.
        """
        norms = torch.stack(list(self.norms.values())).tolist()
        found, self.norms = dict(zip(self.norms, norms)), {}
        for step, norm in found.items():
            if math.isfinite(norm):
                continue
            self.skipped.append(step)
            print(
                f"step {step} of stage {stage} is left out: its gradient is {norm}; "
                f"its clips: {list(self.clips_of(step))}",
                file=sys.stderr,
            )
            if len(self.skipped) > self.allowed:
                steps = ", ".join(map(str, self.skipped))
                raise FloatingPointError(
                    f"the gradient at step {step} of stage {stage} is {norm}, wanted a finite "
                    f"number; {len(self.skipped)} steps were left out ({steps}): lower the "
                    "learning rate or mend the clips; the last checkpoint is intact"
                )
        return len(self.skipped), norms[-1]
