"""What experiments measure: functions of a finished toy.experiments.Run -> {name: number}.

"name @ x" is a point of a curve.
"""

from functools import partial

import torch
import torch.nn.functional as F

from engine.checkpoint import checkpoints
from train import STAGES
from univigu import generate, joint, noise_like

from . import shapes, words
from .evaluate import ALL, BRIEF, SAMPLING, said, score

FREE = tuple(name for name in ALL if name not in BRIEF)  # what a brief prompt leaves open
STEPS = (1, 2, 4, 8, 16, 32, 64)  # of the sampler
TAUS = (0.3, 0.6, 0.9)  # where a stream of joint() is exchanged


def reading(run):
    """Captions of clean video without a prompt: how much of them is right, in all and each."""
    if run.stages == ["generator"]:
        return {}
    batch, truth = run.show()
    found = run.read(batch["z_v"])
    mean, each = score(found, truth)
    numbers = {"read": mean, "read all": (found == truth).all(1).double().mean()}
    return numbers | {f"read {name}": value for name, value in each.items()}


def reading_by_step(run):
    """Accuracy of such captions at each checkpoint of the run."""
    batch, truth = run.show()
    numbers = {}
    for step, folder in checkpoints(run.folder):
        found = run.read(batch["z_v"], model=run.restored(folder))
        numbers[f"read by step @ {step}"], _ = score(found, truth)
    return numbers


def reading_in_steps(run):
    """Accuracy by the sampler's steps, with the video computed in each, or in the first alone."""
    batch, truth = run.show(one_in=2)
    numbers = {}
    for name, reuse in (("read in", False), ("video reused, read in", True)):
        for steps in STEPS:
            found = run.read(batch["z_v"], steps=steps, reuse_video=reuse)
            numbers[f"{name} @ {steps}"], _ = score(found, truth)
    return numbers


def reading_by_prompt(run, stage=None):
    """Texts with the clip's own prompt, with none, and with another clip's, after a stage.

    Accuracy over what a prompt names, and how much of a wrong prompt is copied.
    """
    numbers = {}
    model = run.restored(run.folder / (stage or run.stages[-1]))
    form = words.BRIEF if stage == "recall" else words.DETAILED
    in_brief = torch.tensor([name in BRIEF for name in ALL])  # (7,)
    for split, suffix in (("seen", ""), ("unseen", " unseen")):
        batch, truth = run.show(split)
        lie = truth.roll(1, 0)
        prompts = {"right": batch["c"], "no": None, "wrong": batch["c"].roll(1, 0)}
        found = {name: run.read(batch["z_v"], c, model, form) for name, c in prompts.items()}
        for name, answers in found.items():
            numbers[f"{name} prompt{suffix}"], _ = score(answers, truth, BRIEF)
        lied = (truth != lie) & in_brief  # (B, 7)
        copied = (found["wrong"] == lie)[lied].double().mean()
        numbers[f"wrong prompt copied{suffix}"] = copied
    return numbers


def recalling_by_prompt(run):
    """The same after recall, whose texts are prompts."""
    found = reading_by_prompt(run, "recall")
    return {f"recall: {name}": value for name, value in found.items()}


def reading_both_ways(run):
    """Captions with the clip's own prompt: all of it, and what the prompt leaves open."""
    batch, truth = run.show()
    found = run.read(batch["z_v"], batch["c"])
    return {
        "read with prompt": score(found, truth)[0],
        "read free with prompt": score(found, truth, FREE)[0],
        "read free": score(run.read(batch["z_v"]), truth, FREE)[0],
    }


def reading_frames(run):
    """Captions of clips whose frames are in order, shuffled or backwards.

    Accuracy of each attribute, and how often the opposite direction is read.
    """
    _, truth = run.show()
    frames = shapes.render(run.world.dataset("seen").clips(range(len(truth))))
    orders = {
        "in order": list(range(shapes.T)),
        "shuffled": torch.randperm(shapes.T, generator=run.generator()).tolist(),
        "backwards": list(reversed(range(shapes.T))),
    }
    opposite = shapes.column(truth, "direction") ^ 1  # left 0, right 1, up 2, down 3
    numbers = {}
    for name, order in orders.items():
        found = run.read(run.world.codec.encode(frames[:, :, order]))
        _, each = score(found, truth)
        numbers |= {f"{attribute}, {name}": value for attribute, value in each.items()}
        turned = shapes.column(found, "direction") == opposite
        numbers[f"direction turned, {name}"] = turned.double().mean()
    return numbers


def drawing(run, stage=None):
    """Videos drawn at the end of a stage (default: the last), from prompts and its text.

    Accuracy of what the oracle sees, over what a prompt names.
    """
    stage = stage or run.stages[-1]
    batch, truth = run.show()
    y = batch.get(STAGES[stage])  # None for the generator
    model, generator = run.restored(run.folder / stage), run.generator()
    shape = run.world.shape
    z_v = generate(model, y, batch["c"], shape, generator=generator, **SAMPLING["generate"])
    return {"drawn": score(run.look(z_v), truth, BRIEF)[0]}


def recalling_in_length(run):
    """After recall, whose texts are prompts: reading and drawing, with N tokens and with as many
    as there are."""
    batch, truth = run.show()
    tokens = int((batch["prompt"] != words.PAD).sum(1).max())  # all prompts are of one length
    numbers = {}
    for name, n in (("", words.N), (", length told", tokens)):
        found = run.read(batch["z_v"], form=words.BRIEF, length=n)
        numbers[f"read{name}"], _ = score(found, truth, BRIEF)
        y, options = batch["prompt"][:, :n], SAMPLING["generate"]
        z_v = generate(
            run.model, y, batch["c"], run.world.shape, generator=run.generator(), **options
        )
        numbers[f"drawn{name}"], _ = score(run.look(z_v), truth, BRIEF)
    return numbers


def drawing_by_stage(run):
    return {f"drawn after {stage}": drawing(run, stage)["drawn"] for stage in run.stages}


def both(run, model=None, one_in=2, **sampling):
    """joint() from prompts, on the model's own line of the clocks.

    Returns what its captions say and what its videos show, (B, 7) each.
    """
    batch, _ = run.show(one_in=one_in)
    sampling = SAMPLING["joint"] | {"generator": run.generator()} | sampling
    z_v, y_hat = joint(model or run.model, batch["c"], run.world.shape, **sampling)
    return said(run.world.tokenizer.decode(y_hat)), run.look(z_v)


def agreement(run):
    """Caption against video of joint(): on the model's own line, and with the text ahead."""
    written, shown = both(run, one_in=1)
    ahead = both(run, one_in=1, shift=1.0, text_shift=0.1)
    _, truth = run.show()
    return {
        "agreement": score(written, shown)[0],
        "agreement, text ahead": score(*ahead)[0],
        "prompt followed": score(shown, truth, BRIEF)[0],
    }


class Apart:
    """A model whose modalities do not see each other: each runs beside noise, at tau = 0."""

    def __init__(self, model, generator):
        self.model, self.config, self.decode = model, model.config, model.decode
        self.text_flow = model.text_flow
        self.noise = partial(noise_like, generator=generator)

    def __call__(self, z_v, z_t, tau_v, tau_t, c):
        zero = torch.zeros_like(tau_v)
        v_v, _ = self.model(z_v, self.noise(z_t), tau_v, zero, c)
        _, v_t = self.model(self.noise(z_v), z_t, zero, tau_t, c)
        return v_v, v_t


def coevolution(run, steps=24):
    """How the streams of joint() depend on each other, with one clock for both, as eq. 18 has it.

    On what the prompt leaves open: how far both streams' guesses agree along tau; how far streams
    agree that do not see each other; and what a stream does when, at tau, the other is replaced by
    another clip's. "follows": of the attributes where that clip differs, the share that took its
    value; "stranger": the same for a clip that was not exchanged.
    """
    c = run.show(one_in=2)[0]["c"]
    numbers = {}

    def guesses_agree(k, tau_v, tau_t, z_v, z_t, v_v, v_t):
        if k and k % (steps // 6) == 0:
            written, shown = guess(run, tau_v, tau_t, z_v, z_t, c)
            numbers[f"agreement at @ {tau_v:.2f}"], _ = score(written, shown, FREE)

    usual = together(run, steps, guesses_agree)
    apart = both(run, Apart(run.model, run.generator()), shift=1.0, text_shift=1.0)
    numbers["agreement, apart"], _ = score(*apart, FREE)

    free = torch.tensor([name in FREE for name in ALL])  # (7,)
    for stream, other in (("video", "text"), ("text", "video")):
        for tau in TAUS:
            found = together(run, steps, exchange(other, round(tau * steps)))
            for who, distance in (("follows", 1), ("stranger", 2)):
                theirs = usual[other].roll(distance, 0)
                differs = (usual[stream] != theirs) & free  # (B, 7)
                taken = (found[stream] == theirs)[differs].double().mean()
                numbers[f"{stream} {who} @ {tau}"] = taken
    return numbers


def together(run, steps, callback):
    """What the captions and the videos of joint() say, with one clock for both."""
    written, shown = both(run, steps=steps, shift=1.0, text_shift=1.0, callback=callback)
    return {"text": written, "video": shown}


def guess(run, tau_v, tau_t, z_v, z_t, c):
    """What the two streams are heading for: as captions say and as videos show, (B, 7) each."""
    ones = torch.ones(len(c))
    v_v, v_t = run.model(z_v, z_t, tau_v * ones, tau_t * ones, c)
    z_v1_hat, z_t1_hat = z_v + (1 - tau_v) * v_v, z_t + (1 - tau_t) * v_t
    y_hat = run.model.decode(z_t1_hat)
    return said(run.world.tokenizer.decode(y_hat)), run.look(z_v1_hat)


def exchange(stream, step):
    """A callback that, after a step, gives each clip the stream of another one."""

    def callback(k, tau_v, tau_t, z_v, z_t, v_v, v_t):
        if k == step:
            state = z_t if stream == "text" else z_v
            state.copy_(state.roll(1, 0))  # in place: the sampler goes on from it

    return callback


def rows_of_E(run):
    """E's RMS, the mean cosine of its rows, and its effective rank.

    The rank is the exponential of the entropy of the singular values.
    """
    E = run.model.embedding_matrix().detach()  # (V, d)
    rows, n = F.normalize(E, dim=-1), len(E)
    cosines = (rows @ rows.T).sum() - n  # without each row's with itself
    entropy = torch.distributions.Categorical(torch.linalg.svdvals(E)).entropy()
    return {
        "RMS of E": E.square().mean().sqrt(),
        "cosine of E": cosines / (n * (n - 1)),
        "rank of E": entropy.exp(),
    }
