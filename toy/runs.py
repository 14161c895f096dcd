"""Trainings of variants, and finished ones to measure."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

import train
import wan
from engine.checkpoint import checkpoints
from engine.files import read_json, read_lines, write_json
from univigu import Config, understand, uni_flow_loss
from wan.published import build

from . import oracle, words
from .evaluate import SAMPLING, said
from .variants import graft


@dataclass(frozen=True)
class Budget:
    """What every run of a pass gets."""

    generator: int  # steps of a stage
    recall: int
    refine: int
    clips: int  # of an evaluation
    default: tuple[int, int, int]  # steps of the run that is not shortened
    flags: str = ""  # other flags of train.py

    def fill(self, flags):
        """Step counts into flags.

        {recall}: the stage's steps. {text}: both text stages' together. {long_refine}: refine's and
        the generator's. {a_fifth}: a fifth of the generator's. {saves}: eight checkpoints on
        the way. {twice}: refine twice as long, with as many.
        {default}, {default_steps}, {default_text}, of the run that is not shortened: stages and
        steps, the steps alone, how many both text stages have together.
        """
        counts = zip(train.STAGES, self.default)
        steps = " ".join(f"--{stage}-steps {count}" for stage, count in counts)
        return flags.format(
            recall=self.recall,
            text=self.recall + self.refine,
            long_refine=self.generator + self.refine,
            a_fifth=f"--generator-steps {self.generator // 5}",
            saves=f"--save-every {(self.recall + self.refine) // 8} --keep 99",
            twice=f"--refine-steps {2 * self.refine} "
            f"--save-every {(self.recall + 2 * self.refine) // 8} --keep 99",
            default=f"--stages generator,recall,refine {steps}",
            default_steps=steps,
            default_text=sum(self.default[1:]),
        )


WHOLE = (train.Train.generator_steps, train.Train.recall_steps, train.Train.refine_steps)
FULL = Budget(generator=800, recall=100, refine=300, clips=256, default=WHOLE)
QUICK = Budget(generator=160, recall=20, refine=60, clips=64, default=(160, 40, 520))


@dataclass(frozen=True)
class Variant:
    """What differs from the base run: flags of train.py, or arguments of train.main."""

    name: str
    flags: str = ""
    start: "Variant | None" = None  # the generator it starts from; None: from scratch
    make_model: Callable = build
    loss: Callable = uni_flow_loss
    make_world: Callable = train.make_world

    def describe(self, budget):
        """What differs from `python train.py`, for results.json."""
        arguments = {name: getattr(self, name) for name in ("make_model", "loss", "make_world")}
        own = {name: getattr(Variant, name) for name in arguments}
        return {
            "flags": budget.fill(self.flags),
            "arguments": {k: tell(value) for k, value in arguments.items() if value is not own[k]},
            "from": self.start and self.start.name,
        }


def tell(function):
    """A function or a class as one would write it: "uni_flow_loss(lambda_v=0.0)"."""
    if not isinstance(function, partial):
        return function.__name__
    given = [repr(value) for value in function.args]
    given += [f"{name}={value!r}" for name, value in function.keywords.items()]
    return f"{function.func.__name__}({', '.join(given)})"


# ---------------------------------------------------------------- training


def run_folder(out, variant, seed):
    return Path(out) / variant.name / f"seed{seed}"


def arguments(variant, seed, budget, out):
    """The flags of train.py for a run. Of two that say the same thing, the later one wins."""
    flags = ["--stages", "recall,refine"]
    for stage in train.STAGES:
        flags += [f"--{stage}-steps", str(getattr(budget, stage))]
    if variant.start:
        flags += ["--init", str(run_folder(out, variant.start, seed) / "generator")]
    flags += ["--seed", str(seed), "--eval-clips", "0"]
    flags += ["--out", str(run_folder(out, variant, seed))]
    return [*flags, *budget.flags.split(), *budget.fill(variant.flags).split()]


def is_trained(variant, seed, budget, out):
    """Whether it was trained to the end."""
    flags = arguments(variant, seed, budget, out)
    stages = flags[len(flags) - flags[::-1].index("--stages")]
    return (run_folder(out, variant, seed) / stages.split(",")[-1]).exists()


def trained(variant, seed, budget, out):
    """Trains a variant, or what is left to train of it. Returns its Run."""
    if variant.start:
        trained(variant.start, seed, budget, out)
    folder, argv = run_folder(out, variant, seed), arguments(variant, seed, budget, out)
    argv += ["--resume"] * bool(checkpoints(folder))
    recipe, _, config, _ = train.parse(argv)  # refuses a run that was begun with other flags
    run = Run(variant, folder, budget.clips, recipe, config)
    last = folder / run.stages[-1]
    if last.exists():
        return run

    print(f"training {variant.name}, seed {seed}", end="", flush=True)
    torch.compiler.reset()  # each run compiles its own blocks, for their sizes differ
    with redirect_stdout(io.StringIO()):
        train.main(
            argv,
            make_model=variant.make_model,
            loss=variant.loss,
            make_world=variant.make_world,
            load_start=graft,
        )
    if not last.exists():
        sys.exit("\ntoy.experiments: stopped; the same command goes on")
    print(f": {run.seconds():.0f} s", flush=True)
    return run


@dataclass
class Run:
    """A finished training, and clips to measure it on: new ones, of combinations it was shown."""

    variant: Variant
    folder: Path
    clips: int
    recipe: train.Train
    config: Config

    @property
    def seed(self):
        return self.recipe.seed

    @property
    def stages(self):
        return self.recipe.names()

    def restored(self, checkpoint):
        """The model of one of its checkpoints."""
        make_model = self.variant.make_model
        return wan.load(checkpoint, make_model=make_model, **asdict(self.config)).eval()

    @cached_property
    def model(self):
        return self.restored(self.folder / self.stages[-1])

    @cached_property
    def world(self):
        return train.make_worlds(self.recipe, self.variant.make_world)[self.stages[-1]]

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def show(self, split="seen", one_in=1):
        """A batch of clips (all, or one in so many), and what they show, (B, 7)."""
        indices = range(max(2, self.clips // one_in))
        dataset = self.world.dataset(split)
        return dataset.__getitems__(indices), dataset.clips(indices).attributes

    def read(self, z_v, c=None, model=None, form=words.DETAILED, **sampling):
        """z_v -> what the captions, texts of that form, say of it, (B, 7)."""
        sampling = SAMPLING["understand"] | {"reuse_video": False} | sampling
        y_hat = understand(model or self.model, z_v, c, generator=self.generator(), **sampling)
        return said(self.world.tokenizer.decode(y_hat), form)

    def look(self, z_v):
        """z_v -> what the oracle sees in it, (B, 7)."""
        return oracle.read(self.world.codec.decode(z_v))

    def seconds(self):
        """How long it was trained. Raises ValueError where its log does not say."""
        path = self.folder / "metrics.jsonl"
        try:
            return float(read_lines(path)[-1]["wall_s"])
        except (OSError, ValueError, LookupError, TypeError):
            raise ValueError(
                f"{path} has no last line with wall_s, wanted the log of a run: "
                f"remove {self.folder}, and it is trained again"
            ) from None

    def measure(self, measures):
        """All the numbers of some measures. They are kept in its folder: experiments share runs."""
        path = self.folder / "measured.json"
        known = read_json(path) if path.exists() else {}
        keys = [f"{measure.__name__}, {self.clips} clips" for measure in measures]
        for key, measure in zip(keys, measures):
            if key not in known:
                found = measure(self)
                known[key] = {name: round(float(value), 5) for name, value in found.items()}
                write_json(path, known)
        return {name: value for key in keys for name, value in known[key].items()}
