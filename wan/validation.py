"""What training on real videos has come to: held-out losses, captions, and drawn videos."""

import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from engine.drift import losses_by_tenth, mean_by_tenth
from engine.files import write_text
from engine.video import write_video
from engine.world import Evaluation, in_turn
from univigu import generate, joint, understand, uni_flow_loss

from .published import latents_of

CAPTIONED = 2  # clips that the model describes


@torch.no_grad()
def evaluate(world, model, out, clips, elapsed, has_text, share=in_turn):
    """Losses of at most `clips` clips, captions of the first few, and a video of each drawing mode.

    The clips are of split "val", or of "train" where the data are too few to have one. A loss is
    the mean squared error of a velocity, at one draw of independent clocks a clip that is the same
    every time, no prompt dropped. elapsed: seconds of training before. Writes results.json,
    generate.mp4 and, with has_text, joint.mp4 into `out`, and prints the results. share, out None:
    see engine.world.World.
    """
    begin = time.time()
    device = next(model.parameters()).device
    split = "val" if len(world.dataset("val")) else "train"
    data = world.dataset(split)
    clips = min(clips, len(data))
    described = min(clips, CAPTIONED) if has_text else 0
    jobs = [partial(draw, world, model, data, mode, has_text) for mode in modes(has_text)]
    jobs += [partial(describe, world, model, data, i) for i in range(described)]
    jobs += [partial(measure, world, model, data, i, has_text) for i in range(clips)]
    jobs += [partial(drift, world, model, data, i) for i in range(clips)]
    # its cache would keep all of the model's products in bf16
    with torch.autocast(device.type, torch.bfloat16, device.type == "cuda", cache_enabled=False):
        done = share(jobs)
    if out is None:
        return Evaluation({})

    drawn = {mode: done.pop(0) for mode in modes(has_text)}
    captions = [done.pop(0) for _ in range(described)]
    measured, drifts = done[:clips], done[clips:]
    losses = {name: round(statistics.fmean(of[name] for of in measured), 6) for name in measured[0]}
    videos = {mode: world.codec.decode(z_v) for mode, (z_v, _) in drawn.items()}
    for mode, frames in videos.items():
        write_video(Path(out, f"{mode}.mp4"), frames, world.fps)
    results = {"seed": world.seed, "split": split, "clips": clips, "captions": captions}
    if has_text:
        results["joint"] = drawn["joint"][1]
    results["loss"] = {split: losses}
    results["video_by_tenth"] = mean_by_tenth([pair for of_clip in drifts for pair in of_clip])
    results["train_s"] = round(elapsed, 1)
    results["wall_s"] = round(elapsed + time.time() - begin, 1)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_text(Path(out, "results.json"), text + "\n")
    print(text)
    shown = [show_description(world, data, i, told) for i, told in enumerate(captions)]
    shown += show_drawings(world, data, videos, results.get("joint"))
    return Evaluation(results, {"gallery": shown})


def modes(has_text):
    """Those that draw."""
    return ("generate", "joint") if has_text else ("generate",)


def seeded(world, i=0):
    """The noise of sample number i, as sample.py --seed draws it."""
    return torch.Generator().manual_seed(world.seed + i)


def one_clip(data, index, model):
    """A batch of one clip, on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in data.__getitems__([index]).items()}


def measure(world, model, data, i, has_text):
    """Each loss of a clip, for each text that may be the target: name -> number."""
    batch, losses = one_clip(data, i, model), {}
    for target in world.texts if has_text else (None,):
        generator = torch.Generator().manual_seed(world.seed * 1_000_003 + i)
        y = batch[target] if target else None
        _, parts = uni_flow_loss(model, batch["z_v"], y, batch["c"], generator=generator)
        for name in ("video", "text", "anchor") if target else ("video",):
            losses[f"{name} ({target})" if target else name] = parts[name].item()
    return losses


def drift(world, model, data, i):
    """A clip's losses of the video alone, see engine.drift."""
    clip = one_clip(data, i, model)
    return losses_by_tenth(model, clip["z_v"], clip["c"], i, world.seed)


def describe(world, model, data, i):
    """What the model writes of a clip: "written", without a prompt, "with prompt", and "wanted",
    the clip's longest text.
    """
    batch, options = one_clip(data, i, model), world.options("understand", data[i]["z_v"].shape)
    if latents_of(model.config) == "raw":
        options["reuse_video"] = False  # published weights compute all
    y = [
        understand(model, batch["z_v"], c, generator=seeded(world, i), **options)
        for c in (None, batch["c"])
    ]
    texts = world.tokenizer.decode(torch.cat([*y, batch[world.texts[-1]]]).cpu())
    return dict(zip(("written", "with prompt", "wanted"), texts))


def draw(world, model, data, mode, has_text):
    """Draws the first clip's text in a mode: z_v (1, C, F, H, W) on the CPU, and the text that
    joint wrote, None for generate.
    """
    clip = one_clip(data, 0, model)
    shape = clip["z_v"].shape[1:]
    options = world.options(mode, shape) | {"generator": seeded(world)}
    options["c_null"] = world.c_null.to(clip["c"])
    if mode == "generate":
        y = clip[world.texts[-1]] if has_text else None
        options["keep_text"] = latents_of(model.config) == "raw"  # the published weights' way
        z_v = generate(model, y, clip["c"], shape, **options)
        return z_v.cpu(), None
    z_v, y_hat = joint(model, clip["c"], shape, **options)
    return z_v.cpu(), world.tokenizer.decode(y_hat.cpu())[0]


# ---------------------------------------------------------------- what a report shows


def show_description(world, data, i, told):
    z_v = data[i]["z_v"][None, :, :3]  # decoding all takes its time
    lines = [
        ("wanted", told["wanted"]),
        ("the model wrote", told["written"]),
        ("with the prompt", told["with prompt"]),
    ]
    frames = world.codec.decode(z_v)[0]
    return {"mode": "understand", "right": None, "frames": frames, "lines": lines}


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
