"""What a run says of itself while it trains: losses by clock, rates, progress, trackers."""

import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.cost import forward_flops, peak_flops, video_tokens
from engine.files import append_line


class Meter:
    """Losses since the last log line, per modality and per tau decile.

    Kept on the device, so that nobody waits for it, and in the checkpoint.
    """

    def __init__(self, device):
        zeros = {"device": device, "dtype": torch.float64}
        self.sums = torch.zeros(2, 2, 10, **zeros)  # (video | text, sum | count, decile)
        self.loss = torch.zeros(2, **zeros)  # sum, count

    def add(self, loss, parts):
        """Adds a batch's loss and parts, see uni_flow_loss. What is not finite is left out, as its
        step will be."""
        self.loss += torch.stack([loss.detach().nan_to_num(0, 0, 0), loss.isfinite()]).double()
        for sums, name, m in zip(self.sums, ("video", "text"), "vt"):
            if name in parts:
                decile = (parts[f"tau_{m}"] * 10).long().clamp(max=9)
                counts = parts[f"loss_mask_{m}"] * parts[name].isfinite()
                losses = parts[name].nan_to_num(0, 0, 0) * counts
                sums.index_add_(1, decile, torch.stack([losses, counts]).double())

    def sum_over_processes(self):
        dist.all_reduce(self.sums)
        dist.all_reduce(self.loss)

    def empty(self):
        self.sums.zero_()
        self.loss.zero_()

    def read(self, ranks=1):
        """The figures of all processes as a dict, and an empty meter again."""
        if ranks > 1:
            self.sum_over_processes()
        line = {"loss": ratio(*self.loss.tolist())}
        for name, (sums, counts) in zip(("video", "text"), self.sums.tolist()):
            line[name] = ratio(sum(sums), sum(counts))
            line[f"{name}_by_tau"] = [ratio(*decile) for decile in zip(sums, counts)]
        self.empty()
        return line


def ratio(total, count):
    return round(total / count, 6) if count else None


class Log:
    """Writes the lines of metrics.jsonl, with the rates since the last one.

    batch: clips a step. step, elapsed: steps and seconds of training before. track: see tracker.
    """

    def __init__(self, out, batch, machine, bar, track, step, elapsed):
        self.path, self.batch, self.machine, self.bar = (
            Path(out, "metrics.jsonl"),
            batch,
            machine,
            bar,
        )
        self.track, self.step, self.before = track, step, elapsed
        self.begin = self.last = time.time()
        self.tokens = self.flops = 0
        self.waited = 0.0

    @property
    def elapsed(self):
        """Seconds of training so far."""
        return self.before + time.time() - self.begin

    @contextmanager
    def waiting(self):
        """Counts the time within as spent waiting for data."""
        begin = time.time()
        yield
        self.waited += time.time() - begin

    def count(self, config, batch, text):
        """Adds a micro-batch to tokens and FLOPs; all processes have as many, of one size.

        text: whether its text is trained, too.
        """
        n_v, n_t = video_tokens(config, batch["z_v"].shape[1:]), config.text_len if text else 0
        clips = len(batch["z_v"]) * self.machine.ranks
        self.tokens += clips * (n_v + n_t)
        self.flops += 3 * clips * forward_flops(config, n_v, n_t)

    def write(self, line):
        """Adds the rates since the last line, and writes the line."""
        now, machine = time.time(), self.machine
        seconds = now - self.last
        rate = self.batch * (line["step"] - self.step) / seconds
        line |= {
            "samples_per_s": round(rate, 2),
            "tokens_per_s": round(self.tokens / seconds),
            "data_wait": round(self.waited / seconds, 4),
            "eta_s": round((self.bar.total - line["step"]) * self.batch / rate),
            "wall_s": round(self.before + now - self.begin, 1),
        }
        if machine.device.type == "cuda":
            peak = peak_flops(machine.device)
            line["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            line["mfu"] = peak and round(self.flops / seconds / machine.ranks / peak, 4)
        if machine.rank == 0:
            append_line(self.path, line)
            report(self.bar, line)
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
            self.track(numbers, line["step"])
        self.last, self.step, self.waited, self.tokens, self.flops = now, line["step"], 0.0, 0, 0


class Estimate:
    """Says, 50 steps into a call, how many minutes its training will take.

    costs: of each step that is left, in any unit; those of other stages differ.
    """

    WATCHED = 20, 50  # of these steps the rate is taken: the first ones compile

    def __init__(self, costs):
        self.costs, self.begin, self.steps, self.since = costs, time.time(), 0, 0.0

    def step(self):
        """Called after each step; prints once."""
        self.steps += 1
        first, last = self.WATCHED
        if self.steps == first:
            self.since = time.time()
        if self.steps == last:
            now, watched = time.time(), sum(self.costs[first:last])
            seconds = now - self.begin + sum(self.costs[last:]) * (now - self.since) / watched
            tqdm.write(f"about {seconds / 60:.1f} minutes of training in all")


def tracker(kind, out, options):
    """A function (numbers, step) that hands the log to a program: "tensorboard", "wandb", "none".

    options: the run's, as a dict, for programs that show them.
    """
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(Path(out, "tensorboard"))

        def add_scalars(numbers, step):
            for name, value in numbers.items():
                board.add_scalar(name, value, step)

        return add_scalars

    if kind == "wandb":
        import wandb

        run = wandb.run or wandb.init(
            project="uni-vigu", id=Path(out).name, dir=out, config=options, resume="allow"
        )
        return lambda numbers, step: run.log(numbers, step=step)

    return lambda numbers, step: None


def report(bar, line):
    """One line of progress: beside the bar on a terminal, in its place elsewhere."""
    losses = {name: line[name] for name in ("loss", "video", "text") if line[name] is not None}
    text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    bar.set_description(line["stage"])
    bar.set_postfix_str(text)
    if bar.disable:
        minutes, seconds = divmod(line["eta_s"], 60)
        print(
            f"{line['stage']:9} step {line['step']:5}  {text}  {line['samples_per_s']:.4g} clips/s"
            f"  data {line['data_wait']:.1%}  ETA {minutes}:{seconds:02}",
            flush=True,
        )
