"""Checkpoints: written whole or not at all, found, read back, and refused where they do not fit.

A run's folder holds one folder a checkpoint: model.safetensors and config.json, world.json (what
sample.py needs beside the model), train.json and training_state.pt, and ema/ where there is one.
Where FSDP has cut the model, a checkpoint within a stage has shards/ instead of weights and
optimizers, a file of each process:

    python -m engine.checkpoint runs/wan/step-001000      makes a model.safetensors of them
"""

import copy
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from engine.distributed import local_shard, wait_for_all
from engine.files import atomic, check_folder, one_line, read_json, remove, write_json, write_text
from engine.options import Parser, fail, run_command
from univigu import Config

LAUNCH = ".launch"  # file in a run's folder: the call of torchrun that began it, see launch()
LOGS = "metrics.jsonl", "validation.jsonl"
RESULTS = "results.json", "report.html"
VALIDATIONS = "val"

# What train.json holds.
STATE: dict = dict(step=int, stage=str, elapsed=(int, float), skipped=list, train=dict)

# All that is trained, gathered by process 0: any number of processes may load it.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


@dataclass
class Start:
    """What a run begins with."""

    model: torch.nn.Module  # on the meta device where there is a `read`
    read: Callable | None = None  # its parameters, see engine.distributed.fill
    done: dict = field(default_factory=dict)  # the train.json of the checkpoint they are from
    base: dict = field(default_factory=dict)  # for a new train.json: who has what is not trained
    shards: Path | None = None  # the checkpoint whose shards hold what is trained


class Average:
    """Exponential moving average of a model's weights. Each process averages what it holds."""

    def __init__(self, model, decay):
        trained = (p for p in model.parameters() if p.requires_grad)
        self.decay, self.weights = decay, [local_shard(p) for p in trained]
        self.mean = [w.clone() for w in self.weights]

    def update(self):
        """mean <- decay mean + (1 - decay) weights."""
        torch._foreach_lerp_(self.mean, self.weights, 1 - self.decay)

    @contextmanager
    def in_place(self):
        """Within, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self):
        for w, m in zip(self.weights, self.mean):
            kept = w.clone()
            w.copy_(m)
            m.copy_(kept)


# ---------------------------------------------------------------- writing


class Saver:
    """Writes checkpoints into run.out. options, world_state: what train.json and world.json say;
    base: what the former says of the checkpoint that has what is not trained, {} for none.

    With run.async_save, and of shards always, a thread writes, from copies, while training goes on;
    what goes wrong there is raised at the next save or at the end.
    """

    def __init__(self, run, machine, options, world_state, base):
        self.run, self.machine, self.base = run, machine, base
        self.options, self.world_state = options, world_state
        self.thread, self.pending = ThreadPoolExecutor(1), None
        # of its own, since its thread and the loop would mix up what they send
        self.group = dist.new_group(backend="gloo") if machine.ranks > 1 else None

    def wait(self):
        """Until the last checkpoint is complete. Raises OSError where it could not be written."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def save(self, name, model, state, optimizers, meter, average, whole):
        """Called by all processes; process 0 writes OUT/name. state: for train.json. whole: the
        weights become one file also where processes hold shards."""
        self.wait()
        wait_for_all(self.machine)
        if self.machine.ranks > 1:
            meter.sum_over_processes()
        training = {"meter": {"sums": meter.sums.clone(), "loss": meter.loss.clone()}}
        texts = {
            "config.json": asdict(model.config),
            "world.json": self.world_state,
            "train.json": {"train": self.options, **self.base, **state},
        }
        if not whole and is_sharded(model):
            self.save_shards(name, model, texts, optimizers, training, average)
            if self.machine.rank > 0:
                meter.empty()
            return
        tensors = {".": get_model_state_dict(model, options=WHOLE)}
        if average:
            with average.in_place():
                tensors["ema"] = copy.deepcopy(get_model_state_dict(model, options=WHOLE))
        training["optimizers"] = get_optimizer_state_dict(model, optimizers, options=WHOLE)
        if self.machine.rank > 0:
            meter.empty()  # process 0 has the sums now
        elif self.run.async_save or is_sharded(model):  # large: the others would wait too long
            if self.machine.device.type == "cpu":  # else they are copies already
                tensors, training = copy.deepcopy((tensors, training))
            self.pending = self.thread.submit(self.write, name, texts, tensors, training)
        else:
            self.write(name, texts, tensors, training)
        wait_for_all(self.machine)

    def write(self, name, texts, tensors, training):
        """Writes a checkpoint, then removes the oldest beyond run.keep. Raises OSError."""
        with atomic(Path(self.run.out, name)) as part:
            try:
                for folder, weights in tensors.items():
                    (part / folder).mkdir(parents=True, exist_ok=True)
                    save_file(weights, part / folder / "model.safetensors", {"format": "pt"})
                    for file, values in texts.items():
                        write_json(part / folder / file, values)
                torch.save(training, part / "training_state.pt")
            except Exception as error:  # on a full disk, both libraries have errors of their own
                raise self.full(error) from None
            os.sync()  # before its name says that it is complete
        self.remove_old()

    def save_shards(self, name, model, texts, optimizers, training, average):
        """Each process begins to write what it holds; process 0 names the checkpoint at the end."""
        final = Path(self.run.out, name)
        part = final.with_name(f".part-{name}")
        if self.machine.rank == 0:
            remove(part)
            (part / SHARDS).mkdir(parents=True)
            for file, values in texts.items():
                write_json(part / file, values)
            torch.save(training, part / "training_state.pt")
        wait_for_all(self.machine)
        writer = HuggingFaceStorageWriter(str(part / SHARDS), save_distributed=True)
        held = held_tensors(model, optimizers, average)
        future = dcp.async_save(held, storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(self.finish, future, part, final)

    def finish(self, future, part, final):
        """Waits for the shards of all processes, and gives their folder its name."""
        try:
            future.result()
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
            raise OSError(f"{final} cannot be written: {self.full(error)}") from None
        if self.machine.rank == 0:
            os.sync()
            remove(final)
            part.rename(final)
            self.remove_old()

    def full(self, error):
        """What went wrong, and how much room there was."""
        free = shutil.disk_usage(self.run.out).free
        return OSError(f"{one_line(error)} ({free:,} bytes were free)")

    def remove_old(self):
        """Removes the oldest checkpoints beyond run.keep."""
        steps = [
            folder for _, folder in checkpoints(self.run.out) if folder.name.startswith("step-")
        ]
        for old in steps[: -self.run.keep]:
            shutil.rmtree(old.rename(old.with_name(f".part-{old.name}")))


# ---------------------------------------------------------------- shards

SHARDS = "shards"
HELD = StateDictOptions(ignore_frozen_params=True)


def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def held_tensors(model, optimizers=(), average=None):
    """What this process holds of what is trained: name -> tensor, as torch keeps it."""
    held = {f"model.{name}": x for name, x in get_model_state_dict(model, options=HELD).items()}
    if average:
        with average.in_place():
            mean = copy.deepcopy(get_model_state_dict(model, options=HELD))
        held |= {f"ema.{name}": x for name, x in mean.items()}
    for optimizer in optimizers:
        options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
        states = get_optimizer_state_dict(model, optimizer, options=options)
        held |= {name: x for name, x in states.items() if isinstance(x, torch.Tensor)}
    return held


def load_shards(folder, tensors=None):
    """The values of a checkpoint's shards into tensors of the same names, cut in any way; None: new
    ones, all of the model's and of its average. Returns them.

    Raises OSError where they are damaged.
    """
    alone = not dist.is_initialized()
    try:
        reader = HuggingFaceStorageReader(str(folder / SHARDS))
        if tensors is None:
            sizes = reader.read_metadata().state_dict_metadata
            tensors = {
                name: torch.empty(of.size, dtype=of.properties.dtype)
                for name, of in sizes.items()
                if name.startswith(("model.", "ema."))
            }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
        return tensors
    except (Exception, dcp.api.CheckpointException) as error:
        raise OSError(
            f"checkpoint {folder}: its shards cannot be read ({one_line(error)[:300]}): remove "
            "this folder and --resume goes on from the checkpoint before it"
        ) from None


def join_shards(folder):
    """Writes the model.safetensors of a checkpoint that has shards, and ema/ where there is one.

    Raises ValueError where it has none, OSError where they are damaged or it cannot be written.
    """
    if not (folder / SHARDS).is_dir():
        raise ValueError(f"{folder} has no {SHARDS}/, wanted a checkpoint within a stage, of FSDP")
    parts: dict = {"model": {}, "ema": {}}
    for name, x in load_shards(folder).items():
        kind, _, name = name.partition(".")
        parts[kind][name] = x
    if parts["ema"]:
        with atomic(folder / "ema") as part:
            part.mkdir()
            for file in ("config.json", "world.json", "train.json"):
                shutil.copy(folder / file, part)
            save_file(parts["ema"], part / "model.safetensors", {"format": "pt"})
    with atomic(folder / "model.safetensors") as part:
        save_file(parts["model"], part, {"format": "pt"})


# ---------------------------------------------------------------- finding and reading


def checkpoints(out):
    """Complete checkpoints of a run, oldest first: list of (step, folder).

    Raises ValueError for a train.json that cannot be read.
    """
    found = []
    for file in Path(out).glob("[!.]*/train.json"):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            if not all(isinstance(state[name], kind) for name, kind in STATE.items()):
                raise TypeError
            found.append((state["step"], file.parent))
        except FileNotFoundError:
            continue  # it has just gone, or been renamed
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{file} cannot be read: remove {file.parent}") from None
    return sorted(found)


def unfinished(out):
    """Checkpoints that were not complete when their run ended."""
    parts = [*Path(out).glob(".part-*"), *Path(out).glob(".*.part")]  # the latter by older versions
    return [part for part in parts if part.is_dir()]


def read_done(folder, config):
    """What the train.json of a checkpoint of this config says; {} without one.

    Raises ValueError for what is no checkpoint, or has another config.
    """
    folder = Path(folder)
    weights = SHARDS if (folder / SHARDS).is_dir() else "model.safetensors"
    for name in (weights, "config.json"):
        if not (folder / name).exists():
            raise ValueError(f"checkpoint {folder} has no {name}, wanted a folder of train.py's")
    check_config(folder, read_json(folder / "config.json"), config)
    file = folder / "train.json"
    return read_json(file) if file.exists() else {}


def read_options(folder):
    """All options of a checkpoint's run and model, as a flat dict. Raises ValueError."""
    stored = read_json(folder / "train.json", "train") | read_json(folder / "config.json")
    if stored.get("async_save") in ("yes", "no"):  # as older versions have it
        stored["async_save"] = stored["async_save"] == "yes"
    if "p_drop" in stored:  # one for both stages
        both = dict.fromkeys(("recall_p_drop", "refine_p_drop"), stored["p_drop"])
        stored = both | stored
    return stored


def needs_prompt(options, stage):
    """What to tell before a caption is written without a prompt; "" where that was learned.

    options: those in train.json; older ones have one dropout for both stages.
    """
    name = f"{stage}_p_drop"
    if options.get(name, options.get("p_drop")) != 0:
        return ""
    return f"{name} was 0: with its prompt always there, it never learned to caption without one"


def check_config(folder, stored, config):
    """Raises ValueError where a checkpoint's model has other sizes or choices than the config's."""
    wanted = json.loads(json.dumps(asdict(config)))  # JSON has no tuples
    for name in (f.name for f in fields(Config)):
        if stored.get(name, wanted[name]) != wanted[name]:
            raise ValueError(
                f"checkpoint {folder} has {name} {stored[name]!r}, wanted {wanted[name]!r}"
            )


def check_world(folder, world_state):
    """Raises ValueError where a checkpoint was trained in another world: its tokens or its latents
    would mean something else."""
    file = Path(folder, "world.json")
    stored, wanted = (
        (read_json(file) if file.is_file() else {}),
        json.loads(json.dumps(world_state)),
    )
    for name in ("world", "vocabulary", "codec", "prompt_encoder", "latents"):
        if name not in stored or stored[name] == wanted.get(name):
            continue
        theirs, ours, what = stored[name], wanted.get(name), ""
        if isinstance(theirs, list):
            theirs, ours, what = len(theirs), len(ours or []), " other tokens"
        raise ValueError(
            f"checkpoint {folder} has {name} {theirs!r}, but the data have {ours!r}{what}"
        )


def check_data(folder, digests):
    """Raises ValueError where a run would go on with other data. digests: of each stage's."""
    stored = read_json(folder / "train.json").get("data", {})  # older ones do not say
    for stage, found in digests.items():
        if stored.get(stage, found) != found:
            raise ValueError(
                f"checkpoint {folder} has seen other data: what stage {stage} learns from changed "
                f"since, {stored[stage]} to {found}. Wanted the same, to --resume; on new data, "
                f"begin a run with --init {folder} and another --out"
            )


def restore(folder, model, optimizers, meter, average, machine):
    """The training state of a checkpoint into optimizers, meter and average.

    Raises OSError where it is damaged.
    """
    try:
        path = folder / "training_state.pt"
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        options = StateDictOptions(full_state_dict=True, strict=False)  # frozen ones are not there
        if (folder / SHARDS).is_dir():
            restore_shards(folder, model, optimizers, average)
        elif machine.ranks == 1:
            restore_states(model, optimizers, stored["optimizers"]["state"])
        else:
            set_optimizer_state_dict(model, optimizers, stored["optimizers"], options=options)
        if average and not (folder / SHARDS).is_dir():
            weights = load_file(folder / "ema" / "model.safetensors")
            with average.in_place():
                set_model_state_dict(model, weights, options=options)
        if machine.rank == 0:
            meter.sums = stored["meter"]["sums"].to(machine.device)
            meter.loss = stored["meter"]["loss"].to(machine.device)
    except Exception as error:  # a damaged file fails in many ways
        raise OSError(
            f"checkpoint {folder}: its training state cannot be read ({type(error).__name__}): "
            "remove this folder and --resume goes on from the checkpoint before it"
        ) from None


def restore_shards(folder, model, optimizers, average):
    """What optimizers and the average know, into their own tensors, from shards."""
    held = held_tensors(model, optimizers, average)
    load_shards(folder, {name: x for name, x in held.items() if not name.startswith("model.")})
    if average:
        mean = {n.removeprefix("ema."): x for n, x in held.items() if n.startswith("ema.")}
        with average.in_place():
            set_model_state_dict(model, mean, options=StateDictOptions(strict=False))


def restore_states(model, optimizers, states):
    """What optimizers know of each parameter, by its name. Raises KeyError where one is missing.

    torch's own function would first make gradients and states only to replace them.
    """
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            state = states[names[p]].items()
            optimizer.state[p] = {name: x.to(p.device, copy=True) for name, x in state}


# ---------------------------------------------------------------- a run's folder


def check_anew(out, overwrite):
    """Raises ValueError where a run's folder has an older run's files and `overwrite` is False, or
    where it cannot be written."""
    out = Path(out)
    check_folder(out)
    old = checkpoints(out)
    if old and not overwrite:
        raise ValueError(
            f"{out} holds a run at step {old[-1][0]}: add --resume to go on, --overwrite to start "
            "anew, or choose another --out"
        )
    for name in RESULTS:
        if (out / name).exists() and not old and not overwrite:
            raise ValueError(
                f"{out} has a {name}, but no checkpoint, and a run would write over it: "
                "add --overwrite, or choose another --out"
            )


def start_anew(out):
    """Makes a run's folder, without an older run's files. Raises OSError."""
    out = Path(out)
    for _, folder in checkpoints(out):
        shutil.rmtree(folder)
    remove(out / VALIDATIONS)
    out.mkdir(parents=True, exist_ok=True)
    for name in (*LOGS, *RESULTS):
        (out / name).unlink(missing_ok=True)


def truncate_logs(out, step):
    """Drops the lines of the logs that a killed run wrote after its last checkpoint."""
    for name in LOGS:
        truncate(Path(out, name), step)


def truncate(path, step):
    """Drops the lines of a log after `step`, so that the resumed run writes them again.

    Raises ValueError for lines that are not of a log.
    """
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{path} has a line that is not of a run's log, wanted a JSON object with its step: "
            "mend or remove the file"
        ) from None
    write_text(path, "".join(kept))


def launch():
    """A name for this call of torchrun, the same in all its restarts; "" where there is none.

    On many nodes that is their --rdzv-id.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if run and one_node:
        return f"{run} {os.getppid()}"
    return "" if run == "none" else run


def note_launch(out):
    """Stores which call of torchrun began a run."""
    if launch():
        write_text(Path(out, LAUNCH), launch())


def was_restarted(out):
    """Whether torchrun starts the processes of this run again, after one of them died."""
    file = Path(out, LAUNCH)
    begun = file.read_text(encoding="utf-8") if file.exists() else ""
    return bool(launch() and checkpoints(out) and begun == launch())


def main(argv=None):
    parser = Parser(prog="engine.checkpoint", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a folder with shards/")
    folder = parser.parse_args(argv).checkpoint
    try:
        join_shards(folder)
    except (ValueError, OSError) as error:
        fail("engine.checkpoint", error)
    print(f"wrote {folder / 'model.safetensors'}")


if __name__ == "__main__":
    run_command(main)
