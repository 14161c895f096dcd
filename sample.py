"""Uses a trained checkpoint: describes a video, draws a prompt, or does both at once.

    python sample.py understand --video clip.gif                       prints the caption
    python sample.py generate --prompt "a red circle moving right" --out circle.gif
    python sample.py joint --prompt "a red circle moving right" --out circle.gif
    python sample.py generate --checkpoint Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a lawn" --out cat.mp4
    python sample.py generate --prompts prompts.txt --out drawn       many prompts, one a line: drawn/00000.mp4 ... and drawn/index.jsonl
    python sample.py understand --videos drawn --out captions.jsonl   every video of a folder
    python sample.py joint --prompt "a red circle moving right" --trajectory          also joint.html, a page with what happens at each step

A checkpoint is a folder that train.py wrote, or, of the real world, Wan2.1 or the published Uni-ViGU, as a path or hub id (see wan/weights.py).
Videos, in and out: .gif, .mp4, .npy (frames, rows, columns, 3; uint8), or a folder of PNG frames; in alone, on real weights: .mov, .webm.
"""

import sys

sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)  # Ctrl-C ends quietly, also in the imports

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import GifImagePlugin, Image

import pages
import wan
from univigu import Config, generate, joint, understand
from wan.published import build, config_from, latents_of
from wan.weights import one_line

FORMATS = (".gif", ".mp4", ".npy", "")
WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # where VAE, umT5 and tokenizer come from where a checkpoint has none


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


def check_out(path):
    """Raises ValueError where a video cannot be written, before it is made."""
    path = Path(path)
    if path.suffix not in FORMATS or path.name in FORMATS:
        raise ValueError(f"--out is {str(path)!r}, wanted a name that ends in .gif, .mp4 or .npy, or has no ending, for a folder of PNG frames")
    check_folder(path)
    if path.exists() and (path.is_dir() if path.suffix else not (path.is_dir() and all(f.suffix == ".png" for f in path.iterdir()))):
        raise ValueError(f"--out {path} exists and is not a {'file' if path.suffix else 'folder of PNG frames'}")


def check_folder(path, flag="--out"):
    """Raises ValueError where an output file cannot be written: tries it, in a folder of its own, and leaves nothing."""
    path = Path(os.path.abspath(path))
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as trial:
            trial = Path(trial) / path.relative_to(folder)
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.with_name(f".part-{path.name}").touch()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written in {folder}: {error.strerror}") from None


def write_video(path, frames, fps=8):
    """frames (1, 3, T, H, W) in [-1, 1] -> a file of the kind its ending names, complete or not there at all."""
    path = Path(path)
    pixels = pages.to_pixels(frames[0])
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
            {".gif": write_gif, ".mp4": write_mp4}[path.suffix](part, pixels, fps)
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        remove(part)


def remove(path):
    """Removes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_gif(path, pixels, fps=8):
    """pixels (T, H, W, 3) uint8 -> a GIF that repeats. Frame by frame: Pillow's save would merge frames that look alike."""
    images = [Image.fromarray(frame).quantize(256) for frame in pixels]
    with open(path, "wb") as file:
        file.writelines(GifImagePlugin.getheader(images[0].copy(), info={"loop": 0})[0])
        for image in images:
            file.writelines(GifImagePlugin.getdata(image, duration=1000 // fps, include_color_table=True))
        file.write(b";")


def write_mp4(path, pixels, fps=8):
    """pixels (T, H, W, 3) uint8 -> H.264. Small frames keep full colour resolution: halved, their colours would run."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "8"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv444p" if min(pixels.shape[1:3]) < 128 else "yuv420p"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


# ---------------------------------------------------------------- checkpoints

def load(flags):
    """--checkpoint -> (what makes the model, its Config, the world it was trained in, its stage). Raises ValueError where it is none."""
    folder, device = Path(flags.checkpoint), choose_device(flags.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if wan.is_wan(flags.checkpoint):
        layout, base = wan.layout(flags.checkpoint), None
        if layout == "published":
            base = flags.wan = flags.wan or WAN
        if layout == "official":
            flags.wan = flags.wan or WAN                            # this layout has its VAE and umT5 in files of another kind
        if layout != "own":
            config = wan.config(flags.checkpoint, base=base)
            state = dict(wan=flags.wan or flags.checkpoint, vocabulary=None, latents=latents_of(config), text_len=config.text_len, prompt_len=config.prompt_len)
            world, stage = wan.World.restore(state, device=device), "refine" if layout == "published" else "generator"
            return lambda: wan.load(flags.checkpoint, base=base, dtype=dtype, device=device), config, world, stage
        folder = wan.find(flags.checkpoint, weights=not flags.dry_run)[1]                    # ours, on the hub
    for name in (*([] if flags.dry_run else ["model.safetensors"]), "config.json", "train.json", "world.json"):
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} has no {name}: wanted a folder that train.py wrote, such as runs/toy/refine")
    stored = read_object(folder / "config.json", {f.name for f in fields(Config)})
    stage, state = read_object(folder / "train.json", {"stage"})["stage"], read_object(folder / "world.json", {"world"})
    kind = state["world"]
    if kind not in ("toy", "wan"):
        raise ValueError(f"checkpoint {folder} was trained in world {kind!r}, wanted 'toy' or 'wan'")
    if stage not in ("generator", "recall", "refine"):
        raise ValueError(f"checkpoint {folder}: train.json has stage {stage!r}, wanted generator, recall or refine")
    try:
        config = config_from(stored)
        if kind == "wan":
            world = wan.World.restore(state | ({"wan": flags.wan} if flags.wan else {}), device=device)
    except Exception as error:  # foreign values fail in many ways
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {one_line(error)}") from None
    if kind == "toy":
        from toy import World

        if flags.wan:
            raise ValueError(f"--wan is {flags.wan!r}, but checkpoint {folder} is of the toy, which has no use for it")
        world = World()
        try:
            world.check(config)
        except ValueError as error:
            raise ValueError(f"checkpoint {folder}: {error}") from None
    return lambda: wan.load(folder, dtype=dtype, device=device), config, world, stage


def read_object(path, names):
    """A JSON file that has an object with (at least) these names. Raises ValueError, which names the file."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path.parent}: {path.name} cannot be read: {one_line(error)}") from None
    if missing := sorted(names - set(found)) if isinstance(found, dict) else sorted(names):
        raise ValueError(f"checkpoint {path.parent}: {path.name} lacks {', '.join(missing)}: wanted what train.py wrote")
    return found


def choose_device(name):
    """--device -> torch.device. Raises ValueError for a GPU that is not there."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda', but torch finds no CUDA GPU; wanted 'cpu' or 'auto'")
    return device


def estimate(config, world, shape, options, flags, device, samples):
    """Prints what so many samples will take, without loading weights. FLOPs: 2 per multiply-add."""
    n_v = shape[1] * shape[2] * shape[3] // (config.patch_size[0] * config.patch_size[1] * config.patch_size[2])
    n_t = 0 if flags.mode == "generate" and flags.stage == "generator" else config.text_len
    n, d = n_v + n_t, config.dim
    video, text = (config.num_layers * (12 * d * d + 4 * d * width + 4 * n * d + 4 * config.prompt_len * d) * tokens
                   for width, tokens in ((config.ffn_dim, n_v), (config.text_ffn_dim, n_t)))
    each = 1 if options["guidance"] == 1 else 3 if flags.mode == "joint" else 2              # passes of a step
    of_video = 1 if options.get("reuse_video") else options["steps"]                         # steps that run the video's tokens
    flops = each * (of_video * video + options["steps"] * text)
    shift = options.get("shift", config.text_shift if flags.mode == "understand" else 1)     # else the samplers' own
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config).parameters())
    bytes_each, side, dtype = (2, 2048, torch.bfloat16) if device.type == "cuda" else (4, 1024, torch.float32)
    x = torch.randn(side, side, device=device, dtype=dtype)
    for repeats in (2, 20):                                         # the first round warms up
        begin = time.time()
        for _ in range(repeats):
            y = x @ x
        y.sum().item()
    rate = 20 * 2 * side**3 / (time.time() - begin)
    print(f"video latent {' x '.join(map(str, shape))}: {n_v:,} video tokens and {n_t} text tokens")
    print(f"{parameters:,} parameters, {parameters * bytes_each / 1e9:.1f} GB of weights, about {each * n * d * 40 * bytes_each / 1e9:.1f} GB of activations")
    print(f"{options['steps']} steps, guidance {options['guidance']:g}, shift {shift:g}: {each * options['steps']} passes of {text / 1e12:.2f} TFLOP for the text, "
          f"{each * of_video} of {video / 1e12:.2f} for the video")
    print(f"{samples} to do: about {samples * flops / rate * 2 / 60:.1f} minutes at half of the {rate / 1e12:.1f} TFLOP/s measured on {device}")
    if not world.fixed_size:
        print("beside that, one after the other and not while the model works: umT5 (real: 11 GB in bf16) and the VAE (real: 0.5 GB and the frames)")


# ---------------------------------------------------------------- the three modes

def run(flags):
    """One of the three modes, from flags to printed captions and written files."""
    make_model, config, world, flags.stage = load(flags)
    flags.published = latents_of(config) == "raw"                       # the published weights, or what was trained from them
    if flags.stage == "generator" and flags.mode != "generate":
        raise ValueError(f"checkpoint {flags.checkpoint} is of stage generator, which knows no text yet; wanted recall or refine")
    frames, rows, columns = world.frame_shape[1:]
    size = (flags.frames or frames, *(flags.size or (rows, columns)))
    if world.fixed_size and size != (frames, rows, columns):
        raise ValueError(f"--frames and --size ask for {size[0]} frames of {size[1]}x{size[2]}, but this checkpoint has {frames} of {rows}x{columns}")
    if not world.fixed_size and (min(size) < 1 or size[0] % 4 != 1 or size[1] % 16 or size[2] % 16):
        raise ValueError(f"--frames and --size ask for {size[0]} frames of {size[1]}x{size[2]}, wanted 4n + 1 frames, rows and columns that are multiples of 16")
    shape = world.shape if world.fixed_size else (config.in_dim, 1 + size[0] // 4, size[1] // 8, size[2] // 8)
    large, options = size[1] * size[2] > 480 * 832, dict(world.sampling[flags.mode])
    if flags.mode == "generate" and not world.fixed_size:           # what Wan recommends for each of its models
        if flags.stage == "generator" and config.dim == 1536:       # the 1.3B
            options |= dict(guidance=6.0, shift=8.0)
        elif large:
            options["shift"] = 5.0
    options |= {name: getattr(flags, name) for name in ("steps", "guidance", "shift") if getattr(flags, name) is not None}
    if flags.mode == "understand":
        options["reuse_video"] = not (flags.recompute_video or flags.published)
    if options["guidance"] == 1 and getattr(flags, "negative_prompt", None):
        raise ValueError("--negative-prompt has no effect at guidance 1, wanted another --guidance")
    check_page(flags)
    work = (to_describe if flags.mode == "understand" else to_draw)(flags, world)
    if flags.dry_run:
        return estimate(config, world, shape, options, flags, choose_device(flags.device), len(work))
    if work and large:
        world.codec.vae.enable_tiling()                             # in fp32, frames of 720p may not fit
    if work:
        (describe if flags.mode == "understand" else draw)(flags, make_model, world, shape, size, options, work)


def to_describe(flags, world):
    """What understand has to do: [(number, video), ...], without those that --out has the caption of. Raises ValueError where it cannot be done."""
    if "" in (flags.video, flags.videos):
        raise ValueError("--video or --videos is empty, wanted a path")
    if flags.out and (os.path.isdir(flags.out) or Path(flags.out).suffix.lower() in (*world.endings, ".npy")):
        raise ValueError(f"--out {flags.out} is a folder or named as a video, wanted a text file")
    if flags.out:
        check_folder(flags.out)
    if flags.video:
        return [(0, Path(flags.video))]
    if not Path(flags.videos).is_dir():
        raise ValueError(f"--videos {flags.videos} is no folder")
    videos = sorted(f for f in Path(flags.videos).iterdir() if f.suffix.lower() in world.endings)
    if not videos:
        raise ValueError(f"--videos {flags.videos} holds no {', '.join(world.endings)}")
    done = {row["video"] for row in read_rows(flags.out, "video", "caption")} if flags.out else ()
    return [(i, video) for i, video in enumerate(videos) if video.name not in done]


def describe(flags, make_model, world, shape, size, options, work):
    """understand: prints the caption of a video, or those of a folder as JSON lines, and writes them to --out."""
    model = None
    for i, video in work:
        try:
            as_it_is = world.fixed_size or video.is_dir() or video.suffix == ".npy"
            frames = read_video(video, size) if as_it_is else world.read_video(video, size[0], [size[1:]] if flags.size else world.frame_sizes)
        except (ValueError, OSError) as error:
            if flags.video:
                raise
            print(f"left out: {one_line(error)}", file=sys.stderr)
            continue
        z_v = world.codec.encode(frames)
        with contextlib.redirect_stdout(sys.stderr):                # what is said while loading is no part of a caption
            model = model or make_model().eval()                    # after the first file was read: it may be a wrong one
        generator = torch.Generator().manual_seed(flags.seed + i)
        z_v = z_v.to(next(model.parameters()).device)
        y_hat, steps = watched(flags, understand, model, z_v, generator=generator, **options)
        caption = world.tokenizer.decode(y_hat.cpu())[0]
        row = {"video": video.name, "caption": caption}
        print(caption if flags.video else json.dumps(row, ensure_ascii=False), flush=True)
        if flags.out:
            pages.write(flags.out, caption + "\n") if flags.video else append(flags.out, row)
        if flags.trajectory:
            write_page(flags, world, options, steps, row)
    if model is None and not (flags.out and Path(flags.out).exists()):
        raise ValueError(f"--videos {flags.videos} holds no video that can be read, of {len(work)}")


def to_draw(flags, world):
    """What generate and joint have to do: [(number, prompt, file), ...], without those that an earlier run drew. Raises ValueError where it cannot be done."""
    ending = ".gif" if world.fixed_size else ".mp4"
    if flags.prompt is not None:
        name = flags.mode + ending if flags.out is None else flags.out
        check_out(name)
        return [(0, flags.prompt, Path(name))]
    try:
        prompts = [line.strip() for line in Path(flags.prompts).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--prompts {flags.prompts} cannot be read as UTF-8 text: {one_line(error)}") from None
    if not prompts:
        raise ValueError(f"--prompts {flags.prompts} is empty, wanted a prompt a line")
    if not flags.out:
        raise ValueError("--prompts needs --out, the folder for the videos")
    out = Path(flags.out)
    work = [(i, prompt, out / f"{i:05d}{ending}") for i, prompt in enumerate(prompts)]
    check_out(work[0][2])
    wanted, rows = {name.name: prompt for _, prompt, name in work}, read_rows(out / "index.jsonl", "video", "prompt")
    if other := [row["video"] for row in rows if wanted.get(row["video"], row["prompt"]) != row["prompt"]]:
        raise ValueError(f"--out {out} has {other[0]} of another prompt than --prompts {flags.prompts}: wanted the same prompts, to go on, or a new folder")
    done = {row["video"] for row in rows if (out / row["video"]).exists()}
    return [(i, prompt, name) for i, prompt, name in work if name.name not in done]


def draw(flags, make_model, world, shape, size, options, work):
    """generate and joint: writes the video of a prompt, or those of a file of prompts with their index.jsonl; prints joint's captions."""
    texts = [caption_tokens(flags, world, prompt) for _, prompt, _ in work]
    negative = world.negative_prompt if flags.negative_prompt is None else flags.negative_prompt
    *embeddings, c_null = embed(world, [*(prompt for _, prompt, _ in work), negative])       # before the model is there: both may not fit
    with contextlib.redirect_stdout(sys.stderr):                    # what is said while loading is no part of a caption
        model = make_model().eval()
    device, pad = next(model.parameters()).device, lambda c: F.pad(c, (0, 0, 0, model.config.prompt_len - c.shape[1]))
    if not world.fixed_size and len(world.tokenizer) > model.config.vocab_size:
        raise ValueError(f"checkpoint {flags.checkpoint} knows {model.config.vocab_size} tokens, but its tokenizer has {len(world.tokenizer)}")
    for (i, prompt, name), c, y in zip(work, embeddings, texts):
        common = options | dict(generator=torch.Generator().manual_seed(flags.seed + i), c_null=pad(c_null).to(device))
        c, row = pad(c).to(device), {"video": name.name, "prompt": prompt}
        if flags.mode == "generate":
            z_v, steps = watched(flags, generate, model, None if y is None else y.to(device), c, shape, keep_text=flags.published, **common)
        else:
            (z_v, y_hat), steps = watched(flags, joint, model, c, shape, **common)
            row["caption"] = world.tokenizer.decode(y_hat.cpu())[0]
            print(row["caption"], flush=True)
        write_video(name, world.codec.decode(z_v), world.fps)
        print(f"wrote {name}", file=sys.stderr)
        if flags.prompts:
            append(name.with_name("index.jsonl"), row)
        if flags.trajectory:
            write_page(flags, world, options, steps, row)


def embed(world, prompts):
    """Prompts -> list of c (1, its tokens, width) on the CPU: a padded one takes 8 MB in the real world, and there may be thousands."""
    rows = [row for i in range(0, len(prompts), 64) for row in world.prompt_encoder(prompts[i:i + 64]).cpu()]
    return [row[:max(1, int(row.any(-1).sum()))].clone()[None] for row in rows]


def read_rows(path, *names):
    """The rows of a JSONL file that an earlier run wrote, but for a last line that was cut short; none where there is no file.
    Raises ValueError for a file of anything but objects with strings of these names."""
    path = Path(path)
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        rows = [json.loads(line) for line in lines]
        if not all(isinstance(row[name], str) for row in rows for name in names) or rest[:1] not in ("", "{"):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"--out: {path} is not what an earlier run wrote, wanted lines of JSON with {' and '.join(names)}, to go on, or a new place") from None
    if rows:
        print(f"{path} has {len(rows)} already: they stay as they are", file=sys.stderr)
    return rows


def append(path, row):
    """Adds a row to a JSONL file (made with its folder), unless it is there, in the place of a last line that was cut short."""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write(b"" if line in text else line)


def caption_tokens(flags, world, prompt):
    """The text stream of `generate`: the caption, else the prompt, as y (1, N); None for joint, and for stage generator, which has no text."""
    if flags.mode == "joint":
        return None
    if flags.stage == "generator":
        if flags.caption:
            raise ValueError(f"--caption: checkpoint {flags.checkpoint} is of stage generator, which knows no text; wanted recall or refine")
        return None
    text = flags.caption or prompt
    if not text.split():
        raise ValueError("--prompt is empty: wanted words there or in --caption")
    y = world.tokenizer.encode([text])
    return y[:, :int((y != 0).sum())] if flags.published else y     # the published weights do not look at padding


# ---------------------------------------------------------------- the trajectory, as a page

LATENTS = 3  # so many latent frames are shown: all nine frames of the toy, the first nine of a longer video, for its codec is causal


def check_page(flags):
    """Raises ValueError where --trajectory cannot be written, before there is anything to write."""
    if flags.trajectory is None:
        return
    path = Path(flags.trajectory)
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(f"--trajectory is {flags.trajectory!r}, wanted a file whose name ends in .html")
    if flags.out and os.path.abspath(flags.out) == os.path.abspath(path):
        raise ValueError(f"--trajectory and --out are both {flags.trajectory}, wanted two names")
    check_folder(path, "--trajectory")


def watched(flags, sampler, model, *args, **options):
    """Calls a sampler. Returns what it gives, and, with --trajectory, a `moment` of each time that the network looked and of the end."""
    steps = []
    if flags.trajectory is None:
        return sampler(model, *args, **options), steps
    before = None

    def tell(k, tau_v, tau_t, z_v, z_t, v_v, v_t):
        nonlocal before
        if k:                                                       # the state before, and the velocity that led on
            steps.append(moment(model, *before, v_v, v_t))
        before = z_v, z_t, tau_v, tau_t
        if k == options["steps"]:
            steps.append(moment(model, *before))

    return sampler(model, *args, callback=tell, **options), steps


def moment(model, z_v, z_t, tau_v, tau_t, v_v=None, v_t=None):
    """What is shown of a moment, of its first sample alone: clocks, z_v and the guess z_v1_hat (1, C, up to LATENTS, H, W), and, of the text,
    the state's tokens y (N,), the guess's tokens y_hat (N,) and how certain each of these is, in [0, 1]."""
    ahead = lambda z, tau, v: z[:1] if v is None else z[:1] + (1 - tau) * v[:1]
    found = dict(tau_v=tau_v, tau_t=tau_t if z_t is not None else None, z_v=z_v[:1, :, :LATENTS].cpu(), z_v1_hat=ahead(z_v, tau_v, v_v)[:, :, :LATENTS].cpu())
    if z_t is None:
        return found
    if not z_t.is_floating_point():                                 # the published flow moves token ids
        sure, y_hat = (torch.ones(z_t[:1].shape), z_t[:1]) if v_t is None else v_t[:1].float().softmax(-1).max(-1)
    else:
        E = model.embedding_matrix()
        most = lambda z: (z @ E.T / E.shape[1] ** 0.5).softmax(-1).max(-1)
        sure, y_hat = most(ahead(z_t, tau_t, v_t).float())
        sure = sure / most(E[y_hat]).values                         # an exact row's own softmax is under 1, the more so the larger the vocabulary
    return found | dict(y=model.decode(z_t[:1])[0].cpu(), y_hat=y_hat[0].cpu(), sure=[round(s, 3) for s in sure[0].clamp(max=1).tolist()])


def write_page(flags, world, options, steps, row):
    """The page of --trajectory. row: what is known of the sample, name -> text."""
    shown, moving = torch.linspace(0, len(steps) - 1, min(len(steps), pages.STEPS)).round().int().tolist(), flags.mode != "understand"
    draw = lambda z: world.codec.decode(z)[0].cpu()
    still, entries = None if moving else draw(steps[0]["z_v"]), []
    for i in shown:
        step = steps[i]
        entry = {"step": i, "tau_v": step["tau_v"], "tau_t": step["tau_t"], "video": {} if moving else {"given": still}, "text": {}}
        if moving:
            entry["video"] = {"guess": draw(step["z_v1_hat"])} | ({"state": draw(step["z_v"])} if world.fixed_size else {})          # Wan's VAE takes its time
        if "y" in step and flags.mode == "generate":
            entry["text"] = {"given": tokens(world, step["y"])}
        elif "y" in step:
            entry |= {"text": {"guess": tokens(world, step["y_hat"]), "state": tokens(world, step["y"])}, "sure": step["sure"]}
        entries.append(entry)
    sampler = ", ".join([*(f"{name} {value:g}" for name, value in options.items()), f"seed {flags.seed}"])
    about = [*row.items(), ("checkpoint", flags.checkpoint), ("sampler", sampler)]
    if len(shown) < len(steps):
        about.append(("shown", f"{len(shown)} of {len(steps)} points of the trajectory"))
    if not world.fixed_size:
        about.append(("frames shown", f"the first ones{' of the guess; those of the state are left out' if moving else ''}"))
    title = {"understand": ("Understand: a text emerges from a video", "The video is given, so its clock stands at 1; only the text's clock runs."),
             "generate": ("Generate: a video emerges from a text", "The text is given, so its clock stands at 1; only the video's clock runs."),
             "joint": ("Joint: video and text emerge together", "Only the prompt is given: both clocks run, and each modality sees how far the other has come.")}
    pages.write(flags.trajectory, pages.trajectory(*title[flags.mode], about, entries))
    print(f"wrote {flags.trajectory}", file=sys.stderr)


def tokens(world, y):
    """Tokens y (N,) -> their texts one by one; None is the end, as in both worlds token 1, and token 0 is padding."""
    return [None if i == 1 else "·" if i == 0 else text or "␣" for i, text in zip(y.tolist(), world.tokenizer.decode(y[:, None]))]


# ---------------------------------------------------------------- flags

def rows_by_columns(text):
    """"480x832" -> (480, 832)."""
    if not re.fullmatch("[0-9]{1,5}x[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no size, wanted ROWSxCOLUMNS such as 480x832")
    return tuple(map(int, text.split("x")))


def parse(argv):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"sample.py: error: {one_line(message)}\n")          # argparse's own begins with the usage
    usage = "%(prog)s [--flag value ...]      --help lists the flags"
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for mode, about in (("understand", "video -> caption"), ("generate", "prompt -> video"), ("joint", "prompt -> video and caption")):
        sub = modes.add_parser(mode, help=about, description=about, usage=usage, allow_abbrev=False)
        sub.error = parser.error
        sub.add_argument("--checkpoint", default="runs/toy/refine", help="folder that train.py wrote, or Wan2.1 or the published Uni-ViGU, path or hub id (default: %(default)s)")
        sub.add_argument("--wan", default="", help="folder or hub id with Wan's VAE, umT5 and tokenizer (default: the checkpoint's own)")
        what = sub.add_mutually_exclusive_group(required=True)
        if mode == "understand":
            what.add_argument("--video", help="the video to describe")
            what.add_argument("--videos", help="folder of videos to describe, one after the other")
            sub.add_argument("--recompute-video", action="store_true",
                             help="run the video's tokens in every step, not in the first alone: exact, and many times slower (always so with the published weights)")
            sub.add_argument("--out", default="", help="text file to write the caption to as well; with --videos: {video, caption} as JSON lines, to go on with where it is")
        else:
            what.add_argument("--prompt", help='what to draw, for example "a red circle moving right"; '
                              + ("empty: --caption alone says it" if mode == "generate" else "empty: anything"))
            what.add_argument("--prompts", help="text file, a prompt a line; --out is then a folder, which gets the videos and index.jsonl; what is there stays")
            sub.add_argument("--out", help=f"video file to write (default: {mode}.gif, or {mode}.mp4 for the real world)")
            sub.add_argument("--negative-prompt", help="what guidance leads away from (default: Wan's; the toy has none)")
        if mode == "generate":
            sub.add_argument("--caption", default="", help="detailed caption for the text stream (default: the prompt)")
        sub.add_argument("--trajectory", nargs="?", const=f"{mode}.html", metavar="PAGE",
                         help="also write a page, one HTML file, with a slider over the steps: states, guesses and clocks (without a name: %(const)s)")
        sub.add_argument("--size", type=rows_by_columns, help="rows x columns of the video, multiples of 16 (default: the world's)")
        sub.add_argument("--frames", type=int, help="frames of the video, 4n + 1 (default: the world's)")
        sub.add_argument("--steps", type=int, help="solver steps (default: the world's)")
        sub.add_argument("--shift", type=float, help="warp of the solver's times, above 1 = longer near noise (default: the world's, or Wan's for its model and size)")
        sub.add_argument("--guidance", type=float, help="1 = conditional, 0 = unconditional, above 1 = exaggerated (default: the world's, or Wan's for its model)")
        sub.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0); sample number i of many has seed + i")
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
        sub.add_argument("--dry-run", action="store_true", help="print sizes, memory and time, load no weights")
    flags = parser.parse_args(argv)
    for name, low, high in (("steps", 1, 10000), ("guidance", -100, 100), ("seed", 0, 2**62), ("shift", 1e-3, 1e3), ("frames", 1, 10**5)):
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} is {value}, wanted {low} to {high}")
    if flags.mode == "generate" and flags.caption and flags.prompts:
        parser.error("--caption goes with one --prompt, found --prompts")
    if many := flags.trajectory is not None and next((name for name in ("videos", "prompts") if getattr(flags, name, None) is not None), None):
        parser.error(f"--trajectory goes with one --{many[:-1]}, found --{many}")
    return flags


def main(argv=None):
    flags = parse(argv)
    try:
        run(flags)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit(f"sample.py: error: {one_line(error)}")


if __name__ == "__main__":
    main()
