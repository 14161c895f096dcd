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
from .pairs import ATTRIBUTES, RELATIONS

COLOUR = list(ATTRIBUTES).index("colour")
BOUND = [list(ATTRIBUTES).index(name) for name in ("colour", "shape", "direction")]
MEASURES = (
    *("attribute_accuracy", "shape_right", "binding", "binding_by_product", "relation"),
    "exact_match",
)


@dataclass
class Told:
    """Two shapes of n clips, and what relates them: of captions, videos, or the truth.

    A relation is (index of RELATIONS, colour of the one, colour of the other).
    """

    attributes: torch.Tensor  # (n, 2, 6) int64, -1 where nothing valid is said
    relation: list  # the one that a caption tells, or None
    holds: list | None = None  # a set of all that are true, None where not sure; captions: no list

    def roll(self, by):
        """The same, `by` clips later."""
        moved = [of and of[-by:] + of[:-by] for of in (self.relation, self.holds)]
        return Told(self.attributes.roll(by, 0), *moved)


def names_of(level):
    """The attributes that a caption tells at a level."""
    names = [name for name in ATTRIBUTES if level >= 3 or name not in ("size", "speed")]
    return [name for name in names if level == 6 or name != "event"]


def truth(clips):
    """The Told of pairs.Clips: what their captions say, and all that holds."""
    colours = [[shape["colour"] for shape in both] for both in pairs.named(clips)]
    relations = [
        (relation, *both) if relation >= 0 else None
        for relation, both in zip(clips.relation.tolist(), colours)
    ]
    paths = pairs.paths(clips.attributes.numpy(), clips.start.numpy())
    holds = []
    for row, path, start, front in zip(clips.attributes, paths, clips.start, clips.front.tolist()):
        meets = pairs.overlap(row.tolist(), path) > pairs.COVERED
        holds.append(true_relations(row, start, front if meets else -1))
    return Told(clips.attributes, relations, holds)


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
    """The Told of videos (3, T, H, W) each, by the oracle."""
    attributes, holds = [], []
    for part in torch.stack(list(videos)).split(32):
        seen = pairs_oracle.read(part, level == 6)
        attributes.append(seen.attributes)
        for row, start, front in zip(seen.attributes, seen.start, seen.front.tolist()):
            holds.append(true_relations(row, start, front))
    return Told(torch.cat(attributes), [None] * len(holds), holds)


def true_relations(row, start, front):
    """All relations that hold, of either shape to the other; None where a shape is not known.

    row (2, 6), start (2, 2); front: the shape in front where they meet, else -1.
    """
    if (row < 0).any():
        return None
    colours = [ATTRIBUTES["colour"][i] for i in row[:, COLOUR].tolist()]
    found = set()
    for one, other in ((0, 1), (1, 0)):
        rows, starts = row[[one, other]].numpy(), start[[one, other]].numpy()
        in_front = None if front < 0 else int(front != one)
        for k in pairs.relations(rows, starts, in_front):
            found.add((k, colours[one], colours[other]))
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


def relation_right(found, wanted):
    """Where a caption tells a relation that holds, or none where none holds of the shape that it
    names first: (n,) bool. What it says of a shape that is not there is wrong. Videos that were
    drawn are found, and held against their captions.
    """
    caption, facts = (found, wanted) if found.holds is None else (wanted, found)
    named, there = (of.attributes[..., COLOUR].tolist() for of in (caption, facts))
    right = []
    for colours, others, relation, holds in zip(named, there, caption.relation, facts.holds):
        first, second = (ATTRIBUTES["colour"][i] for i in colours)
        told = {relation} if relation else {(k, first, second) for k in range(len(RELATIONS))}
        known = holds is not None and set(colours) == set(others)
        right.append(known and bool(told & holds) == bool(relation))
    return torch.tensor(right)


def all_right(found, wanted, level):
    """Where all that a level tells is right: (n,) bool."""
    columns = [list(ATTRIBUTES).index(name) for name in names_of(level)]
    right = right_in(found, wanted.attributes)[..., columns].flatten(1).all(1)
    return right & relation_right(found, wanted) if level >= 5 else right


def score(found, wanted, level):
    """Shares that are right at a level: name -> number. found, wanted: Told."""
    right = right_in(found, wanted.attributes).double()  # (n, 2, 6)
    names = names_of(level)
    columns = [list(ATTRIBUTES).index(name) for name in names]
    both, bound = right[..., columns], right[..., BOUND].prod(2)
    each = {name: share(right[..., k]) for name, k in zip(names, columns)}
    relation = {"relation": share(relation_right(found, wanted))} if level >= 5 else {}
    return {
        "attribute_accuracy": share(both),
        "attribute_accuracy_each": each,
        "shape_right": share(both.prod(2)),
        "binding": share(bound.prod(1)),
        "binding_by_product": by_product(right[..., BOUND]),
        **relation,
        "exact_match": share(all_right(found, wanted, level)),
    }


def by_product(right):
    """What binding would be, were the attributes of both shapes right independently.

    right (n, 2, 3): colour, shape, direction. Without the right colour all of a shape counts as
    wrong, so the others are taken among the shapes whose colour is right.
    """
    colour, shape, direction = right.double().mean(0).T  # (2,) each
    both = colour * (shape / colour) * (direction / colour)
    return round(both.nan_to_num().prod().item(), 4)


def share(right):
    return round(right.double().mean().item(), 4)


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
    """What each mode's answers are compared with: mode -> (answers, wanted), as Told."""
    wanted = truth(clips)
    compared = {"generation": (shown(found["drawn"], level), wanted)}
    if "read" in found:
        compared["understanding"] = said(found["read"], level), wanted
        compared["understanding_with_prompt"] = said(found["prompted"], level), wanted
        seen = shown(found["joint"], level)
        compared["joint_agreement"] = said(found["joint_said"], level), seen
    return compared


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
        compared = compare(found, truths, world.level)
        for mode, (answers, wanted) in compared.items():
            for into, against in ((results, wanted), (results["chance"], wanted.roll(1))):
                of = score(answers, against, world.level)
                into.setdefault(mode, {}).update({k + suffix: v for k, v in of.items()})
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
    lines = [f"level {results['level']:<38}{'seen':>9}{'unseen':>9}{'chance':>9}"]
    for mode, of in results.items():
        if mode not in results["chance"]:
            continue
        for name in MEASURES:
            if name not in of:  # captions tell relations from level 5 on
                continue
            values = of[name], of.get(f"{name}_unseen"), results["chance"][mode].get(name)
            told = "".join(f"{'' if v is None else f'{v:.3f}':>9}" for v in values)
            lines.append(f"{mode + '.' + name:44}{told}")
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
    cases = []
    for mode, (measured, videos, (what, texts), written) in modes.items():
        if measured not in compared:
            continue
        answers, wanted = compared[measured]
        good, each = all_right(answers, wanted, level), right_in(answers, wanted.attributes)
        for right in (True, False):
            for i in (good == right).nonzero().flatten().tolist()[:most]:
                lines = [(what, texts[i])]
                lines += [("the model wrote", found[written][i])] if written else []
                if not right:
                    of = dict(zip(ATTRIBUTES, each[i].all(0).tolist()))
                    bad = [name for name in names_of(level) if not of[name]]
                    lines.append(("wrong", ", ".join(bad or ["relation"])))
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
