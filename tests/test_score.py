"""engine.score: the text loss of many texts is that of each alone, in both text flows."""

import pytest
import torch

from engine.score import DRAWS, text_losses
from univigu import PRESETS, UniViGU, warp
from wan.published import PublishedConfig, PublishedUniViGU

SMALL = dict(
    in_dim=4, out_dim=4, dim=48, ffn_dim=64, text_ffn_dim=64, num_heads=2, num_layers=2,
    prompt_dim=16, text_len=8, prompt_len=8, vocab_size=40,
)  # fmt: skip


def make_model(kind):
    """A random model whose text attends to the video, of an embedding or the discrete text flow."""
    torch.manual_seed(0)
    if kind == "discrete":
        model = PublishedUniViGU(PublishedConfig(**SMALL, text_dim=48))
    else:
        model = UniViGU(type(PRESETS["toy"])(**SMALL, text_dim=16, text_output=kind))
    with torch.no_grad():  # a new model's last layers are zero
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.eval()


def inputs(b=2, k=3, seed=0):
    """z_v (B, C, F, H, W), texts (B, K, N), c (B, L, width)."""
    generator = torch.Generator().manual_seed(seed)
    z_v = torch.randn(b, 4, 2, 4, 4, generator=generator)
    texts = torch.randint(SMALL["vocab_size"], (b, k, SMALL["text_len"]), generator=generator)
    return z_v, texts, torch.randn(b, 8, 16, generator=generator)


@pytest.fixture(scope="module", params=["velocity", "x1", "discrete"])
def model(request):
    return make_model(request.param)


@pytest.mark.parametrize("reuse_video", [True, False])
def test_losses_are_the_same_alone_as_in_a_batch(reuse_video, model):
    z_v, texts, c = inputs()
    together = text_losses(model, z_v, texts, c, reuse_video=reuse_video)
    assert together.shape == (2, 3) and together.dtype == torch.float32
    for b in range(2):
        for k in range(3):
            clip = (z_v[b : b + 1], texts[b : b + 1, k : k + 1], c[b : b + 1])
            alone = text_losses(model, *clip, reuse_video=reuse_video)
            torch.testing.assert_close(alone[0, 0], together[b, k], rtol=1e-4, atol=1e-5)


def test_losses_depend_on_text_video_and_prompt(model):
    z_v, texts, c = inputs()
    base = text_losses(model, z_v, texts, c)
    assert base.equal(text_losses(model, z_v, texts, c))  # the same noise each time
    others = text_losses(model, *inputs(seed=1)[:1], texts, c), text_losses(model, z_v, texts)
    for other in others:
        assert (other - base).abs().min() > 1e-6
    assert (base[:, 0] - base[:, 1]).abs().min() > 1e-4


def test_computing_the_video_in_each_step_gives_nearly_the_same(model):
    """The kept keys and values of the video were computed beside noise: near, not equal."""
    z_v, texts, c = inputs()
    kept, each = (text_losses(model, z_v, texts, c, reuse_video=way) for way in (True, False))
    torch.testing.assert_close(kept, each, rtol=0.1, atol=0)
    assert not kept.equal(each)


@pytest.mark.parametrize("text_shift", [1.0, 4.0])
def test_the_loss_is_the_squared_error_of_the_velocity(text_shift):
    """A velocity of zero is wrong by all of the target: noise and rows of E have mean square 1."""
    model = make_model("velocity")
    model.config.text_shift, clocks = text_shift, []

    def text_alone(z_t, tau_t, memory):
        clocks.append(tau_t[0].item())
        return torch.zeros_like(z_t)

    model.text_alone = text_alone
    z_v, texts, _ = inputs(b=1, k=2)
    assert text_losses(model, z_v, texts)[0].tolist() == pytest.approx([2, 2], rel=0.15)
    middles = [(k + 0.5) / DRAWS for k in range(DRAWS)]
    assert clocks == pytest.approx(2 * [warp(r, text_shift) for r in middles])


def test_the_text_that_the_model_points_to_has_no_loss():
    model = make_model("velocity")
    z_v, texts, _ = inputs(b=1, k=4)
    target = model.embed(texts[:, 2])
    model.text_alone = lambda z_t, tau_t, memory: (target - z_t) / (1 - tau_t)
    losses = text_losses(model, z_v, texts)[0]
    assert losses.argmin() == 2 and losses[2] < 1e-6 and losses[[0, 1, 3]].min() > 0.5


def test_a_model_that_learned_nothing_prefers_the_own_text_by_chance():
    """Of 16 clips, each with a text of its own: where the video says nothing, one text is the
    easiest for nearly all, and so the own one of one or two."""
    model, (z_v, _, _) = make_model("x1"), inputs(b=16)
    texts = inputs(b=1, k=16)[1].expand(16, 16, -1)
    own = text_losses(model, z_v, texts).argmin(1) == torch.arange(16)
    assert own.float().mean() <= 0.25
