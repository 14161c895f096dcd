"""Dataclasses of options as flags, the options of any training run, and how a program ends."""

import argparse
import dataclasses
import importlib.util
import os
import signal
import sys
from dataclasses import dataclass

from engine.files import one_line
from univigu import option, validate


@dataclass
class Run:
    """Where a run writes and how the machine computes it. May change when a run goes on."""

    out: str = option("runs/toy", "folder for checkpoints, metrics.jsonl, results.json and samples")
    device: str = option(
        "auto", "where to compute: 'auto', 'cpu' or 'cuda'", choices=("auto", "cpu", "cuda")
    )
    precision: str = option(
        "auto",
        "'fp32', 'bf16' autocast, or 'auto': bf16 on a GPU, fp32 on a CPU, where a small model's "
        "casts cost more than they save",
        choices=("auto", "fp32", "bf16"),
    )
    compile: str = option(
        "auto",
        "torch.compile of the blocks: 'yes', 'no', or 'auto': where a run is long enough to pay "
        "for it",
        choices=("auto", "yes", "no"),
    )
    workers: int = option(
        0,
        "threads that prepare batches ahead, for each process that trains",
        low=0,
        high=1000,
    )
    micro_batch: int = option(
        0,
        "clips that go through the network at once; the gradients of several add up. 0 = batch "
        "over the number of processes",
        low=0,
        high=10**6,
    )
    parallel: str = option(
        "auto",
        "with torchrun: 'ddp', a copy of everything in each process; 'fsdp', parameters and states "
        "in shards; 'auto': by the model's size",
        choices=("auto", "ddp", "fsdp"),
    )
    shard_within: int = option(
        0,
        "with fsdp: processes that share one copy, for example those of a node; the groups then "
        "work as ddp. 0 = all of them",
        low=0,
        high=10**6,
    )
    recompute: str = option(
        "auto",
        "activations: 'none' are recomputed in the backward pass; 'keep-attention', all but "
        "attention's outputs; 'full', all; 'auto': as few as fit the device's memory",
        choices=("auto", "none", "keep-attention", "full"),
    )
    max_skipped: int = option(
        10,
        "steps that may be left out, because their gradient is not finite, before the run stops",
        low=0,
        high=10**9,
    )
    time_limit: float = option(
        0.0,
        "minutes after which this call saves and ends, to be resumed; 0 = none",
        low=0,
        high=10**6,
    )
    log_every: int = option(20, "steps between lines of metrics.jsonl", low=1, high=10**9)
    save_every: int = option(250, "steps between checkpoints", low=1, high=10**9)
    keep: int = option(1, "checkpoints to keep beside those at the stages' ends", low=1, high=10**6)
    async_save: bool = option(
        False,
        "checkpoints are written by a thread, from copies in memory, while training goes on",
    )
    track: str = option(
        "none",
        "where else the log goes: 'tensorboard' (OUT/tensorboard) or 'wandb', if installed",
        choices=("none", "tensorboard", "wandb"),
    )
    val_every: int = option(
        0,
        "steps between evaluations of val_clips clips in OUT/val, with the same clips, clocks and "
        "noise each time. 0 = none",
        low=0,
        high=10**9,
    )
    val_clips: int = option(16, "clips of such an evaluation, per split", low=1, high=10**6)
    eval_clips: int = option(
        512, "clips per evaluation and split; 0 skips the evaluation", low=0, high=10**6
    )

    def check(self, batch, ranks):
        """Raises ValueError for values that no run of `ranks` processes can have."""
        validate(self)
        if not self.out:
            raise ValueError("out is '', wanted a folder")
        if self.track != "none" and not importlib.util.find_spec(self.track):
            raise ValueError(
                f"track is {self.track!r}, which is not installed: pip install {self.track}"
            )
        if batch % (self.micro_batch * ranks):
            raise ValueError(
                f"batch is {batch}, wanted a multiple of micro_batch {self.micro_batch} times "
                f"{ranks} processes"
            )
        if self.shard_within and ranks % self.shard_within:
            raise ValueError(
                f"shard_within is {self.shard_within}, wanted a divisor of the {ranks} processes"
            )


def pick(cls, values):
    """A dataclass from those of the values in a dict that are its fields."""
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes flags by their whole names, and whose errors are one line."""

    def __init__(self, **options):
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter} | options
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        # argparse puts "argument --flag: " before what a type says of its value
        said = one_line(message).removeprefix("argument ").replace(": is ", " is ", 1)
        self.exit(2, f"{self.prog.split()[0]}: error: {said}\n")


def run_parser(prog, doc):
    """The parser of a program that trains: begins a run, goes on with it, or says what it takes."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--flag value ...]      --help lists the flags",
        description=doc,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, with its configuration",
    )
    which.add_argument(
        "--overwrite", action="store_true", help="start anew where --out already holds a run"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory, FLOPs and days, load nothing and write nothing",
    )
    return parser


def add_flags(parser, title, cls, *, skip=(), defaults=True, notes=None):
    """Adds a group with a flag for each field of a dataclass; a flag that is not given is absent.

    skip: names of fields without a flag. defaults: whether --help says them. notes: what --help
    says beside a default, by field.
    """
    group = parser.add_argument_group(title)
    for f in dataclasses.fields(cls):
        if f.name in skip:
            continue
        note = (notes or {}).get(f.name, "")
        default = f" (default: {f.default}{note})" if defaults and f.default != "" else ""
        kind: dict = {"type": f.type, "metavar": f.name.upper()}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
            default = f" (default: {'yes' if f.default else 'no'})"
        elif f.type not in (int, float, str):
            kind["type"] = integers
        text = (f.metadata["help"] + default).replace("%", "%%")
        flag = "--" + f.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def number(kind, low, high):
    """A type for argparse: a number from low to high."""

    def parsed(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {value}, wanted {low} to {high}")
        return value

    parsed.__name__ = kind.__name__  # argparse says it of a text that is no number
    return parsed


def integers(text):
    """Integers as a flag has them: "1,2,2" -> (1, 2, 2). Raises ValueError for other text."""
    return tuple(map(int, text.split(",")))


def fail(prog, error):
    """Ends the process with one line, from one process of many."""
    sys.exit(1 if int(os.environ.get("RANK", 0)) else f"{prog}: error: {one_line(error)}")


def run_command(main):
    """Calls a program's main. What the terminal cannot show is escaped; Ctrl-C ends it without a
    traceback.

    It dies of the signal: a shell goes on with its script after any exit code, even 130.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    try:
        main()
    except KeyboardInterrupt:
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
