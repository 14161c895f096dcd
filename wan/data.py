"""The real world: a folder of clips that wan/prepare.py wrote, and the parts of Wan that it needs.

The codec, prompt encoder and tokenizer are imported only where they are used: they need
requirements-wan.txt.
"""

from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.video import FPS
from engine.world import checked_sampling, in_turn

from .published import latents_of
from .shards import NEGATIVE, Shards, open_shard, read_manifest
from .validation import evaluate

# The default of Wan2.1's own sampler: oversaturated, overexposed, static, blurred, subtitles, ...
# deformed hands, walking backwards.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
# What a checkpoint of Wan alone does not say: 81 frames of 480 x 832, lying or standing.
WANS_OWN = {
    "shape": (16, 21, 60, 104),
    "frame_shape": (3, 81, 480, 832),
    "frame_sizes": [(480, 832), (832, 480)],
}


class World:
    """The real world as train.py and sample.py see it; see engine.world.World.

    `shape` and `frame_shape` are those of the most frequent size. `codec`, `prompt_encoder` and
    `tokenizer` are loaded when first used, from `wan` (default: what the data were prepared with),
    and refused unless they are the ones that prepared the data. full_vocabulary: V is umT5's whole
    vocabulary, not just the tokens that occur in the data and in those of the folders `also`.
    """

    fixed_size = False
    fps = FPS
    negative_prompt = NEGATIVE_PROMPT
    sampling: dict = {
        "understand": {"steps": 50, "guidance": 1.0, "reuse_video": True},
        "generate": {"steps": 50, "guidance": 5.0, "shift": 3.0},
        "joint": {"steps": 50, "guidance": 5.0, "shift": 3.0},
    }

    def __init__(self, folder, seed=0, wan=None, device="cpu", full_vocabulary=False, also=()):
        manifest, others = read_manifest(folder), [read_manifest(other) for other in also]
        tokens = {token for of in (manifest, *others) for token in of["vocabulary"]}
        vocabulary = None if full_vocabulary else sorted(tokens)
        self.adopt(state_of(manifest, wan, vocabulary), Path(folder), device)
        self.seed, self.texts = seed, tuple(manifest["texts"])
        self.shapes = [tuple(bucket["z_v"]) for bucket in manifest["buckets"].values()]

    @classmethod
    def restore(cls, state, device="cpu"):
        """The world of a checkpoint, without its data: codec, prompt encoder and tokenizer.

        state: what World.state was, or at least "wan", "latents", "text_len", "prompt_len" and
        "vocabulary" (None: all of umT5's).
        """
        world = cls.__new__(cls)
        world.adopt(WANS_OWN | state, "its checkpoint's data", device)
        world.seed, world.shapes, world.texts = 0, [world.shape], ()
        return world

    def adopt(self, state, source, device):
        """Sets what a state says. source: what messages call the data."""
        self.stored, self.source, self.device = state, source, torch.device(device)
        self.sampling = checked_sampling(state.get("sampling"), self.sampling)
        self.wan, self.vocabulary = state["wan"], state["vocabulary"]
        self.shape, self.frame_shape = tuple(state["shape"]), tuple(state["frame_shape"])
        self.frame_sizes = [tuple(size) for size in state["frame_sizes"]]
        self.text_len = state["text_len"]
        self.datasets: dict[str, Shards] = {}

    @property
    def state(self):
        """What a checkpoint stores."""
        return self.stored | {"sampling": self.sampling}

    @property
    def vocab_size(self):
        """V, the tokens that the model may write."""
        return len(self.vocabulary) if self.vocabulary else self.state["vocab_size"]

    @property
    def sizes(self):
        return {"vocab_size": self.vocab_size, "text_len": self.text_len}

    def dataset(self, split):
        """The clips of "train" or "val" as Shards."""
        if split not in self.datasets:
            self.datasets[split] = Shards(
                self.source,
                seed=self.seed,
                split=split,
                full_vocabulary=self.vocabulary is None,
                vocabulary=self.vocabulary,
            )
        return self.datasets[split]

    def check(self, config):
        """Raises ValueError, naming both values, where a model's config does not fit the data."""
        wanted = {
            "in_dim": self.shape[0],
            "out_dim": self.shape[0],
            "vocab_size": self.vocab_size,
            "text_len": self.text_len,
            "prompt_dim": self.state["prompt_dim"],
            "prompt_len": self.state["prompt_len"],
            "latents": self.state["latents"],
        }
        found = {**vars(config), "latents": latents_of(config)}
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(
                    f"{name} is {found[name]}, wanted {value}, as the data {self.source} has"
                )
        for _, *grid in self.shapes:
            if any(size % patch for size, patch in zip(grid, config.patch_size)):
                raise ValueError(
                    f"patch_size is {config.patch_size}, but the data {self.source} has latents of "
                    f"{tuple(grid)}, wanted divisors"
                )

    def options(self, mode, shape):
        """See engine.world.World; above 480 x 832 Wan's own shift for larger videos."""
        options = dict(self.sampling[mode])
        large = shape[-2] * shape[-1] > 60 * 104
        if mode == "generate" and large and self.sampling == type(self).sampling:
            options["shift"] = 5.0
        return options

    @cached_property
    def c_null(self):
        """What guidance contrasts with in an evaluation, (1, L, width): the negative prompt, as
        wan.prepare embedded it; zeros where older data lack it."""
        c, file = torch.zeros(1, 0, self.state["prompt_dim"]), Path(self.source, NEGATIVE)
        if file.is_file():
            with open_shard(file) as stored:
                c = stored.get_tensor("c")[None].float()
        return F.pad(c, (0, 0, 0, self.state["prompt_len"] - c.shape[1]))

    def evaluate(self, model, out, clips, elapsed, has_text, share=in_turn):
        """See wan/validation.py."""
        return evaluate(self, model, out, clips, elapsed, has_text, share)

    @cached_property
    def codec(self):
        from .codec import Codec

        codec = Codec(self.wan, self.device, latents=self.state["latents"], offload=True)
        return self.same("codec", codec)

    @cached_property
    def prompt_encoder(self):
        from .codec import PromptEncoder

        length = self.state["prompt_len"]
        return self.same(
            "prompt_encoder", PromptEncoder(self.wan, self.device, length=length, offload=True)
        )

    @cached_property
    def tokenizer(self):
        from .codec import Tokenizer

        return Tokenizer(self.wan, length=self.text_len, vocabulary=self.vocabulary)

    def same(self, name, part):
        """`part`, if it is the one that prepared the data; else ValueError."""
        if name in self.state and part.fingerprint != self.state[name]:
            raise ValueError(
                f"{name} of {self.wan} has fingerprint {part.fingerprint}, "
                f"but {self.source} was prepared with {self.state[name]}"
            )
        return part


def state_of(manifest, wan, vocabulary):
    """What a checkpoint stores of prepared data: World.state, but for sampling.

    vocabulary: the ids of the tokens that the model may write, None: all."""

    def clips(entry):
        return entry[1]["clips"]

    sizes = {size: tuple(map(int, size.split("x"))) for size in manifest["buckets"]}
    most, bucket = max(manifest["buckets"].items(), key=clips)
    kept = ("codec", "prompt_encoder", "prompt_len", "prompt_dim", "latents", "text_len")
    return {
        "world": "wan",
        "wan": str(wan or manifest["wan"]),
        "shape": tuple(bucket["z_v"]),
        "frame_shape": (3, *sizes[most]),
        "frame_sizes": sorted({size[1:] for size in sizes.values()}),
        "vocabulary": vocabulary,
        **{name: manifest[name] for name in (*kept, "vocab_size")},
    }
