"""How fast a training step and a denoising step are, against diffusers' WanTransformer3DModel: same shape, same dtype, same machine, runs in turn.

    python bench.py --dim 512 --num-layers 8 --num-heads 8 --ffn-dim 2048 --latent 16,8,32,32 --text-len 256      2,048 video tokens, on a CPU
    python bench.py --preset wan-1.3b --latent 16,21,60,104 --recompute keep-attention                             480 x 832, 81 frames, on a GPU
    python bench.py --dim 512 ... --understand 50                                                                  a caption instead, its video computed once or in every step
    python bench.py --toy                                                                                          what makes the toy fast

Times are medians of interleaved runs. A training step is forward, backward and Adam; MFU counts 3 forward passes (see train.forward_flops)
against the GPU's dense bf16 peak. The weights are random: only the speed is asked for.
"""

import sys

sys.excepthook = lambda kind, *error: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *error)  # Ctrl-C ends quietly, also in the imports

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from univigu import PRESETS, UniViGU, understand


def diffusers_model(config, device):
    """diffusers' transformer of the same sizes, or None where it is not installed."""
    try:
        from diffusers import WanTransformer3DModel
    except ModuleNotFoundError:
        return None
    return WanTransformer3DModel(num_attention_heads=config.num_heads, attention_head_dim=config.dim // config.num_heads, in_channels=config.in_dim,
                                 out_channels=config.out_dim, text_dim=config.prompt_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim,
                                 num_layers=config.num_layers, patch_size=config.patch_size, rope_max_seq_len=1024).to(device)


def contestants(config, flags, device):
    """name -> (forward function, parameters, text tokens): ours for video alone, ours with text, diffusers' for video alone."""
    z_v, c = torch.randn(flags.batch, *flags.latent, device=device), torch.randn(flags.batch, config.prompt_len, config.prompt_dim, device=device)
    tau, y = torch.full((flags.batch,), 0.5, device=device), torch.zeros(flags.batch, config.text_len, dtype=torch.int64, device=device)
    ours, theirs = UniViGU(config), diffusers_model(config, device)
    options = SimpleNamespace(recompute=flags.recompute, parallel="ddp")
    train.parallelise(ours, options, train.Machine(device, flags.bf16, flags.compile, 0, 1))
    found = {"video": (lambda: ours(z_v, None, tau, None, c)[0].square().mean(), [p for n, p in ours.named_parameters() if not ours.is_text(n)], 0)}

    def both():
        v_v, v_t = ours(z_v, ours.embed(y), tau, tau, c)
        return v_v.square().mean() + v_t.square().mean()

    found["video + text"] = (both, list(ours.parameters()), config.text_len)
    if theirs:
        if flags.recompute != "none":                               # it has no choice of what is kept
            theirs.enable_gradient_checkpointing()
        if flags.compile:
            for block in theirs.blocks:
                block.compile()
        found["diffusers, video"] = (lambda: theirs(z_v, 1000 * (1 - tau), c, return_dict=False)[0].square().mean(), list(theirs.parameters()), 0)
    return found


def measure(step, device):
    """Seconds of one call, and the most GB of GPU memory that it took beyond what lay there before, weights and Adam's moments of all contestants; 0 on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        there = torch.cuda.memory_allocated()
    begin = time.time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.time() - begin, (torch.cuda.max_memory_allocated() - there) / 1e9 if device.type == "cuda" else 0.0


def understanding(config, flags, device):
    """Seconds of a caption in flags.understand steps: the video's tokens run in "every" step, or in the "first" alone."""
    model, z_v = UniViGU(config).to(device).eval(), torch.randn(flags.batch, *flags.latent, device=device)
    found = {"every": [], "first": []}
    for repeat in range(flags.repeats + 1):                         # the first round warms up
        for name, runs in found.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=flags.bf16):
                runs.append(measure(partial(understand, model, z_v, steps=flags.understand if repeat else 2, reuse_video=name == "first"), device)[0])
    return {name: statistics.median(runs[1:]) for name, runs in found.items()}


def steps(config, flags, device):
    """"name, kind" -> seconds, FLOPs and GB of a training and a denoising step of each contestant."""
    tried, n_v = {}, video_tokens(config, flags)
    for name, (forward, parameters, n_t) in contestants(config, flags, device).items():
        optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=True)

        def training(forward=forward, optimizer=optimizer):
            with torch.autocast(device.type, torch.bfloat16, enabled=flags.bf16):
                loss = forward()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def denoising(forward=forward):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=flags.bf16):
                forward()

        flops = flags.batch * train.forward_flops(config, n_v, n_t)
        tried |= {f"{name}, training step": (training, 3 * flops), f"{name}, denoising step": (denoising, flops)}
    found = {name: [] for name in tried}
    with train.preferred_attention(train.Machine(device, flags.bf16, flags.compile, 0, 1)):
        for _ in range(flags.repeats + 1):                          # the first round warms up
            for name, (step, _) in tried.items():
                found[name].append(measure(step, device))
    return {name: dict(seconds=statistics.median(s for s, _ in runs[1:]), flops=tried[name][1], gb=max(m for _, m in runs[1:])) for name, runs in found.items()}


def video_tokens(config, flags):
    return math.prod(flags.latent[1:]) // math.prod(config.patch_size)


TOY = ("", "--compile no", "--precision bf16", "--num-heads 2", "--dim 128 --ffn-dim 512", "--generator-optimizer adam --generator-lr 0.003")


def toy():
    """What makes the toy fast: its generator trained for 120 steps, and one choice changed at a time. Flags -> clips/s of the last 20 steps, loss."""
    found = {}
    for flags in TOY:
        with tempfile.TemporaryDirectory() as out:
            torch.compiler.reset()
            train.main(f"--stages generator --generator-steps 120 --eval-clips 0 --compile yes --out {out} {flags}".split())
            last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
            found[flags] = dict(clips_per_s=last["samples_per_s"], loss=last["loss"])
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--toy", action="store_true", help="instead: how fast the toy trains, with one choice changed at a time")
    parser.add_argument("--preset", default="wan-1.3b", choices=list(PRESETS), help="sizes to start from (default: %(default)s)")
    for name in ("dim", "ffn_dim", "text_ffn_dim", "num_heads", "num_layers", "text_len", "prompt_len", "prompt_dim", "vocab_size"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="as in train.py")
    parser.add_argument("--latent", type=train.integers, default=(16, 21, 60, 104), help="channels, frames, rows, columns of the latent (default: 16,21,60,104)")
    parser.add_argument("--batch", type=int, default=1, help="clips (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--recompute", default="none", choices=("none", "keep-attention", "full"), help="as in train.py")
    parser.add_argument("--understand", type=int, default=0, metavar="STEPS", help="instead: a caption in so many steps, the video's tokens run in each, or in the first alone")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, ours and diffusers'")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="as in train.py")
    parser.add_argument("--out", help="file.json that gets the figures, too")
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    if flags.understand and (flags.compile or flags.recompute != "none"):
        parser.error("--understand times the model as it samples, found --compile or --recompute: leave them out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags.bf16 = flags.precision == "bf16" or flags.precision == "auto" and device.type == "cuda"
    given = {name: value for name, value in vars(flags).items() if value is not None and name in {f.name for f in dataclasses.fields(PRESETS["toy"])}}
    config = dataclasses.replace(PRESETS[flags.preset], **given)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"
    kinds = [name, "bf16 autocast" if flags.bf16 else "fp32", "compiled" if flags.compile else "eager", f"recompute {flags.recompute}"]
    found = {"command": " ".join(["bench.py", *(word for word in argv if word not in ("--out", flags.out))]), "device": name, "torch": torch.__version__}
    if flags.toy:
        found["toy"] = toy()
        for changed, of in found["toy"].items():
            print(f"{changed or 'the default':52}{of['clips_per_s']:8.0f} clips/s, loss {of['loss']:.3f}")
    else:
        found |= {"kind": ", ".join(kinds[1:]), "video tokens": video_tokens(config, flags), "text tokens": config.text_len}
        print(f"{', '.join(kinds)}: {found['video tokens']:,} video and {config.text_len} text tokens, batch {flags.batch}")
        if flags.understand:
            found["understand"] = understanding(config, flags, device)
            every, first = found["understand"].values()
            print(f"a caption in {flags.understand} steps: {every:.2f} s with the video's tokens in each, {first:.2f} s with them in the first alone: {every / first:.1f} times faster")
        else:
            found["steps"] = steps(config, flags, device)
            peak = next((value for known, value in train.PEAK.items() if device.type == "cuda" and known in name), float("nan"))
            print(f"{'':34}{'seconds':>9}{'TFLOP/s':>9}{'MFU':>7}{'GB':>7}   (MFU and GB: of a GPU alone)")
            for step, of in found["steps"].items():
                rate = of["flops"] / of["seconds"]
                print(f"{step:34}{of['seconds']:9.3f}{rate / 1e12:9.2f}{rate / peak:7.1%}{of['gb']:7.1f}")
    if flags.out:
        Path(flags.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
