"""One process or many: torchrun, DDP, FSDP2, compiled and recomputed blocks."""

import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from engine.cost import chosen_parallel
from engine.threads import ahead
from engine.world import in_turn


@dataclass
class Machine:
    """Where this process runs and how it computes."""

    device: torch.device
    bf16: bool
    compile: bool
    rank: int
    ranks: int
    recompute: str = "none"  # which activations, see Run; "auto" until the sizes are known
    stopped: bool = False  # SIGTERM arrived
    begin: float = field(default_factory=lambda: time.time())

    def must_stop(self, minutes):
        """Whether some process was told to end, or has had so many minutes (0: no limit)."""
        late = 0 < minutes * 60 < time.time() - self.begin
        return bool(all_reduce_max(self, self.stopped or late))


def join_processes(run, steps):
    """This process's Machine; joins the others where torchrun started several.

    steps: how long the run is, which decides whether compiling pays. Raises ValueError for a
    device that is not there.
    """
    rank, ranks, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    kind = run.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA GPU; wanted 'cpu' or 'auto'")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    bf16 = kind == "cuda" if run.precision == "auto" else run.precision == "bf16"
    compile = run.compile == "yes"
    if run.compile == "auto":
        compile = steps >= 1000 and bool(shutil.which("g++") or shutil.which("clang++"))
    if ranks > 1:
        if kind == "cuda":
            torch.cuda.set_device(device)
        store, *_ = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's agent keeps one store over restarts: else the dead processes are met there
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(restarts, store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timedelta(hours=2),  # loading may take long, see lose_patience
        )
    return Machine(device, bf16, compile, rank, ranks, run.recompute)


@contextmanager
def obeying_sigterm(machine):
    """Within, SIGTERM only sets machine.stopped: the loop saves and ends at its next step."""

    def stop(*_):
        machine.stopped = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def compiling():
    """A context with torch._dynamo's settings for blocks: a graph for each size of video; blocks
    are cut for DDP already."""
    return torch._dynamo.config.patch(recompile_limit=64, optimize_ddp=False)


@contextmanager
def settings(machine):
    """Within, torch and SIGTERM are set for training."""
    with obeying_sigterm(machine), compiling(), preferred_attention(machine.device):
        yield


def autocast(machine):
    """A context with bf16 products, where the machine wants them. Its cache would keep all blocks
    in bf16."""
    dtype, enabled = torch.bfloat16, machine.bf16
    return torch.autocast(machine.device.type, dtype, enabled=enabled, cache_enabled=False)


# ---------------------------------------------------------------- attention


def preferred_attention(device):
    """A context in which torch takes the fastest attention of a device: cuDNN's on Hopper and
    datacentre Blackwell, else FlashAttention."""
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    major, _ = torch.cuda.get_device_capability(device)
    # older ones read past the end in the backward pass, where no length is a multiple of 128
    if major in (9, 10) and (torch.backends.cudnn.version() or 0) > 91500:
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


def attention_kernel(config, machine):
    """The name of the attention that torch takes for this model."""
    dtype = torch.bfloat16 if machine.bf16 else torch.float32
    head_dim = config.dim // config.num_heads
    q = torch.empty(1, config.num_heads, 128, head_dim, device=machine.device, dtype=dtype)
    with preferred_attention(machine.device):
        return SDPBackend(torch._fused_sdp_choice(q, q, q)).name.lower()


# ---------------------------------------------------------------- the model on the machine


class Objective(torch.nn.Module):
    """The loss as a module: what DDP and FSDP wrap, so that one forward uses every parameter.

    Called with a function, it applies that to the model instead: FSDP gathers within its forward
    alone.
    """

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, z_v, y=None, c=None, options=None):
        return z_v(self.model) if callable(z_v) else self.loss(self.model, z_v, y, c, **options)


def parallelise(model, loss, run, machine, find_unused=False, read=None):
    """The Objective of a model over all processes, each block compiled, recomputed and sharded.

    find_unused: whether some steps leave parameters without a gradient. read: see fill().
    """
    if machine.device.type == "cpu" and machine.recompute == "keep-attention":
        machine.compile = False  # torch 2.13's compiler gives wrong gradients for a batch of 1
    for block in model.blocks:
        prepare_block(block, machine.recompute, machine.compile)
    objective, count = Objective(model, loss), sum(p.numel() for p in model.parameters())
    sharded = machine.ranks > 1 and chosen_parallel(count, run) == "fsdp"
    if sharded:
        mesh = shards(run, machine)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # parameters and reduction in fp32; autocast makes the products bf16
        objective = fully_shard(objective, mesh=mesh)
    if read:
        fill(model, read, machine)
    elif not sharded:
        model.to(machine.device)
    if machine.ranks == 1 or sharded:
        return objective
    return DistributedDataParallel(
        objective,
        device_ids=[machine.device.index] if machine.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        init_sync=False,  # they are the same already, and this would copy them
    )


@torch.no_grad()
def fill(model, read, machine):
    """Gives a model on the meta device its parameters, one after the other, so that no process
    holds more than what it keeps of them.

    read(name, device, dtype) -> a whole one. Process 0 reads; the others get what they hold of it.
    """
    model.to_empty(device=machine.device)
    for name, p in model.named_parameters():
        if machine.rank == 0:
            whole = read(name, machine.device, p.dtype)
        else:
            whole = torch.empty(p.shape, device=machine.device, dtype=p.dtype)
        if isinstance(p, DTensor):
            part = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=0)
            p.to_local().copy_(part.to_local())
            continue
        if machine.ranks > 1:
            dist.broadcast(whole, 0)
        p.copy_(whole)


def shards(run, machine):
    """The mesh of processes: those that share one copy, and the copies."""
    within = run.shard_within or machine.ranks
    if within == machine.ranks:
        return init_device_mesh(machine.device.type, (within,), mesh_dim_names=("shard",))
    shape = (machine.ranks // within, within)
    return init_device_mesh(machine.device.type, shape, mesh_dim_names=("replicate", "shard"))


def prepare_block(block, recompute, compile):
    """Compiles a block and has its activations recomputed, in the order that each needs."""
    if recompute == "none":
        if compile:
            block.compile(dynamic=False)
        return
    forward = block.forward
    if recompute == "keep-attention":
        forward = recomputed(forward, keep_attention)
        # outside: the choice of what is kept needs to see the operations
        block.forward = torch.compile(forward, dynamic=False) if compile else forward
    else:
        block.forward = recomputed(torch.compile(forward, dynamic=False) if compile else forward)


def recomputed(forward, context_fn=noop_context_fn):
    """A block's forward whose activations are computed again in the backward pass.

    A function of ours, since torch.compile does not look into torch's checkpoint_wrapper: the
    graph would break there.
    """

    def again(*args, **kwargs):
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=context_fn,
            **kwargs,
        )

    return again


def keep_attention():
    """For checkpoint(): keeps attention's outputs, 70% of the work at 33,000 tokens, and computes
    everything else again."""
    aten = torch.ops.aten
    kept = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def bare_model(objective):
    """The model inside an Objective, wrapped or not."""
    wrapped = isinstance(objective, DistributedDataParallel)
    return (objective.module if wrapped else objective).model


def describe(model, run, machine):
    """How a model is computed, in one line."""
    count, how = sum(p.numel() for p in model.parameters()), ""
    if machine.ranks > 1:
        how = f"{machine.ranks} processes, {chosen_parallel(count, run)}, "
    numbers = "bf16 autocast" if machine.bf16 else "fp32"
    blocks = "compiled" if machine.compile else "eager"
    kernel = attention_kernel(model.config, machine)
    how += f"{machine.device}, {numbers}, {kernel}"
    return f"{count:,} parameters on {how}, {blocks} blocks, recompute {machine.recompute}"


@torch.no_grad()
def evaluate(function, objective, machine, average):
    """function(model, share) in all processes; only process 0 prints.

    The model is whole where FSDP has cut it, and has averaged weights where there are some. share
    takes functions and returns what they return: all processes call it with the same ones. With a
    copy of the model in each, a function is called in one of them, else in all, in step.
    """
    copies = isinstance(objective, DistributedDataParallel)
    whole = objective.module if copies else objective

    def share(jobs):
        if not copies:
            return in_turn(jobs)
        mine = {i: jobs[i]() for i in range(machine.rank, len(jobs), machine.ranks)}
        parts: list[dict] = [{}] * machine.ranks
        dist.all_gather_object(parts, mine)
        done = {i: value for part in parts for i, value in part.items()}
        return [done[i] for i in range(len(jobs))]

    bare_model(objective).eval()
    with (
        torch.compiler.set_stance("force_eager"),  # evaluation is too short to compile for
        average.in_place() if average else nullcontext(),
        redirect_stdout(None if machine.rank else sys.stdout),
    ):
        return whole(lambda model: function(model, share))


def local_shard(p):
    """What this process holds of a parameter, without gradient: all of it, or FSDP's shard."""
    return (p.to_local() if hasattr(p, "to_local") else p).detach()


# ---------------------------------------------------------------- the processes


def no_grad_sync(objective, hold):
    """A context in which gradients are summed in this process, and with `hold` not yet over all.

    FSDP sums them over all each time: whole ones would take as much as the model.
    """
    if isinstance(objective, DistributedDataParallel) and hold:
        return objective.no_sync()
    return nullcontext()


def all_reduce_max(machine, value):
    """The largest of all processes' values."""
    if machine.ranks == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def wait_for_all(machine):
    """Returns when every process is here."""
    all_reduce_max(machine, 0)


PATIENCE = timedelta(minutes=10)


def lose_patience(objective, machine):
    """From now on a process that waits ten minutes for another ends the run. Once all is loaded,
    only a hang takes so long."""
    if machine.ranks == 1:
        return
    parts = (p for p in objective.parameters() if isinstance(p, DTensor))
    meshes = {id(p.device_mesh): p.device_mesh for p in parts}.values()
    for group in [None, *(group for mesh in meshes for group in mesh.get_all_groups())]:
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)  # torch has no public one


def check_same_step(machine, step, out):
    """Raises ValueError where the processes would go on from different steps."""
    last = all_reduce_max(machine, step)
    if last != -all_reduce_max(machine, -step):
        raise ValueError(
            f"the processes found different checkpoints in {out}, the last one of step {last:g}: "
            "wanted one folder for all"
        )


def leave(machine):
    """Waits for the other processes, and parts from them."""
    if machine.ranks > 1:
        dist.barrier()
        # gloo's threads let go of their tensors, for which they need the GIL: a group that is torn
        # down sooner keeps the GIL and waits for them
        time.sleep(0.5)
        dist.destroy_process_group()


# ---------------------------------------------------------------- batches


def micro_batches(dataset, batch, run, machine, first, steps):
    """This process's micro-batches of steps `first` and on; batch: clips a step.

    Micro-batch m of a step goes to process m modulo their number. What is in it, and its noise,
    depends on neither, so that a run may go on with another number of processes.
    """
    size = run.micro_batch
    chosen = (
        dataset.batch(step, batch)[m * size : (m + 1) * size]
        for step in range(first, first + steps)
        for m in range(machine.rank, batch // size, machine.ranks)
    )

    def read(indices):
        found = dataset.__getitems__(indices)
        pinned = machine.device.type == "cuda"
        return {name: x.pin_memory() for name, x in found.items()} if pinned else found

    if not run.workers:
        yield from map(read, chosen)
        return
    for _, micro_batch in ahead(read, chosen, run.workers):
        yield micro_batch.result()


def receive(batch, machine):
    """A batch on the machine's device."""
    return {name: x.to(machine.device, non_blocking=True) for name, x in batch.items()}
