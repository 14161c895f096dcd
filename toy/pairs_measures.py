"""What experiments measure in the second world: functions of a finished Run -> {name: number}.

"name @ x" is a point of a curve. Object by object, matched by colour, see toy/pairs_evaluate.py.
"""

import torch.nn.functional as F

from engine.checkpoint import checkpoints
from train import STAGES
from univigu import generate, joint, understand

from . import pairs
from .measures import Apart
from .pairs_evaluate import names_of, said, score, shown, truth

STEPS = (1, 2, 4, 8, 16, 32)  # of each sampler


def show(run, split="seen"):
    """A batch of clips, and what they show, as pairs_evaluate.Told."""
    dataset = run.world.dataset(split)
    indices = range(run.clips)
    return dataset.__getitems__(indices), truth(dataset.clips(indices))


def compare(run, found, wanted, name):
    """The measures of one mode, under names that begin with `name`."""
    of = score(found, wanted, run.world.level)
    numbers = {
        name: of["attribute_accuracy"],
        f"{name} objects": of["shape_right"],
        f"{name} bound": of["binding"],
        f"{name} all": of["exact_match"],
    }
    return numbers | {f"{name} {k}": v for k, v in of["attribute_accuracy_each"].items()}


def captions(run, batch, model=None, **sampling):
    """What the model writes of clean videos without a prompt, as Told."""
    options = run.world.sampling["understand"] | {"reuse_video": False} | sampling
    y_hat = understand(model or run.model, batch["z_v"], generator=run.generator(), **options)
    return said(run.world.tokenizer.decode(y_hat), run.world.level)


def videos(run, batch, model=None, stage=None, **sampling):
    """What it draws from captions, as the oracle tells it."""
    y, options = batch.get(STAGES[stage or run.stages[-1]]), run.world.sampling["generate"]
    model, shape, g = model or run.model, run.world.shape, run.generator()
    z_v = generate(model, y, batch["c"], shape, generator=g, **options | sampling)
    return shown(run.world.codec.decode(z_v), run.world.level)


def reading(run):
    """Captions without a prompt, of pairs of training and of held-out ones."""
    if run.stages == ["generator"]:
        return {}
    numbers = {}
    for split, suffix in (("seen", ""), ("unseen", " unseen")):
        batch, wanted = show(run, split)
        found = compare(run, captions(run, batch), wanted, "read")
        numbers |= {name + suffix: value for name, value in found.items()}
    return numbers


def reading_by_step(run):
    """The same at each checkpoint, "early" at the first after a quarter of the way, and how alike
    E's rows are: the largest cosine between two rows of one attribute's values, and of any two
    values, of those that the level's captions tell."""
    batch, wanted = show(run)
    known = run.world.tokenizer.ids
    rows = {
        f"cosine of {name}s": [known[value] for value in pairs.ATTRIBUTES[name] if value in known]
        for name in names_of(run.world.level)
    }
    rows["largest cosine"] = sum(rows.values(), [])
    numbers, saved = {}, checkpoints(run.folder)
    early = next(step for step, _ in saved if 4 * step >= saved[-1][0])
    for step, folder in saved:
        model = run.restored(folder)
        found = compare(run, captions(run, batch, model), wanted, "read")
        numbers[f"read by step @ {step}"] = found["read"]
        numbers[f"bound by step @ {step}"] = found["read bound"]
        if step == early:
            numbers |= {"read early": found["read"], "bound early": found["read bound"]}
        E = F.normalize(model.embedding_matrix().detach(), dim=-1)
        cosines = (E @ E.T).fill_diagonal_(-1)  # (V, V)
        for name, ids in rows.items():
            if len(ids) > 1:
                numbers[f"{name} @ {step}"] = cosines[ids][:, ids].max()
    return numbers


def drawing(run, stage=None):
    """Videos drawn from captions, as the oracle reads them; by a generator, from what it was
    prompted with."""
    batch, wanted = show(run)
    return compare(run, videos(run, batch, stage=stage), wanted, "drawn")


def agreement(run):
    """Captions against videos of joint sampling, from prompts, on the model's own line."""
    return compare(run, *both(run), "agreed")


def both(run, model=None, **sampling):
    """joint() from prompts: what its captions say, and what its videos show."""
    batch, _ = show(run)
    options = run.world.sampling["joint"] | {"generator": run.generator()} | sampling
    z_v, y_hat = joint(model or run.model, batch["c"], run.world.shape, **options)
    seen = shown(run.world.codec.decode(z_v), run.world.level)
    return said(run.world.tokenizer.decode(y_hat), run.world.level), seen


def together_and_apart(run):
    """Agreement and binding between caption and video of joint(), where the streams see each other
    and where each runs beside noise."""
    numbers = {}
    for name, model in (("together", run.model), ("apart", Apart(run.model, run.generator()))):
        found = compare(run, *both(run, model), name)
        numbers[f"{name} agree"] = found[name]
        numbers[f"{name} bind"] = found[f"{name} bound"]
    return numbers


def by_sampler_steps(run):
    """Reading and drawing by the number of the samplers' steps."""
    batch, wanted = show(run)
    numbers = {}
    for steps in STEPS:
        found = compare(run, captions(run, batch, steps=steps), wanted, "read")
        numbers[f"read in @ {steps}"] = found["read"]
        numbers[f"bound in @ {steps}"] = found["read bound"]
        found = compare(run, videos(run, batch, steps=steps), wanted, "drawn")
        numbers[f"drawn in @ {steps}"] = found["drawn"]
    return numbers
