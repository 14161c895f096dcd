"""The authors' released model: Wan2.1's DiT with a text flow over token ids, not embeddings.

The paper's text flow (eq. 7-8) moves embeddings by their velocity. The released weights move the
tokens themselves: discrete flow matching (Gat et al., arXiv 2407.15595) on the mixture path with
kappa(tau) = tau, from uniformly random tokens. At clock tau a token is clean with probability tau,
else uniformly random, and the network gives logits of the clean token. So here the text's state z_t
is y_t (B, N) int64, and what stands for its velocity v_t is logits (B, N, V).

config_from() and build() are the one place that chooses between this model and the paper's.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from univigu import (
    Config,
    Point,
    UniViGU,
    clock_grid,
    guide,
    joint,
    noise_like,
    option,
    to_device,
    with_nulls,
)


@dataclass
class PublishedConfig(Config):
    """Config of the released model: tokens are embedded at the model's width."""

    text_flow: str = option("discrete", "flow over token ids", choices=("discrete",))
    latents: str = option(
        "normalised",
        "video latents of the 'discrete' text flow: 'normalised' per channel, as Wan's, or 'raw', "
        "as the authors' published weights want them",
        choices=("normalised", "raw"),
    )
    discrete_loss: str = option(
        "cross-entropy",
        "loss of the 'discrete' text flow: 'cross-entropy' or 'generalised-kl'",
        choices=("cross-entropy", "generalised-kl"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.text_dim != self.dim:
            raise ValueError(
                f"text_dim is {self.text_dim}, wanted dim {self.dim} for text_flow 'discrete'"
            )


class DiscreteFlow:
    """The text's flow over token ids; the same methods as univigu.EmbeddingFlow."""

    def noise(self, model, like, n, generator=None):
        """y_0 (B, n): every token uniformly random, on the device of `like`.

        Of a list of generators each draws a sample, as univigu.noise_like has them do.
        """
        if isinstance(generator, list):
            rows = zip(like, generator, strict=True)
            return torch.cat([self.noise(model, row[None], n, g) for row, g in rows])
        device = generator.device if generator else "cpu"
        y = torch.randint(
            model.config.vocab_size, (len(like), n), generator=generator, device=device
        )
        return to_device(y, like.device)

    def corrupt(self, model, y, tau_t, generator=None):
        """Tokens y (B, N) at clock tau_t (B,) -> y_t on the mixture path, and y, the target."""
        clean = to_device(torch.rand(y.shape, generator=generator), tau_t.device) < tau_t[:, None]
        return torch.where(clean, y, self.noise(model, y, y.shape[1], generator)), y

    def loss(self, model, logits, y_t, target, y, tau_t, anchor):
        """The loss of each sample, (B,), summed over its tokens; and zeros: no anchor is needed.

        "generalised-kl" would bound -log p(y) in its mean over uniform tau, but for the clamp.
        """
        log_p = F.log_softmax(logits.float(), dim=-1)  # (B, N, V)
        log_p_y = log_p.gather(2, y[..., None])[..., 0]  # (B, N)
        if model.config.discrete_loss == "cross-entropy":
            return -log_p_y.sum(1), torch.zeros_like(tau_t)
        p_y_t = log_p.gather(2, y_t[..., None])[..., 0].exp()  # (B, N)
        same = (y_t == y).float()
        rate = 1 / (1 - tau_t).clamp(min=0.05)  # a jump's rate grows without bound near data
        return rate * (same - p_y_t - (1 - same) * log_p_y).sum(1), torch.zeros_like(tau_t)

    def repulsion(self, model):
        """Zero: no token is read by its row of E, so rows cannot merge unread."""
        return 0.0

    def step(self, y_t, logits, tau, tau_next, generator=None):
        """The mixture path's own Euler step."""
        return redraw(y_t, logits, (tau_next - tau) / (1 - tau), generator)


def redraw(y_t, logits, redraw_prob, generator=None):
    """Draws each token of y_t (B, N) anew from softmax(logits (B, N, V)), with that probability.

    Of a list of generators each draws a sample, as univigu.noise_like has them do.
    """
    if isinstance(generator, list):
        rows = zip(y_t, logits, generator, strict=True)
        return torch.cat([redraw(y[None], of[None], redraw_prob, g) for y, of, g in rows])
    device = generator.device if generator else "cpu"
    drawn = torch.rand(2, *y_t.shape, generator=generator, device=device, dtype=torch.float64)
    u, coin = drawn.to(y_t.device)
    cdf = logits.double().softmax(-1).cumsum(-1)  # (B, N, V)
    tokens = torch.searchsorted(cdf, (u * cdf[..., -1])[..., None], right=True)[..., 0]
    return torch.where(coin < redraw_prob, tokens.clamp(max=cdf.shape[-1] - 1), y_t)


class Rows(nn.Module):
    """Token ids -> their rows of an embedding, whose weights stay where they are."""

    def __init__(self, embedding):
        super().__init__()
        object.__setattr__(self, "embedding", embedding)  # no submodule: else it had a second name

    def forward(self, y):
        return self.embedding(y)


class PublishedUniViGU(UniViGU):
    """UniViGU over token ids. Its text enters as rows of token_embedding and leaves as logits."""

    text_flow = DiscreteFlow()

    def __init__(self, config: PublishedConfig):
        super().__init__(config)

    def text_interface(self):
        return Rows(self.token_embedding), self.config.vocab_size, ()

    def text_velocity(self, out, z_t, tau_t):
        return out

    def embed(self, y):
        return y

    def decode(self, z_t):
        return z_t


@joint.register
@torch.no_grad()
def _(
    model: PublishedUniViGU,
    c,
    shape,
    *,
    steps=20,
    shift=1.0,
    text_shift=None,
    guidance=1.0,
    c_null=None,
    length=None,
    generator=None,
    callback=None,
):
    """univigu.joint as the release samples: after step k of S each token is redrawn with
    probability k / (S - 1), k from 0. Tokens drawn together have not seen each other, so a last
    look, with both clocks at 1, decides."""
    b, n, flow = len(c), length or model.config.text_len, model.text_flow
    zero = torch.zeros(b, device=c.device)
    z_v = noise_like(c.new_empty(b, *shape, dtype=torch.float32), generator)
    y_t = flow.noise(model, c, n, generator)
    nulls = []
    if guidance != 1:
        no_c = torch.zeros_like(c) if c_null is None else c_null.expand_as(c)
        nulls = [
            dict(z_t=flow.noise(model, c, n, generator), tau_t=zero, c=no_c),
            dict(z_v=noise_like(z_v, generator), tau_v=zero, c=no_c),
        ]
    text_shift = shift * model.config.joint_shift if text_shift is None else text_shift
    grid_v, grid_t = clock_grid(steps, shift), clock_grid(steps, text_shift)
    if callback:
        callback(0, grid_v[0], grid_t[0], z_v, y_t, None, None)
    for k in range(steps):
        point = Point(z_v, y_t, zero + grid_v[k], zero + grid_t[k], c)
        v_v, logits = model(*with_nulls(point, *nulls))
        v_v = guide(v_v, guidance, passes=3, null=1)
        logits = guide(logits, guidance, passes=3, null=2)
        z_v = z_v + (grid_v[k + 1] - grid_v[k]) * v_v
        y_t = redraw(y_t, logits, k / (steps - 1) if steps > 1 else 1.0, generator)
        if callback:
            callback(k + 1, grid_v[k + 1], grid_t[k + 1], z_v, y_t, v_v, logits)
    _, logits = model(z_v, y_t, zero + 1, zero + 1, c)
    return z_v, logits.argmax(-1)


# ---------------------------------------------------------------- the choice

MODELS = {"embedding": (Config, UniViGU), "discrete": (PublishedConfig, PublishedUniViGU)}


def config_from(values):
    """The Config, or PublishedConfig, in a dict of options; keys of other dataclasses are ignored.

    Reads older config.json files, too. Raises ValueError for an unknown text_flow, for a value out
    of range, and for raw latents with the paper's text flow.
    """
    flow = values.get("text_flow", Config.text_flow)
    if flow not in MODELS:
        raise ValueError(f"text_flow is {flow!r}, wanted one of {', '.join(MODELS)}")
    cls, _ = MODELS[flow]
    # older toy models, whose text's clock is warped, were sampled with the text ahead
    older = 0.1 if values.get("text_shift", 1.0) > 1 else 1.0
    values = {"joint_shift": older} | values
    for f in fields(PublishedConfig):
        if not hasattr(cls, f.name) and values.get(f.name, f.default) != f.default:
            raise ValueError(
                f"{f.name} is {values[f.name]!r}, wanted {f.default!r}, or --text-flow discrete"
            )
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def build(config):
    """A new model of the class that its config is for."""
    _, model = MODELS[config.text_flow]
    return model(config)


def latents_of(config):
    """The video latents that a model wants: "normalised", or "raw" as the published weights'."""
    return getattr(config, "latents", "normalised")
