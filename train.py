"""Trains Uni-ViGU: stage generator (toy only: the stand-in for pretrained Wan), then recall, then refine, then evaluation.

    python train.py                                         the toy, all stages, minutes on a CPU
    python train.py --recipe paper --out runs/paper         the paper's clocks, outputs, loss and optimizer
    python train.py --resume                                go on where the last checkpoint stands
    python train.py --stages recall,refine --init runs/toy/generator --out runs/again
    torchrun --nproc-per-node 8 train.py --data data/clips --init Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out runs/wan      a node; --dry-run first

The stages are one loop with other values: the text's target (STAGES), and --STAGE-steps, --STAGE-lr and --STAGE-optimizer.
"""

import sys

sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)  # Ctrl-C ends quietly, also in the imports

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from torch.utils.data import DataLoader
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import pages
import wan
from toy.muon import Muon
from univigu import PRESETS, option, uni_flow_loss
from wan.published import PublishedConfig, build, config_from
from wan.weights import one_line, read_json

STAGES = {"generator": None,      # eq. 2: the video alone
          "recall": "prompt",     # section 3.3, stage 1: the target text is the prompt itself
          "refine": "caption"}    # section 3.3, stage 2: the target text is the detailed caption

# What `--recipe paper` changes: independent uniform clocks, velocity output, eq. 11 and nothing else, Adam. The stand-in
# generator, the sizes and the number of steps stay the toy's, and E's rows stay unit, for else they collapse.
RECIPES = {"default": {}, "paper": dict(clocks="independent", text_shift=1.0, text_output="velocity", anchor=0.0,
                                        recall_optimizer="adam", refine_optimizer="adam", recall_lr=1e-3, refine_lr=1e-3)}

# What data other than the toy changes: a pretrained generator is there, and the paper's settings (section 3.3) are the defaults.
REAL = RECIPES["paper"] | dict(stages="recall,refine", batch=1, recall_steps=40_000, refine_steps=60_000, recall_lr=2e-4, refine_lr=5e-5, warmup=1000, decay=0.0,
                               save_every=1000, eval_clips=16, workers=2)


@dataclass
class Train:
    """Everything a run needs beside the model's Config; one flag a field."""

    preset: str = option("toy", f"sizes of the model: {', '.join(PRESETS)}")
    recipe: str = option("default", "training choices of the toy's text stages: 'default' (measured) or 'paper' (its clocks, output, loss and optimizer), which real data always has")
    data: str = option("toy", "the world to learn: 'toy', moving shapes drawn on the fly, or a folder that `python -m wan.prepare` wrote")
    vocabulary: str = option("data", "of real data: the tokens that occur in the 'data', or 'full', all of umT5's, as the published weights need")
    out: str = option("runs/toy", "folder for checkpoints, metrics.jsonl, results.json and samples")
    stages: str = option("generator,recall,refine", "which stages to run, in this order")
    init: str = option("", "checkpoint whose weights the first stage starts from: a folder of train.py's, or Wan2.1 in any layout (path or hub id)")
    seed: int = option(0, "seed of the weights, the clips, the noise and the evaluation")
    batch: int = option(64, "clips per step, over all processes")
    micro_batch: int = option(0, "clips that go through the network at once; the gradients of several add up. 0 = batch over the number of processes")
    parallel: str = option("auto", "with torchrun: 'ddp', a copy of everything in each process; 'fsdp', parameters and states in shards; 'auto': by the model's size")
    shard_within: int = option(0, "with fsdp: processes that share one copy, for example those of a node; the groups then work as ddp. 0 = all of them")
    recompute: str = option("none", "activations: 'none' are recomputed in the backward pass; 'keep-attention', all but attention's outputs; 'full', all")
    generator_steps: int = option(800, "steps of stage generator")
    recall_steps: int = option(200, "steps of stage recall")
    refine_steps: int = option(2600, "steps of stage refine")
    generator_lr: float = option(0.02, "peak learning rate of stage generator")
    recall_lr: float = option(0.02, "peak learning rate of stage recall")
    refine_lr: float = option(0.02, "peak learning rate of stage refine")
    generator_optimizer: str = option("muon", "optimizer of stage generator: 'muon' (matrices of the blocks; Adam for the rest) or 'adam'")
    recall_optimizer: str = option("muon", "optimizer of stage recall")
    refine_optimizer: str = option("muon", "optimizer of stage refine")
    adam_lr: float = option(0.003, "with muon: learning rate of the parameters that Adam trains, at the stage's peak")
    warmup: int = option(20, "steps over which a stage's learning rate rises; it then falls linearly to 0 over the stage's last part")
    decay: float = option(0.5, "share of a stage over which its learning rate falls")
    clip: float = option(1.0, "largest norm of the gradient")
    generator_clocks: str = option("logit-normal", "how stage generator draws its clock: 'logit-normal' or 'independent' (uniform)")
    clocks: str = option("mixture", "how the text stages draw both clocks: 'mixture' or 'independent' (the paper's)")
    p_drop: float = option(0.7, "probability that a sample's prompt is dropped in the text stages; with clocks 'mixture' not on the lines generate and joint, which have 0.1")
    anchor: float = option(0.1, "weight of the cross-entropy that keeps text latents on the embedding's rows")
    lambda_t: float = option(0.0, "weight of the text flow in eq. 11; 0 = |z_v| / |z_t|")
    device: str = option("auto", "'auto', 'cpu' or 'cuda'")
    precision: str = option("auto", "'fp32', 'bf16' autocast, or 'auto': bf16 on a GPU, fp32 on a CPU, where a small model's casts cost more than they save")
    compile: str = option("auto", "torch.compile of the blocks: 'yes', 'no', or 'auto': where a run is long enough to pay for it")
    workers: int = option(0, "processes that prepare batches ahead, for each process that trains")
    max_skipped: int = option(10, "steps that may be left out, because their gradient is not finite, before the run stops")
    ema: float = option(0.0, "decay of an exponential moving average of the weights, for example 0.999; kept in each checkpoint as ema/. 0 = none")
    time_limit: float = option(0.0, "minutes after which this call saves and ends, to be resumed; 0 = none")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    save_every: int = option(250, "steps between checkpoints")
    keep: int = option(1, "checkpoints to keep beside those at the stages' ends")
    async_save: str = option("no", "'yes': checkpoints are written by a thread, from copies in memory, while training goes on")
    track: str = option("none", "where else the log goes: 'tensorboard' (OUT/tensorboard) or 'wandb', if installed")
    val_every: int = option(0, "steps between evaluations of val_clips clips in OUT/val, with the same clips, clocks and noise each time. 0 = none")
    val_clips: int = option(16, "clips of such an evaluation, per split")
    eval_clips: int = option(512, "clips per evaluation and split; 0 skips the evaluation")


# ---------------------------------------------------------------- optimizers

def make_optimizers(model, kind, lr, adam_lr, text=True):
    """Adam with the paper's betas; with kind "muon", the matrices of the blocks go to Muon and only the rest to Adam. text: the text stream too."""
    trained = {name: p for name, p in model.named_parameters() if text or not model.is_text(name)}
    matrices = {name: p for name, p in trained.items() if kind == "muon" and name.startswith("blocks.") and p.ndim == 2}
    rest = [p for name, p in trained.items() if name not in matrices]
    optimizers = [torch.optim.Adam(rest, lr=adam_lr if matrices else lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(Muon(list(matrices.values()), lr=lr, weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def schedule(step, steps, warmup, decay):
    """Share of the peak learning rate at `step` of a stage: linear rise, flat, linear fall to zero."""
    return min((step + 1) / warmup if warmup else 1.0, (steps - step) / max(1, decay * steps), 1.0)


# ---------------------------------------------------------------- what is logged

class Meter:
    """Losses since the last log line, per modality and per tau decile. Kept on the device and in the checkpoint."""

    def __init__(self, device):
        self.sums = torch.zeros(2, 2, 10, device=device, dtype=torch.float64)                # (video | text, sum | count, decile)
        self.loss = torch.zeros(2, device=device, dtype=torch.float64)                       # sum, count

    def add(self, loss, parts):
        """What is not finite is left out, as its step will be."""
        self.loss += torch.stack([loss.detach().nan_to_num(0, 0, 0), loss.isfinite()]).double()
        for i, (name, m) in enumerate((("video", "v"), ("text", "t"))):
            if name in parts:
                decile, counts = (parts[f"tau_{m}"] * 10).long().clamp(max=9), parts[f"loss_mask_{m}"] * parts[name].isfinite()
                self.sums[i].index_add_(1, decile, torch.stack([parts[name].nan_to_num(0, 0, 0) * counts, counts]).double())

    def read(self, ranks=1):
        """The figures of all processes as a dict, and an empty meter again."""
        if ranks > 1:
            dist.all_reduce(self.sums), dist.all_reduce(self.loss)
        (loss, steps), sums = self.loss.tolist(), self.sums.cpu()
        ratio = lambda s, n: round(s / n, 6) if n else None
        line = {"loss": ratio(loss, steps)}
        for name, (s, n) in zip(("video", "text"), sums.tolist()):
            line |= {name: ratio(sum(s), sum(n)), f"{name}_by_tau": [ratio(*x) for x in zip(s, n)]}
        self.sums.zero_(), self.loss.zero_()
        return line


# ---------------------------------------------------------------- checkpoints

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)     # all of it, gathered by process 0: any number of processes may load it


class Average:
    """Exponential moving average of a model's weights. Each process averages what it holds of them."""

    def __init__(self, model, decay):
        self.decay, self.weights = decay, [local(p) for p in model.parameters()]
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
            w.copy_(m), m.copy_(kept)


def local(p):
    """What this process holds of a parameter, without gradient: all of it, or with FSDP its shard."""
    return (p.to_local() if hasattr(p, "to_local") else p).detach()


class Saver:
    """Writes checkpoints beside their place, then renames them: a folder with its final name is always complete. With async_save, a thread
    writes, from copies, while training goes on; what goes wrong there is raised at the next save or at the end."""

    def __init__(self, world, train, machine):
        self.world, self.train, self.machine, self.thread, self.pending = world, train, machine, ThreadPoolExecutor(1), None

    def wait(self):
        """Until the last checkpoint is complete. Raises what its writing raised."""
        pending, self.pending = self.pending, None
        return pending and pending.result()

    def save(self, name, model, state, optimizers, meter, average):
        """Called by all processes; process 0 writes OUT/name. state: what train.json says beside the configuration."""
        self.wait()
        wait_for_all(self.machine)
        if self.machine.ranks > 1:
            dist.all_reduce(meter.sums), dist.all_reduce(meter.loss)
        tensors = {"model.safetensors": get_model_state_dict(model, options=WHOLE)}
        if average:
            with average.in_place():
                tensors["ema/model.safetensors"] = copy.deepcopy(get_model_state_dict(model, options=WHOLE))
        training = {"optimizers": get_optimizer_state_dict(model, optimizers, options=WHOLE), "meter": {"sums": meter.sums.clone(), "loss": meter.loss.clone()}}
        if self.machine.rank > 0:
            meter.sums.zero_(), meter.loss.zero_()                  # process 0 has them now
        elif self.train.async_save == "yes":
            if self.machine.device.type == "cpu":                   # else they are copies already
                tensors, training = copy.deepcopy((tensors, training))
            self.pending = self.thread.submit(self.write, name, model.config, tensors, state, training)
        else:
            self.write(name, model.config, tensors, state, training)
        wait_for_all(self.machine)

    def write(self, name, config, tensors, state, training):
        folder, part = Path(self.train.out, name), Path(self.train.out, f".{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        texts = {"config.json": dataclasses.asdict(config), "world.json": self.world.state,            # world.json: what sample.py needs beside the model
                 "train.json": {"train": dataclasses.asdict(self.train), **state}}
        try:
            for file, weights in tensors.items():
                (part / file).parent.mkdir(parents=True)
                save_file(weights, part / file, metadata={"format": "pt"})
                for text, values in texts.items():
                    (part / file).with_name(text).write_text(json.dumps(values, indent=1))
            torch.save(training, part / "training_state.pt")
        except (Exception, KeyboardInterrupt) as error:  # on a full disk, safetensors and torch.save have errors of their own
            free = shutil.disk_usage(self.train.out).free
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise OSError(f"checkpoint {folder} cannot be written ({free:,} bytes were free): {one_line(error)}") from None
        os.sync()                                                   # before the name says that it is complete
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for _, old in [c for c in checkpoints(self.train.out) if c[1].name.startswith("step-")][: -self.train.keep]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.part")))


def restore(folder, model, optimizers, meter, average, machine):
    """The training state of a checkpoint into optimizers, meter and average. Raises OSError where it is damaged."""
    try:
        stored = torch.load(folder / "training_state.pt", weights_only=True, map_location="cpu", mmap=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizers, stored["optimizers"], options=options)
        if average:
            with average.in_place():
                set_model_state_dict(model, load_file(folder / "ema" / "model.safetensors"), options=options)
        if machine.rank == 0:
            meter.sums, meter.loss = stored["meter"]["sums"].to(machine.device), stored["meter"]["loss"].to(machine.device)
    except Exception as error:  # a damaged file fails in many ways
        raise OSError(f"checkpoint {folder}: its training state cannot be read ({type(error).__name__}): remove this folder "
                      "and --resume goes on from the checkpoint before it") from None


def load(folder, config):
    """A checkpoint folder -> its model and what train.json says, if it has one. Raises ValueError unless the model is config's."""
    if wan.is_wan(folder):
        return wan.load(folder, **dataclasses.asdict(config)), {"stage": "recall"}               # its text stream is started already
    folder = Path(folder)
    for name in ("model.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} has no {name}, wanted a folder that train.py wrote")
    stored, done = read_json(folder / "config.json"), read_json(folder / "train.json") if (folder / "train.json").exists() else {}
    for name, wanted in json.loads(json.dumps(dataclasses.asdict(config))).items():          # before a model of these sizes is made
        if stored.get(name, wanted) != wanted:
            raise ValueError(f"checkpoint {folder} has {name} {stored[name]!r}, wanted {wanted!r}")
    model = build(config)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:  # truncated or foreign files fail in many ways
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {one_line(error)}") from None
    if bad := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        raise ValueError(f"checkpoint {folder}: {bad} holds NaN or infinity")
    return model, done


STATE = dict(step=int, stage=str, elapsed=(int, float), skipped=list, train=dict)            # what train.json holds


def checkpoints(out):
    """Complete checkpoints of a run, oldest first: list of (step, folder)."""
    found = []
    for file in Path(out).glob("[!.]*/train.json"):
        try:
            state = json.loads(file.read_text())
            if not all(isinstance(state[name], kind) for name, kind in STATE.items()):
                raise TypeError
            found.append((state["step"], file.parent))
        except FileNotFoundError:
            continue                                                # it has just gone, or been renamed
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{file} cannot be read: remove {file.parent}") from None
    return sorted(found)


LAUNCH = ".launch"                                                  # file in OUT: which call of torchrun began the run, see launch()


def launch():
    """What names a call of torchrun, the same in all its restarts; "" where there is none. Many nodes need their --rdzv-id to be one."""
    run, nodes = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("GROUP_WORLD_SIZE", "1")
    return f"{run} {os.getppid()}" if run and nodes == "1" else "" if run == "none" else run


def start_anew(out, overwrite):
    """Makes `out`, and refuses to mix a new run with an old one."""
    if Path(out).exists() and not (Path(out).is_dir() and os.access(out, os.W_OK | os.X_OK)):
        raise ValueError(f"out is {out}, wanted a folder that can be written to")
    old = checkpoints(out)
    if old and not overwrite:
        raise ValueError(f"{out} holds a run at step {old[-1][0]}: add --resume to go on, --overwrite to start anew, or choose another --out")
    if foreign := [name for name in ("results.json", "report.html") if not old and not overwrite and Path(out, name).exists()]:
        raise ValueError(f"{out} has a {foreign[0]}, but no checkpoint, and a run would write over it: add --overwrite, or choose another --out")
    for _, folder in old:
        shutil.rmtree(folder)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "validation.jsonl", "results.json", "report.html"):
        (Path(out) / name).unlink(missing_ok=True)


def truncate(path, step):
    """Drops the lines that a killed run wrote after its last checkpoint, so that the resumed run writes them again. Raises ValueError for lines of another kind."""
    if path.exists():
        try:
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{path} has a line that is not of a run's log, wanted a JSON object with its step: mend or remove the file") from None
        part = path.with_name(path.name + ".part")
        part.write_text("".join(lines))
        part.replace(path)                                          # a kill leaves it whole


# ---------------------------------------------------------------- the machine, and the processes of torchrun

@dataclass
class Machine:
    """Where this process runs and how it computes."""

    device: torch.device
    bf16: bool
    compile: bool
    rank: int
    ranks: int
    stopped: bool = False                                           # SIGTERM arrived
    begin: float = field(default_factory=lambda: time.time())


def join_processes(train):
    """This process's Machine; joins the others where torchrun started several. Raises ValueError for a device that is not there."""
    rank, ranks, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if train.device == "auto" else train.device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA GPU; wanted 'cpu' or 'auto'")
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    bf16 = kind == "cuda" if train.precision == "auto" else train.precision == "bf16"
    steps = sum(getattr(train, f"{stage}_steps") for stage in train.stages.split(","))
    compile = (steps >= 1000 and bool(shutil.which("g++") or shutil.which("clang++"))) if train.compile == "auto" else train.compile == "yes"
    if kind == "cpu" and train.recompute == "keep-attention":
        compile = False                                             # torch 2.13's compiler for CPUs gives wrong gradients there for a batch of 1
    if ranks > 1:
        if kind == "cuda":
            torch.cuda.set_device(device)
        store, *_ = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":               # torchrun's agent keeps one store over restarts: else the dead processes are met there
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(hours=2))     # a checkpoint may take long
    return Machine(device, bf16, compile, rank, ranks)


def preferred_attention(machine):
    """A context in which torch takes cuDNN's attention, else FlashAttention: on Hopper the order of their speed."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True) if machine.device.type == "cuda" else nullcontext()


def attention_kernel(config, machine):
    """The name of the attention that torch takes for this model."""
    q = torch.empty(1, config.num_heads, 128, config.dim // config.num_heads, device=machine.device, dtype=torch.bfloat16 if machine.bf16 else torch.float32)
    with preferred_attention(machine):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


def check_memory(train, config, machine):
    """Raises ValueError where a process has less memory than its weights, gradients and Adam's moments will take, before any weights are there."""
    parameters, copies = sizes(train, config)
    needed, cuda = (20 if train.ema else 16) * parameters / copies, machine.device.type == "cuda"
    there = torch.cuda.get_device_properties(machine.device).total_memory if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > there:
        raise ValueError(f"{parameters:,} parameters take {needed / 1e9:.1f} GB in each of {machine.ranks} processes (weights, gradients, Adam's moments), but "
                         f"{machine.device} has {there / 1e9:.1f} GB: wanted more processes with --parallel fsdp, or a smaller model")


class Objective(torch.nn.Module):
    """The loss as a module: what DDP and FSDP wrap, so that one forward pass uses every parameter."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z_v, y, c, options):
        return uni_flow_loss(self.model, z_v, y, c, **options)


def parallelise(model, train, machine):
    """The Objective of a model, over all processes: each block compiled, recomputed and sharded on its own."""
    torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp = 64, False      # a graph for each size of video; blocks are cut already
    for block in model.blocks:
        if machine.compile and train.recompute != "keep-attention":
            block.forward = torch.compile(block.forward, dynamic=False)
        if train.recompute != "none":
            block.forward = recomputed(block.forward, *([keep_attention] if train.recompute == "keep-attention" else []))
        if machine.compile and train.recompute == "keep-attention":
            block.forward = torch.compile(block.forward, dynamic=False)                      # outside: the choice of what is kept needs to see the operations
    if machine.ranks == 1:
        return Objective(model.to(machine.device))
    if chosen_parallel(sum(p.numel() for p in model.parameters()), train) == "ddp":
        objective = Objective(model.to(machine.device))
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters="generator" in train.stages)
    within = train.shard_within or machine.ranks
    shape, names = ((machine.ranks // within, within), ("replicate", "shard")) if within < machine.ranks else ((machine.ranks,), ("shard",))
    mesh = init_device_mesh(machine.device.type, shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(Objective(model), mesh=mesh)                 # parameters and reduction in fp32; autocast makes the products bf16


def recomputed(forward, context_fn=noop_context_fn):
    """A block's forward whose activations are computed again in the backward pass. (A function of ours: torch.compile does not look into others.)"""
    def again(*args):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)
    return again


def chosen_parallel(parameters, train):
    """'ddp' or 'fsdp'. Adam in fp32 takes 16 bytes a parameter: beyond two billion, a GPU is better used for activations."""
    return train.parallel if train.parallel != "auto" else "fsdp" if parameters > 2e9 else "ddp"


def sizes(train, config):
    """How many parameters a model has, and over how many processes a copy of them is cut."""
    with torch.device("meta"):
        parameters, ranks = sum(p.numel() for p in build(config).parameters()), int(os.environ.get("WORLD_SIZE", 1))
    return parameters, (train.shard_within or ranks) if chosen_parallel(parameters, train) == "fsdp" else 1


def keep_attention():
    """For checkpoint(): attention's outputs, 70% of the work at 33,000 tokens, are kept; everything else is computed again."""
    kept = {torch.ops.aten._scaled_dot_product_flash_attention.default, torch.ops.aten._scaled_dot_product_cudnn_attention.default,
            torch.ops.aten._scaled_dot_product_efficient_attention.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}
    return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE)


def held_back(objective, hold):
    """A context in which gradients are summed here, and not yet over the processes."""
    if isinstance(objective, DistributedDataParallel):
        return objective.no_sync() if hold else nullcontext()
    if hasattr(objective, "set_requires_gradient_sync"):
        objective.set_requires_gradient_sync(not hold)
    return nullcontext()


def largest(machine, value):
    """The largest of all processes' values."""
    if machine.ranks == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def wait_for_all(machine):
    largest(machine, 0)


def micro_batches(dataset, train, machine, first, steps):
    """This process's micro-batches of steps `first` and on. Micro-batch m of a step goes to process m modulo their number: what is
    in it, and its noise, depends on neither, so that a run may go on with another number of processes."""
    size = train.micro_batch
    sampler = (dataset.batch(step, train.batch)[m * size:(m + 1) * size] for step in range(first, first + steps)
               for m in range(machine.rank, train.batch // size, machine.ranks))
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=as_it_is, num_workers=train.workers, worker_init_fn=end_with_trainer,
                      pin_memory=machine.device.type == "cuda")


def end_with_trainer(worker):
    """torchrun and Slurm send SIGTERM to every process, but it is the trainer who ends its workers, after the last checkpoint: they
    obey its SIGTERM alone (on Linux: macOS does not tell who sent a signal)."""
    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=obey, daemon=True).start()


def as_it_is(samples):
    """The datasets collate their batches themselves."""
    return samples


# ---------------------------------------------------------------- the loop

class Stop(Exception):
    """The run was asked to end, by SIGTERM or the time limit; its checkpoint is written."""


def run_stage(stage, objective, world, train, machine, saver, average, guard, first, start, resumed, elapsed, bar):
    """Trains one stage from global step `start` (>= first, the stage's first step) to its end; returns the seconds it took."""
    model = (objective.module if isinstance(objective, DistributedDataParallel) else objective).model
    steps, text, device = getattr(train, f"{stage}_steps"), STAGES[stage], machine.device
    optimizers = make_optimizers(model, getattr(train, f"{stage}_optimizer"), getattr(train, f"{stage}_lr"), train.adam_lr, text is not None)
    meter, log, begin = Meter(device), Log(train, machine, bar, start, elapsed), time.time()
    if resumed:
        restore(resumed, model, optimizers, meter, average, machine)
    options = dict(p_drop=train.p_drop if text else 0.1, clocks=train.clocks if text else train.generator_clocks, lambda_t=train.lambda_t or None,
                   anchor=train.anchor)
    loader = iter(micro_batches(world.dataset("train"), train, machine, start, first + steps - start))
    micros = train.batch // train.micro_batch // machine.ranks
    model.train()
    for step in range(start, first + steps):
        share = schedule(step - first, steps, train.warmup, train.decay)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * share
        for m in range(machine.rank, micros * machine.ranks, machine.ranks):
            with log.waiting():
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(loader).items()}
            generator = torch.Generator().manual_seed(train.seed * 1_000_003 + step + (m << 40))     # no hidden state: a resumed step draws the same
            with held_back(objective, m + machine.ranks < micros * machine.ranks):
                with torch.autocast(device.type, torch.bfloat16, enabled=machine.bf16, cache_enabled=False):     # its cache would keep all blocks in bf16
                    loss, parts = objective(batch["z_v"], batch[text] if text else None, batch["c"], options | {"generator": generator})
                (loss / micros).backward()
            meter.add(loss, parts)
            log.count(model.config, batch, text)
        guard.step(torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip), step, optimizers)
        if average:
            average.update()
        bar.update()

        done, last = step + 1, step + 1 == first + steps
        stop = largest(machine, machine.stopped or 0 < train.time_limit * 60 < time.time() - machine.begin)
        saves = done % train.save_every == 0 or last or stop
        if done % train.log_every == 0 or saves:
            skipped, norm = guard.check(stage)                          # the only places where the loop waits for the device
        if done % train.log_every == 0 or last:
            log.write({"step": done, "stage": stage, **meter.read(machine.ranks), "lr": optimizers[-1].param_groups[0]["lr"], "grad_norm": round(norm, 4),
                       "skipped": skipped})
        if saves:
            state = {"step": done, "stage": stage, "elapsed": elapsed + time.time() - begin, "skipped": guard.skipped}
            saver.save(stage if last else f"step-{done:06d}", model, state, optimizers, meter, average)
        if train.val_every and done % train.val_every == 0:
            evaluate(objective, world, train, machine, average, train.val_clips, elapsed + time.time() - begin, text is not None, step=done)
            model.train()
        if stop and done < bar.total:
            raise Stop(f"stopped at step {done}, saved; --resume goes on")
    return time.time() - begin


class Guard:
    """Optimizer steps that leave out what is not finite, in every process alike, without waiting for the device to know."""

    def __init__(self, world, train, skipped):
        self.world, self.train, self.norms, self.skipped = world, train, {}, list(skipped)

    def step(self, norm, step, optimizers):
        """Steps all optimizers and empties the gradients. norm: that of the gradient, the same in all processes."""
        self.norms[step] = norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for optimizer in optimizers:
            optimizer.found_inf = (~norm.isfinite()).float()        # as torch.amp's GradScaler says it; fused Adam then changes nothing
            optimizer.step()
            optimizer.zero_grad()

    def check(self, stage):
        """How many steps of the run were left out, and the last norm. Raises FloatingPointError where they are too many."""
        found = dict(zip(self.norms, torch.stack(list(self.norms.values())).tolist()))
        self.norms = {}
        for step, norm in found.items():
            if not math.isfinite(norm):
                self.skipped.append(step)
                clips = list(self.world.dataset("train").batch(step, self.train.batch))
                print(f"step {step} of stage {stage} is left out: its gradient is {norm}; its clips: {clips}", file=sys.stderr)
            if len(self.skipped) > self.train.max_skipped:
                raise FloatingPointError(f"the gradient at step {step} of stage {stage} is {norm}, wanted a finite number; {len(self.skipped)} steps were "
                                         f"left out ({', '.join(map(str, self.skipped))}): lower the learning rate or mend the clips; the last checkpoint is intact")
        return len(self.skipped), norm


@contextmanager
def evaluable(objective, machine, average):
    """The model, to be called by all processes in step: whole where FSDP has cut it, with averaged weights where there are some; its output is process 0's."""
    model = (objective.module if isinstance(objective, DistributedDataParallel) else objective).model
    sharded = hasattr(objective, "unshard")
    with torch.compiler.set_stance("force_eager"), average.in_place() if average else nullcontext(), redirect_stdout(None if machine.rank else sys.stdout):
        if sharded:
            objective.unshard()                                     # the root's parameters; each block gathers its own
        try:
            yield model.eval()                                      # batches of evaluation are few: not worth compiling for
        finally:
            if sharded:
                objective.reshard()


def evaluate(objective, world, train, machine, average, clips, elapsed, has_text, step=None):
    """The world's evaluation, at the end into OUT, at a step into OUT/val/step-000000 and as a line of OUT/validation.jsonl."""
    out = Path(train.out, *([] if step is None else ["val", f"step-{step:06d}"]))
    with evaluable(objective, machine, average) as model, tempfile.TemporaryDirectory() as nowhere:
        out.mkdir(parents=True, exist_ok=True)
        results = world.evaluate(model, nowhere if machine.rank else out, clips, elapsed, has_text)
    if step is not None and machine.rank == 0:
        with open(Path(train.out, "validation.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **results}) + "\n")


class Log:
    """Writes the lines of metrics.jsonl, with what the clock on the wall says."""

    def __init__(self, train, machine, bar, start, elapsed):
        self.train, self.machine, self.bar, self.elapsed = train, machine, bar, elapsed
        self.begin = self.last = time.time()
        self.tokens = self.flops = 0
        self.step, self.waited, self.track = start, 0.0, tracker(train) if machine.rank == 0 else None

    @contextmanager
    def waiting(self):
        """Counts the time within as spent waiting for data."""
        begin = time.time()
        yield
        self.waited += time.time() - begin

    def count(self, config, batch, text):
        """Adds a micro-batch to the tokens and FLOPs since the last line; all processes have some of one size."""
        n_v, n_t = batch["z_v"][0, 0].numel() // math.prod(config.patch_size), config.text_len if text else 0
        clips = len(batch["z_v"]) * self.machine.ranks
        self.tokens, self.flops = self.tokens + clips * (n_v + n_t), self.flops + 3 * clips * forward_flops(config, n_v, n_t)

    def write(self, line):
        """Adds the rates since the last line and writes it."""
        now, train, machine = time.time(), self.train, self.machine
        seconds, rate = now - self.last, train.batch * (line["step"] - self.step) / (now - self.last)
        line |= {"samples_per_s": round(rate, 2), "tokens_per_s": round(self.tokens / seconds), "data_wait": round(self.waited / seconds, 4),
                 "eta_s": round((self.bar.total - line["step"]) * train.batch / rate), "wall_s": round(self.elapsed + now - self.begin, 1)}
        if machine.device.type == "cuda":
            peak = PEAK.get(next((name for name in PEAK if name in torch.cuda.get_device_name()), ""))
            line |= {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
                     "mfu": peak and round(self.flops / seconds / machine.ranks / peak, 4)}
        if machine.rank == 0:
            with open(Path(train.out) / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            report(self.bar, line)
            self.track({name: value for name, value in line.items() if isinstance(value, (int, float))}, line["step"])
        self.last, self.step, self.waited, self.tokens, self.flops = now, line["step"], 0.0, 0, 0


def tracker(train):
    """A function (figures, step) that hands the log to --track's program."""
    if train.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(Path(train.out, "tensorboard"))
        return lambda figures, step: [board.add_scalar(name, value, step) for name, value in figures.items()]
    if train.track == "wandb":
        import wandb

        run = wandb.run or wandb.init(project="uni-vigu", id=Path(train.out).name, dir=train.out, config=dataclasses.asdict(train), resume="allow")
        return lambda figures, step: run.log(figures, step=step)
    return lambda figures, step: None


PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}    # dense bf16 FLOP/s, as their makers state them


def forward_flops(config, n_v, n_t):
    """FLOPs of one sample's forward pass, 2 per multiply-add: linears, self-attention, cross-attention. A training step is 3 of them."""
    n, d = n_v + n_t, config.dim
    linears = 8 * d * d * n + 4 * d * (config.ffn_dim * n_v + config.text_ffn_dim * n_t)     # q k v o; the experts
    cross = 4 * d * d * (n + config.prompt_len) + 4 * n * config.prompt_len * d
    return config.num_layers * (linears + 4 * n * n * d + cross)


def report(bar, line):
    """One line of progress: beside the bar on a terminal, in its place elsewhere."""
    text = "  ".join(f"{name} {line[name]:.3f}" for name in ("loss", "video", "text") if line[name] is not None)
    bar.set_description(line["stage"])
    bar.set_postfix_str(text)
    if bar.disable:
        print(f"{line['stage']:9} step {line['step']:5}  {text}  {line['samples_per_s']:.4g} clips/s  data {line['data_wait']:.1%}  "
              f"ETA {line['eta_s'] // 60}:{line['eta_s'] % 60:02}", flush=True)


# ---------------------------------------------------------------- flags

def parse(argv):
    """Flags -> (Train, Config, the flags' namespace). Preset (or the config of --init, where that is a Wan or the data are real), the data's sizes, recipe,
    the real data's defaults, flags: later ones win. On --resume, the checkpoint's own values."""
    parser = argparse.ArgumentParser(prog="train.py", usage="%(prog)s [--flag value ...]      --help lists the flags", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"train.py: error: {one_line(message)}\n")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, with its configuration")
    which.add_argument("--overwrite", action="store_true", help="start anew where --out already holds a run")
    for title, cls in (("training", Train), ("model (defaults: the preset's)", PublishedConfig)):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            kind = integers if f.name == "patch_size" else f.type
            real = f"; real data: {REAL[f.name]}" if f.name in REAL else ""
            default = "" if cls is PublishedConfig or f.default == "" else f" (default: {f.default}{real})"
            group.add_argument("--" + f.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, metavar=f.name.upper(),
                               help=(f.metadata["help"] + default).replace("%", "%%"))
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory, FLOPs and days, load nothing and write nothing")
    flags = parser.parse_args(argv)
    given = {name: value for name, value in vars(flags).items() if name not in ("resume", "overwrite", "dry_run")}
    try:
        out = Path(given.get("out", Train.out))
        if launch() and checkpoints(out) and (out / LAUNCH).exists() and (out / LAUNCH).read_text() == launch():
            flags.resume = True                                     # torchrun started us again: go on
        return *resolve(given, flags.resume), flags
    except (ValueError, OSError) as error:
        parser.error(str(error))


def integers(text):
    """A list of integers as a flag has it: "1,2,2" -> (1, 2, 2)."""
    return tuple(map(int, text.split(",")))


# What may differ when a run goes on. (Another micro_batch draws other noise; everything else here leaves the numbers as they are.)
ANY_TIME = {"compile", "device", "log_every", "save_every", "keep", "eval_clips", "micro_batch", "parallel", "shard_within", "recompute", "workers",
            "time_limit", "max_skipped", "async_save", "track", "val_every", "val_clips"}


def resolve(given, resume):
    """The values asked for, completed by those of the recipe and the preset, or of the checkpoint to resume."""
    train_names = {f.name for f in dataclasses.fields(Train)}
    if resume:
        out = given.get("out", Train.out)
        if not checkpoints(out):
            raise ValueError(f"--resume: found no checkpoint in {out}, wanted a folder with model.safetensors and train.json")
        folder = checkpoints(out)[-1][1]
        stored = read_json(folder / "train.json", "train") | read_json(folder / "config.json") | {"out": out}
        for f in (*dataclasses.fields(Train), *dataclasses.fields(PublishedConfig)):
            if not isinstance(stored.get(f.name, f.default), {"patch_size": (list, tuple)}.get(f.name, (int, float) if f.type is float else f.type)):
                raise ValueError(f"checkpoint {folder} has {f.name} {stored[f.name]!r}, wanted {f.default!r} or the like: remove it")
        for name in set(given) - ANY_TIME:
            if given[name] != (tuple(stored[name]) if name == "patch_size" else stored[name]):
                raise ValueError(f"--{name.replace('_', '-')} is {given[name]!r}, but the run to resume has {stored[name]!r}")
        values = stored | given
    else:
        for name, table in (("preset", PRESETS), ("recipe", RECIPES)):
            if given.get(name, getattr(Train, name)) not in table:
                raise ValueError(f"{name} is {given[name]!r}, wanted one of {', '.join(table)}")
        preset = dataclasses.asdict(PRESETS[given.get("preset", Train.preset)])
        sizes = make_world(given.get("data", Train.data), 0, given.get("vocabulary", Train.vocabulary)).sizes
        init = given.get("init", "")
        if init and wan.is_wan(init):
            fields = {f.name for f in dataclasses.fields(PublishedConfig)}
            preset = dataclasses.asdict(wan.config(init, **sizes | {name: value for name, value in given.items() if name in fields}))
        elif given.get("data", Train.data) != "toy" and Path(init, "config.json").is_file():
            preset = read_json(Path(init, "config.json"))
        real = REAL if given.get("data", Train.data) != "toy" else {}
        values = preset | sizes | RECIPES[given.get("recipe", Train.recipe)] | real | given
    train = Train(**{name: value for name, value in values.items() if name in train_names})
    train.micro_batch = train.micro_batch or max(1, train.batch // int(os.environ.get("WORLD_SIZE", 1)))
    check(train)
    return train, config_from(values)


def check(train):
    """Raises ValueError on a value no run can have, before any work is done."""
    for name, allowed in dict(device=("auto", "cpu", "cuda"), precision=("auto", "fp32", "bf16"), compile=("auto", "yes", "no"),
                              clocks=("independent", "mixture"), vocabulary=("data", "full"),
                              generator_clocks=("independent", "logit-normal"), parallel=("auto", "ddp", "fsdp"),
                              recompute=("none", "keep-attention", "full"), async_save=("no", "yes"),
                              track=("none", "tensorboard", "wandb"), **{f"{s}_optimizer": ("muon", "adam") for s in STAGES}).items():
        if getattr(train, name) not in allowed:
            raise ValueError(f"{name} is {getattr(train, name)!r}, wanted one of {', '.join(allowed)}")
    if not train.out:
        raise ValueError("out is '', wanted a folder")
    if train.track != "none" and not importlib.util.find_spec(train.track):
        raise ValueError(f"track is {train.track!r}, which is not installed: pip install {train.track}")
    names = train.stages.split(",")
    if any(stage not in STAGES for stage in names) or names != [stage for stage in STAGES if stage in names]:
        raise ValueError(f"stages is {train.stages!r}, wanted some of {','.join(STAGES)}, in this order")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if train.batch % (train.micro_batch * ranks):
        raise ValueError(f"batch is {train.batch}, wanted a multiple of micro_batch {train.micro_batch} times {ranks} processes")
    if train.shard_within and ranks % train.shard_within:
        raise ValueError(f"shard_within is {train.shard_within}, wanted a divisor of the {ranks} processes")
    for name, low, high in (("batch", 1, 10**6), ("micro_batch", 1, 10**6), *((f"{s}_steps", 1, 10**9) for s in STAGES), ("p_drop", 0, 1), ("decay", 0, 1),
                            *((f"{name}_every", 1, 10**9) for name in ("log", "save")), ("keep", 1, 10**6), ("eval_clips", 0, 10**6), ("ema", 0, 0.999999),
                            ("val_every", 0, 10**9), ("val_clips", 1, 10**6), ("workers", 0, 1000), ("max_skipped", 0, 10**9), ("time_limit", 0, 10**6),
                            ("shard_within", 0, 10**6), ("warmup", 0, 10**9), ("anchor", 0, 1e3), ("lambda_t", 0, 1e6),
                            ("seed", 0, 10**9), ("clip", 1e-9, 1e9), ("adam_lr", 0, 10), *((f"{s}_lr", 0, 10) for s in STAGES)):
        if not low <= getattr(train, name) <= high:
            raise ValueError(f"{name} is {getattr(train, name)}, wanted {low} to {high}")


def make_world(data, seed, vocabulary="data"):
    """The world to learn: "toy", or a folder that wan.prepare wrote."""
    if data == "toy":
        from toy import World
    else:
        if not Path(data, "manifest.json").is_file():
            raise ValueError(f"data is {data!r}, wanted 'toy' or a folder that `python -m wan.prepare` wrote, with its manifest.json")
        from wan.data import World
    return World(seed=seed) if data == "toy" else World(data, seed=seed, full_vocabulary=vocabulary == "full")


def check_source(source, world):
    """Raises ValueError where a checkpoint was trained in another world: its tokens or its latents would mean something else."""
    file = Path(source, "world.json")
    stored, wanted = read_json(file) if file.is_file() else {}, json.loads(json.dumps(world.state))
    for name in ("world", "vocabulary", "codec", "prompt_encoder", "latents"):
        if name in stored and stored[name] != wanted.get(name):
            values = [len(v) if isinstance(v, list) else v for v in (stored[name], wanted.get(name))]
            raise ValueError(f"checkpoint {source} has {name} {values[0]!r}, but the data have {values[1]!r}" + " other tokens" * isinstance(stored[name], list))


def estimate(train, config, world):
    """Prints what a run will take, from sizes alone."""
    (n, copies), ranks = sizes(train, config), int(os.environ.get("WORLD_SIZE", 1))
    n_v = math.prod(world.shape[1:]) // math.prod(config.patch_size)
    tokens, parallel = n_v + config.text_len, chosen_parallel(n, train)
    step = train.batch * (4 if train.recompute == "full" else 3) * forward_flops(config, n_v, config.text_len)
    steps = sum(getattr(train, f"{stage}_steps") for stage in train.stages.split(","))
    kept = {"none": 34 + 4 * config.ffn_dim / config.dim, "keep-attention": 4, "full": 2}[train.recompute]   # bf16 numbers a token, in units of dim, by counting
    print(f"{n:,} parameters; {n_v:,} video and {config.text_len} text tokens a clip, {train.batch} clips a step, {steps:,} steps")
    print(f"memory of each of {ranks} processes ({parallel}): {16 * n / copies / 1e9:.1f} GB of weights, gradients and Adam's moments, "
          f"about {2 * kept * config.num_layers * tokens * config.dim * train.micro_batch / 1e9:.1f} GB of activations")
    print(f"{step / 1e12:,.1f} TFLOP a step: {step * steps / (0.4 * 989e12) / ranks / 86400:,.1f} days on {ranks} H100 at 40% of 989 TFLOP/s")


def fail(error):
    """Ends the process with one line, from one process of many."""
    said = (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix(f"{type(error).__name__}: ")          # a DataLoader's worker sends its traceback along
    sys.exit(1 if int(os.environ.get("RANK", 0)) else f"train.py: error: {said}")


def prepare(train, config, world, resume, overwrite):
    """Everything that may fail, before anything of an old run is lost. Returns machine, model, the checkpoint to go on from (step, folder) or
    None, and what the checkpoint that the weights are from says of its run. Raises ValueError, OSError or ImportError."""
    machine = join_processes(train)
    check_memory(train, config, machine)
    last = checkpoints(train.out)[-1] if resume else None
    for part in Path(train.out).glob(".*.part") if machine.rank == 0 else ():
        print(f"{part} is no complete checkpoint: ignored", file=sys.stderr)
    source = last[1] if last else train.init
    torch.manual_seed(train.seed)
    if source:
        check_source(source, world)
    if train.eval_clips or train.val_every:
        _ = world.tokenizer, world.codec                            # what an evaluation needs should be missed now, not at the end
    world.dataset("train")
    for place in (Path(train.out, name) for name in train.stages.split(",")):
        if os.path.lexists(place) and not (place / "train.json").is_file():
            raise ValueError(f"{place} is no checkpoint, but one would take its place: move it, or choose another --out")
    model, done = load(source, config) if source else (build(config), {})
    if not resume and machine.rank == 0:
        start_anew(train.out, overwrite)
    if machine.rank == 0 and launch():
        Path(train.out, LAUNCH).write_text(launch())
    return machine, model, last, done


def introduce(train, config, machine, model):
    """Prints what is about to run."""
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({**dataclasses.asdict(train), **dataclasses.asdict(config)}, indent=1))
    how = f"{machine.ranks} processes, {chosen_parallel(parameters, train)}, " if machine.ranks > 1 else ""
    print(f"{parameters:,} parameters on {how}{machine.device}, {'bf16 autocast' if machine.bf16 else 'fp32'}, {attention_kernel(config, machine)}, "
          f"{'compiled' if machine.compile else 'eager'} blocks", flush=True)


def run_stages(train, config, world, machine, model, last, done):
    """Trains what is left of the stages, measures, and writes the report. Raises Stop when asked to end."""
    names, text_started = train.stages.split(","), done.get("stage") in ("recall", "refine")
    if STAGES[names[0]] and not text_started:
        model.start_text()
    if machine.rank == 0:
        introduce(train, config, machine, model)
    objective, saver = parallelise(model, train, machine), Saver(world, train, machine)
    signal.signal(signal.SIGTERM, lambda *_: setattr(machine, "stopped", True))
    step, elapsed, skipped = [done[name] for name in ("step", "elapsed", "skipped")] if last else (0, 0.0, [])
    if largest(machine, step) != -largest(machine, -step):
        raise ValueError(f"the processes found different checkpoints in {train.out}, the last one of step {largest(machine, step):g}: wanted one folder for all")
    first, guard = 0, Guard(world, train, skipped)
    average = Average(model, train.ema) if train.ema else None
    with tqdm(total=sum(getattr(train, f"{stage}_steps") for stage in names), initial=step, disable=None if machine.rank == 0 else True) as bar, \
            preferred_attention(machine):
        if step >= bar.total and machine.rank == 0:
            print(f"{train.out} is at its last step, {step}: nothing is left to train")
        for name in ("metrics.jsonl", "validation.jsonl") if machine.rank == 0 else ():
            truncate(Path(train.out, name), step)
        wait_for_all(machine)
        try:
            for stage in names:
                end = first + getattr(train, f"{stage}_steps")
                if step < end:
                    if STAGES[stage] and not text_started and stage != names[0]:
                        model.start_text()
                        average = Average(model, train.ema) if train.ema else None           # of what starts here
                    text_started = bool(STAGES[stage])
                    resumed = last[1] if last and first < step else None
                    elapsed += run_stage(stage, objective, world, train, machine, saver, average, guard, first, max(first, step), resumed, elapsed, bar)
                first = end
        finally:
            saver.wait()
        if train.eval_clips:
            evaluate(objective, world, train, machine, average, train.eval_clips, elapsed, text_started)
    if machine.rank == 0:
        pages.write_report(train.out, world.shown, dataclasses.asdict(train) | dataclasses.asdict(config))


def main(argv=None):
    train, config, flags = parse(argv)
    try:
        world = make_world(train.data, train.seed, train.vocabulary)
        world.check(config)
        if flags.dry_run:
            return None if int(os.environ.get("RANK", 0)) else estimate(train, config, world)
        machine, model, last, done = prepare(train, config, world, flags.resume, flags.overwrite)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    try:
        run_stages(train, config, world, machine, model, last, done)
    except Stop as stop:
        if machine.rank == 0:
            print(stop)
    except (FloatingPointError, ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        fail(error)
    if machine.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
