"""How well a model reads, draws and does both in the second world: what is measured, and how.

Of two shapes that were named and two that there are, those of one colour belong together; a shape
whose colour was not named counts as wrong in all it has, so that matching does not flatter.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine.files import atomic, write_json
from engine.video import to_pixels, write_gif
from engine.world import Evaluation, in_turn
from univigu import generate, joint, understand

from . import pairs, pairs_oracle
from .evaluate import BATCH, SPLITS, drift, held_out_losses, on_model, sheet
from .pairs import ATTRIBUTES

COLOUR = list(ATTRIBUTES).index("colour")
BOUND = [list(ATTRIBUTES).index(name) for name in ("colour", "shape", "direction")]


@dataclass
class Told:
    """Two shapes of n clips, and what relates them: of a caption, a video, or the truth."""

    attributes: torch.Tensor  # (n, 2, 6) int64, -1 where nothing valid is said
    relation: list  # (index of RELATIONS, colour of the one, colour of the other), or None


def names_of(level):
    """The attributes that a caption tells at a level."""
    names = [name for name in ATTRIBUTES if level >= 3 or name not in ("size", "speed")]
    return [name for name in names if level == 6 or name != "event"]


def truth(clips):
    """The Told of pairs.Clips."""
    colours = [[shape["colour"] for shape in both] for both in pairs.named(clips)]
    relations = [
        (relation, *both) if relation >= 0 else None
        for relation, both in zip(clips.relation.tolist(), colours)
    ]
    return Told(clips.attributes, relations)


def said(texts, level):
    """The Told of captions."""
    rows, relations = [], []
    for text in texts:
        both, relation = pairs.parse(text, level)
        rows.append([[index_of(name, shape[name]) for name in ATTRIBUTES] for shape in both])
        relations.append(relation)
    return Told(torch.tensor(rows).reshape(-1, 2, len(ATTRIBUTES)), relations)


def index_of(name, value):
    return -1 if value is None else ATTRIBUTES[name].index(value)


def shown(videos, level):
    """The Told of videos (3, T, H, W) each, by the oracle, and what of their relations holds."""
    attributes, holds = [], []
    for part in torch.stack(list(videos)).split(32):
        seen = pairs_oracle.read(part, level == 6)
        attributes.append(seen.attributes)
        for row, start, front in zip(seen.attributes, seen.start, seen.front.tolist()):
            holds.append(true_relations(row, start, front))
    return Told(torch.cat(attributes), [None] * len(holds)), holds


def true_relations(row, start, front):
    """All relations that hold in a video that was read, as Told has them."""
    names = [ATTRIBUTES["colour"][i] if i >= 0 else None for i in row[:, COLOUR].tolist()]
    found = set()
    for one, other in ((0, 1), (1, 0)):
        rows, starts = row[[one, other]].numpy(), start[[one, other]].numpy()
        in_front = None if front < 0 else int(front != one)
        for k in pairs.relations(rows, starts, in_front):
            found.add((k, names[one], names[other]))
    return found


def matched(found, wanted):
    """found, wanted (n, 2, 6) -> found with the shape of the same colour in each place, -1 where
    there is none."""
    same = found[:, None, :, COLOUR] == wanted[:, :, None, COLOUR]  # (n, wanted, found)
    which = same.float().argmax(2)  # (n, 2)
    rows = torch.arange(len(found))[:, None]
    return torch.where(same.any(2)[..., None], found[rows, which], -1)


def right_in(found, wanted):
    """Where found, matched by colour, says what is wanted: (n, 2, 6). Who is not sure is wrong."""
    return (matched(found.attributes, wanted) == wanted) & (wanted >= 0)


def score(found, wanted, names, roll=0):
    """Shares that are right: name -> number. found, wanted: Told. names: the attributes of a level.
    roll: clips apart, for chance."""
    right = right_in(found, wanted.attributes.roll(roll, 0)).double()  # (n, 2, 6)
    columns = [list(ATTRIBUTES).index(name) for name in names]
    both, bound = right[..., columns], right[..., BOUND].prod(2)
    each = {name: round(right[..., k].mean().item(), 4) for name, k in zip(names, columns)}
    return {
        "attribute_accuracy": round(both.mean().item(), 4),
        "attribute_accuracy_each": each,
        "shape_right": round(both.prod(2).mean().item(), 4),
        "binding": round(bound.prod(1).mean().item(), 4),
        "exact_match": round(both.prod(2).prod(1).mean().item(), 4),
        "product_of_attributes": round(float(torch.tensor([*each.values()]).prod()), 4),
    }


def relation_accuracy(found, wanted, roll=0):
    """The share of the clips with a relation whose caption tells it; None where none has one."""
    of = wanted.relation[-roll:] + wanted.relation[:-roll] if roll else wanted.relation
    pairs_of = [(a, b) for a, b in zip(found.relation, of) if b]
    return round(sum(a == b for a, b in pairs_of) / len(pairs_of), 4) if pairs_of else None


# ---------------------------------------------------------------- what a model makes of clips


def sample_split(model, world, split, clips, has_text):
    """Runs the modes over clips 0 .. clips - 1 of a split: name -> captions or videos."""
    found = {}
    for first in range(0, clips, BATCH):
        indices = range(first, min(first + BATCH, clips))
        for name, values in sample_batch(model, world, split, indices, has_text).items():
            found.setdefault(name, []).extend(values)
    return found


def sample_batch(model, world, split, indices, has_text):
    batch = on_model(model, world.dataset(split).__getitems__(indices))
    generator = torch.Generator().manual_seed(world.seed * 1_000_003 + indices[0])
    y, c, options = batch["caption"] if has_text else None, batch["c"], world.sampling

    def decode(z_v):
        return list(world.codec.decode(z_v.cpu()))

    z_v = generate(model, y, c, world.shape, generator=generator, **options["generate"])
    found = {"drawn": decode(z_v), "frames": decode(batch["z_v"])}
    if has_text:
        read = partial(understand, model, batch["z_v"], generator=generator)
        found["read"] = world.tokenizer.decode(read(**options["understand"]).cpu())
        found["prompted"] = world.tokenizer.decode(read(c, **options["understand"]).cpu())
        z_v, y_hat = joint(model, c, world.shape, generator=generator, **options["joint"])
        found["joint"], found["joint_said"] = decode(z_v), world.tokenizer.decode(y_hat.cpu())
    return found


def compare(found, clips, level):
    """What each mode's answers are compared with: mode -> (answers, wanted), as Told; and all the
    relations that hold in what was drawn."""
    wanted = truth(clips)
    drawn, holds = shown(found["drawn"], level)
    compared = {"generation": (drawn, wanted)}
    if "read" in found:
        compared["understanding"] = said(found["read"], level), wanted
        compared["understanding_with_prompt"] = said(found["prompted"], level), wanted
        seen, _ = shown(found["joint"], level)
        compared["joint_agreement"] = said(found["joint_said"], level), seen
    return compared, holds


def measure(compared, holds, level):
    """What is right in what a model made of clips: mode -> measure -> number, and chance alike."""
    names, results, chance = names_of(level), {}, {}
    for mode, (a, b) in compared.items():
        results[mode], chance[mode] = score(a, b, names), score(a, b, names, roll=1)
        if level < 5 or mode == "joint_agreement":
            continue
        if mode == "generation":
            told = [(r, h) for r, h in zip(b.relation, holds) if r]
            share = sum(r in h for r, h in told) / len(told) if told else None
            results[mode]["relation"] = share and round(share, 4)
        else:
            results[mode]["relation"] = relation_accuracy(a, b)
            chance[mode]["relation"] = relation_accuracy(a, b, roll=1)
    return results, chance


def evaluate(model, world, out, clips, elapsed, has_text, share=in_turn):
    """Measures a model on `clips` clips of each split, and prints a table; see World.evaluate."""
    begin = time.time()
    jobs = [
        partial(job, model, world, split, clips, has_text)
        for split, _ in SPLITS
        for job in (sample_split, held_out_losses)
    ]
    jobs.append(partial(drift, model, world, clips))
    *done, by_tenth = share(jobs)
    if out is None:
        return Evaluation({})
    out, results = Path(out), {"seed": world.seed, "level": world.level, "clips": clips}
    results |= {"chance": {}, "loss": {}}
    gallery = []
    for split, suffix in SPLITS:
        found, losses, *done = done
        truths = world.dataset(split).clips(range(clips))
        compared, holds = compare(found, truths, world.level)
        measured, chance = measure(compared, holds, world.level)
        for mode, of in measured.items():
            results.setdefault(mode, {}).update({k + suffix: v for k, v in of.items()})
            into = results["chance"].setdefault(mode, {})
            into.update({k + suffix: v for k, v in chance[mode].items()})
        results["loss"][split] = losses
        if split == "seen":
            gallery = chosen(found, compared, truths, world.level)
            results["pictures"] = write_pictures(gallery, out)
    results["video_by_tenth"] = by_tenth
    results["train_s"] = round(elapsed, 1)
    results["wall_s"] = round(elapsed + time.time() - begin, 1)
    write_json(out / "results.json", results)
    print(table(results))
    return Evaluation(results, {"gallery": gallery})


def table(results):
    """The measures of each mode, seen and unseen, beside chance."""
    lines = [f"level {results['level']:<34}{'seen':>9}{'unseen':>9}{'chance':>9}"]
    for mode, of in results.items():
        if mode not in results["chance"]:
            continue
        for name in ("attribute_accuracy", "shape_right", "binding", "relation", "exact_match"):
            if name not in of:  # captions tell relations from level 5 on
                continue
            values = of[name], of.get(f"{name}_unseen"), results["chance"][mode].get(name)
            told = "".join(f"{'' if v is None else f'{v:.3f}':>9}" for v in values)
            lines.append(f"{mode + '.' + name:40}{told}")
    return "\n".join(lines)


def chosen(found, compared, clips, level, most=2):
    """The first clips that each mode got right, then the first that it got wrong, `most` of each,
    in the form of pages.write_report."""
    captions, prompts = pairs.detailed(clips, level), pairs.brief(clips)
    asked = captions if "read" in found else prompts
    modes = {
        "understand": ("understanding", "frames", ("the truth", captions), "read"),
        "generate": ("generation", "drawn", ("asked", asked), None),
        "joint": ("joint_agreement", "joint", ("asked", prompts), "joint_said"),
    }
    names, cases = names_of(level), []
    columns = [list(ATTRIBUTES).index(name) for name in names]
    for mode, (measured, videos, (what, texts), written) in modes.items():
        if measured not in compared:
            continue
        answers, wanted = compared[measured]
        good = right_in(answers, wanted.attributes)[..., columns]  # (n, 2, names)
        for right in (True, False):
            for i in (good.all(2).all(1) == right).nonzero().flatten().tolist()[:most]:
                lines = [(what, texts[i])]
                lines += [("the model wrote", found[written][i])] if written else []
                if not right:
                    bad = [name for name, of in zip(names, good[i].all(0).tolist()) if not of]
                    lines.append(("wrong", ", ".join(bad)))
                frames = found[videos][i]
                cases.append({"mode": mode, "right": right, "frames": frames, "lines": lines})
    return cases


def write_pictures(cases, out):
    """Writes samples.png and a GIF of each mode, its first case. Returns GIF -> its texts."""
    rows = []
    for case in cases:
        text = "\n".join(f"{name}: {said}" for name, said in case["lines"])
        rows.append((case["mode"], case["frames"], text))
    with atomic(out / "samples.png") as part:
        sheet(rows).save(part)
    pictures = {}
    for case in cases:
        name = f"{case['mode']}.gif"
        if name not in pictures:
            pictures[name] = dict(case["lines"]) | {"right": case["right"]}
            with atomic(out / name) as part:
                write_gif(part, to_pixels(case["frames"]), fps=8, zoom=6, hold_ms=800)
    return pictures
