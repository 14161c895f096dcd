"""Uni-ViGU in one file: a video diffusion transformer (Wan2.1's) that also describes videos.

Read it from top to bottom, as the data flows:
    Config, PRESETS                    every size and choice
    interpolate, warp                  from noise to data, and the clocks
    Attention, Block                   shared attention, one FFN expert for each modality
    EmbeddingFlow                      the text's path, loss and step
    UniViGU                            the network: two latents in, two velocities out
    sample_clocks, uni_flow_loss       training: both flows, two clocks
    understand, generate, joint        sampling: the three differ only in which clock runs

Symbols (B batch, V vocabulary, N text tokens of width d, L prompt tokens; m a modality):
    z_v  (B, C, F, H, W)       video latent: channels, frames, rows, columns; z_v1 data, z_v0 noise
    y    (B, N) int64          text tokens; y_hat are decoded ones
    z_t  (B, N, d)             text latent E[y]; z_t1 data, z_t0 noise
    tau_v, tau_t  (B,)         the two clocks: 0 = noise, 1 = data (Wan's clock is 1000 (1 - tau))
    c    (B, L, prompt_dim)    prompt embedding, zero-padded; all zeros = no prompt
    u_v, u_t                   target velocities, data - noise
    v_v, v_t                   predicted velocities (Wan's network gives -v_v)
    h    {m: (B, n, dim)}      hidden tokens: of "v", video (n_v of them), and "t", text (N)
    e    {m: (B, dim)}         embedding of a modality's clock; its modulation, {m: (B, 6, dim)}, is
                               a block's shift, scale and gate, of attention and of the FFN
    eq. k                      equation k of the paper, arXiv 2604.08121

Where this differs from the paper, or fills its silence:
    1. E's rows have unit RMS, as the video latents have (the paper only says "align"). Free rows
       (embedding="literal") may shrink, since E -> 0 minimises the loss.
    2. A small cross-entropy, the anchor, keeps predictions near E's rows; anchor=0 turns it off.
       A repulsion keeps E's rows apart, else words not told apart yet may merge; 0 turns it off.
    3. The text head may predict the data point instead of the velocity (text_output="x1"). The
       loss stays on the velocity, with less weight where tau_t is above .75.
    4. clocks="mixture" puts most of a batch on the lines of the (tau_v, tau_t) square that the
       samplers walk; text_shift and joint_shift warp the text's clock. clocks="independent" with
       both shifts 1 is the paper's U(0, 1) x U(0, 1).
    5. The paper is silent on the text's positions, time embedder and head (here as published), on
       padding (here tokens as others), guidance, shift and gates (toy/results/README.md has all).
"""

import math
from collections import namedtuple
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


# -------------------------------------------------------- every size and choice
KINDS: dict = {int: (int, "an integer"), float: ((int, float), "a number"),
               str: (str, "a string"), bool: (bool, "true or false")}


def option(default, help, *, choices=None, low=None, high=None) -> Any:
    """A dataclass field with a sentence of explanation, and the values it may have."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


def validate(options):
    """Raises ValueError if a field of a dataclass breaks its type or the limits of its `option`."""
    for f in fields(options):
        value, (_, choices, low, high) = getattr(options, f.name), f.metadata.values()
        if f.type not in KINDS:
            continue  # a tuple: its class checks it
        kinds, wanted = KINDS[f.type]
        good = isinstance(value, kinds) and isinstance(value, bool) == (f.type is bool)
        if choices:
            good, wanted = good and value in choices, f"one of {', '.join(choices)}"
        if low is not None:
            good, wanted = good and low <= value <= high, f"{wanted} from {low} to {high}"
        if not good:
            raise ValueError(f"{f.name} is {value!r}, wanted {wanted}")


size = partial(option, low=1, high=10**6)


@dataclass
class Config:
    """Every size and choice of the model, under Wan2.1's names, except that text_* is the text's:
    Wan's text_dim and text_len, which are the prompt's, are prompt_dim and prompt_len here."""

    dim: int = size(64, "width of the hidden tokens")
    ffn_dim: int = size(256, "hidden width of the video expert FFN_v")
    num_heads: int = size(4, "attention heads; dim / num_heads must be even and at least 6")
    num_layers: int = option(4, "transformer blocks", low=1, high=1000)
    in_dim: int = size(24, "channels of the video latent that comes in")
    out_dim: int = size(24, "channels of the video velocity that goes out")
    patch_size: tuple[int, int, int] = option((1, 1, 1), "latent frames, rows, columns of a token")
    freq_dim: int = size(256, "sinusoids of a clock")
    eps: float = option(1e-6, "epsilon of every norm that Wan has", low=1e-12, high=1)
    prompt_dim: int = size(64, "width of the prompt embedding c (umT5-xxl: 4096)")
    prompt_len: int = size(16, "length to which c is zero-padded (Wan: 512)")
    vocab_size: int = size(34, "V, rows of the token embedding E")
    text_len: int = size(16, "N, text tokens of a caption")
    text_dim: int = size(64, "d, width of a text token's embedding")
    text_ffn_dim: int = size(256, "hidden width of the text expert FFN_t")
    text_ffn_init: str = option("new", "FFN_t starts 'new' (the paper) or as a 'copy' of FFN_v",
                                choices=("new", "copy"))
    text_flow: str = option("embedding", "'embedding' (eq. 7-8); a subclass for the published "
                            "weights has 'discrete' (wan/published.py)", choices=("embedding",))
    text_output: str = option("velocity", "what the text head predicts: 'velocity' (the paper), or "
                              "the data point 'x1'", choices=("velocity", "x1"))
    embedding: str = option("unit", "E's rows have 'unit' RMS, or are 'literal', free as in eq. 7",
                            choices=("unit", "literal"))
    text_shift: float = option(1.0, "warp of the text's clock; 1: none", low=1e-3, high=1000)
    joint_shift: float = option(
        1.0, "text_shift where both clocks run; 1: eq. 18, below 1 text leads", low=1e-3, high=1000)
    gate_init: float = option(0.0, "added to the gates at first; 1 learns faster", low=0, high=100)

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size)  # JSON has lists only
        validate(self)
        if len(self.patch_size) != 3 or any(type(s) is not int or s < 1 for s in self.patch_size):
            raise ValueError(f"patch_size is {self.patch_size}, wanted three positive integers")
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"dim / num_heads is {self.dim} / {self.num_heads}, wanted an even "
                             "number of at least 6")
        if self.text_ffn_init == "copy" and self.text_ffn_dim != self.ffn_dim:
            raise ValueError(f"text_ffn_dim is {self.text_ffn_dim}, wanted ffn_dim {self.ffn_dim} "
                             "for text_ffn_init 'copy'")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}, wanted an even number")

    head_dim = property(lambda self: self.dim // self.num_heads)


_WAN: dict = dict(in_dim=16, out_dim=16, patch_size=(1, 2, 2), prompt_dim=4096, prompt_len=512,
                  vocab_size=256384, text_len=256, text_dim=64)
PRESETS = {
    "toy": Config(text_output="x1", text_shift=4.0, joint_shift=0.03, gate_init=1.0),
    "wan-1.3b": Config(1536, 8960, num_heads=12, num_layers=30, text_ffn_dim=1536, **_WAN),
    "wan-14b": Config(5120, 13824, num_heads=40, num_layers=40, text_ffn_dim=5120, **_WAN),
}


# -------------------------------------------------------- the path, its velocity, the clocks
def per_sample(tau, z):
    """tau (B,) reshaped to (B, 1, ..., 1), so that it multiplies z sample by sample."""
    return tau.view(-1, *[1] * (z.ndim - 1))


def interpolate(z0, z1, tau):
    """The straight path from noise z0 to data z1: its point at tau (B,), its constant velocity."""
    tau = per_sample(tau, z1)
    z = (1 - tau) * z0 + tau * z1  # eq. 1; video: eq. 6, text: eq. 7
    u = z1 - z0                    # what eq. 2 regresses on
    return z, u


def to_device(x, device):
    """x on `device`; from pinned memory, so that the CPU need not wait for a GPU to take it."""
    pin = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pin else x).to(device, non_blocking=True)


def noise_like(z, generator=None):
    """Gaussian noise shaped as z, drawn on the generator's device (default: the CPU). Of a list of
    generators each draws a sample of the batch: as it would alone, whatever its neighbours are."""
    if isinstance(generator, list):
        return torch.cat([noise_like(z_i[None], g) for z_i, g in zip(z, generator, strict=True)])
    home = generator.device if generator else "cpu"
    return to_device(torch.randn(z.shape, generator=generator, device=home), z.device).to(z.dtype)


def warp(r, shift):
    """Warps r in [0, 1] to a clock that lingers near noise for shift > 1, as Wan's shift does."""
    return r / (r + shift * (1 - r))


# -------------------------------------------------------- building blocks
class CastLinear(nn.Linear):
    """nn.Linear in its weight's dtype, or autocast's: the residual stream may be fp32."""

    def cast(self, x):  # to the dtype of the product
        auto = torch.is_autocast_enabled(x.device.type)
        return x.to(torch.get_autocast_dtype(x.device.type) if auto else self.weight.dtype)

    def forward(self, x):
        return super().forward(self.cast(x))


class Linear32(nn.Linear):
    """nn.Linear in fp32 under any autocast, as Wan runs its time embedding and head."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.RMSNorm):
    """RMS norm over all heads together, as in Wan. Computes in fp32, returns x's dtype."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in fp32, whatever the dtype of its weights."""

    def forward(self, h):
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(h.float(), self.normalized_shape, weight, bias, self.eps)


def ffn(dim, hidden, out):
    """FFN(h) = W2 gelu(W1 h + b1) + b2, each token on its own."""
    gelu = nn.GELU(approximate="tanh")
    return nn.Sequential(CastLinear(dim, hidden), gelu, CastLinear(hidden, out))  # eq. 13


def clock_networks(freq_dim, dim):
    """The two networks behind a clock: sinusoids -> e (B, dim), and e -> modulation (B, 6 dim)."""
    embedding = nn.Sequential(Linear32(freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
    return embedding, nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))


def sinusoid(tau, dim):
    """Clock tau (B,) -> (B, dim): cosines, then sines, of Wan's t = 1000 (1 - tau)."""
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=tau.device) / (dim // 2)
    frequency = 10000 ** -exponent                                # (dim/2,), in float64 as Wan
    angle = 1000 * (1 - tau.double())[:, None] * frequency        # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()  # (B, dim)


# -------------------------------------------------------- positions
@lru_cache(maxsize=32)
@torch.inference_mode(False)  # angles cached while sampling must serve training too
def grid_rope(grid, widths, device):
    """RoPE of a grid, axis k on widths[k] entries of a head: cos, sin (tokens, head_dim/2)."""
    position = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))  # (tokens, axes)
    frequency = [10000.0 ** -(torch.arange(0, w, 2, dtype=torch.float64) / w) for w in widths]
    angle = torch.cat([position[:, [k]] * f for k, f in enumerate(frequency)], dim=1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def video_rope(grid, head_dim, device):
    """3-D RoPE of a (F, H, W) grid of tokens; pairs are split as in Wan, 22/21/21 of 64."""
    side = 2 * (head_dim // 6)
    return grid_rope(grid, (head_dim - 2 * side, side, side), device)


def text_rope(n, head_dim, device):
    """1-D RoPE of n text tokens over the whole head, from position 0."""
    return grid_rope((n,), (head_dim,), device)


def rotate(x, cos, sin, pairs):
    """Turns x (B, heads, n, head_dim) by angles (n, head_dim/2), one for each pair of entries.

    pairs: "adjacent" = (2i, 2i+1), Wan's; "halves" = (i, i + head_dim/2), the published text's."""
    sizes, two = ((-1, 2), -1) if pairs == "adjacent" else ((2, -1), -2)
    a, b = x.float().unflatten(-1, sizes).unbind(two)  # (B, heads, n, head_dim/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], two).flatten(-2).type_as(x)


def join(parts, dim):
    """Tensors one after the other; a single one is not copied."""
    return torch.cat([*parts], dim) if len(parts) > 1 else next(iter(parts))


def rotate_streams(x, rope):
    """Rotates x (B, heads, n, head_dim), each stream by its own (cos, sin, pairs)."""
    parts = x.split([len(cos) for cos, _, _ in rope], dim=2)
    return join([rotate(part, *r) for part, r in zip(parts, rope)], dim=2)


# -------------------------------------------------------- attention and the block
# What a clock does to a block's two branches, attention and FFN; (B, 1, dim) each.
Modulation = namedtuple("Modulation", "shift scale gate shift_ffn scale_ffn gate_ffn")

# A block's KV cache: keys and values, (B, heads, n, head_dim) each, of all tokens, of the prompt.
Memory = namedtuple("Memory", "streams prompt")

# What a modality brings to the blocks: hidden tokens (B, n, dim), embedding (B, dim) and modulation
# (B, 6, dim) of its clock, and its positions (cos, sin, pairs), see `rotate`.
Stream = namedtuple("Stream", "h e modulation rope")

# A point of the two paths and its prompt: what the network is given.
Point = namedtuple("Point", "z_v z_t tau_v tau_t c")


class Attention(nn.Module):
    """Multi-head attention, q and k normalised over the full width; parameters named as Wan's."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (CastLinear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, context, rope=None, memory=None):
        """x (B, n, dim) attends to context (B, k, dim), to `memory`, keys and values, where that is
        None, or, with both, to memory whose last rows context's keys and values replace.

        rope: (cos, sin, pairs) of each stream of x, where x attends to itself. Returns (B, n, dim),
        and the keys and values of context, (B, heads, k, head_dim) each.
        """
        if context is x:  # cast once for q, k and v
            x = context = self.q.cast(x)
        q = self.heads(self.norm_q(self.q(x)))  # eq. 12
        if context is None:
            return self.attend(q, *memory), None
        k, v = self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))  # eq. 12
        if rope is not None:
            q, k = rotate_streams(q, rope), rotate_streams(k, rope)
        for kept, new in zip(memory or (), (k, v)):
            kept[:, :, -new.shape[2]:] = new  # in place: the video's are not copied
        return self.attend(q, *memory or (k, v)), (k, v)

    def heads(self, x):
        return rearrange(x, "b n (heads d) -> b heads n d", heads=self.num_heads)

    def attend(self, q, k, v):
        a = F.scaled_dot_product_attention(q, k, v)  # eq. 12: softmax(q k^T / sqrt(head_dim)) v
        return self.o(rearrange(a, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """A block of Wan's DiT (eq. 4, eq. 5): attention for both modalities, an FFN for each."""

    def __init__(self, config):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1, self.norm2 = (LayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.self_attn = Attention(dim, config.num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = Attention(dim, config.num_heads, eps)
        self.ffn = ffn(dim, config.ffn_dim, dim)         # FFN_v, under Wan's name
        self.ffn_t = ffn(dim, config.text_ffn_dim, dim)  # FFN_t
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, h, modulation, c, rope, memory=None, remember=False):
        """h, modulation, rope: an entry for each modality m, video first; c (B, L, dim).

        Returns the new h and, with `remember`, a Memory, else None. With `memory`, that of an
        earlier call, h is the text alone, which sees that call's video and prompt; c is then None.
        """
        mod = {m: (self.modulation.float() + modulation[m])[:, :, None] for m in h}
        mod = {m: Modulation(*mod[m].unbind(1)) for m in h}
        experts = {"v": self.ffn, "t": self.ffn_t}              # a third modality: one more here
        sizes = [h_m.shape[1] for h_m in h.values()]
        streams_kv, prompt_kv = memory or (None, None)          # a cache, or computed here

        x = join([self.norm1(h[m]) * (1 + mod[m].scale) + mod[m].shift for m in h], dim=1)
        a, kv = self.self_attn(x, x, rope.values(), memory=streams_kv)             # eq. 14
        h = {m: h[m] + mod[m].gate * a_m for m, a_m in zip(h, a.split(sizes, dim=1))}
        a, kv_c = self.cross_attn(self.norm3(join(h.values(), dim=1)), c, memory=prompt_kv)  # eq. 4
        h = {m: h[m] + a_m for m, a_m in zip(h, a.split(sizes, dim=1))}  # no gate
        x = {m: self.norm2(h[m]) * (1 + mod[m].scale_ffn) + mod[m].shift_ffn for m in h}
        h = {m: h[m] + mod[m].gate_ffn * experts[m](x[m]) for m in h}        # eq. 5, eq. 15
        return h, Memory(kv, kv_c) if remember else None


class Head(nn.Module):
    """Norm, shift and scale by the clock, linear. The text's norm has a learned scale."""

    def __init__(self, dim, out_dim, eps, affine=False):
        super().__init__()
        self.norm = LayerNorm(dim, eps, elementwise_affine=affine, bias=False)
        self.head = Linear32(dim, out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, h, e):
        """h (B, n, dim), e (B, dim) -> (B, n, out_dim)."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        return self.head(self.norm(h) * (1 + scale) + shift)


# -------------------------------------------------------- the text's flow
class EmbeddingFlow:
    """The text travels from Gaussian noise to token embeddings, as the video does to its latent."""

    def noise(self, model, like, n, generator=None):
        """z_t0 (B, n, d) for the batch of `like`, on its device."""
        d = model.config.text_dim
        return noise_like(like.new_empty(len(like), n, d, dtype=torch.float32), generator)

    def corrupt(self, model, y, tau_t, generator=None):
        """Tokens y (B, N) at clock tau_t (B,) -> z_t (B, N, d) and its target velocity u_t."""
        z_t1 = model.embed(y)                                         # (B, N, d)
        return interpolate(noise_like(z_t1, generator), z_t1, tau_t)  # eq. 7, eq. 9

    def loss(self, model, v_t, z_t, u_t, y, tau_t, anchor):
        """Squared velocity error, and cross-entropy of the tokens that v_t points to; (B,) each."""
        ce = torch.zeros_like(tau_t)
        if anchor:
            z_t1_hat = z_t + per_sample(1 - tau_t, z_t) * v_t
            logits = z_t1_hat @ model.embedding_matrix().T / z_t.shape[-1] ** 0.5  # (B, N, V)
            ce = -logits.log_softmax(-1).gather(-1, y[..., None]).mean((1, 2))
        x1 = model.config.text_output == "x1"  # near data its velocity's error has no bound
        weight = ((1 - tau_t) / (1 - tau_t).clamp(min=0.25)).square() if x1 else 1
        return weight * (v_t - u_t).square().flatten(1).sum(1), ce

    def repulsion(self, model):
        """How alike E's rows are: a row's squared cosines with all others, summed; the mean."""
        rows = F.normalize(model.embedding_matrix(), dim=-1)           # (V, d)
        return (rows.T @ rows).square().sum() / len(rows) - 1          # as of rows @ rows.T, (V, V)

    def step(self, z_t, v_t, tau, tau_next, generator=None):
        """One Euler step from clock tau to clock tau_next."""
        return z_t + (tau_next - tau) * v_t  # eq. 16, eq. 18


# -------------------------------------------------------- the model
class UniViGU(nn.Module, PyTorchModelHubMixin, library_name="univigu", license="apache-2.0",
              pipeline_tag="text-to-video", paper_url="https://arxiv.org/abs/2604.08121",
              tags=["video-generation", "video-captioning", "flow-matching"]):
    """Wan2.1's video DiT with a text stream. Wan's names are kept; TEXT_PARAMETERS are added."""

    TEXT_PARAMETERS = ("token_embedding.", "text_in.", "time_embedding_t.", "time_projection_t.",
                       "ffn_t.", "head_t.")
    text_flow: Any = EmbeddingFlow()

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        dim, freq_dim = config.dim, config.freq_dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = ffn(config.prompt_dim, dim, dim)  # of the prompt c; Wan's name
        self.time_embedding, self.time_projection = clock_networks(freq_dim, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, math.prod(config.patch_size) * config.out_dim, config.eps)

        self.token_embedding = nn.Embedding(config.vocab_size, config.text_dim)  # E
        self.text_in, text_width, self.text_shape = self.text_interface()
        self.time_embedding_t, self.time_projection_t = clock_networks(freq_dim, dim)
        self.head_t = Head(dim, text_width, eps=1e-5, affine=True)
        self.init_weights()

    def text_interface(self):
        """The text's input layer, the width of its output, the shape of a token's state."""
        d = self.config.text_dim
        return CastLinear(d, self.config.dim), d, (d,)

    @classmethod
    def is_text(cls, name):
        """Whether parameter `name` belongs to the text stream, that is, Wan does not have it."""
        return any(f".{part}" in f".{name}" for part in cls.TEXT_PARAMETERS)

    @torch.no_grad()
    def init_weights(self):
        """Wan's initialisation, but Xavier for prompt and clocks too (about .02 at Wan's sizes)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, (RMSNorm, LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)  # unit RMS, as the noise
            elif isinstance(module, (Block, Head)):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.modulation[:, [2, 5]] += self.config.gate_init
        for head in (self.head, self.head_t):
            nn.init.zeros_(head.head.weight)    # an untrained head gives 0

    @torch.no_grad()
    def start_text(self):
        """Call once on a pretrained generator: copies its clock to the text; FFN_v if chosen."""
        self.time_embedding_t.load_state_dict(self.time_embedding.state_dict())
        self.time_projection_t.load_state_dict(self.time_projection.state_dict())
        if self.config.text_ffn_init == "copy":
            for block in self.blocks:
                block.ffn_t.load_state_dict(block.ffn.state_dict())

    def embedding_matrix(self):
        """E (V, d) in fp32, its rows of unit RMS unless config.embedding is "literal"."""
        E = self.token_embedding.weight.float()
        return F.normalize(E, dim=-1) * E.shape[-1] ** 0.5 if self.config.embedding == "unit" else E

    def embed(self, y):
        """Tokens y (B, N) int64 -> text latent z_t1 (B, N, d)."""
        return F.embedding(y, self.embedding_matrix())  # eq. 7: z_t1 = E[y]

    def decode(self, z_t):
        """Text latent z_t (B, N, d) -> y_hat (B, N), the tokens of largest dot product with E."""
        return (z_t.float() @ self.embedding_matrix().T).argmax(-1)  # eq. 8

    def forward(self, z_v, z_t, tau_v, tau_t, c, *, remember=False):
        """Both velocities at one point of the two paths (eq. 10).

        z_v (B, C, F, H, W), z_t (B, N, d), tau_v and tau_t (B,), c (B, at most L, prompt_dim).
        Returns v_v (B, out_dim, F, H, W), v_t (B, N, d) and, with `remember`, each block's Memory
        of video and prompt, for text_alone(). With z_t = tau_t = None it is the plain video
        generator, and v_t is None. Raises ValueError for shapes that do not fit.
        """
        self.check(z_v, z_t, tau_v, tau_t, c)
        streams = {"v": self.video_stream(z_v, tau_v)}
        if z_t is not None:
            streams["t"] = self.text_stream(z_t, tau_t)
        h, e, modulation, rope = (dict(zip(streams, s)) for s in zip(*streams.values()))
        c = F.pad(c, (0, 0, 0, self.config.prompt_len - c.shape[1]))  # attended, as in Wan
        c = self.text_embedding(c)                                        # (B, L, dim)
        memory = []
        for block in self.blocks:
            h, kept = block(h, modulation, c, rope, None, remember)  # shared attention, FFN_m
            memory.append(kept)
        v_v = -self.unpatchify(self.head(h["v"], e["v"]), z_v.shape[2:])  # data - noise
        v_t = None if z_t is None else self.text_velocity(self.head_t(h["t"], e["t"]), z_t, tau_t)
        return (v_v, v_t, memory) if remember else (v_v, v_t)             # eq. 10

    def check(self, z_v, z_t, tau_v, tau_t, c):
        """Raises ValueError, with the shapes found and wanted, on inputs that do not fit."""
        cfg, b, any_size = self.config, len(z_v), range(2**31)
        grid = [(f"a multiple of {p}", any_size[p::p]) for p in cfg.patch_size]
        length = (f"at most {cfg.prompt_len}", any_size[:cfg.prompt_len + 1])
        shapes = {"z_v": (z_v, (b, cfg.in_dim, *grid)), "c": (c, (b, length, cfg.prompt_dim)),
                  "tau_v": (tau_v, (b,))}
        if z_t is not None:
            shapes |= {"z_t": (z_t, (b, ("N", any_size), *self.text_shape)), "tau_t": (tau_t, (b,))}
        for name, (x, shape) in shapes.items():
            labels, allowed = zip(*(s if isinstance(s, tuple) else (str(s), [s]) for s in shape))
            found = None if x is None else tuple(x.shape)
            fits = found is not None and len(found) == len(shape)
            if not fits or not all(size in sizes for size, sizes in zip(found, allowed)):
                raise ValueError(f"{name} has shape {found}, wanted ({', '.join(labels)})")

    def video_stream(self, z_v, tau_v):
        """z_v (B, C, F, H, W) and its clock (B,) as a Stream of n_v = f h w tokens."""
        e = self.time_embedding(sinusoid(tau_v, self.config.freq_dim))       # (B, dim)
        modulation = self.time_projection(e).unflatten(1, (6, -1))           # (B, 6, dim)
        h = self.patch_embedding(z_v.to(self.patch_embedding.weight.dtype))  # (B, dim, f, h, w)
        angles = video_rope(tuple(h.shape[2:]), self.config.head_dim, z_v.device)
        h = rearrange(h, "b c f h w -> b (f h w) c").float()                 # (B, n_v, dim)
        return Stream(h.contiguous(), e, modulation, (*angles, "adjacent"))  # else all norms copy

    def text_stream(self, z_t, tau_t):
        """z_t (B, N, d) and its clock (B,) as a Stream of N tokens."""
        e = self.time_embedding_t(sinusoid(tau_t, self.config.freq_dim))  # (B, dim)
        modulation = self.time_projection_t(e).unflatten(1, (6, -1))      # (B, 6, dim)
        angles = text_rope(z_t.shape[1], self.config.head_dim, z_t.device)
        return Stream(self.text_in(z_t).float(), e, modulation, (*angles, "halves"))

    def unpatchify(self, x, size):
        """(B, n_v, patch x out_dim) -> (B, out_dim, F, H, W), size (F, H, W)."""
        pf, ph, pw = self.config.patch_size
        f, h, w = (s // p for s, p in zip(size, self.config.patch_size))
        return rearrange(x, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
                         f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)

    def text_velocity(self, out, z_t, tau_t):
        """The text head's output -> v_t. A predicted data point implies the velocity to it."""
        if self.config.text_output == "velocity":
            return out
        return (out - z_t) / per_sample((1 - tau_t).clamp(min=1e-4), z_t)  # 0 / 0 at clean text

    def text_alone(self, z_t, tau_t, memory):
        """v_t (B, N, d) at another z_t and tau_t, computing the text's tokens alone. Video and
        prompt come from `memory`, the KV cache that forward returned with `remember`."""
        text = self.text_stream(z_t, tau_t)
        h = {"t": text.h}
        for block, kept in zip(self.blocks, memory):
            h, _ = block(h, {"t": text.modulation}, None, {"t": text.rope}, kept)
        return self.text_velocity(self.head_t(h["t"], text.e), z_t, tau_t)


# -------------------------------------------------------- training: one loss for both flows
# Independent clocks almost never hit the lines that the samplers walk. "mixture" gives each line,
# and the whole square, a (share of the batch, prompt dropout); None is the caller's p_drop.
MIXTURE = {"understand": (0.20, None), "generate": (0.35, 0.1), "joint": (0.40, 0.1),
           "independent": (0.05, None)}

# (B,) each: clocks, which losses count (clean data teach nothing), and which prompts stay.
Clocks = namedtuple("Clocks", "tau_v tau_t loss_mask_v loss_mask_t keep_prompt")


def sample_clocks(kind, batch, text_shift=1.0, p_drop=0.0, generator=None, mixture=MIXTURE,
                  joint_shift=1.0):
    """Draws both clocks of a batch, and each sample's coin for dropping its prompt (p_drop).

    kind: "independent", the paper's if text_shift is 1; "logit-normal", tau_v mostly from .3 to .7,
    where content is decided; "mixture". Raises ValueError for other kinds.
    """
    kinds = {"mixture": mixture} | {k: {k: (1.0, None)} for k in ("independent", "logit-normal")}
    if kind not in kinds:
        raise ValueError(f"clocks is {kind!r}, wanted one of {', '.join(kinds)}")
    order, r = torch.rand(2, 4, batch, generator=generator)
    r_v, r_t, coin, r_line = (order.argsort(dim=-1) + r) / batch  # evenly spread over a batch
    one, zero, middle = torch.ones(batch), torch.zeros(batch), torch.special.ndtri(r_v).sigmoid()
    ahead, warped = warp(r_v, joint_shift), warp(r_t, text_shift)
    lines = {  #          tau_v   tau_t   video's loss  text's loss
        "understand":   (one,    warped, zero,         one),
        "generate":     (middle, one,    one,          zero),
        "joint":        (r_v,    ahead,  one,          one),
        "independent":  (r_v,    warped, one,          one),  # eq. 9
        "logit-normal": (middle, warped, one,          one),
    }
    shares, drops = zip(*kinds[kind].values())
    line = torch.searchsorted(torch.tensor(shares).cumsum(0), r_line).clamp(max=len(shares) - 1)
    drop = torch.tensor([p_drop if p is None else p for p in drops])[line]
    columns = zip(*(lines[name] for name in kinds[kind]))
    chosen = (torch.stack(column)[line, torch.arange(batch)] for column in columns)
    return Clocks(*chosen, keep_prompt=(coin >= drop).float())


def uni_flow_loss(model, z_v1, y, c, *, p_drop=0.0, c_null=None, clocks="independent",
                  mixture=MIXTURE, lambda_v=1.0, lambda_t=None, anchor=0.1, repulsion=0.0,
                  generator=None):
    """The uni-flow objective on one batch, eq. 6 to 11. Each sample has its own clocks and coin.

    z_v1 (B, C, F, H, W) clean video latents; y (B, N) int64 target tokens, or None for the plain
    video generator (eq. 2); c (B, at most L, prompt_dim) prompts, replaced by c_null (default:
    zeros) with probability p_drop, or that of the line. clocks, mixture: see sample_clocks.
    lambda_t None = |z_v| / |z_t|. anchor, repulsion: weights of the cross-entropy to E's rows, and
    of the rows' likeness (0: eq. 11).

    Returns a scalar, eq. 11 divided by the number of entries of a latent, plus those two; and a
    dict of detached parts, (B,) each: "video" and "text", the mean squared error of a velocity's
    entry (0 where masked), "anchor", "tau_v", "tau_t", "loss_mask_v", "loss_mask_t". With y None:
    the mean of eq. 2; "video", "tau_v", "loss_mask_v". Raises ValueError for y of another shape."""
    b, device, flow, cfg = len(z_v1), z_v1.device, model.text_flow, model.config
    if y is None:
        clocks = "independent" if clocks == "mixture" else clocks  # without text there are no lines
    elif y.ndim != 2 or len(y) != b:
        raise ValueError(f"y has shape {tuple(y.shape)}, wanted ({b}, N)")
    drawn = sample_clocks(clocks, b, cfg.text_shift, p_drop, generator, mixture, cfg.joint_shift)
    tau_v, tau_t, mask_v, mask_t, keep = (to_device(s, device) for s in drawn)
    c = torch.where(per_sample(keep, c) > 0, c, torch.zeros_like(c) if c_null is None else c_null)

    z_v, u_v = interpolate(noise_like(z_v1, generator), z_v1, tau_v)  # eq. 6, eq. 9
    if y is None:
        v_v, _ = model(z_v, None, tau_v, None, c)
        loss_v = (v_v - u_v).square().flatten(1).mean(1)           # eq. 2
        return loss_v.mean(), dict(video=loss_v.detach(), tau_v=tau_v, loss_mask_v=mask_v)

    z_t, u_t = flow.corrupt(model, y, tau_t, generator)            # eq. 7, eq. 9
    v_v, v_t = model(z_v, z_t, tau_v, tau_t, c)                    # eq. 10
    se_v = mask_v * (v_v - u_v).square().flatten(1).sum(1)         # (B,)
    se_t, ce = (mask_t * x for x in flow.loss(model, v_t, z_t, u_t, y, tau_t, anchor))  # (B,)
    entries, patch = z_v1[0].numel(), math.prod(cfg.patch_size)
    tokens_v = entries / (z_v1.shape[1] * patch)                   # |z_v|
    lambda_t = tokens_v / y.shape[1] if lambda_t is None else lambda_t  # |z_v| / |z_t|
    total = (lambda_v * se_v + lambda_t * se_t).mean() / entries   # eq. 11
    total = total + anchor * ce.mean()
    if repulsion:
        total = total + repulsion * flow.repulsion(model)
    return total, dict(video=se_v.detach() / entries, text=se_t.detach() / u_t[0].numel(),
                       anchor=ce.detach(), tau_v=tau_v, tau_t=tau_t,
                       loss_mask_v=mask_v, loss_mask_t=mask_t)


# -------------------------------------------------------- sampling: three modes, one Euler step
def clock_grid(steps, shift):
    """Times of an Euler solver: steps + 1 floats, 0 to 1. ValueError for steps < 1, shift <= 0."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps is {steps}, shift is {shift}: wanted at least 1, and above 0")
    return warp(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def with_nulls(point, *nulls):
    """One batch: the point, then for each null the same point with the null's entries replaced."""
    passes = zip(point, *(point._replace(**null) for null in nulls))
    return Point(*(None if x[0] is None else join(x, dim=0) for x in passes))


def guide(v, guidance, passes=2, null=1):
    """Guidance: v_null + guidance (v_cond - v_null); 1 = conditional, 0 = unconditional.

    v: the velocities of with_nulls's passes; null: the one where another modality is pure noise."""
    if guidance == 1:
        return v
    v = v.chunk(passes)
    return v[null] + guidance * (v[0] - v[null])


@torch.no_grad()
def understand(model, z_v, c=None, *, steps=20, shift=None, guidance=1.0, length=None,
               reuse_video=False, generator=None, callback=None):
    """Video -> text: the video is clean (tau_v = 1), and only the text's clock runs (eq. 16).

    z_v (B, C, F, H, W) clean latents; c (B, at most L, prompt_dim), which is believed, or None for
    no prompt. length N, shift: the model's own by default. guidance contrasts with a noise video.
    reuse_video: the first step's keys and values of video and prompt are kept (a KV cache), later
    steps compute the text alone: an approximation, since the video's keys depend on the text.
    callback(k, tau_v, tau_t, z_v, z_t, v_v, v_t): the state after k = 0, 1, ... steps, and the
    velocities that led there (None at k = 0, and for what is given). Returns y_hat (B, N) int64.
    Raises ValueError for steps < 1, shift <= 0, shapes that do not fit. generator: see noise_like.
    """
    cfg, b, flow, memory = model.config, len(z_v), model.text_flow, None
    c = z_v.new_zeros(b, cfg.prompt_len, cfg.prompt_dim) if c is None else c
    one, zero = torch.ones(b, device=z_v.device), torch.zeros(b, device=z_v.device)
    z_t = flow.noise(model, z_v, length or cfg.text_len, generator)
    nulls = [] if guidance == 1 else [dict(z_v=noise_like(z_v, generator), tau_v=zero)]
    grid = clock_grid(steps, cfg.text_shift if shift is None else shift)
    if callback:
        callback(0, 1.0, grid[0], z_v, z_t, None, None)
    for k, (tau, tau_next) in enumerate(zip(grid, grid[1:]), 1):
        batch = with_nulls(Point(z_v, z_t, one, zero + tau, c), *nulls)
        if memory:
            v_t = model.text_alone(batch.z_t, batch.tau_t, memory)
        elif reuse_video:
            _, v_t, memory = model(*batch, remember=True)
        else:
            _, v_t = model(*batch)
        v_t = guide(v_t, guidance)
        z_t = flow.step(z_t, v_t, tau, tau_next, generator)  # eq. 16
        if callback:
            callback(k, 1.0, tau_next, z_v, z_t, None, v_t)
    return model.decode(z_t)


@torch.no_grad()
def generate(model, y, c, shape, *, steps=20, shift=1.0, guidance=1.0, c_null=None,
             keep_text=False, generator=None, callback=None):
    """Text -> video: the text is clean (tau_t = 1), and only the video's clock runs (eq. 17).

    y (B, N) int64 tokens, or None for the plain video generator, which reads c alone (eq. 3);
    c (B, at most L, prompt_dim); shape (C, F, H, W) of a latent. guidance contrasts with no prompt
    (c_null, default: zeros) and a text of pure noise or, with keep_text, the same clean text.
    callback: see understand. Returns z_v (B, C, F, H, W). Raises as understand does.
    """
    b, flow = len(c), model.text_flow
    one, zero = torch.ones(b, device=c.device), torch.zeros(b, device=c.device)
    z_v = noise_like(c.new_empty(b, *shape, dtype=torch.float32), generator)
    z_t, tau_t = (None, None) if y is None else (model.embed(y), one)
    nulls = []
    if guidance != 1:
        nulls = [dict(c=torch.zeros_like(c) if c_null is None else c_null.expand_as(c))]
        if y is not None and not keep_text:
            nulls[0] |= dict(z_t=flow.noise(model, c, y.shape[1], generator), tau_t=zero)
    grid = clock_grid(steps, shift)
    if callback:
        callback(0, grid[0], 1.0, z_v, z_t, None, None)
    for k, (tau, tau_next) in enumerate(zip(grid, grid[1:]), 1):
        batch = with_nulls(Point(z_v, z_t, zero + tau, tau_t, c), *nulls)
        v_v = guide(model(*batch)[0], guidance)
        z_v = z_v + (tau_next - tau) * v_v  # eq. 17; eq. 3 without text
        if callback:
            callback(k, tau_next, 1.0, z_v, z_t, v_v, None)
    return z_v


@singledispatch  # wan/published.py registers its own
@torch.no_grad()
def joint(model, c, shape, *, steps=20, shift=1.0, text_shift=None, guidance=1.0, c_null=None,
          length=None, generator=None, callback=None):
    """Prompt -> video and text: both start as noise and both clocks run, each on its grid (eq. 18).

    c (B, at most L, prompt_dim); shape (C, F, H, W). shift warps the video's grid, text_shift the
    text's (default: shift times the model's joint_shift; if that is 1, eq. 18's single clock).
    guidance contrasts each modality with no prompt and pure noise in place of the other. callback:
    see understand. Returns z_v (B, C, F, H, W), y_hat (B, N). Raises as understand does.
    """
    cfg, b, n, flow = model.config, len(c), length or model.config.text_len, model.text_flow
    zero = torch.zeros(b, device=c.device)
    z_v = noise_like(c.new_empty(b, *shape, dtype=torch.float32), generator)
    z_t = flow.noise(model, c, n, generator)
    nulls = []
    if guidance != 1:
        no_c = torch.zeros_like(c) if c_null is None else c_null.expand_as(c)
        nulls = [dict(z_t=flow.noise(model, c, n, generator), tau_t=zero, c=no_c),  # v_v's
                 dict(z_v=noise_like(z_v, generator), tau_v=zero, c=no_c)]          # v_t's
    text_shift = shift * cfg.joint_shift if text_shift is None else text_shift  # shifts multiply
    grid_v, grid_t = clock_grid(steps, shift), clock_grid(steps, text_shift)
    if callback:
        callback(0, grid_v[0], grid_t[0], z_v, z_t, None, None)
    for k in range(1, steps + 1):
        (tau_v, next_v), (tau_t, next_t) = grid_v[k - 1:k + 1], grid_t[k - 1:k + 1]
        v_v, v_t = model(*with_nulls(Point(z_v, z_t, zero + tau_v, zero + tau_t, c), *nulls))
        v_v, v_t = guide(v_v, guidance, passes=3, null=1), guide(v_t, guidance, passes=3, null=2)
        z_v = z_v + (next_v - tau_v) * v_v                                          # eq. 18
        z_t = flow.step(z_t, v_t, tau_t, next_t, generator)                         # eq. 18
        if callback:
            callback(k, next_v, next_t, z_v, z_t, v_v, v_t)
    return z_v, model.decode(z_t)
