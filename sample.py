"""Uses a trained checkpoint: describes a video, draws a prompt, or does both at once.

    python sample.py joint --prompt "a red circle moving right"   with the toy that came trained
    python sample.py understand --video clip.gif                  prints the caption
    python sample.py understand --video clip.gif --prompt "a red circle moving right"
    python sample.py generate --prompt "a red circle moving right" --out circle.gif
    python sample.py joint --prompt "a red circle moving right" --out circle.gif
    python sample.py generate --checkpoint Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat"
    python sample.py generate --prompts prompts.txt --out drawn   a prompt a line: drawn/00000.mp4
                                                                  ... and drawn/index.jsonl
    python sample.py understand --videos drawn --out captions.jsonl   every video of a folder
    python sample.py joint --prompt "a red circle moving right" --trajectory
                                              also joint.html, a page of what happens at each step

A checkpoint is a folder that train.py wrote, or, of the real world, Wan2.1 or the published
Uni-ViGU, as a path or hub id (see wan/weights.py). Videos, in and out: .gif, .mp4, .npy (frames,
rows, columns, 3; uint8), or a folder of PNG frames; in alone: .mov, .webm, .mkv, .avi, a folder of
JPEG frames, or one PNG or JPEG image.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, fields
from itertools import groupby, islice
from pathlib import Path

from engine.threads import one_ahead, spin_briefly_beside_others

if __name__ == "__main__":
    spin_briefly_beside_others()

import numpy as np
import torch
import torch.nn.functional as F

import wan
from engine import cost, trajectory
from engine.checkpoint import SHARDS, needs_prompt
from engine.distributed import preferred_attention
from engine.files import alone, check_writable, one_line, read_json, write_text
from engine.graphs import captured_text_steps
from engine.options import run_command
from engine.rows import append_row, read_rows
from engine.sampling import parse
from engine.score import Confidence, text_losses
from engine.video import (
    READABLE,
    check_video_out,
    crop_to,
    is_video,
    read_video,
    read_windows,
    to_frames,
    write_video,
)
from engine.world import World, checked_sampling
from univigu import Config, generate, joint, understand
from wan.flags import WAN
from wan.index import read_row
from wan.published import build, config_from, latents_of

# ---------------------------------------------------------------- checkpoints


@dataclass
class Checkpoint:
    """A trained model, its weights not read yet, and the world it was trained in."""

    name: str  # as the user gave it
    source: Path | str  # where wan.load finds it
    config: Config
    world: World
    stage: str
    device: torch.device
    base: str | None = None  # the Wan2.1 that has what a published .pth lacks
    needs_prompt: str = ""  # why a caption needs a prompt; "" where it does not

    @property
    def published(self):
        """Whether it is the authors' release, or was trained from it."""
        return latents_of(self.config) == "raw"

    def load(self):
        """The model. What is said meanwhile goes to stderr, for stdout has captions alone."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with contextlib.redirect_stdout(sys.stderr):
            model = wan.load(self.source, base=self.base, dtype=dtype, device=self.device)
        return model.eval()


TRAINED = Path("runs/toy/refine")
INCLUDED = Path(__file__).parent / "toy" / "trained" / "toy"


def default_checkpoint():
    """What `python train.py` trained here, else the toy that came with the code; says which."""
    name = str(TRAINED if TRAINED.is_dir() else INCLUDED)
    print(f"checkpoint: {name}", file=sys.stderr)
    return name


def open_checkpoint(name, parts, device, weights=True):
    """--checkpoint -> Checkpoint.

    parts: --wan, where Wan's VAE, umT5 and tokenizer are; None: the checkpoint's own. weights:
    False where its small files will do. Raises ValueError or FileNotFoundError where there is no
    checkpoint.
    """
    if not wan.is_wan(name):
        return open_trained(name, Path(name), parts, device, weights)
    layout = wan.layout(name)
    if layout == "own":
        _, folder = wan.find(name, weights=weights)
        return open_trained(name, folder, parts, device, weights)
    parts = parts or (name if layout == "diffusers" else WAN)
    base = parts if layout == "published" else None
    config = wan.config(name, base=base)
    state = {
        "wan": parts,
        "vocabulary": None,
        "latents": latents_of(config),
        "text_len": config.text_len,
        "prompt_len": config.prompt_len,
    }
    world = wan.World.restore(state, device=device)
    stage = "refine" if layout == "published" else "generator"
    return Checkpoint(name, name, config, world, stage, device, base)


def open_trained(name, folder, parts, device, weights):
    """The Checkpoint in a folder that train.py wrote."""
    files = ["model.safetensors", "config.json", "train.json", "world.json"]
    for file in files if weights else files[1:]:
        if file == files[0] and (folder / SHARDS).is_dir() and not (folder / file).is_file():
            raise ValueError(
                f"checkpoint {folder} has shards alone: `python -m engine.checkpoint {folder}` "
                f"makes its {file}"
            )
        if not (folder / file).is_file():
            raise ValueError(
                f"checkpoint {folder} has no {file}, "
                "wanted a folder that train.py wrote, such as runs/toy/refine"
            )
    values = read_part(folder / "config.json", *(f.name for f in fields(Config)))
    trained = read_part(folder / "train.json", "stage")
    stage, options = trained["stage"], trained.get("train")
    state = read_part(folder / "world.json", "world")
    if stage not in ("generator", "recall", "refine"):
        raise ValueError(
            f"checkpoint {folder} has stage {stage!r} in train.json, "
            "wanted generator, recall or refine"
        )
    try:
        config = config_from(values)
        world = restore_world(state, config, parts, device)
    except (ValueError, TypeError, LookupError) as error:  # of foreign values
        raise ValueError(f"checkpoint {folder}: {one_line(error)}") from None
    why = needs_prompt(options, stage) if isinstance(options, dict) else ""
    return Checkpoint(name, folder, config, world, stage, device, needs_prompt=why)


def read_part(path, *names):
    """The object in a JSON file of a checkpoint. Raises ValueError where it lacks a name."""
    found = read_json(path)
    if missing := sorted(set(names) - set(found)):
        raise ValueError(f"{path} lacks {', '.join(missing)}, wanted what train.py wrote")
    return found


def restore_world(state, config, parts, device):
    """The world that a checkpoint's world.json describes.

    Raises ValueError for an unknown one, and where the config does not fit it.
    """
    if state["world"] == "wan":
        return wan.World.restore(state | ({"wan": parts} if parts else {}), device=device)
    if state["world"] not in ("toy", "pairs"):
        raise ValueError(f"its world is {state['world']!r}, wanted 'toy', 'pairs' or 'wan'")
    if parts:
        raise ValueError(f"--wan is {parts!r}, but the toy has no use for it")
    from toy import World
    from toy.pairs_world import World as Pairs

    world = Pairs(level=state.get("level", 1)) if state["world"] == "pairs" else World()
    world.check(config)
    world.sampling = checked_sampling(state.get("sampling"), world.sampling)
    return world


def choose_device(name):
    """--device -> torch.device. Raises ValueError for a GPU that is not there."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and found == "cpu":
        raise ValueError("--device is 'cuda', but torch finds no CUDA GPU, wanted 'cpu' or 'auto'")
    return torch.device(found if name == "auto" else name)


# ---------------------------------------------------------------- from flags to work


def run(flags):
    """One of the three modes: prints captions and writes files."""
    device = choose_device(flags.device)
    flags.checkpoint = flags.checkpoint or default_checkpoint()
    checkpoint = open_checkpoint(flags.checkpoint, flags.wan, device, weights=not flags.dry_run)
    if checkpoint.stage == "generator" and flags.mode != "generate":
        raise ValueError(no_text(checkpoint))
    size = chosen_size(flags, checkpoint.world)
    shape = latent_shape(checkpoint, size)
    large = size[1] * size[2] > 480 * 832
    options = sampler_options(flags, checkpoint, shape)
    check_page(flags)
    work = (to_describe if flags.mode == "understand" else to_draw)(flags, checkpoint.world)
    config, has_text = checkpoint.config, checkpoint.stage != "generator"
    count, _ = cost.parameters(build, config)
    job = cost.Sampling(config, count, shape, flags.mode, options, has_text)
    at_once = flags.batch or cost.samples_at_once(job, device)
    if flags.dry_run:
        cost.print_sampling(job, device, len(work), at_once)
        if not checkpoint.world.fixed_size:
            decode = cost.VAE_GB * size[1] * size[2] / (480 * 832)
            print(
                "beside that, one after the other and not while the model works: umT5 (real: 11 GB "
                f"in bf16) and the VAE (real: about {decode:.1f} GB while it decodes"
                f"{', less in the tiles that frames so large get' if large else ''})"
            )
        return
    if work and large:
        checkpoint.world.codec.vae.enable_tiling()  # in fp32, frames of 720p may not fit
    with preferred_attention(device):
        if work and flags.mode == "understand":
            describe(flags, checkpoint, size, options, work, at_once)
        elif work:
            draw(flags, checkpoint, shape, options, work, at_once)


def no_text(checkpoint):
    return (
        f"checkpoint {checkpoint.name} is of stage generator, which knows no text yet, "
        "wanted recall or refine"
    )


def chosen_size(flags, world):
    """(frames, rows, columns) of the videos. Raises ValueError where the world has no such ones."""
    frames, rows, columns = world.frame_shape[1:]
    t, (h, w) = flags.frames or frames, flags.size or (rows, columns)
    asked = f"--frames and --size ask for {t} frames of {h}x{w}"
    if world.fixed_size and (t, h, w) != (frames, rows, columns):
        raise ValueError(f"{asked}, but this checkpoint has {frames} of {rows}x{columns}")
    if not world.fixed_size and (min(t, h, w) < 1 or t % 4 != 1 or h % 16 or w % 16):
        raise ValueError(
            f"{asked}, wanted 4n + 1 frames, rows and columns that are multiples of 16"
        )
    return t, h, w


def latent_shape(checkpoint, size):
    """(C, F, H, W) of the latent of a video of (frames, rows, columns)."""
    if checkpoint.world.fixed_size:
        return checkpoint.world.shape
    t, h, w = size
    return checkpoint.config.in_dim, 1 + t // 4, h // 8, w // 8


def sampler_options(flags, checkpoint, shape):
    """Arguments of the sampler: the world's, or Wan's for its model and size; flags win."""
    world, mode = checkpoint.world, flags.mode
    options = world.options(mode, shape)
    own = world.sampling == type(world).sampling  # its recipe says nothing else
    wan_itself = checkpoint.stage == "generator" and not world.fixed_size
    if mode == "generate" and own and wan_itself and checkpoint.config.dim == 1536:  # the 1.3B
        options |= {"guidance": 6.0, "shift": 8.0}
    for name in ("steps", "guidance", "shift"):
        if getattr(flags, name) is not None:
            options[name] = getattr(flags, name)
    if mode == "understand":
        options["reuse_video"] &= not (flags.recompute_video or checkpoint.published)
    elif flags.negative_prompt and options["guidance"] == 1:
        raise ValueError("--negative-prompt has no effect at guidance 1, wanted another --guidance")
    return options


def writing_alone(flags):
    """A context in which nobody else goes on with what is in --out, where many samples go there."""
    many = in_rows(flags) if flags.mode == "understand" else flags.prompts
    if not many or not flags.out or flags.dry_run:
        return contextlib.nullcontext()
    out = Path(flags.out)
    lock = out.with_name(f".{out.name}.lock") if flags.mode == "understand" else out / ".lock"
    return alone(lock, out)


def to_describe(flags, world):
    """The videos to describe, [(number, path), ...], without those whose caption --out has.

    Raises ValueError where that cannot be done.
    """
    if flags.window and world.fixed_size:
        raise ValueError("--window cuts longer videos, but this checkpoint has one length alone")
    if "" in (flags.video, flags.videos):
        raise ValueError("--video or --videos is empty, wanted a path")
    if flags.out:
        if Path(flags.out).suffix.lower() in READABLE or os.path.isdir(flags.out):
            raise ValueError(
                f"--out {flags.out} is a folder or named as a video, wanted a text file"
            )
        check_writable(flags.out)
    if flags.video:
        return [(0, Path(flags.video))]
    folder = Path(flags.videos)
    if not folder.is_dir():
        raise ValueError(f"--videos {folder} is no folder")
    shown = (path for path in folder.iterdir() if path.name[0] != ".")
    videos = sorted(filter(is_video, shown))
    if not videos:
        wanted = f"{', '.join(READABLE)} or folder of frames"
        raise ValueError(f"--videos {folder} holds no {wanted}")
    done = () if flags.window else described(flags)
    return [(i, video) for i, video in enumerate(videos) if (utf8_name(video), None) not in done]


def described(flags):
    """What --out has captions of: (name of the video, its window or None) pairs."""
    rows = read_rows(flags.out, "video", "caption") if flags.out else []
    return [(row["video"], row.get("window")) for row in rows]


def utf8_name(path):
    """A file's name as UTF-8, whatever the locale; bytes that are none stay escaped."""
    return os.fsencode(path.name).decode(errors="surrogateescape")


def in_rows(flags):
    """Whether captions are JSON lines, as there may be many."""
    return bool(flags.videos or flags.window)


def to_draw(flags, world):
    """What to draw, [(number, prompt, path), ...], without what an earlier run drew.

    Raises ValueError where that cannot be done.
    """
    ending = ".gif" if world.fixed_size else ".mp4"
    if flags.prompt is not None:
        path = Path(flags.mode + ending if flags.out is None else flags.out)
        check_video_out(path)
        return [(0, flags.prompt, path)]
    prompts = read_prompts(flags.prompts)
    if not flags.out:
        raise ValueError("--prompts needs --out, the folder for the videos")
    out = Path(flags.out)
    work = [(i, prompt, out / f"{i:05d}{ending}") for i, prompt in enumerate(prompts)]
    check_video_out(work[0][2])
    rows = read_rows(out / "index.jsonl", "video", "prompt")
    wanted = {path.name: prompt for _, prompt, path in work}
    for row in rows:
        if wanted.get(row["video"], row["prompt"]) != row["prompt"]:
            raise ValueError(
                f"--out {out} has {row['video']} of another prompt than --prompts {flags.prompts}, "
                "wanted the same prompts, to go on, or a new folder"
            )
    done = {row["video"] for row in rows if (out / row["video"]).exists()}
    return [(i, prompt, path) for i, prompt, path in work if path.name not in done]


def read_prompts(path):
    """The lines of a text file that are not empty; of JSON lines, as an index has, the prompts.

    Raises ValueError where there is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--prompts {path} cannot be read as UTF-8 text: {one_line(error)}"
        ) from None
    if not text:
        raise ValueError(f"--prompts {path} is empty, wanted a prompt a line")
    rows = [line for line in text.split("\n") if line.strip()]
    if Path(path).suffix.lower() not in (".jsonl", ".json") and not is_object(rows[0]):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return [read_row(row.encode(), ("prompt",))[0] for row in rows]
    except ValueError as error:
        raise ValueError(
            f"--prompts {path} has a row that cannot be used, {error}: wanted a prompt a line, or "
            'JSON lines {"prompt": ...}'
        ) from None


def is_object(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# ---------------------------------------------------------------- the three modes


def describe(flags, checkpoint, size, options, work, at_once):
    """understand: prints the caption of a video, or many, of a folder or windows, as JSON lines."""
    world, model = checkpoint.world, None
    done = described(flags) if flags.window else ()
    if checkpoint.needs_prompt and flags.prompt is None:
        print(f"{checkpoint.name}: {checkpoint.needs_prompt}; give --prompt", file=sys.stderr)
    (c,) = embed(world, [flags.prompt]) if flags.prompt is not None else (None,)
    latents = (
        (i, video, window, world.codec.encode(frames))
        for i, video, window, frames in one_ahead(clips(flags, world, size, work))
        if (utf8_name(video), window) not in done
    )
    for batch in alike(latents, at_once, lambda clip: clip[-1].shape):
        model = model or checkpoint.load()  # now: the only video may have been a wrong one
        numbers, videos, windows, z_v = zip(*batch)
        z_v = torch.cat(z_v).to(checkpoint.device)
        c_each = None if c is None else c.to(checkpoint.device).expand(len(z_v), -1, -1)
        watch = callback(flags, model)
        common = options | {"generator": generators(flags, numbers), "callback": watch}
        y_hat, sure = captions(flags, model, z_v, c_each, common)
        texts = world.tokenizer.decode(y_hat)
        for k, (video, window, caption) in enumerate(zip(videos, windows, texts)):
            row = {"video": utf8_name(video), "caption": caption}
            row |= {} if window is None else {"window": window}
            row |= {} if flags.prompt is None else {"prompt": flags.prompt}
            row |= {} if sure is None else {"confidence": round(sure[k].item(), 3)}
            print(json.dumps(row, ensure_ascii=False) if in_rows(flags) else caption, flush=True)
            if flags.out and in_rows(flags):
                append_row(flags.out, row)
            elif flags.out:
                write_text(flags.out, caption + "\n")
        if flags.trajectory:
            write_page(flags, world, options, watch.finish(y_hat), row)
    if model is None and not (flags.out and Path(flags.out).exists()):
        raise ValueError(f"--videos {flags.videos} holds no video that can be read, of {len(work)}")


def captions(flags, model, z_v, c, options):
    """What understand writes of a batch of videos, of --best-of the best: y_hat (B, N), and, where
    captions are rows, how sure the model is of them, (B,), else None."""
    texts, sure = [], []
    for _ in range(flags.best_of):  # a generator goes on where it was
        with captured_text_steps(model):
            texts.append(understand(model, z_v, c, **options))
        sure += [options["callback"].of(texts[-1])] if in_rows(flags) else []
    y_hat, best, rows = torch.stack(texts, 1), 0, torch.arange(len(z_v))
    if flags.best_of > 1:
        losses = text_losses(model, z_v, y_hat, c, reuse_video=options["reuse_video"])
        best = losses.argmin(1).cpu()
    return y_hat[rows, best].cpu(), torch.stack(sure, 1).cpu()[rows, best] if sure else None


def clips(flags, world, size, work):
    """What to describe: yields (number, video, window or None, frames (1, 3, T, H, W) in [-1, 1]).

    Where sizes may differ, a video is cut to --size or, without it, to the most similar size of the
    training data, and its first 4n + 1 frames at 16 fps are taken, at most size[0], or all in
    windows. Of many videos, those that cannot be read are left out and named.
    """
    told = False
    for i, video in work:
        try:
            if world.fixed_size:
                yield i, video, None, read_video(video, size)
                continue
            fit = crop_to([flags.size] if flags.size else world.frame_sizes)
            for window, (images, goes_on) in enumerate(read_windows(video, size[0], fit)):
                if goes_on and not (flags.window or told):
                    told = True
                    print(
                        f"{video}: its first {len(images)} frames at {world.fps} fps are described "
                        f"(4n + 1, at most {size[0]}); --window describes longer videos whole",
                        file=sys.stderr,
                    )
                yield i, video, window if flags.window else None, to_frames(np.stack(images))
                if not flags.window:
                    break
        except (ValueError, OSError) as error:
            if flags.video:
                raise
            print(f"left out: {one_line(error)}", file=sys.stderr)


def draw(flags, checkpoint, shape, options, work, at_once):
    """generate and joint: writes the video of a prompt, or those of a file of prompts with their
    index.jsonl. joint also prints its captions.
    """
    world, config = checkpoint.world, checkpoint.config
    texts = [caption_tokens(flags, checkpoint, prompt) for _, prompt, _ in work]
    negative = world.negative_prompt if flags.negative_prompt is None else flags.negative_prompt
    prompts = [*(prompt for _, prompt, _ in work), negative]
    *embeddings, c_null = embed(world, prompts)  # before the model: both may not fit in memory
    model = checkpoint.load()
    if not world.fixed_size and len(world.tokenizer) > config.vocab_size:
        raise ValueError(
            f"checkpoint {checkpoint.name} knows {config.vocab_size} tokens, "
            f"but its tokenizer has {len(world.tokenizer)}"
        )

    def padded(c):
        return F.pad(c, (0, 0, 0, config.prompt_len - c.shape[1])).to(checkpoint.device)

    jobs = zip(work, embeddings, texts)
    for batch in alike(jobs, at_once, lambda job: None if job[-1] is None else job[-1].shape):
        places, c, y = zip(*batch)
        c = torch.cat([padded(one) for one in c])
        watch = callback(flags, model)
        common = options | {
            "generator": generators(flags, [i for i, _, _ in places]),
            "c_null": padded(c_null),
            "callback": watch,
        }
        rows = [{"video": path.name, "prompt": prompt} for _, prompt, path in places]
        if flags.mode == "generate":
            y = None if y[0] is None else torch.cat(y).to(checkpoint.device)
            z_v = generate(model, y, c, shape, keep_text=checkpoint.published, **common)
            y_hat = None
        else:
            z_v, y_hat = joint(model, c, shape, **common)
            for row, caption in zip(rows, world.tokenizer.decode(y_hat.cpu())):
                row["caption"] = caption
            for row, sure in zip(rows, watch.of(y_hat).tolist() if flags.prompts else ()):
                row["confidence"] = round(sure, 3)
        for (_, _, path), row, z in zip(places, rows, z_v.split(1)):
            if "caption" in row:
                print(row["caption"], flush=True)
            write_video(path, world.codec.decode(z), world.fps)
            print(f"wrote {path}", file=sys.stderr)
            if flags.prompts:
                append_row(path.with_name("index.jsonl"), row)
        if flags.trajectory:
            write_page(flags, world, options, watch.finish(y_hat), rows[0])


def alike(items, most, kind):
    """Consecutive items that share kind(item), in lists of at most so many."""
    for _, group in groupby(items, kind):
        while batch := list(islice(group, most)):
            yield batch


def generators(flags, numbers):
    """One for each sample, by its number: its noise is the same in any batch."""
    return [torch.Generator().manual_seed(flags.seed + i) for i in numbers]


def callback(flags, model):
    """What a sampler reports to: for the page of --trajectory, or for the captions of rows."""
    if flags.trajectory:
        return trajectory.Recorder(model)
    many = in_rows(flags) if flags.mode == "understand" else flags.prompts
    return Confidence(model) if many else None


def embed(world, prompts):
    """Prompts -> a list of c (1, its tokens, width), on the CPU.

    Not padded: a padded one takes 8 MB in the real world, and there may be thousands.
    """
    found = []
    for i in range(0, len(prompts), 64):
        for c in world.prompt_encoder(prompts[i : i + 64]).cpu():
            tokens = max(1, int(c.any(-1).sum()))
            c = c[:tokens].to(torch.float32 if world.fixed_size else torch.bfloat16)
            found.append(c.float()[None].clone())  # rounded as the data that it was trained on
    return found


def caption_tokens(flags, checkpoint, prompt):
    """The text of `generate`: the caption, else the prompt, as y (1, N).

    None for joint, and for stage generator, which has no text.
    """
    if flags.mode == "joint":
        return None
    if checkpoint.stage == "generator":
        if flags.caption:
            raise ValueError(f"--caption: {no_text(checkpoint)}")
        return None
    text = flags.caption or prompt
    if not text.split():
        raise ValueError("--prompt is empty, wanted words there or in --caption")
    y = checkpoint.world.tokenizer.encode([text])
    # the published weights do not look at padding
    return y[:, : int((y != 0).sum())] if checkpoint.published else y


def check_page(flags):
    """Raises ValueError where --trajectory cannot be written, before there is anything to write."""
    if flags.trajectory is None:
        return
    path = Path(flags.trajectory)
    if path.suffix != ".html" or path.is_dir():
        raise ValueError(
            f"--trajectory is {flags.trajectory!r}, wanted a file whose name ends in .html"
        )
    if flags.out and os.path.abspath(flags.out) == os.path.abspath(path):
        raise ValueError(f"--trajectory and --out are both {path}, wanted two names")
    check_writable(path, "--trajectory")


def write_page(flags, world, options, snapshots, row):
    """The page of --trajectory. row: what is known of the sample, name -> text."""
    sampler = [*(f"{name} {value:g}" for name, value in options.items()), f"seed {flags.seed}"]
    about = [*row.items(), ("checkpoint", flags.checkpoint), ("sampler", ", ".join(sampler))]
    trajectory.write_page(flags.trajectory, flags.mode, snapshots, world, about)
    print(f"wrote {flags.trajectory}", file=sys.stderr)


def main(argv=None):
    flags = parse(argv, __doc__)
    try:
        with writing_alone(flags):
            run(flags)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit(f"sample.py: error: {one_line(error)}")


if __name__ == "__main__":
    run_command(main)
