"""The paper's claims as experiments: which variants are trained, what decides, what is drawn."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import train
from univigu import uni_flow_loss

from .figures import across, across_groups, bars, curve
from .measures import (
    TAUS,
    agreement,
    coevolution,
    drawing,
    drawing_by_stage,
    reading,
    reading_both_ways,
    reading_by_prompt,
    reading_by_step,
    reading_frames,
    reading_in_steps,
    recalling_by_prompt,
    recalling_in_length,
    rows_of_E,
)
from .runs import FULL, Variant
from .variants import (
    CentredE,
    FixedTarget,
    FrozenE,
    NoPad,
    NoPadLoss,
    PatchE,
    SharedFFN,
    contrastive_loss,
    few_clips,
    lines,
    no_pad_loss,
)

MARGIN = 0.02  # of accuracy: smaller gains are not worth a claim


@dataclass
class Check:
    """A sentence of the claim, and what decides it.

    It holds where the mean over seeds of `more` - `less` exceeds `above` by more than its standard
    deviation. more, less: a number, or "variant: name of a number"; several of them, with " + "
    between, are averaged.
    """

    says: str
    more: "str | float"
    less: "str | float" = 0.0
    above: float = MARGIN
    ours: bool = False  # on a choice of ours, or more than is claimed: told, but not counted

    def gain(self, of):
        """of: variant -> name -> number, of one seed."""
        return value(self.more, of) - value(self.less, of)

    def variants(self):
        """Those that it compares."""
        return {variant for side in (self.more, self.less) for variant, _ in named(side)}


def value(side, of):
    """What a side of a Check comes to."""
    if isinstance(side, float):
        return side
    return statistics.fmean(of[variant][name] for variant, name in named(side))


def named(side):
    """The (variant, name) pairs of a side; none where it is a number."""
    keys = [] if isinstance(side, float) else side.split(" + ")
    return [key.split(": ", 1) for key in keys]


@dataclass
class Experiment:
    """A claim of the paper, and what would refute it."""

    name: str
    claim: str
    refuted_if: str
    variants: tuple[Variant, ...]
    measures: tuple[Callable, ...]  # see toy/measures.py
    checks: tuple[Check, ...]
    panels: tuple[Callable, ...]  # of the figure, see toy/figures.py


# ---------------------------------------------------------------- variants

GENERATOR = Variant("generator", "--stages generator")
from_generator = partial(Variant, start=GENERATOR)
CHECKPOINTS = "--save-every {recall} --keep 99"
BASE = from_generator("base", CHECKPOINTS)
DEFAULT = Variant("default", "{default}")  # as `python train.py`

from_default = partial(Variant, start=DEFAULT)  # text stages alone, not shortened


def dropping(recall, refine):
    """Flags: how often the prompt is dropped."""
    return f"--recall-p-drop {recall} --refine-p-drop {refine}"


DROP = {p: from_generator(f"p {p:g}", dropping(p, p), loss=lines()) for p in (0.0, 0.5, 0.9)}
KEPT = {
    p: from_generator(f"p {p:g}, then 0", dropping(p, 0), loss=lines()) for p in (0.5, 0.9)
}  # as in the paper: refinement keeps the prompt
REFINE_DROP = {
    p: from_generator(f"refine p {p:g}", f"--clocks independent {dropping(0.7, p)}")
    for p in (0.0, 0.1, 0.7)
}
JOINT = {
    s: from_default(f"whole, joint_shift {s:g}", f"{{default_steps}} --joint-shift {s}")
    for s in (4.0, 1.0, 0.25, 0.1)
}
FFN_T = {
    width: from_generator(f"FFN_t {share}", f"--text-ffn-dim {width}")
    for share, width in (("an eighth", 32), ("half", 128))
}
TRAINED = {
    (what, length): from_generator(f"{length}{what} trained", f"--train {what} {flags}")
    for length, flags in (("", ""), ("whole, ", "{default_steps}"))
    for what in ("all", "text")
}
ALIKE = "--joint-shift 4"  # as text_shift: one clock, but for the warp
RECALL = "--stages recall --recall-steps {text}"
LAMBDA = {x: from_generator(f"lambda_t {x:g}", f"--lambda-t {x}") for x in (0.3, 1.0, 10.0)}
TOKEN = {d: from_generator(f"d {d}", f"--text-dim {d}") for d in (8, 16, 32)}
DATA = {n: partial(few_clips, n) for n in (256, 1024, 4096)}
CLIPS = {n: from_generator(f"{n} clips", make_world=data) for n, data in DATA.items()}
SCRATCH = {n: Variant(f"scratch, {n} clips", make_world=data) for n, data in DATA.items()}
EVER_NEW = train.Train.batch * (FULL.recall + FULL.refine)  # clips where none is shown twice


def of_width(width):
    """A wider or narrower network, its generator too."""
    flags = f"--dim {width} --ffn-dim {4 * width} --text-ffn-dim {4 * width}"
    generator = Variant(f"generator {width}", f"--stages generator {flags}")
    return Variant(f"width {width}", flags, start=generator)


WIDTH = {width: of_width(width) for width in (32, 48, 96)}


def positions(variants, **more):
    """Where a figure has variants: x -> variant becomes name -> x."""
    return {variant.name: x for x, variant in variants.items()} | more


def looks_at_the_video(who, name, ours):
    """The checks of "understanding" on the variant `name`."""
    claimed = (
        ("it reads what the prompt leaves open", "read free with prompt", 0.9, 0.0),
        ("shuffled frames cost the direction", "direction, in order", "direction, shuffled", 0.2),
        ("and the speed", "speed, in order", "speed, shuffled", 0.2),
        ("they leave the colour", "colour, shuffled", "direction, shuffled", 0.2),
        ("backwards, the opposite direction is read", "direction turned, backwards", 0.5, MARGIN),
    )
    asked = (
        ("without a prompt it reads as with it", "no prompt", "right prompt", -MARGIN),
        ("with a wrong prompt it reads as without", "wrong prompt", "no prompt", -MARGIN),
        ("unseen combinations are read as well", "no prompt unseen", "no prompt", -MARGIN),
    )
    for rule in claimed + asked:
        says, more, less, above = rule
        less = less if isinstance(less, float) else f"{name}: {less}"
        yield Check(who + says, f"{name}: {more}", less, above, ours or rule in asked)


# ---------------------------------------------------------------- experiments

EXPERIMENTS = (
    Experiment(
        name="pretraining",
        claim=(
            "What a generator knows of text and video can be repurposed for understanding, which "
            "becomes easier to learn than from scratch (sections 1, 3.2 and 5). So text stages "
            "that start from the generator read better than the same stages from scratch."
        ),
        refuted_if=(
            "The network from scratch reads as well after as many text steps, or with as few "
            "captioned clips. (The paper's generator is given. After as many steps in all, the "
            "generator's counted, is asked by us.)"
        ),
        variants=(
            BASE,
            Variant("scratch", CHECKPOINTS),
            Variant("scratch, long", f"{CHECKPOINTS} --refine-steps {{long_refine}}"),
            *CLIPS.values(),
            *SCRATCH.values(),
        ),
        measures=(reading, reading_by_step),
        checks=(
            Check(
                "better than from scratch after as many text steps", "base: read", "scratch: read"
            ),
            Check(
                "better than from scratch after as many steps in all",
                "base: read",
                "scratch, long: read",
                ours=True,
            ),
            Check(
                "better than from scratch where both have 256 clips",
                "256 clips: read",
                "scratch, 256 clips: read",
            ),
        ),
        panels=(
            curve(
                "text steps of 64 clips", "read by step", of=("base", "scratch", "scratch, long")
            ),
            across_groups(
                "distinct clips (last: none twice)",
                "read",
                {
                    "from the generator": positions(CLIPS, base=EVER_NEW),
                    "from scratch": positions(SCRATCH, scratch=EVER_NEW),
                },
            ),
        ),
    ),
    Experiment(
        name="recall",
        claim=(
            "Knowledge Recall, which has the model write the prompt first, is an efficient warm-"
            "up that rapidly adapts it to the joint flow at minimal cost (section 3.3). We ask "
            "whether recall and refine read better than refine alone for as many steps."
        ),
        refuted_if="Refine alone reads as well.",
        variants=(
            BASE,
            from_generator("no recall", f"{CHECKPOINTS} --stages refine --refine-steps {{text}}"),
        ),
        measures=(reading, reading_by_step, drawing),
        checks=(
            Check("recall and refine read better", "base: read", "no recall: read"),
            Check("and draw no worse", "base: drawn", "no recall: drawn", -MARGIN),
        ),
        panels=(curve("text steps of 64 clips", "read by step"), bars("read", "read all", "drawn")),
    ),
    Experiment(
        name="dropout",
        claim=(
            "In recall the model copies the prompt at hand instead of looking at the video; "
            "dropping it with probability p makes it look (section 3.3). Of dropout in "
            "refinement, which is conditioned on the prompt, the paper says nothing (section "
            "4.1). Here p holds on all lines of the clocks' mixture: p in recall and 0 in "
            "refinement, or p in both."
        ),
        refuted_if=(
            "After recall at p = 0 texts without a prompt are as good as with it and a wrong "
            "prompt is not copied; or dropout does not mend it; or the effect is gone after "
            "refinement."
        ),
        variants=(*DROP.values(), *KEPT.values()),
        measures=(reading, reading_by_prompt, recalling_by_prompt, drawing),
        checks=(
            Check(
                "recall at p = 0 reads worse without the prompt",
                "p 0: recall: right prompt",
                "p 0: recall: no prompt",
            ),
            Check(
                "recall at p = 0 copies a wrong prompt more than at .9",
                "p 0: recall: wrong prompt copied",
                "p 0.9: recall: wrong prompt copied",
            ),
            Check(
                "recall at p = .9 reads better without a prompt than at 0",
                "p 0.9: recall: no prompt",
                "p 0: recall: no prompt",
            ),
            Check(
                "after refinement with the prompt, too",
                "p 0.9, then 0: no prompt",
                "p 0: no prompt",
            ),
            Check(
                "and it draws as at 0",
                "p 0.9, then 0: drawn",
                "p 0: drawn",
                -MARGIN,
            ),
            Check(
                "p = .9 in both stages reads better without a prompt than p = .9, then 0",
                "p 0.9: no prompt",
                "p 0.9, then 0: no prompt",
                ours=True,
            ),
            Check("and draws no worse", "p 0.9: drawn", "p 0.9, then 0: drawn", -MARGIN, ours=True),
        ),
        panels=(
            bars("recall: right prompt", "recall: no prompt", "recall: wrong prompt copied"),
            bars("right prompt", "no prompt", "wrong prompt copied", "drawn"),
        ),
    ),
    Experiment(
        name="refine_dropout",
        claim=(
            "Captions say more than the prompt, so in refinement the prompt alone does not "
            "suffice: the model has to look at the video for the rest (section 3.3). Here with "
            "independent clocks, and p = .7 in recall."
        ),
        refuted_if=(
            "A model that always had the prompt reads less of what the prompt leaves open than "
            "one that often went without; or it reads worse without its prompt."
        ),
        variants=tuple(REFINE_DROP.values()),
        measures=(reading, reading_both_ways, drawing),
        checks=(
            Check(
                "at 0 it reads what the prompt leaves open as at .7",
                "refine p 0: read free with prompt",
                "refine p 0.7: read free",
                -MARGIN,
            ),
            Check(
                "at 0 it reads as well without the prompt",
                "refine p 0: read",
                "refine p 0: read with prompt",
                -MARGIN,
            ),
            *(
                Check(
                    f"{p:g} {does} 0",
                    f"refine p {p:g}: {name}",
                    f"refine p 0: {name}",
                    above,
                    ours=True,
                )
                for p in (0.1, 0.7)
                for does, name, above in (
                    ("reads better without the prompt than", "read", MARGIN),
                    ("reads as well with the prompt as", "read with prompt", -MARGIN),
                    ("draws as well as", "drawn", -MARGIN),
                )
            ),
        ),
        panels=(
            across(
                "p in refinement",
                positions(REFINE_DROP),
                "read",
                "read with prompt",
                "read free",
                "read free with prompt",
                "drawn",
                log=False,
            ),
        ),
    ),
    Experiment(
        name="experts",
        claim=(
            "Attention carries what the modalities share, the FFNs what each needs alone (section "
            "3.2). So a text expert of its own, new and light, beats one shared FFN, and protects "
            "generation; a copy of the video's is not needed."
        ),
        refuted_if=(
            "A shared FFN reads and draws as well, or a light or a new text expert reads worse."
        ),
        variants=(
            GENERATOR,
            BASE,
            from_generator("shared FFN", make_model=SharedFFN),
            *FFN_T.values(),
            from_generator("copied FFN_t", "--text-ffn-init copy"),
        ),
        measures=(reading, drawing),
        checks=(
            Check("separate experts read better", "base: read", "shared FFN: read"),
            Check("separate experts draw better", "base: drawn", "shared FFN: drawn"),
            *(
                Check(
                    f"a text expert of {share} of the width reads as well",
                    f"{FFN_T[width].name}: read",
                    "base: read",
                    -MARGIN,
                )
                for share, width in (("an eighth", 32), ("half", 128))
            ),
            Check(
                "a new expert reads as well as a copy", "base: read", "copied FFN_t: read", -MARGIN
            ),
            Check("and draws as well", "base: drawn", "copied FFN_t: drawn", -MARGIN),
        ),
        panels=(bars("read", "read all", "drawn"),),
    ),
    Experiment(
        name="survival",
        claim=(
            "FFN_v keeps its pretrained weights to preserve generative priors (section 3.2), and "
            "the video keeps its loss (section 3.1, eq. 11). So videos are as good after recall "
            "and after refine as before."
        ),
        refuted_if="The oracle reads fewer of the asked attributes from videos drawn later.",
        variants=(
            GENERATOR,
            BASE,
            from_generator("no video loss", loss=partial(uni_flow_loss, lambda_v=0.0)),
        ),
        measures=(reading, drawing, drawing_by_stage),
        checks=(
            Check(
                "after recall it draws as the generator",
                "base: drawn after recall",
                "generator: drawn",
                -MARGIN,
            ),
            Check(
                "after refine it draws as the generator", "base: drawn", "generator: drawn", -MARGIN
            ),
            Check(
                "without the video loss it draws worse",
                "base: drawn",
                "no video loss: drawn",
                ours=True,
            ),
        ),
        panels=(bars("drawn after generator", "drawn after recall", "drawn after refine", "read"),),
    ),
    Experiment(
        name="clocks",
        claim=(
            "Independent clocks are a key design: they teach dependencies across all combinations"
            " of noise levels (section 3.1, eq. 9). So all three modes are better than with one "
            "clock for both; here p = .5 on all lines, and text's clock is warped alike, by 4."
        ),
        refuted_if="One clock (the line that joint() walks) reads, draws or does both as well.",
        variants=(
            from_generator("independent", f"--clocks independent {ALIKE} {dropping(0.5, 0.5)}"),
            from_generator("one clock", f"{ALIKE} {dropping(0.5, 0.5)}", loss=lines(joint=1.0)),
            DROP[0.5],
        ),
        measures=(reading, drawing, agreement),
        checks=(
            Check(
                "independent clocks read better than one", "independent: read", "one clock: read"
            ),
            Check(
                "independent clocks draw better than one", "independent: drawn", "one clock: drawn"
            ),
            Check(
                "independent clocks agree better than one",
                "independent: agreement",
                "one clock: agreement",
            ),
            Check(
                "the mixture (p 0.5) reads better than independent",
                "p 0.5: read",
                "independent: read",
                ours=True,
            ),
            Check(
                "the mixture draws no worse than independent",
                "p 0.5: drawn",
                "independent: drawn",
                -MARGIN,
                ours=True,
            ),
            Check(
                "the mixture agrees better than independent",
                "p 0.5: agreement",
                "independent: agreement",
                ours=True,
            ),
        ),
        panels=(bars("read", "read all", "drawn", "agreement", "prompt followed"),),
    ),
    Experiment(
        name="whole",
        claim=(
            "Recall and independent clocks are how the paper gets all three modes (sections 3.1 "
            "and 3.3). So neither costs a mode over as many text steps as the default has, whose "
            "clocks are a mixture; most other runs stop earlier."
        ),
        refuted_if="Without recall, or with the mixture, a mode is better.",
        variants=(
            DEFAULT,
            from_generator("whole, no recall", "--stages refine --refine-steps {default_text}"),
            from_generator(
                "whole, independent",
                f"{{default_steps}} --clocks independent {dropping(0.5, 0.5)}",
            ),
        ),
        measures=(reading, drawing, agreement),
        checks=tuple(
            Check(f"{who} {does} as well as {than}", f"{more}: {name}", f"{less}: {name}", -MARGIN)
            for who, more, than, less in (
                ("with recall it", "default", "without", "whole, no recall"),
                ("with independent clocks it", "whole, independent", "with the mixture", "default"),
            )
            for does, name in (
                ("reads", "read"),
                ("draws", "drawn"),
                ("agrees", "agreement, text ahead"),
            )
        ),
        panels=(
            bars(
                "read", "read all", "drawn", "agreement", "agreement, text ahead", "prompt followed"
            ),
        ),
    ),
    Experiment(
        name="joint_shift",
        claim=(
            "In joint sampling one clock serves both modalities (section 3.3, eq. 18). We ask "
            "whether that line does no worse than another, trained and sampled alike: with "
            "joint_shift 4 the text is behind the video, below 1 ahead; the default has .03."
        ),
        refuted_if="On another line caption and video agree more, or follow the prompt better.",
        variants=(*JOINT.values(), DEFAULT),
        measures=(reading, drawing, agreement),
        checks=tuple(
            Check(
                f"one clock {does} as {name}",
                f"{JOINT[1.0].name}: {measure}",
                f"{variant}: {measure}",
                -MARGIN,
            )
            for name, variant in (
                *((f"joint_shift {s:g}", JOINT[s].name) for s in (4.0, 0.25, 0.1)),
                ("the default's .03", "default"),
            )
            for does, measure in (
                ("agrees as well", "agreement"),
                ("follows the prompt as well", "prompt followed"),
            )
        ),
        panels=(
            across(
                "joint_shift",
                positions(JOINT, default=0.03),
                "agreement",
                "prompt followed",
                "read",
                "drawn",
            ),
        ),
    ),
    Experiment(
        name="train_text",
        claim=(
            "Ours, for a small GPU: with the generator frozen, the text stream alone learns to read"
            " and keeps the drawing (--train text); the paper trains all. After 400 text steps, "
            "and after the default's 1,600."
        ),
        refuted_if="It reads or draws worse than where all is trained.",
        variants=tuple(TRAINED.values()),
        measures=(reading, drawing, agreement),
        checks=tuple(
            Check(
                f"after {steps} steps the text alone {does} as well",
                f"{TRAINED['text', length].name}: {measure}",
                f"{TRAINED['all', length].name}: {measure}",
                -MARGIN,
            )
            for length, steps in (("", "400"), ("whole, ", "1,600"))
            for does, measure in (("reads", "read"), ("draws", "drawn"), ("agrees", "agreement"))
        ),
        panels=(bars("read", "drawn", "agreement"),),
    ),
    Experiment(
        name="padding",
        claim=(
            "A choice of ours: the PAD tokens of texts shorter than N are attended to, and are in"
            " the loss. (The paper's recall has 256 tokens for prompts of at most 128, sections "
            "3.3 and 4.1, and says no more.) Recall alone, for its texts are short: prompts of 6 "
            "tokens of 16."
        ),
        refuted_if="Without their loss, or out of sight, it reads or draws better.",
        variants=(
            from_generator("PAD seen", RECALL),
            from_generator("PAD without loss", RECALL, make_model=NoPadLoss),
            from_generator("PAD unseen", RECALL, make_model=NoPad, loss=no_pad_loss),
        ),
        measures=(recalling_in_length,),
        checks=tuple(
            Check(
                f"{name} does not {does} better",
                f"PAD seen: {measure}",
                f"{name}: {measure}",
                -MARGIN,
            )
            for name in ("PAD without loss", "PAD unseen")
            for does, measure in (
                ("read", "read"),
                ("read, the length told,", "read, length told"),
                ("draw", "drawn"),
                ("draw, the length told,", "drawn, length told"),
            )
        ),
        panels=(bars("read", "read, length told", "drawn", "drawn, length told"),),
    ),
    Experiment(
        name="lambda_t",
        claim=(
            "Text, few tokens and a new task, needs more weight than video: lambda_t = |z_v| / "
            "|z_t| balances the supervision (section 3.3). Here that is 3, the base run's."
        ),
        refuted_if=(
            "Text reads as well at lambda_t = 1, or another weight is better at reading and "
            "drawing together."
        ),
        variants=(LAMBDA[0.3], LAMBDA[1.0], BASE, LAMBDA[10.0]),
        measures=(reading, drawing),
        checks=(
            Check("|z_v| / |z_t| reads better than 1", "base: read", "lambda_t 1: read"),
            *(
                Check(
                    f"no worse than {v.name}, reading and drawing together",
                    "base: read + base: drawn",
                    f"{v.name}: read + {v.name}: drawn",
                    -MARGIN,
                )
                for v in LAMBDA.values()
            ),
        ),
        panels=(across("lambda_t", positions(LAMBDA, base=3), "read", "read all", "drawn"),),
    ),
    Experiment(
        name="embedding",
        claim=(
            "E is learnable, and encouraged to align with the continuous video manifold for stable"
            " training (section 3.1, eq. 7); how is not said. So E needs help to stay alive, and "
            "alignment gives it."
        ),
        refuted_if=(
            "The literal E keeps its size and reads as well; or no kind of alignment reads better "
            "than unit rows and an anchor (base)."
        ),
        variants=(
            BASE,
            from_generator("literal", "--embedding literal --anchor 0"),
            from_generator(
                "fixed target", "--embedding literal --anchor 0", make_model=FixedTarget
            ),
            from_generator("no anchor", "--anchor 0"),
            from_generator("frozen", make_model=FrozenE),
            from_generator("centred", make_model=CentredE),
            from_generator("patch", "--text-dim 24", make_model=PatchE),
            from_generator("contrastive", loss=contrastive_loss),
        ),
        measures=(reading, rows_of_E),
        checks=(
            Check("the literal E shrinks below half its size", 0.5, "literal: RMS of E"),
            Check("the literal E reads worse than unit rows", "no anchor: read", "literal: read"),
            *(
                Check(f"alignment ({name}) reads better", f"{name}: read", "base: read")
                for name in ("centred", "patch", "contrastive")
            ),
            Check("a learned E reads better than a frozen one", "base: read", "frozen: read"),
            Check("the anchor helps unit rows", "base: read", "no anchor: read", ours=True),
        ),
        panels=(bars("read", "read all", "RMS of E", "cosine of E"), bars("rank of E")),
    ),
    Experiment(
        name="text_flow",
        claim=(
            "Text flows over continuous token embeddings, by their velocity (section 3.1, eq. "
            "7-8); the published weights move discrete tokens instead. We ask whether embeddings "
            "lose nothing against tokens, nor velocity against predicting the data point (base), "
            "and whether few steps suffice."
        ),
        refuted_if="The discrete flow or the x1 output reads better, or many steps are needed.",
        variants=(
            BASE,
            DEFAULT,
            from_generator("discrete", "--text-flow discrete"),
            from_generator("velocity", "--text-output velocity"),
            *TOKEN.values(),
        ),
        measures=(reading, reading_in_steps, drawing),
        checks=(
            Check(
                "embeddings read as well as discrete tokens",
                "base: read",
                "discrete: read",
                -MARGIN,
            ),
            Check(
                "the velocity output reads as well as x1", "velocity: read", "base: read", -MARGIN
            ),
            Check(
                "8 steps read as well as 64",
                "default: read in @ 8",
                "default: read in @ 64",
                -MARGIN,
            ),
            *(
                Check(
                    f"the video computed once, it reads as well in {k} steps",
                    f"default: video reused, read in @ {k}",
                    f"default: read in @ {k}",
                    -0.005,
                    ours=True,
                )
                for k in (16, 64)
            ),
        ),
        panels=(
            curve("steps of the sampler", "read in", log=True),
            across("width d of a token", positions(TOKEN, base=64), "read", "read all", "drawn"),
        ),
    ),
    Experiment(
        name="coevolution",
        claim=(
            "Drawn together, the two streams co-evolve and mutually sharpen each other into a "
            "coherent pair (section 3.3, eq. 18). So they agree more than streams that do not see "
            "each other, on what the prompt leaves open, and each follows a change of the other."
        ),
        refuted_if=(
            "Apart they agree as well; or exchanging one stream for another clip's leaves the "
            "other as it was."
        ),
        variants=(DEFAULT,),
        measures=(agreement, coevolution),
        checks=(
            Check(
                "together they agree more than apart",
                "default: agreement at @ 1.00",
                "default: agreement, apart",
            ),
            Check(
                "agreement grows along tau",
                "default: agreement at @ 1.00",
                "default: agreement at @ 0.17",
            ),
            *(
                Check(
                    f"the {stream} follows an exchange of the other at tau {tau}",
                    f"default: {stream} follows @ {tau}",
                    f"default: {stream} stranger @ {tau}",
                )
                for stream in ("video", "text")
                for tau in TAUS[:2]
            ),
        ),
        panels=(
            curve("tau", "agreement at"),
            curve(
                "tau of the exchange",
                "video follows",
                "video stranger",
                "text follows",
                "text stranger",
            ),
        ),
    ),
    Experiment(
        name="understanding",
        claim=(
            "In refinement the prompt alone does not suffice, which makes the model attend to the"
            " video: attributes, spatial relations, temporal dynamics (section 3.3). So it reads "
            "what the prompt leaves open, and sees motion. We ask more: that captions need no "
            "prompt, resist a wrong one, and hold for combinations never shown. The default, "
            "which drops the prompt, is told beside it."
        ),
        refuted_if=(
            "What the prompt leaves open is not read, or direction is read as well from shuffled "
            "frames."
        ),
        variants=(
            from_default("whole, refine p 0", "{default_steps} --refine-p-drop 0", loss=lines()),
            DEFAULT,
        ),
        measures=(reading_both_ways, reading_by_prompt, reading_frames),
        checks=tuple(
            check
            for who, name, ours in (
                ("", "whole, refine p 0", False),
                ("dropping the prompt, ", "default", True),
            )
            for check in looks_at_the_video(who, name, ours)
        ),
        panels=(
            bars(
                "right prompt",
                "no prompt",
                "wrong prompt",
                "wrong prompt copied",
                "no prompt unseen",
            ),
            bars(
                "direction, in order",
                "direction, shuffled",
                "speed, in order",
                "speed, shuffled",
                "colour, in order",
                "colour, shuffled",
                "direction turned, backwards",
            ),
        ),
    ),
    Experiment(
        name="scaling",
        claim=(
            "Generation-centric architectures are a scalable path (abstract). We ask whether "
            "reading and drawing improve with width, the generator's too, and with the number of "
            "distinct clips in the text stages."
        ),
        refuted_if="More width, or more clips, improve nothing.",
        variants=(*WIDTH.values(), *CLIPS.values(), BASE),
        measures=(reading, drawing),
        checks=(
            Check("width 96 reads better than 32", "width 96: read", "width 32: read"),
            Check("width 96 draws better than 32", "width 96: drawn", "width 32: drawn"),
            Check("width 96 reads better than 64", "width 96: read", "base: read"),
            Check("ever new clips read better than 256", "base: read", "256 clips: read"),
            Check("ever new clips read better than 4096", "base: read", "4096 clips: read"),
        ),
        panels=(
            across(
                "width",
                {"width 32": 32, "width 48": 48, "base": 64, "width 96": 96},
                "read",
                "read all",
                "drawn",
            ),
            across(
                "distinct clips (last: none twice)",
                positions(CLIPS, base=EVER_NEW),
                "read",
                "read all",
                "drawn",
            ),
        ),
    ),
)
