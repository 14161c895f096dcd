"""Prepares real data: videos, prompts and captions -> latents, prompt embeddings and token ids.

    python -m wan.prepare --videos DIR --index index.jsonl --out data/clips
    torchrun --nproc-per-node 8 -m wan.prepare --videos DIR --index index.jsonl --out data/clips

A row of the index is {"video": "a/b.mp4", "prompt": "...", "caption": "..."}, the video relative to
DIR: .mp4, .mov, .webm, .mkv, .avi, .gif, .npy, a folder of PNG or JPEG frames, or one image as a
video of one frame. Clips of an index without any caption serve stage recall alone. Videos are
retimed to 16 fps, resized and centre-cropped to the size of nearest aspect ratio, and give their
first --frames frames, or the nearest 4n + 1 below where they are shorter. "window": 2 in a row
takes the third --frames frames instead, see --window of wan.caption. Rows that cannot be used are
listed with their reason in rejected.jsonl. A run that was stopped goes on when started again; with
torchrun every rank takes its share of the rows.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from engine.files import (
    alone,
    append_line,
    atomic,
    check_writable,
    one_line,
    read_json,
    write_json,
)
from engine.options import run_command
from engine.threads import ahead
from engine.video import FPS, read_clip, to_frames

from .data import NEGATIVE_PROMPT
from .flags import (
    FRAMES,
    SPAN,
    WAN,
    at_least,
    checked,
    failing_in_one_line,
    integer_pair,
    make_parser,
    named,
)
from .index import REJECTED, find_video, has_field, read_index, read_lines, write_lines
from .shards import EOS, FIELDS, FORMAT, NEGATIVE, PAD, TEXTS, read_header

if TYPE_CHECKING:
    from .codec import Codec, PromptEncoder, Tokenizer

# ---------------------------------------------------------------- what is written


class Part:
    """What one rank writes: shard-RRRR-NNNNN.safetensors and rejected-RRRR.jsonl.

    `done`: the lines of the index that are in them already. size: clips of a shard.
    """

    def __init__(self, out, rank, size):
        self.out, self.rank, self.size = out, rank, size
        self.clips, self.tensors = [], {}  # those that wait for their shard
        self.rejected = out / f"rejected-{rank:04d}.jsonl"
        rejected = read_lines(self.rejected, REJECTED)
        write_lines(self.rejected, rejected)
        headers = map(read_header, out.glob(f"shard-{rank:04d}-*.safetensors"))
        self.done = {clip["line"] for header in headers for clip in header["clips"]}
        self.done |= {row["line"] for row in rejected}

    def reject(self, line, video, reason):
        append_line(self.rejected, {"line": line, "video": video, "reason": one_line(reason)})

    def add(self, clip, tensors):
        """clip: what the header says of it; tensors: its fields by name."""
        self.clips.append(clip)
        self.tensors |= {f"{clip['line']}.{name}": tensor for name, tensor in tensors.items()}
        if len(self.clips) == self.size:
            self.flush()

    def flush(self):
        """Writes the clips that wait as one shard."""
        if self.clips:
            names = (f"shard-{self.rank:04d}-{i:05d}.safetensors" for i in count())
            path = next(self.out / name for name in names if not (self.out / name).exists())
            texts = (".prompt", ".caption")
            ids = [tensor for name, tensor in self.tensors.items() if name.endswith(texts)]
            vocabulary = torch.cat(ids).unique().tolist()
            fields = [name for name in FIELDS if any(n.endswith(f".{name}") for n in self.tensors)]
            header = {"format": FORMAT, "clips": self.clips, "vocabulary": vocabulary}
            header |= {} if fields == list(FIELDS) else {"fields": fields}
            write_shard(path, self.tensors, header)
            self.clips, self.tensors = [], {}


def write_shard(path, tensors, header):
    """A shard, complete or not there at all. Raises OSError where it cannot be written."""
    with atomic(path) as part:
        try:
            save_file(tensors, part, metadata={"clips": json.dumps(header)})
        except SafetensorError as error:
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"{one_line(error)} ({free:,} bytes were free)") from None
        # safetensors lets nobody else read its files
        shutil.copymode(path.with_name("settings.json"), part)


def write_shared(path, write, value):
    """write(path, value) of a file that several ranks may write at the same time, all alike."""
    own = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}")
    write(own, value)
    own.replace(path)


def begin(out, settings):
    """Makes `out` and notes the settings there.

    Raises ValueError where it holds data of other settings.
    """
    path = out / "settings.json"
    stored = read_json(path) if path.exists() else settings
    for name, value in settings.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but {out} was begun with {stored.get(name)!r}, "
                "wanted the same, or another --out"
            )
    write_shared(path, write_json, settings)


def merge(out, settings, rows, wan, prompts):
    """Writes rejected.jsonl, manifest.json and the negative prompt's embedding, from what all ranks
    wrote and by the prompt encoder, and prints their counts.

    Does nothing while some of the `rows` rows are missing. Raises ValueError where no clip was
    accepted.
    """
    headers = {path: read_header(path) for path in sorted(out.glob("shard-*.safetensors"))}
    clips = [clip for header in headers.values() for clip in header["clips"]]
    parts = [read_lines(path, REJECTED) for path in out.glob("rejected-*.jsonl")]
    rejected = sorted((row for part in parts for row in part), key=line_of)
    if sorted(map(line_of, clips + rejected)) != list(range(1, rows + 1)):
        done = len(clips) + len(rejected)
        print(f"{done} of {rows} rows are done; the last rank to finish writes the manifest")
        return
    write_shared(out / "rejected.jsonl", write_lines, rejected)
    if not clips:
        raise ValueError(
            f"all {rows} rows were rejected, line 1 because: {rejected[0]['reason']}; "
            f"see {out / 'rejected.jsonl'}"
        )
    manifest = {"texts": TEXTS} | settings | counted(headers, clips, rejected, wan)
    write_shared(out / NEGATIVE, save_negative, prompts)
    write_shared(out / "manifest.json", write_json, manifest)
    of_sizes = (f"{bucket['clips']} of {size}" for size, bucket in manifest["buckets"].items())
    print(
        f"{len(clips)} clips in {len(headers)} shards ({', '.join(of_sizes)}), "
        f"{manifest['cut']} of them cut to their first frames, 4n + 1 and at most "
        f"{settings['frames']}; "
        f"{len(manifest['vocabulary'])} tokens occur"
    )
    print(f"{len(rejected)} rows rejected, see {out / 'rejected.jsonl'}")
    if "caption" not in manifest["texts"]:
        print("no row has a caption: these clips serve stage recall alone (--recall-data)")


def save_negative(path, prompts):
    with atomic(path) as part:
        save_file({"c": embed(NEGATIVE_PROMPT, prompts)}, part)
        shutil.copymode(path.with_name("settings.json"), part)


def line_of(row):
    return row["line"]


def counted(headers, clips, rejected, wan):
    """What the manifest says of the clips. headers: path of a shard -> its header."""
    buckets = Counter(("x".join(map(str, clip["size"])), *clip["z_v"]) for clip in clips)
    vocabularies = (header["vocabulary"] for header in headers.values())
    return {
        "wan": wan,
        "clips": len(clips),
        "rejected": len(rejected),
        "cut": sum(clip["cut"] for clip in clips),
        "buckets": {size: {"clips": n, "z_v": z_v} for (size, *z_v), n in sorted(buckets.items())},
        "shards": {
            path.name: {"clips": len(header["clips"]), "bytes": path.stat().st_size}
            for path, header in headers.items()
        },
        "vocabulary": sorted({PAD, EOS}.union(*vocabularies)),
    }


# ---------------------------------------------------------------- from a row to a clip


@dataclass
class Encoders:
    """What turns a row into a clip's tensors."""

    codec: "Codec"
    prompts: "PromptEncoder"
    tokenizer: "Tokenizer"
    limits: dict[str, tuple[int, int]]  # tokens that "prompt" and "caption" may have, without EOS


def load_encoders(flags, local_rank):
    """Wan's parts, in fp32 on a CPU. Raises ValueError where --prompt-tokens allows too many."""
    # Here, for it takes seconds: --help and bad flags need not wait. Of av, only that it is there.
    import av  # noqa: F401

    from .codec import Codec, PromptEncoder, Tokenizer

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    tokenizer = Tokenizer(flags.wan)
    codec = Codec(flags.wan, device, latents=flags.latents, tiling=are_large(flags.sizes))
    prompts = PromptEncoder(flags.wan, device)
    limits = {"prompt": flags.prompt_tokens, "caption": flags.caption_tokens}
    _, most = flags.prompt_tokens
    if most >= prompts.length:
        raise ValueError(
            f"--prompt-tokens allows {most}, wanted under {prompts.length}, "
            "the length of a prompt embedding"
        )
    return Encoders(codec, prompts, tokenizer, limits)


def are_large(sizes):
    """Whether a VAE in fp32 should work in tiles: frames above 480 x 832 may not fit."""
    return any(rows * columns > 480 * 832 for rows, columns in sizes)


def check_tokens(tokenizer, limits, *texts):
    """Prompt and, where there is one, caption -> umT5's ids of each with EOS, int32.

    Raises ValueError for one whose tokens, EOS not counted, are too few or too many.
    """
    found = [torch.tensor(tokenizer.ids(text), dtype=torch.int32) for text in texts]
    for ids, (name, (low, high)) in zip(found, limits.items()):
        n = len(ids) - 1
        if not low <= n <= high:
            raise ValueError(f"{name} has {n} tokens, wanted {low} to {high}")
    return found


def embed(prompt, prompts):
    """A prompt's c (tokens, width) bfloat16, on the CPU, without what follows its end."""
    c = prompts([prompt])[0]
    return c[: max(1, int(c.any(-1).sum()))].bfloat16().cpu().contiguous()


def encode(pixels, prompt, tokens, codec, prompts):
    """Pixels (T, H, W, 3) uint8, and a prompt of so many tokens with EOS, as they are stored.

    Returns z_v (C, F, H, W) float16, c (tokens, width) bfloat16. Raises ValueError unless both are
    finite.
    """
    z_v = codec.encode(to_frames(pixels))[0].half()
    c = embed(prompt, prompts)[:tokens]
    for name, tensor in (("latent", z_v), ("prompt embedding", c)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return z_v.cpu().contiguous(), c.cpu().contiguous()


# ---------------------------------------------------------------- the run


def prepare(flags):
    """One rank's share of the index: rank r of n takes the lines whose number is r modulo n."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    videos, out = Path(flags.videos), Path(flags.out)
    if not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos} is no folder")
    index = read_index(flags.index, ("video", "prompt"))
    captioned = has_field(flags.index, "caption")
    if captioned:
        index = read_index(flags.index, ("video", *TEXTS))
    check_writable(out / "manifest.json")
    encoders = load_encoders(flags, int(os.environ.get("LOCAL_RANK", 0)))
    texts = TEXTS if captioned else TEXTS[:1]
    settings = settings_of(flags, index, ranks, encoders, texts)
    begin(out, settings)
    part = Part(out, rank, flags.shard_clips)

    mine = [line for line in index.lines() if line % ranks == rank]
    todo = reject_texts([line for line in mine if line not in part.done], index, part, encoders)

    def read(line):
        video, *_, window = index.rows[line]
        pixels, goes_on = read_clip(
            find_video(videos, video), flags.sizes, flags.frames, window or 0
        )
        if len(pixels) < flags.min_frames:
            found = f"video gives {len(pixels)} frames at {FPS} fps"
            raise ValueError(f"{found}, wanted {flags.min_frames}, as --min-frames says")
        return pixels, goes_on and window is None

    clips = ahead(read, todo, min(4, os.cpu_count() or 1))
    disable = None if rank == 0 else True  # None: where there is no terminal
    done = len(mine) - len(todo)
    bar = tqdm(clips, total=len(mine), initial=done, unit="row", disable=disable)
    for line, clip in bar:
        try:
            described, tensors = make_clip(line, index.rows[line], clip, encoders)
        except (ValueError, OSError) as error:
            part.reject(line, index.video(line), error)
        else:
            part.add(described, tensors)
    part.flush()
    wan = Path(flags.wan)
    name = str(wan.absolute()) if wan.exists() else flags.wan
    merge(out, settings, len(index.lines()), name, encoders.prompts)


def settings_of(flags, index, ranks, encoders, texts):
    """All that decides what a clip becomes; tuples as lists, as JSON has them."""
    prompts = encoders.prompts
    settings = {
        "format": FORMAT,
        "index": index.digest,
        "ranks": ranks,
        "fps": FPS,
        "frames": flags.frames,
        "min_frames": flags.min_frames,
        "sizes": flags.sizes,
        "prompt_tokens": flags.prompt_tokens,
        "caption_tokens": flags.caption_tokens,
        "shard_clips": flags.shard_clips,
        "latents": flags.latents,
        "codec": encoders.codec.fingerprint,
        "prompt_encoder": prompts.fingerprint,
        "prompt_dim": prompts.width,
        "prompt_len": prompts.length,
        "text_len": max(high for _, high in encoders.limits.values()),
        "vocab_size": len(encoders.tokenizer),
    }
    settings |= {} if texts == TEXTS else {"texts": texts}  # as the present format has it
    return json.loads(json.dumps(settings))


def reject_texts(lines, index, part, encoders):
    """Rejects the lines whose text cannot be used, before any video is read; returns the others."""
    good = []
    for line in lines:
        try:
            _, *texts, _ = index.row(line)
            check_tokens(encoders.tokenizer, encoders.limits, *texts)
        except ValueError as error:
            part.reject(line, index.video(line), error)
        else:
            good.append(line)
    return good


def make_clip(line, row, clip, encoders):
    """A row and the future of its video -> what the shard's header says of it, and its tensors.

    Raises ValueError or OSError for what cannot be used.
    """
    video, *texts, _ = row
    pixels, cut = clip.result()
    ids = check_tokens(encoders.tokenizer, encoders.limits, *texts)
    z_v, c = encode(pixels, texts[0], len(ids[0]), encoders.codec, encoders.prompts)
    t, h, w, _ = pixels.shape
    told = {"line": line, "video": video, "size": [t, h, w], "z_v": list(z_v.shape), "cut": cut}
    return told, {"z_v": z_v, "c": c, **dict(zip(TEXTS, ids))}


# ---------------------------------------------------------------- the command


def parse_sizes(text):
    """ "480x832,832x480" -> [(480, 832), (832, 480)]."""
    return [integer_pair(size, "x") for size in text.split(",")]


def fit_tokens(sizes):
    return all(0 < n < 10**4 and n % 16 == 0 for size in sizes for n in size)


SIZES = checked(
    parse_sizes,
    fit_tokens,
    "ROWSxCOLUMNS, multiples of 16 below 10000: 8 pixels a latent, 2 latents a token",
)


def parse(argv):
    parser = make_parser("wan.prepare", __doc__)
    add = parser.add_argument
    add("--videos", required=True, help="folder of the videos")
    add(
        "--index",
        required=True,
        help="JSONL file, a row {video, prompt, caption} a line; captions in all rows, or in none",
    )
    add(
        "--out",
        type=named("a folder"),
        required=True,
        help="folder for shards, manifest.json and rejected.jsonl",
    )
    add(
        "--wan",
        default=WAN,
        help="folder or hub id with Wan's VAE, umT5 and tokenizer (default: %(default)s)",
    )
    add(
        "--frames",
        type=FRAMES,
        default=81,
        help="frames of a clip at 16 fps, 4n + 1 (default: %(default)s)",
    )
    add(
        "--min-frames",
        type=at_least(1),
        default=1,
        help="reject videos that give fewer frames (default: %(default)s)",
    )
    add(
        "--sizes",
        type=SIZES,
        default="480x832,832x480",
        help="rows x columns; a clip gets that of the nearest aspect ratio (default: %(default)s)",
    )
    add(
        "--prompt-tokens",
        type=SPAN,
        default="0-128",
        help="umT5 tokens that a prompt may have, EOS not counted (default: %(default)s)",
    )
    add(
        "--caption-tokens",
        type=SPAN,
        default="128-256",
        help="the same for a caption (default: %(default)s)",
    )
    add(
        "--shard-clips",
        type=at_least(1),
        default=64,
        help="clips of a shard (default: %(default)s, about 300 MB)",
    )
    add(
        "--latents",
        choices=("normalised", "raw"),
        default="normalised",
        help="'raw' is for the published Uni-ViGU weights alone",
    )
    flags = parser.parse_args(argv)
    if flags.min_frames > flags.frames:
        wanted = f"1 to {flags.frames}, the value of --frames"
        parser.error(f"--min-frames is {flags.min_frames}, wanted {wanted}")
    return flags


def main(argv=None):
    flags = parse(argv)
    lock = Path(flags.out, f".lock-{os.environ.get('RANK', 0)}")
    with failing_in_one_line("wan.prepare"), alone(lock, flags.out):
        prepare(flags)


if __name__ == "__main__":
    run_command(main)
