"""The discrete text flow against closed forms: its path, its two losses, its solver on the exact
posterior of a known distribution.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from univigu import UniViGU, generate, joint, understand, uni_flow_loss
from wan.published import (
    DiscreteFlow,
    PublishedConfig,
    PublishedUniViGU,
    config_from,
    latents_of,
    redraw,
)
from wan.published import build as build_model

FLOW = DiscreteFlow()

V, N, B = 7, 5, 3
TINY = dict(
    dim=32,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    in_dim=3,
    out_dim=3,
    freq_dim=12,
    prompt_dim=10,
    prompt_len=6,
    patch_size=(1, 2, 2),
    vocab_size=V,
    text_len=N,
    text_dim=32,
    text_ffn_dim=28,
    text_flow="discrete",
)
P = torch.tensor(
    [0.4, 0.05, 0.0, 0.25, 0.1, 0.15, 0.05], dtype=torch.float64
)  # every token's distribution, independently


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def build(**changes):
    torch.manual_seed(0)
    model = build_model(config_from(TINY | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def data(b=B):
    g = seeded(1)
    return (
        torch.randn(b, 3, 2, 4, 4, generator=g),
        torch.randint(V, (b, N), generator=g),
        torch.randn(b, 6, 10, generator=g),
    )


def of_kind(kind):
    return SimpleNamespace(config=SimpleNamespace(discrete_loss=kind))


def posterior(y_t, tau):
    """p(y_1 = k | y_t = j), proportional to P[k] (tau [j = k] + (1 - tau) / V), by Bayes."""
    table = P[None] * (tau * torch.eye(V, dtype=torch.float64) + (1 - tau) / V)  # (j, k)
    return (table / table.sum(1, keepdim=True))[y_t]


class Exact(PublishedUniViGU):
    """A model that knows P, and writes down what it was asked."""

    config = SimpleNamespace(
        vocab_size=V, text_len=N, text_shift=1.0, joint_shift=1.0, prompt_len=4, prompt_dim=10
    )

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.calls = []

    def __call__(self, z_v, y_t, tau_v, tau_t, c):
        self.calls.append((y_t, tau_v[0].item(), tau_t[0].item()))
        if tau_t[0] == 1:
            return z_v, torch.nn.functional.one_hot(y_t, V) * 9.0
        return z_v, posterior(y_t, tau_t[0].double()).log().clamp(min=-100)


# ---------------------------------------------------------------- the path


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.8, 1.0])
def test_a_token_is_clean_with_probability_tau_and_else_uniform(tau):
    n = 40000
    y = torch.full((2, n), 3)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=V))
    y_t, target = FLOW.corrupt(model, y, torch.tensor([tau, 1.0]), seeded(0))
    assert torch.equal(target, y) and torch.equal(y_t[1], y[1])  # each sample has its own clock
    share = torch.bincount(y_t[0], minlength=V) / n
    wanted = torch.full((V,), (1 - tau) / V)
    wanted[3] += tau
    assert (share - wanted).abs().max() < 4 * 0.5 / math.sqrt(n)
    assert (share > 0).sum() == (1 if tau == 1 else V)


# ---------------- the losses, a second time in plain loops


@pytest.mark.parametrize("kind", ["cross-entropy", "generalised-kl"])
def test_losses_equal_their_formula(kind):
    g = seeded(2)
    logits, y, y_t = (
        torch.randn(B, N, V, generator=g),
        torch.randint(V, (B, N), generator=g),
        torch.randint(V, (B, N), generator=g),
    )
    y_t[:, :2] = y[:, :2]
    tau = torch.tensor([0.1, 0.6, 0.99])
    found, anchor = FLOW.loss(of_kind(kind), logits, y_t, y, y, tau, 0.1)
    assert found.shape == (B,) and not anchor.any()
    for b in range(B):
        total = 0.0
        for i in range(N):
            z = [math.exp(x) for x in logits[b, i].double().tolist()]
            p = [x / sum(z) for x in z]
            now, clean = y_t[b, i].item(), y[b, i].item()
            if kind == "cross-entropy":
                total -= math.log(p[clean])
            else:
                # Gat et al.: (delta - p(y_t) - (1 - delta) log p(y_1)) kappa' / (1 - kappa)
                delta = float(now == clean)
                total += (delta - p[now] - (1 - delta) * math.log(p[clean])) / max(
                    1 - tau[b].item(), 0.05
                )
        assert found[b].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["cross-entropy", "generalised-kl"])
def test_the_exact_posterior_minimises_both_losses(kind):
    """Expected loss over (y_1, y_t) in closed form; its gradient vanishes at the posterior, and any
    other logits are worse.
    """
    tau = torch.tensor([0.35], dtype=torch.float64)
    logits = posterior(torch.arange(V), tau).clamp(min=1e-12).log().requires_grad_()  # (y_t, k)
    p_t = P[:, None] * (
        tau * torch.eye(V, dtype=torch.float64) + (1 - tau) / V
    )  # p(y_1, y_t), (y_1, y_t)

    def expected(logits):
        total = 0.0
        for clean in range(V):
            for now in range(V):
                pair = torch.tensor([[clean]]), torch.tensor([[now]])
                total = (
                    total
                    + p_t[clean, now]
                    * FLOW.loss(
                        of_kind(kind), logits[now][None, None], pair[1], pair[0], pair[0], tau, 0
                    )[0][0]
                )
        return total

    best = expected(logits)
    best.backward()
    assert logits.grad.abs().max() < 1e-6
    for seed in range(5):
        other = logits.detach() + torch.randn(V, V, generator=seeded(seed), dtype=torch.float64)
        assert expected(other) > best + 1e-3


def test_the_total_weighs_tokens_over_tokens():
    """eq. 11 with the text's squared error replaced by its cross-entropy: lambda_t = |z_v| / |z_t|,
    everything over the entries of a video latent.
    """
    model, (z_v, y, c) = build(), data()
    total, parts = uni_flow_loss(model, z_v, y, c, generator=seeded(3))
    n_v, entries = 2 * 2 * 2, z_v[0].numel()
    wanted = (
        parts["video"].double() * entries + n_v / N * parts["text"].double() * N
    ).mean() / entries
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert not parts["anchor"].any() and parts["text"].shape == (B,)
    other, parts = uni_flow_loss(
        build(discrete_loss="generalised-kl"), z_v, y, c, generator=seeded(3)
    )
    assert abs(other - total) > 1e-3


def test_gradients_reach_every_parameter():
    model, (z_v, y, c) = build(), data()
    uni_flow_loss(model, z_v, y, c, generator=seeded(0))[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ---------------------------------------------------------------- the model


def test_the_model_takes_tokens_and_gives_logits():
    model, (z_v, y, c) = build(), data()
    tau_v, tau_t = torch.tensor([0.1, 0.4, 0.9]), torch.tensor([0.8, 0.2, 0.5])
    v_v, logits = model(z_v, y, tau_v, tau_t, c)
    assert v_v.shape == z_v.shape and logits.shape == (B, N, V)
    one = model(z_v[1:2], y[1:2], tau_v[1:2], tau_t[1:2], c[1:2])
    assert (one[0] - v_v[1]).abs().max() < 1e-5 and (one[1] - logits[1]).abs().max() < 1e-5
    moved = model(z_v, y, tau_v, tau_t.flip(0), c)[1]
    assert (moved - logits).abs()[[0, 2]].max() > 1e-3 and (moved - logits)[1].abs().max() < 1e-5
    assert model.embed(y) is y and model.decode(y) is y
    assert not any("text_in" in name for name in model.state_dict())
    with pytest.raises(ValueError, match=r"z_t has shape \(3, 5, 32\), wanted \(3, N\)"):
        model(z_v, torch.zeros(3, 5, 32), tau_v, tau_t, c)
    with pytest.raises(ValueError, match="text_dim is 8, wanted dim 32"):
        config_from(TINY | dict(text_dim=8))


# ---------------------------------------------------------------- the solver


def test_the_solver_carries_noise_to_the_distribution_of_data():
    b = 3000
    model = Exact()
    y_hat = understand(model, torch.zeros(b, 3, 2, 4, 4), steps=20, generator=seeded(5))
    share = torch.bincount(y_hat.flatten(), minlength=V).double() / y_hat.numel()
    assert (share - P).abs().max() < 4 * 0.5 / math.sqrt(b * N)
    assert share[2] == 0
    first = torch.bincount(model.calls[0][0].flatten(), minlength=V).double() / y_hat.numel()
    assert (first - 1 / V).abs().max() < 4 * 0.5 / math.sqrt(b * N)  # it began with uniform noise


def test_a_step_redraws_the_share_of_tokens_that_the_mixture_path_asks_for():
    y_t, logits = torch.zeros(200, 100, dtype=torch.int64), torch.full((200, 100, V), -100.0)
    logits[..., 4] = 0
    for tau, after, share in ((0.0, 0.25, 0.25), (0.5, 0.75, 0.5), (0.9, 1.0, 1.0)):
        assert (
            FLOW.step(y_t, logits, tau, after, generator=seeded(0)) == 4
        ).double().mean() == pytest.approx(share, abs=0.015)
    assert (redraw(y_t, logits, 0.6, generator=seeded(0)) == 4).double().mean() == pytest.approx(
        0.6, abs=0.015
    )


def test_joint_shares_one_shifted_grid_redraws_more_and_more_and_ends_with_a_clean_look():
    model, steps = Exact(), 5
    c = torch.zeros(400, 4, 10)
    z_v, y_hat = joint(model, c, (3, 2, 4, 4), steps=steps, shift=3.0, generator=seeded(0))
    grid = [t / (t + 3 * (1 - t)) for t in (i / steps for i in range(steps))] + [1.0]
    assert [call[1] for call in model.calls] == pytest.approx(grid) and [
        call[2] for call in model.calls
    ] == pytest.approx(grid)
    assert torch.equal(
        model.calls[0][0], model.calls[1][0]
    )  # the first step redraws none: share 0 / (S - 1)
    moved = [(a[0] != b[0]).double().mean().item() for a, b in zip(model.calls, model.calls[1:])]
    assert moved[0] == 0 < moved[1] < moved[2]
    assert torch.equal(y_hat, model.calls[-1][0])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_three_modes_run_at_batch_2_and_repeat_with_their_seed(guidance):
    model, (z_v, y, c) = build(), data(2)
    modes = {
        "understand": lambda g: understand(model, z_v, c, steps=4, guidance=guidance, generator=g),
        "generate": lambda g: generate(
            model, y, c, (3, 2, 4, 4), steps=4, guidance=guidance, generator=g
        ),
        "joint": lambda g: torch.cat(
            [
                x.flatten().float()
                for x in joint(model, c, (3, 2, 4, 4), steps=4, guidance=guidance, generator=g)
            ]
        ),
    }
    for run in modes.values():
        a, again, other = run(seeded(0)), run(seeded(0)), run(seeded(1))
        assert torch.equal(a, again) and not torch.equal(a, other) and a.float().isfinite().all()


def test_guidance_0_is_unconditional_and_1_is_conditional_on_all_tokens():
    model, (z_v, _, c) = build(), data(2)
    plain = understand(model, z_v, c, steps=3, guidance=1.0, generator=seeded(0))
    assert torch.equal(plain, understand(model, z_v, c, steps=3, generator=seeded(0)))
    other = z_v + 1
    free = [
        understand(model, video, c, steps=3, guidance=0.0, generator=seeded(0))
        for video in (z_v, other)
    ]
    assert torch.equal(*free)  # the video is not looked at


@pytest.mark.parametrize("null_prompt", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("keep_text", [False, True])
def test_generate_contrasts_with_no_prompt_and_a_random_or_the_same_text(
    keep_text, guidance, null_prompt
):
    model, (_, y, c), zero, one = build(), data(2), torch.zeros(2), torch.ones(2)
    no_c = torch.full_like(c, 0.5) if null_prompt else torch.zeros_like(c)
    found = generate(
        model,
        y,
        c,
        (3, 2, 4, 4),
        steps=1,
        guidance=guidance,
        c_null=no_c[:1] if null_prompt else None,
        keep_text=keep_text,
        generator=seeded(0),
    )
    g = seeded(0)
    z_v = torch.randn(2, 3, 2, 4, 4, generator=g)
    random = FLOW.noise(model, y, N, g)
    with torch.no_grad():
        v_cond, v_same, v_random = (
            model(z_v, text, zero, tau_t, prompt)[0]
            for text, tau_t, prompt in ((y, one, c), (y, one, no_c), (random, zero, no_c))
        )
    v_null = v_same if keep_text else v_random
    assert (found - (z_v + v_null + guidance * (v_cond - v_null))).abs().max() < 1e-4
    assert (v_same - v_random).abs().max() > 1e-2 < (v_cond - v_null).abs().max()


# ---------------------------------------------------------------- the choice


def test_the_config_chooses_the_model():
    plain = {name: value for name, value in TINY.items() if name != "text_flow"}
    assert type(build_model(config_from(plain))) is UniViGU
    assert type(build_model(config_from(TINY))) is PublishedUniViGU
    assert (
        isinstance(config_from(TINY), PublishedConfig)
        and latents_of(config_from(TINY)) == "normalised"
    )
    assert latents_of(config_from(TINY | {"latents": "raw"})) == "raw"
    for wrong, message in (
        ({"text_flow": "both"}, "text_flow is 'both', wanted one of embedding, discrete"),
        (
            {"text_flow": "embedding", "latents": "raw"},
            "latents is 'raw', wanted 'normalised', or --text-flow discrete",
        ),
        (
            {"discrete_loss": "mse"},
            "discrete_loss is 'mse', wanted one of cross-entropy, generalised-kl",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config_from(TINY | wrong)


def test_a_config_file_from_before_is_read():
    before = TINY | {"latents": "normalised", "text_flow": "embedding", "text_dim": 8}
    assert type(build_model(config_from(before))) is UniViGU


@pytest.mark.parametrize("stored, wanted", [({"text_shift": 4.0}, 0.1), ({}, 1.0)])
def test_older_models_are_sampled_jointly_as_they_were(stored, wanted):
    """Their config.json has no joint_shift: the toy's samplers had 0.1, all others one clock."""
    assert config_from(stored).joint_shift == wanted
    assert config_from(stored | {"joint_shift": 0.5}).joint_shift == 0.5
