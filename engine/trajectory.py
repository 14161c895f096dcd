"""What a sampler passes through: recorded by its callback, and written as a page with a slider."""

from dataclasses import dataclass

import torch

from engine import pages
from engine.files import write_text

LATENTS = 3  # latent frames that are kept: all of the toy's, the first nine frames of real videos

TITLES = {
    "understand": (
        "Understand: a text emerges from a video",
        "The video is given, so its clock stands at 1; only the text's clock runs.",
    ),
    "generate": (
        "Generate: a video emerges from a text",
        "The text is given, so its clock stands at 1; only the video's clock runs.",
    ),
    "joint": (
        "Joint: video and text emerge together",
        "Only the prompt is given: both clocks run, "
        "and each modality sees how far the other has come.",
    ),
}


@dataclass
class Snapshot:
    """What a page shows of one moment of one sample. Without a text stream there are no texts."""

    tau_v: float
    tau_t: float | None
    z_v: torch.Tensor  # (1, C, up to LATENTS, H, W): the state
    z_v1_hat: torch.Tensor  # the same of the guess, the data that the velocity points at
    y: torch.Tensor | None = None  # (N,): the state's tokens
    y_hat: torch.Tensor | None = None  # (N,): the guess's
    sure: list[float] | None = None  # N of [0, 1]: how certain these are


class Recorder:
    """A sampler's callback: keeps a Snapshot of each state, with the velocity that led on."""

    def __init__(self, model):
        self.model = model
        self.state = None
        self.snapshots = []

    def __call__(self, k, tau_v, tau_t, z_v, z_t, v_v, v_t):
        if k > 0:
            self.snapshots.append(snapshot(self.model, *self.state, v_v, v_t))
        self.state = tau_v, tau_t, z_v, z_t

    def finish(self, y_hat=None):
        """The snapshots, that of the end included.

        y_hat (1, N): the text that the sampler returned, of which the released model takes a last
        look when all steps are done.
        """
        end = snapshot(self.model, *self.state)
        if y_hat is not None:
            end.y_hat = y_hat[0].cpu()
        return [*self.snapshots, end]


@torch.no_grad()
def snapshot(model, tau_v, tau_t, z_v, z_t, v_v=None, v_t=None):
    """The Snapshot of a state and of the velocities that lead on from it; None where one stays."""
    z_v1_hat = z_v if v_v is None else z_v + (1 - tau_v) * v_v
    found = Snapshot(tau_v, None, z_v[:, :, :LATENTS].cpu(), z_v1_hat[:, :, :LATENTS].cpu())
    if z_t is not None:
        y_hat, sure = guess_tokens(model, tau_t, z_t, v_t)
        found.tau_t = tau_t
        found.y = model.decode(z_t)[0].cpu()
        found.y_hat = y_hat[0].cpu()
        found.sure = [round(s, 3) for s in sure[0].clamp(max=1).tolist()]
    return found


def guess_tokens(model, tau_t, z_t, v_t):
    """The tokens (B, N) that a text's velocity points at, and how certain each is, in [0, 1]."""
    if not z_t.is_floating_point():  # token ids, and what stands for their velocity is logits
        if v_t is None:
            return z_t, torch.ones(z_t.shape)
        sure, y_hat = v_t.float().softmax(-1).max(-1)
        return y_hat, sure
    E = model.embedding_matrix()

    def likeliest(z):
        return (z @ E.T / E.shape[1] ** 0.5).softmax(-1).max(-1)

    z_t1_hat = z_t if v_t is None else z_t + (1 - tau_t) * v_t
    sure, y_hat = likeliest(z_t1_hat.float())
    # An exact row's own softmax is under 1, the more so the larger the vocabulary.
    exact, _ = likeliest(E[y_hat])
    return y_hat, sure / exact


def write_page(path, mode, snapshots, world, about):
    """Writes the page of a sample. about: (name, value) pairs, what is known of it."""
    last = len(snapshots) - 1
    shown = torch.linspace(0, last, min(len(snapshots), pages.STEPS)).round().int().tolist()
    given = decode(world, snapshots[0].z_v) if mode == "understand" else None
    steps = [page_step(mode, world, i, snapshots[i], given) for i in shown]
    if len(shown) < len(snapshots):
        about = [*about, ("shown", f"{len(shown)} of {len(snapshots)} points of the trajectory")]
    if not world.fixed_size:
        of = "" if mode == "understand" else " of the guess; those of the state are left out"
        about = [*about, ("frames shown", f"the first ones{of}")]
    title, lead = TITLES[mode]
    write_text(path, pages.trajectory(title, lead, about, steps))


def page_step(mode, world, i, found, given):
    """A Snapshot as pages.trajectory wants it. given: the frames of understand's video."""
    step = {"step": i, "tau_v": found.tau_v, "tau_t": found.tau_t, "text": {}}
    step["video"] = {"given": given}
    if given is None:
        step["video"] = {"guess": decode(world, found.z_v1_hat)}
        if world.fixed_size:  # Wan's VAE takes its time
            step["video"]["state"] = decode(world, found.z_v)
    if found.y is not None and mode == "generate":
        step["text"]["given"] = words(world, found.y)
    elif found.y is not None:
        step["text"] = {"guess": words(world, found.y_hat), "state": words(world, found.y)}
        step["sure"] = found.sure
    return step


def decode(world, z_v):
    """z_v (1, C, F, H, W) -> frames (3, T, H, W)."""
    return world.codec.decode(z_v)[0].cpu()


def words(world, y):
    """Tokens y (N,) -> the text of each. In both worlds 1 is the end, None here, and 0 padding."""
    texts = [text or "␣" for text in world.tokenizer.decode(y[:, None])]
    return [{0: "·", 1: None}.get(i, text) for i, text in zip(y.tolist(), texts)]
