"""What train.py and sample.py ask of a world. toy.World and wan.World are two that answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from univigu import Config


def checked_sampling(sampling, default):
    """World.sampling as a checkpoint stores it; what it lacks, all of it where it is None, as in an
    older one, is the default's.

    Raises ValueError for what no sampler takes.
    """
    if sampling is None:
        return default
    named = isinstance(sampling, dict) and sampling.keys() == default.keys()
    if not named or not all(isinstance(options, dict) for options in sampling.values()):
        raise ValueError(f"sampling is {sampling!r:.60}, wanted {', '.join(default)}")
    for mode, options in sampling.items():
        for name, value in options.items():
            if name not in ("steps", "guidance", "shift", "reuse_video"):
                raise ValueError(f"sampling of {mode} has {name!r:.60}, which no sampler takes")
            if not isinstance(value, (int, float)):
                raise ValueError(f"{name} of {mode} is {value!r:.60}, wanted a number")
    return {mode: options | sampling[mode] for mode, options in default.items()}


class Codec(Protocol):
    """Turns frames into video latents and back."""

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """frames (B, 3, T, H, W) in [-1, 1] -> z_v (B, C, F, h, w).

        Raises ValueError for sizes that it cannot code.
        """

    def decode(self, z_v: torch.Tensor) -> torch.Tensor:
        """z_v (B, C, F, h, w) -> frames (B, 3, T, H, W), clamped to [-1, 1].

        Raises ValueError for another shape.
        """


class PromptEncoder(Protocol):
    """Turns prompts into what the model's cross-attention reads."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """B texts -> c (B, at most L, width), zeros after each text's end.

        Raises ValueError for a text that is too long.
        """


class Tokenizer(Protocol):
    """Turns texts into the tokens that the model writes, and back."""

    def __len__(self) -> int:
        """V, how many tokens there are."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        """B texts -> y (B, N) int64.

        Raises ValueError for a text that is too long or has unknown tokens.
        """

    def decode(self, y: torch.Tensor) -> list[str]:
        """y (B, any length) int64 -> B texts, each cut at its first end.

        Raises ValueError for ids out of range.
        """


class Split(Protocol):
    """Some of the clips, as a torch Dataset that collates its batches itself.

    It may have a `digest`, a string that changes with what is in a batch: then a run that goes on
    with other data is refused.
    """

    def batch(self, step: int, size: int) -> Any:
        """The `size` indices of training's batch `step`: a function of (seed, step, size)."""

    def __getitems__(self, indices) -> dict[str, torch.Tensor]:
        """B indices -> a batch: "z_v" (B, C, F, H, W) and "c" (B, L, width), float32, and
        "prompt" and "caption" (B, N), int64; without those that the world's `texts` lack.
        """


def in_turn(jobs):
    """What functions return, called one after the other."""
    return [job() for job in jobs]


@dataclass
class Evaluation:
    """What an evaluation found."""

    results: dict
    """Numbers and texts, as JSON has them; `evaluate` also writes them to results.json."""

    shown: dict = field(default_factory=dict)
    """What a report shows beside them, each part where there is one. See pages.write_report."""


class World(Protocol):
    """The data of a run, and what turns them into latents and tokens and back."""

    @property
    def seed(self) -> int:
        """Seed of the order or the making of the clips, and of the evaluation."""

    device: torch.device
    """Where codec and prompt encoder compute, once they are used."""

    @property
    def codec(self) -> Codec:
        """frames <-> z_v."""

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """prompts -> c."""

    @property
    def tokenizer(self) -> Tokenizer:
        """texts <-> y."""

    @property
    def shape(self) -> tuple:
        """(C, F, H, W) of one z_v; where sizes differ, of the most frequent."""

    @property
    def frame_shape(self) -> tuple:
        """(3, T, H, W), in pixels, of the clip that `shape` is of."""

    @property
    def frame_sizes(self) -> list[tuple[int, int]]:
        """(rows, columns), in pixels, that videos of another size are fitted to."""

    @property
    def text_len(self) -> int:
        """N, tokens of a text."""

    @property
    def sizes(self) -> dict:
        """Fields of Config that the data decide, where no flag does."""

    @property
    def state(self) -> dict:
        """What a checkpoint stores as world.json, to make this world again without its data.

        "world" is its name. Two worlds whose states differ in what latents, prompts or tokens mean
        do not share checkpoints.
        """

    sampling: dict[str, dict]
    """Mode, "understand", "generate" or "joint" -> arguments of its sampler by default. `state` has
    it, so that a checkpoint is sampled as its recipe says."""

    def options(self, mode: str, shape: tuple[int, ...]) -> dict:
        """The arguments of a mode's sampler for a latent of `shape`: of `sampling`, or what suits
        that size better."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Which texts every clip has: "prompt", "caption"."""

    @property
    def fixed_size(self) -> bool:
        """Whether every video has `frame_shape`."""

    @property
    def fps(self) -> int:
        """Frames per second of a clip."""

    @property
    def negative_prompt(self) -> str:
        """What guidance contrasts with unless told otherwise; "" is no prompt."""

    def dataset(self, split: str) -> Split:
        """The clips of "train", or of a split of its own to evaluate on.

        Raises ValueError for another split; ValueError or OSError for missing or damaged files.
        """

    def check(self, config: Config) -> None:
        """Raises ValueError where a model's sizes do not fit the data."""

    def evaluate(
        self,
        model,
        out: Path | str | None,
        clips: int,
        elapsed: float,
        has_text: bool,
        share: Callable = in_turn,
    ) -> Evaluation:
        """Measures a model on at most `clips` clips of a split, and prints what it found.

        elapsed: seconds of training so far. has_text: the model has learned text, not video alone.
        Writes results.json into `out`, and what each mode made of some clips. Where there are
        several processes all of them call this: out is None in those that write nothing and return
        nothing, and share(jobs) does functions' work in one of them each, see engine.distributed.
        """


# What worlds must agree in for one model to learn in both.
ALIKE = "latents", "codec", "prompt_encoder", "prompt_dim", "prompt_len", "text_len", "vocab_size"


def by_stage(stages, make):
    """stages: name -> (its data, the text that it learns to write, or None) -> name -> World.

    make(data, the other stages' data) makes a world. Raises ValueError where worlds do not go
    together, or lack a text.
    """
    made: dict[str, World] = {}
    for stage, (data, text) in stages.items():
        others = sorted({other for other, _ in stages.values()} - {data})
        if data not in made:
            made[data] = make(data, others)
        if text not in (None, *made[data].texts):
            raise ValueError(
                f"data {data} has no {text}s, which stage {stage} learns to write, wanted "
                f"--{stage}-data with them, or --stages without {stage}"
            )
    (first, world), *rest = made.items()
    for data, other in rest:
        for name in ALIKE:
            theirs, ours = other.state.get(name), world.state.get(name)
            if theirs != ours:
                raise ValueError(
                    f"{name} is {ours!r} in {first}, but {theirs!r} in {data}, wanted data that "
                    "were prepared alike"
                )
    return {stage: made[data] for stage, (data, _) in stages.items()}
