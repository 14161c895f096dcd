"""Uses a trained checkpoint: describes a video, draws a prompt, or does both at once.

    python sample.py understand --video clip.gif                       prints the caption
    python sample.py generate --prompt "a red circle moving right" --out circle.gif
    python sample.py joint --prompt "a red circle moving right" --out circle.gif

Videos, in and out: .gif, .mp4, .npy (frames, rows, columns, 3; uint8), or a folder of PNG frames.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import GifImagePlugin, Image

from univigu import UniViGU, generate, joint, understand

FPS = 8
FORMATS = (".gif", ".mp4", ".npy", "")


# ---------------------------------------------------------------- video files

def read_video(path, shape=None):
    """A video file or a folder of PNG frames -> frames (1, 3, T, H, W) float32 in [-1, 1].

    shape: the (T, H, W) to insist on; reading stops at the first frame that does not fit. Raises ValueError on a file that is no
    video of a known kind or has another shape, FileNotFoundError where there is none.
    """
    path, frames = Path(path), []
    if not path.exists():
        raise FileNotFoundError(f"video {path} does not exist")
    if path.is_file() and path.suffix not in FORMATS[:3]:
        raise ValueError(f"video {path} ends in {path.suffix!r}, wanted .gif, .mp4, .npy or a folder of PNG frames")
    t, *size = shape or (None, None, None)
    try:
        for frame in decode(path):
            frames.append(frame)
            size = size if size[0] else frame.shape[:2]
            if frame.shape[:2] != tuple(size):
                raise ValueError(f"frame {len(frames)} is {frame.shape[0]}x{frame.shape[1]}, wanted {size[0]}x{size[1]}")
            if t and len(frames) > t:
                raise ValueError(f"more than {t} frames, wanted {t}")
    except Exception as error:  # each decoder has errors of its own
        raise ValueError(f"video {path} cannot be read: {one_line(error)}") from None
    if len(frames) != (t or len(frames)) or not frames:
        raise ValueError(f"video {path} has {len(frames)} frames, wanted {t or 'at least 1'}")
    return rearrange(torch.from_numpy(np.stack(frames)), "t h w rgb -> 1 rgb t h w").float() / 127.5 - 1


def decode(path):
    """The frames of a video, one after the other: (H, W, 3) uint8."""
    if path.is_dir():
        number = lambda f: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", f.name)]     # 2.png before 10.png
        for f in sorted(path.glob("*.png"), key=number):
            with Image.open(f, formats=["PNG"]) as image:
                yield np.array(image.convert("RGB"))
    elif path.suffix == ".npy":
        frames = np.load(path, allow_pickle=False)
        if getattr(frames, "ndim", 0) != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            found = f"{frames.dtype} of shape {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ValueError(f"holds {found}, wanted uint8 (frames, rows, columns, 3)")
        yield from frames
    elif path.suffix == ".gif":
        with Image.open(path, formats=["GIF"]) as gif:
            for i in range(gif.n_frames):
                gif.seek(i)
                yield np.array(gif.convert("RGB"))
    else:
        import av

        with av.open(str(path)) as file:
            if not file.streams.video:
                raise ValueError("it has no pictures")
            for frame in file.decode(video=0):
                yield frame.to_ndarray(format="rgb24")


def one_line(error):
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def check_out(path):
    """Raises ValueError where a video cannot be written, before it is made."""
    path = Path(path)
    if path.suffix not in FORMATS or not path.name:
        raise ValueError(f"--out is {str(path)!r}, wanted a name that ends in .gif, .mp4 or .npy, or has no ending, for a folder of PNG frames")
    if not path.suffix and path.exists() and not (path.is_dir() and all(f.suffix == ".png" for f in path.iterdir())):
        raise ValueError(f"--out {path} exists and is not a folder of PNG frames")
    if path.suffix and path.is_dir():
        raise ValueError(f"--out {path} is a folder, wanted a file")
    check_folder(path)


def check_folder(path):
    """Raises ValueError where an output file cannot be written; makes nothing yet."""
    path = Path(path).absolute()
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path}: {folder} is {'a folder without write permission' if folder.is_dir() else 'no folder'}")


def write_video(path, frames):
    """frames (1, 3, T, H, W) in [-1, 1] -> a file of the kind its ending names, complete or not there at all."""
    path = Path(path)
    pixels = rearrange(frames[0], "rgb t h w -> t h w rgb").add(1).mul(127.5).round().clamp(0, 255).byte().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    remove(part)
    try:
        if not path.suffix:
            part.mkdir()
            for i, frame in enumerate(pixels):
                Image.fromarray(frame).save(part / f"{i:04d}.png")
            remove(path)
        elif path.suffix == ".npy":
            np.save(part, pixels)
        else:
            {".gif": write_gif, ".mp4": write_mp4}[path.suffix](part, pixels)
        part.replace(path)
    finally:
        remove(part)


def remove(path):
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_gif(path, pixels):
    """pixels (T, H, W, 3) uint8 -> a GIF that repeats. Frame by frame: Pillow's save would merge frames that look alike."""
    images = [Image.fromarray(frame).quantize(256) for frame in pixels]
    with open(path, "wb") as file:
        file.writelines(GifImagePlugin.getheader(images[0].copy(), info={"loop": 0})[0])
        for image in images:
            file.writelines(GifImagePlugin.getdata(image, duration=1000 // FPS, include_color_table=True))
        file.write(b";")


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
        with contextlib.redirect_stdout(sys.stderr):                # the hub's messages are no part of a caption
            model = UniViGU.from_pretrained(folder, strict=True).eval()
        train = json.loads((folder / "train.json").read_text())
        data, stage = train["train"]["data"], train["stage"]
    except Exception as error:  # truncated or foreign files fail in many ways
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {one_line(error)}") from None
    if data != "toy":
        raise ValueError(f"checkpoint {folder} was trained on {data!r}, wanted 'toy'")
    from toy import World

    world, c = World(), model.config
    found, wanted = (c.in_dim, c.vocab_size, c.text_len, c.prompt_dim), (world.shape[0], len(world.tokenizer), world.text_len, world.prompt_encoder.width)
    if found != wanted:
        raise ValueError(f"checkpoint {folder} has in_dim, vocab_size, text_len, prompt_dim {found}, but its data {data!r} has {wanted}")
    return model, world, stage


def run(flags):
    """One of the three modes, from flags to printed caption and written file."""
    model, world, stage = load(flags.checkpoint)
    if stage == "generator" and flags.mode != "generate":
        raise ValueError(f"checkpoint {flags.checkpoint} is of stage generator, which knows no text yet; wanted recall or refine")
    defaults = world.sampling[flags.mode]
    options = {name: defaults[name] if getattr(flags, name) is None else getattr(flags, name) for name in ("steps", "guidance")}
    options["generator"] = torch.Generator().manual_seed(flags.seed)
    if flags.mode == "understand":
        if flags.out and Path(flags.out).is_dir():
            raise ValueError(f"--out {flags.out} is a folder, wanted a text file")
        check_folder(flags.out)
        z_v = world.codec.encode(read_video(flags.video, world.frame_shape[1:]))
        caption = world.tokenizer.decode(understand(model, z_v, **options))[0]
        if flags.out:
            Path(flags.out).absolute().parent.mkdir(parents=True, exist_ok=True)
            Path(flags.out).write_text(caption + "\n")
        print(caption)
        return
    check_out(flags.out)
    c = world.prompt_encoder([flags.prompt])
    if flags.mode == "generate":
        z_v = generate(model, caption_tokens(flags, world, stage), c, world.shape, **options)
    else:
        z_v, y_hat = joint(model, c, world.shape, **options)
        print(world.tokenizer.decode(y_hat)[0])
    write_video(flags.out, world.codec.decode(z_v))
    print(f"wrote {flags.out}", file=sys.stderr)


def caption_tokens(flags, world, stage):
    """The text stream of `generate`: the caption, else the prompt; None for stage generator, which has no text."""
    if stage == "generator":
        if flags.caption:
            raise ValueError(f"--caption: checkpoint {flags.checkpoint} is of stage generator, which knows no text; wanted recall or refine")
        return None
    text = flags.caption or flags.prompt
    if not text.split():
        raise ValueError("--prompt is empty: wanted words there or in --caption")
    return world.tokenizer.encode([text])


def parse(argv):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    usage = "%(prog)s [--flag value ...]      --help lists the flags"
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for mode, about in (("understand", "video -> caption"), ("generate", "prompt -> video"), ("joint", "prompt -> video and caption")):
        sub = modes.add_parser(mode, help=about, description=about, usage=usage, allow_abbrev=False)
        sub.add_argument("--checkpoint", default="runs/toy/refine", help="folder that train.py wrote (default: %(default)s)")
        if mode == "understand":
            sub.add_argument("--video", required=True, help="the video to describe")
            sub.add_argument("--out", default="", help="text file to write the caption to as well")
        else:
            sub.add_argument("--prompt", required=True, help='what to draw, for example "a red circle moving right"; '
                             + ("empty: --caption alone says it" if mode == "generate" else "empty: anything"))
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
            parser.exit(2, f"sample.py: error: --{name} is {value}, wanted {low} to {high}\n")
    return flags


def main(argv=None):
    flags = parse(argv)
    try:
        run(flags)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: error: {one_line(error)}")


if __name__ == "__main__":
    main()
