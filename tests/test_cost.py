"""engine.cost's bytes against those that are counted, at three sizes each, within 15%."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import cost
from engine.distributed import Machine, prepare_block
from engine.options import Run
from univigu import Config, UniViGU, generate, joint, understand, uni_flow_loss
from wan.weights import FP32

# width, FFN_v's, heads, rows of tokens of the video, N, L, layers
SIZES = [(96, 560, 6, 32, 16, 16, 4), (192, 1120, 12, 24, 64, 16, 3), (256, 700, 8, 40, 32, 16, 2)]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and not freed yet."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def small(dim, ffn_dim, num_heads, side, text_len, prompt_len, num_layers):
    """A model of those sizes, a latent, tokens and a prompt, and how many tokens a video has."""
    sizes = dict(in_dim=16, out_dim=16, patch_size=(1, 2, 2), prompt_dim=64, vocab_size=100)
    config = Config(
        dim=dim,
        ffn_dim=ffn_dim,
        text_ffn_dim=dim,
        num_heads=num_heads,
        num_layers=num_layers,
        prompt_len=prompt_len,
        text_len=text_len,
        text_dim=16,
        freq_dim=16,
        **sizes,
    )
    z_v, c = torch.randn(1, 16, 1, 2 * side, 2 * side), torch.randn(1, prompt_len, 64)
    return UniViGU(config), z_v, torch.zeros(1, text_len, dtype=torch.int64), c, side * side


@pytest.mark.parametrize("recompute", cost.RECOMPUTE)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bf16", [True, False])
def test_memory_of_a_training_step_is_what_is_counted(bf16, sizes, recompute):
    model, z_v, y, c, n_v = small(*sizes)
    for block in model.blocks:
        prepare_block(block, recompute, False)
    with Live(z_v, y, c, *model.parameters()) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss, _ = uni_flow_loss(model, z_v, y, c, anchor=0.0)
        gc.collect()
        kept = live.peak = live.now
        loss.backward()
    run, count = Run(micro_batch=1, parallel="ddp"), sum(p.numel() for p in model.parameters())
    job = cost.Job(model.config, count, 0, n_v, len(y[0]), batch=1)
    parts = cost.training_memory(job, run, recompute, bf16)
    assert parts["kept for the backward pass"] == pytest.approx(kept, rel=0.15)
    assert parts.pop("weights and Adam's moments") == 12 * count
    assert sum(parts.values()) == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("mode, passes", [("generate", 2), ("joint", 3), ("understand", 1)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bf16", [True, False])
def test_memory_of_sampling_is_what_is_counted(bf16, sizes, mode, passes):
    model, z_v, y, c, n_v = small(*sizes)
    model.eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if bf16 and not FP32.search(name):
            p.data = p.data.bfloat16()
    with Live(z_v, y, c, *model.parameters()) as live:
        if mode == "generate":
            generate(model, y, c, z_v.shape[1:], steps=1, guidance=5.0)
        elif mode == "joint":
            joint(model, c, z_v.shape[1:], steps=1, guidance=5.0)
        else:
            understand(model, z_v, steps=3, reuse_video=True)
    reused = mode == "understand"
    told = cost.sampling_memory(model.config, n_v, len(y[0]), passes, reused, bf16)
    assert told == pytest.approx(live.peak, rel=0.15)


def test_as_few_activations_are_recomputed_as_fit(monkeypatch):
    run, machine = Run(micro_batch=1), Machine(torch.device("cpu"), True, False, 0, 1)
    job = cost.Job(Config(), 10**6, 0, 30_000, 256, batch=1)
    totals = [
        sum(cost.training_memory(job, run, recompute, True).values())
        for recompute in cost.RECOMPUTE
    ]
    assert totals == sorted(totals, reverse=True)
    for recompute, total in zip(cost.RECOMPUTE, totals):
        monkeypatch.setattr(cost, "memory", lambda device, total=total: total * 1.12)
        assert cost.choose_recompute(job, run, machine) == recompute
    monkeypatch.setattr(cost, "memory", lambda device: totals[-1] * 0.99)
    with pytest.raises(ValueError, match="1,000,000 parameters and 1 clips at once take"):
        cost.choose_recompute(job, run, machine)
    run.recompute = "none"
    with pytest.raises(ValueError, match="with recompute none"):
        cost.choose_recompute(job, run, machine)


@pytest.mark.parametrize("recompute", cost.RECOMPUTE)
@pytest.mark.parametrize("sizes", SIZES)
def test_memory_where_the_text_alone_is_trained_is_what_is_counted(sizes, recompute):
    model, z_v, y, c, n_v = small(*sizes)
    for name, p in model.named_parameters():
        p.requires_grad_(model.is_text(name))
        if not p.requires_grad and not FP32.search(name):
            p.data = p.data.bfloat16()
    for block in model.blocks:
        prepare_block(block, recompute, False)
    with Live(z_v, y, c, *model.parameters()) as live:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss, _ = uni_flow_loss(model, z_v, y, c, anchor=0.0)
        gc.collect()
        live.peak = live.now
        loss.backward()
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    job = cost.Job(model.config, count, count - trained, n_v, len(y[0]), batch=1)
    parts = cost.training_memory(job, Run(micro_batch=1), recompute, True)
    assert parts.pop("weights and Adam's moments") == 12 * trained
    assert parts.pop("frozen weights") == 2 * (count - trained)
    assert sum(parts.values()) == pytest.approx(live.peak, rel=0.15)
