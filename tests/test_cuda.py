"""What only a GPU can show; skipped without one. `bash tests/gpu.sh tests` runs it."""

import json
from contextlib import nullcontext

import pytest
import torch

import train
from engine import distributed
from engine.distributed import Machine, autocast, parallelise, preferred_attention
from engine.graphs import captured_text_steps
from engine.optim import Guard
from engine.options import Run
from univigu import Config, UniViGU, generate, joint, understand, uni_flow_loss

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda", 0)
HEAD64 = dict(dim=256, num_heads=4, num_layers=2, ffn_dim=512, text_ffn_dim=256)


def make(**sizes):
    """A model whose heads are not zero, on the CPU."""
    torch.manual_seed(0)
    model = UniViGU(Config(**sizes))
    for head in (model.head, model.head_t):
        torch.nn.init.normal_(head.head.weight, std=0.02)
    return model


def batch(side=6, clips=4):
    """z_v1, y, c; their tokens are no multiple of 128."""
    drawn = torch.Generator().manual_seed(1)
    z_v = torch.randn(clips, 24, 3, side, side, generator=drawn)
    y = torch.randint(34, (clips, 16), generator=drawn)
    return z_v, y, torch.randn(clips, 16, 64, generator=drawn)


def gradients(model, machine, inputs):
    """All gradients of a seeded step, as one vector on the CPU."""
    objective = parallelise(model, uni_flow_loss, Run(micro_batch=4), machine)
    inputs = [x.to(machine.device) for x in inputs]
    with distributed.settings(machine):
        with autocast(machine):
            loss, _ = objective(*inputs, {"generator": torch.Generator().manual_seed(2)})
        loss.backward()
    return torch.cat([p.grad.cpu().flatten() for p in model.parameters()])


def apart(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("bf16, most", [(False, 2e-3), (True, 0.05)])
def test_a_steps_gradients_are_the_cpus(bf16, most):
    wanted = gradients(make(), Machine(torch.device("cpu"), False, False, 0, 1), batch())
    assert apart(gradients(make(), Machine(GPU, bf16, False, 0, 1), batch()), wanted) < most


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("recompute", ["none", "keep-attention", "full"])
def test_recomputed_and_compiled_gradients_are_the_plain_ones(recompute, compile):
    """The GPU's first attention, inductor, and torch's selective checkpoints together."""
    inputs = batch(side=14)
    assert (3 * 14 * 14 + 16) % 128
    wanted = gradients(make(**HEAD64), Machine(torch.device("cpu"), False, False, 0, 1), inputs)
    torch.compiler.reset()
    found = gradients(make(**HEAD64), Machine(GPU, True, compile, 0, 1, recompute), inputs)
    assert apart(found, wanted) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_sampler_gives_what_the_cpu_gives(guidance):
    (z_v, y, c), found = batch(), {}
    for device in (torch.device("cpu"), GPU):
        model = make().eval().to(device)
        on = [x.to(device) for x in (z_v, y, c)]
        options = dict(steps=4, guidance=guidance)

        def seeded():
            return torch.Generator().manual_seed(3)

        with preferred_attention(device):
            found[device.type] = [
                understand(model, on[0], on[2], generator=seeded(), **options),
                understand(model, on[0], generator=seeded(), reuse_video=True, **options),
                generate(model, on[1], on[2], z_v.shape[1:], generator=seeded(), **options),
                *joint(model, on[2], z_v.shape[1:], generator=seeded(), **options),
            ]
    for gpu, cpu in zip(found["cuda"], found["cpu"]):
        if cpu.dtype == torch.int64:
            assert (gpu.cpu() == cpu).float().mean() > 0.98
        else:
            assert apart(gpu.cpu(), cpu) < 1e-3


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_nothing_waits_for_the_gpu_within_a_step(kind):
    machine, model = Machine(GPU, True, False, 0, 1), make()
    objective = parallelise(model, uni_flow_loss, Run(micro_batch=4), machine)
    optimizers, guard = train.make_optimizers(model, kind, 1e-3, 1e-3), Guard(None, 0, [])
    inputs = [x.to(GPU) for x in batch()]

    def step():
        with autocast(machine):
            loss, _ = objective(*inputs, {"generator": torch.Generator().manual_seed(2)})
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.step(norm, 0, optimizers)

    with distributed.settings(machine):
        step()  # the first one makes angles and moments
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(kind):
    model = make().to(GPU)
    optimizers, guard = train.make_optimizers(model, kind, 1e-3, 1e-3), Guard(None, 1, [])
    states = []
    for value in (1.0, float("nan"), 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        guard.step(torch.tensor(value, device=GPU), 0, optimizers)
        moments = [s.clone() for o in optimizers for of in o.state.values() for s in of.values()]
        states.append([p.detach().clone() for p in model.parameters()] + moments)
    first, second, third = states
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not all(torch.equal(a, b) for a, b in zip(second, third))


@torch.no_grad()
def test_a_text_step_can_be_captured_and_replayed():
    """So nothing in it waits for the GPU, and its keys and values stay where they are."""
    model = make(**HEAD64).eval().to(GPU)
    z_v, y, c = (x.to(GPU) for x in batch())
    one, z_t = torch.ones(4, device=GPU), model.embed(y)
    tau = torch.full((4,), 0.3, device=GPU)
    _, _, memory = model(z_v, z_t, one, tau, c, remember=True)
    wanted = model.text_alone(z_t, tau, memory).clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model.text_alone(z_t, tau, memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        v_t = model.text_alone(z_t, tau, memory)
    z_t.zero_()
    graph.replay()
    assert not torch.allclose(v_t, wanted)
    z_t.copy_(model.embed(y))
    graph.replay()
    assert apart(v_t, wanted) < 1e-5


@torch.no_grad()
def test_captions_from_captured_steps_are_the_plain_ones():
    model = make(**HEAD64).eval().to(GPU)
    found = []
    for steps in nullcontext(), captured_text_steps(model):
        with steps:
            for seed in range(3):  # another KV cache each
                torch.manual_seed(seed)
                z_v, generator = torch.randn(2, 24, 3, 6, 6).to(GPU), torch.Generator()
                states = []
                understand(
                    model,
                    z_v,
                    steps=6,
                    guidance=2.0,
                    reuse_video=True,
                    generator=generator.manual_seed(seed),
                    callback=lambda *state, into=states: into.append(state[4].clone()),
                )
                found.append(states)
    for a, b in zip(found[:3], found[3:]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert "text_alone" not in vars(model)


def test_a_run_on_the_gpu_is_resumed_and_evaluated_there(tmp_path):
    flags = "--generator-steps 3 --recall-steps 3 --refine-steps 3 --batch 8 --eval-clips 8"
    flags += " --save-every 2 --log-every 1 --warmup 1 --compile no --device cuda"
    for name in ("whole", "cut"):
        train.main([*flags.split(), "--out", str(tmp_path / name)])
    out = tmp_path / "cut"
    for later in ("refine", "step-000008"):
        for file in (out / later).iterdir():
            file.unlink()
        (out / later).rmdir()
    train.main(["--resume", "--out", str(out)])
    whole, cut = (
        [json.loads(line)["loss"] for line in (tmp_path / of / "metrics.jsonl").open()]
        for of in ("whole", "cut")
    )
    assert cut == pytest.approx(whole, rel=1e-2) and len(cut) == 9
    assert json.loads((out / "results.json").read_text())["clips"] == 8
