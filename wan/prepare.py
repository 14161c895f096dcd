"""Prepares real data: videos with their prompts and captions -> shards of latents, prompt embeddings and token ids, for train.py.

    python -m wan.prepare --videos DIR --index index.jsonl --out data/clips
    torchrun --nproc-per-node 8 -m wan.prepare --videos DIR --index index.jsonl --out data/clips        every rank takes its share of the rows

A row of the index is {"video": "a/b.mp4", "prompt": "...", "caption": "..."}, the video relative to DIR: .mp4, .mov, .webm, .gif, or .png and .jpg as
videos of one frame. Videos are retimed to 16 fps, resized and centre-cropped to the size of nearest aspect ratio, and give their first --frames
frames. Rows that cannot be used are listed with their reason in rejected.jsonl; a run that was stopped goes on when started again.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from .data import EOS, FORMAT, PAD, read_header
from .weights import one_line, read_json

FPS = 16  # Wan's
REJECTED = ("line", "video", "reason")  # fields of a line of rejected*.jsonl
DEMUXERS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".gif": "gif", ".png": "png_pipe", ".jpg": "jpeg_pipe", ".jpeg": "jpeg_pipe"}


# ---------------------------------------------------------------- videos

def decode(path):
    """The frames of a video or an image: (time, frame), seconds after the first frame as a Fraction, and an av.VideoFrame.

    Raises ValueError, OSError or av.FFmpegError on a file that is damaged or of another kind than its ending says.
    """
    import av

    with av.open(str(path), format=DEMUXERS[path.suffix.lower()]) as file:  # no guessing: what passes for a playlist would open other files
        stream, start = file.streams.best("video"), None
        if stream is None:
            raise ValueError("video has no pictures")
        stream.thread_type = "AUTO"
        for packet in file.demux(stream):
            for frame in packet.decode():
                if packet.is_corrupt or frame.is_corrupt or frame.pts is None:
                    raise ValueError(f"video has a frame {'without a time' if frame.pts is None else 'that is damaged'}")
                start = frame.pts if start is None else start
                yield (frame.pts - start) * frame.time_base, frame
        if start is None:
            raise ValueError("video has no frames")


def retime(frames):
    """(time, frame) pairs -> the frame nearest to k / 16 s for k = 0, 1, ..., until half a frame after the last one's time."""
    k, gap, (time, frame) = 0, Fraction(1, FPS), next(frames)
    for after, following in chain(frames, [(None, None)]):
        gap = gap if after is None else after - time
        while Fraction(k, FPS) < time + gap / 2:
            yield frame
            k += 1
        time, frame = after, following


def read_frames(path, limit, fit):
    """The first `limit` frames of a video at 16 fps, upright PIL images given to `fit`; a list of what it returned. Raises ValueError or OSError."""
    import av

    kept, last = [], None
    try:
        for frame in islice(retime(decode(path)), limit):
            kept.append(kept[-1] if frame is last else fit(frame.to_image().rotate(frame.rotation, expand=True)))
            last = frame
    except av.FFmpegError as error:  # of many kinds, some of which are ValueErrors too
        raise OSError(error.strerror or str(error)) from None
    return kept


def read_clip(path, sizes, least, most):
    """A video -> frames (T, H, W, 3) uint8, T = 4n + 1, and whether it had more of them. Raises ValueError for fewer than `least`."""
    def fit(image):
        distance = lambda size: abs(math.log(size[0] / size[1]) - math.log(image.height / image.width))
        return np.asarray(ImageOps.fit(image, min(sizes, key=distance)[::-1], Image.BICUBIC))  # antialiased, centred

    frames = read_frames(path, most + 1, fit)
    if len(frames) < least:
        raise ValueError(f"video is too short: {len(frames)} frames at {FPS} fps, wanted {least}")
    kept = (min(len(frames), most) - 1) // 4 * 4 + 1
    return np.stack(frames[:kept]), len(frames) > kept


def large(sizes):
    """Whether a VAE in fp32 should work in tiles: frames above 480 x 832 may not fit."""
    return any(rows * columns > 480 * 832 for rows, columns in sizes)


def find(videos, name):
    """The path of a video. Raises ValueError unless it is a file inside the folder `videos`, symbolic links followed."""
    path = videos / name
    if Path(name).is_absolute() or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(videos)):
        raise ValueError("video leaves the folder of videos")
    if not path.is_file():
        raise ValueError("video does not exist")
    if path.suffix.lower() not in DEMUXERS:
        raise ValueError(f"video ends in {path.suffix!r}, wanted one of {', '.join(DEMUXERS)}")
    return path


# ---------------------------------------------------------------- the index

def read_row(line, fields):
    """A line of the index, bytes -> the strings of `fields`. Raises ValueError, which says what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("line is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("line is not JSON") from None
    for name in fields:
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            raise ValueError(f"{name} is missing or no string")
        if not row[name].isascii() and any("\ud800" <= character <= "\udfff" for character in row[name]):
            raise ValueError(f"{name} is not valid Unicode")
    return tuple(row[name] for name in fields)


def read_index(path, fields=("video", "prompt", "caption")):
    """A JSONL file -> the rows by line, from 1, each a tuple of `fields`; (video or None, reason) by line for the rest; the file's SHA-256.

    Raises ValueError where it is a folder or empty, FileNotFoundError where it is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"--index {path} does not exist, wanted a file with a row a line")
    if path.is_dir() or not path.stat().st_size:
        raise ValueError(f"--index {path} is {'a folder' if path.is_dir() else 'empty'}, wanted a file with a row a line")
    data, rows, rejected, first = path.read_bytes(), {}, {}, {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            row = read_row(line, fields)
            if first.setdefault(row, number) == number:
                rows[number] = row
            else:
                rejected[number] = row[0], f"row repeats line {first[row]}"
        except ValueError as error:
            rejected[number] = None, str(error)
    return rows, rejected, hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- what is written

def write(path, text):
    """Writes beside, then renames."""
    part = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_lines(path, fields):
    """The complete lines of a JSONL file of ours, parsed: a kill may have cut the last one. Raises ValueError for one that has not these fields."""
    data, rows = path.read_bytes() if path.exists() else b"", []
    for number, line in enumerate(data[:data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
            [rows[-1][name] for name in fields]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"line {number} of {path} is {line[:40]!r}, wanted an object with {', '.join(fields)}") from None
    return rows


class Part:
    """What one rank writes: shard-RRRR-NNNNN.safetensors and rejected-RRRR.jsonl. `done`: the lines of the index that are in them already."""

    def __init__(self, out, rank, size):
        self.out, self.rank, self.size, self.clips, self.tensors = out, rank, size, [], {}
        self.rejected, rejected = out / f"rejected-{rank:04d}.jsonl", read_lines(out / f"rejected-{rank:04d}.jsonl", REJECTED)
        write(self.rejected, "".join(json.dumps(row) + "\n" for row in rejected))
        self.done = {clip["line"] for shard in out.glob(f"shard-{rank:04d}-*.safetensors") for clip in read_header(shard)["clips"]}
        self.done |= {row["line"] for row in rejected}

    def reject(self, line, video, reason):
        with open(self.rejected, "a") as file:
            file.write(json.dumps({"line": line, "video": video, "reason": " ".join(reason.split())}) + "\n")

    def add(self, clip, tensors):
        self.clips.append(clip)
        self.tensors |= {f"{clip['line']}.{name}": tensor for name, tensor in tensors.items()}
        if len(self.clips) == self.size:
            self.flush()

    def flush(self):
        """Writes the clips that are waiting as one shard, complete or not there at all."""
        if self.clips:
            name = next(name for name in (f"shard-{self.rank:04d}-{i:05d}.safetensors" for i in count()) if not (self.out / name).exists())
            ids = torch.cat([tensor for key, tensor in self.tensors.items() if key.endswith((".prompt", ".caption"))])
            header = {"format": FORMAT, "clips": self.clips, "vocabulary": ids.unique().tolist()}
            part = self.out / f".{name}"
            try:
                save_file(self.tensors, part, metadata={"clips": json.dumps(header)})
                shutil.copymode(self.out / "settings.json", part)   # safetensors lets nobody else read its files
                part.replace(self.out / name)
            except (OSError, SafetensorError) as error:
                raise OSError(f"{self.out / name} cannot be written ({shutil.disk_usage(self.out).free:,} bytes were free): {one_line(error)}") from None
            finally:
                part.unlink(missing_ok=True)
            self.clips, self.tensors = [], {}


def check_folder(out):
    """Raises ValueError unless `out` is a folder that can be written to, or may become one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"--out {out}{'' if there == out else f': {there}'} is {'a folder without write permission' if there.is_dir() else 'no folder'}")


def begin(out, settings):
    """Makes `out` and notes the settings there. Raises ValueError where it holds data of other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    stored = read_json(path) if path.exists() else settings
    for name, value in settings.items():
        if stored.get(name) != value:
            raise ValueError(f"{name} is {value!r}, but {out} was begun with {stored.get(name)!r}: wanted the same, or another --out")
    write(path, json.dumps(settings, indent=1) + "\n")


def merge(out, settings, rows, wan):
    """rejected.jsonl and manifest.json from what all ranks wrote; their counts are printed. Does nothing while some of the `rows` rows are missing.

    Raises ValueError where no clip was accepted.
    """
    headers = {path: read_header(path) for path in sorted(out.glob("shard-*.safetensors"))}
    clips = [clip for header in headers.values() for clip in header["clips"]]
    rejected = sorted((row for path in out.glob("rejected-*.jsonl") for row in read_lines(path, REJECTED)), key=lambda row: row["line"])
    if sorted(row["line"] for row in clips + rejected) != list(range(1, rows + 1)):
        print(f"{len(clips) + len(rejected)} of {rows} rows are done; the last rank to finish writes the manifest")
        return
    write(out / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in rejected))
    if not clips:
        raise ValueError(f"all {rows} rows were rejected, line 1 because: {rejected[0]['reason']}; see {out / 'rejected.jsonl'}")
    buckets = Counter(("x".join(map(str, clip["size"])), *clip["z_v"]) for clip in clips)
    manifest = settings | {
        "wan": wan, "clips": len(clips), "rejected": len(rejected), "cut": sum(clip["cut"] for clip in clips),
        "buckets": {size: {"clips": n, "z_v": z_v} for (size, *z_v), n in sorted(buckets.items())},
        "shards": {path.name: {"clips": len(header["clips"]), "bytes": path.stat().st_size} for path, header in headers.items()},
        "vocabulary": sorted({PAD, EOS}.union(*(header["vocabulary"] for header in headers.values())))}
    write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    print(f"{len(clips)} clips in {len(headers)} shards ({', '.join(f'{n} of {size}' for (size, *_), n in sorted(buckets.items()))}), "
          f"{manifest['cut']} of them cut to their first frames; {len(manifest['vocabulary'])} tokens occur")
    print(f"{len(rejected)} rows rejected, see {out / 'rejected.jsonl'}")


# ---------------------------------------------------------------- the run

def ahead(function, items):
    """(item, future of function(item)) in order; a few threads work a few items ahead."""
    threads, waiting = min(4, os.cpu_count() or 1), deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                yield waiting.popleft()
        yield from waiting


def check_tokens(tokenizer, limits, *texts):
    """Prompt and caption -> umT5's ids of each with EOS, int32. Raises ValueError for one whose tokens, EOS not counted, are too few or too many."""
    found = [torch.tensor(tokenizer.ids(text), dtype=torch.int32) for text in texts]
    for ids, (name, (low, high)) in zip(found, limits.items()):
        if not low <= len(ids) - 1 <= high:
            raise ValueError(f"{name} has {len(ids) - 1} tokens, wanted {low} to {high}")
    return found


def encode(frames, prompt, tokens, codec, encoder):
    """frames (T, H, W, 3) uint8 and a prompt of so many tokens with EOS -> z_v (C, F, H, W) float16, c (tokens, width) bfloat16.

    Raises ValueError unless they are finite.
    """
    z_v = codec.encode(rearrange(torch.from_numpy(frames), "t h w rgb -> 1 rgb t h w").float() / 127.5 - 1)[0].half()
    c = encoder([prompt])[0, :tokens].bfloat16()
    for name, tensor in (("latent", z_v), ("prompt embedding", c)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return z_v.cpu().contiguous(), c.cpu().contiguous()


def prepare(flags):
    """One rank's share of the index: rank r of n takes the lines of number r modulo n."""
    rank, ranks, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    videos, out = Path(flags.videos), Path(flags.out)
    if not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos} is no folder")
    rows, rejected, digest = read_index(Path(flags.index))
    check_folder(out)

    import av  # noqa: F401  it is needed below: if it is missed, then here

    from .codec import Codec, PromptEncoder, Tokenizer  # here, for it takes seconds: --help and bad flags need not wait

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    tokenizer, codec = Tokenizer(flags.wan), Codec(flags.wan, device, latents=flags.latents, tiling=large(flags.sizes))
    encoder = PromptEncoder(flags.wan, device, torch.bfloat16 if cuda else torch.float32)
    limits = {"prompt": flags.prompt_tokens, "caption": flags.caption_tokens}
    if limits["prompt"][1] >= encoder.length:
        raise ValueError(f"--prompt-tokens allows {limits['prompt'][1]}, wanted under {encoder.length}, the length of a prompt embedding")
    names = ("frames", "min_frames", "sizes", "prompt_tokens", "caption_tokens", "shard_clips", "latents")
    settings = json.loads(json.dumps({                              # tuples become lists, as in the file that this is compared with
        "format": FORMAT, "index": digest, "ranks": ranks, "fps": FPS, **{name: getattr(flags, name) for name in names},
        "codec": codec.fingerprint, "prompt_encoder": encoder.fingerprint, "prompt_dim": encoder.width, "prompt_len": encoder.length,
        "text_len": max(high for _, high in limits.values()), "vocab_size": len(tokenizer)}))
    begin(out, settings)
    part = Part(out, rank, flags.shard_clips)

    mine, todo = [line for line in sorted(rows | rejected) if line % ranks == rank], []
    for line in (line for line in mine if line not in part.done):
        try:
            if line in rejected:
                raise ValueError(rejected[line][1])
            check_tokens(tokenizer, limits, *rows[line][1:])
            todo.append(line)
        except ValueError as error:
            part.reject(line, rows[line][0] if line in rows else rejected[line][0], str(error))
    read = lambda line: read_clip(find(videos, rows[line][0]), flags.sizes, flags.min_frames, flags.frames)
    bar = tqdm(ahead(read, todo), total=len(mine), initial=len(mine) - len(todo), unit="row", disable=None if rank == 0 else True)
    for line, clip in bar:
        video, prompt, caption = rows[line]
        try:
            frames, cut = clip.result()
            ids = check_tokens(tokenizer, limits, prompt, caption)
            z_v, c = encode(frames, prompt, len(ids[0]), codec, encoder)
        except (ValueError, OSError) as error:
            part.reject(line, video, str(error) if isinstance(error, ValueError) else f"video cannot be read: {error}")
            continue
        part.add({"line": line, "video": video, "size": list(frames.shape[:3]), "z_v": list(z_v.shape), "cut": cut},
                 {"z_v": z_v, "c": c, "prompt": ids[0], "caption": ids[1]})
    part.flush()
    merge(out, settings, len(rows) + len(rejected), str(Path(flags.wan).absolute()) if Path(flags.wan).exists() else flags.wan)


# ---------------------------------------------------------------- flags

def sizes(text):
    """"480x832,832x480" -> [(480, 832), (832, 480)]."""
    return [tuple(map(int, size.split("x"))) for size in text.split(",")]


def span(text):
    """"0-128" -> (0, 128)."""
    return tuple(map(int, text.split("-")))


def parse(argv):
    parser = argparse.ArgumentParser(prog="wan.prepare", usage="python -m wan.prepare [--flag value ...]      --help lists the flags", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"wan.prepare: error: {one_line(message)}\n")
    parser.add_argument("--videos", required=True, help="folder of the videos")
    parser.add_argument("--index", required=True, help="JSONL file, a row {video, prompt, caption} a line")
    parser.add_argument("--out", required=True, help="folder for shards, manifest.json and rejected.jsonl")
    parser.add_argument("--wan", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder or hub id with Wan's VAE, umT5 and tokenizer (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip at 16 fps, 4n + 1 (default: %(default)s)")
    parser.add_argument("--min-frames", type=int, help="accept shorter videos of at least so many frames, cut to 4n + 1 (default: --frames)")
    parser.add_argument("--sizes", type=sizes, default="480x832,832x480",
                        help="rows x columns; a clip gets that of the nearest aspect ratio (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=span, default="0-128", help="umT5 tokens that a prompt may have, EOS not counted (default: %(default)s)")
    parser.add_argument("--caption-tokens", type=span, default="128-256", help="the same for a caption (default: %(default)s)")
    parser.add_argument("--shard-clips", type=int, default=64, help="clips of a shard (default: %(default)s, about 300 MB)")
    parser.add_argument("--latents", choices=("normalised", "raw"), default="normalised", help="'raw' is for the published Uni-ViGU weights alone")
    flags = parser.parse_args(argv)
    flags.min_frames = flags.frames if flags.min_frames is None else flags.min_frames
    ordered = lambda pair: len(pair) == 2 and pair[0] <= pair[1]
    for name, good, wanted in (("frames", flags.frames % 4 == 1 and flags.frames > 0, "4n + 1 (1, 5, 9, ...)"),
                               ("min_frames", 1 <= flags.min_frames <= flags.frames, f"1 to {flags.frames}, the value of --frames"),
                               ("sizes", all(len(size) == 2 and 0 < min(size) <= max(size) < 10**4 and not any(n % 16 for n in size) for size in flags.sizes),
                                "ROWSxCOLUMNS, multiples of 16 below 10000: 8 pixels a latent, 2 latents a token"), ("out", flags.out, "the name of a folder"),
                               ("shard_clips", flags.shard_clips > 0, "at least 1"), ("prompt_tokens", ordered(flags.prompt_tokens), "LOW-HIGH"),
                               ("caption_tokens", ordered(flags.caption_tokens), "LOW-HIGH")):
        if not good:
            parser.error(f"--{name.replace('_', '-')} is {getattr(flags, name)!r}, wanted {wanted}")
    return flags


def run(name, function, flags):
    """function(flags), whose failures are one line that begins with `name`, and the process ends. Ctrl-C ends it with status 130."""
    try:
        function(flags)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        sys.exit(f"{name}: error: {error.name} is not installed: pip install -r requirements-wan.txt")
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"{name}: error: {one_line(error)}")


def main(argv=None):
    run("wan.prepare", prepare, parse(argv))


if __name__ == "__main__":
    main()
