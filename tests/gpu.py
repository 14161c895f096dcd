"""The parts of tests/gpu.sh; each runs in a process of its own, so that none ends another."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import train
from engine import cost, distributed
from engine.distributed import Machine, attention_kernel, preferred_attention
from engine.files import append_line
from engine.graphs import captured_text_steps
from engine.options import Run
from univigu import PRESETS, Config, UniViGU, generate, joint, understand, uni_flow_loss
from wan.bench import Contestant, step_functions
from wan.weights import FP32

TINY = replace(
    PRESETS["wan-1.3b"],
    **dict(dim=96, ffn_dim=560, text_ffn_dim=96, num_heads=6, num_layers=3, freq_dim=16),
    **dict(prompt_dim=64, prompt_len=16, vocab_size=100, text_len=16, text_dim=16),
)


@dataclass
class Place:
    """What is measured, and where. tiny: everything small, on a CPU."""

    tiny: bool

    @property
    def device(self):
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def config(self) -> Config:
        return TINY if self.tiny else PRESETS["wan-1.3b"]

    @property
    def shape(self):
        """Of a latent: 81 frames of 480x832."""
        return (16, 1, 24, 24) if self.tiny else (16, 21, 60, 104)

    @property
    def tokens(self):
        """Of the video, and of the text."""
        return cost.video_tokens(self.config, self.shape), self.config.text_len

    @property
    def name(self):
        """The hardware's."""
        return f"{torch.get_num_threads()} CPU cores" if self.tiny else torch.cuda.get_device_name()

    def machine(self, compile=False, recompute="none"):
        return Machine(self.device, True, compile, 0, 1, recompute)

    def clock(self, step, repeats=3):
        """Median seconds of a call, after one that warms up, and GB of memory at the peak."""
        seconds, gb = [], 0.0
        if not self.tiny:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            step()
            if not self.tiny:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        if not self.tiny:
            gb = torch.cuda.max_memory_allocated() / 1e9
        return statistics.median(seconds[1:]), gb


def apart(found, wanted):
    """||found - wanted|| / ||wanted||."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


# ---------------------------------------------------------------- the parts


def attention(place):
    """cuDNN's against flash's: how far apart, and seconds, at the length of a whole video."""
    shape = (1, 2, 72, 16) if place.tiny else (1, 12, sum(place.tokens), 128)
    first = SDPBackend.MATH if place.tiny else SDPBackend.CUDNN_ATTENTION
    torch.manual_seed(0)
    dtype = torch.bfloat16
    q, k, v, up = (torch.randn(shape, device=place.device, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    figures, results = {"tokens": shape[2]}, []
    for kernel in (first, SDPBackend.FLASH_ATTENTION):
        name = kernel.name.split("_")[0].lower()
        with sdpa_kernel(kernel):

            def both():
                return torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, up)

            results.append([scaled_dot_product_attention(*inputs), *both()])
            with torch.no_grad():
                forward, _ = place.clock(partial(scaled_dot_product_attention, *inputs))
            figures |= {f"{name}_forward_s": forward, f"{name}_both_s": place.clock(both)[0]}
    names = "output", "q_gradient", "k_gradient", "v_gradient"
    for name, found, wanted in zip(names, *results):
        figures[f"{name}_apart"] = apart(found, wanted)
    figures["chosen"] = attention_kernel(place.config, place.machine())
    if not place.tiny:
        figures["cudnn"] = torch.backends.cudnn.version()
    return figures


def tests(place):
    """The tests marked `cuda`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py"]
    ended = subprocess.run(command, capture_output=True, text=True)
    print(ended.stdout[-6000:], file=sys.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", ended.stdout.splitlines()[-1])
    return {what: int(count) for count, what in counts}


def training(place, compile, recompute, what="all"):
    """A training step, as train.py takes it, of the 1.3B model: batch 1, bf16, Adam."""
    machine, config = place.machine(compile, recompute), place.config
    with place.device:
        model = UniViGU(config)
        z_v, y = (
            torch.randn(1, *place.shape),
            torch.randint(config.vocab_size, (1, place.tokens[1])),
        )
        c = torch.randn(1, config.prompt_len, config.prompt_dim)
    run = Run(micro_batch=1)
    if what == "text":
        train.freeze(model, bf16=True)
    objective = distributed.parallelise(model, uni_flow_loss, run, machine)
    options = {"generator": torch.Generator().manual_seed(0), "anchor": train.REAL["anchor"]}

    def loss():
        return objective(z_v, y, c, options)[0]

    parameters = [p for p in model.parameters() if p.requires_grad]
    step, _ = step_functions(Contestant(loss, parameters, 0), machine)
    with distributed.settings(machine):
        first = time.perf_counter()
        step()
        first = time.perf_counter() - first
        seconds, gb = place.clock(step, 1 if place.tiny else 3)
    flops = 3 * cost.forward_flops(config, *place.tokens)
    count, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every)
        for every in (True, False)
    )
    parts = cost.training_memory(
        cost.Job(config, count, count - trained, *place.tokens, batch=1), run, recompute, True
    )
    figures = {"tokens": sum(place.tokens), "first_s": first, "seconds": seconds, "flops": flops}
    if not place.tiny:
        figures["mfu"] = flops / seconds / cost.peak_flops(place.device)
    return figures | {"gb": gb, "estimated_gb": sum(parts.values()) / 1e9}


def sampler(place):
    """The model as sample.py loads it, its latents, a prompt, and the estimate of a step's GB."""
    config = place.config
    with place.device:
        model = UniViGU(config).eval().requires_grad_(False)
        z_v, y = torch.randn(1, *place.shape), torch.zeros(1, place.tokens[1], dtype=torch.int64)
        c = torch.randn(1, config.prompt_len, config.prompt_dim)
    for name, p in model.named_parameters():
        p.data = p.data if FP32.search(name) else p.data.bfloat16()
    weights = sum(p.nbytes for p in model.parameters())

    def estimate(passes, reused):
        return (weights + cost.sampling_memory(config, *place.tokens, passes, reused, True)) / 1e9

    return model, z_v, y, c, estimate


def sampling(place):
    """Denoising steps, with and without guidance, as sample.py takes them."""
    model, _, y, c, estimate = sampler(place)
    figures = {}
    with preferred_attention(place.device):
        for name, guidance, passes in (("step", 1.0, 1), ("guided_step", 5.0, 2)):
            draw = partial(generate, model, y, c, place.shape, steps=1, guidance=guidance)
            seconds, gb = place.clock(draw, 2)
            figures |= {f"{name}_s": seconds, f"{name}_gb": gb}
            figures[f"{name}_estimated_gb"] = estimate(passes, False)
        draw = partial(joint, model, c, place.shape, steps=1, guidance=5.0)
        seconds, gb = place.clock(draw, 1)
    figures |= {"guided_joint_step_s": seconds, "guided_joint_step_gb": gb}
    return figures | {"guided_joint_step_estimated_gb": estimate(3, False)}


def understanding(place):
    """Seconds of a text step: with the video's tokens, with their KV cache, and with that and a
    CUDA graph."""
    model, z_v, _, _, estimate = sampler(place)
    figures = {}
    with preferred_attention(place.device):
        for name, steps in (("every", (1, 3)), ("reused", (2, 22)), ("captured", (2, 42))):
            reuse, how = name != "every", captured_text_steps if name == "captured" else nullcontext

            def caption(steps, reuse=reuse, how=how):
                with how(model):
                    understand(model, z_v, steps=steps, reuse_video=reuse)

            (few, _), (many, gb) = (place.clock(partial(caption, k), 1) for k in steps)
            figures[f"{name}_s"] = (many - few) / (steps[1] - steps[0])
            figures |= {f"{name}_gb": gb, f"{name}_estimated_gb": estimate(1, reuse)}
    return figures


def vae(place):
    """Decoding 81 frames of 480x832 in fp32, as sample.py does; random weights."""
    try:
        from diffusers import AutoencoderKLWan
    except ModuleNotFoundError:
        return {"skipped": "diffusers is not installed"}
    small = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    with place.device:
        model = AutoencoderKLWan(**small if place.tiny else {}).eval().requires_grad_(False)
        z_v = torch.randn(1, 16, *((1, 4, 4) if place.tiny else place.shape[1:]))
    with torch.no_grad():
        seconds, gb = place.clock(lambda: model.decode(z_v).sample, 1)
    return {"seconds": seconds, "gb": gb, "estimated_gb": cost.VAE_GB}


def toy(place):
    """The toy, its refinement cut to 400 steps: seconds, and what it reads and draws."""
    flags = "--generator-steps 2 --recall-steps 2 --refine-steps 2 --batch 8 --eval-clips 8"
    if not place.tiny:
        flags = "--refine-steps 400 --eval-clips 256"
    with tempfile.TemporaryDirectory() as out:
        train.main([*flags.split(), "--device", place.device.type, "--compile", "no", "--out", out])
        found = json.loads(Path(out, "results.json").read_text())
        last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "flags": flags,
        "read": found["understanding"]["attribute_accuracy"],
        "drawn": found["generation"]["attribute_accuracy"],
        "train_s": found["train_s"],
        "clips_per_s": last["samples_per_s"],
    }


# name -> (its most seconds on an H100, what it does)
PARTS = {
    "attention": (40, attention),
    "tests": (150, tests),
    "eager-keep-attention": (60, partial(training, compile=False, recompute="keep-attention")),
    "compiled-keep-attention": (120, partial(training, compile=True, recompute="keep-attention")),
    "sampling": (50, sampling),
    "understanding": (50, understanding),
    "vae": (50, vae),
    "text-keep-attention": (
        60,
        partial(training, compile=False, recompute="keep-attention", what="text"),
    ),
    "text-full": (60, partial(training, compile=False, recompute="full", what="text")),
    "toy": (120, toy),
    "eager-full": (60, partial(training, compile=False, recompute="full")),
    "compiled-full": (120, partial(training, compile=True, recompute="full")),
}


def rounded(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def measure(name, place):
    """A part's line, as a dict."""
    begin = time.perf_counter()
    figures = PARTS[name][1](place)
    line = {"part": name, "device": place.name, "torch": torch.__version__}
    line |= {key: rounded(value) for key, value in figures.items()}
    return line | {"wall_s": rounded(time.perf_counter() - begin)}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--out", help="file that gets the lines, too")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if unknown := sorted(set(flags.parts) - set(PARTS)):
        parser.error(f"{', '.join(unknown)}: no part, wanted some of {', '.join(PARTS)}")
    if not flags.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU, wanted one, or --tiny")
    if flags.one:
        append_line(flags.out, measure(flags.one, Place(flags.tiny)))
        return 0
    if flags.out:
        Path(flags.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in flags.parts or PARTS:
        line = run_part(name, flags.tiny)
        failed += [name] if "failed" in line else []
        print(json.dumps(line), flush=True)
        if flags.out:
            append_line(flags.out, line)
    return f"failed: {', '.join(failed)}" if failed else 0


def run_part(name, tiny):
    """A part's line; with "failed" where it failed, or took too long."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "line.jsonl")
        command = [sys.executable, "-m", "tests.gpu", "--one", name, "--out", str(out)]
        try:
            ended = subprocess.run(
                [*command, *(["--tiny"] if tiny else [])],
                capture_output=True,
                text=True,
                timeout=PARTS[name][0],
            )
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")
            print(said[-3000:], file=sys.stderr)
            return {"part": name, "failed": f"took more than {PARTS[name][0]} s"}
        if name == "tests" or ended.returncode:
            print(ended.stderr[-6000:], file=sys.stderr)
        if ended.returncode:
            return {"part": name, "failed": ended.stderr.strip().splitlines()[-1][:300]}
        line = json.loads(out.read_text())
    if line.get("failed") or line.get("error"):
        line["failed"] = line.get("failed", 0) + line.get("error", 0)
    return line


if __name__ == "__main__":
    sys.exit(main())
