"""Claims that the second world tells apart; toy/claims.py has the first world's, and what a Check
and an Experiment are.
"""

from collections.abc import Callable
from functools import partial

import train

from .claims import MARGIN, Check, Experiment
from .figures import across_groups, curve
from .pairs_measures import drawing, reading, reading_by_step
from .runs import WHOLE, Budget, Variant
from .variants import (
    FrozenE,
    OrthogonalE,
    SlowE,
    few_clips,
    repulsion_loss,
    wrong_prompts,
)

LEVEL = 3
FLAGS = f"--data pairs --level {LEVEL}"
FULL = Budget(generator=600, recall=100, refine=700, clips=256, default=WHOLE, flags=FLAGS)
QUICK = Budget(generator=60, recall=10, refine=70, clips=32, default=(60, 10, 140), flags=FLAGS)

GENERATOR = Variant("generator", "--stages generator")
from_generator = partial(Variant, start=GENERATOR)
BASE = from_generator("base")

# ---------------------------------------------------------------- does a generator help?

STARTS = {
    "generator": GENERATOR,
    "generator, five times": Variant("generator, five times", "--stages generator {five_times}"),
    "no prompts": Variant("generator, no prompts", "--stages generator --generator-p-drop 1"),
    "wrong prompts": Variant("generator, wrong prompts", "--stages generator", loss=wrong_prompts),
    "scratch": None,
}
EVER_NEW = train.Train.batch * (FULL.recall + FULL.refine)  # clips, where none is shown twice
CAPTIONED: dict[int, Callable] = {
    64: partial(few_clips, 64),
    1024: partial(few_clips, 1024),
    EVER_NEW: train.make_world,
}
TEXT = {
    (start, n): Variant(f"from {start}, {n} clips", start=generator, make_world=make_world)
    for start, generator in STARTS.items()
    for n, make_world in CAPTIONED.items()
}
AS_LONG = Variant("from scratch, as long in all", "--refine-steps {long_refine}")


def gains(name):
    """The checks of `name`, a number, at each count of captioned clips."""
    asked = (
        ("the generator beats scratch", "generator", "scratch", False),
        ("five times the generator beats one", "generator, five times", "generator", True),
        ("a generator without words beats scratch", "no prompts", "scratch", True),
        ("one of the wrong words beats scratch", "wrong prompts", "scratch", True),
        ("the generator beats one without words", "generator", "no prompts", True),
        ("the generator beats one of the wrong words", "generator", "wrong prompts", True),
    )
    for n in CAPTIONED:
        for says, more, less, ours in asked:
            a, b = TEXT[more, n].name, TEXT[less, n].name
            yield Check(f"{name}: {says}, {n} clips", f"{a}: {name}", f"{b}: {name}", ours=ours)
    a = TEXT["generator", EVER_NEW].name
    says = f"{name}: the generator beats scratch, as long in all"
    yield Check(says, f"{a}: {name}", f"{AS_LONG.name}: {name}", ours=True)


def by_start(name):
    """A panel: a number against the captioned clips, a line for each start."""
    groups = {start: {TEXT[start, n].name: n for n in CAPTIONED} for start in STARTS}
    return across_groups("captioned clips (last: none twice)", name, groups)


# ---------------------------------------------------------------- the experiments

ROWS = {
    "frozen": from_generator("E frozen", "{checkpoints}", make_model=FrozenE),
    "orthogonal": from_generator("E orthogonal", "{checkpoints}", make_model=OrthogonalE),
    "slow": from_generator("E slow", "{checkpoints}", make_model=SlowE),
    "repelled": from_generator("E repelled", "{checkpoints}", loss=repulsion_loss),
    "cross-entropy 1": from_generator("E with cross-entropy 1", "{checkpoints} --anchor 1"),
    "discrete": from_generator("discrete tokens", "{checkpoints} --text-flow discrete"),
}
LEARNED = from_generator("E learned", "{checkpoints}")

EXPERIMENTS = (
    Experiment(
        name="pretraining",
        claim=(
            "What a generator knows of text and video can be repurposed for understanding, which "
            "becomes easier to learn than from scratch (sections 1, 3.2 and 5). Is that since it "
            "has eyes, or since it knows the words? Controls: generators that never saw a prompt, "
            "and that saw other clips' prompts."
        ),
        refuted_if="The network from scratch reads as well after as many text steps.",
        variants=(*TEXT.values(), AS_LONG),
        measures=(reading, drawing),
        checks=(*gains("read"), *gains("read bound")),
        panels=tuple(by_start(name) for name in ("read", "read bound", "drawn")),
    ),
    Experiment(
        name="embedding",
        claim=(
            "E is learnable (section 3.1, eq. 7). Does learning it merge the rows of values that "
            "are not told apart yet, and so keep them from being read?"
        ),
        refuted_if="No other E reads better than the learned one.",
        variants=(LEARNED, *ROWS.values()),
        measures=(reading, reading_by_step, drawing),
        checks=(
            *(
                Check(
                    f"{what}: the learned E reads as well",
                    "E learned: read",
                    f"{variant.name}: read",
                    -MARGIN,
                )
                for what, variant in ROWS.items()
            ),
            *(
                Check(
                    f"{what}: the learned E draws as well",
                    "E learned: drawn",
                    f"{variant.name}: drawn",
                    -MARGIN,
                    ours=True,
                )
                for what, variant in ROWS.items()
            ),
        ),
        panels=(
            curve("text steps of 64 clips", "read by step"),
            curve("text steps of 64 clips", "bound by step"),
            curve("text steps of 64 clips", "largest cosine"),
        ),
    ),
)
