"""Does the method work? The paper's claims, each tested in the toy: variants are trained, measured, judged and drawn.

    python -m toy.experiments                          all of them, hours on two CPU cores; a second call goes on where the first stopped
    python -m toy.experiments pretraining recall       some of them
    python -m toy.experiments --quick                  one seed, a fifth of the steps: does it run, not is it so

A variant is a run of train.py (folder <out>/<variant>/seed<k>) that differs from the variant "base", the default recipe shortened, in one thing;
"default" and those named "whole" are not shortened. All text stages start from one generator per seed, unless that is the question. An experiment writes
<out>/<name>/results.json and figure.png. What was found is computed, never written here: see Check. A claim is supported where all its checks hold, not supported where none does, else mixed.
"""

import argparse
import io
import json
import os
import signal
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from unittest.mock import patch

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from PIL import Image
from safetensors.torch import load_file

import toy
import train
import univigu
from univigu import EmbeddingFlow, UniViGU, understand

from . import oracle
from .evaluate import SAMPLING, said
from .measures import (TAUS, agreement, coevolution, drawing, drawing_by_stage, reading, reading_by_prompt, reading_by_step, reading_frames,
                       reading_in_steps, rows_of_E)

matplotlib.use("Agg")                                               # figures go to files alone
MARGIN = 0.02                                                       # of accuracy: smaller gains are not worth a claim
MAIN = ("read", "read all", "drawn", "agreement", "prompt followed")                         # the numbers that are printed


@dataclass(frozen=True)
class Budget:
    """What every run of a pass gets: steps a stage, clips an evaluation, other flags of train.py. default: steps of the run that is not shortened."""

    generator: int
    recall: int
    refine: int
    clips: int
    default: tuple[int, int, int]
    flags: str = ""

    def fill(self, flags):
        """Step counts into flags: {text} is both text stages together, {long_refine} refine and the generator; of the run that is not shortened, {default}
        are all stages and their steps, {default_steps} the steps alone, {default_text} how many both text stages have together."""
        steps = " ".join(f"--{stage}-steps {steps}" for stage, steps in zip(train.STAGES, self.default))
        return flags.format(recall=self.recall, text=self.recall + self.refine, long_refine=self.generator + self.refine, default=f"--stages generator,recall,refine {steps}",
                            default_steps=steps, default_text=sum(self.default[1:]))


FULL = Budget(generator=800, recall=100, refine=300, clips=256,
              default=(train.Train.generator_steps, train.Train.recall_steps, train.Train.refine_steps))
QUICK = Budget(generator=160, recall=20, refine=60, clips=64, default=(160, 40, 520))


@dataclass(frozen=True)
class Variant:
    """One thing that differs from the base run: flags of train.py, or a patch where it has no flag for it."""

    name: str
    flags: str = ""
    patch: tuple = ()                                               # (owner, attribute, value in its place) each
    start: "Variant | None" = None                                  # the generator it starts from; None: from scratch


# ---------------------------------------------------------------- alternatives that train.py has no flag for

def lines(p_drop=None, **shares):
    """MIXTURE with other shares on its lines (default: its own), the prompt dropped with `p_drop` (None: --p-drop) on all of them."""
    mixture = {name: (shares.get(name, 0.0) if shares else share, p_drop) for name, (share, _) in univigu.MIXTURE.items()}
    return loss_of(partial(univigu.uni_flow_loss, mixture=mixture))


def repeated(n):
    """A training set of n clips, shown again and again."""
    return ((toy.Shapes, "batch", lambda self, step, size: [i % n for i in range(step * size, (step + 1) * size)]),)


def model_of(cls):
    return ((train, "build", cls),)


def loss_of(function):
    return ((train, "uni_flow_loss", function),)


class SharedFFN(UniViGU):
    """Both modalities go through the video expert."""

    def __init__(self, config: univigu.Config):
        super().__init__(config)
        for block in self.blocks:
            del block.ffn_t
            object.__setattr__(block, "ffn_t", block.ffn)           # not a submodule of its own: its weights are stored once


class FrozenE(UniViGU):
    """E stays as it was drawn."""

    def embedding_matrix(self):
        return super().embedding_matrix().detach()


class CentredE(UniViGU):
    """Alignment by moments: E's rows have the mean (zero) and the RMS (one) of the video latents."""

    def embedding_matrix(self):
        E = self.token_embedding.weight.float()
        return F.normalize(E - E.mean(0), dim=-1) * E.shape[-1] ** 0.5


class PatchE(UniViGU):
    """Alignment by construction: a text token is as wide as a video patch, and enters through a copy of the patch embedding."""

    @torch.no_grad()
    def start_text(self):
        super().start_text()
        self.text_in.weight.copy_(self.patch_embedding.weight.flatten(1))
        self.text_in.bias.copy_(self.patch_embedding.bias)


def contrastive_loss(model, z_v1, y, c, **options):
    """Alignment by a loss: what enters the network of a clip's text should be nearest to what enters of its own video, of all in the batch."""
    total, parts = univigu.uni_flow_loss(model, z_v1, y, c, **options)
    text, video = model.text_in(model.embed(y)).mean(1), model.patch_embedding(z_v1).flatten(2).mean(2)                  # (B, dim)
    logits = 10 * F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T                                               # (B, B)
    own = torch.arange(len(y), device=y.device)
    return total + 0.05 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)), parts


class FixedTargetFlow(EmbeddingFlow):
    """EmbeddingFlow, but the loss may not move E by moving the target."""

    def corrupt(self, *args):
        z_t, u_t = super().corrupt(*args)
        return z_t, u_t.detach()


class FixedTarget(UniViGU):
    text_flow = FixedTargetFlow()


# ---------------------------------------------------------------- training

@contextmanager
def patched(variant):
    with ExitStack() as stack:
        for owner, name, value in variant.patch:
            stack.enter_context(patch.object(owner, name, value))
        yield


def folder(out, variant, seed):
    return Path(out) / variant.name / f"seed{seed}"


def arguments(variant, seed, budget, out):
    """The flags of train.py for a run."""
    steps = [word for stage in train.STAGES for word in (f"--{stage}-steps", str(getattr(budget, stage)))]
    first = ["--init", str(folder(out, variant.start, seed) / "generator")] if variant.start else []
    return ["--stages", "recall,refine", *steps, *first, "--seed", str(seed), "--eval-clips", "0", "--out", str(folder(out, variant, seed)),
            *budget.flags.split(), *budget.fill(variant.flags).split()]


def graft(source, config):
    """In place of train.load: the generator's video weights in a new model, whose text stream may differ from that of other variants."""
    model, weights = train.build(config), load_file(Path(source) / "model.safetensors")
    model.load_state_dict({name: weights[name] for name in model.state_dict() if not model.is_text(name)}, strict=False)
    return model, {}


def trained(variant, seed, budget, out):
    """Trains a variant, or what is left to train of it. Returns its Run."""
    if variant.start:
        trained(variant.start, seed, budget, out)
    where, argv = folder(out, variant, seed), arguments(variant, seed, budget, out)
    argv += ["--resume"] * bool(train.checkpoints(where))
    settings, *_ = train.parse(argv)                                # a run that was begun with other flags is refused here
    run = Run(variant, where, seed, budget.clips, settings.stages.split(","))
    if not (where / run.stages[-1]).exists():
        print(f"training {variant.name}, seed {seed}", end="", flush=True)
        load = train.load
        torch.compiler.reset()                                      # each run compiles its own blocks: their sizes differ
        with patched(variant), redirect_stdout(io.StringIO()), \
                patch.object(train, "load", lambda source, config: (graft if source == settings.init else load)(source, config)):
            train.main(argv)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)               # train.py's own handler would wait for a step that never comes
        if not (where / run.stages[-1]).exists():                   # it was asked to end, and saved
            sys.exit("\ntoy.experiments: stopped; the same command goes on")
        print(f": {run.seconds():.0f} s", flush=True)
    return run


@dataclass
class Run:
    """A finished training, and the clips (new ones, of combinations it was shown) that it is measured on."""

    variant: Variant
    folder: Path
    seed: int
    clips: int
    stages: list

    def load(self, checkpoint):
        with patched(self.variant), redirect_stdout(io.StringIO()):
            model = train.build(train.config_from(train.read_json(checkpoint / "config.json")))
            model.load_state_dict(load_file(checkpoint / "model.safetensors"))
            return model.eval()

    @cached_property
    def model(self):
        return self.load(self.folder / self.stages[-1])

    @cached_property
    def world(self):
        return toy.World(self.seed)

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def show(self, split="seen", share=1):
        """A batch of clips (of all, one in `share`) and what they show (B, 7)."""
        indices, dataset = range(max(2, self.clips // share)), self.world.dataset(split)
        return dataset.__getitems__(indices), dataset.clips(indices).attributes

    def read(self, z_v, c=None, model=None, **sampling):
        """z_v -> what the captions say of it (B, 7)."""
        y_hat = understand(model or self.model, z_v, c, generator=self.generator(), **SAMPLING["understand"] | {"reuse_video": False} | sampling)
        return said(self.world.tokenizer.decode(y_hat))

    def look(self, z_v):
        """z_v -> what the oracle sees in it (B, 7)."""
        return oracle.read(self.world.codec.decode(z_v))

    def seconds(self):
        """Of training. Raises ValueError where the run's log does not say."""
        path = self.folder / "metrics.jsonl"
        try:
            return float(json.loads(path.read_text().splitlines()[-1])["wall_s"])
        except (OSError, ValueError, LookupError, TypeError):
            raise ValueError(f"{path} has no last line with wall_s, wanted the log of a run: remove {self.folder}, and it is trained anew") from None

    def measure(self, measures):
        """All the numbers of some measures. They are kept beside the checkpoints, since experiments share runs."""
        path = self.folder / "measured.json"
        known = train.read_json(path) if path.exists() else {}
        keys = {f"{function.__name__}, {self.clips} clips": function for function in measures}
        for key in keys.keys() - known:
            known[key] = {name: round(float(value), 5) for name, value in keys[key](self).items()}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(known, indent=1) + "\n")
            part.replace(path)                                      # a kill leaves it whole
        return {name: value for key in keys for name, value in known[key].items()}


# ---------------------------------------------------------------- figures: a panel is a function (axes, variant -> name -> (mean, spread))

def bars(*names):
    """A group of bars a name, a bar a variant."""
    def draw(axes, numbers):
        width = 0.8 / len(numbers)
        for k, (variant, of) in enumerate(numbers.items()):
            x, mean, spread = zip(*[(i + k * width, *of.get(name, (0, 0))) for i, name in enumerate(names)])
            axes.bar(x, mean, width, yerr=spread, label=variant, color=f"C{k}")
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names, rotation=20 if len(names) > 4 else 0, fontsize=8)
    return draw


def curve(xlabel, *names, log=False, of=()):
    """A line a variant (of these, or all), or a name where there are several (of one variant), through its points "name @ x"."""
    return partial(draw_lines, xlabel, names[0] if len(names) == 1 else "", log, lambda numbers: {
        variant if len(names) == 1 else name: sorted((float(key.split(" @ ")[1]), *value) for key, value in numbers[variant].items() if key.startswith(f"{name} @ "))
        for name in names for variant in of or numbers})


def across(xlabel, xs, *names, log=True):
    """A line a name, a point a variant: xs maps variants to their x."""
    return partial(draw_lines, xlabel, "", log, lambda numbers: {name: [(x, *numbers[variant][name]) for variant, x in xs.items()] for name in names})


def across_groups(xlabel, name, **groups):
    """As across, of one number: a line a group of variants, each mapped to its x."""
    return partial(draw_lines, xlabel, name, True, lambda numbers: {label: [(x, *numbers[variant][name]) for variant, x in xs.items()] for label, xs in groups.items()})


def draw_lines(xlabel, ylabel, log, find, axes, numbers):
    """find: numbers -> label -> list of (x, mean, spread)."""
    for label, points in find(numbers).items():
        x, mean, spread = zip(*points)
        axes.errorbar(x, mean, yerr=spread, marker=".", capsize=2, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log else "linear")
    if len(x) < 9:
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()


# ---------------------------------------------------------------- the experiments

@dataclass
class Check:
    """A sentence of the claim. It holds where the mean over seeds of `more` - `less` exceeds `above` by more than its standard deviation.

    more, less: a number, or "variant: name of a number"; several, with " + " between them, are averaged.
    """

    says: str
    more: "str | float"
    less: "str | float" = 0.0
    above: float = MARGIN
    ours: bool = False                                              # about a choice of this repository: told, but not counted in the verdict

    def gain(self, of):
        """of: variant -> name -> number, of one seed."""
        value = lambda key: of[key.split(": ", 1)[0]][key.split(": ", 1)[1]]
        mean = lambda keys: keys if isinstance(keys, float) else statistics.fmean(map(value, keys.split(" + ")))
        return mean(self.more) - mean(self.less)


@dataclass
class Experiment:
    """A claim of the paper, and what would refute it. checks: what decides; panels: of the figure."""

    name: str
    claim: str
    refuted_if: str
    variants: tuple
    measures: tuple
    checks: tuple
    panels: tuple


GENERATOR = Variant("generator", "--stages generator")
from_generator = partial(Variant, start=GENERATOR)
CHECKPOINTS = "--save-every {recall} --keep 99"
BASE = from_generator("base", CHECKPOINTS)
DEFAULT = Variant("default", "{default}")                           # as `python train.py`

DROP = {p: from_generator(f"p {p:g}", f"--p-drop {p}", lines()) for p in (0.0, 0.1, 0.5, 0.9, 1.0)}
LAMBDA = {x: from_generator(f"lambda_t {x:g}", f"--lambda-t {x}") for x in (0.3, 1.0, 10.0)}
TOKEN = {d: from_generator(f"d {d}", f"--text-dim {d}") for d in (8, 16, 32)}
CLIPS = {n: from_generator(f"{n} clips", patch=repeated(n)) for n in (256, 1024, 4096)}
EVER_NEW = train.Train.batch * (FULL.recall + FULL.refine)          # clips of the text stages where none is shown twice
SCRATCH = {n: Variant(f"scratch, {n} clips", patch=repeated(n)) for n in CLIPS}
SIZES = {w: f"--dim {w} --ffn-dim {4 * w} --text-ffn-dim {4 * w}" for w in (32, 48, 96)}
WIDTH = {w: Variant(f"width {w}", flags, start=Variant(f"generator {w}", f"--stages generator {flags}")) for w, flags in SIZES.items()}

EXPERIMENTS = (
    Experiment(
        "pretraining",
        "What a generator knows of text and video can be repurposed for understanding, which becomes easier to learn (sections 1 and 3.2). "
        "So text stages that start from the generator read better than the same stages from scratch.",
        "The network from scratch reads as well after as many text steps, or after as many steps in all, the generator's counted; or with as few captioned clips.",
        (BASE, Variant("scratch", CHECKPOINTS), Variant("scratch, long", f"{CHECKPOINTS} --refine-steps {{long_refine}}"), *CLIPS.values(), *SCRATCH.values()),
        (reading, reading_by_step),
        (Check("better than from scratch after as many text steps", "base: read", "scratch: read"),
         Check("better than from scratch after as many steps in all", "base: read", "scratch, long: read"),
         Check("better than from scratch where both have 256 clips", "256 clips: read", "scratch, 256 clips: read")),
        (curve("text steps of 64 clips", "read by step", of=("base", "scratch", "scratch, long")),
         across_groups("distinct clips (last: none twice)", "read", **{start: {v.name: n for n, v in few.items()} | {last: EVER_NEW}
                 for start, few, last in (("from the generator", CLIPS, "base"), ("from scratch", SCRATCH, "scratch"))}))),
    Experiment(
        "recall",
        "Knowledge Recall, which has the model write the prompt first, rapidly adapts it to the joint flow at minimal cost (section 3.3). "
        "So recall and refine read better than refine alone for as many steps.",
        "Refine alone reads as well.",
        (BASE, from_generator("no recall", f"{CHECKPOINTS} --stages refine --refine-steps {{text}}")),
        (reading, reading_by_step, drawing),
        (Check("recall and refine read better", "base: read", "no recall: read"),
         Check("and draw no worse", "base: drawn", "no recall: drawn", -MARGIN)),
        (curve("text steps of 64 clips", "read by step"), bars("read", "read all", "drawn"))),
    Experiment(
        "dropout",
        "With its prompt at hand the model copies it instead of looking at the video; dropping it with probability p makes it look (section 3.3). "
        "Here p holds on all lines of the clocks' mixture, where the default recipe (base) keeps most prompts on the lines that draw.",
        "At p = 0 captions without a prompt are as good as with it and a wrong prompt is not copied; or dropout does not mend it.",
        (*DROP.values(), BASE),
        (reading, reading_by_prompt, drawing),
        (Check("at p = 0 it reads worse without the prompt", "p 0: right prompt", "p 0: no prompt"),
         Check("at p = 0 it copies a wrong prompt more than at .9", "p 0: wrong prompt copied", "p 0.9: wrong prompt copied"),
         Check("at p = .9 it reads better without a prompt than at 0", "p 0.9: no prompt", "p 0: no prompt"),
         Check("at p = .9 it still draws as at 0", "p 0.9: drawn", "p 0: drawn", -MARGIN)),
        (across("p", {v.name: p for p, v in DROP.items()}, "right prompt", "no prompt", "wrong prompt", "wrong prompt copied", "drawn", log=False),)),
    Experiment(
        "experts",
        "Attention carries what the modalities share, the FFNs what each needs alone (section 3.2). "
        "So a text expert of its own, however light, beats one shared FFN, and protects generation.",
        "A shared FFN reads and draws as well, or a narrow text expert reads worse.",
        (GENERATOR, BASE, from_generator("shared FFN", patch=model_of(SharedFFN)), from_generator("narrow FFN_t", "--text-ffn-dim 32")),
        (reading, drawing),
        (Check("separate experts read better", "base: read", "shared FFN: read"),
         Check("separate experts draw better", "base: drawn", "shared FFN: drawn"),
         Check("a text expert of an eighth of the width reads as well", "narrow FFN_t: read", "base: read", -MARGIN)),
        (bars("read", "read all", "drawn"),)),
    Experiment(
        "survival",
        "Training both flows together adds text while it preserves the pretrained generator's priors (section 3.2, eq. 11). "
        "So videos are as good after recall and after refine as before.",
        "The oracle reads fewer of the asked attributes from videos drawn after a stage; or as many without the video loss.",
        (GENERATOR, BASE, from_generator("no video loss", patch=loss_of(partial(univigu.uni_flow_loss, lambda_v=0.0)))),
        (reading, drawing, drawing_by_stage),
        (Check("after recall it draws as the generator", "base: drawn after recall", "generator: drawn", -MARGIN),
         Check("after refine it draws as the generator", "base: drawn", "generator: drawn", -MARGIN),
         Check("without the video loss it draws worse", "base: drawn", "no video loss: drawn")),
        (bars("drawn after generator", "drawn after recall", "drawn after refine", "read"),)),
    Experiment(
        "clocks",
        "Independent clocks are a key design: they teach dependencies across all combinations of noise levels (section 3.1, eq. 9). "
        "So all three modes are better than with one clock for both; here p = .5 on all lines, and text's clock is warped alike.",
        "One clock (the line that joint() walks) reads, draws or does both as well.",
        (from_generator("independent", "--clocks independent --p-drop 0.5"), from_generator("one clock", "--p-drop 0.5", lines(joint=1.0)), DROP[0.5]),
        (reading, drawing, agreement),
        (Check("independent clocks read better than one", "independent: read", "one clock: read"),
         Check("independent clocks draw better than one", "independent: drawn", "one clock: drawn"),
         Check("independent clocks agree better than one", "independent: agreement", "one clock: agreement"),
         Check("the mixture (p 0.5) reads better than independent", "p 0.5: read", "independent: read", ours=True),
         Check("the mixture draws no worse than independent", "p 0.5: drawn", "independent: drawn", -MARGIN, ours=True),
         Check("the mixture agrees better than independent", "p 0.5: agreement", "independent: agreement", ours=True)),
        (bars("read", "read all", "drawn", "agreement", "prompt followed"),)),
    Experiment(
        "whole",
        "Recall and independent clocks are how the paper gets all three modes (sections 3.1 and 3.3). "
        "So neither costs a mode over as many text steps as the default has, whose clocks are a mixture; most other runs stop after a seventh of them.",
        "Without recall, or with the mixture, a mode is better.",
        (DEFAULT, from_generator("whole, no recall", "--stages refine --refine-steps {default_text}"), from_generator("whole, independent", "{default_steps} --clocks independent --p-drop 0.5")),
        (reading, drawing, agreement),
        tuple(Check(f"{who} {does} as well as {than}", f"{more}: {name}", f"{less}: {name}", -MARGIN)
              for who, more, than, less in (("with recall it", "default", "without", "whole, no recall"), ("with independent clocks it", "whole, independent", "with the mixture", "default"))
              for does, name in (("reads", "read"), ("draws", "drawn"), ("agrees", "agreement, text ahead"))),
        (bars("read", "read all", "drawn", "agreement", "agreement, text ahead", "prompt followed"),)),
    Experiment(
        "lambda_t",
        "Text, few tokens and a new task, needs more weight than video: lambda_t = |z_v| / |z_t| balances the supervision (section 3.3). "
        "Here that is 3, the base run's.",
        "Text reads as well at lambda_t = 1, or another weight is better at reading and drawing together.",
        (LAMBDA[0.3], LAMBDA[1.0], BASE, LAMBDA[10.0]),
        (reading, drawing),
        (Check("|z_v| / |z_t| reads better than 1", "base: read", "lambda_t 1: read"),
         *(Check(f"no worse than {v.name}, reading and drawing together", "base: read + base: drawn", f"{v.name}: read + {v.name}: drawn", -MARGIN)
           for v in LAMBDA.values())),
        (across("lambda_t", {"lambda_t 0.3": 0.3, "lambda_t 1": 1, "base": 3, "lambda_t 10": 10}, "read", "read all", "drawn"),)),
    Experiment(
        "embedding",
        "E is learnable, and encouraged to align with the continuous video manifold for stable training (section 3.1, eq. 7); how is not said. "
        "So E needs help to stay alive, and alignment gives it.",
        "The literal E keeps its size and reads as well; or no kind of alignment reads better than unit rows and an anchor (base).",
        (BASE, from_generator("literal", "--embedding literal --anchor 0"),
         from_generator("fixed target", "--embedding literal --anchor 0", model_of(FixedTarget)),
         from_generator("no anchor", "--anchor 0"), from_generator("frozen", patch=model_of(FrozenE)), from_generator("centred", patch=model_of(CentredE)),
         from_generator("patch", "--text-dim 24", model_of(PatchE)), from_generator("contrastive", patch=loss_of(contrastive_loss))),
        (reading, rows_of_E),
        (Check("the literal E shrinks below half its size", 0.5, "literal: RMS of E"),
         Check("the literal E reads worse than unit rows", "no anchor: read", "literal: read"),
         *(Check(f"alignment ({name}) reads better", f"{name}: read", "base: read") for name in ("centred", "patch", "contrastive")),
         Check("a learned E reads better than a frozen one", "base: read", "frozen: read"),
         Check("the anchor helps unit rows", "base: read", "no anchor: read", ours=True)),
        (bars("read", "read all", "RMS of E", "cosine of E"), bars("rank of E"))),
    Experiment(
        "text_flow",
        "Text flows over continuous token embeddings, by their velocity (section 3.1, eq. 7-8); the published weights move discrete tokens instead. "
        "So embeddings lose nothing against tokens, nor velocity against predicting the data point (base), and few steps suffice.",
        "The discrete flow or the x1 output reads better, or many steps are needed.",
        (BASE, DEFAULT, from_generator("discrete", "--text-flow discrete"), from_generator("velocity", "--text-output velocity"), *TOKEN.values()),
        (reading, reading_in_steps, drawing),
        (Check("embeddings read as well as discrete tokens", "base: read", "discrete: read", -MARGIN),
         Check("the velocity output reads as well as x1", "velocity: read", "base: read", -MARGIN),
         Check("8 steps read as well as 64", "default: read in @ 8", "default: read in @ 64", -MARGIN),
         *(Check(f"the video computed once, it reads as well in {k} steps", f"default: video reused, read in @ {k}", f"default: read in @ {k}", -0.005, ours=True) for k in (16, 64))),
        (curve("steps of the sampler", "read in", log=True), across("width d of a token", {v.name: d for d, v in TOKEN.items()} | {"base": 64}, "read", "read all", "drawn"))),
    Experiment(
        "coevolution",
        "Drawn together, the two streams co-evolve and mutually sharpen each other into a coherent pair (section 3.3, eq. 18). "
        "So they agree more than streams that do not see each other, on what the prompt leaves open, and each follows a change of the other.",
        "Apart they agree as well; or exchanging one stream for another clip's leaves the other as it was.",
        (DEFAULT,),
        (agreement, coevolution),
        (Check("together they agree more than apart", "default: agreement at @ 1.00", "default: agreement, apart"),
         Check("agreement grows along tau", "default: agreement at @ 1.00", "default: agreement at @ 0.17"),
         *(Check(f"the {stream} follows an exchange of the other at tau {tau}", f"default: {stream} follows @ {tau}", f"default: {stream} stranger @ {tau}")
           for stream in ("video", "text") for tau in TAUS[:2])),
        (curve("tau", "agreement at"), curve("tau of the exchange", *(f"{stream} {who}" for stream in ("video", "text") for who in ("follows", "stranger"))))),
    Experiment(
        "understanding",
        "Refinement makes the model attend to the video instead of relying on the prompt: attributes, spatial relations, temporal dynamics (section 3.3). "
        "So captions need no prompt, resist a wrong one, see motion, and hold for combinations never shown.",
        "A wrong prompt is believed; direction is read as well from shuffled frames; unseen combinations are read worse.",
        (DEFAULT,),
        (reading_by_prompt, reading_frames),
        (Check("without a prompt it reads as with it", "default: no prompt", "default: right prompt", -MARGIN),
         Check("with a wrong prompt it reads as without", "default: wrong prompt", "default: no prompt", -MARGIN),
         Check("shuffled frames cost the direction", "default: direction, in order", "default: direction, shuffled", 0.2),
         Check("and the speed", "default: speed, in order", "default: speed, shuffled", 0.2),
         Check("they leave the colour", "default: colour, shuffled", "default: direction, shuffled", 0.2),
         Check("backwards, the opposite direction is read", "default: direction turned, backwards", 0.5),
         Check("unseen combinations are read as well", "default: no prompt unseen", "default: no prompt", -MARGIN)),
        (bars("right prompt", "no prompt", "wrong prompt", "wrong prompt copied", "no prompt unseen"),
         bars(*(f"{name}, {order}" for name in ("direction", "speed", "colour") for order in ("in order", "shuffled")), "direction turned, backwards"))),
    Experiment(
        "scaling",
        "Generation-centric architectures are a scalable path (abstract). "
        "So reading and drawing improve with width, the generator's too, and with the number of distinct clips in the text stages.",
        "More width, or more clips, improve nothing.",
        (*WIDTH.values(), *CLIPS.values(), BASE),
        (reading, drawing),
        (Check("width 96 reads better than 32", "width 96: read", "width 32: read"),
         Check("width 96 draws better than 32", "width 96: drawn", "width 32: drawn"),
         Check("width 96 reads better than 64", "width 96: read", "base: read"),
         Check("ever new clips read better than 256", "base: read", "256 clips: read"),
         Check("ever new clips read better than 4096", "base: read", "4096 clips: read")),
        (across("width", {"width 32": 32, "width 48": 48, "base": 64, "width 96": 96}, "read", "read all", "drawn"),
         across("distinct clips (last: none twice)", {v.name: n for n, v in CLIPS.items()} | {"base": EVER_NEW}, "read", "read all", "drawn"))),
)


# ---------------------------------------------------------------- the verdict

def summary(values):
    """Over seeds: mean, and spread, their standard deviation (0 for one seed)."""
    return round(statistics.fmean(values), 4), round(statistics.stdev(values), 4) if len(values) > 1 else 0.0


def judge(checks, seeds):
    """checks against one {variant: {name: number}} a seed -> verdict, and a dict a check."""
    told = []
    for check in checks:
        gains = [round(check.gain(of), 4) for of in seeds]
        mean, spread = summary(gains)
        told.append(vars(check) | {"gain": gains, "mean": mean, "spread": spread, "holds": mean - check.above > spread})
    holds = [t["holds"] for t in told if not t["ours"]]
    return "supported" if all(holds) else "mixed" if any(holds) else "not supported", told


def finding(verdict, checks):
    """What was found, in a sentence or two: the verdict, and the gain (mean, and standard deviation over seeds) that decided each check; then those on our own choices."""
    told = {ours: "; ".join(f"{'yes' if c['holds'] else 'no'}, {c['says']} ({c['mean']:+.3f} ± {c['spread']:.3f})" for c in checks if c["ours"] == ours) for ours in (False, True)}
    return f"{verdict}: {told[False]}." + f" Our choice: {told[True]}." * bool(told[True])


def perform(experiment, seeds, budget, out):
    """Trains, measures and judges; writes <out>/<name>/results.json and figure.png. Returns what the JSON holds."""
    variants, measured, described = experiment.variants, [], {}
    for seed in seeds:
        runs = {v.name: trained(v, seed, budget, out) for v in variants}
        measured.append({name: run.measure(experiment.measures) for name, run in runs.items()})
        for v in variants:
            start = {"flags": budget.fill(v.flags), "patched": [name for _, name, _ in v.patch], "from": v.start and v.start.name, "training seconds": []}
            described.setdefault(v.name, start)["training seconds"].append(runs[v.name].seconds())
    numbers = {v.name: {name: summary([of[v.name][name] for of in measured]) for name in measured[0][v.name]} for v in variants}
    verdict, checks = judge(experiment.checks, measured)
    results = {"name": experiment.name, "claim": experiment.claim, "refuted if": experiment.refuted_if, "verdict": verdict, "found": finding(verdict, checks), "checks": checks, "seeds": seeds,
               "budget": vars(budget), "variants": described, "mean and spread": numbers, "each seed": measured}
    place = Path(out) / experiment.name
    place.mkdir(exist_ok=True)
    (place / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(experiment, numbers, place / "figure.png")
    return results


def figure(experiment, numbers, path):
    canvas, axes = pyplot.subplots(1, len(experiment.panels), figsize=(6 * len(experiment.panels), 3.6), squeeze=False)
    for draw, panel in zip(experiment.panels, axes[0]):
        draw(axes=panel, numbers=numbers)
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    canvas.suptitle(experiment.name)
    canvas.tight_layout()
    canvas.savefig(path, dpi=80)
    pyplot.close(canvas)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)                   # a third of the size


def table(results):
    """Verdicts; under each its variants' main numbers, then its checks: the gain and what it has to exceed by more than its spread."""
    lines = []
    for r in results:
        lines.append(f"{r['name']:14} {r['verdict']}")
        for variant, of in r["mean and spread"].items():
            main = [f"{name} {of[name][0]:.3f} ± {of[name][1]:.3f}" for name in MAIN if name in of]
            lines += [f"    {variant:16} {'   '.join(main)}"] * bool(main)
        for c in r["checks"]:
            lines.append(f"    {'yes' if c['holds'] else 'no':4} {c['mean']:+.3f} ± {c['spread']:.3f} (above {c['above']:+.2f})  {c['says']}{' [ours]' * c['ours']}")
    return "\n".join(lines)


def main(argv=None):
    begin, known = time.time(), [experiment.name for experiment in EXPERIMENTS]
    parser = argparse.ArgumentParser(prog="python -m toy.experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"toy.experiments: error: {train.one_line(message)}\n")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which experiments (default: all): {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="one seed, a fifth of the steps, a quarter of the clips, in a folder of its own")
    parser.add_argument("--seeds", help="with commas (default: 0,1,2; quick: 0)")
    parser.add_argument("--out", help="folder of runs, results and figures (default: runs/experiments; quick: runs/experiments-quick)")
    flags = parser.parse_args(argv)
    seeds = (("0" if flags.quick else "0,1,2") if flags.seeds is None else flags.seeds).split(",")
    for wrong in set(flags.names) - set(known):
        sys.exit(f"toy.experiments: error: experiment is {wrong!r}, wanted one of {', '.join(known)}")
    if not all(seed.isdecimal() and int(seed) <= 10**9 for seed in seeds) or len(set(seeds)) < len(seeds):
        sys.exit(f"toy.experiments: error: seeds is {flags.seeds!r}, wanted different integers from 0 to {10**9}, with commas")
    out, results = flags.out or "runs/experiments" + "-quick" * flags.quick, []
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"toy.experiments: error: out is {out}, wanted a folder that can be made: {error.strerror}")
    if not os.access(out, os.W_OK | os.X_OK):
        sys.exit(f"toy.experiments: error: out is {out}, wanted a folder that can be written to")
    for experiment in EXPERIMENTS:
        if experiment.name in (flags.names or known):
            print(f"\n{experiment.name}: {experiment.claim}\nRefuted if: {experiment.refuted_if}")
            try:
                results.append(perform(experiment, [int(seed) for seed in seeds], QUICK if flags.quick else FULL, out))
            except (ValueError, OSError) as error:
                sys.exit(f"toy.experiments: error: {train.one_line(error)}")
            print(table(results[-1:]))
    print(f"\n{table(results)}\n{(time.time() - begin) / 60:.0f} minutes; numbers and figures: {out}/*/results.json, {out}/*/figure.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
