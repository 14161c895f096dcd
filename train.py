"""Trains Uni-ViGU: stage generator (toy only: the stand-in for pretrained Wan), recall, refine.

    python train.py                                    the toy, all stages, minutes on a CPU
    python train.py --recipe paper --out runs/paper    the paper's clocks, output and optimizer
    python train.py --resume                           go on from the last checkpoint
    python train.py --stages recall,refine --init runs/toy/generator --out runs/again
    torchrun --nproc-per-node 8 train.py --data data/clips --out runs/wan \\
        --init Wan-AI/Wan2.1-T2V-1.3B-Diffusers        a node; --dry-run first

The stages are one loop with other values: the text's target (STAGES), and --STAGE-steps,
--STAGE-lr, --STAGE-optimizer and --STAGE-p-drop. After the last stage the model is evaluated.
"""

import json
import os
import sys
import time
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from engine.threads import spin_briefly_beside_others

if __name__ == "__main__":
    spin_briefly_beside_others()

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import wan
from engine import checkpoint, cost, distributed, pages
from engine.checkpoint import Average, Saver, Start, checkpoints, needs_prompt
from engine.distributed import all_reduce_max, no_grad_sync
from engine.files import alone, append_line, read_json, read_lines
from engine.metrics import Estimate, Log, Meter, tracker
from engine.optim import Guard, Muon
from engine.options import Run, add_flags, fail, pick, run_command, run_parser
from engine.world import by_stage
from univigu import PRESETS, Config, option, uni_flow_loss, validate
from wan.published import PublishedConfig, build, config_from
from wan.start import freeze, load_own, load_start

# Which of a clip's texts is the target.
STAGES = {
    "generator": None,  # eq. 2: the video alone
    "recall": "prompt",  # section 3.3, stage 1: the target is the prompt itself
    "refine": "caption",  # section 3.3, stage 2: the target is the detailed caption
}

# What `--recipe paper` changes in the toy: independent uniform clocks, velocity output, eq. 11
# alone, Adam, 40% of the text steps in recall and four times the learning rate there, no dropout in
# refine, one clock in joint (sections 3.1, 3.3 and 4.1). What stays ours: toy/results/README.md.
PAPER: dict = dict(
    clocks="independent",
    text_shift=1.0,
    joint_shift=1.0,
    text_output="velocity",
    anchor=0.0,
    recall_optimizer="adam",
    refine_optimizer="adam",
    recall_steps=640,
    refine_steps=960,
    recall_lr=2e-3,
    refine_lr=5e-4,
    refine_p_drop=0.0,
    sampling="paper",
)
RECIPES: dict = {"default": {}, "paper": PAPER}

# Eq. 16 to 18: one clock in joint, the video in every step. Of the steps' number and sizes and of
# guidance the paper does not speak.
EVEN: dict = dict(steps=20, guidance=1.0, shift=1.0)
PAPER_SAMPLING = {"understand": EVEN | {"reuse_video": False}, "generate": EVEN, "joint": EVEN}

# Defaults where the data are not the toy: there is a pretrained generator, and the rest is the
# paper's (section 4.1), but for a little dropout in refine and for Wan's samplers.
REAL: dict = PAPER | dict(
    stages="recall,refine",
    refine_p_drop=0.1,
    sampling="world",
    batch=1,
    recall_steps=40_000,
    refine_steps=60_000,
    recall_lr=2e-4,
    refine_lr=5e-5,
    warmup=1000,
    decay=0.0,
    save_every=1000,
    val_every=2000,
    eval_clips=16,
    workers=2,
)

# And in the second toy, whose clips have more tokens and take longer to learn; by recipe. Captions
# teach its generator the words, as long prompts did Wan's. In runs this long, weights that only
# grow learn little, and words merge that are not told apart yet.
PAIRS_GENERATOR: dict = dict(
    batch=32,
    generator_steps=1200,
    generator_lr=0.03,
    generator_muon_decay=0.1,
    generator_prompt="caption",
)
PAIRS = PAIRS_GENERATOR | dict(
    recall_steps=200,
    refine_steps=5200,
    recall_lr=0.03,
    refine_lr=0.03,
    recall_muon_decay=0.02,
    refine_muon_decay=0.02,
    repulsion=0.1,
)
PAIRS_PAPER = PAIRS_GENERATOR | dict(recall_steps=2160, refine_steps=3240)  # 40% of the text
TOYS = {"toy", "pairs"}

steps = partial(option, low=1, high=10**9)
rate = partial(option, low=0, high=10)
chance = partial(option, low=0, high=1)
optimizer = partial(option, choices=("muon", "adam"))


@dataclass
class Train:
    """The recipe: with Config, every choice that decides what a run learns."""

    preset: str = option("toy", f"sizes of the model: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    recipe: str = option(
        "default",
        "choices of the toy's text stages: 'default' (measured) or 'paper' (its clocks, output, "
        "loss, optimizer, stages and samplers); real data has the paper's, see below",
        choices=tuple(RECIPES),
    )
    data: str = option(
        "toy",
        "what to learn: 'toy', 'pairs' (two shapes, harder by --level), or a folder that "
        "`python -m wan.prepare` wrote",
    )
    level: int = option(1, "of the world 'pairs': 1, two plain shapes, to 6", low=1, high=6)
    vocabulary: str = option(
        "full",
        "of real data: 'full', all of umT5's tokens, or those that occur in the 'data': fewer "
        "parameters, but no other word can be written or drawn",
        choices=("full", "data"),
    )
    recall_data: str = option("", "what stage recall learns from, where that is not --data")
    refine_data: str = option("", "what stage refine learns from, where that is not --data")
    stages: str = option("generator,recall,refine", "which stages to run, in this order")
    init: str = option(
        "",
        "checkpoint whose weights the first stage starts from: a folder of train.py's, or Wan2.1 "
        "in any layout (path or hub id)",
    )
    seed: int = option(
        0, "seed of the weights, the clips, the noise and the evaluation", low=0, high=10**9
    )
    batch: int = option(64, "clips per step, over all processes", low=1, high=10**6)
    generator_steps: int = steps(200, "steps of stage generator")
    recall_steps: int = steps(100, "steps of stage recall")
    refine_steps: int = steps(1500, "steps of stage refine")
    generator_lr: float = rate(0.06, "peak learning rate of stage generator")
    recall_lr: float = rate(0.06, "peak learning rate of stage recall")
    refine_lr: float = rate(0.06, "peak learning rate of stage refine")
    generator_optimizer: str = optimizer(
        "muon", "optimizer of stage generator: 'adam', or 'muon' for the blocks' matrices"
    )
    recall_optimizer: str = optimizer("muon", "optimizer of stage recall")
    refine_optimizer: str = optimizer("muon", "optimizer of stage refine")
    adam_lr: float = rate(0.006, "with muon: peak learning rate of what Adam trains")
    generator_muon_decay: float = rate(
        0.0, "with muon: weight decay of its matrices in stage generator, times the learning rate"
    )
    recall_muon_decay: float = rate(0.0, "the same in stage recall")
    refine_muon_decay: float = rate(0.0, "the same in stage refine")
    warmup: int = option(
        20, "steps over which a stage's learning rate rises from 0", low=0, high=10**9
    )
    decay: float = option(
        1.0, "last part of a stage, over which its learning rate falls to 0", low=0, high=1
    )
    clip: float = option(1.0, "largest norm of the gradient", low=1e-9, high=1e9)
    generator_clocks: str = option(
        "logit-normal",
        "how stage generator draws its clock: 'logit-normal' or 'independent' (uniform)",
        choices=("independent", "logit-normal"),
    )
    clocks: str = option(
        "mixture",
        "how the text stages draw both clocks: 'mixture' or 'independent' (the paper's)",
        choices=("independent", "mixture"),
    )
    generator_prompt: str = option(
        "prompt",
        "what prompts stage generator: a clip's 'prompt', or its 'caption' (the toys only; Wan "
        "learned from long prompts, too)",
        choices=("prompt", "caption"),
    )
    generator_p_drop: float = chance(
        0.1, "probability that a sample's prompt is dropped in stage generator"
    )
    recall_p_drop: float = chance(
        0.7,
        "the same in stage recall, so that the prompt is not copied; with clocks 'mixture' not on "
        "the lines generate and joint, which have 0.1",
    )
    refine_p_drop: float = chance(
        0.7,
        "the same in stage refine, where the paper names none; at 0 the model never learns to "
        "caption without a prompt",
    )
    anchor: float = option(
        0.1, "weight of the cross-entropy that keeps predictions near E's rows", low=0, high=1e3
    )
    repulsion: float = option(
        0.0,
        "weight of the squared cosines between E's rows, without which words that are not told "
        "apart yet may merge",
        low=0,
        high=1e3,
    )
    lambda_t: float = option(
        0.0, "weight of the text flow in eq. 11; 0 = |z_v| / |z_t|", low=0, high=1e6
    )
    train: str = option(
        "all",
        "what the text stages train: 'all', as the paper, or the 'text' stream alone: the rest "
        "stays as --init has it, in bf16 on a GPU, and checkpoints hold the text stream",
        choices=("all", "text"),
    )
    sampling: str = option(
        "world",
        "how the evaluation and sample.py sample by default: as suits the 'world', or as the "
        "'paper': the video in every step, and, of which it does not speak, equal steps and no "
        "guidance; with joint_shift 1 one clock in joint",
        choices=("world", "paper"),
    )
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, for example 0.999; each "
        "checkpoint has it as ema/. 0 = none",
        low=0,
        high=0.999999,
    )

    def names(self):
        """The stages to run."""
        return self.stages.split(",")

    def of(self, stage, name):
        """An option of one stage: its "steps", "lr", "optimizer", "p_drop" or "muon_decay"."""
        return getattr(self, f"{stage}_{name}")

    def data_of(self, stage):
        """What a stage learns from."""
        return getattr(self, f"{stage}_data", "") or self.data

    def total_steps(self):
        return sum(self.of(stage, "steps") for stage in self.names())


# ---------------------------------------------------------------- optimizers


def make_optimizers(model, kind, lr, adam_lr, muon_decay=0.0, text=True):
    """Adam with the paper's betas for everything, or, with kind "muon", Muon for the blocks'
    matrices and Adam for the rest. text: whether the text stream is trained too."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad or not (text or not model.is_text(name)):
            continue
        for_muon = kind == "muon" and name.startswith("blocks.") and p.ndim == 2
        (matrices if for_muon else rest).append(p)
    rest_lr = adam_lr if matrices else lr
    optimizers = [torch.optim.Adam(rest, lr=rest_lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, weight_decay=muon_decay, ns_steps=3))
    for group in groups(optimizers):
        group["peak"] = group["lr"]
    return optimizers


def groups(optimizers):
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def schedule(step, steps, warmup, decay):
    """lr_scale, the part of the peak learning rate at `step` of a stage: linear rise, flat, linear
    fall to zero."""
    rise = (step + 1) / warmup if warmup else 1.0
    fall = (steps - step) / max(1, decay * steps)
    return min(rise, fall, 1.0)


# ---------------------------------------------------------------- the loop


class Stop(Exception):
    """The run was asked to end, by SIGTERM or the time limit; its checkpoint is written."""


class Trainer:
    """A run in progress. worlds: by stage, see make_worlds. start: what it begins with. last: the
    checkpoint that it goes on from, (step, folder), or None."""

    def __init__(self, train, run, worlds, machine, start, loss, last):
        self.train, self.run, self.worlds, self.machine = train, run, worlds, machine
        self.world = worlds[train.names()[-1]]  # evaluates, and is stored
        self.model = model = start.model
        self.last, self.shown, done = last, {}, start.done
        self.options = asdict(train) | asdict(run)
        find_unused = "generator" in train.names()
        self.objective = distributed.parallelise(model, loss, run, machine, find_unused, start.read)
        start.read = None  # it holds what it drew
        if start.shards:
            checkpoint.load_shards(start.shards, checkpoint.held_tensors(model))
        self.text_started = done.get("stage") in ("recall", "refine")
        if STAGES[train.names()[0]] and not self.text_started:
            self.start_text()
        if machine.rank == 0:
            print(json.dumps(self.options | asdict(model.config), indent=1))
            print(distributed.describe(model, run, machine), flush=True)
        self.average = Average(model, train.ema) if train.ema else None
        self.saver = Saver(run, machine, self.options, self.world.state, start.base)
        before = done if last else {"step": 0, "elapsed": 0.0, "skipped": []}
        self.step, self.before, self.begin = before["step"], before["elapsed"], time.time()
        distributed.check_same_step(machine, self.step, run.out)
        self.guard = Guard(self.clips_of, run.max_skipped, before["skipped"])

    def clips_of(self, step):
        """The clips of a step of the present stage."""
        return self.data.batch(step, self.train.batch)

    def start_text(self):
        self.model.start_text()
        self.text_started = True

    def elapsed(self):
        """Seconds of training so far."""
        return self.before + time.time() - self.begin

    def flops(self, stage):
        """FLOPs of a step of a stage, for clips of the most frequent size."""
        config = self.model.config
        n_v, n_t = cost.video_tokens(config, self.worlds[stage].shape), config.text_len
        return 3 * self.train.batch * cost.forward_flops(config, n_v, n_t if STAGES[stage] else 0)

    def run_stages(self):
        """Trains what is left of the stages, then evaluates. Raises Stop when asked to end."""
        train, run, machine, first = self.train, self.run, self.machine, 0
        total, here = train.total_steps(), machine.rank == 0
        if here and self.step >= total:
            print(f"{run.out} is at its last step, {self.step}: nothing is left to train")
        if here:
            checkpoint.truncate_logs(run.out, self.step)
        distributed.wait_for_all(machine)
        distributed.lose_patience(self.objective, machine)
        costs = [x for s in train.names() for x in [self.flops(s)] * train.of(s, "steps")]
        self.estimate = Estimate(costs[self.step :])
        try:
            with tqdm(total=total, initial=self.step, disable=None if here else True) as bar:
                for stage in train.names():
                    if self.step < first + train.of(stage, "steps"):
                        self.train_stage(stage, first, bar)
                    first += train.of(stage, "steps")
        finally:
            self.saver.wait()
        if run.eval_clips:
            self.evaluate(train.names()[-1], run.eval_clips, Path(run.out))

    def train_stage(self, stage, first, bar):
        """Trains a stage, which begins at step `first`, from self.step to its end."""
        train, run, machine, model = self.train, self.run, self.machine, self.model
        text, steps, lr = STAGES[stage], train.of(stage, "steps"), train.of(stage, "lr")
        if text and not self.text_started:
            self.start_text()
            self.average = Average(model, train.ema) if train.ema else None
        self.text_started = bool(text)
        kind = train.of(stage, "optimizer")
        shrink = train.of(stage, "muon_decay")
        optimizers = make_optimizers(model, kind, lr, train.adam_lr, shrink, bool(text))
        meter, end = Meter(machine.device), first + steps
        track = tracker("none" if machine.rank else run.track, run.out, self.options)
        log = Log(run.out, train.batch, machine, bar, track, self.step, self.elapsed())
        if self.last and first < self.step:
            checkpoint.restore(self.last[1], model, optimizers, meter, self.average, machine)
        self.data = data = self.worlds[stage].dataset("train")
        left = end - self.step
        loader = iter(distributed.micro_batches(data, train.batch, run, machine, self.step, left))
        micros = range(machine.rank, train.batch // run.micro_batch, machine.ranks)
        options = dict(
            p_drop=train.of(stage, "p_drop"),
            clocks=train.clocks if text else train.generator_clocks,
            lambda_t=train.lambda_t or None,
            anchor=train.anchor,
            repulsion=train.repulsion,
        )
        lines = read_lines(Path(run.out, "validation.jsonl"))
        validated = (self.step, stage) in ((line["step"], line.get("stage")) for line in lines)
        if run.val_every and self.step == first and not all_reduce_max(machine, validated):
            self.validate(stage)  # what training is to be compared with
        model.train()
        for step in range(self.step, end):
            lr_scale = schedule(step - first, steps, train.warmup, train.decay)
            for group in groups(optimizers):
                group["lr"] = group["peak"] * lr_scale
            for m in micros:
                with log.waiting():
                    batch = distributed.receive(next(loader), machine)
                y = batch[text] if text else None
                # No hidden state: a resumed step draws the same.
                seed = train.seed * 1_000_003 + step + (m << 40)
                drawn = options | {"generator": torch.Generator().manual_seed(seed)}
                with no_grad_sync(self.objective, hold=m != micros[-1]):
                    with distributed.autocast(machine):
                        loss, parts = self.objective(batch["z_v"], y, batch["c"], drawn)
                    (loss / len(micros)).backward()
                meter.add(loss, parts)
                log.count(model.config, batch, text)
            norm = clip_grad_norm_(model.parameters(), train.clip)
            self.guard.step(norm, step, optimizers)
            if self.average:
                self.average.update()
            bar.update()
            self.step = step + 1
            if machine.rank == 0:
                self.estimate.step()
            self.log_and_save(stage, self.step == end, optimizers, meter, log)

    def log_and_save(self, stage, ends, optimizers, meter, log):
        """After a step: logs, saves and validates where it is time to. ends: the stage does."""
        run, machine, step = self.run, self.machine, self.step
        stop = machine.must_stop(run.time_limit)
        logs = step % run.log_every == 0 or ends
        saves = step % run.save_every == 0 or ends or stop
        if logs or saves:
            skipped, norm = self.guard.check(stage)  # only here the loop waits for the device
        if logs:
            line = {"step": step, "stage": stage, **meter.read(machine.ranks)}
            line["lr"] = groups(optimizers)[-1]["lr"]
            log.write(line | {"grad_norm": round(norm, 4), "skipped": skipped})
        if saves:
            state = {"step": step, "stage": stage, "elapsed": self.elapsed()}
            state |= {"skipped": self.guard.skipped, "data": digests(self.worlds)}
            name = stage if ends else f"step-{step:06d}"
            self.saver.save(name, self.model, state, optimizers, meter, self.average, whole=ends)
        if run.val_every and step % run.val_every == 0:
            self.validate(stage)
        if stop and step < self.train.total_steps():
            raise Stop(f"stopped at step {step}, saved; --resume goes on")

    def validate(self, stage):
        """An evaluation of few clips, into OUT/val, validation.jsonl and the report."""
        run = self.run
        out = Path(run.out, checkpoint.VALIDATIONS, f"step-{self.step:06d}-{stage}")
        results = self.evaluate(stage, run.val_clips, out)
        if self.machine.rank == 0:
            line = {"step": self.step, "stage": stage, **results}
            append_line(Path(run.out, "validation.jsonl"), line)
            pages.write_gallery(out, self.shown.get("gallery", []))
            pages.write_report(run.out, {}, self.options | asdict(self.model.config))
        self.model.train()

    def evaluate(self, stage, clips, out):
        """The world's evaluation, into `out`. Returns its results; a report shows the rest."""
        here, has_text = not self.machine.rank, STAGES[stage] is not None

        def measured(model, share):
            where = out if here else None
            return self.world.evaluate(model, where, clips, self.elapsed(), has_text, share)

        found = distributed.evaluate(measured, self.objective, self.machine, self.average)
        if here and has_text and needs_prompt(self.options, stage):
            print(needs_prompt(self.options, stage))
        self.shown = found.shown
        return found.results


# ---------------------------------------------------------------- from flags to a run


def make_world(data, seed, vocabulary="full", also=(), level=1):
    """The world to learn: "toy", "pairs" at a level, or a folder that wan.prepare wrote. also:
    other folders, whose tokens are to be known, too. Raises ValueError, OSError."""
    if also and TOYS & {data, *also}:
        raise ValueError(f"data are {data!r} and {also[0]!r}, wanted folders, or the toy")
    if data == "pairs":
        from toy.pairs_world import World as Pairs

        return Pairs(seed, level)
    if data == "toy":
        from toy import World

        return World(seed=seed)
    if not Path(data, "manifest.json").is_file():
        raise ValueError(
            f"data is {data!r}, wanted 'toy' or a folder that `python -m wan.prepare` wrote, with "
            "its manifest.json"
        )
    return wan.World(data, seed=seed, full_vocabulary=vocabulary == "full", also=also)


def make_worlds(train, make_world):
    """Stage -> the world it learns from. Raises as make_world, and as engine.world.by_stage."""

    def make(source, others):
        more = {"also": others} if others else {}
        more |= {"level": train.level} if source == "pairs" else {}
        world = make_world(source, train.seed, train.vocabulary, **more)
        if train.sampling == "paper":
            world.sampling = PAPER_SAMPLING
        return world

    stages = {stage: (train.data_of(stage), STAGES.get(stage)) for stage in train.names()}
    worlds = by_stage(stages, make)
    if train.generator_prompt == "caption" and "generator" in stages:
        data = train.data_of("generator")
        if not hasattr(worlds["generator"], "prompted_by"):
            raise ValueError(f"generator_prompt is 'caption', wanted 'prompt' for data {data!r}")
        worlds["generator"] = copy(worlds["generator"])
        worlds["generator"].prompted_by = "caption"
    return worlds


def parse(argv=None, make_world=make_world):
    """Flags -> (Train, Run, Config, namespace of the flags), or the end of the program."""
    parser = run_parser("train.py", __doc__)
    notes = {name: f"; pairs: {value}" for name, value in PAIRS.items()}
    notes |= {k: notes.get(k, "") + f"; real data: {value}" for k, value in REAL.items()}
    add_flags(parser, "training", Train, notes=notes)
    add_flags(parser, "machine and run", Run, notes=notes)
    add_flags(parser, "model (defaults: the preset's)", Config, defaults=False)
    known = {f.name for f in fields(Config)}
    add_flags(parser, "model with --text-flow discrete", PublishedConfig, skip=known)
    flags = parser.parse_args(argv)
    given = {k: v for k, v in vars(flags).items() if k not in ("resume", "overwrite", "dry_run")}
    try:
        out = given.get("out", Run.out)
        flags.resume = flags.resume or checkpoint.was_restarted(out)
        values = resumed(given, out) if flags.resume else chosen(given, make_world)
        train, run, config = make_options(values)
        names, ranks = train.names(), cost.processes()
        if names != [stage for stage in STAGES if stage in names]:
            raise ValueError(
                f"stages is {train.stages!r}, wanted some of {','.join(STAGES)}, in this order"
            )
        micro_batch = run.micro_batch or max(1, train.batch // ranks)
        run = replace(run, micro_batch=micro_batch)
        run.check(train.batch, ranks)
        if train.train == "text" and (not train.init or "generator" in names):
            raise ValueError(
                f"train is 'text' with stages {train.stages} and init {train.init!r}, wanted "
                "--init, the checkpoint with the rest, and --stages recall,refine"
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return train, run, config, flags


def make_options(values):
    """A flat dict of options -> (Train, Run, Config). Raises ValueError."""
    train, run = pick(Train, values), pick(Run, values)
    validate(train)
    validate(run)
    return train, run, config_from(values)


def chosen(given, make_world):
    """The values of a new run. Later ones win: the preset, or the config of --init where that is a
    Wan or the data are real; the data's sizes; the recipe; the data's defaults; the flags."""
    asked = pick(Train, given)
    validate(asked)
    data = {asked.data_of(stage) for stage in asked.names()}
    real, recipe = not data <= TOYS, RECIPES[asked.recipe]
    if real:
        recipe = recipe | REAL
    elif "pairs" in data:
        recipe = recipe | (PAIRS_PAPER if asked.recipe == "paper" else PAIRS)
    *_, world = make_worlds(pick(Train, recipe | given), make_world).values()
    sizes = world.sizes
    model = asdict(PRESETS[asked.preset])
    if asked.init and wan.is_wan(asked.init):
        known = {f.name for f in fields(PublishedConfig)}
        overrides = {name: value for name, value in given.items() if name in known}
        model = asdict(wan.config(asked.init, **sizes | overrides))
    elif real and asked.init and Path(asked.init, "config.json").is_file():
        model = read_json(Path(asked.init, "config.json"))
    return model | sizes | recipe | given


# What may differ when a run goes on. Another micro_batch draws other noise; the rest leaves the
# numbers as they are.
ANY_TIME = {f.name for f in fields(Run)} - {"precision"}


def resumed(given, out):
    """The values of the run in `out`, and those of the flags that may differ from them."""
    found = checkpoints(out)
    if not found:
        raise ValueError(
            f"--resume: found no checkpoint in {out}, wanted a folder with model.safetensors and "
            "train.json"
        )
    folder = found[-1][1]
    try:
        options = make_options(checkpoint.read_options(folder))
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} cannot go on: {error}") from None
    stored = {name: value for part in options for name, value in asdict(part).items()}
    for name in given.keys() - ANY_TIME:
        if given[name] != stored.get(name, given[name]):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is {given[name]!r}, but the run to resume has {stored[name]!r}"
            )
    return stored | given | {"out": out}


def prepare(train, run, config, flags, worlds, make_model, load_start):
    """Everything that may fail, before anything of an old run is lost.

    Returns machine, Start, and Trainer's last. Raises ValueError, OSError, ImportError.
    """
    machine = distributed.join_processes(run, train.total_steps())
    job = job_of(train, config, worlds, make_model)
    machine.recompute = cost.choose_recompute(job, run, machine)
    last = checkpoints(run.out)[-1] if flags.resume else None
    for part in checkpoint.unfinished(run.out) if machine.rank == 0 else ():
        print(f"{part} is no complete checkpoint: ignored", file=sys.stderr)
    source, world = last[1] if last else train.init, worlds[train.names()[-1]]
    torch.manual_seed(train.seed)
    if source:
        checkpoint.check_world(source, world.state)
    world.device = machine.device
    if run.eval_clips or run.val_every:  # what an evaluation needs is better missed now
        _ = world.tokenizer, machine.rank or world.codec
    data = digests(worlds)
    if last:
        checkpoint.check_data(last[1], data)
    for place in (Path(run.out, stage) for stage in train.names()):
        if os.path.lexists(place) and not (place / "train.json").is_file():
            raise ValueError(
                f"{place} is no checkpoint, but one would take its place: move it, or choose "
                "another --out"
            )
    if machine.rank == 0 and not flags.resume:
        checkpoint.check_anew(run.out, flags.overwrite)
    if source:
        start = (load_own if last else load_start)(source, config, make_model)
    else:
        start = Start(make_model(config))
    if train.train == "text":
        freeze(start.model, machine.bf16)
        start.base = {"base": wan.as_base(source)}
    return machine, start, last


def digests(worlds):
    """Stage -> the digest of the clips that it learns from, where they have one."""
    found = {stage: getattr(w.dataset("train"), "digest", None) for stage, w in worlds.items()}
    return {stage: digest for stage, digest in found.items() if digest}


def job_of(train, config, worlds, make_model):
    """A run in sizes, with its longest clips."""
    count, video = cost.parameters(make_model, config)
    n_v = max(cost.video_tokens(config, world.shape) for world in worlds.values())
    frozen = video if train.train == "text" else 0
    return cost.Job(config, count, frozen, n_v, config.text_len, train.batch, bool(train.ema))


def main(
    argv=None,
    *,
    make_model=build,
    loss=uni_flow_loss,
    make_world=make_world,
    load_start=load_start,
):
    """Trains as the flags say. The other arguments are what an experiment may replace."""
    train, run, config, flags = parse(argv, make_world)
    try:
        worlds = make_worlds(train, make_world)
        for world in worlds.values():
            world.check(config)
        if flags.dry_run:
            job = job_of(train, config, worlds, make_model)
            return cost.print_training(job, run, train.total_steps())
        lock = Path(run.out, f".lock-{os.environ.get('RANK', 0)}")
        with alone(lock, run.out):
            parts = prepare(train, run, config, flags, worlds, make_model, load_start)
            machine, start, last = parts
            with distributed.settings(machine):
                trainer = Trainer(train, run, worlds, machine, start, loss, last)
                if machine.rank == 0:
                    if not flags.resume:
                        checkpoint.start_anew(run.out)
                    checkpoint.note_launch(run.out)
                trainer.run_stages()
            if machine.rank == 0:
                options = trainer.options | asdict(config)
                pages.write_report(run.out, trainer.shown, options)
    except Stop as stop:
        if machine.rank == 0:
            print(stop)
    except (FloatingPointError, ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fail("train.py", error)
    distributed.leave(machine)


if __name__ == "__main__":
    run_command(main)
