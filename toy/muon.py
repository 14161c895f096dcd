"""The toy's optimizer, which learns more than Adam in few steps."""

import torch


class Muon(torch.optim.Muon):
    """torch's Muon, in fp32 and with matrices of one shape orthogonalised together.

    torch 2.13 orthogonalises one matrix at a time and in bf16, which a CPU without bf16 units multiplies far slower than fp32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        if getattr(self, "found_inf", 0):
            return                                                  # as Adam, which looks on the device; the toy can afford to wait for it
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, group["momentum"])))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([u for _, u in pairs]), group["ns_coefficients"], group["ns_steps"])
                for (p, _), u in zip(pairs, updates):
                    p.add_(u, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(g, coefficients, steps):
    """Newton-Schulz: pushes the singular values of each matrix of g (m, rows, columns) towards 1."""
    a, b, c = coefficients
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x
