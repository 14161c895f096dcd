"""How well a model reads, draws and does both, on clips it never saw: numbers, a table, and pictures to look at."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from univigu import generate, joint, understand, uni_flow_loss

from . import oracle, shapes, words

# How each mode samples unless told otherwise; sample.py uses the same. In joint() the text's clock runs ahead, and the video follows it: they
# agree more so than on the line that training walks (README, what differs).
SAMPLING = {"understand": dict(steps=16, guidance=1.0, reuse_video=True), "generate": dict(steps=12, guidance=3.0),
            "joint": dict(steps=24, guidance=3.0, text_shift=0.1)}
ALL = tuple(shapes.ATTRIBUTES)
BRIEF = ("colour", "shape", "direction")  # what a brief prompt asks for
BATCH = 128


def said(texts):
    """B captions -> the attributes they state, (B, 7) int64, -1 where one states nothing valid."""
    index = {name: {value: i for i, value in enumerate(values)} | {None: -1} for name, values in shapes.ATTRIBUTES.items()}
    return torch.tensor([[index[name][value] for name, value in words.parse(text).items()] for text in texts])


def score(found, wanted, names=ALL):
    """found, wanted (B, 7) int64 -> mean accuracy over `names`, and a dict with that of every attribute."""
    right = dict(zip(ALL, (found == wanted).double().mean(0).tolist()))
    return round(sum(right[name] for name in names) / len(names), 4), {name: round(value, 4) for name, value in right.items()}


def sample_split(model, world, split, clips, seed, has_text):
    """Runs the modes over clips 0 .. clips - 1 of a split; returns a dict of everything they gave, in order."""
    found, device = {}, next(model.parameters()).device

    def keep(**parts):
        for name, part in parts.items():
            found.setdefault(name, []).extend(part)

    dataset = world.dataset(split)
    for first in range(0, clips, BATCH):
        indices = range(first, min(first + BATCH, clips))
        batch, truth = {name: x.to(device) for name, x in dataset.__getitems__(indices).items()}, dataset.clips(indices).attributes
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        drawn = generate(model, batch["caption"] if has_text else None, batch["c"], world.shape, generator=generator, **SAMPLING["generate"])
        keep(truth=truth, prompts=words.brief(truth), wanted=words.detailed(truth), drawn=world.codec.decode(drawn.cpu()))
        if has_text:
            y_hat = understand(model, batch["z_v"], generator=generator, **SAMPLING["understand"])
            z_v, y_joint = joint(model, batch["c"], world.shape, generator=generator, **SAMPLING["joint"])
            keep(frames=world.codec.decode(batch["z_v"].cpu()), captions=world.tokenizer.decode(y_hat.cpu()),
                 joint_frames=world.codec.decode(z_v.cpu()), joint_captions=world.tokenizer.decode(y_joint.cpu()))
    return found


@torch.no_grad()
def held_out_losses(model, world, split, clips, seed, has_text):
    """Mean of every loss over clips 0 .. clips - 1 of a split, with independent clocks and always the same clocks and noise."""
    batch, losses = {name: x.to(next(model.parameters()).device) for name, x in world.dataset(split).__getitems__(range(clips)).items()}, {}
    for target in ("prompt", "caption") if has_text else (None,):
        _, parts = uni_flow_loss(model, batch["z_v"], batch.get(target), batch["c"], generator=torch.Generator().manual_seed(seed))
        for name in ("video", "text", "anchor") if target else ("video",):
            losses[f"{name} ({target})" if target else name] = round(parts[name].mean().item(), 6)
    return losses


def compare(found):
    """What each mode's measure compares: (answers (B, 7) int64, what they should be, the attributes that count)."""
    truth = torch.stack(found["truth"])
    pairs = {"generation.attribute_accuracy": (oracle.read(torch.stack(found["drawn"])), truth, BRIEF)}
    if "captions" in found:
        joint_frames = oracle.read(torch.stack(found["joint_frames"]))
        pairs |= {"understanding.attribute_accuracy": (said(found["captions"]), truth, ALL), "joint.agreement": (said(found["joint_captions"]), joint_frames, ALL),
                  "joint.prompt_followed": (joint_frames, truth, BRIEF)}
    return pairs


def measure(pairs, suffix, results):
    """Adds a split's figures to results: each mode's accuracy, and the chance level: the same answers held against another clip."""
    for key, (a, b, names) in pairs.items():
        mode, name = key.split(".")
        results.setdefault(mode, {})[name + suffix], results[mode][f"{name}_each{suffix}"] = score(a, b, names)
        results.setdefault("chance", {}).setdefault(mode, {})[name + suffix] = score(a, b.roll(1, 0), names)[0]
    if "understanding" in results:
        captions, truth, _ = pairs["understanding.attribute_accuracy"]
        results["understanding"]["exact_match" + suffix] = round((captions == truth).all(1).double().mean().item(), 4)
        results["chance"]["understanding"]["exact_match" + suffix] = round((captions == truth.roll(1, 0)).all(1).double().mean().item(), 4)


# ---------------------------------------------------------------- what a person sees

def figures(results):
    """The figures a line per mode, as dicts of name, seen, unseen, chance, each (attribute -> accuracy, seen) and clips; "seen" are unseen clips of
    seen combinations, "unseen" those of combinations never trained on."""
    measures = (("understanding", "attribute_accuracy"), ("understanding", "exact_match"), ("generation", "attribute_accuracy"),
                ("joint", "agreement"), ("joint", "prompt_followed"))
    return [dict(name=f"{mode}.{name}", seen=results[mode][name], unseen=results[mode][name + "_unseen"], chance=results["chance"][mode][name],
                 each=results[mode].get(f"{name}_each", {}), clips=results["clips"]) for mode, name in measures if mode in results]


def table(results):
    """Those figures as text."""
    lines = [f"{'':32}{'seen':>8}{'unseen':>8}{'chance':>8}   " + " ".join(f"{name:>10}" for name in ALL)]
    for row in figures(results):
        lines.append(f"{row['name']:32}{row['seen']:8.3f}{row['unseen']:8.3f}{row['chance']:8.3f}   " + " ".join(f"{value:10.3f}" for value in row["each"].values()))
    return "\n".join(lines)


def confusion(answers, truth):
    """Attribute -> its values, and how often each (a row) was answered by which (a column; the last one: by none of them)."""
    counts = {}
    for i, (name, values) in enumerate(shapes.ATTRIBUTES.items()):
        k = len(values) + 1
        counts[name] = values, torch.bincount(truth[:, i] * k + answers[:, i] % k, minlength=len(values) * k).view(-1, k)
    return counts


def gallery(found, pairs, most=3):
    """Of each mode, the first clips that it got right and the first that it got wrong, `most` of each, as pages.write_report wants them."""
    sees = lambda attributes: ("the oracle sees", lambda i: words.detailed(attributes[i:i + 1])[0])
    text = lambda name, key: (name, lambda i: found[key][i])
    modes = {"generate": ("generation.attribute_accuracy", "drawn", [text("asked", "wanted" if "captions" in found else "prompts")])}
    if "captions" in found:
        modes = {"understand": ("understanding.attribute_accuracy", "frames", [text("the truth", "wanted"), text("the model wrote", "captions")]), **modes,
                 "joint": ("joint.agreement", "joint_frames", [text("asked", "prompts"), text("the model wrote", "joint_captions")])}
    entries = []
    for mode, (key, video, lines) in modes.items():
        answers, wanted, names = pairs[key]
        columns = [ALL.index(name) for name in names]
        wrong = (answers != wanted)[:, columns]
        lines = lines + {"generate": [sees(answers), ("what counts", lambda i: ", ".join(BRIEF))], "joint": [sees(wanted)]}.get(mode, [])
        for right in (True, False):
            for i in (wrong.any(1) != right).nonzero().flatten().tolist()[:most]:
                mistakes = ", ".join(names[k] for k in wrong[i].nonzero().flatten().tolist())
                said_of = [(name, get(i)) for name, get in lines] + ([] if right else [("wrong", mistakes)])
                entries.append(dict(mode=mode, right=right, frames=found[video][i], lines=said_of))
    return entries


def to_pixels(frames):
    """(3, ..., H, W) in [-1, 1] -> (..., H, W, 3) uint8."""
    return rearrange(frames, "rgb ... h w -> ... h w rgb").add(1).mul(127.5).round().clamp(0, 255).byte().numpy()


def to_image(frame, zoom):
    """One frame (3, H, W) in [-1, 1] -> a PIL image, each pixel zoom x zoom."""
    pixels = to_pixels(frame)
    return Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), Image.NEAREST)


def contact_sheet(found, rows=4, zoom=3):
    """Rows of clips, a mode under the other: every other frame, and what was asked or said."""
    entries = []
    for i in range(min(rows, len(found["drawn"]))):
        if "captions" in found:
            entries.append((0, "understand", found["frames"][i], f"the model: {found['captions'][i]}", f"the truth: {found['wanted'][i]}"))
            entries.append((2, "joint", found["joint_frames"][i], f"asked: {found['prompts'][i]}", f"written: {found['joint_captions'][i]}"))
        entries.append((1, "generate", found["drawn"][i], f"asked: {found['wanted'][i] if 'captions' in found else found['prompts'][i]}", ""))
    side = shapes.H * zoom
    sheet = Image.new("RGB", (70 + 5 * (side + 4) + 520, len(entries) * (side + 6) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (_, mode, frames, above, below) in enumerate(sorted(entries, key=lambda entry: entry[0])):
        top = 6 + row * (side + 6)
        draw.text((4, top + side // 2 - 6), mode, fill="black")
        for j in range(5):
            sheet.paste(to_image(frames[:, 2 * j], zoom), (70 + j * (side + 4), top))
        draw.text((80 + 5 * (side + 4), top + side // 2 - 16), f"{above}\n{below}", fill="black")
    return sheet


def write_gif(path, frames, zoom=8, fps=8):
    """frames (3, T, H, W) in [-1, 1] -> an enlarged GIF that repeats, holding its last frame for a moment."""
    first, *rest = [to_image(frame, zoom) for frame in frames.unbind(1)]
    first.save(path, save_all=True, append_images=rest, duration=[1000 // fps] * len(rest) + [800], loop=0)


def evaluate(model, world, out, clips, seed, elapsed, has_text):
    """Measures a model on `clips` clips of each split; prints the table, writes results.json, samples.png and GIFs into `out`.

    elapsed: seconds of training before; results["wall_s"] is the sum. world.shown then holds what a report shows beside. Returns results.
    """
    begin, out, results = time.time(), Path(out), {"seed": seed, "clips": clips}
    for split, suffix in (("seen", ""), ("unseen", "_unseen")):
        found = sample_split(model, world, split, clips, seed, has_text)
        pairs = compare(found)
        measure(pairs, suffix, results)
        results.setdefault("loss", {})[split] = held_out_losses(model, world, split, clips, seed, has_text)
        if split == "seen":
            contact_sheet(found).save(out / "samples.png")
            gifs = {"generate": ("drawn", "wanted")} | ({"understand": ("frames", "captions"), "joint": ("joint_frames", "joint_captions")} if has_text else {})
            for mode, (video, text) in gifs.items():
                write_gif(out / f"{mode}.gif", found[video][0])
                results.setdefault("pictures", {})[f"{mode}.gif"] = found[text][0]
            clip = shapes.render(world.dataset("seen").clips([0]))[0]
            np.save(out / "clip.npy", to_pixels(clip))              # the clip of understand.gif at its own size, for sample.py to read
            world.shown = {"gallery": gallery(found, pairs)} | ({"confusion": confusion(*pairs["understanding.attribute_accuracy"][:2])} if has_text else {})
    world.shown["accuracy"] = figures(results)
    results["train_s"], results["wall_s"] = round(elapsed, 1), round(elapsed + time.time() - begin, 1)
    (out / "results.json.part").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.json.part").replace(out / "results.json")
    print(table(results))
    print(f"{results['wall_s'] / 60:.1f} minutes in all, {results['train_s'] / 60:.1f} of them training; pictures: {out}/samples.png, {out}/*.gif")
    return results
