"""Claims that the second world tells apart; toy/claims.py has the first world's, and what a Check
and an Experiment are.
"""

from collections.abc import Callable
from functools import partial

import train

from .claims import MARGIN, Check, Experiment
from .figures import across_groups, bars, curve
from .pairs_measures import (
    agreement,
    by_sampler_steps,
    drawing,
    reading,
    reading_by_step,
    together_and_apart,
)
from .runs import Budget, Variant
from .variants import (
    FrozenE,
    OrthogonalE,
    SharedFFN,
    few_clips,
    lines,
    wrong_prompts,
)

LEVEL = 1
FLAGS = f"--data pairs --level {LEVEL}"
WHOLE = tuple(train.PAIRS[f"{stage}_steps"] for stage in train.STAGES)
FULL = Budget(generator=3000, recall=200, refine=1000, clips=256, default=WHOLE, flags=FLAGS)
QUICK = Budget(generator=60, recall=10, refine=70, clips=32, default=(60, 10, 140), flags=FLAGS)

# Less decay, for more steps than in the whole run.
LONG = "--stages generator --generator-muon-decay .04"
GENERATOR = Variant("generator", LONG)
from_generator = partial(Variant, start=GENERATOR)

# ---------------------------------------------------------------- does a generator help?

STARTS = {
    "generator": GENERATOR,
    "generator, a fifth": Variant("generator, a fifth", "--stages generator {a_fifth}"),
    "no prompts": Variant("generator, no prompts", f"{LONG} --generator-p-drop 1"),
    "wrong prompts": Variant("generator, wrong prompts", LONG, loss=wrong_prompts),
    "scratch": None,
}
EVER_NEW = train.PAIRS["batch"] * (FULL.recall + FULL.refine)  # clips, where none is shown twice
CAPTIONED: dict[int, Callable] = {
    64: partial(few_clips, 64),
    1024: partial(few_clips, 1024),
    EVER_NEW: train.make_world,
}
TEXT = {
    (start, n): Variant(f"from {start}, {n} clips", "{saves}", generator, make_world=make_world)
    for start, generator in STARTS.items()
    for n, make_world in CAPTIONED.items()
}
AS_LONG = Variant("from scratch, as long in all", "--refine-steps {long_refine} {saves}")


def shown(n):
    """n captioned clips, in words."""
    return "no clip seen twice" if n == EVER_NEW else f"{n:,} clips"


def gains(name):
    """The checks of `name`, a number, at each count of captioned clips."""
    asked = (
        ("the generator beats scratch", "generator", "scratch", False),
        ("the generator beats one of fewer steps", "generator", "generator, a fifth", True),
        ("a generator without words beats scratch", "no prompts", "scratch", True),
        ("one of the wrong words beats scratch", "wrong prompts", "scratch", True),
        ("the generator beats one without words", "generator", "no prompts", True),
        ("the generator beats one of the wrong words", "generator", "wrong prompts", True),
    )
    for n in CAPTIONED:
        for says, more, less, ours in asked:
            a, b = TEXT[more, n].name, TEXT[less, n].name
            yield Check(f"{name}: {says}, {shown(n)}", f"{a}: {name}", f"{b}: {name}", ours=ours)


def by_start(name):
    """A panel: a number against the captioned clips, a line for each start."""
    groups = {start: {TEXT[start, n].name: n for n in CAPTIONED} for start in STARTS}
    return across_groups("captioned clips (last: none twice)", name, groups)


# ---------------------------------------------------------------- what else decides

ALL_NEW = TEXT["generator", EVER_NEW]  # the base of what follows
REFINE_ALONE = {
    n: from_generator(
        f"refine alone, {n} clips", "--stages refine --refine-steps {text}", make_world=make_world
    )
    for n, make_world in CAPTIONED.items()
}
NEW = ("a new expert", ALL_NEW)
SHARED = from_generator("shared FFN", make_model=SharedFFN)
LIGHT = from_generator("FFN_t an eighth", "--text-ffn-dim 32")
COPY = from_generator("copied FFN_t", "--text-ffn-init copy")
HALF = "--recall-p-drop .5 --refine-p-drop .5"  # on all lines, so that clocks alone differ
ALIKE = "--joint-shift 4"  # as text_shift: one clock, but for the warp
INDEPENDENT = from_generator("independent", f"--clocks independent {ALIKE} {HALF}")
ONE = from_generator("one clock", f"{ALIKE} {HALF}", loss=lines(joint=1.0))
MIXTURE = from_generator("mixture", HALF, loss=lines())
VELOCITY = from_generator("velocity, cross-entropy 1", "--text-output velocity --anchor 1")

LEARNED = from_generator("E learned", "{twice} --repulsion 0")
ROWS = {
    "repelled": from_generator("E repelled", "{twice}"),
    "frozen": from_generator("E frozen", "{twice}", make_model=FrozenE),
    "orthogonal": from_generator("E orthogonal", "{twice}", make_model=OrthogonalE),
    "cross-entropy 1": from_generator("E with cross-entropy 1", "{twice} --repulsion 0 --anchor 1"),
    "discrete": from_generator("discrete tokens", "{twice} --text-flow discrete"),
}

# ---------------------------------------------------------------- the experiments

VERBS = {"read": "reads", "read bound": "binds", "drawn": "draws", "agreed": "agrees"}


def compare(a, b, measures, margin=-MARGIN, ours=False):
    """Checks that a is better than b in each measure; with a margin below 0, as good. Both are
    (what to call it, variant).
    """
    how = "better than" if margin > 0 else "as well as"
    (this, more), (that, less) = a, b
    for name in measures:
        says = f"{this} {VERBS[name]} {how} {that}"
        yield Check(says, f"{more.name}: {name}", f"{less.name}: {name}", margin, ours)


BOTH = ("read", "read bound", "drawn")

EXPERIMENTS = (
    Experiment(
        name="pretraining",
        claim=(
            "What a generator knows of text and video can be repurposed for understanding, which "
            "becomes easier to learn than from scratch (sections 1, 3.2 and 5). Is that since it "
            "has eyes, or since it knows the words? Controls: generators that never saw a prompt, "
            "and that saw other clips' prompts."
        ),
        refuted_if="The network from scratch reads as well, a quarter of the way and at the end.",
        variants=(*TEXT.values(), AS_LONG),
        measures=(reading, reading_by_step, drawing),
        checks=(
            *gains("read early"),
            *gains("read"),
            Check(
                "read: the generator beats scratch, as long in all",
                f"{ALL_NEW.name}: read",
                f"{AS_LONG.name}: read",
                ours=True,
            ),
        ),
        panels=(
            *(by_start(name) for name in ("read early", "read", "read bound", "drawn")),
            curve(
                f"text steps of {train.PAIRS['batch']} clips, none seen twice",
                "read by step",
                of=[TEXT[start, EVER_NEW].name for start in STARTS],
            ),
        ),
    ),
    Experiment(
        name="embedding",
        claim=(
            "E is learnable (section 3.1, eq. 7). So learning it costs no reading, with no more "
            "help than the toy's cross-entropy of weight 0.1."
        ),
        refuted_if="Another E reads better.",
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
            curve("text steps of 32 clips", "read by step"),
            curve("text steps of 32 clips", "bound by step"),
            curve("text steps of 32 clips", "largest cosine"),
        ),
    ),
    Experiment(
        name="recall",
        claim=(
            "Knowledge Recall is an efficient warm-up (section 3.3): recall and refine do better "
            "than refine alone for as many steps, above all with few captioned clips."
        ),
        refuted_if="Refine alone reads as well.",
        variants=(*(TEXT["generator", n] for n in CAPTIONED), *REFINE_ALONE.values()),
        measures=(reading, drawing),
        checks=tuple(
            check
            for n, alone in REFINE_ALONE.items()
            for check in compare(
                (f"{shown(n)}: with recall, it", TEXT["generator", n]),
                ("without", alone),
                BOTH,
                MARGIN,
            )
        ),
        panels=(bars(*BOTH),),
    ),
    Experiment(
        name="experts",
        claim=(
            "Attention carries what the modalities share, the FFNs what each needs alone (section "
            "3.2). So a text expert of its own beats a shared FFN; one that is light and new is "
            "enough."
        ),
        refuted_if="A shared FFN reads and draws as well, or a light or a new expert does worse.",
        variants=(ALL_NEW, SHARED, LIGHT, COPY),
        measures=(reading, drawing),
        checks=(
            *compare(NEW, ("a shared one", SHARED), BOTH, MARGIN),
            *compare(("a light new one", LIGHT), NEW, BOTH),
            *compare(NEW, ("a copy", COPY), BOTH),
        ),
        panels=(bars(*BOTH),),
    ),
    Experiment(
        name="clocks",
        claim=(
            "Independent clocks teach dependencies across all combinations of noise levels "
            "(section 3.1, eq. 9). So all three modes are better than with one clock for both."
        ),
        refuted_if="One clock reads, draws or does both as well.",
        variants=(INDEPENDENT, ONE, MIXTURE),
        measures=(reading, drawing, agreement),
        checks=(
            *compare(
                ("with independent clocks it", INDEPENDENT),
                ("with one", ONE),
                (*BOTH, "agreed"),
                MARGIN,
            ),
            *compare(
                ("with their mixture it", MIXTURE),
                ("with independent clocks", INDEPENDENT),
                (*BOTH, "agreed"),
                ours=True,
            ),
        ),
        panels=(bars(*BOTH, "agreed", "agreed bound"),),
    ),
    Experiment(
        name="text_flow",
        claim=(
            "Text flows by its velocity (section 3.1, eq. 8), in few steps. We ask whether the "
            "velocity, with a cross-entropy of weight 1, does as well as predicting the data point."
        ),
        refuted_if="The data point is better, or many steps are needed.",
        variants=(ALL_NEW, VELOCITY),
        measures=(reading, drawing, by_sampler_steps),
        checks=(
            *compare(("by its velocity it", VELOCITY), ("by the data point", ALL_NEW), BOTH),
            *(
                Check(
                    f"{name} in 4 steps as well as in 32",
                    f"{ALL_NEW.name}: {name} in @ 4",
                    f"{ALL_NEW.name}: {name} in @ 32",
                    -MARGIN,
                )
                for name in ("read", "bound", "drawn")
            ),
        ),
        panels=(
            curve("steps of the sampler", "read in", log=True),
            curve("steps of the sampler", "bound in", log=True),
            curve("steps of the sampler", "drawn in", log=True),
        ),
    ),
    Experiment(
        name="coevolution",
        claim=(
            "Drawn together, the streams sharpen each other into a coherent pair (section 3.3, eq. "
            "18). So caption and video agree more than where the streams do not see each other, "
            "and bind alike."
        ),
        refuted_if="Apart they agree as well.",
        variants=(ALL_NEW,),
        measures=(together_and_apart,),
        checks=tuple(
            Check(
                f"together they {name} more than apart",
                f"{ALL_NEW.name}: together {name}",
                f"{ALL_NEW.name}: apart {name}",
            )
            for name in ("agree", "bind")
        ),
        panels=(bars("together agree", "apart agree", "together bind", "apart bind"),),
    ),
)
