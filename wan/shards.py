"""Clips that wan/prepare.py encoded: the files they are in, and a Dataset that reads from them."""

import hashlib
import json
import math
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from engine.files import read_json

FORMAT = "uni-vigu clips 1"
SPLITS = ("train", "val")
PAD, EOS = 0, 1  # umT5's

# A clip's tensors in a shard are named "LINE.FIELD", LINE being its line of the index.
DTYPES = {
    "z_v": torch.float16,
    "c": torch.bfloat16,
    "prompt": torch.int32,
    "caption": torch.int32,
}
FIELDS = tuple(DTYPES)
NEGATIVE = "negative.safetensors"  # the embedding of what guidance leads away from, by default
AGAIN = "delete it and run wan.prepare again"

# What manifest.json holds, none of it empty.
MANIFEST = {
    "text_len": int,
    "prompt_len": int,
    "prompt_dim": int,
    "vocab_size": int,
    "vocabulary": list,
    "wan": str,
    "latents": str,
    "codec": str,
    "prompt_encoder": str,
    "buckets": dict,
    "shards": dict,
}
TEXTS = ["prompt", "caption"]  # where an older manifest does not say


class Clip(NamedTuple):
    """A clip as it is stored; prompt and caption are umT5's ids with EOS, int32. A set of clips
    without captions has None there."""

    z_v: torch.Tensor  # (C, F, H, W) float16
    c: torch.Tensor  # (tokens of the prompt, width) bfloat16
    prompt: torch.Tensor  # (tokens,)
    caption: torch.Tensor | None = None  # (tokens,)


# ---------------------------------------------------------------- the files


@contextmanager
def open_shard(path):
    """A shard's tensors, mapped while they are looked at.

    Raises ValueError where it is cut or damaged, FileNotFoundError where it is gone.
    """
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except SafetensorError as error:  # safetensors compares the file's size with its header
        size = path.stat().st_size
        message = f"shard {path} has {size} bytes and cannot be read ({error}): {AGAIN}"
        raise ValueError(message) from None


def read_header(path):
    """What a shard says of itself.

    A dict of "clips", a list of {"line", "video", "size", "z_v", "cut"}, "vocabulary", the token
    ids that occur, and, where clips have no captions, "fields", what they have.

    Raises ValueError, FileNotFoundError as open_shard.
    """
    with open_shard(path) as shard:
        stored, names = shard.metadata() or {}, set(shard.keys())
    try:
        header = json.loads(stored.get("clips", "{}"))
        lines = {check_clip(clip) for clip in header.get("clips", ())}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        message = f"shard {path} has a header that wan.prepare did not write: {AGAIN}"
        raise ValueError(message) from None
    if header.get("format") != FORMAT:
        raise ValueError(f"shard {path} has format {header.get('format')!r}, wanted {FORMAT!r}")
    fields = header.get("fields", FIELDS)
    if missing := {f"{line}.{name}" for line in lines for name in fields} - names:
        raise ValueError(f"shard {path} lacks {', '.join(sorted(missing))}")
    return header


def check_clip(clip):
    """A clip's line, an int. Raises one of many errors for what does not describe a clip."""
    clip["video"].encode()
    list(clip["size"])
    return int(clip["line"])


def read_manifest(folder):
    """manifest.json of a prepared folder.

    Raises FileNotFoundError where it is missing, ValueError where it is damaged, of another format,
    or names files elsewhere.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, wanted a folder that wan.prepare finished")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, wanted {FORMAT!r}")
    for name, kind in MANIFEST.items():
        value = manifest.get(name)
        if not isinstance(value, kind) or not value:
            raise ValueError(
                f"{path} has {name} {str(value)[:60]!r}, wanted what wan.prepare wrote"
            )
    if manifest.setdefault("texts", TEXTS) not in (TEXTS, TEXTS[:1]):
        raise ValueError(f"{path} has texts {manifest['texts']!r}, wanted {TEXTS} or {TEXTS[:1]}")
    for name in manifest["shards"]:
        if Path(name).name != name:
            raise ValueError(f"{path} names the shard {name!r}, wanted a file of its own folder")
    if not well_formed(manifest):
        raise ValueError(
            f"{path} has buckets and shards of another form, wanted what wan.prepare writes: "
            "run it again"
        )
    return manifest


def well_formed(manifest):
    """Whether a manifest's buckets and shards hold the positive integers that they should."""
    try:
        for size, bucket in manifest["buckets"].items():
            t, h, w = map(int, size.split("x"))
            c, f, rows, columns = bucket["z_v"]
            if not positive(t, h, w, c, f, rows, columns, bucket["clips"]):
                return False
        return all(positive(s["clips"], s["bytes"]) for s in manifest["shards"].values())
    except (ValueError, LookupError, TypeError):
        return False


def positive(*numbers):
    return all(type(n) is int and n > 0 for n in numbers)


# ---------------------------------------------------------------- the dataset


def held_out(videos):
    """Names of videos, one a clip -> those for validation, chosen by the names' hashes.

    One in 50, and at least one where there are over 10.
    """

    def by_hash(video):
        return hashlib.sha256(video.encode()).digest()

    names = sorted(set(videos), key=by_hash)
    return set(names[: max(len(names) // 50, int(len(names) > 10))])


@lru_cache(maxsize=64)
def shuffle(n, *seed):
    """A permutation of 0 .. n - 1, the same for the same seed."""
    number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:7], "big")
    return torch.randperm(n, generator=torch.Generator().manual_seed(number))


class Shards(Dataset):
    """The clips of a prepared folder.

    Only their places are kept in memory; a shard is mapped while a clip is read from it. A batch is
    made in one go and comes out collated: a DataLoader needs a batch sampler, see `batch`, and a
    collate_fn that changes nothing. `buckets`: the sizes "TxHxW" in pixels, `bucket` (clips,): each
    clip's; `digest` changes with what is in a batch. Token ids count through `vocabulary`, umT5's
    ids in order, default: those that occur in the data; with full_vocabulary they are umT5's own.
    Split "val" is empty where there are no more than 10 videos.

    Raises FileNotFoundError or ValueError for a missing, cut or foreign file, here and when a clip
    is read, and for an unknown split.
    """

    def __init__(self, folder, *, seed=0, split="train", full_vocabulary=False, vocabulary=None):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
        manifest = read_manifest(folder)
        self.folder, self.seed = Path(folder), seed
        self.text_len = manifest["text_len"]
        self.prompt_len, self.prompt_dim = manifest["prompt_len"], manifest["prompt_dim"]
        self.names = list(manifest["shards"])
        self.buckets = list(manifest["buckets"])
        self.shapes = [bucket["z_v"] for bucket in manifest["buckets"].values()]
        self.ids = set(manifest["vocabulary"])
        known = vocabulary or manifest["vocabulary"]
        self.vocabulary = None if full_vocabulary else torch.tensor(known)
        self.fields = ("z_v", "c", *manifest["texts"])

        places, videos = self.find_clips(manifest["shards"])
        val = held_out(videos)
        chosen = [
            place for place, video in zip(places, videos) if (video in val) == (split == "val")
        ]
        columns = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3).unbind(1)
        self.shard, self.line, self.bucket = columns  # (clips,) each
        said = [manifest.get("index"), self.buckets, self.line.tolist(), self.bucket.tolist()]
        self.digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        self.members = [(self.bucket == b).nonzero().flatten() for b in range(len(self.buckets))]

    def find_clips(self, shards):
        """The manifest's shards -> the place of every clip, and the name of its video.

        A place is the number of a shard, a line of the index and the number of a bucket.
        """
        places, videos = [], []
        for i, (name, wanted) in enumerate(shards.items()):
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"shard {path} does not exist, wanted {wanted['clips']} clips there"
                )
            size = path.stat().st_size
            if size != wanted["bytes"]:
                raise ValueError(
                    f"shard {path} has {size} bytes, wanted {wanted['bytes']}: {AGAIN}"
                )
            for clip in read_header(path)["clips"]:
                size = "x".join(map(str, clip["size"]))
                if size not in self.buckets:
                    raise ValueError(
                        f"shard {path} has a clip of {size}, wanted one of "
                        f"{', '.join(self.buckets)}"
                    )
                places.append((i, clip["line"], self.buckets.index(size)))
                videos.append(clip["video"])
        if not places:
            raise ValueError(f"{self.folder} holds no clips, wanted some")
        return places, videos

    def __len__(self):
        return len(self.line)

    def batch(self, step, size):
        """The `size` indices of batch number `step`, all of one bucket.

        A function of (seed, step, size) alone. An epoch visits every clip once: each bucket is
        shuffled and cut in batches, and the batches are shuffled. Where a bucket's last batch is
        not full, the first clips of its next epoch fill it up.
        """
        batches = [math.ceil(len(clips) / size) for clips in self.members]
        epoch, position = divmod(step, sum(batches))
        i, b = shuffle(sum(batches), self.seed, epoch, "batches")[position].item(), 0
        while i >= batches[b]:
            i, b = i - batches[b], b + 1
        clips, indices = self.members[b], []
        for k in range(i * size, (i + 1) * size):
            more, k = divmod(k, len(clips))
            indices.append(clips[shuffle(len(clips), self.seed, epoch + more, b)[k]].item())
        return indices

    def __getitems__(self, indices):
        """B indices of one bucket -> a batch.

        A dict of z_v (B, C, F, H, W) float32, c (B, L, width) float32, prompt and, where there are
        captions, caption (B, N) int64.
        """
        found = {self.buckets[b] for b in self.bucket[list(indices)].tolist()}
        if len(found) != 1:
            raise ValueError(
                f"clips of one batch have sizes {', '.join(sorted(found))}, wanted one size"
            )
        clips = [self.read(index) for index in indices]
        texts = {
            name: torch.stack([self.tokens(getattr(clip, name)) for clip in clips])
            for name in self.fields[2:]
        }
        return {
            "z_v": torch.stack([clip.z_v for clip in clips]).float(),
            "c": torch.stack([self.padded(clip.c) for clip in clips]),
            **texts,
        }

    def __getitem__(self, index):
        """One index -> the same dict without the batch axis."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def read(self, index):
        """A clip as it is stored. Raises ValueError for tensors of other shapes or dtypes."""
        path, line = self.folder / self.names[self.shard[index]], self.line[index]
        with open_shard(path) as shard:
            clip = Clip(*(shard.get_tensor(f"{line}.{name}") for name in self.fields))
        shape = self.shapes[self.bucket[index]]
        if not self.fits(clip, shape):
            parts = zip(self.fields, clip)
            found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in parts)
            raise ValueError(
                f"shard {path}, line {line} of the index: {found}, wanted z_v {tuple(shape)}, "
                f"c (at most {self.prompt_len}, {self.prompt_dim}), at most {self.text_len} ids "
                f"of the manifest's vocabulary: {AGAIN}"
            )
        return clip

    def fits(self, clip, shape):
        """Whether a clip holds what the manifest says. shape: its z_v's."""
        z_v, c, *texts = clip[: len(self.fields)]
        dtypes = [DTYPES[name] for name in self.fields]
        if [x.dtype for x in (z_v, c, *texts)] != dtypes or list(z_v.shape) != shape:
            return False
        if list(c.shape[1:]) != [self.prompt_dim] or len(c) > self.prompt_len:
            return False
        return all(
            0 < len(ids) <= self.text_len + 1 and self.ids.issuperset(ids.flatten().tolist())
            for ids in texts
        )

    def padded(self, c):
        """c (tokens, width) -> (L, width) float32."""
        return F.pad(c.float(), (0, 0, 0, self.prompt_len - len(c)))

    def tokens(self, ids):
        """umT5's ids with EOS -> y (N,) int64, padded.

        A text of exactly N tokens has no room for EOS and goes without.
        """
        ids = ids.long()
        if self.vocabulary is not None:
            ids = torch.searchsorted(self.vocabulary, ids)
        ids = ids[: self.text_len]
        return F.pad(ids, (0, self.text_len - len(ids)), value=PAD)
