"""What a model takes: parameters, FLOPs, memory and days, from sizes alone."""

import math
import os
import time
from dataclasses import dataclass

import torch

from univigu import Config

# dense bf16 FLOP/s, as their makers state them
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


def forward_flops(config, n_v, n_t):
    """FLOPs of one sample's forward pass, 2 per multiply-add. A training step takes 3 of them.

    n_v, n_t: tokens of the video and of the text. Counts linears, self- and cross-attention.
    """
    n, d = n_v + n_t, config.dim
    projections = 8 * d * d * n  # q k v o
    experts = 4 * d * (config.ffn_dim * n_v + config.text_ffn_dim * n_t)
    attention = 4 * n * n * d
    cross = 4 * d * d * (n + config.prompt_len) + 4 * n * config.prompt_len * d
    return config.num_layers * (projections + experts + attention + cross)


def video_tokens(config, shape):
    """Tokens of a video latent of `shape` (C, F, H, W)."""
    return math.prod(shape[1:]) // math.prod(config.patch_size)


def peak_flops(device):
    """Dense bf16 FLOP/s of a GPU; None for one that PEAK does not have."""
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK.items() if known in name), None)


def parameters(make_model, config):
    """How many parameters the model of a config has, and how many of them Wan has; allocates none
    of them."""
    with torch.device("meta"):
        model = make_model(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    video = sum(size for name, size in sizes.items() if not model.is_text(name))
    return sum(sizes.values()), video


def chosen_parallel(count, run):
    """'ddp' or 'fsdp', for a model of `count` parameters.

    Adam in fp32 takes 16 bytes a parameter: beyond two billion, a GPU is better used for
    activations.
    """
    if run.parallel != "auto":
        return run.parallel
    return "fsdp" if count > 2e9 else "ddp"


def processes():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def sharing(count, run):
    """Over how many processes a copy of a model of `count` parameters is cut."""
    if chosen_parallel(count, run) == "ddp":
        return 1
    return run.shard_within or processes()


def memory(device):
    """Bytes that one process has for itself on its device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


RECOMPUTE = "none", "keep-attention", "full"  # the more is recomputed, the less is kept


def block_bytes(config, n_v, n_t, recompute, bf16, frozen=False):
    """What a block keeps of a clip for the backward pass; the factors are counted, see the tests.

    n_v, n_t: tokens of the video and of the text. frozen: of what is Wan's only the gradients of
    inputs are wanted.
    """
    n, size = n_v + n_t, 2 if bf16 else 4
    if recompute == "full":
        return 4 * n * config.dim  # what comes in, in fp32
    if recompute == "keep-attention":
        return (4 + 2 * size) * n * config.dim  # and what both attentions give
    experts = size * (config.ffn_dim * n_v + config.text_ffn_dim * n_t)
    if frozen:
        return (38 if bf16 else 51) * n * config.dim + experts
    return (67 if bf16 else 87) * n * config.dim + 2 * experts


@dataclass
class Job:
    """What is trained, in sizes alone."""

    config: Config
    count: int  # parameters
    frozen: int  # of them, without gradient
    n_v: int  # tokens of the video
    n_t: int  # and of the text
    batch: int  # clips a step
    average: bool = False  # whether there is a moving average of the weights

    def flops(self):
        """FLOPs of a clip's forward pass."""
        return forward_flops(self.config, self.n_v, self.n_t)


def training_memory(job, run, recompute, bf16):
    """Bytes of a training step in each process: name of a part -> bytes."""
    share, clips = sharing(job.count, run), run.micro_batch
    frozen, width = job.frozen > 0, clips * (job.n_v + job.n_t) * job.config.dim
    block, whole = (
        clips * block_bytes(job.config, job.n_v, job.n_t, mode, bf16, frozen)
        for mode in (recompute, "none")
    )
    kept = job.config.num_layers * block + (6 if frozen else 15) * width
    at_work = (0.1 if recompute == "none" else 1.1) * whole
    if frozen:
        expert = clips * job.n_v * job.config.ffn_dim * (2 if bf16 else 4)
        at_work = 1.8 * expert if recompute == "none" else whole + 1.3 * expert
    trained = job.count - job.frozen
    gradients = 4 * trained / share
    if job.batch == clips:  # one process, and one backward pass, in which they come as those go
        gradients = max(0, gradients - kept)
    parts = {
        "weights and Adam's moments": (16 if job.average else 12) * trained / share,
        "frozen weights": (2 if bf16 else 4) * job.frozen / share,
        "gradients": gradients,
        "kept for the backward pass": kept,
        "a block at work": at_work,
    }
    if share > 1:  # one at work, one that comes, and a gradient that goes
        parts["whole blocks"] = 12 * job.count / job.config.num_layers
    return {name: size for name, size in parts.items() if size}


def choose_recompute(job, run, machine):
    """run.recompute, or, where that is "auto", the least that fits this process's device and leaves
    a tenth of it to what is not counted.

    Raises ValueError, with the parts, where that does not fit.
    """
    there, modes = memory(machine.device), RECOMPUTE
    if run.recompute != "auto":
        modes = (run.recompute,)
    for recompute in modes:
        parts = training_memory(job, run, recompute, machine.bf16)
        if sum(parts.values()) < (1.0 if recompute == modes[-1] else 0.9) * there:
            return recompute
    told = ", ".join(f"{size / 1e9:.1f} GB {name}" for name, size in parts.items())
    raise ValueError(
        f"{job.count:,} parameters and {run.micro_batch} clips at once take "
        f"{sum(parts.values()) / 1e9:.1f} GB in each of {machine.ranks} processes with recompute "
        f"{recompute} ({told}), but {machine.device} has {there / 1e9:.1f} GB: wanted more "
        "processes with --parallel fsdp, a smaller --micro-batch, --train text, or a smaller model"
    )


def print_training(job, run, steps):
    """Prints what a run of so many steps takes, from sizes alone."""
    if int(os.environ.get("RANK", 0)):
        return  # one process speaks
    ranks = processes()
    passes = 4 if run.recompute == "full" else 3
    step = job.batch * passes * job.flops()
    days = step * steps / (0.4 * PEAK["H100"]) / ranks / 86400
    trained = f", {job.count - job.frozen:,} of them trained" if job.frozen else ""
    print(
        f"{job.count:,} parameters{trained}; {job.n_v:,} video and {job.n_t} text tokens a clip, "
        f"{job.batch} clips a step, {steps:,} steps"
    )
    print(f"memory of each of {ranks} processes ({chosen_parallel(job.count, run)}), in bf16:")
    for recompute in RECOMPUTE if run.recompute == "auto" else (run.recompute,):
        parts = training_memory(job, run, recompute, bf16=True)
        told = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in parts.items())
        print(f"  recompute {recompute}: {sum(parts.values()) / 1e9:.1f} GB ({told})")
    print(
        f"{step / 1e12:,.1f} TFLOP a step: {days:,.1f} days on {ranks} H100 "
        f"at 40% of {PEAK['H100'] / 1e12:.0f} TFLOP/s"
    )


# ---------------------------------------------------------------- sampling


def sampling_memory(config, n_v, n_t, passes, reused, bf16):
    """Bytes beside the weights in a step of so many passes; the factors are counted, see the tests.

    reused: whether the video's keys and values are kept.
    """
    n, d, size = n_v + n_t, config.dim, 2 if bf16 else 4
    in_ffn = (24 if bf16 else 28) * d + 2 * size * config.ffn_dim
    in_attention = (41 if bf16 else 50) * d
    cache = 2 * size * config.num_layers * (n_v + config.prompt_len) * d if reused else 0
    return passes * (n * max(in_ffn, in_attention) + cache)


@dataclass
class Sampling:
    """What is sampled, in sizes alone."""

    config: Config
    count: int  # parameters
    shape: tuple  # (C, F, H, W) of a latent
    mode: str
    options: dict  # the sampler's arguments
    has_text: bool  # whether there is a text stream

    @property
    def tokens(self):
        """Those of the video and of the text."""
        return video_tokens(self.config, self.shape), self.config.text_len if self.has_text else 0

    @property
    def passes(self):
        """Of a step."""
        return 1 if self.options["guidance"] == 1 else 3 if self.mode == "joint" else 2

    def memory(self, device):
        """Bytes of a sample beside the weights."""
        reused, bf16 = bool(self.options.get("reuse_video")), device.type == "cuda"
        return sampling_memory(self.config, *self.tokens, self.passes, reused, bf16)


MOST_AT_ONCE = 16


def samples_at_once(job, device):
    """How many samples of a Sampling fit a GPU beside the weights, which are not there yet, at
    least 1; a fifth is left to what is not counted. 1 on a CPU."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    fit = int(0.8 * (free - 2 * job.count) / job.memory(device))
    return max(1, min(fit, MOST_AT_ONCE))


def print_sampling(job, device, samples, batch):
    """Prints what so many samples of a Sampling take, `batch` of them at once."""
    config, shape, mode, options = job.config, job.shape, job.mode, job.options
    (n_v, n_t), passes = job.tokens, job.passes
    n, d = n_v + n_t, config.dim

    def pass_flops(tokens, ffn_dim):  # 2 per multiply-add; the prompt's keys and values left out
        attention = 4 * n * d + 4 * config.prompt_len * d
        return config.num_layers * (12 * d * d + 4 * d * ffn_dim + attention) * tokens

    video, text = pass_flops(n_v, config.ffn_dim), pass_flops(n_t, config.text_ffn_dim)
    steps, guidance = options["steps"], options["guidance"]
    shift = options.get("shift", config.text_shift if mode == "understand" else 1)
    video_steps = 1 if options.get("reuse_video") else steps
    flops = passes * (video_steps * video + steps * text)
    each = 2 if device.type == "cuda" else 4  # bytes of a number
    activations = batch * job.memory(device)
    at_once = f" for {batch} at once" if batch > 1 else ""
    rate = measured_flops(device)
    print(f"video latent {' x '.join(map(str, shape))}: {n_v:,} video tokens and {n_t} text tokens")
    print(
        f"{job.count:,} parameters, {job.count * each / 1e9:.1f} GB of weights, "
        f"about {activations / 1e9:.1f} GB of activations{at_once}"
    )
    print(
        f"{steps} steps, guidance {guidance:g}, shift {shift:g}: "
        f"{passes * steps} passes of {text / 1e12:.2f} TFLOP for the text, "
        f"{passes * video_steps} of {video / 1e12:.2f} for the video"
    )
    print(
        f"{samples} to do: about {samples * flops / rate * 2 / 60:.1f} minutes "
        f"at half of the {rate / 1e12:.1f} TFLOP/s measured on {device}"
    )


VAE_GB = 9.9  # measured, of a decode of 81 frames of 480x832 in fp32, weights included


def measured_flops(device):
    """FLOP/s of a matrix product on a device, in bf16 on a GPU and fp32 on a CPU."""
    side, dtype = (2048, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    x = torch.randn(side, side, device=device, dtype=dtype)
    for repeats in (2, 20):  # the first round warms up
        begin = time.time()
        for _ in range(repeats):
            y = x @ x
        y.sum().item()
    return 20 * 2 * side**3 / (time.time() - begin)
