"""train.py under torchrun, on CPU with gloo: the numbers of one process, every way to stop."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import refusal
from ranks import Ranks
from test_train import MODEL

import sample
import train
from engine import checkpoint, distributed
from engine.checkpoint import checkpoints
from engine.cost import forward_flops
from engine.options import Run
from univigu import PRESETS, Config, UniViGU, uni_flow_loss

pytestmark = pytest.mark.slow

ROOT = Path(train.__file__).parent
RUN = [
    *MODEL,
    *(
        "--stages recall,refine --clocks independent --batch 4 --micro-batch 1 --recall-steps 8 "
        "--refine-steps 12 --recall-optimizer adam --refine-optimizer adam --recall-lr 0.003 "
        "--refine-lr 0.003 --warmup 2 --log-every 1 --save-every 5 --eval-clips 2 "
        "--compile no --device cpu --precision fp32 --keep 9 --ema 0.9"
    ).split(),
]


def start(out, *flags, ranks=1, script=ROOT / "train.py"):
    """Of one process, or of as many as torchrun would start."""
    return Ranks(script, *RUN, "--out", out, *flags, count=ranks)


def start_torchrun(out, *flags, ranks=1, restarts=0):
    torchrun = ["torch.distributed.run", "--nproc-per-node", ranks, "--max-restarts", restarts]
    torchrun += ["--master-port", 20000 + os.getpid() % 20000, ROOT / "train.py"]
    return subprocess.Popen(
        [str(part) for part in (sys.executable, "-m", *torchrun, *RUN, "--out", out, *flags)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def lines(out):
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(out, step, process):
    """Until the run has logged `step`."""
    for _ in range(600):
        if len(lines(out)) >= step:
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no step {step} within a minute")


def assert_same_losses(found, wanted, rel=3e-4, steps=20):
    numbers = list(range(1, steps + 1))
    assert [line["step"] for line in found] == [line["step"] for line in wanted] == numbers
    for a, b in zip(found, wanted):
        for name, factor in (("loss", 1), ("video", 1), ("text", 1), ("grad_norm", 10)):
            assert a[name] == pytest.approx(b[name], rel=rel * factor, abs=2e-6 if rel else 0), (
                a["step"],
                name,
            )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    finish(start(out))
    return out


# What a rank of two asserts; `o` is an Objective over both.
RANK = """
import sys, torch, torch.distributed as dist
from engine import checkpoint, distributed
from engine.options import Run
from toy import World
from univigu import Config, UniViGU, uni_flow_loss
run = Run(parallel=sys.argv[1], device="cpu", compile="no")
m = distributed.join_processes(run, 1)
torch.manual_seed(0)
sizes = dict(num_heads=2, num_layers=2, ffn_dim=32, text_ffn_dim=32, text_dim=8, freq_dim=16)
model = UniViGU(Config(dim=24, **sizes))
o = distributed.parallelise(model, uni_flow_loss, run, m)
batch = World().dataset("train").__getitems__(range(2))
def learn(hold=False):
    options = dict(generator=torch.Generator().manual_seed(m.rank))
    with distributed.no_grad_sync(o, hold=hold):
        o(batch["z_v"], batch["caption"], batch["c"], options)[0].backward()
"""


def two_ranks(parallel, body, tmp_path):
    script = tmp_path / "rank.py"
    # in a function: what is left for the interpreter's end outlives its process group
    inside = textwrap.indent(f"{RANK}{body}\ndistributed.leave(m)", "    ")
    script.write_text(f"def main():{inside}\nmain()\n")
    finish(Ranks(script, parallel, count=2))


def test_a_sharded_run_keeps_its_share_of_the_gradients_whatever_it_accumulates(tmp_path):
    body = """
for hold in (True, False):
    learn(hold)
    mine = sum(p.grad.to_local().numel() for p in model.parameters())
    assert mine < 0.6 * sum(p.numel() for p in model.parameters())
both = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
torch.manual_seed(0)
model, wanted = UniViGU(Config(dim=24, **sizes)), {}
for rank in (0, 1):
    options = dict(generator=torch.Generator().manual_seed(rank))
    uni_flow_loss(model, batch["z_v"], batch["caption"], batch["c"], **options)[0].backward()
for name, p in model.named_parameters():  # two micro-batches each, the mean of both ranks
    assert torch.allclose(both[name], p.grad, rtol=1e-3, atol=1e-6), name
"""
    two_ranks("fsdp", body, tmp_path)


def test_a_sharded_model_may_be_evaluated_before_it_was_trained(tmp_path):
    body = """
def look(model, share):
    half = torch.full((2,), 0.5)
    point = batch["z_v"], model.embed(batch["caption"]), half, half, batch["c"]
    return share([lambda: model(*point)[1].shape, lambda: model.config.dim])
for _ in range(2):
    assert distributed.evaluate(look, o, m, None) == [(2, 16, 8), 24]
    model.train()
    learn()
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held < 0.6 * sum(p.numel() for p in model.parameters())
"""
    two_ranks("fsdp", body, tmp_path)


def test_copies_share_an_evaluations_work(tmp_path):
    body = """
done = []
def look(model, share):
    return share([lambda i=i: done.append(i) or i * 10 for i in range(5)])
assert distributed.evaluate(look, o, m, None) == [0, 10, 20, 30, 40]
assert done == ([0, 2, 4] if m.rank == 0 else [1, 3])
"""
    two_ranks("ddp", body, tmp_path)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_once_training_runs_nobody_waits_for_hours(parallel, tmp_path):
    body = """
import os, time
from datetime import timedelta
assert timedelta(minutes=1) < distributed.PATIENCE < timedelta(minutes=30)
distributed.PATIENCE = timedelta(seconds=2)
distributed.lose_patience(o, m)
learn()
if m.rank == 1:
    time.sleep(6)
    os._exit(0)
begin = time.time()
try:
    distributed.wait_for_all(m)
except RuntimeError:
    pass
assert 1 < time.time() - begin < 5
os._exit(0)
"""
    two_ranks(parallel, body, tmp_path)


@pytest.mark.parametrize(
    "major, cudnn, first",
    [
        (9, 91900, "CUDNN_ATTENTION"),
        (10, 91600, "CUDNN_ATTENTION"),
        (9, 91500, "FLASH_ATTENTION"),
        (9, None, "FLASH_ATTENTION"),
        (8, 91900, "FLASH_ATTENTION"),
        (12, 91900, "FLASH_ATTENTION"),
    ],
)
def test_cudnns_attention_comes_first_where_it_is_right_and_fast(major, cudnn, first, monkeypatch):
    orders = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(
        distributed, "sdpa_kernel", lambda order, set_priority: orders.append(order)
    )
    distributed.preferred_attention(torch.device("cuda", 0))
    distributed.preferred_attention(torch.device("cpu"))
    (order,) = orders
    assert order[0].name == first and order[-1].name == "MATH"


@pytest.mark.parametrize(
    "flags",
    [
        ["--parallel", "ddp"],
        ["--parallel", "fsdp"],
        ["--parallel", "fsdp", "--shard-within", "1"],
        ["--recompute", "full"],
        ["--recompute", "keep-attention"],
    ],
    ids=" ".join,
)
def test_two_processes_give_the_losses_of_one(flags, one, tmp_path):
    output = finish(start(tmp_path / "run", *flags, ranks=2 if "--parallel" in flags else 1))
    assert "--parallel" not in flags or f"2 processes, {flags[1]}" in output
    assert_same_losses(lines(tmp_path / "run"), lines(one))
    for of in ("refine", "refine/ema"):
        a, b = (
            UniViGU.from_pretrained(folder / of).state_dict() for folder in (tmp_path / "run", one)
        )
        apart, size = (
            torch.stack([x.norm() for x in xs]).norm()
            for xs in ([a[name] - b[name] for name in a], b.values())
        )
        assert (
            apart < 0.005 * size
        )  # as one vector: Adam makes full steps of the rounding of gradients near zero
    found, wanted = (
        json.loads((folder / "results.json").read_text())["loss"]["seen"]
        for folder in (tmp_path / "run", one)
    )
    assert found == pytest.approx(wanted, rel=2e-3)  # a sharded model is evaluated too
    assert output.count("understanding.attribute_accuracy") == 1  # and speaks once


@pytest.mark.parametrize(
    "first, then",
    [
        (dict(ranks=2, flags=["--parallel", "fsdp"]), dict(ranks=1, flags=[])),
        (dict(ranks=1, flags=[]), dict(ranks=2, flags=["--parallel", "ddp"])),
        (dict(ranks=2, flags=["--parallel", "ddp"]), dict(ranks=2, flags=["--parallel", "fsdp"])),
    ],
    ids=["fsdp to one", "one to ddp", "ddp to fsdp"],
)
def test_a_run_goes_on_with_other_processes(first, then, one, tmp_path):
    out = tmp_path / "run"
    process = start(out, *first["flags"], "--save-every", "4", ranks=first["ranks"])
    wait_for(out, 7, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    saved = checkpoints(out)[-1][0]
    assert 7 <= saved <= 20
    finish(start(out, *then["flags"], "--resume", ranks=then["ranks"]))
    assert_same_losses(lines(out), lines(one))


def test_shards_are_resumed_by_four_processes_and_then_by_one(one, tmp_path, capsys):
    out = tmp_path / "run"
    for ranks, step in ((2, 5), (4, 12)):
        resume = ["--resume"] if ranks == 4 else []
        process = start(out, "--parallel", "fsdp", "--save-every", "1", *resume, ranks=ranks)
        wait_for(out, step, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
        _, last = checkpoints(out)[-1]
        files = sorted(file.name for file in (last / "shards").iterdir())
        assert len(files) == ranks and all(name.endswith(".safetensors") for name in files)
        assert not (last / "model.safetensors").exists()
    for use in (["joint", "--prompt", ""], ["understand", "--video", "clip.gif"]):
        said = refusal(capsys, sample.main, *use, "--checkpoint", last)
        assert f"python -m engine.checkpoint {last}" in said
    checkpoint.main([str(last)])
    for of in ("", "ema"):  # the same weights, made into one file
        model = UniViGU.from_pretrained(last / of)
        stored = UniViGU.from_pretrained(one / "refine" / of)
        assert all(a.shape == b.shape for a, b in zip(model.parameters(), stored.parameters()))
    assert sample.open_trained("ema", last / "ema", None, torch.device("cpu"), True).stage
    (last / "model.safetensors").unlink()
    finish(start(out, "--resume"))
    assert_same_losses(lines(out), lines(one))
    assert (out / "refine" / "model.safetensors").is_file()  # a stage's end has one file
    mean, wanted = (
        UniViGU.from_pretrained(folder / "refine" / "ema").state_dict() for folder in (out, one)
    )
    assert max((mean[name] - x).abs().max() for name, x in wanted.items()) < 0.02


def test_a_damaged_shard_is_told(one, tmp_path, capsys):
    out = tmp_path / "run"
    process = start(out, "--parallel", "fsdp", "--save-every", "2", ranks=2)
    wait_for(out, 6, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    _, last = checkpoints(out)[-1]
    file = sorted((last / "shards").iterdir())[0]
    file.write_bytes(file.read_bytes()[:1000])
    resumed = start(out, "--resume")
    said = resumed.communicate(timeout=100)[0]
    assert resumed.returncode and "its shards cannot be read" in said
    for folder, words in ((last, "its shards cannot be read"), (one / "refine", "no shards/")):
        assert words in refusal(capsys, checkpoint.main, folder)
        assert (folder == last) != (folder / "model.safetensors").exists()
    assert said.strip().splitlines()[-1].startswith("train.py: error: ")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_text_alone_is_trained_in_two_processes_as_in_one(parallel, one, tmp_path):
    flags = ["--train", "text", "--init", str(one / "recall"), "--stages", "refine"]
    finish(start(tmp_path / "one", *flags))
    out = tmp_path / "run"
    process = start(out, *flags, "--parallel", parallel, "--save-every", "1", ranks=2)
    wait_for(out, 4, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    finish(start(out, *flags, "--resume", "--parallel", parallel, ranks=2))
    assert_same_losses(lines(out), lines(tmp_path / "one"), steps=12)


LOADING = """
import resource, sys, torch
from pathlib import Path
import train, wan
from engine import checkpoint, distributed
from engine.options import Run
from univigu import Config, UniViGU, uni_flow_loss

def kept_and_most():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]

parallel, folder = sys.argv[1:]
run = Run(parallel=parallel, recompute="none", device="cpu", compile="no", micro_batch=1)
machine = distributed.join_processes(run, 1)
small = UniViGU(Config())  # what any first use takes is not counted
with torch.device("meta"):
    blank = UniViGU(Config())
read = lambda name, *_: small.get_parameter(name).data
distributed.parallelise(blank, uni_flow_loss, run, machine, read=read)
before, _ = kept_and_most()
model, read, _ = wan.open_model(folder)
distributed.parallelise(model, uni_flow_loss, run, machine, read=read)
_, most = kept_and_most()
with open(f"{folder}/measured-{machine.rank}", "w") as file:
    print(before, most, file=file)
distributed.leave(machine)
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_loading_takes_little_more_than_what_is_kept(parallel, tmp_path):
    """1 GB of weights, two processes: beyond what they keep, a fifth of a copy on the host."""
    config = Config(dim=1024, ffn_dim=4096, text_ffn_dim=1024, num_heads=8, num_layers=13)
    model = UniViGU(config)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 1e9
    model.save_pretrained(tmp_path)
    del model
    (tmp_path / "load.py").write_text(LOADING)
    finish(Ranks(tmp_path / "load.py", parallel, tmp_path, count=2))
    found = [[int(n) for n in (tmp_path / f"measured-{k}").read_text().split()] for k in range(2)]
    kept = size if parallel == "ddp" else size / 2
    beyond = sum(most - before - kept for before, most in found)
    assert beyond < 0.2 * size, found


def test_sigterm_saves_and_ends_cleanly_and_the_run_goes_on_bit_for_bit(one, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--save-every", "1000")
    wait_for(out, 3, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    step = int(re.search(r"stopped at step (\d+), saved", output)[1])
    assert checkpoints(out)[-1][0] == step < 20
    finish(start(out, "--resume"))
    assert (out / "refine" / "model.safetensors").read_bytes() == (
        one / "refine" / "model.safetensors"
    ).read_bytes()
    assert_same_losses(lines(out), lines(one), rel=0)


def children(pid):
    return [
        int(child)
        for child in subprocess.run(
            ["pgrep", "-P", str(pid)], capture_output=True, text=True
        ).stdout.split()
    ]


def test_a_process_that_dies_ends_the_run_and_the_run_goes_on(one, tmp_path):
    """Without restarts the others do not wait for it; its checkpoint is intact."""
    out = tmp_path / "run"
    process = start_torchrun(out, ranks=2)
    wait_for(out, 7, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and checkpoints(out)[-1][0] >= 5
    finish(start(out, "--resume", ranks=2))
    assert_same_losses(lines(out), lines(one))


@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_the_processes_again_and_they_go_on_by_themselves(victim, one, tmp_path):
    out = tmp_path / "run"
    process = start_torchrun(out, ranks=2, restarts=1)
    wait_for(out, 7, process)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    finish(process)
    assert_same_losses(lines(out), lines(one))


SPOILT = """
import toy, train
real = toy.Shapes.__getitems__
def spoilt(self, indices):
    batch = real(self, indices)
    for row, index in enumerate(indices):
        if self.split == "train" and index in (13, 38):
            batch["z_v"][row] = float("nan")
    return batch
toy.Shapes.__getitems__ = spoilt
train.main()
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_sample_that_is_no_number_is_left_out_by_all_processes(parallel, tmp_path):
    """Clips 13 and 38 are in one process's share of steps 3 and 9; both leave these steps out."""
    (tmp_path / "spoilt.py").write_text(SPOILT)
    flags = ["--log-every", "4", "--save-every", "1000"]
    outputs = [
        finish(start(tmp_path / name, *flags, *more, ranks=ranks, script=tmp_path / "spoilt.py"))
        for name, ranks, more in (("one", 1, []), ("two", 2, ["--parallel", parallel]))
    ]
    for output in outputs:
        assert (
            "step 3 of stage recall is left out: its gradient is nan; its clips: [12, 13, 14, 15]"
            in output
        )
        assert (
            "step 9 of stage refine is left out: its gradient is nan; its clips: [36, 37, 38, 39]"
            in output
        )
    found, wanted = (lines(tmp_path / name) for name in ("two", "one"))
    assert (
        [line["skipped"] for line in found]
        == [line["skipped"] for line in wanted]
        == [1, 1, 2, 2, 2]
    )
    assert [line["loss"] for line in found] == pytest.approx(
        [line["loss"] for line in wanted], rel=3e-4
    )


def test_the_time_limit_saves_and_ends_and_is_of_each_call(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**9, 10))  # each look at it takes ten seconds
    monkeypatch.setattr(time, "time", lambda: next(clock))
    steps = []
    for resume in ([], ["--resume"]):
        train.main(
            [*RUN, "--out", str(tmp_path / "run"), "--eval-clips", "0", *resume]
            + ["--time-limit", "12"] * (not resume)
        )
        assert (
            f"stopped at step {checkpoints(tmp_path / 'run')[-1][0]}, saved; --resume goes on"
            in capsys.readouterr().out
        )
        steps.append(checkpoints(tmp_path / "run")[-1][0])
    assert 1 < steps[0] < steps[1] - 1, steps


def test_sigterm_to_torchrun_saves_with_workers_too(one, tmp_path):
    out = tmp_path / "run"
    process = start_torchrun(out, "--workers", "1", "--save-every", "1000", "--keep", "9", ranks=2)
    wait_for(out, 3, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to the whole process group
    output = process.communicate(timeout=100)[0]
    assert re.search(r"stopped at step \d+, saved", output), output[-2000:]
    finish(start(out, "--resume", ranks=2))
    assert_same_losses(lines(out), lines(one))


def test_a_run_that_was_refused_is_not_resumed_by_the_restart(tmp_path):
    out = tmp_path / "run"
    finish(start(out, "--time-limit", "0.0001"))
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    process = start_torchrun(out, restarts=1)
    output = process.communicate(timeout=100)[0]
    assert (
        process.returncode != 0
        and output.count("holds a run at step 1: add --resume to go on") == 2
    )
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("recompute", ["none", "keep-attention", "full"])
def test_compiled_and_recomputed_gradients_are_the_plain_ones(recompute):
    """Of a batch of 1, for which torch 2.13's compiler for CPUs is wrong where selective
    recomputation is inside: so it is not compiled there."""
    import toy

    batch = toy.World(0).dataset("train").__getitems__([0])
    config, gradients = (
        Config(
            dim=48, num_heads=4, num_layers=2, ffn_dim=96, text_ffn_dim=64, text_dim=8, freq_dim=16
        ),
        [],
    )
    for kind, compile in (("none", "no"), (recompute, "yes")):
        settings = Run(recompute=kind, compile=compile, device="cpu", precision="fp32")
        machine = distributed.join_processes(settings, steps=1)
        torch.manual_seed(0)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = UniViGU(config)
        for head in (model.head, model.head_t):
            torch.nn.init.normal_(head.head.weight, std=0.02)
        objective = distributed.parallelise(model, uni_flow_loss, settings, machine)
        assert machine.compile == (compile == "yes" and kind != "keep-attention")
        objective(
            batch["z_v"],
            batch["prompt"],
            batch["c"],
            {"generator": torch.Generator().manual_seed(0), "anchor": 0.1},
        )[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1) == machine.compile
    plain, found = gradients
    assert (
        max(
            ((found[name] - g).norm() / g.norm().clamp(min=1e-6)).item()
            for name, g in plain.items()
        )
        < 1e-4
    )


@pytest.mark.parametrize(
    "stage_steps, allowed, finishes", [({3, 9}, 2, True), ({3, 4, 9}, 2, False)]
)
def test_a_sample_that_is_no_number_is_left_out_and_named(
    stage_steps, allowed, finishes, tmp_path, monkeypatch, capsys
):
    """The step changes nothing, its clips are named, and too many such steps stop the run."""
    import toy

    real = toy.Shapes.__getitems__

    def spoilt(self, indices):
        batch = real(self, indices)
        for row, index in enumerate(indices):
            if index % 4 == 1 and index // 4 in stage_steps:
                batch["z_v"][row] = float("nan")
        return batch

    monkeypatch.setattr(toy.Shapes, "__getitems__", spoilt)
    flags = [*RUN, "--out", str(tmp_path / "run"), "--max-skipped", str(allowed)]
    if finishes:
        train.main(flags)
        assert [line["skipped"] for line in lines(tmp_path / "run")] == [0] * 3 + [1] * 6 + [2] * 11
        assert all(
            torch.isfinite(p).all()
            for p in UniViGU.from_pretrained(tmp_path / "run" / "refine").parameters()
        )
    else:
        with pytest.raises(SystemExit, match="lower the learning rate or mend the clips"):
            train.main(flags)
    assert (
        "step 3 of stage recall is left out: its gradient is nan; its clips: [12, 13, 14, 15]"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch", "5", "--micro-batch", "2"], ["batch is 5", "micro_batch 2"]),
        (["--parallel", "tensor"], ["'tensor'", "ddp"]),
        (["--recompute", "some"], ["'some'", "keep-attention"]),
        (["--micro-batch", "3"], ["batch is 4", "micro_batch 3"]),
    ],
)
def test_what_cannot_divide_is_refused_before_anything_is_made(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([*RUN, "--out", str(tmp_path / "run"), *flags])
    text = capsys.readouterr().err
    assert (
        end.value.code == 2
        and all(word in text for word in words)
        and not (tmp_path / "run").exists()
    )


def test_a_dry_run_of_the_papers_training(tmp_path, capsys):
    train.main(["--dry-run", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().out
    assert (
        "514,328 parameters" in text and "TFLOP a step" in text and not (tmp_path / "run").exists()
    )


def test_flops_are_those_of_the_accounting():
    """wan-1.3b at 33,016 tokens, both experts 8960 wide: 82.7 + 200.9 + 3.1 TFLOP forward."""
    from dataclasses import replace

    config = replace(PRESETS["wan-1.3b"], text_ffn_dim=8960)
    linears = 4 * 1536 * (3 * 1536 + 8960) * 30 * 33016
    attention, cross = (
        4 * 33016**2 * 1536 * 30,
        4 * 33016 * 512 * 1536 * 30 + 4 * 1536**2 * 512 * 30,
    )
    assert forward_flops(config, 32760, 256) == pytest.approx(linears + attention + cross, rel=1e-9)
    assert linears / 1e12 == pytest.approx(82.7, abs=0.3) and attention / 1e12 == pytest.approx(
        200.9, abs=0.1
    )
