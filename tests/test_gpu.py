"""What a GPU will meet, as far as a CPU can show it; tests/test_cuda.py has the rest.

A tensor on the meta device has no values: whatever would wait for one, such as .item(), fails, and
so does an operation whose inputs are on other devices.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which looks at torch.autocast once, and not at what takes its place here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from engine.optim import Guard
from univigu import Config, UniViGU, generate, joint, understand, uni_flow_loss

from tests import gpu  # isort: skip

ROOT = Path(train.__file__).parent
META = torch.device("meta")


class Seen(TorchDispatchMode):
    """Notes what operations give: (name, tensor)."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        self.given += [(name, x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """A model, a latent and a prompt. There is no autocast for meta tensors."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    with META:
        return UniViGU(Config()), torch.empty(2, 24, 3, 4, 4), torch.empty(2, 16, 64)


@pytest.mark.parametrize("kind", ["adam", "muon"])
@pytest.mark.parametrize("anchor", [0.0, 0.1])
def test_nothing_in_a_step_waits_for_a_value_or_leaves_the_device(
    kind, anchor, on_meta, monkeypatch
):
    model, z_v, c = on_meta
    y = torch.zeros(2, 16, dtype=torch.int64, device=META)
    module, name = import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices"
    kinds = getattr(module, name)()
    monkeypatch.setattr(module, name, lambda: [*kinds, "meta"])  # as on a GPU, the step is fused
    optimizers, guard = train.make_optimizers(model, kind, 1e-3, 1e-3), Guard(None, 0, [])
    loss, parts = uni_flow_loss(
        model, z_v, y, c, anchor=anchor, generator=torch.Generator().manual_seed(0)
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    guard.step(norm, 0, optimizers)
    for x in (loss, norm, *parts.values(), *model.parameters()):
        assert x.device == META
    states = [x for o in optimizers for of in o.state.values() for x in of.values()]
    assert states and all(x.device == META or x.ndim == 0 for x in states)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_no_sampler_waits_for_a_value_or_leaves_the_device(guidance, on_meta):
    model, z_v, c = on_meta
    y, options = torch.zeros(2, 16, dtype=torch.int64, device=META), {"guidance": guidance}
    found = [
        understand(model, z_v, c, steps=2, **options),
        understand(model, z_v, steps=3, reuse_video=True, **options),
        generate(model, y, c, z_v.shape[1:], steps=2, **options),
        generate(model, None, c, z_v.shape[1:], steps=2, **options),
        *joint(model, c, z_v.shape[1:], steps=2, **options),
    ]
    assert all(x.device == META for x in found)


def test_a_step_multiplies_in_bf16_and_keeps_the_rest_in_fp32():
    model = UniViGU(Config())
    for head in (model.head, model.head_t):
        torch.nn.init.normal_(head.head.weight, std=0.02)
    z_v, c = torch.randn(2, 24, 3, 4, 4), torch.randn(2, 16, 64)
    y = torch.zeros(2, 16, dtype=torch.int64)
    with Seen() as seen:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss, _ = uni_flow_loss(model, z_v, y, c, anchor=0.0)
        loss.backward()
    kinds = {name: {x.dtype for n, x in seen.given if n == name} for name, _ in seen.given}
    attention = next(k for k in kinds if "scaled_dot_product" in k and "backward" not in k)
    assert torch.bfloat16 in kinds["addmm"] and torch.bfloat16 in kinds["mm"]
    first = {x.dtype for n, x in seen.given if n == attention and x.ndim == 4}
    assert first == {torch.bfloat16}
    norms = {dtype for k, of in kinds.items() if "layer_norm" in k for dtype in of}
    assert norms == {torch.float32} and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_a_text_step_writes_into_the_cache_that_is_there():
    model = UniViGU(Config()).eval()
    z_v, c = torch.randn(2, 24, 3, 8, 8), torch.randn(2, 16, 64)
    one, z_t = torch.ones(2), torch.randn(2, 16, 64)
    _, _, memory = model(z_v, z_t, one, 0 * one, c, remember=True)
    cache = [x for kept in memory for x in (*kept.streams, *kept.prompt)]
    places, sizes = [x.data_ptr() for x in cache], {x.numel() for kept in memory for x in kept[0]}
    video = [x[:, :, : 3 * 8 * 8].clone() for kept in memory for x in kept.streams]
    for tau in (0.3, 0.6):
        with Seen() as seen:
            model.text_alone(torch.randn(2, 16, 64), tau * one, memory)
        made = {x.data_ptr() for _, x in seen.given if x.numel() in sizes}
        assert made <= set(places)  # views of it, no copy
    assert places == [x.data_ptr() for kept in memory for x in (*kept.streams, *kept.prompt)]
    after = [x[:, :, : 3 * 8 * 8] for kept in memory for x in kept.streams]
    assert all(torch.equal(a, b) for a, b in zip(video, after))


@torch.no_grad()
def test_the_blocks_of_text_steps_compile_once():
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, graphs = UniViGU(Config(num_layers=3)).eval(), []
    for block in model.blocks:
        block.compile(dynamic=False, backend="eager")

    def note(k, *_):
        graphs.append(counters["stats"]["unique_graphs"])

    z_v = torch.randn(2, 24, 3, 4, 4)
    for _ in range(2):  # with another cache, too
        understand(model, z_v, steps=4, reuse_video=True, callback=note)
    _, first, second, *others = graphs
    assert first == 1 and second == 2 and set(others[:3]) <= {0, 2} and others[-1] == 2


@pytest.mark.slow
def test_the_gpus_script_runs_on_a_cpu(tmp_path):
    names = ["attention", "tests"]
    command = ["bash", ROOT / "tests" / "gpu.sh", "--tiny", "--out", tmp_path / "gpu", *names]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu").read_text().splitlines()]
    assert [line["part"] for line in lines] == names
    assert lines == [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_of_it_does(name, monkeypatch):
    graphs = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", graphs)  # C++ for a CPU takes a minute
    line = json.loads(json.dumps(gpu.measure(name, gpu.Place(tiny=True))))
    assert line["part"] == name and line["torch"] == torch.__version__
    assert line["device"].endswith("CPU cores")
    figures = {k: v for k, v in line.items() if k.endswith(("seconds", "_s", "estimated_gb"))}
    assert figures and all(value > 0 for value in figures.values())


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    class Ended:
        returncode, stderr = 1, "trace\nRuntimeError: no kernel"

    def run(command, **options):
        if "toy" in command:
            raise subprocess.TimeoutExpired(command, 1)
        return Ended

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "new" / "f"
    assert gpu.main(["--tiny", "attention", "toy", "--out", str(out)]) == "failed: attention, toy"
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first == {"part": "attention", "failed": "RuntimeError: no kernel"}
    assert second["failed"].startswith("took more than")


@pytest.mark.parametrize("flags, words", [(["--tiny", "quick"], "quick: no part"), ([], "--tiny")])
def test_the_script_says_what_it_wants(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main(flags)
    assert end.value.code == 2 and words in capsys.readouterr().err
