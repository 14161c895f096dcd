"""How well a model reads, draws and does both, on clips it never saw: numbers, and pictures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

# Not `from . import`, which would name toy/__init__.py, and that imports this file.
import toy.oracle as oracle
import toy.reference as reference
import toy.shapes as shapes
import toy.words as words
from engine.drift import losses_by_tenth, mean_by_tenth
from engine.files import atomic, write_json
from engine.video import to_pixels, write_gif
from engine.world import Evaluation, in_turn
from univigu import generate, joint, understand, uni_flow_loss

# How each mode samples unless told otherwise.
SAMPLING = {
    "understand": {"steps": 2, "guidance": 1.0, "reuse_video": True},
    "generate": {"steps": 8, "guidance": 2.0, "shift": 2.0},
    "joint": {"steps": 8, "guidance": 3.0, "shift": 3.0},
}
ALL = tuple(shapes.ATTRIBUTES)
BRIEF = shapes.COMBINED  # what a brief prompt asks for
BATCH = 128
SPLITS = (("seen", ""), ("unseen", "_unseen"))  # and what ends the names of its measures


# ---------------------------------------------------------------- what a model makes of clips


@dataclass
class Found:
    """What a model made of n clips. One that has not learned text leaves the last six empty."""

    truth: torch.Tensor  # (n, 7) int64, the clips' attributes
    prompts: list[str]
    wanted: list[str]  # their detailed captions
    drawn: Sequence[torch.Tensor]  # videos of generate(), (3, T, H, W) each
    frames: Sequence[torch.Tensor] = ()  # the clips after the codec, which understand() saw
    captions: Sequence[str] = ()  # what it wrote
    prompted: Sequence[str] = ()  # and with the prompt at hand
    drawn_briefly: Sequence[torch.Tensor] = ()  # as drawn, but the text, too, is the prompt
    joint_frames: Sequence[torch.Tensor] = ()
    joint_captions: Sequence[str] = ()

    @classmethod
    def join(cls, parts):
        """One Found of several, in their order."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        truth = torch.cat(columns.pop("truth"))
        return cls(truth, **{name: sum(map(list, found), []) for name, found in columns.items()})


def sample_split(model, world, split, clips, has_text):
    """Runs the modes over clips 0 .. clips - 1 of a split. Returns a Found."""
    firsts = range(0, clips, BATCH)
    indices = [range(first, min(first + BATCH, clips)) for first in firsts]
    dataset = world.dataset(split)
    return Found.join([sample_batch(model, world, dataset, part, has_text) for part in indices])


def sample_batch(model, world, dataset, indices, has_text):
    """Runs the modes over some clips of a dataset. Returns a Found."""
    batch, truth = on_model(model, dataset.__getitems__(indices)), dataset.clips(indices).attributes
    generator = torch.Generator().manual_seed(world.seed * 1_000_003 + indices[0])
    y, c = batch["caption"] if has_text else None, batch["c"]

    z_v = generate(model, y, c, world.shape, generator=generator, **world.sampling["generate"])
    drawn = world.codec.decode(z_v.cpu())
    found = Found(truth, words.brief(truth), words.detailed(truth), drawn)
    if has_text:
        options = world.sampling["understand"]
        y_hat = understand(model, batch["z_v"], generator=generator, **options)
        found.frames = world.codec.decode(batch["z_v"].cpu())
        found.captions = world.tokenizer.decode(y_hat.cpu())

        z_v, y_hat = joint(model, c, world.shape, generator=generator, **world.sampling["joint"])
        found.joint_frames = world.codec.decode(z_v.cpu())
        found.joint_captions = world.tokenizer.decode(y_hat.cpu())

        y_hat = understand(model, batch["z_v"], c, generator=generator, **options)
        found.prompted = world.tokenizer.decode(y_hat.cpu())

        options = world.sampling["generate"]
        z_v = generate(model, batch["prompt"], c, world.shape, generator=generator, **options)
        found.drawn_briefly = world.codec.decode(z_v.cpu())
    return found


@torch.no_grad()
def held_out_losses(model, world, split, clips, has_text):
    """Mean of every loss over clips 0 .. clips - 1 of a split.

    The clocks are independent, and they and the noise are the same at each call.
    """
    batch = on_model(model, world.dataset(split).__getitems__(range(clips)))
    losses = {}
    for target in ("prompt", "caption") if has_text else (None,):
        generator = torch.Generator().manual_seed(world.seed)
        y, suffix = (batch[target], f" ({target})") if target else (None, "")
        _, parts = uni_flow_loss(model, batch["z_v"], y, batch["c"], generator=generator)
        for name in ("video", "text", "anchor") if target else ("video",):
            losses[name + suffix] = round(parts[name].mean().item(), 6)
    return losses


def drift(model, world, clips):
    """The video's loss by tenth of the clock, of split seen; see engine.drift."""
    batch = on_model(model, world.dataset("seen").__getitems__(range(clips)))
    return mean_by_tenth(losses_by_tenth(model, batch["z_v"], batch["c"], 0, world.seed))


def on_model(model, batch):
    """A batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


# ---------------------------------------------------------------- how much of it is right


@dataclass
class Comparison:
    """Answers, what they should be, (n, 7) int64 each, and the attributes that count."""

    answers: torch.Tensor
    wanted: torch.Tensor
    names: tuple[str, ...]

    def accuracy(self, roll=0):
        """Mean over the attributes that count, and a dict of all; `roll` clips apart for chance."""
        return score(self.answers, self.wanted.roll(roll, 0), self.names)

    def exact(self, roll=0):
        """The share of clips of which all is right; `roll` clips apart, for chance."""
        right = (self.answers == self.wanted.roll(roll, 0)).all(1)
        return round(right.double().mean().item(), 4)


def said(texts, form=words.DETAILED):
    """B texts -> the attributes they state, (B, 7) int64, -1 where one states nothing valid."""
    rows = []
    for text in texts:
        stated = words.parse(text, form)
        rows.append([index_of(name, stated[name]) for name in ALL])
    return torch.tensor(rows)


def index_of(name, value):
    return -1 if value is None else shapes.ATTRIBUTES[name].index(value)


def score(found, wanted, names=ALL):
    """found, wanted (B, 7) int64 -> mean accuracy over `names`, and a dict with that of each."""
    right = dict(zip(ALL, (found == wanted).double().mean(0).tolist()))
    mean = sum(right[name] for name in names) / len(names)
    return round(mean, 4), {name: round(value, 4) for name, value in right.items()}


def compare(found):
    """What each measure of a mode compares: "mode.measure" -> Comparison."""
    drawn = oracle.read(torch.stack(list(found.drawn)))
    comparisons = {"generation.attribute_accuracy": Comparison(drawn, found.truth, BRIEF)}
    if found.captions:
        seen = oracle.read(torch.stack(list(found.joint_frames)))
        briefly = oracle.read(torch.stack(list(found.drawn_briefly)))
        comparisons |= {
            "understanding.attribute_accuracy": Comparison(said(found.captions), found.truth, ALL),
            "understanding.with_prompt": Comparison(said(found.prompted), found.truth, ALL),
            "generation.from_prompt": Comparison(briefly, found.truth, BRIEF),
            "joint.agreement": Comparison(said(found.joint_captions), seen, ALL),
            "joint.prompt_followed": Comparison(seen, found.truth, BRIEF),
        }
    return comparisons


def measure(comparisons, suffix, results):
    """Adds a split's figures to results: each mode's, and chance, which is that of other clips."""
    for key, comparison in comparisons.items():
        mode, name = key.split(".")
        of_mode = results.setdefault(mode, {})
        chance = results.setdefault("chance", {})
        of_mode[name + suffix], of_mode[f"{name}_each{suffix}"] = comparison.accuracy()
        chance.setdefault(mode, {})[name + suffix], _ = comparison.accuracy(roll=1)
    if captions := comparisons.get("understanding.attribute_accuracy"):
        results["understanding"]["exact_match" + suffix] = captions.exact()
        chance["understanding"]["exact_match" + suffix] = captions.exact(roll=1)


# ---------------------------------------------------------------- what a person sees


def figures(results):
    """The figures a line per measure, as dicts.

    name; seen, unseen: of unseen clips of combinations that were trained on, and of others; chance;
    each (attribute -> accuracy, seen); clips; for a model of text, reference: (mean, lowest) of the
    default run for "seen" and "unseen", see toy/reference.py.
    """
    measures = (
        ("understanding", "attribute_accuracy"),
        ("understanding", "exact_match"),
        ("understanding", "with_prompt"),
        ("generation", "attribute_accuracy"),
        ("generation", "from_prompt"),
        ("joint", "agreement"),
        ("joint", "prompt_followed"),
    )
    rows = []
    for mode, name in measures:
        if name not in results.get(mode, {}):
            continue
        row = {
            "name": f"{mode}.{name}",
            "seen": results[mode][name],
            "unseen": results[mode][name + "_unseen"],
            "chance": results["chance"][mode][name],
            "each": results[mode].get(f"{name}_each", {}),
            "clips": results["clips"],
        }
        if "understanding" in results:
            row["reference"] = {
                split: reference.band(mode, name + suffix, results["clips"])
                for split, suffix in SPLITS
            }
        rows.append(row)
    return rows


def table(results):
    """Those figures as text; a share that is below the reference's band has a mark."""
    rows = figures(results)
    heads = " ".join(f"{name:>10}" for name in ALL)
    lines = [f"{'':32}{'seen':>9}{'unseen':>9}{'reference':>15}{'chance':>8}   {heads}"]
    for row in rows:
        line, known = f"{row['name']:32}", row.get("reference", {})
        for split, _ in SPLITS:
            below = split in known and row[split] < known[split][1]
            line += f"{row[split]:8.3f}{'*' if below else ' '}"
        means = " / ".join(f"{known[split][0]:.3f}" for split, _ in SPLITS if known)
        each = " ".join(f"{value:10.3f}" for value in row["each"].values())
        lines.append(f"{line}{means:>15}{row['chance']:8.3f}   {each}")
    if any("reference" in row for row in rows):
        lines.append(
            "reference: the default run, mean of three seeds, seen / unseen; * below its band of "
            "two standard deviations"
        )
    return "\n".join(lines)


def confusion(answers, truth):
    """Attribute -> its values, and how often each (a row) was answered by which (a column).

    The last column counts the answers that were none of them.
    """
    counts = {}
    for i, (name, values) in enumerate(shapes.ATTRIBUTES.items()):
        k = len(values) + 1
        pairs = truth[:, i] * k + answers[:, i] % k  # -1, no answer, is the last of k
        counts[name] = values, torch.bincount(pairs, minlength=len(values) * k).view(-1, k)
    return counts


def gallery(found, comparisons, most=3):
    """The first clips that each mode got right, then the first that it got wrong, `most` of each.

    The form is that of pages.write_report.
    """
    videos = {"understand": found.frames, "generate": found.drawn, "joint": found.joint_frames}
    judged_by = {
        "understand": "understanding.attribute_accuracy",
        "generate": "generation.attribute_accuracy",
        "joint": "joint.agreement",
    }
    cases = []
    for mode, key in judged_by.items():
        if key not in comparisons:
            continue
        comparison = comparisons[key]
        columns = [ALL.index(name) for name in comparison.names]
        wrong = (comparison.answers != comparison.wanted)[:, columns]  # (n, names)
        for right in (True, False):
            for i in (wrong.any(1) != right).nonzero().flatten().tolist()[:most]:
                lines = describe(mode, found, comparison, i)
                if not right:
                    mistakes = [name for name, bad in zip(comparison.names, wrong[i]) if bad]
                    lines.append(("wrong", ", ".join(mistakes)))
                frames = videos[mode][i]
                cases.append({"mode": mode, "right": right, "frames": frames, "lines": lines})
    return cases


def describe(mode, found, comparison, i):
    """What there is to say of clip i in a mode: list of (name, text)."""
    if mode == "understand":
        return [("the truth", found.wanted[i]), ("the model wrote", found.captions[i])]
    if mode == "generate":
        (seen,) = words.detailed(comparison.answers[i : i + 1])
        return [
            ("asked", asked(found)[i]),
            ("the oracle sees", seen),
            ("what counts", ", ".join(BRIEF)),
        ]
    (seen,) = words.detailed(comparison.wanted[i : i + 1])
    return [
        ("asked", found.prompts[i]),
        ("the model wrote", found.joint_captions[i]),
        ("the oracle sees", seen),
    ]


def asked(found):
    """What generate() draws from: captions, or prompts where the model has not learned text."""
    return found.wanted if found.captions else found.prompts


def contact_sheet(found, clips=4, zoom=3):
    """Some clips, a mode under the other, and what was asked or said."""
    rows = []
    for i in range(min(clips, len(found.captions))):
        text = f"the model: {found.captions[i]}\nthe truth: {found.wanted[i]}"
        rows.append(("understand", found.frames[i], text))
    for i in range(min(clips, len(found.drawn))):
        rows.append(("generate", found.drawn[i], f"asked: {asked(found)[i]}\n"))
    for i in range(min(clips, len(found.joint_captions))):
        text = f"asked: {found.prompts[i]}\nwritten: {found.joint_captions[i]}"
        rows.append(("joint", found.joint_frames[i], text))

    return sheet(rows, zoom)


def sheet(rows, zoom=3):
    """A picture of (mode, frames, text) a row: every other frame, and beside it the text."""
    side, left, gap = rows[0][1].shape[-1] * zoom, 70, 4
    right = left + 5 * (side + gap)
    picture = Image.new("RGB", (right + 520, len(rows) * (side + 6) + 6), "white")
    draw = ImageDraw.Draw(picture)
    for row, (mode, frames, text) in enumerate(rows):
        top = 6 + row * (side + 6)
        draw.text((4, top + side // 2 - 6), mode, fill="black")
        for j, pixels in enumerate(to_pixels(frames[:, ::2])):
            enlarged = pixels.repeat(zoom, 0).repeat(zoom, 1)
            picture.paste(Image.fromarray(enlarged), (left + j * (side + gap), top))
        draw.text((right + 10, top + side // 2 - 16), text, fill="black")
    return picture


def write_pictures(found, out):
    """Writes samples.png and a GIF for each mode. Returns GIF -> the text that belongs to it."""
    with atomic(out / "samples.png") as part:
        contact_sheet(found).save(part)
    pictures = {"generate.gif": (found.drawn, found.wanted)}
    if found.captions:
        pictures["understand.gif"] = found.frames, found.captions
        pictures["joint.gif"] = found.joint_frames, found.joint_captions
    for name, (videos, _) in pictures.items():
        with atomic(out / name) as part:
            write_gif(part, to_pixels(videos[0]), fps=8, zoom=8, hold_ms=800)
    return {name: texts[0] for name, (_, texts) in pictures.items()}


def evaluate(model, world, out, clips, elapsed, has_text, share=in_turn):
    """Measures a model on `clips` clips of each split, and prints a table. Returns an Evaluation.

    Writes results.json, samples.png, GIFs and clip.npy into `out`. elapsed: seconds of training
    before; results["wall_s"] is the sum. has_text: the model has learned text, not video alone.
    share, out None: see engine.world.World.
    """
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

    out = Path(out)
    results = {"seed": world.seed, "clips": clips}
    shown = {}
    for split, suffix in SPLITS:
        found, losses, *done = done
        comparisons = compare(found)
        measure(comparisons, suffix, results)
        results.setdefault("loss", {})[split] = losses
        if split == "seen":
            results["pictures"] = write_pictures(found, out)
            shown["gallery"] = gallery(found, comparisons)
            if captions := comparisons.get("understanding.attribute_accuracy"):
                shown["confusion"] = confusion(captions.answers, captions.wanted)
    results["video_by_tenth"] = by_tenth
    shown["accuracy"] = figures(results)
    if has_text:
        shown["reference"] = reference.curves()

    clip = shapes.render(world.dataset("seen").clips([0]))[0]
    np.save(out / "clip.npy", to_pixels(clip))  # the clip of understand.gif, for sample.py to read
    results["train_s"] = round(elapsed, 1)
    results["wall_s"] = round(elapsed + time.time() - begin, 1)
    write_json(out / "results.json", results)
    print(table(results))
    minutes, training = results["wall_s"] / 60, results["train_s"] / 60
    print(
        f"{minutes:.1f} minutes in all, {training:.1f} of them training; "
        f"pictures: {out}/samples.png, {out}/*.gif"
    )
    return Evaluation(results, shown)
