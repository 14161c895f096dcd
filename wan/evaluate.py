"""What training on real videos has come to: held-out losses, captions, and drawn videos."""

import json
import time
from pathlib import Path

import torch

from engine.files import write_text
from engine.video import write_video
from engine.world import Evaluation
from univigu import generate, joint, understand, uni_flow_loss

CAPTIONED = 2  # clips that the model describes


@torch.no_grad()
def evaluate(world, model, out, clips, elapsed, has_text):
    """Losses of at most `clips` clips, captions of the first few, and a video of each drawing mode.

    The clips are of split "val", or of "train" where the data are too few to have one. A loss is
    the mean squared error of a velocity, at one draw of independent clocks a clip that is the same
    every time, no prompt dropped. elapsed: seconds of training before. Writes results.json,
    generate.mp4 and, with has_text, joint.mp4 into `out`, and prints the results.
    """
    begin = time.time()
    device = next(model.parameters()).device
    split = "val" if len(world.dataset("val")) else "train"
    data, out = world.dataset(split), Path(out)
    clips = min(clips, len(data))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        losses = measure(world, model, data, clips, has_text)
        described = describe(world, model, data, min(clips, CAPTIONED)) if has_text else []
        drawn, written = draw(world, model, data, has_text)
    for mode, frames in drawn.items():
        write_video(out / f"{mode}.mp4", frames, world.fps)

    told = ("written", "with prompt", "wanted")
    captions = [{name: row[name] for name in told} for row in described]
    results = {"seed": world.seed, "split": split, "clips": clips, "captions": captions}
    if has_text:
        results["joint"] = written
    results["loss"] = {split: losses}
    results["train_s"] = round(elapsed, 1)
    results["wall_s"] = round(elapsed + time.time() - begin, 1)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_text(out / "results.json", text + "\n")
    print(text)
    shown = [*map(show_description, described), *show_drawings(world, data, drawn, written)]
    return Evaluation(results, {"gallery": shown})


def seeded(world):
    return torch.Generator().manual_seed(world.seed)


def one_clip(data, index, model):
    """A batch of one clip, on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in data.__getitems__([index]).items()}


def measure(world, model, data, clips, has_text):
    """The mean of each loss over the first clips, for each text that may be the target."""
    losses = {}
    for i in range(clips):
        batch = one_clip(data, i, model)
        for target in world.texts if has_text else (None,):
            generator = torch.Generator().manual_seed(world.seed * 1_000_003 + i)
            y = batch[target] if target else None
            _, parts = uni_flow_loss(model, batch["z_v"], y, batch["c"], generator=generator)
            for name in ("video", "text", "anchor") if target else ("video",):
                label = f"{name} ({target})" if target else name
                losses.setdefault(label, []).append(parts[name].item())
    return {label: round(sum(values) / len(values), 6) for label, values in losses.items()}


def describe(world, model, data, clips):
    """What the model writes of the first clips.

    Dicts of "written", without a prompt, "with prompt", "wanted", the clip's longest text, and
    "frames".
    """
    found, options = [], world.sampling["understand"]
    for i in range(clips):
        batch = one_clip(data, i, model)
        y = [
            understand(model, batch["z_v"], c, generator=seeded(world), **options)
            for c in (None, batch["c"])
        ]
        texts = world.tokenizer.decode(torch.cat([*y, batch[world.texts[-1]]]).cpu())
        frames = world.codec.decode(batch["z_v"][:, :, :3].cpu())[0]  # decoding all takes its time
        row = dict(zip(("written", "with prompt", "wanted"), texts))
        found.append(row | {"frames": frames})
    return found


def draw(world, model, data, has_text):
    """Draws the first clip's text in each mode.

    Returns mode -> frames (1, 3, T, H, W), and the text that joint wrote, None without text.
    """
    clip = one_clip(data, 0, model)
    shape = clip["z_v"].shape[1:]
    y = clip[world.texts[-1]] if has_text else None
    options = world.sampling["generate"]
    drawn = {"generate": generate(model, y, clip["c"], shape, generator=seeded(world), **options)}
    written = None
    if has_text:
        options = world.sampling["joint"]
        z_v, y_hat = joint(model, clip["c"], shape, generator=seeded(world), **options)
        drawn["joint"], (written,) = z_v, world.tokenizer.decode(y_hat.cpu())
    return {mode: world.codec.decode(z_v.cpu()) for mode, z_v in drawn.items()}, written


# ---------------------------------------------------------------- what a report shows


def show_description(told):
    lines = [
        ("wanted", told["wanted"]),
        ("the model wrote", told["written"]),
        ("with the prompt", told["with prompt"]),
    ]
    return {"mode": "understand", "right": None, "frames": told["frames"], "lines": lines}


def show_drawings(world, data, drawn, written):
    """What each mode was asked, what it drew, and what joint wrote."""
    clip, has_text = data[0], written is not None
    found = []
    for mode, frames in drawn.items():
        asked = clip[world.texts[-1] if has_text and mode == "generate" else "prompt"]
        lines = [("asked", *world.tokenizer.decode(asked[None]))]
        if mode == "joint":
            lines.append(("the model wrote", written))
        found.append({"mode": mode, "right": None, "frames": frames[0], "lines": lines})
    return found
