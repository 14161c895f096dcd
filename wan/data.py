"""The real world as the training loop sees it: clips that wan/prepare.py encoded, read from shards one tensor at a time."""

import hashlib
import json
import math
import time
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from univigu import generate, joint, understand, uni_flow_loss

from .published import latents_of
from .weights import read_json

FORMAT = "uni-vigu clips 1"
PAD, EOS = 0, 1  # umT5's
MANIFEST = dict(text_len=int, prompt_len=int, prompt_dim=int, vocab_size=int, vocabulary=list, wan=str, latents=str, codec=str, prompt_encoder=str,
                buckets=dict, shards=dict)                          # what manifest.json has, none of it empty
FIELDS = ("z_v", "c", "prompt", "caption")  # a clip's tensors in a shard are named "LINE.FIELD", after its line of the index
DTYPES = [torch.float16, torch.bfloat16, torch.int32, torch.int32]
SPLITS = ("train", "val")
# The default of Wan2.1's own sampler: oversaturated, overexposed, static, blurred, subtitles, ... deformed hands, walking backwards.
NEGATIVE_PROMPT = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
                   "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


@contextmanager
def open_shard(path):
    """A shard's tensors, mapped while they are looked at. Raises ValueError where it is cut or damaged, FileNotFoundError where it is gone."""
    try:
        with safe_open(path, "pt") as shard:
            yield shard
    except SafetensorError as error:  # safetensors compares the file's size with its header
        raise ValueError(f"shard {path} has {path.stat().st_size} bytes and cannot be read ({error}): delete it and run wan.prepare again") from None


def read_header(path):
    """What a shard says of itself: dict(clips=[dict(line, video, size, z_v, cut), ...], vocabulary=[id, ...]). Raises ValueError, FileNotFoundError."""
    with open_shard(path) as shard:
        try:
            header = json.loads((shard.metadata() or {}).get("clips", "{}"))
            clips = [(int(clip["line"]), clip["video"].encode(), list(clip["size"])) for clip in header.get("clips", ())]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"shard {path} has a header that wan.prepare did not write: delete it and run wan.prepare again") from None
        missing = {f"{line}.{name}" for line, *_ in clips for name in FIELDS} - set(shard.keys())
    if header.get("format") != FORMAT:
        raise ValueError(f"shard {path} has format {header.get('format')!r}, wanted {FORMAT!r}")
    if missing:
        raise ValueError(f"shard {path} lacks {', '.join(sorted(missing))}")
    return header


def read_manifest(folder):
    """manifest.json of a prepared folder. Raises FileNotFoundError or ValueError where it is missing, damaged, of another format, or names files elsewhere."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, wanted a folder that wan.prepare finished")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, wanted {FORMAT!r}")
    for name, kind in MANIFEST.items():
        if not isinstance(manifest.get(name), kind) or not manifest[name]:
            raise ValueError(f"{path} has {name} {str(manifest.get(name))[:60]!r}, wanted what wan.prepare wrote")
    for name in manifest["shards"]:
        if Path(name).name != name:
            raise ValueError(f"{path} names the shard {name!r}, wanted a file of its own folder")
    try:
        numbers = [(*map(int, size.split("x")), *bucket["z_v"], bucket["clips"]) for size, bucket in manifest["buckets"].items()]
        numbers += [(shard["clips"], shard["bytes"]) for shard in manifest["shards"].values()]
        if {len(entry) for entry in numbers} != {2, 8} or any(type(n) is not int or n < 1 for entry in numbers for n in entry):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} has buckets and shards of another form than wan.prepare writes: run it again") from None
    return manifest


def held_out(videos):
    """Names of videos, one a clip -> those for validation: one in 50, at least one where there are over 10, chosen by the names' hashes."""
    names = sorted(set(videos), key=lambda video: hashlib.sha256(video.encode()).digest())
    return set(names[:max(len(names) // 50, int(len(names) > 10))])


@lru_cache(maxsize=64)
def shuffle(n, *seed):
    """A permutation of 0 .. n - 1, the same for the same seed."""
    number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:7], "big")
    return torch.randperm(n, generator=torch.Generator().manual_seed(number))


class Shards(Dataset):
    """The clips of a prepared folder. Only their places are kept in memory; a shard is mapped while a clip is read from it.

    A batch is made in one go and comes out collated: a DataLoader needs a batch sampler, see `batch`, and `collate_fn=lambda batch: batch`.
    `buckets`: the sizes "TxHxW" in pixels, `bucket` (clips,): each clip's. Token ids count through the tokens that occur in the data, in order, or,
    with full_vocabulary, are umT5's own. Split "val" is empty where there are no more than 10 videos. Raises FileNotFoundError or ValueError for a
    missing, cut or foreign file, here and when a clip is read, and for an unknown split.
    """

    def __init__(self, folder, *, seed=0, split="train", full_vocabulary=False):
        self.folder, self.seed, manifest = Path(folder), seed, read_manifest(folder)
        self.text_len, self.prompt_len = manifest["text_len"], manifest["prompt_len"]
        self.names, self.buckets = list(manifest["shards"]), list(manifest["buckets"])
        self.shapes, self.ids, self.prompt_dim = [bucket["z_v"] for bucket in manifest["buckets"].values()], set(manifest["vocabulary"]), manifest["prompt_dim"]
        self.vocabulary = None if full_vocabulary else torch.tensor(manifest["vocabulary"])
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
        places, videos = [], []
        for i, (name, wanted) in enumerate(manifest["shards"].items()):
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"shard {path} does not exist, wanted {wanted['clips']} clips there")
            if path.stat().st_size != wanted["bytes"]:
                raise ValueError(f"shard {path} has {path.stat().st_size} bytes, wanted {wanted['bytes']}: delete it and run wan.prepare again")
            for clip in read_header(path)["clips"]:
                if (size := "x".join(map(str, clip["size"]))) not in self.buckets:
                    raise ValueError(f"shard {path} has a clip of {size}, wanted one of {', '.join(self.buckets)}")
                places.append((i, clip["line"], self.buckets.index(size)))
                videos.append(clip["video"])
        if not videos:
            raise ValueError(f"{self.folder} holds no clips")
        val = held_out(videos)
        places = [place for place, video in zip(places, videos) if (video in val) == (split == "val")]
        self.shard, self.line, self.bucket = torch.tensor(places, dtype=torch.int64).reshape(-1, 3).unbind(1)
        self.members = [(self.bucket == b).nonzero().flatten() for b in range(len(self.buckets))]

    def __len__(self):
        return len(self.line)

    def batch(self, step, size):
        """The `size` indices of batch number `step`, all of one bucket: a function of (seed, step, size) alone.

        An epoch visits every clip once: each bucket shuffled and cut in batches, and the batches shuffled. Where a bucket's last batch is
        not full, the first clips of its next epoch fill it up.
        """
        batches = [math.ceil(len(clips) / size) for clips in self.members]
        epoch, position = divmod(step, sum(batches))
        i, b = shuffle(sum(batches), self.seed, epoch, "batches")[position].item(), 0
        while i >= batches[b]:
            i, b = i - batches[b], b + 1
        clips, n = self.members[b], len(self.members[b])
        return [clips[shuffle(n, self.seed, epoch + k // n, b)[k % n]].item() for k in range(i * size, (i + 1) * size)]

    def __getitems__(self, indices):
        """B indices of one bucket -> dict(z_v (B, C, F, H, W) float32, prompt and caption (B, N) int64, c (B, L, width) float32)."""
        found = {self.buckets[b] for b in self.bucket[list(indices)].tolist()}
        if len(found) != 1:
            raise ValueError(f"clips of one batch have sizes {', '.join(sorted(found))}, wanted one size")
        z_v, c, prompt, caption = zip(*map(self.read, indices))
        return {"z_v": torch.stack(z_v).float(),
                "prompt": torch.stack([self.tokens(ids) for ids in prompt]),
                "caption": torch.stack([self.tokens(ids) for ids in caption]),
                "c": torch.stack([F.pad(c_i.float(), (0, 0, 0, self.prompt_len - len(c_i))) for c_i in c])}

    def __getitem__(self, index):
        """One index -> the same dict without the batch axis."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def read(self, index):
        """A clip as it is stored: z_v (C, F, H, W) float16, c (its tokens, width) bfloat16, umT5's ids of prompt and caption, int32, with EOS."""
        path, line, shape = self.folder / self.names[self.shard[index]], self.line[index], self.shapes[self.bucket[index]]
        with open_shard(path) as shard:
            z_v, c, prompt, caption = clip = [shard.get_tensor(f"{line}.{name}") for name in FIELDS]
        good = [x.dtype for x in clip] == DTYPES and list(z_v.shape) == shape and list(c.shape[1:]) == [self.prompt_dim] and len(c) <= self.prompt_len
        if not good or not all(0 < len(ids) <= self.text_len + 1 and self.ids.issuperset(ids.flatten().tolist()) for ids in (prompt, caption)):
            found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in zip(FIELDS, clip))
            raise ValueError(f"shard {path}, line {line} of the index: {found}, wanted z_v {tuple(shape)}, c (at most {self.prompt_len}, {self.prompt_dim}), "
                             f"at most {self.text_len} ids of the manifest's vocabulary: delete it and run wan.prepare again")
        return clip

    def tokens(self, ids):
        """umT5's ids with EOS -> y (N,) int64, padded. A text of exactly N tokens has no room for EOS and goes without."""
        ids = ids.long() if self.vocabulary is None else torch.searchsorted(self.vocabulary, ids.long())
        return F.pad(ids[:self.text_len], (0, self.text_len - len(ids)), value=PAD) if len(ids) <= self.text_len else ids[:-1]


class World:
    """What the training loop and sample.py need of a world: the same face as toy.World, over a folder that wan.prepare wrote.

    `dataset(split)` of "train" or "val"; `shape` (C, F, H, W) and `frame_shape` (3, T, H, W) of the most frequent size; `text_len` N. `codec`,
    `prompt_encoder` and `tokenizer` are loaded when first used, from `wan` (default: what the data were prepared with), and refused unless they are
    the ones that prepared the data. full_vocabulary: V is umT5's vocabulary, not just the tokens that occur in the data. `sizes`: Config fields
    that the data decide; `state`: what a checkpoint stores to make this world again without the data, see `restore`; `shown`: what the last
    evaluation has to show beside its results, see pages.write_report.
    """

    shown: dict = {}
    fixed_size, fps, negative_prompt, endings = False, 16, NEGATIVE_PROMPT, (".mp4", ".mov", ".webm", ".gif")
    sampling = {"understand": dict(steps=50, guidance=1.0, reuse_video=True), "generate": dict(steps=50, guidance=5.0, shift=3.0),
                "joint": dict(steps=50, guidance=5.0, shift=3.0)}

    def __init__(self, folder, seed=0, wan=None, device="cpu", full_vocabulary=False):
        self.folder, self.seed, self.device, self.full_vocabulary = Path(folder), seed, torch.device(device), full_vocabulary
        self.manifest = read_manifest(folder)
        self.wan, self.text_len = wan or self.manifest["wan"], self.manifest["text_len"]
        size, bucket = max(self.manifest["buckets"].items(), key=lambda entry: entry[1]["clips"])
        self.shape, self.frame_shape = tuple(bucket["z_v"]), (3, *map(int, size.split("x")))
        self.vocab_size = self.manifest["vocab_size"] if full_vocabulary else len(self.manifest["vocabulary"])
        self.datasets = {}

    @property
    def sizes(self):
        return dict(vocab_size=self.vocab_size, text_len=self.text_len)

    @property
    def state(self):
        kept = ("codec", "prompt_encoder", "prompt_len", "prompt_dim", "latents", "text_len", "vocab_size")
        sizes = sorted({tuple(map(int, size.split("x")))[1:] for size in self.manifest["buckets"]})
        return {"world": "wan", "wan": str(self.wan), "shape": self.shape, "frame_shape": self.frame_shape, "frame_sizes": sizes,
                "vocabulary": None if self.full_vocabulary else self.manifest["vocabulary"], **{name: self.manifest[name] for name in kept}}

    @classmethod
    def restore(cls, state, device="cpu"):
        """The world of a checkpoint, without its data: codec, prompt encoder and tokenizer. state: `wan`, `latents`, `text_len`, `prompt_len`,
        `vocabulary` (None: all of umT5's); `shape` and `frame_shape` (default: 81 frames of 480 x 832); `codec` and `prompt_encoder`, fingerprints to insist on."""
        world = cls.__new__(cls)
        world.manifest, world.wan, world.device, world.text_len = state, state["wan"], torch.device(device), state["text_len"]
        world.frame_sizes = [tuple(size) for size in state.get("frame_sizes", [(480, 832), (832, 480)])]
        world.folder, world.full_vocabulary = "its checkpoint's data", state["vocabulary"] is None
        world.shape, world.frame_shape = tuple(state.get("shape", (16, 21, 60, 104))), tuple(state.get("frame_shape", (3, 81, 480, 832)))
        return world

    def read_video(self, path, frames, sizes):
        """A video file -> frames (1, 3, T, H, W) in [-1, 1], its first `frames`, retimed, resized and cropped as the training data to the one of `sizes`
        (H, W) whose aspect ratio is nearest. Raises FileNotFoundError or ValueError for a file that gives none."""
        from .prepare import DEMUXERS, read_clip

        if not Path(path).is_file():
            raise FileNotFoundError(f"video {path} does not exist")
        if Path(path).suffix.lower() not in DEMUXERS:
            raise ValueError(f"video {path} ends in {Path(path).suffix!r}, wanted one of {', '.join(DEMUXERS)}")
        try:
            clip, _ = read_clip(Path(path), sizes, frames, frames)
        except (ValueError, OSError) as error:
            raise ValueError(f"video {path} cannot be read: {error}") from None
        return rearrange(torch.from_numpy(clip), "t h w rgb -> 1 rgb t h w").float() / 127.5 - 1

    def dataset(self, split):
        """The clips of "train" or "val" as Shards."""
        if split not in self.datasets:
            self.datasets[split] = Shards(self.folder, seed=self.seed, split=split, full_vocabulary=self.full_vocabulary)
        return self.datasets[split]

    def check(self, config):
        """Raises ValueError, naming both values, where a model's Config does not fit the data."""
        for name, wanted in (("in_dim", self.shape[0]), ("out_dim", self.shape[0]), ("vocab_size", self.vocab_size), ("text_len", self.text_len),
                             ("prompt_dim", self.manifest["prompt_dim"]), ("prompt_len", self.manifest["prompt_len"]), ("latents", self.manifest["latents"])):
            found = latents_of(config) if name == "latents" else getattr(config, name)
            if found != wanted:
                raise ValueError(f"{name} is {found}, but the data {self.folder} has {wanted}")
        for bucket in self.manifest["buckets"].values():
            if any(size % patch for size, patch in zip(bucket["z_v"][1:], config.patch_size)):
                raise ValueError(f"patch_size is {config.patch_size}, but the data {self.folder} has latents of {tuple(bucket['z_v'][1:])}, wanted divisors")

    @cached_property
    def codec(self):
        from .codec import Codec

        return self.same("codec", Codec(self.wan, self.device, latents=self.manifest["latents"], offload=True))

    @cached_property
    def prompt_encoder(self):
        from .codec import PromptEncoder

        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return self.same("prompt_encoder", PromptEncoder(self.wan, self.device, dtype, length=self.manifest["prompt_len"], offload=True))

    @cached_property
    def tokenizer(self):
        from .codec import Tokenizer

        return Tokenizer(self.wan, length=self.text_len, vocabulary=None if self.full_vocabulary else self.manifest["vocabulary"])

    def same(self, name, part):
        """`part`, if it is the one that prepared the data; else ValueError."""
        if name in self.manifest and part.fingerprint != self.manifest[name]:
            raise ValueError(f"{name} of {self.wan} has fingerprint {part.fingerprint}, but {self.folder} was prepared with {self.manifest[name]}")
        return part

    @torch.no_grad()
    def evaluate(self, model, out, clips, elapsed, has_text, captions=2):
        """Held-out losses at fixed clocks and noise, a few captions beside the true ones, and a video drawn in each mode that draws; writes results.json, generate.mp4
        and joint.mp4 into `out`, and prints the results.

        clips: how many at most, of split "val", or of "train" where the data are too few to have one. Losses: mean squared velocity errors, one draw of
        independent clocks a clip, no prompt dropped. elapsed: seconds of training before. Returns results.
        """
        from sample import write_video

        begin, self.device = time.time(), next(model.parameters()).device
        device, generator = self.device, lambda: torch.Generator().manual_seed(self.seed)
        split = "val" if len(self.dataset("val")) else "train"
        data, losses, gallery = self.dataset(split), {}, []
        results = {"seed": self.seed, "split": split, "clips": min(clips, len(data)), "captions": []}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for i in range(results["clips"]):
                batch = {name: value.to(device) for name, value in data.__getitems__([i]).items()}
                for target in ("prompt", "caption") if has_text else (None,):
                    fixed = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
                    _, parts = uni_flow_loss(model, batch["z_v"], batch.get(target), batch["c"], generator=fixed)
                    for name in ("video", "text", "anchor") if target else ("video",):
                        losses.setdefault(f"{name} ({target})" if target else name, []).append(parts[name].item())
                if has_text and i < captions:
                    y_hat = understand(model, batch["z_v"], generator=generator(), **self.sampling["understand"])
                    written, wanted = self.tokenizer.decode(torch.cat([y_hat, batch["caption"]]).cpu())
                    results["captions"].append({"written": written, "wanted": wanted})
                    frames = self.codec.decode(batch["z_v"][:, :, :3].cpu())[0]     # the first nine: to decode all takes its time
                    gallery.append(dict(mode="understand", right=None, frames=frames, lines=[("wanted", wanted), ("the model wrote", written)]))
            first = {name: value.to(device) for name, value in data.__getitems__([0]).items()}
            shape = first["z_v"].shape[1:]
            drawn = {"generate": generate(model, first["caption"] if has_text else None, first["c"], shape, generator=generator(), **self.sampling["generate"])}
            if has_text:
                drawn["joint"], y_hat = joint(model, first["c"], shape, generator=generator(), **self.sampling["joint"])
                results["joint"] = self.tokenizer.decode(y_hat.cpu())[0]
        for mode, z_v in drawn.items():
            frames = self.codec.decode(z_v.cpu())
            write_video(Path(out) / f"{mode}.mp4", frames, self.fps)
            asked = self.tokenizer.decode(first["caption" if has_text and mode == "generate" else "prompt"].cpu())[0]
            wrote = [("the model wrote", results["joint"])] if mode == "joint" else []
            gallery.append(dict(mode=mode, right=None, frames=frames[0], lines=[("asked", asked), *wrote]))
        self.shown = {"gallery": gallery}
        results["loss"] = {split: {name: round(sum(values) / len(values), 6) for name, values in losses.items()}}
        results["train_s"], results["wall_s"] = round(elapsed, 1), round(elapsed + time.time() - begin, 1)
        part = Path(out) / "results.json.part"
        part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        part.replace(part.with_suffix(""))
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return results
