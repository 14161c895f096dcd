"""What the model itself thinks of texts: how well they fit a video, and how sure it is of them."""

import torch
from einops import rearrange

from engine.trajectory import guess_tokens
from univigu import warp

END = 1  # the token of a text's end, in every world
DRAWS = 8  # clocks, each with a noise of its own


@torch.no_grad()
def text_losses(model, z_v, texts, c=None, *, reuse_video=True):
    """The text's part of the uni-flow loss (eq. 11) where the video is clean: the smaller, the
    better a text fits.

    z_v (B, C, F, H, W) clean latents; texts (B, K, N) token ids, K for each video; c (B, at most L,
    prompt_dim) or None for no prompt. reuse_video: keys and values of video and prompt are computed
    once, beside a text of noise, as the first step of understand() does.

    The mean over DRAWS clocks, spread as in training, and noises; both are the same for all texts,
    so that losses compare. Returns (B, K) float32.
    """
    cfg, flow, (b, _, n) = model.config, model.text_flow, texts.shape
    c = z_v.new_zeros(b, cfg.prompt_len, cfg.prompt_dim) if c is None else c
    one = torch.ones(b, device=z_v.device)
    if reuse_video:
        noise = flow.noise(model, z_v[:1], n, torch.Generator().manual_seed(DRAWS))
        noise = noise.repeat_interleave(b, dim=0)  # else a loss would depend on the place in z_v
        _, _, memory = model(z_v, noise, one, 0 * one, c, remember=True)

    losses = []
    for y in rearrange(texts, "b k n -> k b n"):
        total = 0
        for k in range(DRAWS):
            tau_t = warp((k + 0.5) / DRAWS, cfg.text_shift) * one
            rows = (
                flow.corrupt(model, row[None], tau_t[:1], torch.Generator().manual_seed(k))
                for row in y
            )
            z_t, u_t = map(torch.cat, zip(*rows))
            if reuse_video:
                v_t = model.text_alone(z_t, tau_t, memory)
            else:
                _, v_t = model(z_v, z_t, one, tau_t, c)
            loss, _ = flow.loss(model, v_t, z_t, u_t, y, tau_t, 0.0)  # no anchor
            total = total + loss / u_t[0].numel()
        losses.append(total / DRAWS)
    return torch.stack(losses, dim=1).float()


class Confidence:
    """A sampler's callback that ends with how sure the model is of the captions it wrote.

    That is how certain its guesses of the tokens were, see guess_tokens, on the way: the mean over
    the steps. The last one alone tells less, the more steps there are: near the data a guess
    repeats what is there.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, k, tau_v, tau_t, z_v, z_t, v_v, v_t):
        if k == 0:
            self.total = 0
        elif v_t is not None:
            rows = zip(self.z_t.split(1), v_t.split(1))  # for the logits of one fill a gigabyte
            sure = [guess_tokens(self.model, self.tau_t, *row)[1] for row in rows]
            self.total = self.total + torch.cat(sure).clamp(max=1)
        self.k, self.tau_t, self.z_t = k, tau_t, z_t

    def of(self, y_hat):
        """y_hat (B, N), what the sampler returned -> (B,) in [0, 1], the mean over a caption's
        tokens, its end included."""
        ends = y_hat == END
        written = ends.cumsum(1) - ends.long() == 0  # no end before
        return (self.total / self.k * written).sum(1) / written.sum(1)
