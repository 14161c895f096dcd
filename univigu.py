"""Uni-ViGU in one file: a video diffusion transformer (Wan2.1's) that also describes videos.

Read it top to bottom, in the order the data flows:
    Config, PRESETS      every size and choice
    path, warp           noise -> data, and the clocks
    Block, UniViGU       shared attention, one FFN expert per modality
    EmbeddingFlow, DiscreteFlow      the text's flow: the paper's, and that of the authors' published weights
    uni_flow_loss        both flows, two independent clocks
    understand, generate, joint      the samplers: they differ only in which clock runs

Symbols, the same everywhere in this repository (B batch, V vocabulary, N and d text tokens and their width, L prompt tokens):
    z_v    (B, C, F, H, W)   video latent: channels, frames, rows, columns; z_v1 data, z_v0 noise
    y      (B, N) int64      text tokens; y_hat decoded ones
    z_t    (B, N, d)         text latent E[y]; z_t1 data, z_t0 noise (with text_flow="discrete" the text's state is token ids, (B, N) int64, and v_t their logits)
    tau_v, tau_t  (B,)       the two clocks in [0, 1]: 0 = noise, 1 = data (Wan's clock is t = 1000 (1 - tau))
    c      (B, L, prompt_dim)  prompt embedding, zero-padded; null (zeros) = no prompt
    u_v, u_t                 the target velocity, data - noise; v_v, v_t the model's prediction of it (Wan's network gives -v_v)
    h      (B, n, dim)       hidden tokens; _v video (n_v of them, on a grid of f h w), _t text (N of them)
    e      (B, dim)          a clock's embedding; (B, 6, dim) in a block: shift, scale and gate of its two modulated branches
    eq. k                    equation k of the paper, arXiv 2604.08121

Where we differ from the paper, or fill its silence:
    1. E's rows have unit RMS, as the video latents (the paper only says "align"); with embedding="literal", its free E, the loss is minimised by E -> 0.
    2. A small cross-entropy keeps predictions on E's rows; anchor=0 turns it off.
    3. The text head may predict the data point instead of the velocity (text_output="x1"); the loss stays on the velocity.
    4. clocks="mixture" adds mass on the lines of the (tau_v, tau_t) square that the samplers' own defaults walk; text_shift warps the text
       clock under any clocks. clocks="independent" with text_shift=1 is the paper's U(0, 1) x U(0, 1).
    5. Text positions, text time embedder and text head are the published weights'; guidance, shift, initial gates: see README. The paper is silent.
    6. text_flow="discrete" is the published weights' text flow, not eq. 7-8.
"""

import math
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


def option(default, help):
    """A dataclass field with a sentence of explanation; train.py turns the sentence into --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every size and choice of the model. Wan2.1's names where the meaning is the same; text_* here is the text stream."""

    dim: int = option(64, "width of the hidden tokens")
    ffn_dim: int = option(256, "hidden width of the video expert FFN_v")
    num_heads: int = option(4, "attention heads; dim / num_heads must be even and at least 6")
    num_layers: int = option(4, "transformer blocks")
    in_dim: int = option(24, "channels of the video latent that comes in")
    out_dim: int = option(24, "channels of the video velocity that goes out")
    patch_size: tuple[int, int, int] = option((1, 1, 1), "latent frames, rows and columns that one video token covers")
    freq_dim: int = option(256, "sinusoids of a clock")
    eps: float = option(1e-6, "epsilon of every norm that Wan has")
    prompt_dim: int = option(64, "width of the prompt embedding c (4096 for umT5-xxl; Wan's text_dim)")
    prompt_len: int = option(16, "length c is zero-padded to (512 in Wan; Wan's text_len)")
    vocab_size: int = option(34, "V, rows of the token embedding E")
    text_len: int = option(16, "N, text tokens of a caption")
    text_dim: int = option(64, "d, width of a text token's embedding")
    text_ffn_dim: int = option(256, "hidden width of the text expert FFN_t")
    text_ffn_init: str = option("new", "FFN_t starts 'new' (the paper) or as a 'copy' of the video expert (the published weights)")
    text_flow: str = option("embedding", "'embedding', flow matching over token embeddings (eq. 7-8), or 'discrete', over token ids (the published weights)")
    text_output: str = option("velocity", "what the text head predicts: 'velocity' (the paper) or the data point 'x1'")
    embedding: str = option("unit", "E's rows: 'unit' RMS, or 'literal', free as in eq. 7 (they collapse)")
    text_shift: float = option(1.0, "warp s of the text clock in training and sampling: tau = r / (r + s (1 - r)); 1 = the paper's")
    gate_init: float = option(0.0, "added to the random initial gates; 0 = Wan's, 1 trains faster from scratch")
    latents: str = option("normalised", "video latents: 'normalised' per channel, as Wan's, or 'raw', as the authors' published weights want them")

    def __post_init__(self):
        self.patch_size = tuple(self.patch_size)  # JSON has lists only
        for name, allowed in dict(text_ffn_init=("new", "copy"), text_flow=("embedding", "discrete"), text_output=("velocity", "x1"),
                                  embedding=("unit", "literal"), latents=("normalised", "raw")).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted one of {allowed}")
        for f in fields(self):
            value, most = getattr(self, f.name), 1000 if f.name == "num_layers" else 10**6   # a file may claim anything
            if f.type is int and not (type(value) is int and 1 <= value <= most):
                raise ValueError(f"{f.name} is {value!r}, wanted an integer from 1 to {most}")
            if f.type is float and type(value) not in (int, float):
                raise ValueError(f"{f.name} is {value!r}, wanted a number")
        if len(self.patch_size) != 3 or any(type(size) is not int or size < 1 for size in self.patch_size):
            raise ValueError(f"patch_size is {self.patch_size}, wanted three positive integers (frames, rows, columns)")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.dim // self.num_heads < 6:
            raise ValueError(f"dim {self.dim} over num_heads {self.num_heads}: wanted an even head width of at least 6")
        if self.text_ffn_init == "copy" and self.text_ffn_dim != self.ffn_dim:
            raise ValueError(f"text_ffn_init='copy' needs text_ffn_dim = ffn_dim, found {self.text_ffn_dim} and {self.ffn_dim}")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim is {self.freq_dim}, wanted an even number")
        if self.text_flow == "discrete" and self.text_dim != self.dim:
            raise ValueError(f"text_flow='discrete' embeds tokens at the model's width: wanted text_dim {self.dim} (= dim), found {self.text_dim}")
        for name, good in dict(eps=self.eps > 0, text_shift=self.text_shift > 0, gate_init=self.gate_init >= 0).items():
            if not (good and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a finite number {'of at least' if name == 'gate_init' else 'above'} 0")


_WAN: dict = dict(in_dim=16, out_dim=16, patch_size=(1, 2, 2), prompt_dim=4096, prompt_len=512, vocab_size=256384, text_len=256, text_dim=64)
PRESETS = {
    "toy": Config(text_output="x1", text_shift=4.0, gate_init=1.0),
    "wan-1.3b": Config(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_ffn_dim=1536, **_WAN),
    "wan-14b": Config(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_ffn_dim=5120, **_WAN),
}


# ---------------------------------------------------------------- the path, its velocity, the clocks

def per_sample(tau, z):
    """tau (B,) reshaped to (B, 1, ..., 1), so that it multiplies z sample by sample."""
    return tau.view(-1, *[1] * (z.ndim - 1))


def path(z0, z1, tau):
    """The straight path from noise z0 to data z1 (eq. 1), its point at tau (B,) and its constant velocity, both shaped as z1."""
    tau = per_sample(tau, z1)
    z = (1 - tau) * z0 + tau * z1                                   # eq. 1; video: eq. 6, text: eq. 7
    u = z1 - z0                                                     # what eq. 2 regresses on
    return z, u


def noise_like(z, generator=None):
    """Gaussian noise shaped as z, drawn where the generator lives (the CPU by default: the same on every device)."""
    return send(torch.randn(z.shape, generator=generator, device=generator.device if generator else "cpu"), z.device).to(z.dtype)


def send(x, device):
    """x on `device`; from pinned memory, so that nobody waits for a GPU to take it."""
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def warp(r, shift):
    """A clock that lingers near noise for shift > 1 (1: as it is): [0, 1] -> [0, 1]. It is Wan's sigma' = s sigma / (1 + (s - 1) sigma)."""
    return r / (r + shift * (1 - r))


# ---------------------------------------------------------------- building blocks

class Linear(nn.Linear):
    """nn.Linear that follows the dtype of its weight, so that the residual stream may stay fp32 over bf16 weights."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Linear32(nn.Linear):
    """nn.Linear computed in fp32 whatever the autocast, as Wan runs its time embedding and head."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.Module):
    """RMS norm over the full width (all heads together, as Wan), in fp32 whatever the dtypes; returns x's."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in fp32, whatever the dtype of its weights."""

    def forward(self, h):
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(h.float(), self.normalized_shape, weight, bias, self.eps)


def ffn(dim, hidden):
    """FFN(h) = W2 gelu(W1 h + b1) + b2, each token on its own (eq. 13)."""
    return nn.Sequential(Linear(dim, hidden), nn.GELU(approximate="tanh"), Linear(hidden, dim))  # eq. 13


def sinusoid(tau, dim):
    """Clock tau (B,) in [0, 1] -> (B, dim) features of Wan's t = 1000 (1 - tau): cosines first, then sines, angles in float64."""
    frequency = 10000 ** -(torch.arange(dim // 2, dtype=torch.float64, device=tau.device) / (dim // 2))
    angle = 1000 * (1 - tau.double())[:, None] * frequency          # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()    # (B, dim)


# ---------------------------------------------------------------- positions

@lru_cache(maxsize=32)
@torch.inference_mode(False)  # the cached angles must serve training after sampling
def rope(size, widths, device):
    """RoPE of a grid of tokens, axis k turning widths[k] entries of a head: cos and sin, (tokens, head_dim/2) each. Base 10,000, as Wan's."""
    position = torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size))            # (tokens, axes), the last axis fastest
    angle = torch.cat([position[:, [k]] * 10000.0 ** -(torch.arange(0, w, 2, dtype=torch.float64) / w) for k, w in enumerate(widths)], dim=1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def video_rope(size, head_dim, device):
    """3-D, of a (F, H, W) token grid; its axes share the pairs as Wan's: 22/21/21 of 64."""
    side = 2 * (head_dim // 6)
    return rope(size, (head_dim - 2 * side, side, side), device)


def text_rope(n, head_dim, device):
    """1-D, of n text tokens from position 0, over the whole head."""
    return rope((n,), (head_dim,), device)


def rotate(x, cos, sin, pairs):
    """Rotates x (B, heads, n, head_dim) by angles (n, head_dim/2), each acting on one pair of entries.

    pairs: "adjacent" = (2i, 2i+1), Wan's video tokens; "halves" = (i, i + head_dim/2), text tokens as published.
    """
    sizes, two = ((-1, 2), -1) if pairs == "adjacent" else ((2, -1), -2)
    a, b = x.float().unflatten(-1, sizes).unbind(two)               # (B, heads, n, head_dim/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], two).flatten(-2).type_as(x)


# ---------------------------------------------------------------- attention and the block

def join(streams, dim):
    """Video and text as one sequence; the video alone is not copied."""
    return torch.cat(streams, dim) if len(streams) > 1 else streams[0]


class Attention(nn.Module):
    """Multi-head attention with full-width q/k RMSNorm; parameters named as Wan's."""

    def __init__(self, dim, num_heads, eps):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, context, rope=None, memory=None):
        """x (B, n, dim) attends to context (B, k, dim); rope: one (cos, sin, pairs) per stream of the self-attended sequence.
        memory: None, or a list. Empty: it is filled with the keys and values of the first stream (without rope: of all of context). Filled: they
        are put before context's."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)      # eq. 12
        q, k, v = (rearrange(s, "b n (heads d) -> b heads n d", heads=self.num_heads) for s in (q, k, v))
        if rope is not None:
            sizes = [len(cos) for cos, _, _ in rope]
            q, k = (join([rotate(part, *r) for part, r in zip(s.split(sizes, dim=2), rope)], dim=2) for s in (q, k))
        if memory:
            k, v = (torch.cat(pair, dim=2) for pair in zip(memory, (k, v)))
        elif memory is not None:
            memory += [s[:, :, :sizes[0]] if rope else s for s in (k, v)]
        a = F.scaled_dot_product_attention(q, k, v)                 # eq. 12: softmax(q k^T / sqrt(head_dim)) v
        return self.o(rearrange(a, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """One block of Wan's DiT (eq. 4, eq. 5), its attention shared by both modalities, its FFN split in two experts."""

    def __init__(self, config):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1, self.norm2 = (LayerNorm(dim, eps, elementwise_affine=False) for _ in range(2))
        self.self_attn = Attention(dim, config.num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = Attention(dim, config.num_heads, eps)
        self.ffn = ffn(dim, config.ffn_dim)                         # the video expert, under Wan's name
        self.ffn_t = ffn(dim, config.text_ffn_dim)                  # the text expert
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, h, e, c, rope, memory=None):
        """h, e, rope: one entry per stream, video first: h (B, n, dim), e (B, 6, dim); c (B, L, dim). Returns the new h. memory: two such lists,
        for self-attention (the video's) and cross-attention (the prompt's), see Attention."""
        of_video, of_prompt = memory or (None, None)
        sizes = [h_m.shape[1] for h_m in h]
        mods = [(self.modulation.float() + e_m)[:, :, None].unbind(1) for e_m in e]          # six of (B, 1, dim)
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = zip(*mods)
        streams = range(len(h))

        x = join([self.norm1(h[i]) * (1 + scale[i]) + shift[i] for i in streams], dim=1)     # [h_v; h_t] (B, n_v + N, dim)
        a = self.self_attn(x, x, rope, of_video).split(sizes, dim=1)                           # eq. 14
        h = [h[i] + gate[i] * a[i] for i in streams]

        a = self.cross_attn(self.norm3(join(h, dim=1)), c, memory=of_prompt).split(sizes, dim=1)  # eq. 4; both read the prompt; no gate, as Wan
        h = [h[i] + a[i] for i in streams]

        experts = (self.ffn, self.ffn_t)
        return [h[i] + gate_ffn[i] * experts[i](self.norm2(h[i]) * (1 + scale_ffn[i]) + shift_ffn[i]) for i in streams]  # eq. 5, eq. 15


class Head(nn.Module):
    """Norm, shift and scale by the clock, linear. Wan's for video; the text head's norm has a learned scale, as published."""

    def __init__(self, dim, out_dim, eps, affine=False):
        super().__init__()
        self.norm = LayerNorm(dim, eps, elementwise_affine=affine, bias=False)
        self.head = Linear32(dim, out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, h, e):
        """h (B, n, dim), e (B, dim) -> (B, n, out_dim)."""
        shift, scale = (self.modulation.float() + e[:, None]).chunk(2, dim=1)
        return self.head(self.norm(h) * (1 + scale) + shift)


# ---------------------------------------------------------------- the model

class UniViGU(nn.Module, PyTorchModelHubMixin, library_name="univigu", license="apache-2.0", pipeline_tag="text-to-video",
              tags=["video-generation", "video-captioning", "flow-matching"], paper_url="https://arxiv.org/abs/2604.08121"):
    """Wan2.1's video DiT with a text stream. Parameters that Wan has keep Wan's names; the additions are TEXT_PARAMETERS."""

    TEXT_PARAMETERS = ("token_embedding.", "text_in.", "time_embedding_t.", "time_projection_t.", "ffn_t.", "head_t.")

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        dim, d = config.dim, config.text_dim
        clock = lambda: nn.Sequential(Linear32(config.freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        six = lambda: nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.prompt_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding, self.time_projection = clock(), six()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(dim, math.prod(config.patch_size) * config.out_dim, config.eps)

        self.token_embedding = nn.Embedding(config.vocab_size, d)   # E
        if config.text_flow == "embedding":
            self.text_in = Linear(d, dim)
        self.time_embedding_t, self.time_projection_t = clock(), six()
        self.head_t = Head(dim, d if config.text_flow == "embedding" else config.vocab_size, eps=1e-5, affine=True)
        self.init_weights()

    @classmethod
    def is_text(cls, name):
        """Whether parameter `name` belongs to the text stream, that is, Wan does not have it."""
        return any(f".{part}" in f".{name}" for part in cls.TEXT_PARAMETERS)

    @torch.no_grad()
    def init_weights(self):
        """Wan's initialisation, but Xavier for the prompt and clock embeddings too (at Wan's sizes its 0.02 is about that)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)                      # unit RMS, as the noise and the video latents
            elif isinstance(module, (Block, Head)):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
        for block in self.blocks:
            block.modulation[:, [2, 5]] += self.config.gate_init
        for head in (self.head, self.head_t):
            nn.init.zeros_(head.head.weight)                        # an untrained head says nothing (zero) instead of something random

    @torch.no_grad()
    def start_text(self):
        """Call once on a pretrained generator: the text clock starts as a copy of the video's, and FFN_t too if so configured."""
        self.time_embedding_t.load_state_dict(self.time_embedding.state_dict())
        self.time_projection_t.load_state_dict(self.time_projection.state_dict())
        if self.config.text_ffn_init == "copy":
            for block in self.blocks:
                block.ffn_t.load_state_dict(block.ffn.state_dict())

    def embedding_matrix(self):
        """E (V, d) in fp32, with rows of unit RMS unless config.embedding is "literal"."""
        E = self.token_embedding.weight.float()
        return F.normalize(E, dim=-1) * E.shape[-1] ** 0.5 if self.config.embedding == "unit" else E

    def embed(self, y):
        """Tokens y (B, N) int64 -> text latent z_t1 (B, N, d), eq. 7; the discrete flow moves the tokens themselves."""
        return F.embedding(y, self.embedding_matrix()) if self.config.text_flow == "embedding" else y     # eq. 7: z_t1 = E[y]

    def decode(self, z_t):
        """Text latent z_t (B, N, d) -> the tokens y_hat (B, N) of largest dot product with E, eq. 8."""
        return (z_t.float() @ self.embedding_matrix().T).argmax(-1) if self.config.text_flow == "embedding" else z_t  # eq. 8

    def check(self, z_v, z_t, tau_v, tau_t, c):
        """Raises ValueError, with the shape found and the shape wanted, on inputs that do not fit together."""
        cfg, b = self.config, len(z_v)
        if z_v.ndim != 5 or z_v.shape[1] != cfg.in_dim or any(s % p or not s for s, p in zip(z_v.shape[2:], cfg.patch_size)):
            raise ValueError(f"z_v has shape {tuple(z_v.shape)}, wanted (B, {cfg.in_dim}, F, H, W) with F, H, W multiples of {cfg.patch_size}")
        if c is None or c.ndim != 3 or len(c) != b or c.shape[1] > cfg.prompt_len or c.shape[2] != cfg.prompt_dim:
            raise ValueError(f"c has shape {None if c is None else tuple(c.shape)}, wanted ({b}, at most {cfg.prompt_len}, {cfg.prompt_dim})")
        last = (cfg.text_dim,) if cfg.text_flow == "embedding" else ()
        if z_t is not None and (z_t.ndim != 2 + len(last) or len(z_t) != b or z_t.shape[2:] != last):
            raise ValueError(f"z_t has shape {tuple(z_t.shape)}, wanted ({', '.join(map(str, (b, 'N', *last)))})")
        for name, tau in (("tau_v", tau_v), ("tau_t", tau_t if z_t is not None else tau_v)):
            if tau is None or tau.shape != (b,):
                raise ValueError(f"{name} has shape {None if tau is None else tuple(tau.shape)}, wanted ({b},)")

    def forward(self, z_v, z_t, tau_v, tau_t, c, memory=None):
        """Both velocities at one point of the two paths (eq. 10).

        z_v (B, C, F, H, W), z_t (B, N, d), tau_v and tau_t (B,) in [0, 1], c (B, <= L, prompt_dim). Returns v_v, v_t, shaped as
        z_v (with out_dim channels), z_t. With z_t = tau_t = None it is the plain video generator, and v_t is None. In the
        discrete flow z_t is y (B, N) int64, and v_t the logits (B, N, V) of the clean tokens. memory: for each block a
        pair of empty lists, which get the keys and values of video and prompt; called again with it, only the text's tokens run, and v_v is None. Raises ValueError on shapes that do not fit.
        """
        self.check(z_v, z_t, tau_v, tau_t, c)
        cfg, device = self.config, z_v.device
        head_dim = cfg.dim // cfg.num_heads
        h_v = self.patch_embedding(z_v.to(self.patch_embedding.weight.dtype))                # (B, dim, f, h, w)
        grid = tuple(h_v.shape[2:])
        h = [rearrange(h_v, "b c f h w -> b (f h w) c").float().contiguous()]                # (B, n_v, dim); else all blocks copy before each norm
        e = [self.time_embedding(sinusoid(tau_v, cfg.freq_dim))]                             # (B, dim)
        e6 = [self.time_projection(e[0]).unflatten(1, (6, -1))]                              # (B, 6, dim)
        rope = [(*video_rope(grid, head_dim, device), "adjacent")]
        c = F.pad(c, (0, 0, 0, cfg.prompt_len - c.shape[1]))                                 # (B, L, prompt_dim); padding is seen, as in Wan
        remembered = bool(memory and memory[0][0])
        if remembered:                                                                       # no token of video or prompt is left to compute
            h[0], rope[0], c = h[0][:, :0], (*(angles[:0] for angles in rope[0][:2]), "adjacent"), c[:, :0]
        if z_t is not None:
            h.append((self.text_in(z_t) if cfg.text_flow == "embedding" else self.token_embedding(z_t)).float())  # (B, N, dim)
            e.append(self.time_embedding_t(sinusoid(tau_t, cfg.freq_dim)))
            e6.append(self.time_projection_t(e[1]).unflatten(1, (6, -1)))
            rope.append((*text_rope(z_t.shape[1], head_dim, device), "halves"))
        c = self.text_embedding(c)                                                           # (B, L, dim)

        for i, block in enumerate(self.blocks):
            h = block(h, e6, c, rope, memory and memory[i])                                  # h_v, h_t

        (f, h_, w), (pf, ph, pw) = grid, cfg.patch_size
        v_v = None if remembered else -rearrange(self.head(h[0], e[0]), "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
                         f=f, h=h_, w=w, pf=pf, ph=ph, pw=pw)       # Wan's head gives noise - data; a velocity is data - noise
        if z_t is None:
            return v_v, None
        v_t = self.head_t(h[1], e[1])                                                        # the discrete flow's logits stay as they are
        if cfg.text_flow == "embedding" and cfg.text_output == "x1":                         # x1_hat implies a velocity; unclamped, errors near
            v_t = (v_t - z_t) / per_sample((1 - tau_t).clamp(min=0.05), z_t)                 # data would be divided by 0
        return v_v, v_t


# ---------------------------------------------------------------- two text flows behind one interface: noise, noisy, loss, step

class EmbeddingFlow:
    """The paper's text flow: z_t (B, N, d) travels from Gaussian noise to token embeddings, just as the video does."""

    @staticmethod
    def noise(model, like, n, generator=None):
        """z_t0 (B, N, d) for the batch of `like`, on its device."""
        return noise_like(like.new_empty(len(like), n, model.config.text_dim, dtype=torch.float32), generator)

    @staticmethod
    def noisy(model, y, tau_t, generator=None):
        """Tokens y at clock tau_t -> z_t and its target velocity u_t."""
        z_t1 = model.embed(y)                                       # (B, N, d)
        return path(noise_like(z_t1, generator), z_t1, tau_t)       # eq. 7, eq. 9

    @staticmethod
    def loss(model, v_t, z_t, u_t, y, tau_t, anchor, kind=None):
        """Squared velocity error and anchor cross-entropy of the token that the velocity points to, (B,) each."""
        ce = torch.zeros_like(tau_t)
        if anchor:
            z_t1_hat = z_t + per_sample(1 - tau_t, z_t) * v_t
            logits = z_t1_hat @ model.embedding_matrix().T / z_t.shape[-1] ** 0.5
            ce = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)
        return (v_t - u_t).square().flatten(1).sum(1), ce

    @staticmethod
    def step(z_t, v_t, tau, after, share=None, generator=None):
        """One Euler step from clock tau to clock after (share: see DiscreteFlow)."""
        return z_t + (after - tau) * v_t                            # eq. 16, eq. 18


class DiscreteFlow:
    """Discrete flow matching over token ids (Gat et al., arXiv 2407.15595), the published weights' text flow (not the paper's). On its mixture
    path, kappa(tau) = tau, a token is clean with probability tau, else uniformly random; the network gives logits of the clean token."""

    @staticmethod
    def noise(model, like, n, generator=None):
        """y_0 (B, N): every token uniformly random."""
        device = generator.device if generator else "cpu"
        return send(torch.randint(model.config.vocab_size, (len(like), n), generator=generator, device=device), like.device)

    @staticmethod
    def noisy(model, y, tau_t, generator=None):
        """Tokens y at clock tau_t -> y_t on the mixture path, and y, the target of its logits."""
        clean = send(torch.rand(y.shape, generator=generator), tau_t.device) < tau_t[:, None]
        return torch.where(clean, y, DiscreteFlow.noise(model, y, y.shape[1], generator)), y

    @staticmethod
    def loss(model, logits, y_t, target, y, tau_t, anchor, kind="cross-entropy"):
        """Per sample (B,), summed over tokens: "cross-entropy", or "generalised-kl", whose mean over uniform tau would bound -log p(y) but for
        the clamp. No anchor is needed. Raises ValueError for another kind."""
        if kind not in ("cross-entropy", "generalised-kl"):
            raise ValueError(f"discrete_loss is {kind!r}, wanted 'cross-entropy' or 'generalised-kl'")
        log_p = F.log_softmax(logits.float(), dim=-1)               # (B, N, V)
        of = lambda tokens: log_p.gather(2, tokens[..., None])[..., 0]                       # (B, N)
        if kind == "cross-entropy":
            return -of(y).sum(1), torch.zeros_like(tau_t)
        same, rate = (y_t == y).float(), 1 / (1 - tau_t).clamp(min=0.05)                     # a jump's rate grows without bound near data
        return rate * (same - of(y_t).exp() - (1 - same) * of(y)).sum(1), torch.zeros_like(tau_t)

    @staticmethod
    def step(y_t, logits, tau, after, share=None, generator=None):
        """Each token is redrawn from the posterior with probability share; None: (after - tau) / (1 - tau), the path's own Euler step."""
        share = (after - tau) / (1 - tau) if share is None else share
        u, coin = torch.rand(2, *y_t.shape, generator=generator, device=generator.device if generator else "cpu", dtype=torch.float64).to(y_t.device)
        cdf = logits.double().softmax(-1).cumsum(-1)                # (B, N, V)
        drawn = torch.searchsorted(cdf, (u * cdf[..., -1])[..., None], right=True)[..., 0].clamp(max=cdf.shape[-1] - 1)
        return torch.where(coin < share, drawn, y_t)


TEXT_FLOWS = {"embedding": EmbeddingFlow, "discrete": DiscreteFlow}


# ---------------------------------------------------------------- training: one loss for both flows

# Independent clocks almost never stand at tau_v = 1 or tau_t = 1, where understand() and generate() always are. So,
# clocks="mixture": share of a batch on each line of the (tau_v, tau_t) square, and how often the prompt is dropped there (None: p_drop, so that
# the text is read off the video, not copied from the prompt; elsewhere the prompt is part of the task, dropped for guidance only).
MIXTURE = {"understand": (0.25, None),    # tau_v = 1, tau_t runs; only the text is learned
           "generate": (0.40, 0.1),       # tau_t = 1, tau_v runs; only the video is learned
           "joint": (0.25, 0.1),          # both run together, on the line tau_t = warp(tau_v, text_shift) that joint() walks by default
           "independent": (0.10, None)}   # anywhere


def sample_clocks(kind, batch, text_shift=1.0, p_drop=0.0, generator=None):
    """Draws both clocks of a batch, and which losses and prompts count.

    kind: "independent", uniform (the paper's at text_shift 1); "logit-normal", the video's clock mostly between .2 and .7, where a video's
    content is decided, for training a generator from nothing; "mixture", see MIXTURE. Returns tau_v, tau_t (B,) in [0, 1];
    on_v, on_t (B,) in {0, 1}: whether this modality's loss counts (a clean modality has nothing to learn);
    keep (B,) in {0, 1}: whether the prompt stays. One coin per sample, never one per batch. p_drop in [0, 1]. Raises ValueError for another kind.
    """
    r_v, r_t, coin, r_line = torch.rand(4, batch, generator=generator)
    on = torch.ones(batch)
    if kind == "independent":
        return r_v, warp(r_t, text_shift), on, on, (coin >= p_drop).float()                  # eq. 9: ~ U(0, 1) at text_shift 1
    if kind == "logit-normal":
        return torch.sigmoid(torch.special.ndtri(r_v) - 0.4), warp(r_t, text_shift), on, on, (coin >= p_drop).float()
    if kind != "mixture":
        raise ValueError(f"clocks is {kind!r}, wanted 'independent', 'logit-normal' or 'mixture'")
    share = torch.tensor([s for s, _ in MIXTURE.values()]).cumsum(0)
    line = torch.searchsorted(share, r_line).clamp(max=len(MIXTURE) - 1)
    drop = torch.tensor([p_drop if p is None else p for _, p in MIXTURE.values()])[line]
    is_ = {name: line == i for i, name in enumerate(MIXTURE)}
    tau_t = warp(torch.where(is_["joint"], r_v, r_t), text_shift)
    tau_v, tau_t = r_v.masked_fill(is_["understand"], 1.0), tau_t.masked_fill(is_["generate"], 1.0)
    return tau_v, tau_t, on - is_["understand"].float(), on - is_["generate"].float(), (coin >= drop).float()


def uni_flow_loss(model, z_v1, y, c, *, p_drop=0.0, c_null=None, clocks="independent", lambda_v=1.0, lambda_t=None, anchor=0.1,
                  discrete_loss="cross-entropy", generator=None):
    """The uni-flow objective on one batch, eq. 6 to 11. One sample, one pair of clocks, one coin for its prompt.

    z_v1 (B, C, F, H, W) clean video latents; y (B, N) int64 target tokens, or None for the plain video generator (eq. 2);
    c (B, <= L, prompt_dim) prompts, replaced by c_null (zeros by default) with probability p_drop per sample.
    lambda_t None = |z_v| / |z_t|, tokens over tokens. anchor: weight of the cross-entropy that keeps z_t on E's rows (0 = paper).
    clocks: see sample_clocks; without text, "mixture" is "independent". discrete_loss: see DiscreteFlow.loss. generator: a CPU torch.Generator for clocks, coins and
    noise. Raises ValueError for y that is not (B, N). Returns total (a scalar: eq. 11 divided by the number of
    entries of a video latent, plus the anchor) and a dict of detached parts: "video", "text" (mean squared velocity error
    of an entry, or the discrete loss of a token, per sample (B,), 0 where on_* is 0), "anchor" (B,), with "tau_v", "tau_t", "on_v", "on_t" (B,). With y None:
    the mean of eq. 2, and "video", "tau_v", "on_v" alone.
    """
    b, device = len(z_v1), z_v1.device
    text_flow, shift = TEXT_FLOWS[model.config.text_flow], model.config.text_shift
    if y is None:
        clocks = "independent" if clocks == "mixture" else clocks    # without text there are no lines to mix
    elif y.shape[:1] != (b,) or y.ndim != 2:
        raise ValueError(f"y has shape {tuple(y.shape)}, wanted ({b}, N)")
    tau_v, tau_t, on_v, on_t, keep = (send(s, device) for s in sample_clocks(clocks, b, shift, p_drop, generator))
    c = torch.where(per_sample(keep, c) > 0, c, torch.zeros_like(c) if c_null is None else c_null)

    z_v, u_v = path(noise_like(z_v1, generator), z_v1, tau_v)       # eq. 6, eq. 9
    if y is None:
        v_v, _ = model(z_v, None, tau_v, None, c)
        loss_v = (v_v - u_v).square().flatten(1).mean(1)            # eq. 2
        return loss_v.mean(), dict(video=loss_v.detach(), tau_v=tau_v, on_v=torch.ones_like(tau_v))

    z_t, u_t = text_flow.noisy(model, y, tau_t, generator)          # eq. 7, eq. 9
    v_v, v_t = model(z_v, z_t, tau_v, tau_t, c)                     # eq. 10
    se_v = on_v * (v_v - u_v).square().flatten(1).sum(1)            # (B,) squared norms
    se_t, ce = (on_t * x for x in text_flow.loss(model, v_t, z_t, u_t, y, tau_t, anchor, discrete_loss))
    n_v = z_v1[0].numel() / (z_v1.shape[1] * math.prod(model.config.patch_size))             # |z_v| in tokens
    lambda_t = n_v / y.shape[1] if lambda_t is None else lambda_t   # |z_v| / |z_t|: each modality's token mean weighs the same
    flow = (lambda_v * se_v + lambda_t * se_t).mean()               # eq. 11
    total = flow / z_v1[0].numel() + anchor * ce.mean()
    return total, dict(video=se_v.detach() / z_v1[0].numel(), text=se_t.detach() / u_t[0].numel(), anchor=ce.detach(),
                       tau_v=tau_v, tau_t=tau_t, on_v=on_v, on_t=on_t)


# ---------------------------------------------------------------- inference: three modes, the same Euler steps

def clock_grid(steps, shift):
    """The times an Euler solver visits: (steps + 1,) from 0 to 1, equal steps warped. Raises ValueError for steps < 1, shift <= 0."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"steps is {steps}, shift is {shift}: wanted at least 1, and above 0")
    return warp(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)


def velocities(model, state, guidance, null_v=None, null_t=None):
    """v = v_null + guidance (v_cond - v_null) for each modality that runs, all in one forward pass; 1 = conditional, 0 = unconditional.

    A modality at tau = 0 is pure noise and tells nothing: that is how the other one is made unconditional, without an extra token.
    state: dict of z_v, z_t, tau_v, tau_t, c in this order; null_v, null_t: the entries of it that differ where the video, the text is unconditional.
    """
    if guidance == 1:
        return model(*state.values())
    passes = [{}] + [null for null in (null_v, null_t) if null is not None]
    v_v, v_t = model(*[None if s is None else torch.cat([null.get(name, s) for null in passes]) for name, s in state.items()])
    guided = lambda v, null: null + guidance * (v - null)
    if null_v is not None:
        v_v = guided(*v_v.chunk(len(passes))[:2])
    if null_t is not None:
        v_t = guided(v_t.chunk(len(passes))[0], v_t.chunk(len(passes))[-1])
    return v_v, v_t


@torch.no_grad()
def understand(model, z_v, c=None, *, steps=20, shift=None, guidance=1.0, length=None, reuse_video=False, generator=None, callback=None):
    """Video -> text: the video is clean (tau_v = 1) and only the text's clock runs (eq. 16).

    z_v (B, C, F, H, W) clean latents; c (B, <= L, prompt_dim) or None for no prompt; length N, shift: the model's own by
    default. guidance contrasts with a video of pure noise. reuse_video: the keys and values of video and prompt are those of the first
    step, and the others run the text's tokens alone. callback(i, tau_v, tau_t, z_v, z_t) after each step. Returns y_hat (B, N) int64.
    Raises ValueError for steps < 1, shift <= 0, and shapes that do not fit.
    """
    cfg, b = model.config, len(z_v)
    c = z_v.new_zeros(b, cfg.prompt_len, cfg.prompt_dim) if c is None else c
    one, zero = torch.ones(b, device=z_v.device), torch.zeros(b, device=z_v.device)
    text_flow = TEXT_FLOWS[cfg.text_flow]
    z_t = text_flow.noise(model, z_v, length or cfg.text_len, generator)
    null = None if guidance == 1 else dict(z_v=noise_like(z_v, generator), tau_v=zero)
    network = partial(model, memory=[([], []) for _ in model.blocks]) if reuse_video else model
    grid = clock_grid(steps, cfg.text_shift if shift is None else shift).tolist()
    for i, (tau, after) in enumerate(zip(grid, grid[1:])):
        _, v_t = velocities(network, dict(z_v=z_v, z_t=z_t, tau_v=one, tau_t=zero + tau, c=c), guidance, null_t=null)
        z_t = text_flow.step(z_t, v_t, tau, after, generator=generator)                      # eq. 16
        if callback:
            callback(i, 1.0, after, z_v, z_t)
    return model.decode(z_t)


@torch.no_grad()
def generate(model, y, c, shape, *, steps=20, shift=1.0, guidance=1.0, c_null=None, keep_text=False, generator=None, callback=None):
    """Text -> video: the text is clean (tau_t = 1) and only the video's clock runs (eq. 17).

    y (B, N) int64 tokens, or None for the plain video generator, which reads c alone (eq. 3); c (B, <= L, prompt_dim);
    shape (C, F, H, W) of one latent. guidance contrasts with no prompt (c_null, zeros by default) and a text of pure noise,
    or, with keep_text, as the published weights do, the same clean text.
    callback(i, tau_v, tau_t, z_v, z_t) after each step. Returns z_v (B, C, F, H, W). Raises as understand does.
    """
    b = len(c)
    one, zero = torch.ones(b, device=c.device), torch.zeros(b, device=c.device)
    z_v = noise_like(c.new_empty(b, *shape, dtype=torch.float32), generator)
    z_t, tau_t = (None, None) if y is None else (model.embed(y), one)
    null = None if guidance == 1 else dict(c=torch.zeros_like(c) if c_null is None else c_null.expand_as(c))
    if null and y is not None and not keep_text:
        null |= dict(z_t=TEXT_FLOWS[model.config.text_flow].noise(model, c, y.shape[1], generator), tau_t=zero)
    grid = clock_grid(steps, shift).tolist()
    for i, (tau, after) in enumerate(zip(grid, grid[1:])):
        v_v, _ = velocities(model, dict(z_v=z_v, z_t=z_t, tau_v=zero + tau, tau_t=tau_t, c=c), guidance, null_v=null)
        z_v = z_v + (after - tau) * v_v                             # eq. 17 (eq. 3 without text)
        if callback:
            callback(i, after, 1.0, z_v, z_t)
    return z_v


@torch.no_grad()
def joint(model, c, shape, *, steps=20, shift=1.0, text_shift=None, guidance=1.0, c_null=None, length=None, generator=None, callback=None):
    """Prompt -> video and text: both start as noise and both clocks run (eq. 18), each on its own grid.

    c (B, <= L, prompt_dim); shape (C, F, H, W). shift warps the video's grid, text_shift the text's (default: shift times the model's own, which
    is eq. 18's one clock where that is 1). guidance contrasts each modality with no prompt and pure noise in place of the other. callback(i,
    tau_v, tau_t, z_v, z_t) after each step. Returns z_v (B, C, F, H, W), y_hat (B, N). Raises as understand does.
    """
    cfg, b, n = model.config, len(c), length or model.config.text_len
    text_flow, zero = TEXT_FLOWS[cfg.text_flow], torch.zeros(b, device=c.device)
    z_v = noise_like(c.new_empty(b, *shape, dtype=torch.float32), generator)
    z_t = text_flow.noise(model, c, n, generator)
    null_v = null_t = None
    if guidance != 1:
        no_c = torch.zeros_like(c) if c_null is None else c_null.expand_as(c)
        null_v = dict(z_t=text_flow.noise(model, c, n, generator), tau_t=zero, c=no_c)
        null_t = dict(z_v=noise_like(z_v, generator), tau_v=zero, c=no_c)
    text_shift = shift * cfg.text_shift if text_shift is None else text_shift                # warps multiply: tau_t = warp(tau_v, cfg.text_shift)
    grid_v, grid_t = clock_grid(steps, shift).tolist(), clock_grid(steps, text_shift).tolist()
    for i in range(steps):
        state = dict(z_v=z_v, z_t=z_t, tau_v=zero + grid_v[i], tau_t=zero + grid_t[i], c=c)
        v_v, v_t = velocities(model, state, guidance, null_v, null_t)
        z_v = z_v + (grid_v[i + 1] - grid_v[i]) * v_v               # eq. 18
        share = i / (steps - 1) if steps > 1 else 1.0               # the discrete flow's alone: the published weights' schedule
        z_t = text_flow.step(z_t, v_t, grid_t[i], grid_t[i + 1], share, generator)           # eq. 18
        if callback:
            callback(i, grid_v[i + 1], grid_t[i + 1], z_v, z_t)
    if cfg.text_flow == "discrete":                                 # its tokens were drawn without seeing each other: a last look
        z_t = model(z_v, z_t, zero + 1, zero + 1, c)[1].argmax(-1)
    return z_v, model.decode(z_t)
