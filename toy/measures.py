"""What experiments measure: functions of a finished run (toy.experiments.Run) that give {name: number}; "name @ x" is a point of a curve."""

from functools import partial

import torch
import torch.nn.functional as F

from train import STAGES, checkpoints
from univigu import generate, joint, noise_like

from . import shapes
from .evaluate import ALL, BRIEF, SAMPLING, said, score

FREE = tuple(name for name in ALL if name not in BRIEF)             # what a brief prompt leaves open
STEPS = (1, 2, 4, 8, 16, 32, 64)                                    # of the sampler
TAUS = (0.3, 0.6, 0.9)                                              # where a stream of joint() is exchanged


def reading(run):
    """Captions of clean video without a prompt: accuracy over all attributes, over each, and all seven right."""
    if run.stages == ["generator"]:
        return {}
    batch, truth = run.show()
    found = run.read(batch["z_v"])
    mean, each = score(found, truth)
    return {"read": mean, "read all": (found == truth).all(1).double().mean(), **{f"read {name}": value for name, value in each.items()}}


def reading_by_step(run):
    batch, truth = run.show()
    return {f"read by step @ {step}": score(run.read(batch["z_v"], model=run.load(checkpoint)), truth)[0] for step, checkpoint in checkpoints(run.folder)}


def reading_in_steps(run):
    """Accuracy by the sampler's steps, the video's tokens computed in each, or in the first alone."""
    batch, truth = run.show(share=2)
    return {f"{name} @ {steps}": score(run.read(batch["z_v"], steps=steps, reuse_video=reuse), truth)[0]
            for name, reuse in (("read in", False), ("video reused, read in", True)) for steps in STEPS}


def reading_by_prompt(run):
    """Captions with the clip's own prompt, none and another clip's: accuracy over what a prompt names, and how much of a wrong prompt is copied."""
    numbers = {}
    for split, suffix in (("seen", ""), ("unseen", " unseen")):
        batch, truth = run.show(split)
        for name, c in (("right", batch["c"]), ("no", None), ("wrong", batch["c"].roll(1, 0))):
            found = run.read(batch["z_v"], c)
            numbers[f"{name} prompt{suffix}"] = score(found, truth, BRIEF)[0]
        lie = truth.roll(1, 0)
        told = (truth != lie) & torch.tensor([name in BRIEF for name in ALL])                # (B, 7): where the last prompt was wrong
        numbers[f"wrong prompt copied{suffix}"] = (found == lie)[told].double().mean()
    return numbers


def reading_frames(run):
    """Captions of clips whose frames are in order, shuffled or backwards: accuracy of each attribute, and how often the opposite direction is read."""
    truth, forth = run.show()[1], list(range(shapes.T))
    frames, column, numbers = shapes.render(run.world.dataset("seen").clips(range(len(truth)))), ALL.index("direction"), {}
    for name, order in (("in order", forth), ("shuffled", torch.randperm(shapes.T, generator=run.generator()).tolist()), ("backwards", forth[::-1])):
        found = run.read(run.world.codec.encode(frames[:, :, order]))
        numbers |= {f"{attribute}, {name}": value for attribute, value in score(found, truth)[1].items()}
        numbers[f"direction turned, {name}"] = (found[:, column] == truth[:, column] ^ 1).double().mean()                # left 0, right 1, up 2, down 3
    return numbers


def drawing(run, stage=None):
    """Videos drawn at a stage's end (default: the last's) from the prompt and that stage's text: oracle accuracy over what a prompt names."""
    (batch, truth), stage = run.show(), stage or run.stages[-1]
    y = batch.get(STAGES[stage])                              # None for the generator
    z_v = generate(run.load(run.folder / stage), y, batch["c"], run.world.shape, generator=run.generator(), **SAMPLING["generate"])
    return {"drawn": score(run.look(z_v), truth, BRIEF)[0]}


def drawing_by_stage(run):
    return {f"drawn after {stage}": drawing(run, stage)["drawn"] for stage in run.stages}


def both(run, model=None, share=2, **sampling):
    """joint() from prompts, on the line of the clocks that training walks -> what its captions say and what its videos show, (B, 7) each."""
    c = run.show(share=share)[0]["c"]
    z_v, y_hat = joint(model or run.model, c, run.world.shape, generator=run.generator(), **SAMPLING["joint"] | {"text_shift": None} | sampling)
    return said(run.world.tokenizer.decode(y_hat)), run.look(z_v)


def agreement(run):
    """Caption against video of joint(): on the line that training walks, and as it samples by default."""
    written, shown = both(run, share=1)
    ahead = score(*both(run, share=1, text_shift=SAMPLING["joint"]["text_shift"]))[0]
    return {"agreement": score(written, shown)[0], "agreement, text ahead": ahead, "prompt followed": score(shown, run.show()[1], BRIEF)[0]}


class Apart:
    """A model whose modalities do not see each other: each is run beside pure noise at tau = 0, which tells nothing."""

    def __init__(self, model, generator):
        self.model, self.config, self.decode, self.noise = model, model.config, model.decode, partial(noise_like, generator=generator)
        self.text_flow = model.text_flow

    def __call__(self, z_v, z_t, tau_v, tau_t, c):
        zero = torch.zeros_like(tau_v)
        return self.model(z_v, self.noise(z_t), tau_v, zero, c)[0], self.model(self.noise(z_v), z_t, zero, tau_t, c)[1]


def coevolution(run, steps=24):
    """With one clock for both, as eq. 18 has it, and on what the prompt leaves open: how far both streams' guesses agree along tau; how far streams agree
    that do not see each other; and what a stream does when, at tau, the other is replaced by another clip's. "follows": of the attributes where that
    clip differs, the share that took its value; "stranger": the same for a clip that was not exchanged.
    """
    numbers, c, open_ = {}, run.show(share=2)[0]["c"], torch.tensor([name in FREE for name in ALL])
    outcome = lambda callback: dict(zip(("text", "video"), both(run, steps=steps, text_shift=1.0, callback=callback)))

    def point(k, tau_v, tau_t, z_v, z_t, *_):
        if k and k % (steps // 6) == 0:
            v_v, v_t = run.model(z_v, z_t, torch.full((len(c),), tau_v), torch.full((len(c),), tau_t), c)
            y_hat, z_v1_hat = run.model.decode(z_t + (1 - tau_t) * v_t), z_v + (1 - tau_v) * v_v
            numbers[f"agreement at @ {tau_v:.2f}"] = score(said(run.world.tokenizer.decode(y_hat)), run.look(z_v1_hat), FREE)[0]

    def exchange(k, tau_v, tau_t, z_v, z_t, *_):
        if k == round(tau * steps):
            state = z_t if other == "text" else z_v
            state.copy_(state.roll(1, 0))                           # in place: the sampler goes on from it

    usual = outcome(point)
    numbers["agreement, apart"] = score(*both(run, Apart(run.model, run.generator()), text_shift=1.0), FREE)[0]
    for stream, other in (("video", "text"), ("text", "video")):
        for tau in TAUS:
            found = outcome(exchange)[stream]
            for who, distance in (("follows", 1), ("stranger", 2)):
                theirs = usual[other].roll(distance, 0)
                numbers[f"{stream} {who} @ {tau}"] = (found == theirs)[(usual[stream] != theirs) & open_].double().mean()
    return numbers


def rows_of_E(run):
    """E's RMS, the mean cosine of its rows, and its effective rank: the exponential of the entropy of its singular values."""
    E = run.model.embedding_matrix().detach()
    s = torch.linalg.svdvals(E)
    cosine = F.normalize(E, dim=-1) @ F.normalize(E, dim=-1).T
    return {"RMS of E": E.square().mean().sqrt(), "cosine of E": (cosine.sum() - len(E)) / (len(E) * (len(E) - 1)),
            "rank of E": torch.distributions.Categorical(s).entropy().exp()}
