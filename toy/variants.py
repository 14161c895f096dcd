"""Alternatives that train.py has no flag for: other models, losses, data and starts.

Each is an argument of train.main: make_model(config), loss as univigu.uni_flow_loss,
make_world(data, seed, vocabulary, level), load_start(folder, config, make_model).
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file

import toy
from engine.checkpoint import Start
from univigu import MIXTURE, Attention, EmbeddingFlow, UniViGU, uni_flow_loss

from .pairs_world import World as Pairs
from .words import PAD

# ---------------------------------------------------------------- models


class SharedFFN(UniViGU):
    """Both modalities go through the video expert."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            del block.ffn_t
            object.__setattr__(block, "ffn_t", block.ffn)  # no submodule: stored once


class FrozenE(UniViGU):
    """E stays as it was drawn."""

    def embedding_matrix(self):
        return super().embedding_matrix().detach()


class OrthogonalE(FrozenE):
    """E stays as it was drawn, its rows at right angles; V is at most d."""

    def init_weights(self):
        super().init_weights()
        torch.nn.init.orthogonal_(self.token_embedding.weight)


class CentredE(UniViGU):
    """Alignment by moments: E's rows have the video latents' mean, zero, and RMS, one."""

    def embedding_matrix(self):
        E = self.token_embedding.weight.float()
        return F.normalize(E - E.mean(0), dim=-1) * E.shape[-1] ** 0.5


class PatchE(UniViGU):
    """Alignment by construction: a text token is as wide as a video patch, and enters alike."""

    @torch.no_grad()
    def start_text(self):
        super().start_text()
        self.text_in.weight.copy_(self.patch_embedding.weight.flatten(1))
        self.text_in.bias.copy_(self.patch_embedding.bias)


class FixedTargetFlow(EmbeddingFlow):
    """The loss may not move E by moving the target."""

    def corrupt(self, model, y, tau_t, generator=None):
        z_t, u_t = super().corrupt(model, y, tau_t, generator)
        return z_t, u_t.detach()


class FixedTarget(UniViGU):
    text_flow = FixedTargetFlow()


class NoPadLossFlow(EmbeddingFlow):
    """PAD positions have no loss: their prediction counts as right."""

    def loss(self, model, v_t, z_t, u_t, y, tau_t, anchor):
        v_t = torch.where((y != PAD)[..., None], v_t, u_t)
        return super().loss(model, v_t, z_t, u_t, y, tau_t, anchor)


class NoPadLoss(UniViGU):
    text_flow = NoPadLossFlow()


class PadlessAttention(Attention):
    """Attention of a block to both streams, in which nobody looks at the text's PAD positions."""

    pad: torch.Tensor | None = None  # (B, N), where the text of the batch has PAD

    def attend(self, q, k, v):
        if self.pad is None:  # sampling: nobody knows yet where the text will end
            return super().attend(q, k, v)
        seen = F.pad(~self.pad, (k.shape[2] - self.pad.shape[1], 0), value=True)[:, None, None]
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o(rearrange(a, "b heads n d -> b n (heads d)"))


class NoPad(NoPadLoss):
    """PAD positions have no loss, and in training no other position attends to them."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.self_attn.__class__ = PadlessAttention

    def hide(self, pad):
        for block in self.blocks:
            block.self_attn.pad = pad


# ---------------------------------------------------------------- losses


def no_pad_loss(model, z_v1, y, c, **options):
    """The loss of a NoPad, with the PAD positions of y out of sight."""
    model.hide(y == PAD)
    try:
        return uni_flow_loss(model, z_v1, y, c, **options)
    finally:
        model.hide(None)


def lines(**shares):
    """The loss with other shares (default: its own) on the lines of the clocks' mixture.

    The prompt is dropped as often on all of them, as --recall-p-drop and --refine-p-drop say.
    """
    own = {name: share for name, (share, _) in MIXTURE.items()}
    wanted = dict.fromkeys(own, 0.0) | shares if shares else own
    mixture = {name: (share, None) for name, share in wanted.items()}
    return partial(uni_flow_loss, mixture=mixture)


def contrastive_loss(model, z_v1, y, c, **options):
    """Alignment by a loss: of all in the batch, a clip's text should be nearest to its own video.

    Compared is what enters the network of them.
    """
    total, parts = uni_flow_loss(model, z_v1, y, c, **options)
    text = model.text_in(model.embed(y)).mean(1)  # (B, dim)
    video = model.patch_embedding(z_v1).flatten(2).mean(2)  # (B, dim)
    logits = 10 * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T  # (B, B)
    own = torch.arange(len(y), device=y.device)
    contrast = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    return total + 0.05 * contrast, parts


def wrong_prompts(model, z_v1, y, c, **options):
    """The generator's prompts belong to other clips: it learns video, and nothing of words."""
    return uni_flow_loss(model, z_v1, y, c.roll(1, 0) if y is None else c, **options)


# ---------------------------------------------------------------- data


def few_clips(distinct, data, seed, vocabulary="full", level=1):
    """A toy of so many distinct training clips, which are shown again and again."""
    world = Pairs(seed, level) if data == "pairs" else toy.World(seed)
    endless = world.dataset

    def dataset(split):
        found = endless(split)
        batch = found.batch
        found.batch = lambda step, size: [index % distinct for index in batch(step, size)]
        return found

    world.dataset = dataset
    return world


# ---------------------------------------------------------------- starts


def graft(folder, config, make_model):
    """A generator's video weights in a new model, whose text stream may be of any kind."""
    model, weights = make_model(config), load_file(Path(folder) / "model.safetensors")
    video = {name: weights[name] for name in model.state_dict() if not model.is_text(name)}
    model.load_state_dict(video, strict=False)
    return Start(model)
