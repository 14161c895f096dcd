"""Uses a trained checkpoint: describes a video, draws a prompt, or does both at once.

    python sample.py understand --video clip.gif                       prints the caption
    python sample.py generate --prompt "a red circle moving right" --out circle.gif
    python sample.py joint --prompt "a red circle moving right" --out circle.gif

Videos, in and out: .gif, .mp4, .npy (frames, rows, columns, 3; uint8), or a folder of PNG frames.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from univigu import UniViGU, generate, joint, understand

FPS = 8
FORMATS = (".gif", ".mp4", ".npy", "")


# ---------------------------------------------------------------- video files

def read_video(path):
    """A video file or a folder of PNG frames -> frames (1, 3, T, H, W) float32 in [-1, 1].

    Raises ValueError on a file that is no video of a known kind, FileNotFoundError where there is none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"video {path} does not exist")
    if path.is_file() and path.suffix not in FORMATS[:3]:
        raise ValueError(f"video {path} ends in {path.suffix!r}, wanted .gif, .mp4, .npy or a folder of PNG frames")
    try:
        if path.is_dir():
            frames = [np.array(Image.open(f).convert("RGB")) for f in sorted(path.glob("*.png"))]
        elif path.suffix == ".npy":
            frames = np.load(path, allow_pickle=False)
        elif path.suffix == ".gif":
            with Image.open(path) as gif:
                frames = []
                for i in range(gif.n_frames):
                    gif.seek(i)
                    frames.append(np.array(gif.convert("RGB")))
        else:
            import av

            with av.open(str(path)) as file:
                frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        frames = np.asarray(frames)
    except Exception as error:  # each decoder has errors of its own
        raise ValueError(f"video {path} cannot be read: {error}") from None
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"video {path} holds {frames.dtype} of shape {frames.shape}, wanted uint8 (frames, rows, columns, 3)")
    return rearrange(torch.from_numpy(frames), "t h w rgb -> 1 rgb t h w").float() / 127.5 - 1


def check_out(path):
    """Raises ValueError where a video cannot be written, before it is made."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"--out {path} ends in {path.suffix!r}, wanted .gif, .mp4, .npy, or no ending for a folder of PNG frames")
    if not path.suffix and path.exists() and not (path.is_dir() and all(f.suffix == ".png" for f in path.iterdir())):
        raise ValueError(f"--out {path} exists and is not a folder of PNG frames")
    check_folder(path)


def check_folder(path):
    """Makes the folder of an output file; raises ValueError where nothing can be written there."""
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path}: {error}") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {path}: the folder {folder} cannot be written to")
    if Path(path).suffix and Path(path).is_dir():
        raise ValueError(f"--out {path} is a folder, wanted a file")


def write_video(path, frames):
    """frames (1, 3, T, H, W) in [-1, 1] -> a file of the kind its ending names, complete or not there at all."""
    path = Path(path)
    pixels = rearrange(frames[0], "rgb t h w -> t h w rgb").add(1).mul(127.5).round().clamp(0, 255).byte().numpy()
    part = path.with_name(f".part-{path.name}")
    if not path.suffix:
        part.mkdir(exist_ok=True)
        for i, frame in enumerate(pixels):
            Image.fromarray(frame).save(part / f"{i:04d}.png")
        shutil.rmtree(path, ignore_errors=True)
    elif path.suffix == ".npy":
        np.save(part, pixels)
    elif path.suffix == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        first.save(part, save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
    else:
        write_mp4(part, pixels)
    part.replace(path)


def write_mp4(path, pixels):
    """pixels (T, H, W, 3) uint8 -> H.264. Small frames keep full colour resolution: halved, their colours would run."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "8"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv444p" if min(pixels.shape[1:3]) < 128 else "yuv420p"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


# ---------------------------------------------------------------- the three modes

def load(folder):
    """A checkpoint folder -> the model and the world it was trained in. Raises ValueError where it is none."""
    folder = Path(folder)
    for name in ("model.safetensors", "config.json", "train.json"):
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} has no {name}: wanted a folder that train.py wrote, such as runs/toy/refine")
    try:
        model = UniViGU.from_pretrained(folder).eval()
        train = json.loads((folder / "train.json").read_text())
        data, stage = train["train"]["data"], train["stage"]
    except Exception as error:  # truncated or foreign files fail in many ways
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {error}") from None
    if data != "toy":
        raise ValueError(f"checkpoint {folder} was trained on {data!r}, wanted 'toy'")
    from toy import World

    return model, World(), stage


def run(flags):
    """One of the three modes, from flags to printed caption and written file."""
    model, world, stage = load(flags.checkpoint)
    if stage == "generator" and flags.mode != "generate":
        raise ValueError(f"checkpoint {flags.checkpoint} is of stage generator, which knows no text yet; wanted recall or refine")
    defaults = world.sampling[flags.mode]
    options = {name: defaults[name] if getattr(flags, name) is None else getattr(flags, name) for name in ("steps", "guidance")}
    options["generator"] = torch.Generator().manual_seed(flags.seed)
    if flags.mode == "understand":
        frames = read_video(flags.video)
        if frames.shape != (1, *world.frame_shape):
            (_, _, t, h, w), (_, t_, h_, w_) = frames.shape, world.frame_shape
            raise ValueError(f"video {flags.video} has {t} frames of {h}x{w}, wanted {t_} frames of {h_}x{w_}")
        caption = world.tokenizer.decode(understand(model, world.codec.encode(frames), **options))[0]
        if flags.out:
            check_folder(flags.out)
            Path(flags.out).write_text(caption + "\n")
        print(caption)
        return
    check_out(flags.out)
    c = world.prompt_encoder([flags.prompt])
    if flags.mode == "generate":
        y = None if stage == "generator" else world.tokenizer.encode([flags.caption or flags.prompt])
        z_v = generate(model, y, c, world.shape, **options)
    else:
        z_v, y_hat = joint(model, c, world.shape, **options)
        print(world.tokenizer.decode(y_hat)[0])
    write_video(flags.out, world.codec.decode(z_v))
    print(f"wrote {flags.out}", file=sys.stderr)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for mode, about in (("understand", "video -> caption"), ("generate", "prompt -> video"), ("joint", "prompt -> video and caption")):
        sub = modes.add_parser(mode, help=about, description=about, allow_abbrev=False)
        sub.add_argument("--checkpoint", default="runs/toy/refine", help="folder that train.py wrote (default: %(default)s)")
        if mode == "understand":
            sub.add_argument("--video", required=True, help="the video to describe")
            sub.add_argument("--out", default="", help="text file to write the caption to as well")
        else:
            sub.add_argument("--prompt", required=True, help='what to draw, for example "a red circle moving right"')
            sub.add_argument("--out", default=f"{mode}.gif", help="video file to write (default: %(default)s)")
        if mode == "generate":
            sub.add_argument("--caption", default="", help="detailed caption for the text stream (default: the prompt)")
        sub.add_argument("--steps", type=int, help="solver steps (default: the world's)")
        sub.add_argument("--guidance", type=float, help="1 = conditional, 0 = unconditional, above 1 = exaggerated (default: the world's)")
        sub.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    flags = parser.parse_args(argv)
    for name, low, high in (("steps", 1, 10000), ("guidance", -100, 100), ("seed", 0, 2**63 - 1)):
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} is {value}, wanted {low} to {high}")
    return flags


def main(argv=None):
    flags = parse(argv)
    try:
        run(flags)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: error: {error}")


if __name__ == "__main__":
    main()
