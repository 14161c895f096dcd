"""univigu.py against closed forms, and against the same equations written a second time, plainly,
in float64.
"""

import copy
import io
import math
import re
import tokenize
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import univigu
from univigu import (
    MIXTURE,
    PRESETS,
    CastLinear,
    Config,
    EmbeddingFlow,
    UniViGU,
    clock_grid,
    generate,
    interpolate,
    joint,
    rotate,
    sample_clocks,
    sinusoid,
    text_rope,
    understand,
    uni_flow_loss,
    video_rope,
    warp,
)
from wan import published

# Head width 16, so that the axes' shares of it (8, 4, 4) differ; no two sizes are equal that a bug
# could swap.
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
    vocab_size=11,
    text_len=5,
    text_dim=8,
    text_ffn_dim=28,
)
SOURCE = Path(univigu.__file__).read_text()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def build(seed=0, **changes):
    """A tiny model every parameter of which matters: nothing is left at zero or one."""
    torch.manual_seed(seed)
    model = published.build(published.config_from(TINY | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = name.endswith(("norm.weight", "norm_q.weight", "norm_k.weight", "norm3.weight"))
            p.add_(
                torch.randn_like(p) * (0.3 if gain or p.ndim == 1 or "modulation" in name else 0.15)
            )
    return model


def inputs(b=2, size=(3, 4, 6), n=5, length=6, seed=1, config=TINY):
    """z_v, z_t, tau_v, tau_t, c; the clocks of the two modalities and of the samples all differ."""
    g = seeded(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)
    return (
        r(b, config["in_dim"], *size),
        r(b, n, config["text_dim"]),
        torch.rand(b, generator=g),
        torch.rand(b, generator=g),
        r(b, length, config["prompt_dim"]),
    )


@pytest.fixture(scope="module")
def model():
    return build()


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


# ---------------- Wan's equations once more: float64, one sample, plain loops


def parameters64(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standardise(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def clock_features(tau, dim):
    t = 1000 * (1 - tau)
    angles = [t * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    return torch.tensor(
        [math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64
    )


def video_angles(size, head_dim):
    w = 2 * (head_dim // 6)
    widths = (head_dim - 2 * w, w, w)
    return torch.tensor(
        [
            [
                position * 10000 ** (-2 * i / width)
                for position, width in zip(cell, widths)
                for i in range(width // 2)
            ]
            for cell in (
                (f, h, w_) for f in range(size[0]) for h in range(size[1]) for w_ in range(size[2])
            )
        ],
        dtype=torch.float64,
    )


def text_angles(n, head_dim):
    return torch.tensor(
        [[j * 10000 ** (-2 * i / head_dim) for i in range(head_dim // 2)] for j in range(n)],
        dtype=torch.float64,
    )


def turn(x, angles, pairs):
    """x (n, head_dim): one complex multiplication per pair of entries."""
    half = x.shape[-1] // 2
    a, b = (x[:, 0::2], x[:, 1::2]) if pairs == "adjacent" else (x[:, :half], x[:, half:])
    turned = torch.complex(a, b) * torch.exp(1j * angles)
    if pairs == "halves":
        return torch.cat([turned.real, turned.imag], dim=1)
    return torch.stack([turned.real, turned.imag], dim=2).reshape(x.shape)


def reference_attention(p, name, cfg, x, context, rotations=()):
    """rotations: (number of tokens, angles, pairs) per stream."""

    def project(letter, source):
        q = linear(p, f"{name}.{letter}", source)
        if letter == "v":
            return q
        return (
            q
            / torch.sqrt((q * q).mean(-1, keepdim=True) + cfg.eps)
            * p[f"{name}.norm_{letter}.weight"]
        )

    q, k, v = project("q", x), project("k", context), project("v", context)
    d, heads = cfg.dim // cfg.num_heads, []
    for m in range(cfg.num_heads):
        q_m, k_m, v_m = (s[:, m * d : (m + 1) * d] for s in (q, k, v))
        start = 0
        for n, angles, pairs in rotations:
            rows = slice(start, start + n)
            q_m, k_m = (
                torch.cat([s[:start], turn(s[rows], angles, pairs), s[start + n :]])
                for s in (q_m, k_m)
            )
            start += n
        weights = torch.exp(q_m @ k_m.T / math.sqrt(d))
        heads.append(weights / weights.sum(1, keepdim=True) @ v_m)
    return linear(p, f"{name}.o", torch.cat(heads, dim=1))


def reference_block(p, name, cfg, streams, e6, c, rotations):
    """streams: [h_v] or [h_v, h_t], each (n, dim); e6 alike, (6, dim)."""
    e6 = [p[f"{name}.modulation"][0] + e for e in e6]
    n_v = len(streams[0])
    cut = lambda x: [x[:n_v], x[n_v:]][: len(streams)]
    x = torch.cat([standardise(h, cfg.eps) * (1 + e[1]) + e[0] for h, e in zip(streams, e6)])
    a = cut(reference_attention(p, f"{name}.self_attn", cfg, x, x, rotations))
    streams = [h + e[2] * a_m for h, e, a_m in zip(streams, e6, a)]
    x = (
        standardise(torch.cat(streams), cfg.eps) * p[f"{name}.norm3.weight"]
        + p[f"{name}.norm3.bias"]
    )
    a = cut(reference_attention(p, f"{name}.cross_attn", cfg, x, c))
    streams = [h + a_m for h, a_m in zip(streams, a)]
    out = []
    for h, e, expert in zip(streams, e6, ("ffn", "ffn_t")):
        x = standardise(h, cfg.eps) * (1 + e[4]) + e[3]
        out.append(
            h + e[5] * linear(p, f"{name}.{expert}.2", gelu(linear(p, f"{name}.{expert}.0", x)))
        )
    return out


def reference_patches(p, cfg, z_v):
    """Tokens (n_v, dim) of one latent (C, F, H, W), and their grid."""
    (pf, ph, pw), weight = cfg.patch_size, p["patch_embedding.weight"].reshape(cfg.dim, -1)
    grid = [s // size for s, size in zip(z_v.shape[1:], cfg.patch_size)]
    tokens = [
        weight
        @ z_v[:, f * pf : (f + 1) * pf, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw].reshape(-1)
        + p["patch_embedding.bias"]
        for f in range(grid[0])
        for h in range(grid[1])
        for w in range(grid[2])
    ]
    return torch.stack(tokens), grid


def reference_unpatchify(rows, grid, patch, channels):
    """rows (n_v, pt * ph * pw * c), entries in that order -> (C, F, H, W), entry by entry."""
    (pf, ph, pw), (nf, nh, nw) = patch, grid
    z = torch.zeros(channels, nf * pf, nh * ph, nw * pw, dtype=rows.dtype)
    for n, row in enumerate(rows):
        f, h, w = n // (nh * nw), n // nw % nh, n % nw
        z[:, f * pf : (f + 1) * pf, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw] = row.reshape(
            pf, ph, pw, channels
        ).permute(3, 0, 1, 2)
    return z


def reference_model(model, z_v, z_t, tau_v, tau_t, c):
    """One sample: Wan's own output (noise - data) and the text head's, or None without text."""
    p, cfg = parameters64(model), model.config
    head_dim = cfg.dim // cfg.num_heads
    h_v, grid = reference_patches(p, cfg, z_v.double())
    streams, rotations, clocks = (
        [h_v],
        [(len(h_v), video_angles(grid, head_dim), "adjacent")],
        [("", float(tau_v))],
    )
    if z_t is not None:
        streams.append(linear(p, "text_in", z_t.double()))
        rotations.append((len(z_t), text_angles(len(z_t), head_dim), "halves"))
        clocks.append(("_t", float(tau_t)))
    e = [
        linear(
            p,
            f"time_embedding{s}.2",
            silu(linear(p, f"time_embedding{s}.0", clock_features(tau, cfg.freq_dim))),
        )
        for s, tau in clocks
    ]
    e6 = [
        linear(p, f"time_projection{s}.1", silu(e_m)).reshape(6, cfg.dim)
        for (s, _), e_m in zip(clocks, e)
    ]
    c = torch.cat(
        [c.double(), torch.zeros(cfg.prompt_len - len(c), cfg.prompt_dim, dtype=torch.float64)]
    )
    c = linear(p, "text_embedding.2", gelu(linear(p, "text_embedding.0", c)))
    for i in range(cfg.num_layers):
        streams = reference_block(p, f"blocks.{i}", cfg, streams, e6, c, rotations)

    shift, scale = p["head.modulation"][0] + e[0]
    out_v = linear(p, "head.head", standardise(streams[0], cfg.eps) * (1 + scale) + shift)
    wan = reference_unpatchify(out_v, grid, cfg.patch_size, cfg.out_dim)
    if z_t is None:
        return wan, None
    shift, scale = p["head_t.modulation"][0] + e[1]
    x = standardise(streams[1], 1e-5) * p["head_t.norm.weight"]
    return wan, linear(p, "head_t.head", x * (1 + scale) + shift)


# ---------------------------------------------------------------- paths and clocks


def test_path_is_noise_at_0_data_at_1_and_its_velocity_is_data_minus_noise():
    z0, z1 = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64, generator=seeded(0))
    tau = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    z, u = interpolate(z0, z1, tau)
    assert torch.equal(z[0], z0[0]) and torch.equal(z[3], z1[3])
    for i, t in enumerate(tau.tolist()):
        assert gap(z[i], z0[i] + t * (z1[i] - z0[i])) < 1e-12
        ahead, _ = interpolate(z0, z1, tau + 1e-3)
        assert gap((ahead[i] - z[i]) / 1e-3, u[i]) < 1e-9


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 8.0])
def test_warp_is_wans_sigma_shift(shift):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = 1 - u
    assert gap(1 - warp(u, shift), shift * sigma / (1 + (shift - 1) * sigma)) < 1e-14
    assert gap(warp(warp(u, shift), 1 / shift), u) < 1e-14
    assert (
        gap(
            torch.tensor(clock_grid(7, shift), dtype=torch.float64),
            warp(torch.linspace(0, 1, 8, dtype=torch.float64), shift),
        )
        == 0
    )


def test_sinusoid_is_wans_cosines_first_of_t_from_1000_to_0():
    tau = torch.tensor([0.0, 0.123, 0.999, 1.0])
    assert (
        gap(sinusoid(tau, 256), torch.stack([clock_features(t, 256) for t in tau.tolist()])) < 1e-6
    )  # float32 angles: off by 3e-5
    assert torch.equal(sinusoid(torch.ones(1), 8), torch.tensor([[1.0] * 4 + [0.0] * 4]))
    assert sinusoid(torch.zeros(1), 8)[0, 0].item() == pytest.approx(math.cos(1000), abs=1e-7)


# ---------------------------------------------------------------- positions


def test_video_rope_gives_frames_rows_columns_44_42_42_of_a_128_wide_head():
    cos, sin = video_rope((3, 4, 5), 128, torch.device("cpu"))
    f, h, w, i = 2, 1, 4, torch.arange(22, dtype=torch.float64)
    row = (f * 4 + h) * 5 + w
    angle = torch.cat(
        [
            f * 10000 ** (-2 * i / 44),
            h * 10000 ** (-2 * i[:21] / 42),
            w * 10000 ** (-2 * i[:21] / 42),
        ]
    )
    assert cos.shape == (60, 64)
    assert gap(cos[row], angle.cos()) < 1e-7 and gap(sin[row], angle.sin()) < 1e-7


@pytest.mark.parametrize("head_dim", [6, 16, 20, 128])
@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
def test_rotate_is_multiplication_by_complex_units(head_dim, pairs):
    size, n = (2, 3, 4), 24
    x = torch.randn(2, 3, n, head_dim, generator=seeded(head_dim))
    rope, angles = (
        (video_rope(size, head_dim, x.device), video_angles(size, head_dim))
        if pairs == "adjacent"
        else (text_rope(n, head_dim, x.device), text_angles(n, head_dim))
    )
    turned = rotate(x, *rope, pairs)
    for b in range(2):
        for m in range(3):
            assert gap(turned[b, m], turn(x[b, m].double(), angles, pairs)) < 1e-5


def test_rotated_products_depend_on_relative_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=seeded(0))
    everywhere = lambda x, rope, pairs: rotate(x.expand(1, 1, len(rope[0]), 16), *rope, pairs)[0, 0]
    rope = text_rope(12, 16, q.device)
    scores = everywhere(q, rope, "halves") @ everywhere(k, rope, "halves").T
    assert gap(scores[2:, 2:], scores[:-2, :-2]) < 1e-5
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-3
    rope = video_rope((3, 4, 5), 16, q.device)
    scores = (everywhere(q, rope, "adjacent") @ everywhere(k, rope, "adjacent").T).view(
        3, 4, 5, 3, 4, 5
    )
    assert gap(scores[1:, 2:, 3:, 1:, 2:, 3:], scores[:-1, :-2, :-3, :-1, :-2, :-3]) < 1e-5
    assert (
        min(
            gap(scores[0, 0, 0, 1, 0, 0], s)
            for s in (scores[0, 0, 0, 0, 1, 0], scores[0, 0, 0, 0, 0, 1])
        )
        > 1e-4
    )


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize(
    "patch, size", [((1, 2, 2), (3, 4, 6)), ((2, 2, 2), (6, 4, 6)), ((2, 1, 3), (2, 3, 9))]
)
def test_a_head_that_undoes_the_patch_embedding_gives_back_the_latent(patch, size):
    channels, k = 3, 3 * math.prod(patch)
    config = Config(**(TINY | dict(dim=2 * k, num_heads=1, patch_size=patch)))
    model = UniViGU(config)
    model.blocks = nn.ModuleList()
    order = (
        torch.arange(k).view(channels, *patch).permute(1, 2, 3, 0).flatten()
    )  # the convolution's order, read as (pt, ph, pw, c)
    with torch.no_grad():
        for p in (
            *model.time_embedding.parameters(),
            model.head.modulation,
            model.head.head.weight,
        ):
            p.zero_()
        model.patch_embedding.weight.copy_(
            torch.cat([torch.eye(k), -torch.eye(k)]).view(2 * k, channels, *patch)
        )
        model.head.head.weight[torch.arange(k), order] = -1  # minus: v_v is minus Wan's output
    z = torch.randn(2, channels, *size, generator=seeded(0))
    cells = nn.functional.conv3d(z.square(), torch.full((1, channels, *patch), 1 / k), stride=patch)
    for axis, repeat in enumerate(patch):
        cells = cells.repeat_interleave(repeat, dim=2 + axis)
    z = z / cells.sqrt()  # tokens (x, -x) with x of unit RMS pass the head's norm unchanged
    v_v, _ = model(z, None, torch.rand(2), None, torch.zeros(2, 1, config.prompt_dim))
    assert gap(v_v, z) < 1e-5


# ---------------- the block and the model against the reference


@pytest.mark.parametrize("with_text", [False, True])
def test_block_equals_wans_equations(model, with_text):
    cfg, g = model.config, seeded(3)
    r = lambda *shape: torch.randn(*shape, generator=g)
    grid, n, head_dim = (2, 3, 2), 5, 16
    h, e, c = [r(2, 12, 32), r(2, n, 32)], [r(2, 6, 32), r(2, 6, 32)], r(2, 6, 32)
    rope = [
        (*video_rope(grid, head_dim, c.device), "adjacent"),
        (*text_rope(n, head_dim, c.device), "halves"),
    ]
    rotations = [
        (12, video_angles(grid, head_dim), "adjacent"),
        (n, text_angles(n, head_dim), "halves"),
    ]
    streams = 2 if with_text else 1
    with torch.no_grad():
        named = [dict(zip("vt", entries[:streams])) for entries in (h, e, rope)]
        out, memory = model.blocks[1](*named[:2], c, named[2])
        assert memory is None
        out = list(out.values())
    for b in range(2):
        row = lambda tensors: [t[b].double() for t in tensors[:streams]]
        wanted = reference_block(
            parameters64(model), "blocks.1", cfg, row(h), row(e), c[b].double(), rotations[:streams]
        )
        assert len(out) == streams and max(gap(o[b], w) for o, w in zip(out, wanted)) < 1e-4


@pytest.mark.parametrize(
    "changes, size, n, length",
    [
        ({}, (3, 4, 6), 5, 6),
        (dict(patch_size=(2, 2, 2)), (6, 4, 6), 1, 4),
        (
            dict(
                patch_size=(2, 1, 3), num_heads=4, out_dim=5, text_ffn_dim=40, text_ffn_init="copy"
            ),
            (2, 3, 3),
            9,
            1,
        ),
    ],
)
def test_model_equals_wans_equations_and_v_v_is_minus_wans_output(changes, size, n, length):
    model = build(seed=5, **changes)
    z_v, z_t, tau_v, tau_t, c = inputs(2, size, n, length)
    with torch.no_grad():
        v_v, v_t = model(z_v, z_t, tau_v, tau_t, c)
        plain, none = model(z_v, None, tau_v, None, c)
    assert none is None and gap(plain, v_v) > 1e-2  # the text is heard
    for b in range(2):
        wan, text = reference_model(model, z_v[b], z_t[b], tau_v[b], tau_t[b], c[b])
        assert wan.abs().max() > 0.3 and gap(v_v[b], -wan) < 1e-4 and gap(v_t[b], text) < 1e-4
        assert gap(plain[b], -reference_model(model, z_v[b], None, tau_v[b], None, c[b])[0]) < 1e-4


def test_without_text_the_text_parameters_change_no_bit_of_the_video(model):
    z_v, _, tau_v, _, c = inputs()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if UniViGU.is_text(name):
                p.normal_()
        assert torch.equal(model(z_v, None, tau_v, None, c)[0], other(z_v, None, tau_v, None, c)[0])


def test_tokens_lie_side_by_side_in_every_block(model):
    """A convolution leaves the channels outermost; kept so, every norm of every block copies."""
    found = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, args: found.extend(h.is_contiguous() for h in args[0].values())
        )
    z_v, z_t, tau_v, tau_t, c = inputs()
    model(z_v, z_t, tau_v, tau_t, c)
    assert found == [True] * 2 * len(model.blocks)


def test_each_clock_reaches_its_own_time_embedding(model):
    seen = {}
    hooks = [
        getattr(model, name).register_forward_pre_hook(
            lambda _, x, name=name: seen.__setitem__(name, x[0])
        )
        for name in ("time_embedding", "time_embedding_t")
    ]
    z_v, z_t, tau_v, tau_t, c = inputs()
    with torch.no_grad():
        model(z_v, z_t, tau_v, tau_t, c)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen["time_embedding"], sinusoid(tau_v, 12)) and torch.equal(
        seen["time_embedding_t"], sinusoid(tau_t, 12)
    )


def test_a_row_of_a_batch_equals_the_sample_alone(model):
    batch = inputs(b=4)
    with torch.no_grad():
        together = model(*batch)
        for i in range(4):
            alone = model(*(s[i : i + 1] for s in batch))
            assert max(gap(t[i], a[0]) for t, a in zip(together, alone)) < 1e-5


@pytest.mark.parametrize("size", [(1, 2, 2), (5, 2, 8)])
def test_sizes_within_one_model_follow_the_input(model, size):
    z_v, z_t, tau_v, tau_t, c = inputs(1, size, n=3)
    with torch.no_grad():
        v_v, v_t = model(z_v, z_t, tau_v, tau_t, c)
    wan, text = reference_model(model, z_v[0], z_t[0], tau_v[0], tau_t[0], c[0])
    assert gap(v_v[0], -wan) < 1e-4 and gap(v_t[0], text) < 1e-4


@pytest.mark.parametrize(
    "which, shape, wanted",
    [
        (0, (2, 3, 3, 4, 5), "(2, 3, a multiple of 1, a multiple of 2, a multiple of 2)"),
        (0, (2, 4, 3, 4, 6), "(2, 3, a multiple of 1, a multiple of 2, a multiple of 2)"),
        (0, (2, 3, 4, 6), "(2, 3, a multiple of 1, a multiple of 2, a multiple of 2)"),
        (0, (2, 3, 0, 4, 6), "(2, 3, a multiple of 1, a multiple of 2, a multiple of 2)"),
        (1, (2, 5, 9), "(2, N, 8)"),
        (1, (1, 5, 8), "(2, N, 8)"),
        (1, (2, 8), "(2, N, 8)"),
        (2, (1,), "wanted (2)"),
        (2, (2, 1), "wanted (2)"),
        (3, (), "wanted (2)"),
        (4, (2, 7, 10), "(2, at most 6, 10)"),
        (4, (2, 6, 9), "(2, at most 6, 10)"),
        (4, (3, 6, 10), "(2, at most 6, 10)"),
    ],
)
def test_wrong_shapes_are_refused_with_the_shape_found_and_the_shape_wanted(
    model, which, shape, wanted
):
    args = list(inputs())
    args[which] = torch.zeros(shape)
    with pytest.raises(ValueError) as error:
        model(*args)
    name = ("z_v", "z_t", "tau_v", "tau_t", "c")[which]
    assert f"{name} has shape {shape}" in str(error.value) and wanted in str(error.value)


def test_a_missing_text_clock_is_refused(model):
    z_v, z_t, tau_v, _, c = inputs()
    with pytest.raises(ValueError, match="tau_t has shape None"):
        model(z_v, z_t, tau_v, None, c)


# ---------------------------------------------------------------- embeddings


def test_unit_rows_have_unit_rms_whatever_the_raw_scale_and_literal_rows_are_raw(model):
    E, other = model.embedding_matrix(), copy.deepcopy(model)
    with torch.no_grad():
        other.token_embedding.weight.mul_(torch.logspace(-3, 3, 11)[:, None])
    assert (
        gap(E.square().mean(1), torch.ones(11)) < 1e-6 and gap(other.embedding_matrix(), E) < 1e-5
    )
    other.config = Config(**(TINY | dict(embedding="literal")))
    assert torch.equal(other.embedding_matrix(), other.token_embedding.weight)


def test_embed_reads_rows_and_decode_finds_them_again():
    model = build(vocab_size=300, text_dim=16)
    y = torch.randperm(300, generator=seeded(0)).view(3, 100)
    z = model.embed(y)
    assert gap(z[1, 7], model.embedding_matrix()[y[1, 7]]) == 0
    assert torch.equal(model.decode(z), y) and torch.equal(model.decode(0.1 * z), y)
    noisy = torch.randn(2, 50, 16, generator=seeded(2))
    nearest = torch.cdist(noisy.double(), model.embedding_matrix().double()[None]).argmin(-1)
    assert torch.equal(model.decode(noisy), nearest)  # with unit rows eq. 8 is the nearest row


@pytest.mark.parametrize("embedding", ["literal", "unit"])
def test_only_the_literal_reading_gains_from_shrinking_the_embedding(model, embedding):
    """A network that always points at 0 has error |E[y]|^2 / (1 - tau)^2: it vanishes with E unless
    the rows' scale is fixed.
    """
    model = copy.deepcopy(model)
    model.config = Config(**(TINY | dict(embedding=embedding)))
    model.forward = lambda z_v, z_t, tau_v, tau_t, c: (
        torch.zeros_like(z_v),
        -z_t / (1 - tau_t).view(-1, 1, 1),
    )
    weight = model.token_embedding.weight
    y = torch.arange(10).view(2, 5)

    def text_loss():
        total, parts = uni_flow_loss(
            model,
            torch.randn(2, 3, 1, 2, 2, generator=seeded(0)),
            y,
            torch.zeros(2, 1, 10),
            lambda_v=0.0,
            lambda_t=1.0,
            anchor=0,
            generator=seeded(1),
        )
        return total, parts

    total, first = text_loss()
    closed = model.embed(y).square().mean((1, 2)) / (1 - first["tau_t"]) ** 2
    assert torch.allclose(first["text"], closed, rtol=1e-4)
    total.backward()
    along = (weight.grad * weight).sum().item()
    assert along == pytest.approx(
        2 * total.item() if embedding == "literal" else 0.0, abs=1e-3 * total.item()
    )
    with torch.no_grad():
        weight.mul_(0.1)
    ratio = text_loss()[1]["text"] / first["text"]
    assert torch.allclose(
        ratio, torch.full((2,), 0.01 if embedding == "literal" else 1.0), rtol=1e-2
    )


# ---------------------------------------------------------------- the training clocks


def uniformity(x):
    """Kolmogorov-Smirnov distance to U(0, 1)."""
    x = x.sort().values.double()
    return (x - (torch.arange(len(x)) + 0.5) / len(x)).abs().max().item()


def correlation(*rows):
    return torch.corrcoef(torch.stack(rows))[0, 1].abs().item()


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_independent_clocks_are_uniform_warped_for_text_and_independent(shift):
    tau_v, tau_t, loss_mask_v, loss_mask_t, keep = sample_clocks(
        "independent", 20000, shift, 0.3, seeded(1)
    )
    assert uniformity(tau_v) < 0.012 and uniformity(warp(tau_t, 1 / shift)) < 0.012
    assert (
        correlation(tau_v, tau_t) < 0.02
        and correlation(keep, tau_v) < 0.02
        and correlation(keep, tau_t) < 0.02
    )
    assert (
        loss_mask_v.min() == 1
        and loss_mask_t.min() == 1
        and keep.mean().item() == pytest.approx(0.7, abs=0.01)
    )


def test_mixture_puts_its_shares_on_the_samplers_lines():
    n, p_drop, shift, ahead = 80000, 0.6, 4.0, 0.25
    tau_v, tau_t, loss_mask_v, loss_mask_t, keep = sample_clocks(
        "mixture", n, shift, p_drop, seeded(0), joint_shift=ahead
    )
    line = {"understand": tau_v == 1, "generate": tau_t == 1}
    line["joint"] = (
        ~line["understand"] & ~line["generate"] & ((tau_t - warp(tau_v, ahead)).abs() < 1e-6)
    )
    line["independent"] = ~(line["understand"] | line["generate"] | line["joint"])
    assert sum(share for share, _ in MIXTURE.values()) == pytest.approx(1)
    for name, (share, drop) in MIXTURE.items():
        rows = line[name]
        assert rows.float().mean().item() == pytest.approx(share, abs=0.01), name
        assert 1 - keep[rows].mean().item() == pytest.approx(
            p_drop if drop is None else drop, abs=0.015
        ), name
    assert torch.equal(loss_mask_v, 1 - line["understand"].float()) and torch.equal(
        loss_mask_t, 1 - line["generate"].float()
    )
    assert (
        uniformity(warp(tau_t[line["understand"]], 1 / shift)) < 0.015
        and uniformity(torch.special.ndtr(tau_v[line["generate"]].logit())) < 0.02
    )
    assert uniformity(tau_v[line["joint"]]) < 0.02
    assert correlation(tau_v[line["independent"]], tau_t[line["independent"]]) < 0.03


def test_a_batch_covers_each_clock_evenly():
    tau_v, tau_t, *_ = sample_clocks("independent", 64, generator=seeded(3))
    for tau in (tau_v, tau_t):  # one in each 64th of [0, 1]
        assert torch.equal((tau * 64).floor().sort().values, torch.arange(64.0))
    assert not torch.equal(tau_v.argsort(), tau_t.argsort())
    drawn = sample_clocks("mixture", 100, p_drop=1.0, generator=seeded(4))
    assert (drawn.loss_mask_v == 0).sum() == round(100 * MIXTURE["understand"][0])


def test_unknown_clocks_are_refused():
    with pytest.raises(
        ValueError, match="clocks is 'both', wanted one of mixture, independent, logit-normal"
    ):
        sample_clocks("both", 2)


# ---------------------------------------------------------------- the loss, with a spy for a model


class Spy:
    """Stands for a model: records what it is shown and answers with `answer` of it."""

    def __init__(self, answer=None, E=None, **changes):
        self.config = Config(**(TINY | changes))
        self.answer = answer or (
            lambda z_v, z_t, tau_v, tau_t, c: (torch.zeros_like(z_v), torch.zeros_like(z_t))
        )
        self.E = torch.randn(11, 8, dtype=torch.float64, generator=seeded(9)) if E is None else E
        self.calls, self.decoded, self.text_flow = [], None, EmbeddingFlow()

    def __call__(self, *state):
        self.calls.append(state)
        return self.answer(*state)

    def embed(self, y):
        return self.E[y]

    def embedding_matrix(self):
        return self.E

    def decode(self, z_t):
        self.decoded = z_t
        return torch.cdist(z_t.double(), self.E.double()[None].expand(len(z_t), -1, -1)).argmin(-1)


def data(b, seed=2, length=4):
    g = seeded(seed)
    return (
        torch.randn(b, 3, 3, 4, 6, dtype=torch.float64, generator=g),
        torch.randint(11, (b, 5), generator=g),
        torch.randn(b, length, 10, dtype=torch.float64, generator=g),
    )


def some_velocity(z_v, z_t, tau_v, tau_t, c):
    return z_v.sin() + tau_v.view(-1, 1, 1, 1, 1), z_t.cos() - tau_t.view(-1, 1, 1)


@pytest.mark.parametrize(
    "clocks, anchor, lambda_v, lambda_t, text_shift",
    [
        ("independent", 0.0, 1.0, None, 1.0),
        ("independent", 0.1, 0.7, 2.5, 3.0),
        ("mixture", 0.2, 1.0, None, 4.0),
        ("mixture", 0.0, 0.0, 1.0, 1.0),
    ],
)
def test_loss_equals_a_double_loop_over_samples_and_entries(
    clocks, anchor, lambda_v, lambda_t, text_shift
):
    b, spy = 24, Spy(some_velocity, text_shift=text_shift, patch_size=(1, 2, 3))
    z_v1, y, c = data(b)
    total, parts = uni_flow_loss(
        spy,
        z_v1,
        y,
        c,
        clocks=clocks,
        anchor=anchor,
        lambda_v=lambda_v,
        lambda_t=lambda_t,
        generator=seeded(4),
    )
    (z_v, z_t, tau_v, tau_t, _), z_t1 = spy.calls[0], spy.E[y]
    v_v, v_t = some_velocity(z_v, z_t, tau_v, tau_t, None)
    entries_v, tokens_v, tokens_t = 3 * 3 * 4 * 6, 3 * 2 * 2, 5
    weight_t = tokens_v / tokens_t if lambda_t is None else lambda_t
    seen, wanted = set(), 0.0
    for i in range(b):
        tv, tt = tau_v[i].item(), tau_t[i].item()
        seen.add((tv == 1, tt == 1))
        se_v = se_t = ce = 0.0
        if tv < 1:
            for v, z, z1 in zip(
                v_v[i].flatten().tolist(), z_v[i].flatten().tolist(), z_v1[i].flatten().tolist()
            ):
                se_v += (
                    v - (z1 - z) / (1 - tv)
                ) ** 2  # on the path z = (1 - tau) z0 + tau z1: z1 - z0 = (z1 - z) / (1 - tau)
        if tt < 1:
            for v, z, z1 in zip(
                v_t[i].flatten().tolist(), z_t[i].flatten().tolist(), z_t1[i].flatten().tolist()
            ):
                se_t += (v - (z1 - z) / (1 - tt)) ** 2
            for n in range(5):
                point = z_t[i, n] + (1 - tt) * v_t[i, n]
                logits = [(point * row).sum().item() / math.sqrt(8) for row in spy.E]
                ce += (math.log(sum(map(math.exp, logits))) - logits[y[i, n]]) / 5
        wanted += (lambda_v * se_v + weight_t * se_t) / entries_v / b + anchor * ce / b
        assert parts["video"][i].item() == pytest.approx(se_v / entries_v, rel=1e-5, abs=1e-12)
        assert parts["text"][i].item() == pytest.approx(se_t / 40, rel=1e-5, abs=1e-12)
        assert parts["anchor"][i].item() == pytest.approx(ce if anchor else 0, rel=1e-6)
    assert total.item() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(parts["tau_v"], tau_v) and torch.equal(parts["tau_t"], tau_t)
    assert clocks == "independent" or seen == {(True, False), (False, True), (False, False)}


def test_repulsion_is_the_mean_over_rows_of_their_squared_cosines_with_the_others():
    model, (z_v1, y, c) = build(embedding="literal"), data(3)
    losses = [
        uni_flow_loss(
            model, z_v1.float(), y, c.float(), anchor=0, repulsion=weight, generator=seeded(0)
        )[0]
        for weight in (0.0, 0.5)
    ]
    E = model.token_embedding.weight.detach()
    cosine = lambda a, b: (a @ b / (a.norm() * b.norm())).item()
    rows = range(len(E))
    wanted = sum(cosine(E[i], E[j]) ** 2 for i in rows for j in rows if i != j) / len(E)
    assert (losses[1] - losses[0]).item() == pytest.approx(0.5 * wanted, rel=1e-4)


def test_plain_generator_loss_is_the_mean_squared_velocity_error():
    spy = Spy(lambda z_v, z_t, tau_v, tau_t, c: (z_v.sin(), None))
    z_v1, _, c = data(6)
    total, parts = uni_flow_loss(spy, z_v1, None, c, generator=seeded(4))
    z_v, z_t, tau_v, tau_t, _ = spy.calls[0]
    assert z_t is None and tau_t is None and parts["loss_mask_v"].tolist() == [1.0] * 6
    u = (z_v1 - z_v) / (1 - tau_v).view(-1, 1, 1, 1, 1)
    each = torch.stack([((z.sin() - u_i) ** 2).mean() for z, u_i in zip(z_v, u)])
    assert torch.allclose(parts["video"], each, rtol=1e-5) and total.item() == pytest.approx(
        each.mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("clocks", ["independent", "mixture"])
def test_the_noise_applied_equals_the_time_conditioned_on(clocks):
    b = 200
    z_v1, y, c = data(b)
    first, second = (
        Spy(text_shift=3.0),
        Spy(text_shift=3.0, E=torch.randn(11, 8, dtype=torch.float64, generator=seeded(10))),
    )
    shown = []
    for spy, z in ((first, z_v1), (second, z_v1 + 1 + z_v1.square())):
        uni_flow_loss(spy, z, y, c, clocks=clocks, generator=seeded(4))  # same draws, other data
        shown.append((*spy.calls[0], z, spy.E[y]))
    (z_v, z_t, tau_v, tau_t, _, d_v, d_t), (w_v, w_t, *_, e_v, e_t) = shown
    for z, w, d, e, tau in ((z_v, w_v, d_v, e_v, tau_v), (z_t, w_t, d_t, e_t, tau_t)):
        z, w, d, e = (s.flatten(1) for s in (z, w, d, e))
        slope = ((w - z) * (e - d)).sum(1) / (e - d).square().sum(
            1
        )  # z moves with the data by exactly tau
        assert gap(slope, tau) < 1e-6
        noisy = tau < 0.9
        noise = ((z - tau[:, None] * d) / (1 - tau)[:, None])[noisy]
        assert abs(noise.mean().item()) < 0.03 and noise.std().item() == pytest.approx(1, abs=0.02)
        assert noise.std(0).min() > 0.5  # every sample has noise of its own
    assert (tau_v - tau_t).abs().max() > 0.5


@pytest.mark.parametrize("moved, still", [("v", "t"), ("t", "v")])
def test_moving_one_clock_leaves_the_other_modality_alone(monkeypatch, moved, still):
    z_v1, y, c = data(4)
    one = torch.ones(4)
    runs = []
    for tau in (torch.full((4,), 0.2), torch.full((4,), 0.8)):
        fixed = torch.tensor([0.1, 0.4, 0.6, 0.9])
        clocks = (tau, fixed) if moved == "v" else (fixed, tau)
        monkeypatch.setattr(
            univigu, "sample_clocks", lambda *_, clocks=clocks: (*clocks, one, one, one)
        )
        spy = Spy()
        _, parts = uni_flow_loss(spy, z_v1, y, c, anchor=0, generator=seeded(4))
        z_v, z_t, tau_v, tau_t, _ = spy.calls[0]
        runs.append({"v": (z_v, tau_v, parts["video"]), "t": (z_t, tau_t, parts["text"])})
    assert all(torch.equal(a, b) for a, b in zip(runs[0][still], runs[1][still]))
    assert (
        gap(runs[0][moved][0], runs[1][moved][0]) > 0.5
        and gap(runs[0][moved][1], runs[1][moved][1]) > 0.5
    )


@pytest.mark.parametrize("off", ["v", "t"])
def test_a_modality_that_is_off_contributes_nothing_whatever_its_error(monkeypatch, off):
    z_v1, y, c = data(4)
    tau, on, rows = torch.full((4,), 0.5), torch.ones(4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    monkeypatch.setattr(
        univigu,
        "sample_clocks",
        lambda *_: (tau, tau, rows if off == "v" else on, rows if off == "t" else on, on),
    )

    def loss(wrong):
        answer = dict(v=torch.zeros_like(z_v1), t=torch.zeros(4, 5, 8, dtype=torch.float64))
        answer[off] = answer[off] + wrong.view(-1, *[1] * (answer[off].ndim - 1))
        return uni_flow_loss(
            Spy(lambda *_: (answer["v"], answer["t"])), z_v1, y, c, generator=seeded(4)
        )

    (clean, parts), (off_row, _), (on_row, _) = (
        loss(torch.zeros(4)),
        loss(torch.tensor([0.0, 99, 0, 0])),
        loss(torch.tensor([99.0, 0, 0, 0])),
    )
    assert off_row == clean and on_row > clean + 10
    name = "video" if off == "v" else "text"
    assert parts[name][[1, 3]].abs().max() == 0 and parts[name][[0, 2]].min() > 0


@pytest.mark.parametrize("p_drop", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_text", [False, True])
def test_prompts_drop_sample_by_sample_at_their_rate(p_drop, with_text):
    b, spy = (
        4000,
        Spy(
            lambda z_v, z_t, tau_v, tau_t, c: (
                torch.zeros_like(z_v),
                None if z_t is None else torch.zeros_like(z_t),
            )
        ),
    )
    z_v1, y, c = (
        torch.zeros(b, 3, 1, 2, 2),
        torch.zeros(b, 5, dtype=torch.long) if with_text else None,
        data(b)[2],
    )
    null = torch.full((1, 4, 10), 7.0, dtype=torch.float64)
    for c_null in (None, null):
        uni_flow_loss(spy, z_v1, y, c, p_drop=p_drop, c_null=c_null, generator=seeded(4))
        shown = spy.calls[-1][4]
        dropped = (shown == (0 if c_null is None else 7)).flatten(1).all(1)
        assert torch.equal(shown[~dropped], c[~dropped])
        assert dropped.double().mean().item() == pytest.approx(
            p_drop, abs=0.02 if 0 < p_drop < 1 else 0
        )


def test_same_generator_seed_same_loss_and_another_seed_another(model):
    z_v1, y, c = (s.float() if s.is_floating_point() else s for s in data(3))
    with torch.no_grad():
        a, b, other = (
            uni_flow_loss(model, z_v1, y, c, p_drop=0.5, generator=seeded(s))[0].item()
            for s in (0, 0, 1)
        )
    assert a == b != other


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("text_output", ["velocity", "x1"])
@pytest.mark.parametrize("anchor", [0.0, 0.1])
def test_the_loss_with_text_reaches_every_parameter(text_output, anchor):
    model = build(text_output=text_output)
    z_v1, _, c = data(3)
    y = torch.tensor([[0, 1, 2, 3, 4]] * 3)
    uni_flow_loss(model, z_v1.float(), y, c.float(), anchor=anchor, generator=seeded(0))[
        0
    ].backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    ] == []
    rows = model.token_embedding.weight.grad.abs().amax(1)
    assert rows[:5].min() > 0 and (rows[5:].min() > 0 if anchor else rows[5:].max() == 0)


@pytest.mark.parametrize("embedding", ["unit", "literal"])
def test_the_embeddings_gradient_is_the_derivative_of_the_loss(embedding):
    """The rows enter through the network's input, the target and the anchor; all three paths carry
    gradient.
    """
    model = build(embedding=embedding)
    z_v1, y, c = data(3)
    E = model.token_embedding.weight
    loss = lambda: uni_flow_loss(
        model, z_v1.float(), y, c.float(), anchor=0.5, generator=seeded(0)
    )[0]
    loss().backward()
    for seed in range(3):
        step = 1e-2 * torch.randn(E.shape, generator=seeded(seed))
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                E.add_(sign * step)
                around.append(loss().item())
                E.sub_(sign * step)
        assert around[0] - around[1] == pytest.approx(
            2 * (E.grad * step).sum().item(), rel=0.01, abs=2e-5
        )


def test_the_plain_generator_loss_reaches_all_of_wan_and_nothing_of_the_text():
    model = build()
    z_v1, _, c = data(3)
    uni_flow_loss(model, z_v1.float(), None, c.float(), generator=seeded(0))[0].backward()
    reached = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert (
        reached
        == touched
        == {name for name, _ in model.named_parameters() if not UniViGU.is_text(name)}
    )


# ---------------- the samplers, on the exact velocity of a Gaussian

MU_V, S_V, MU_T, S_T = 0.7, 0.5, -0.4, 0.8


def gaussian_velocity(z, tau, mu, s):
    """E[z1 - z0 | z] for z0 ~ N(0, 1), z1 ~ N(mu, s^2). Following it carries z0 exactly to mu + s
    z0.
    """
    tau = tau.double().view(-1, *[1] * (z.ndim - 1))
    return mu + (tau * s**2 - (1 - tau)) / ((1 - tau) ** 2 + tau**2 * s**2) * (z - tau * mu)


def gaussian_world(z_v, z_t, tau_v, tau_t, c):
    return gaussian_velocity(z_v, tau_v, MU_V, S_V), None if z_t is None else gaussian_velocity(
        z_t, tau_t, MU_T, S_T
    )


SHAPE, B = (3, 2, 4, 4), 40


def run(mode, spy, steps, seed=0, **options):
    """One sampler on B samples in float64. Returns {"v" or "t": (noise it began with, data it ended
    with)}.
    """
    c, y = torch.zeros(B, 4, 10, dtype=torch.float64), torch.arange(B * 5).view(B, 5) % 11
    z_v = torch.full((B, *SHAPE), 0.25, dtype=torch.float64)
    options |= dict(steps=steps, generator=seeded(seed))
    if mode == "understand":
        spy.result = understand(spy, z_v, c, **options)
        return {"t": (spy.calls[0][1], spy.decoded)}
    if mode == "joint":
        out, spy.result = joint(spy, c, SHAPE, **options)
        return {"v": (spy.calls[0][0], out), "t": (spy.calls[0][1], spy.decoded)}
    out = generate(spy, y if mode == "generate" else None, c, SHAPE, **options)
    return {"v": (spy.calls[0][0], out)}


MODES = ["understand", "generate", "plain", "joint"]


@pytest.mark.parametrize(
    "mode, options",
    [
        ("understand", {}),
        ("understand", dict(shift=3.0)),
        ("generate", {}),
        ("plain", dict(shift=2.0)),
        ("joint", {}),
        ("joint", dict(shift=2.0, text_shift=0.5)),
    ],
)
def test_samplers_carry_noise_to_data_at_first_order(mode, options):
    error = {}
    for steps in (100, 200):
        for name, (z0, z1) in run(mode, Spy(gaussian_world), steps, **options).items():
            mu, s = dict(v=(MU_V, S_V), t=(MU_T, S_T))[name]
            error[name, steps] = (z1 - (mu + s * z0)).square().mean().sqrt().item()
            if steps == 200:
                n = math.sqrt(z1.numel())
                assert (
                    abs(z0.mean()) < 4 / n and abs(z0.std() - 1) < 4 / n and z0.std(0).min() > 0.5
                )
                assert (
                    abs(z1.mean() - mu) < 4 * s / n + 0.01 and abs(z1.std() - s) < 4 * s / n + 0.01
                )
                assert error[name, 200] < 0.01 and error[name, 100] / error[
                    name, 200
                ] == pytest.approx(2, abs=0.1)
    assert len(error) == (4 if mode == "joint" else 2)


def wan_grid(steps, shift):
    sigmas = [1 - i / steps for i in range(steps + 1)]
    return [1 - shift * s / (1 + (shift - 1) * s) for s in sigmas]


@pytest.mark.parametrize(
    "mode, options, shift_v, shift_t",
    [
        ("understand", {}, None, 4.0),
        ("understand", dict(shift=2.0), None, 2.0),
        ("generate", {}, 1.0, None),
        ("generate", dict(shift=5.0), 5.0, None),
        ("plain", dict(shift=3.0), 3.0, None),
        ("joint", {}, 1.0, 0.5),
        ("joint", dict(shift=3.0), 3.0, 1.5),
        ("joint", dict(shift=3.0, text_shift=1.0), 3.0, 1.0),
        ("joint", dict(shift=3.0, text_shift=3.0), 3.0, 3.0),
    ],
)
def test_the_model_sees_each_clock_on_its_own_grid_and_the_condition_clean(
    mode, options, shift_v, shift_t
):
    spy, steps, told = Spy(gaussian_world, text_shift=4.0, joint_shift=0.5), 6, []
    run(mode, spy, steps, callback=lambda *args: told.append(args), **options)
    grid_v, grid_t = (
        [1.0] * (steps + 1) if s is None else wan_grid(steps, s) for s in (shift_v, shift_t)
    )
    assert len(spy.calls) == len(told) - 1 == steps
    for i, (z_v, z_t, tau_v, tau_t, _) in enumerate(spy.calls):
        assert (
            tau_v.shape == (B,)
            and gap(tau_v, torch.full((B,), grid_v[i], dtype=torch.float64)) < 1e-6
        )
        assert (
            tau_t is None
            if mode == "plain"
            else gap(tau_t, torch.full((B,), grid_t[i], dtype=torch.float64)) < 1e-6
        )
        if mode == "understand":
            assert torch.equal(z_v, torch.full((B, *SHAPE), 0.25, dtype=torch.float64))
        if mode == "generate":
            assert torch.equal(z_t, spy.E[torch.arange(B * 5).view(B, 5) % 11])
    for k, (step, tau_v, tau_t, z_v, z_t, v_v, v_t) in enumerate(told):
        assert step == k and tau_v == pytest.approx(grid_v[k]) and tau_t == pytest.approx(grid_t[k])
        assert (v_v is None) == (k == 0 or mode == "understand") and (v_t is None) == (
            k == 0 or mode in ("generate", "plain")
        )
        if k < steps:
            assert torch.equal(z_v, spy.calls[k][0]) and (
                z_t is None or torch.equal(z_t, spy.calls[k][1])
            )
        if v_v is not None:  # it led here from the state before
            assert gap(z_v, told[k - 1][3] + (tau_v - told[k - 1][1]) * v_v) < 1e-6
        if v_t is not None:
            assert gap(z_t, told[k - 1][4] + (tau_t - told[k - 1][2]) * v_t) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_samplers_repeat_with_the_generators_seed_and_only_then(mode):
    results = [run(mode, Spy(gaussian_world), 4, seed) for seed in (0, 0, 1)]
    for name in results[0]:
        a, again, other = (r[name][1] for r in results)
        assert torch.equal(a, again) and gap(a, other) > 0.5
        assert (
            gap(results[0][name][0][0], results[0][name][0][1]) > 0.5
        )  # samples of a batch begin with noise of their own


def test_samplers_decode_the_text_they_end_with_and_length_sets_its_size():
    for mode in ("understand", "joint"):
        spy = Spy(
            lambda z_v, z_t, tau_v, tau_t, c: (
                z_v,
                (spy.E[torch.tensor([3, 1, 4])] - z_t) / (1 - tau_t).view(-1, 1, 1),
            )
        )
        run(mode, spy, 5, length=3)
        assert spy.result.tolist() == [[3, 1, 4]] * B


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("text_flow", ["embedding", "discrete"])
def test_a_remembered_video_is_exact_where_it_cannot_see_the_text(text_flow, guidance):
    """In the first block the video's keys and values depend on the video alone: a model of one
    block loses nothing.
    """
    found = []
    for reuse in (False, True):
        one = build(
            num_layers=1, text_flow=text_flow, text_dim=32 if text_flow == "discrete" else 8
        )
        states = []
        understand(
            one,
            inputs()[0],
            steps=5,
            guidance=guidance,
            reuse_video=reuse,
            generator=seeded(3),
            callback=lambda *state: states.append(state[4].double()),
        )
        found.append(torch.stack(states))
    assert torch.allclose(*found, atol=1e-5)


def test_a_remembered_video_costs_one_step(model):
    """The first step is the full one; the others run no video token."""
    tokens, states = [], {}
    hook = model.blocks[1].ffn.register_forward_hook(
        lambda ffn, given, out: tokens.append(given[0].shape[1])
    )
    for reuse in (False, True):
        understand(
            model,
            inputs()[0],
            steps=4,
            reuse_video=reuse,
            generator=seeded(3),
            callback=lambda *state: states.setdefault(reuse, []).append(state[4]),
        )
    hook.remove()
    assert tokens[:4] == [tokens[0]] * 4 and tokens[4:] == [tokens[0]] and tokens[0] > 0
    assert torch.equal(states[True][1], states[False][1]) and not torch.equal(
        states[True][-1], states[False][-1]
    )


def test_understand_without_a_prompt_is_understand_with_the_zero_prompt(model):
    z_v = inputs()[0]
    ends = []
    for c in (None, torch.zeros(2, 6, 10), torch.ones(2, 6, 10)):
        understand(
            model,
            z_v,
            c,
            steps=2,
            generator=seeded(0),
            callback=lambda k, tau_v, tau_t, z_v, z_t, *_: ends.append(z_t),
        )
    assert torch.equal(ends[2], ends[5]) and gap(ends[2], ends[8]) > 1e-3


@pytest.mark.parametrize("steps, shift", [(0, 1.0), (3, 0.0), (3, -1.0)])
def test_impossible_grids_are_refused_with_the_number(steps, shift):
    with pytest.raises(ValueError, match=f"is {steps if steps < 1 else shift}"):
        clock_grid(steps, shift)


class Casts(TorchDispatchMode):
    """Records the casts of what is as large as the hidden tokens: (from, to)."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.found.append((args[0].dtype, out.dtype))
        return out


def test_hidden_tokens_are_cast_once_for_queries_keys_and_values():
    model = build()
    attention, x = model.blocks[0].self_attn, torch.randn(2, 7, model.config.dim)
    for module in (attention.norm_q, attention.norm_k):
        module.forward = lambda x: x  # they compute in fp32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Casts(x.shape) as casts:
        attention(x, x)
    assert casts.found == [(torch.float32, torch.bfloat16)]
    narrow = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Casts(x.shape) as casts:
        model.blocks[0].ffn[0](narrow)
    assert casts.found == []  # and not to the weight's fp32 on the way
    x = x[:, :, :3]
    assert CastLinear(3, 3).bfloat16()(x).dtype == torch.bfloat16


# ---------------- a text head that predicts the data point


def test_x1_output_implies_the_velocity_towards_it():
    as_v, as_x1 = build(text_output="velocity"), build(text_output="x1")
    z_v, z_t, _, _, c = inputs(b=4)
    tau_t = torch.tensor([0.0, 0.5, 0.9, 0.99])
    with torch.no_grad():
        (v_v, out), (same, v_t) = as_v(z_v, z_t, tau_t, tau_t, c), as_x1(z_v, z_t, tau_t, tau_t, c)
    assert torch.equal(v_v, same)
    for i, remaining in enumerate((1.0, 0.5, 0.1, 0.01)):
        assert gap(z_t[i] + remaining * v_t[i], out[i]) < 1e-5  # the last step lands on it
    with torch.no_grad():
        _, v_t = as_x1(z_v, z_t, torch.ones(4), torch.ones(4), c)
    assert v_t.isfinite().all()  # nothing reads it there: clean text is given


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.75, 0.9, 0.999])
def test_x1_outputs_loss_is_the_velocitys_with_a_bounded_weight(tau):
    """With x1_hat = x1 + error, the velocity's error is error / (1 - tau)."""
    model, y = build(text_output="x1"), torch.tensor([[3, 1, 4, 1, 5]])
    tau_t, error = torch.tensor([tau]), torch.randn(1, 5, 8, generator=seeded(2))
    z_t, u_t = EmbeddingFlow().corrupt(model, y, tau_t, seeded(1))
    v_t = model.text_velocity(model.embed(y) + error, z_t, tau_t)
    found, _ = EmbeddingFlow().loss(model, v_t, z_t, u_t, y, tau_t, 0.0)
    wanted = error.square().sum() / max(1 - tau, 0.25) ** 2
    assert found.item() == pytest.approx(wanted.item(), rel=2e-3)
    plain = build(text_output="velocity")
    found, _ = EmbeddingFlow().loss(plain, v_t, z_t, u_t, y, tau_t, 0.0)  # the paper's, unweighted
    assert found.item() == pytest.approx((error.square().sum() / (1 - tau) ** 2).item(), rel=2e-3)


def test_x1_sampling_ends_at_the_row_predicted():
    model = build(text_output="x1")
    y, ends = torch.tensor([[3, 1, 4, 1, 5]]), []
    model.head_t.forward = lambda h, e: model.embed(y)
    y_hat = understand(
        model,
        inputs(b=1)[0],
        steps=20,
        generator=seeded(0),
        callback=lambda *args: ends.append(args[4]),
    )
    assert (
        torch.equal(y_hat, y)
        and gap(ends[-1], model.embed(y)) < 1e-4
        and gap(ends[-2], model.embed(y)) > 1e-2
    )


@pytest.mark.parametrize("steps, shift", [(8, 1.0), (20, 4.0)])
def test_x1_sampling_of_a_known_distribution_draws_it_and_ends_on_its_points(steps, shift):
    """Each token is one of two, 3 with probability .3: its posterior mean is known exactly."""
    model, n, ends = build(text_output="x1"), 4000, []
    tokens, prior = torch.tensor([3, 7]), torch.tensor([0.3, 0.7])
    rows = model.embedding_matrix()[tokens].detach()  # (2, d)

    def exact(z_v, z_t, tau_v, tau_t, c):
        tau = tau_t[:, None, None]
        squares = (z_t[:, :, None] - tau[..., None] * rows).square().sum(-1)  # (B, N, 2)
        posterior = (prior.log() - squares / (2 * (1 - tau).square())).softmax(-1)
        return None, model.text_velocity(posterior @ rows, z_t, tau_t)

    exact.config, exact.text_flow, exact.decode = model.config, model.text_flow, model.decode
    y_hat = understand(
        exact,
        torch.zeros(n, 1, 1, 1, 1),
        steps=steps,
        shift=shift,
        length=1,
        generator=seeded(0),
        callback=lambda *args: ends.append(args[4]),
    )
    assert set(y_hat.unique().tolist()) == {3, 7}
    assert (y_hat == 3).double().mean().item() == pytest.approx(0.3, abs=0.03)
    away = (ends[-1] - model.embed(y_hat)).norm(dim=-1)  # nothing is left of the noise
    assert away.quantile(0.99) < 0.01 * rows.norm(dim=-1).mean()


# ---------------------------------------------------------------- guidance


class Recorder:
    """Passes everything on to a model, and keeps its calls."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, *state):
        self.calls.append(state)
        return self.model(*state)

    def __getattr__(self, name):
        return getattr(self.model, name)


def guided(model, mode, w, c_null=None):
    """One Euler step from 0 to 1 of a sampler; returns the recorded calls and the (z_v, z_t) it
    ends with, None for a condition.
    """
    recorder, ends = Recorder(model), []
    z_v, _, _, _, c = inputs()
    options = dict(
        steps=1,
        guidance=w,
        generator=seeded(3),
        callback=lambda k, tau_v, tau_t, z_v, z_t, *_: k and ends.extend([z_v, z_t]),
    )
    if mode == "understand":
        understand(recorder, z_v, c, **options)
    elif mode == "joint":
        joint(recorder, c, (3, 3, 4, 6), c_null=c_null, **options)
    else:
        generate(
            recorder,
            torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]) if mode == "generate" else None,
            c,
            (3, 3, 4, 6),
            c_null=c_null,
            **options,
        )
    z_v, z_t = ends
    return recorder.calls, (
        None if mode == "understand" else z_v,
        z_t if mode in ("understand", "joint") else None,
    )


@pytest.mark.parametrize("null_prompt", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_guidance_is_linear_from_unconditional_0_through_conditional_1_on_every_channel(
    model, mode, null_prompt
):
    c_null = torch.full((1, 6, 10), 0.5) if null_prompt else None
    (conditional,), at_1 = guided(model, mode, 1, c_null)
    calls, at_0 = guided(model, mode, 0, c_null)
    _, at_3 = guided(model, mode, 3.5, c_null)
    assert len(calls) == 1  # all passes in one forward
    passes = list(
        zip(*[(None,) * (len(calls[0][2]) // 2) if s is None else s.split(2) for s in calls[0]])
    )
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(passes[0], conditional))
    wanted = {
        "understand": [{"z_v", "tau_v"}],
        "generate": [{"z_t", "tau_t", "c"}],
        "plain": [{"c"}],
        "joint": [{"z_t", "tau_t", "c"}, {"z_v", "tau_v", "c"}],
    }[mode]  # what the video's, the text's null pass lacks
    assert len(passes) == 1 + len(wanted)
    v_null = []
    for null, changed in zip(passes[1:], wanted):
        null_of = dict(zip(("z_v", "z_t", "tau_v", "tau_t", "c"), null))
        assert {
            name
            for (name, n), s in zip(null_of.items(), conditional)
            if s is not None and not torch.equal(n, s)
        } == changed - (
            {"tau_t", "tau_v"} if mode == "joint" else set()
        )  # at joint's first step both clocks stand at 0
        if "c" in changed:
            assert torch.equal(null_of["c"], torch.full((2, 6, 10), 0.5 if null_prompt else 0.0))
        for state, clock in (("z_v", "tau_v"), ("z_t", "tau_t")):
            if state in changed:
                assert null_of[clock].tolist() == [0.0, 0.0] and 0.7 < null_of[state].std() < 1.3
        with torch.no_grad():
            v_null.append(model(*null))
    v_null = v_null[0][0], v_null[-1][1]
    for i, axis in ((0, 1), (1, 2)):
        if at_1[i] is not None:
            assert gap(at_0[i], conditional[i] + v_null[i]) < 1e-5
            assert gap(at_3[i], at_0[i] + 3.5 * (at_1[i] - at_0[i])) < 1e-4
            assert (at_1[i] - at_0[i]).abs().movedim(axis, 0).flatten(1).amax(1).min() > 1e-3


def test_guidance_is_off_by_default(model):
    recorder = Recorder(model)
    understand(recorder, inputs()[0], steps=2)
    generate(recorder, None, inputs()[4], (3, 1, 2, 2), steps=2)
    joint(recorder, inputs()[4], (3, 1, 2, 2), steps=2)
    assert [len(state[0]) for state in recorder.calls] == [2] * 6


# ---------------------------------------------------------------- names, sizes, files


def official_names(layers):
    """Wan2.1's checkpoint, name by name."""
    both = lambda *names: [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    names = both(
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    ) + ["head.modulation"]
    for i in range(layers):
        block = f"blocks.{i}."
        names += [block + "modulation"] + both(block + "norm3", block + "ffn.0", block + "ffn.2")
        for attention in ("self_attn.", "cross_attn."):
            names += both(*(block + attention + letter for letter in "qkvo"))
            names += [f"{block}{attention}norm_{letter}.weight" for letter in "qk"]
    return set(names)


@pytest.mark.parametrize(
    "preset, count, tensors", [("wan-1.3b", 1_418_996_800, 825), ("wan-14b", 14_288_491_584, 1_095)]
)
def test_presets_have_wans_parameters_under_wans_names(preset, count, tensors):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = UniViGU(config)
    video = {name: p for name, p in model.named_parameters() if not UniViGU.is_text(name)}
    assert set(video) == official_names(config.num_layers) and len(video) == tensors
    assert sum(p.numel() for p in video.values()) == count
    d, f = config.dim, config.ffn_dim
    shapes = {
        "patch_embedding.weight": (d, 16, 1, 2, 2),
        "text_embedding.0.weight": (d, 4096),
        "time_embedding.0.weight": (d, 256),
        "time_projection.1.weight": (6 * d, d),
        "blocks.0.modulation": (1, 6, d),
        "blocks.1.self_attn.norm_q.weight": (d,),
        "blocks.1.ffn.0.weight": (f, d),
        "head.modulation": (1, 2, d),
        "head.head.weight": (64, d),
    }
    assert {name: tuple(video[name].shape) for name in shapes} == shapes
    assert (
        not list(model.buffers()) and config.eps == 1e-6 and config.dim // config.num_heads == 128
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(
            patch_size=(2, 1, 3),
            text_output="x1",
            embedding="literal",
            text_shift=2.5,
            gate_init=0.5,
        ),
    ],
)
def test_a_saved_model_comes_back_with_its_config_and_every_bit(tmp_path, changes):
    model = build(**changes)
    model.save_pretrained(tmp_path)
    again = UniViGU.from_pretrained(tmp_path).eval()
    assert again.config == model.config and isinstance(again.config.patch_size, tuple)
    args = inputs(size=(2, 4, 6))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(*args), again(*args)))
    assert torch.equal(model.embedding_matrix(), again.embedding_matrix())


def test_push_to_hub_uploads_the_model_and_a_card(tmp_path, monkeypatch):
    pushed = {}

    def upload(self, *, repo_id, folder_path, **rest):
        pushed[repo_id] = {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda self, repo_id, **rest: type("Repository", (), dict(repo_id=repo_id)),
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    model = build()
    model.push_to_hub("me/tiny")
    files = pushed["me/tiny"]
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    card = files["README.md"].decode()
    for line in (
        "license: apache-2.0",
        "pipeline_tag: text-to-video",
        "- flow-matching",
        "library_name: univigu",
        "https://arxiv.org/abs/2604.08121",
    ):
        assert line in card, card
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    again = UniViGU.from_pretrained(tmp_path)
    assert again.config == model.config and all(
        torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters())
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text_output="noise"), "text_output is 'noise'"),
        (dict(embedding="free"), "embedding is 'free'"),
        (dict(text_flow="diffusion"), "text_flow is 'diffusion'"),
        (dict(text_ffn_init="zero"), "text_ffn_init is 'zero'"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(vocab_size=-1), "vocab_size is -1"),
        (dict(dim=30, num_heads=4), "dim / num_heads is 30 / 4"),
        (dict(dim=18, num_heads=2), "dim / num_heads is 18 / 2, wanted an even number"),
        (dict(dim=8, num_heads=2), "at least 6"),
        (dict(patch_size=(1, 2)), "patch_size is"),
        (dict(patch_size=(1, 0, 2)), "patch_size is"),
        (
            dict(text_ffn_init="copy", ffn_dim=8, text_ffn_dim=9),
            "text_ffn_dim is 9, wanted ffn_dim 8",
        ),
        (dict(text_shift=0), "text_shift is 0"),
        (dict(text_shift=-2.0), "text_shift is -2.0"),
    ],
)
def test_config_refuses_impossible_values_and_names_them(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Config(**changes)


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("gate_init", [0.0, 1.0])
def test_a_new_model_has_zero_output_heads_and_gates_opened_by_gate_init_only(gate_init):
    torch.manual_seed(0)
    model = UniViGU(Config(**(TINY | dict(gate_init=gate_init, dim=96))))
    with torch.no_grad():
        assert [v.abs().max().item() for v in model(*inputs())] == [0.0, 0.0]
    table = torch.cat([block.modulation for block in model.blocks]).mean((0, 2))
    assert gap(table, torch.tensor([0, 0, gate_init] * 2)) < 0.05


@pytest.mark.parametrize("init", ["new", "copy"])
def test_start_text_copies_the_video_clock_and_the_expert_only_if_so_configured(init):
    model = build(text_ffn_dim=40, text_ffn_init=init)
    video = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if not UniViGU.is_text(name)
    }
    model.start_text()
    p = dict(model.named_parameters())
    assert all(torch.equal(p[name], value) for name, value in video.items())
    pairs = [
        (name.replace(part, part + "_t"), value)
        for part in ("time_embedding", "time_projection")
        for name, value in video.items()
        if part in name
    ]
    assert len(pairs) == 6 and all(torch.equal(p[name], value) for name, value in pairs)
    experts = [
        torch.equal(p[name.replace(".ffn.", ".ffn_t.")], value)
        for name, value in video.items()
        if ".ffn." in name
    ]
    assert len(experts) == 8 and (all(experts) if init == "copy" else not any(experts))


# ---------------------------------------------------------------- low precision


def relative(a, b):
    return ((a.double() - b.double()).square().mean() / b.double().square().mean()).sqrt().item()


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_stays_near_fp32_with_clock_and_head_in_fp32(how):
    exact = build()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.bfloat16())  # so that only the arithmetic differs
    low = copy.deepcopy(exact).to(torch.bfloat16) if how == "weights" else exact
    args, seen = inputs(), {}

    def record(name):
        return lambda module, x, out: seen.setdefault(name, []).append((x, out))

    hooks = [
        getattr(low, name).register_forward_hook(record(name))
        for name in (
            "time_embedding",
            "time_projection",
            "time_embedding_t",
            "time_projection_t",
            "head",
            "head_t",
        )
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = low(*args)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        wanted = exact(*args)
        for name, [(x, y)] in seen.items():
            assert y.dtype == torch.float32 and gap(y, getattr(exact, name)(*x)) < 1e-5, name
    assert len(seen) == 6 and all(s.dtype == torch.float32 for s in out)
    assert all(1e-4 < relative(a, b) < 2e-2 for a, b in zip(out, wanted))


@pytest.mark.parametrize("mode", MODES)
def test_samplers_clocks_are_not_rounded_to_bf16_with_the_latents(mode):
    spy = Spy(
        lambda z_v, z_t, tau_v, tau_t, c: (
            torch.zeros_like(z_v),
            None if z_t is None else torch.zeros_like(z_t),
        )
    )
    z_v, c, y = (
        torch.zeros(1, *SHAPE).bfloat16(),
        torch.zeros(1, 4, 10).bfloat16(),
        torch.zeros(1, 5, dtype=torch.long),
    )
    {
        "understand": lambda: understand(spy, z_v, c, steps=50),
        "generate": lambda: generate(spy, y, c, SHAPE, steps=50),
        "plain": lambda: generate(spy, None, c, SHAPE, steps=50),
        "joint": lambda: joint(spy, c, SHAPE, steps=50),
    }[mode]()
    running = [3] if mode == "understand" else [2, 3] if mode == "joint" else [2]
    assert (
        max(abs(state[k].item() - i / 50) for k in running for i, state in enumerate(spy.calls))
        < 1e-6
    )


def test_a_forward_pass_in_inference_mode_does_not_spoil_later_training(model):
    z_v, _, tau_v, _, c = inputs(size=(7, 2, 2))  # a grid that no other test has put in the cache
    with torch.inference_mode():
        model(z_v, None, tau_v, None, c)
    copy.deepcopy(model)(z_v, None, tau_v, None, c)[0].sum().backward()


def test_the_plain_generators_clock_is_uniform_whatever_the_clocks_option():
    spy = Spy(lambda z_v, z_t, tau_v, tau_t, c: (torch.zeros_like(z_v), None))
    _, parts = uni_flow_loss(
        spy,
        torch.zeros(4000, 3, 1, 2, 2),
        None,
        torch.zeros(4000, 1, 10),
        clocks="mixture",
        generator=seeded(0),
    )
    counted = parts["tau_v"][parts["loss_mask_v"] > 0]
    assert uniformity(counted) < 0.03


def test_init_weights_fills_every_parameter():
    model = UniViGU(Config(**TINY))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)  # as to_empty() may, after building on the meta device
    model.init_weights()
    assert [name for name, p in model.named_parameters() if p.isnan().any()] == []


# ---------------------------------------------------------------- the source


def test_every_equation_of_the_paper_stands_beside_the_code_that_computes_it():
    tokens = list(tokenize.generate_tokens(io.StringIO(SOURCE).readline))
    silent = (
        tokenize.COMMENT,
        tokenize.STRING,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
    )
    code_lines = {token.start[0] for token in tokens if token.type not in silent}
    beside = [
        token.string
        for token in tokens
        if token.type == tokenize.COMMENT and token.start[0] in code_lines
    ]
    assert {int(k) for comment in beside for k in re.findall(r"\beq\. (\d+)", comment)} == set(
        range(1, 19)
    )
