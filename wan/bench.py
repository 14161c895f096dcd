"""How fast training and denoising steps are, beside diffusers' WanTransformer3DModel.

    python -m wan.bench --dim 512 --num-layers 8 --num-heads 8 --ffn-dim 2048 \\
        --latent 16,8,32,32 --text-len 256             2,048 video tokens, on a CPU
    python -m wan.bench --preset wan-1.3b --latent 16,21,60,104 --recompute keep-attention
                                                       480 x 832, 81 frames, on a GPU
    python -m wan.bench --dim 512 ... --understand 50  a caption instead, its video computed once
                                                       or in every step
    python -m wan.bench --toy                          what makes the toy fast
    python -m wan.bench --neighbour                    what another busy process costs it

Both have the same shape, dtype and machine, and run in turn. Times are medians. A training step is
forward, backward and Adam; MFU counts 3 forward passes (see engine.cost.forward_flops) against the
GPU's dense bf16 peak. The weights are random: only the speed is asked for.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

import train
from engine.cost import PEAK, forward_flops, video_tokens
from engine.distributed import Machine, autocast, parallelise, preferred_attention
from engine.files import check_writable, read_lines, write_json
from engine.optim import Guard
from engine.options import Parser, Run, fail, integers, number, run_command
from univigu import PRESETS, UniViGU, understand, uni_flow_loss

STEPS = "--generator-steps 120 --log-every 10"
ROOT, LOG = Path(__file__).parent.parent, "metrics.jsonl"
TOY = (
    "",
    "--compile no",
    "--precision bf16",
    "--num-heads 2",
    "--dim 128 --ffn-dim 512",
    "--generator-optimizer adam --generator-lr 0.003",
)
SIZES = (
    "dim",
    "ffn_dim",
    "text_ffn_dim",
    "num_heads",
    "num_layers",
    "text_len",
    "prompt_len",
    "prompt_dim",
    "vocab_size",
)


@dataclass
class Contestant:
    """A model to time: its loss, and what that needs."""

    forward: Callable[[], torch.Tensor]
    parameters: list[Any]
    text_tokens: int


def diffusers_model(config, device):
    """diffusers' transformer of the same sizes, or None where it is not installed."""
    try:
        from diffusers import WanTransformer3DModel
    except ModuleNotFoundError:
        return None
    model = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.prompt_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        patch_size=config.patch_size,
        rope_max_seq_len=1024,
    )
    return model.to(device)


def contestants(config, flags, machine):
    """Name -> Contestant: ours for video alone, ours with text, diffusers' for video alone."""
    b, device = flags.batch, machine.device
    z_v = torch.randn(b, *flags.latent, device=device)
    c = torch.randn(b, config.prompt_len, config.prompt_dim, device=device)
    tau = torch.full((b,), 0.5, device=device)
    y = torch.zeros(b, config.text_len, dtype=torch.int64, device=device)
    ours, theirs = UniViGU(config), diffusers_model(config, device)
    parallelise(ours, uni_flow_loss, Run(parallel="ddp"), machine)

    def video():
        return ours(z_v, None, tau, None, c)[0].square().mean()

    def both():
        v_v, v_t = ours(z_v, ours.embed(y), tau, tau, c)
        return v_v.square().mean() + v_t.square().mean()

    def their_video():
        return theirs(z_v, 1000 * (1 - tau), c, return_dict=False)[0].square().mean()

    video_parameters = [p for name, p in ours.named_parameters() if not ours.is_text(name)]
    found = {
        "video": Contestant(video, video_parameters, 0),
        "video + text": Contestant(both, list(ours.parameters()), config.text_len),
    }
    if theirs:
        if flags.recompute != "none":  # it has no choice of what is kept
            theirs.enable_gradient_checkpointing()
        if flags.compile:
            for block in theirs.blocks:
                block.compile()
        found["diffusers, video"] = Contestant(their_video, list(theirs.parameters()), 0)
    return found


def measure(step, device):
    """Seconds of one call, and the most GB of GPU memory that it took; 0 on a CPU.

    What lay there before, weights and Adam's moments of all contestants, does not count.
    """
    if device.type != "cuda":
        begin = time.time()
        step()
        return time.time() - begin, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.time()
    step()
    torch.cuda.synchronize()
    return time.time() - begin, (torch.cuda.max_memory_allocated() - before) / 1e9


def understanding(config, flags, machine):
    """Seconds of a caption: the video's tokens run in "every" step, or in the "first" alone."""
    device = machine.device
    model = UniViGU(config).to(device).eval()
    z_v = torch.randn(flags.batch, *flags.latent, device=device)
    found = {"every": [], "first": []}
    for repeat in range(flags.repeats + 1):  # the first round warms up
        for name, runs in found.items():
            steps = flags.understand if repeat else 2
            step = partial(understand, model, z_v, steps=steps, reuse_video=name == "first")
            with autocast(machine), preferred_attention(device):
                runs.append(measure(step, device)[0])
    return {name: statistics.median(runs[1:]) for name, runs in found.items()}


def step_functions(contestant, machine):
    """A training step, as train.py takes it, and a denoising step of a contestant, as functions."""
    optimizers = [torch.optim.Adam(contestant.parameters, lr=1e-5, fused=True)]
    guard = Guard(None, 0, [])

    def training():
        with autocast(machine):
            loss = contestant.forward()
        loss.backward()
        guard.step(clip_grad_norm_(contestant.parameters, 1.0), 0, optimizers)

    def denoising():
        with torch.no_grad(), autocast(machine):
            contestant.forward()

    return training, denoising


def time_steps(config, flags, machine):
    """ "name, kind" -> seconds, FLOPs and GB of training and denoising steps."""
    n_v, steps = video_tokens(config, flags.latent), {}
    for name, contestant in contestants(config, flags, machine).items():
        training, denoising = step_functions(contestant, machine)
        flops = flags.batch * forward_flops(config, n_v, contestant.text_tokens)
        steps[f"{name}, training step"] = training, 3 * flops
        steps[f"{name}, denoising step"] = denoising, flops
    found = {name: [] for name in steps}
    with preferred_attention(machine.device):
        for _ in range(flags.repeats + 1):  # the first round warms up
            for name, (step, _) in steps.items():
                found[name].append(measure(step, machine.device))
    figures = {}
    for name, (_, *runs) in found.items():
        seconds, gb = zip(*runs)
        flops = steps[name][1]
        figures[name] = {"seconds": statistics.median(seconds), "flops": flops, "gb": max(gb)}
    return figures


def toy():
    """What makes the toy fast: its generator trained for 120 steps, one choice changed at a time.

    Returns flags -> clips/s of the last 20 steps, and loss.
    """
    found = {}
    for flags in TOY:
        with tempfile.TemporaryDirectory() as out:
            torch.compiler.reset()
            command = "--stages generator --generator-steps 120 --eval-clips 0 --compile yes"
            train.main([*command.split(), "--out", out, *flags.split()])
            last = read_lines(Path(out, "metrics.jsonl"))[-1]
            found[flags] = {"clips_per_s": last["samples_per_s"], "loss": last["loss"]}
    return found


def neighbour():
    """Clips/s of trainings of the toy: alone, beside a process that never waits, two at once."""
    return {
        "alone": rates(),
        "beside a busy process": rates(busy=1),
        "two trainings at once": rates(trainings=2),
    }


def rates(trainings=1, busy=0):
    """Clips/s of so many trainings that run at once, beside so many processes that never wait."""
    flags = f"--stages generator --eval-clips 0 --compile yes {STEPS}"
    command = [sys.executable, "train.py", *flags.split()]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, str(i)) for i in range(trainings)]
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            running = [
                subprocess.Popen([*command, "--out", out], cwd=ROOT, stdout=subprocess.DEVNULL)
                for out in outs
            ]
            if any(process.wait() for process in running):
                raise OSError("a training failed, see above")
        finally:
            for process in others:
                process.kill()
        logs = [read_lines(out / LOG) for out in outs]
    return [statistics.median(line["samples_per_s"] for line in log[2:]) for log in logs]


def print_neighbour(found):
    (alone,) = found["alone"]
    for name, of_each in found.items():
        told = " + ".join(f"{rate:.0f}" for rate in of_each)
        print(f"{name:24}{told:>10} clips/s, {sum(of_each) / alone:.0%} of alone")


def print_toy(found):
    for changed, figures in found.items():
        rate, loss = figures["clips_per_s"], figures["loss"]
        print(f"{changed or 'the default':52}{rate:8.0f} clips/s, loss {loss:.3f}")


def print_understanding(found, steps):
    every, first = found["every"], found["first"]
    print(
        f"a caption in {steps} steps: {every:.2f} s with the video's tokens in each, "
        f"{first:.2f} s with them in the first alone: {every / first:.1f} times faster"
    )


def print_steps(found, peak):
    columns = f"{'seconds':>9}{'TFLOP/s':>9}{'MFU':>7}{'GB':>7}"
    print(f"{'':34}{columns}   (MFU and GB: of a GPU alone)")
    for name, figures in found.items():
        seconds, rate = figures["seconds"], figures["flops"] / figures["seconds"]
        mfu = f"{rate / peak:7.1%}"
        print(f"{name:34}{seconds:9.3f}{rate / 1e12:9.2f}{mfu}{figures['gb']:7.1f}")


def make_parser():
    usage = "python -m %(prog)s [--flag value ...]      --help lists the flags"
    parser = Parser(prog="wan.bench", usage=usage, description=__doc__)
    add = parser.add_argument
    toy_help = "instead: how fast the toy trains, with one choice changed at a time"
    add("--toy", action="store_true", help=toy_help)
    preset = "sizes to start from (default: %(default)s)"
    add(
        "--neighbour",
        action="store_true",
        help="instead: how fast the toy trains alone, beside a busy process, and two at once",
    )
    add("--preset", default="wan-1.3b", choices=list(PRESETS), help=preset)
    for name in SIZES:
        add("--" + name.replace("_", "-"), type=number(int, 1, 10**6), help="as in train.py")
    latent = "channels, frames, rows, columns of the latent (default: 16,21,60,104)"
    add("--latent", type=integers, default=(16, 21, 60, 104), help=latent)
    add("--batch", type=number(int, 1, 10**6), default=1, help="clips (default: 1)")
    add("--repeats", type=number(int, 1, 10**6), default=5, help="timed runs of each (default: 5)")
    recompute = ("none", "keep-attention", "full")
    add("--recompute", default="none", choices=recompute, help="as in train.py")
    caption = "instead: a caption in so many steps, the video's tokens run in each, or in the "
    caption += "first alone"
    add("--understand", type=number(int, 0, 10**4), default=0, metavar="STEPS", help=caption)
    add("--compile", action="store_true", help="compile the blocks, ours and diffusers'")
    precision = ("auto", "fp32", "bf16")
    add("--precision", default="auto", choices=precision, help="as in train.py")
    add("--out", help="file.json that gets the figures, too")
    return parser


def check_latent(latent, config):
    """Raises ValueError for a latent that the model cannot take."""
    sizes = latent[1:]
    whole = len(sizes) == 3 and all(s > 0 and s % p == 0 for s, p in zip(sizes, config.patch_size))
    if not whole or latent[0] != config.in_dim:
        raise ValueError(
            f"--latent is {','.join(map(str, latent))}, wanted {config.in_dim} channels, and "
            f"frames, rows and columns that are multiples of {config.patch_size}"
        )


def main(argv=None):
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    if flags.understand and (flags.compile or flags.recompute != "none"):
        parser.error(
            "--understand times the model as it samples, found --compile or --recompute: "
            "leave them out"
        )
    try:
        if flags.out is not None:
            check_writable(flags.out)
        run_benchmark(flags, argv)
    except (ValueError, OSError) as error:
        fail("wan.bench", error)


def run_benchmark(flags, argv):
    """Times what the flags ask for, prints it and, with --out, stores it."""
    cuda = torch.cuda.is_available()
    bf16 = flags.precision == "bf16" or (flags.precision == "auto" and cuda)
    machine = Machine(
        torch.device("cuda" if cuda else "cpu"), bf16, flags.compile, 0, 1, flags.recompute
    )
    sizes = {name: getattr(flags, name) for name in SIZES if getattr(flags, name) is not None}
    config = dataclasses.replace(PRESETS[flags.preset], **sizes)
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU cores"
    words = [word for word in argv if word not in ("--out", flags.out)]
    found = {
        "command": " ".join(["python -m wan.bench", *words]),
        "device": device,
        "torch": torch.__version__,
    }
    if flags.neighbour:
        found["neighbour"] = neighbour()
        print_neighbour(found["neighbour"])
    elif flags.toy:
        found["toy"] = toy()
        print_toy(found["toy"])
    else:
        check_latent(flags.latent, config)
        n_v, n_t = video_tokens(config, flags.latent), config.text_len
        compiled = "compiled" if flags.compile else "eager"
        kind = f"{'bf16 autocast' if bf16 else 'fp32'}, {compiled}, recompute {flags.recompute}"
        found |= {"kind": kind, "video tokens": n_v, "text tokens": n_t}
        print(f"{device}, {kind}: {n_v:,} video and {n_t} text tokens, batch {flags.batch}")
        if flags.understand:
            found["understand"] = understanding(config, flags, machine)
            print_understanding(found["understand"], flags.understand)
        else:
            found["steps"] = time_steps(config, flags, machine)
            known = (flops for name, flops in PEAK.items() if cuda and name in device)
            print_steps(found["steps"], next(known, float("nan")))
    if flags.out:
        write_json(flags.out, found)


if __name__ == "__main__":
    run_command(main)
