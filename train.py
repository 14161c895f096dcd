"""Trains Uni-ViGU: stage generator (toy only: the stand-in for pretrained Wan), then recall, then refine, then evaluation.

    python train.py                                         the toy, all stages, minutes on a CPU
    python train.py --recipe paper --out runs/paper         the paper's clocks, outputs, loss and optimizer
    python train.py --resume                                go on where the last checkpoint stands
    python train.py --stages recall,refine --init runs/toy/generator --out runs/again

The stages are one loop with other values (see STAGES): what the text's target is, how many steps, which optimizer.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import wan
from univigu import PRESETS, Config, UniViGU, option, uni_flow_loss

STAGES = {"generator": None,      # eq. 2: the video alone
          "recall": "prompt",     # section 3.3, stage 1: the target text is the prompt itself
          "refine": "caption"}    # section 3.3, stage 2: the target text is the detailed caption

# What `--recipe paper` changes: independent uniform clocks, velocity output, eq. 11 and nothing else, Adam. The stand-in
# generator, the sizes and the number of steps stay the toy's, and E's rows stay unit, for else they collapse.
RECIPES = {"default": {}, "paper": dict(clocks="independent", text_shift=1.0, text_output="velocity", anchor=0.0,
                                        recall_optimizer="adam", refine_optimizer="adam", recall_lr=1e-3, refine_lr=1e-3)}

# What data other than the toy changes: a pretrained generator is there, and the paper's settings (section 3.3) are the defaults.
REAL = RECIPES["paper"] | dict(stages="recall,refine", batch=1, recall_steps=40_000, refine_steps=60_000, recall_lr=2e-4, refine_lr=5e-5, warmup=1000, decay=0.0,
                               save_every=1000, eval_clips=16)


@dataclass
class Train:
    """Everything a run needs beside the model's Config; one flag a field."""

    preset: str = option("toy", f"sizes of the model: {', '.join(PRESETS)}")
    recipe: str = option("default", "training choices of the text stages: 'default' (measured in the toy) or 'paper' (its clocks, output, loss and optimizer)")
    data: str = option("toy", "the world to learn: 'toy', moving shapes drawn on the fly, or a folder that `python -m wan.prepare` wrote")
    vocabulary: str = option("data", "of real data: the tokens that occur in the 'data', or 'full', all of umT5's, as the published weights need")
    out: str = option("runs/toy", "folder for checkpoints, metrics.jsonl, results.json and samples")
    stages: str = option("generator,recall,refine", "which stages to run, in this order")
    init: str = option("", "checkpoint whose weights the first stage starts from: a folder of train.py's, or Wan2.1 in any layout (path or hub id)")
    seed: int = option(0, "seed of the weights, the clips, the noise and the evaluation")
    batch: int = option(64, "clips per step")
    generator_steps: int = option(1600, "steps of stage generator")
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
    p_drop: float = option(0.7, "probability that a sample's prompt is dropped where text is learned")
    anchor: float = option(0.1, "weight of the cross-entropy that keeps text latents on the embedding's rows")
    discrete_loss: str = option("cross-entropy", "loss of the text with text_flow 'discrete': 'cross-entropy' or 'generalised-kl'")
    lambda_t: float = option(0.0, "weight of the text flow in eq. 11; 0 = |z_v| / |z_t|")
    device: str = option("auto", "'auto', 'cpu' or 'cuda'")
    precision: str = option("auto", "'fp32', 'bf16' autocast, or 'auto': bf16 on a GPU, fp32 on a CPU, where a small model's casts cost more than they save")
    compile: str = option("auto", "torch.compile of the blocks: 'yes', 'no', or 'auto': where a run is long enough to pay for it")
    log_every: int = option(20, "steps between lines of metrics.jsonl")
    save_every: int = option(250, "steps between checkpoints")
    keep: int = option(1, "checkpoints to keep beside those at the stages' ends")
    eval_clips: int = option(512, "clips per evaluation and split; 0 skips the evaluation")


# ---------------------------------------------------------------- optimizers

class Muon(torch.optim.Muon):
    """torch's Muon, in fp32 and with matrices of one shape orthogonalised together.

    torch 2.13 orthogonalises one matrix at a time and in bf16, which a CPU without bf16 units multiplies far slower than fp32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, group["momentum"])))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([u for _, u in pairs]), group["ns_coefficients"], group["ns_steps"])
                for (p, _), u in zip(pairs, updates):
                    p.add_(u, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(g, coefficients, steps):
    """Newton-Schulz: pushes the singular values of each matrix of g (m, rows, columns) towards 1."""
    a, b, c = coefficients
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


def make_optimizers(model, kind, lr, adam_lr):
    """Adam with the paper's betas; with kind "muon", the matrices of the blocks go to Muon and only the rest to Adam."""
    matrices = {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2} if kind == "muon" else set()
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers = [torch.optim.Adam(rest, lr=adam_lr if matrices else lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(Muon([p for name, p in model.named_parameters() if name in matrices], lr=lr, weight_decay=0.0))
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
        self.loss += torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
        for i, (name, m) in enumerate((("video", "v"), ("text", "t"))):
            if name in parts:
                decile = (parts[f"tau_{m}"] * 10).long().clamp(max=9)
                self.sums[i].index_add_(1, decile, torch.stack([parts[name] * parts[f"on_{m}"], parts[f"on_{m}"]]).double())

    def read(self):
        """The figures as a dict, and an empty meter again."""
        (loss, steps), sums = self.loss.tolist(), self.sums.cpu()
        ratio = lambda s, n: round(s / n, 6) if n else None
        line = {"loss": ratio(loss, steps)}
        for name, (s, n) in zip(("video", "text"), sums.tolist()):
            line |= {name: ratio(sum(s), sum(n)), f"{name}_by_tau": [ratio(*x) for x in zip(s, n)]}
        self.sums.zero_(), self.loss.zero_()
        return line


# ---------------------------------------------------------------- checkpoints

def save(folder, model, world, train, state, optimizers, meter):
    """Writes a checkpoint beside `folder`, then renames it: a folder with its final name is always complete."""
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)                                     # model.safetensors, config.json
    torch.save([o.state_dict() for o in optimizers] + [{"sums": meter.sums, "loss": meter.loss}], part / "training_state.pt")
    (part / "world.json").write_text(json.dumps(world.state, indent=1))  # what sample.py needs to know beside the model
    (part / "train.json").write_text(json.dumps({"train": dataclasses.asdict(train), **state}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load(folder, config):
    """A checkpoint folder -> its model and what train.json says, if it has one. Raises ValueError unless the model is config's."""
    if wan.is_wan(folder):
        return wan.load(folder, **dataclasses.asdict(config)), {"stage": "recall"}               # it starts a text stream that is new
    folder = Path(folder)
    for name in ("model.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"checkpoint {folder} has no {name}, wanted a folder that train.py wrote")
    try:
        model = UniViGU.from_pretrained(folder, strict=True)
        done = json.loads((folder / "train.json").read_text()) if (folder / "train.json").exists() else {}
    except Exception as error:  # truncated or foreign files fail in many ways
        raise ValueError(f"checkpoint {folder} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from None
    for f in dataclasses.fields(Config):
        found, wanted = getattr(model.config, f.name), getattr(config, f.name)
        if found != wanted:
            raise ValueError(f"checkpoint {folder} has {f.name} {found!r}, wanted {wanted!r}")
    return model, done


def checkpoints(out):
    """Complete checkpoints of a run, oldest first: list of (step, folder)."""
    found = [(json.loads((f / "train.json").read_text())["step"], f) for f in Path(out).glob("*/") if (f / "train.json").exists()
             and not f.name.startswith(".")]
    return sorted(found)


def start_anew(out, overwrite):
    """Makes `out`, and refuses to mix a new run with an old one."""
    if Path(out).exists() and not (Path(out).is_dir() and os.access(out, os.W_OK | os.X_OK)):
        raise ValueError(f"out is {out}, wanted a folder that can be written to")
    old = checkpoints(out)
    if old and not overwrite:
        raise ValueError(f"{out} holds a run at step {old[-1][0]}: add --resume to go on, --overwrite to start anew, or choose another --out")
    for _, folder in old:
        shutil.rmtree(folder)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "results.json"):
        (Path(out) / name).unlink(missing_ok=True)


def truncate_metrics(path, step):
    """Drops the lines that a killed run wrote after its last checkpoint, so that the resumed run writes them again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(lines))


# ---------------------------------------------------------------- the machine

def choose_device(train):
    """Device, whether to autocast to bf16, whether to compile."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if train.device == "auto" else train.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA GPU; wanted 'cpu' or 'auto'")
    bf16 = device.type == "cuda" if train.precision == "auto" else train.precision == "bf16"
    steps = sum(getattr(train, f"{stage}_steps") for stage in train.stages.split(","))
    compile = (steps >= 1000 and bool(shutil.which("g++") or shutil.which("clang++"))) if train.compile == "auto" else train.compile == "yes"
    return device, bf16, compile


def batches(dataset, batch, first, steps):
    """Batches number `first` and on: the position in the data is a function of the step alone."""
    sampler = (dataset.batch(i, batch) for i in range(first, first + steps))
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda samples: samples)


# ---------------------------------------------------------------- the loop

def run_stage(stage, model, world, train, first, start, resumed, elapsed, bar):
    """Trains one stage from global step `start` (>= first, the stage's first step) to its end; returns the seconds it took."""
    device, bf16, _ = choose_device(train)
    steps, text = getattr(train, f"{stage}_steps"), STAGES[stage]
    optimizers = make_optimizers(model, getattr(train, f"{stage}_optimizer"), getattr(train, f"{stage}_lr"), train.adam_lr)
    meter, begin, waited, logged = Meter(device), time.time(), 0.0, (time.time(), start)
    if resumed:
        try:
            *states, sums = torch.load(resumed / "training_state.pt", weights_only=True, map_location=device)
            meter.sums, meter.loss = sums["sums"], sums["loss"]
            for optimizer, saved in zip(optimizers, states):
                optimizer.load_state_dict(saved)
        except Exception as error:  # a damaged file fails in many ways
            raise OSError(f"checkpoint {resumed}: training_state.pt cannot be read ({type(error).__name__}): remove this folder "
                          "and --resume goes on from the checkpoint before it") from None
    model.train()
    arrived = time.time()
    for step, batch in enumerate(batches(world.dataset("train"), train.batch, start, first + steps - start), start):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        waited += time.time() - arrived
        share = schedule(step - first, steps, train.warmup, train.decay)
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak"] * share
        generator = torch.Generator().manual_seed(train.seed * 1_000_003 + step)             # no hidden state: a resumed step draws the same
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss, parts = uni_flow_loss(model, batch["z_v"], batch[text] if text else None, batch["c"], p_drop=train.p_drop if text else 0.1,
                                        clocks=train.clocks if text else train.generator_clocks, lambda_t=train.lambda_t or None, anchor=train.anchor,
                                        discrete_loss=train.discrete_loss, generator=generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient at step {step} of stage {stage} is {norm.item()}, wanted a finite number: "
                                     "lower the learning rate; the last checkpoint is intact")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        meter.add(loss, parts)
        bar.update()

        done, last = step + 1, step + 1 == first + steps
        if done % train.log_every == 0 or last:
            now = time.time()
            line = {"step": done, "stage": stage, **meter.read(), "lr": optimizers[-1].param_groups[0]["lr"], "grad_norm": round(norm.item(), 4)}
            rate = train.batch * (done - logged[1]) / (now - logged[0])
            timing = {"samples_per_s": round(rate, 1), "data_wait": round(waited / (now - logged[0]), 4),
                      "eta_s": round((bar.total - done) * train.batch / rate), "wall_s": round(elapsed + now - begin, 1)}
            with open(Path(train.out) / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line | timing) + "\n")
            report(bar, line | timing)
            logged, waited = (now, done), 0.0
        if done % train.save_every == 0 or last:
            state = {"step": done, "stage": stage, "elapsed": elapsed + time.time() - begin}
            save(Path(train.out) / (stage if last else f"step-{done:06d}"), model, world, train, state, optimizers, meter)
            for _, folder in [c for c in checkpoints(train.out) if c[1].name.startswith("step-")][: -train.keep]:
                shutil.rmtree(folder)
        arrived = time.time()
    return time.time() - begin


def report(bar, line):
    """One line of progress: beside the bar on a terminal, in its place elsewhere."""
    text = "  ".join(f"{name} {line[name]:.3f}" for name in ("loss", "video", "text") if line[name] is not None)
    bar.set_description(line["stage"])
    bar.set_postfix_str(text)
    if bar.disable:
        print(f"{line['stage']:9} step {line['step']:5}  {text}  {line['samples_per_s']:.0f} clips/s  data {line['data_wait']:.1%}  "
              f"ETA {line['eta_s'] // 60}:{line['eta_s'] % 60:02}", flush=True)


# ---------------------------------------------------------------- flags

def parse(argv):
    """Flags -> (Train, Config, the flags' namespace). Preset, then recipe, then flags; on --resume, the checkpoint's own values."""
    parser = argparse.ArgumentParser(prog="train.py", usage="%(prog)s [--flag value ...]      --help lists the flags", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, with its configuration")
    which.add_argument("--overwrite", action="store_true", help="start anew where --out already holds a run")
    for title, cls in (("training", Train), ("model (defaults: the preset's)", Config)):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(cls):
            kind = integers if f.name == "patch_size" else f.type
            default = "" if cls is Config else f" (default: {f.default})" if f.default != "" else ""
            group.add_argument("--" + f.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, metavar=f.name.upper(),
                               help=(f.metadata["help"] + default).replace("%", "%%"))
    flags = parser.parse_args(argv)
    given = {name: value for name, value in vars(flags).items() if name not in ("resume", "overwrite")}
    try:
        return *resolve(given, flags.resume), flags
    except (ValueError, OSError) as error:
        parser.exit(2, f"train.py: error: {error}\n")


def integers(text):
    """A list of integers as a flag has it: "1,2,2" -> (1, 2, 2)."""
    return tuple(map(int, text.split(",")))


def resolve(given, resume):
    """The values asked for, completed by those of the recipe and the preset, or of the checkpoint to resume."""
    train_names = {f.name for f in dataclasses.fields(Train)}
    if resume:
        out = given.get("out", Train.out)
        if not checkpoints(out):
            raise ValueError(f"--resume: found no checkpoint in {out}, wanted a folder with model.safetensors and train.json")
        folder = checkpoints(out)[-1][1]
        stored = json.loads((folder / "train.json").read_text())["train"] | json.loads((folder / "config.json").read_text()) | {"out": out}
        for name in set(given) - {"compile", "device", "log_every", "save_every", "keep", "eval_clips"}:
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
            fields = {f.name for f in dataclasses.fields(Config)}
            preset = dataclasses.asdict(wan.config(init, **sizes | {name: value for name, value in given.items() if name in fields}))
        elif given.get("data", Train.data) != "toy" and Path(init, "config.json").is_file():
            preset = json.loads(Path(init, "config.json").read_text())
        real = REAL if given.get("data", Train.data) != "toy" else {}
        values = preset | sizes | RECIPES[given.get("recipe", Train.recipe)] | real | given
    train = Train(**{name: value for name, value in values.items() if name in train_names})
    check(train)
    return train, Config(**{f.name: values[f.name] for f in dataclasses.fields(Config) if f.name in values})


def check(train):
    """Raises ValueError on a value no run can have, before any work is done."""
    for name, allowed in dict(device=("auto", "cpu", "cuda"), precision=("auto", "fp32", "bf16"), compile=("auto", "yes", "no"),
                              clocks=("independent", "mixture"), discrete_loss=("cross-entropy", "generalised-kl"), vocabulary=("data", "full"),
                              generator_clocks=("independent", "logit-normal"), **{f"{s}_optimizer": ("muon", "adam") for s in STAGES}).items():
        if getattr(train, name) not in allowed:
            raise ValueError(f"{name} is {getattr(train, name)!r}, wanted one of {', '.join(allowed)}")
    names = train.stages.split(",")
    if any(stage not in STAGES for stage in names) or names != [stage for stage in STAGES if stage in names]:
        raise ValueError(f"stages is {train.stages!r}, wanted some of {','.join(STAGES)}, in this order")
    for name in ("batch", "log_every", "save_every", "keep", *(f"{stage}_steps" for stage in STAGES)):
        if getattr(train, name) < 1:
            raise ValueError(f"{name} is {getattr(train, name)}, wanted at least 1")
    for name, low, high in (("p_drop", 0, 1), ("decay", 0, 1), ("eval_clips", 0, 10**6), ("warmup", 0, 10**9), ("anchor", 0, 1e3), ("lambda_t", 0, 1e6),
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
    stored, wanted = json.loads(file.read_text()) if file.is_file() else {}, json.loads(json.dumps(world.state))
    for name in set(stored) & {"world", "vocabulary", "codec", "prompt_encoder", "latents"}:
        if stored[name] != wanted.get(name):
            values = [len(v) if isinstance(v, list) else v for v in (stored[name], wanted.get(name))]
            raise ValueError(f"checkpoint {source} has {name} {values[0]!r}, but the data have {values[1]!r}" + " other tokens" * isinstance(stored[name], list))


def main(argv=None):
    train, config, flags = parse(argv)
    try:
        world = make_world(train.data, train.seed, train.vocabulary)
        world.check(config)
        device, bf16, compile = choose_device(train)
        last = checkpoints(train.out)[-1] if flags.resume else None
        source = last[1] if last else train.init
        torch.manual_seed(train.seed)
        if source:
            check_source(source, world)
        if train.eval_clips:
            world.tokenizer                                             # what the evaluation needs should be missed now, not at the end
        model, done = load(source, config) if source else (UniViGU(config), {})
        if not flags.resume:
            start_anew(train.out, flags.overwrite)                      # after all that may fail: it deletes an old run
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train.py: error: {error}")
    print(json.dumps({**dataclasses.asdict(train), **dataclasses.asdict(config)}, indent=1))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, {'bf16 autocast' if bf16 else 'fp32'}, "
          f"{'compiled' if compile else 'eager'} blocks")
    model.to(device)
    if compile:
        for block in model.blocks:
            block.compile()

    step, elapsed = (done["step"], done["elapsed"]) if last else (0, 0.0)
    truncate_metrics(Path(train.out) / "metrics.jsonl", step)
    names, first, text_started = train.stages.split(","), 0, done.get("stage") in ("recall", "refine")
    with tqdm(total=sum(getattr(train, f"{stage}_steps") for stage in names), initial=step, disable=None) as bar:
        for stage in names:
            end = first + getattr(train, f"{stage}_steps")
            if step < end:
                if STAGES[stage] and not text_started:
                    model.start_text()
                text_started = bool(STAGES[stage])
                resumed = last[1] if last and first < step else None
                try:
                    elapsed += run_stage(stage, model, world, train, first, max(first, step), resumed, elapsed, bar)
                except (FloatingPointError, ValueError, OSError) as error:
                    sys.exit(f"train.py: error: {error}")
            first = end
    if train.eval_clips:
        torch.compiler.set_stance("force_eager")                    # batches of evaluation are few: not worth compiling for
        world.evaluate(model.eval(), train.out, train.eval_clips, elapsed, has_text=text_started)


if __name__ == "__main__":
    main()
