"""wan/weights.py on tiny random checkpoints in each real layout.

The numbers against diffusers, the bits against the files, and what is refused.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

for module in ("transformers", "av", "ftfy"):
    pytest.importorskip(
        module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
    )
diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is not installed: pip install -r requirements-wan.txt"
)

from tiny_wan import fake_hub

from univigu import PRESETS, Config, UniViGU, generate, joint, sinusoid, understand
from wan import names, weights
from wan.published import PublishedUniViGU, latents_of
from wan.weights import export, is_wan, load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
L = 7  # prompt tokens; Wan has 512
FILE = "diffusion_pytorch_model.safetensors"
SMALL = dict(prompt_len=L, vocab_size=29, text_len=6)  # what a tiny checkpoint cannot say itself
SIZES = dict(
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=256,
    ffn_dim=80,
    num_layers=3,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randomise(module, seed=0):
    """Makes every tensor random: none stays at zero or one. Outputs have a deviation of about 1."""
    g = seeded(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            r = torch.randn(p.shape, generator=g)
            p.copy_(
                1 + 0.3 * r
                if p.ndim == 1 and name.endswith("weight")
                else 0.3 * r
                if p.ndim == 1 or p.shape[0] == 1
                else 0.5 * r / p[0].numel() ** 0.5
            )
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def peer():
    return randomise(diffusers.WanTransformer3DModel(**SIZES))


@pytest.fixture(scope="module")
def folders(peer, tmp_path_factory):
    """The same weights in each layout, none written by export().

    diffusers wrote the first; names and values of the others follow facts about them.
    """
    root = tmp_path_factory.mktemp("layouts")
    peer.save_pretrained(root / "diffusers" / "transformer")
    tensors = {official(name): tensor for name, tensor in peer.state_dict().items()}
    config = dict(
        _class_name="WanModel",
        _diffusers_version="0.30.0",
        dim=48,
        eps=1e-6,
        ffn_dim=80,
        freq_dim=256,
        in_dim=16,
        model_type="t2v",
        num_heads=3,
        num_layers=3,
        out_dim=16,
        text_len=L,
    )
    write_wan(root / "official", config, tensors)
    write_wan(root / "sharded", config, tensors, shards=3)
    (root / "official" / "Wan2.1_VAE.pth").write_bytes(b"as in the real folder")
    model = load(root / "official", **SMALL)
    model.save_pretrained(root / "own")
    torch.save({"model": published(tensors), "step": 3}, root / "published.pth")
    return root


def write_wan(folder, config, tensors, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    files = {
        name: f"diffusion_pytorch_model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def replaced(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def official(name):
    """diffusers' name -> Wan's own."""
    if "blocks." not in name:
        return replaced(
            name,
            [
                ("condition_embedder.", ""),
                ("text_embedder.linear_1", "text_embedding.0"),
                ("text_embedder.linear_2", "text_embedding.2"),
                ("time_embedder.linear_1", "time_embedding.0"),
                ("time_embedder.linear_2", "time_embedding.2"),
                ("time_proj.", "time_projection.1."),
                ("proj_out", "head.head"),
                ("scale_shift_table", "head.modulation"),
            ],
        )
    return replaced(
        name,
        [
            ("attn1", "self_attn"),
            ("attn2", "cross_attn"),
            ("to_out.0", "o"),
            ("to_", ""),
            ("norm2", "norm3"),
            ("net.0.proj", "0"),
            ("net.2", "2"),
            ("scale_shift_table", "modulation"),
        ],
    )


def published(tensors, vocab=29, text=True):
    """A checkpoint with exactly the keys of the authors' release.

    Its video model is that of official `tensors`.
    """
    g, d, f, layers = seeded(5), 48, 80, 3
    r = lambda *shape: torch.randn(shape, generator=g) * 0.5 / shape[-1] ** 0.5
    keys = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            name = replaced(
                name,
                [
                    ("norm3", "norm2"),
                    (".modulation", ".scale_shift_table"),
                    ("ffn.0", "ffn.net.0.proj"),
                    ("ffn.2", "ffn.net.2"),
                    *(
                        (f"{kind}_attn.{a}.", f"attn{i}.{b}.")
                        for i, kind in ((1, "self"), (2, "cross"))
                        for a, b in (
                            ("q", "to_q"),
                            ("k", "to_k"),
                            ("v", "to_v"),
                            ("o", "to_out.0"),
                            ("norm_q", "norm_q"),
                            ("norm_k", "norm_k"),
                        )
                    ),
                ],
            )
        else:
            name = replaced(
                name,
                [
                    ("text_embedding.0", "cond_text_embedder.linear_1"),
                    ("text_embedding.2", "cond_text_embedder.linear_2"),
                    ("time_embedding.0", "time_embedding_v.time_embedder.linear_1"),
                    ("time_embedding.2", "time_embedding_v.time_embedder.linear_2"),
                    ("time_projection.1", "time_embedding_v.time_proj"),
                    ("head.modulation", "scale_shift_table_v"),
                    ("head.head", "video_head.proj_out"),
                ],
            )
        keys[name] = tensor
    if text:
        keys |= {
            "vocab_embed.weight": r(vocab, d),
            "scale_shift_table_t": r(1, 2, d),
            "text_head.norm_final.weight": 1 + r(d),
            "text_head.linear.weight": r(vocab, d),
            "text_head.linear.bias": r(vocab),
            "time_embedding_t.time_embedder.linear_1.weight": r(d, 256),
            "time_embedding_t.time_embedder.linear_1.bias": r(d),
            "time_embedding_t.time_embedder.linear_2.weight": r(d, d),
            "time_embedding_t.time_embedder.linear_2.bias": r(d),
            "time_embedding_t.time_proj.weight": r(6 * d, d),
            "time_embedding_t.time_proj.bias": r(6 * d),
            "rotary_emb_text.inv_freq": 1 / 10000 ** (torch.arange(0, 16, 2).float() / 16),
        }
        for i in range(layers):
            keys |= {
                f"blocks.{i}.ffn_t.net.0.proj.weight": r(f, d),
                f"blocks.{i}.ffn_t.net.0.proj.bias": r(f),
                f"blocks.{i}.ffn_t.net.2.weight": r(d, f),
                f"blocks.{i}.ffn_t.net.2.bias": r(d),
            }
    return keys


def inputs(size=(3, 6, 10), b=2, length=L, seed=1):
    g = seeded(seed)
    return torch.randn(b, 16, *size, generator=g), torch.randn(b, length, 32, generator=g)


def gap(a, b):
    return (a.double() - b.double()).abs().max().item()


def state(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def wan_part(model):
    return {name: p for name, p in state(model).items() if not model.is_text(name)}


# ---------------------------------------------------------------- the numbers, against diffusers


@pytest.mark.parametrize("layout", ["official", "sharded", "diffusers", "diffusers/transformer"])
@pytest.mark.parametrize("size, length", [((3, 6, 10), L), ((1, 2, 2), 1), ((5, 10, 2), 4)])
@pytest.mark.parametrize("tau", [(0.0, 0.137), (1.0, 0.5), (0.998, 0.3)])
@torch.no_grad()
def test_v_v_is_minus_diffusers_output_at_t_1000_times_1_minus_tau(
    peer, folders, layout, size, length, tau
):
    model = load(folders / layout, **SMALL)
    (z_v, c), tau = inputs(size, length=length), torch.tensor(tau)
    padded = torch.nn.functional.pad(c, (0, 0, 0, L - length))  # zeros that Wan attends to
    v_v, v_t = model(z_v, None, tau, None, c)
    wanted = -peer(z_v, 1000 * (1 - tau), padded, return_dict=False)[0]
    assert v_t is None and wanted.std() > 0.1
    assert gap(v_v, wanted) <= 1e-5
    assert (
        gap(v_v, -wanted) > 0.1
        and gap(v_v, -peer(z_v, 1000 * tau, padded, return_dict=False)[0]) > 1e-3
    )  # neither sign nor direction is free


@torch.no_grad()
def test_what_remains_against_diffusers_is_its_clock_in_fp32(peer, folders, monkeypatch):
    """Wan computes the clock's sinusoids in float64, diffusers in fp32.

    With the same sinusoids the two agree to the last bits.
    """
    monkeypatch.setattr(
        peer.condition_embedder.timesteps_proj, "forward", lambda t: sinusoid(1 - t / 1000, 256)
    )
    model, (z_v, c), tau = (
        load(folders / "diffusers", **SMALL),
        inputs(),
        torch.tensor([0.137, 0.9], dtype=torch.float64),
    )
    assert (
        gap(
            model(z_v, None, tau.float(), None, c)[0],
            -peer(z_v, 1000 * (1 - tau.float().double()), c, return_dict=False)[0],
        )
        <= 1e-6
    )


def runs_in_fp32(name):
    """Whether Wan computes with a parameter in fp32.

    It does with norms, modulation tables and the networks of the clocks.
    """
    return any(
        part.startswith(("norm", "time_")) or part == "modulation" for part in name.split(".")
    )


@torch.no_grad()
def test_bf16_leaves_in_fp32_what_wan_runs_in_it_and_errs_no_more_than_diffusers(peer, folders):
    model, half = load(folders / "official", dtype=torch.bfloat16, **SMALL), copy.deepcopy(peer)
    for name, p in half.named_parameters():
        if not set(name.split(".")) & set(half._keep_in_fp32_modules):
            p.data = p.data.bfloat16()  # as its from_pretrained(torch_dtype=torch.bfloat16) does
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: torch.float32 if runs_in_fp32(name) else torch.bfloat16
        for name, _ in model.named_parameters()
    }
    assert {
        official(name) for name, p in half.named_parameters() if p.dtype == torch.float32
    } < set(filter(runs_in_fp32, wan_part(model)))
    exact = load_file(folders / "official/diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(p, exact[name] if runs_in_fp32(name) else exact[name].bfloat16())
        for name, p in wan_part(model).items()
    )
    seen = []
    for norm in (model.blocks[0].self_attn.norm_q, model.blocks[0].cross_attn.norm_k):
        norm.register_forward_hook(lambda module, x, y: seen.append((x[0].dtype, y.dtype)))
    ours, theirs = [], []
    for seed in range(6):
        (z_v, c), tau = inputs(seed=seed), torch.rand(2, generator=seeded(seed))
        exact = -peer(z_v, 1000 * (1 - tau), c, return_dict=False)[0]
        ours.append((model(z_v, None, tau, None, c.bfloat16())[0] - exact).square().mean())
        theirs.append(
            (-half(z_v.bfloat16(), 1000 * (1 - tau), c.bfloat16(), return_dict=False)[0] - exact)
            .square()
            .mean()
        )
    ours, theirs = sum(ours).sqrt().item(), sum(theirs).sqrt().item()
    print(f"\nbf16 error, deviation over 6 batches: {ours:.4f}, diffusers' {theirs:.4f}")
    assert ours <= theirs
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}  # q and k have the dtype of v


class SameGrid(diffusers.FlowMatchEulerDiscreteScheduler):
    """The pipeline asks for a number of steps only.

    Its own grid would end at sigma 0.003 and shift that twice.
    """

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1], device=device)


@pytest.mark.parametrize("steps, shift, guidance", [(50, 3, 5), (1, 1, 1), (7, 8, 6)])
def test_generate_ends_where_diffusers_pipeline_ends(peer, folders, steps, shift, guidance):
    c, c_null = torch.randn(2, 2, L, 32, generator=seeded(3))
    c_null[:, 2:] = 0
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=SameGrid(shift=shift),
        transformer=peer,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 16, 3, 6, 10, generator=seeded(4))
    wanted = pipeline(
        prompt_embeds=c,
        negative_prompt_embeds=c_null,
        latents=noise,
        height=48,
        width=80,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).frames
    model = load(folders / "official", **SMALL)
    z_v = generate(
        model,
        None,
        c,
        (16, 3, 6, 10),
        steps=steps,
        shift=shift,
        guidance=guidance,
        c_null=c_null,
        generator=seeded(4),
    )
    print(
        f"\n{steps} steps: {gap(z_v, wanted):.1e} apart, deviation {wanted.std():.2f}, "
        f"from noise {gap(noise, wanted):.1f}"
    )
    assert gap(z_v, wanted) <= 1e-3 and gap(noise, wanted) > 0.5


# ---------------------------------------------------------------- the bits, and there and back


@pytest.mark.parametrize(
    "layout", ["official", "sharded", "diffusers", "diffusers/transformer", "own"]
)
def test_every_layout_gives_the_same_video_model_to_the_bit(folders, layout):
    assert same(
        wan_part(load(folders / layout, **SMALL)),
        load_file(folders / "official" / "diffusion_pytorch_model.safetensors"),
    )


def read_by_diffusers(folder, monkeypatch):
    """diffusers' own from_pretrained, in fp32.

    What it keeps in fp32 in other dtypes makes no difference here, but it would want accelerate.
    """
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    options = dict(subfolder="transformer", output_loading_info=True, low_cpu_mem_usage=False)
    peer, info = diffusers.WanTransformer3DModel.from_pretrained(folder, **options)
    assert not any(info.values()), info
    return peer


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_official_to_ours_to_diffusers_to_ours_to_official_changes_no_bit(
    folders, tmp_path, monkeypatch, shard
):
    monkeypatch.setattr(weights, "SHARD", shard)
    export(load(folders / "official", **SMALL), tmp_path / "diffusers", "diffusers")
    assert same(
        state(read_by_diffusers(tmp_path / "diffusers", monkeypatch)),
        load_file(folders / "diffusers/transformer/diffusion_pytorch_model.safetensors"),
    )
    export(load(tmp_path / "diffusers", **SMALL), tmp_path / "official", "official")
    files = sorted((tmp_path / "official").glob("*.safetensors"))
    sharded = (tmp_path / "official" / f"{FILE}.index.json").exists()
    assert sharded == (len(files) > 2) == (shard != "5GB")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert same(tensors, load_file(folders / "official" / FILE))
    back, start = (load(root / "official", **SMALL) for root in (tmp_path, folders))
    assert same(wan_part(back), wan_part(start))


def test_a_model_in_bf16_is_exported_without_loss_in_one_dtype_and_diffusers_runs_it(
    folders, tmp_path, monkeypatch
):
    model = load(folders / "official", dtype=torch.bfloat16, **SMALL)
    (z_v, c), tau = inputs(), torch.tensor([0.3, 0.8])
    wanted = {name: p.float() for name, p in wan_part(model).items()}
    for layout in ("official", "diffusers"):
        export(model, tmp_path / layout, layout)
        back = load(tmp_path / layout, dtype=torch.bfloat16, **SMALL)
        assert same(wan_part(back), wan_part(model))
    assert same(load_file(tmp_path / "official" / FILE), wanted)
    peer = read_by_diffusers(tmp_path / "diffusers", monkeypatch)
    assert same({official(name): p for name, p in state(peer).items()}, wanted)
    v_v = load(tmp_path / "official", **SMALL)(z_v, None, tau, None, c)[0]
    assert gap(v_v, -peer(z_v, 1000 * (1 - tau), c, return_dict=False)[0]) <= 1e-5
    export(model.bfloat16(), tmp_path / "official", "official")
    assert same(load_file(tmp_path / "official" / FILE), wan_part(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_exported_configs_are_the_real_ones(folders, tmp_path):
    model = load(folders / "official", **SMALL)
    for layout, folder in (("official", "official"), ("diffusers", "diffusers/transformer")):
        export(model, tmp_path / folder.split("/")[0], layout)
        found, real = (
            json.loads((root / folder / "config.json").read_text()) for root in (tmp_path, folders)
        )
        assert found["_class_name"] == real["_class_name"]
        # the last three are null in diffusers' own
        for name in ("_diffusers_version", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            found.pop(name, None), real.pop(name, None)
        assert found == real


@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_real_sizes_have_diffusers_names_and_shapes(preset):
    c = PRESETS[preset]
    with torch.device("meta"):
        ours = UniViGU(c)
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=c.num_heads,
            attention_head_dim=128,
            num_layers=c.num_layers,
            ffn_dim=c.ffn_dim,
        )
    renamed = {
        names.rename(name, names.DIFFUSERS): p.shape
        for name, p in ours.named_parameters()
        if not ours.is_text(name)
    }
    assert renamed == {name: p.shape for name, p in theirs.named_parameters()}
    for name, _ in ours.named_parameters():
        if not name.startswith("text_in."):
            assert names.our_name(names.their_name(name, "published"), "published") == name


def test_a_saved_model_comes_back_by_load_and_by_from_pretrained(folders, tmp_path):
    model = randomise(load(folders / "official", **SMALL, text_output="x1", text_shift=2.0))
    model.save_pretrained(tmp_path)
    for back in (load(tmp_path), UniViGU.from_pretrained(tmp_path)):
        assert same(state(back), state(model)) and back.config == model.config
    assert load(tmp_path, text_len=9, patch_size=(1, 2, 2)).config.text_len == 9


def test_a_loaded_model_does_not_change_with_its_file(folders, tmp_path):
    target, _ = copy_of(folders / "official", tmp_path)
    model, file = load(target, **SMALL), target / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert same(
        wan_part(model), load_file(folders / "official/diffusion_pytorch_model.safetensors")
    )


def test_config_and_layout_are_told_without_reading_weights(folders, monkeypatch):
    loaded = {
        name: load(folders / name, text_len=6, text_shift=3.0).config
        for name in ("official", "sharded", "diffusers", "own", "published.pth")
    }
    monkeypatch.setattr(weights, "read_tensor", lambda *_: 1 / 0)
    assert {
        name: weights.config(folders / name, text_len=6, text_shift=3.0) for name in loaded
    } == loaded
    assert [weights.layout(folders / name) for name in loaded] == [
        "official",
        "official",
        "diffusers",
        "own",
        "published",
    ]


# ---------------------------------------------------------------- what is new


def test_the_new_text_stream_is_initialised_listed_and_nothing_else_is(folders, capsys):
    torch.manual_seed(0)
    model = load(folders / "official", **SMALL)
    lines = capsys.readouterr().out.splitlines()
    count = sum(p.numel() for name, p in model.named_parameters() if model.is_text(name))
    names = sorted(line.split()[1].rstrip(",") for line in lines)
    assert names == [
        "blocks.*.ffn_t",
        "head_t",
        "text_in",
        "time_embedding_t",
        "time_projection_t",
        "token_embedding",
    ]
    assert (
        sum(int(line.split()[2].replace(",", "")) for line in lines) == count
        and f"new: token_embedding, {29 * 64:,} parameters" in lines
    )
    p = state(model)
    for name, deviation in {
        "token_embedding.weight": 1,
        "text_in.weight": (2 / (48 + 64)) ** 0.5,
        "blocks.1.ffn_t.2.weight": (2 / (48 + 48)) ** 0.5,
        "head_t.modulation": 48**-0.5,
    }.items():
        assert abs(p[name].std() / deviation - 1) < 0.2, name
    assert (
        p["head_t.head.weight"].eq(0).all()
        and p["head_t.norm.weight"].eq(1).all()
        and p["blocks.0.ffn_t.0.bias"].eq(0).all()
    )
    for clock in ("time_embedding", "time_projection"):  # start_text() was called
        assert same(getattr(model, clock + "_t").state_dict(), getattr(model, clock).state_dict())
    config = model.config
    assert (config.text_ffn_dim, config.text_dim) == (48, PRESETS["wan-1.3b"].text_dim)
    assert latents_of(config) == "normalised"
    torch.manual_seed(0)
    assert same(state(load(folders / "diffusers", **SMALL)), p)  # the seed decides what is new

    block = load(folders / "official", **SMALL, text_ffn_init="copy", text_ffn_dim=80).blocks[2]
    assert same(block.ffn_t.state_dict(), block.ffn.state_dict())
    capsys.readouterr()
    load(folders / "own")
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- the published layout


@pytest.mark.parametrize("prefix", ["", "_fsdp_wrapped_module.", "_orig_mod."])
def test_a_published_checkpoint_loads_with_no_key_left_over_and_all_three_modes_run(
    peer, folders, tmp_path, prefix, capsys
):
    keys = published(load_file(folders / "official/diffusion_pytorch_model.safetensors"))
    torch.save(
        {
            "model": {
                prefix + name.replace("blocks.1.", f"blocks.1.{prefix}"): tensor
                for name, tensor in keys.items()
            }
        },
        tmp_path / "model.pth",
    )
    model = load(tmp_path if prefix else tmp_path / "model.pth", prompt_len=L)
    assert (
        capsys.readouterr().out == "" and len(state(model)) == len(keys) - 1
    )  # but for the buffer
    c = model.config
    assert isinstance(model, PublishedUniViGU) and latents_of(c) == "raw"
    assert (c.num_heads, c.num_layers, c.vocab_size) == (3, 3, 29)
    assert (c.text_flow, c.text_dim, c.text_ffn_dim) == ("discrete", 48, 80)
    p = state(model)
    for ours, theirs in {
        "token_embedding.weight": "vocab_embed.weight",
        "time_embedding_t.2.bias": "time_embedding_t.time_embedder.linear_2.bias",
        "time_projection_t.1.weight": "time_embedding_t.time_proj.weight",
        "head_t.modulation": "scale_shift_table_t",
        "head.modulation": "scale_shift_table_v",
        "head_t.norm.weight": "text_head.norm_final.weight",
        "head_t.head.bias": "text_head.linear.bias",
        "blocks.1.ffn_t.0.weight": "blocks.1.ffn_t.net.0.proj.weight",
        "blocks.2.norm3.bias": "blocks.2.norm2.bias",
    }.items():
        assert torch.equal(p[ours], keys[theirs]), ours
    z_v, prompt = inputs()
    tau = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        assert (
            gap(
                model(z_v, None, tau, None, prompt)[0],
                -peer(z_v, 1000 * (1 - tau), prompt, return_dict=False)[0],
            )
            <= 1e-5
        )
    y = understand(model, z_v, steps=3, length=5, generator=seeded(0))
    assert y.shape == (2, 5) and y.dtype == torch.int64 and 0 <= y.min() and y.max() < 29
    video = generate(
        model, y, prompt, (16, 3, 6, 10), steps=3, shift=3, guidance=5, generator=seeded(0)
    )
    both = joint(
        model, prompt, (16, 3, 6, 10), steps=3, shift=3, text_shift=3, length=5, generator=seeded(0)
    )
    assert (
        video.shape == both[0].shape == z_v.shape
        and video.isfinite().all()
        and both[0].isfinite().all()
        and both[1].shape == (2, 5)
    )


def test_a_published_checkpoint_without_the_video_model_takes_it_from_its_base(folders, tmp_path):
    whole = published(load_file(folders / "official/diffusion_pytorch_model.safetensors"))
    part = {
        name: tensor
        for name, tensor in whole.items()
        if "attn" not in name and not name.startswith("patch")
    }
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(
        ValueError,
        match=r"does not fit the model: 62 missing: patch_embedding.weight, .*; with base= ",
    ) as error:
        load(tmp_path / "part.pth")
    assert "blocks.0.attn1.to_q.weight" in str(error.value)
    torch.save({"model": whole}, tmp_path / "whole.pth")
    for base in ("official", "diffusers"):
        assert same(
            state(load(tmp_path / "part.pth", base=folders / base, prompt_len=L)),
            state(load(tmp_path / "whole.pth", prompt_len=L)),
        )
    with pytest.raises(ValueError, match="base .* layout own"):
        load(tmp_path / "part.pth", base=folders / "own")
    with pytest.raises(ValueError, match="for a checkpoint of layout official"):
        load(folders / "official", base=folders / "official")


def test_wrong_text_frequencies_are_refused(folders, tmp_path):
    keys = published(load_file(folders / "official/diffusion_pytorch_model.safetensors"))
    torch.save(
        {"model": keys | {"rotary_emb_text.inv_freq": keys["rotary_emb_text.inv_freq"].flip(0)}},
        tmp_path / "model.pth",
    )
    with pytest.raises(ValueError, match="rotary_emb_text.inv_freq is not"):
        load(tmp_path / "model.pth")


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pth_that_would_run_code_is_refused_and_does_not_run_it(folders, tmp_path):
    mark = tmp_path / "executed"
    torch.save(
        {
            "model": torch.load(folders / "published.pth", weights_only=True)["model"],
            "extra": Touch(mark),
        },
        tmp_path / "model.pth",
    )
    with pytest.raises(ValueError, match="model.pth holds more than tensors"):
        load(tmp_path / "model.pth")
    assert not mark.exists()
    torch.load(tmp_path / "model.pth", weights_only=False)  # the trap works
    assert mark.exists()


# ---------------------------------------------------------------- what is refused


def copy_of(folder, tmp_path, **config):
    target = tmp_path / "copy"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    where = target / "transformer" if (target / "transformer").exists() else target
    (where / "config.json").write_text(
        json.dumps(json.loads((where / "config.json").read_text()) | config)
    )
    return target, where


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_error(folders, tmp_path):
    target, where = copy_of(folders / "diffusers", tmp_path)
    file = where / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.1.attn1.to_q.weight"], tensors["scale_shift_table"]
    tensors |= {
        "blocks.0.norm3.weight": torch.ones(48),
        "blocks.0.attn2.add_k_proj.weight": torch.ones(48, 48),
        "proj_out.bias": torch.ones(63),
    }
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        load(target, **SMALL)
    for part in (
        "2 missing: ",
        "blocks.1.attn1.to_q.weight",
        "scale_shift_table",
        "2 unexpected: ",
        "blocks.0.norm3.weight",
        "blocks.0.attn2.add_k_proj.weight",
        "1 mis-shaped: proj_out.bias (63,), wanted (64,)",
    ):
        assert part in str(error.value), part
    target, _ = copy_of(folders / "official", tmp_path, num_layers=5)
    with pytest.raises(ValueError, match=r"54 missing: blocks.3.modulation.* and 34 more$"):
        load(target, **SMALL)
    target, _ = copy_of(folders / "official", tmp_path, num_layers=2)
    with pytest.raises(ValueError, match="27 unexpected: .*blocks.2"):
        load(target, **SMALL)


@pytest.mark.parametrize(
    "layout, changes, message",
    [
        ("official", dict(model_type="i2v"), "model_type 'i2v', wanted 't2v'"),
        ("official", dict(qk_norm=False), "qk_norm False"),
        (
            "official",
            dict(_class_name="WanVACE"),
            "_class_name 'WanVACE', wanted one of WanModel, WanTransformer3DModel",
        ),
        (
            "diffusers",
            dict(qk_norm="rms_norm"),
            "qk_norm 'rms_norm', wanted 'rms_norm_across_heads'",
        ),
        ("diffusers", dict(cross_attn_norm=False), "cross_attn_norm False, wanted True"),
        ("diffusers", dict(image_dim=1280), "image_dim 1280"),
        ("diffusers", dict(added_kv_proj_dim=48), "added_kv_proj_dim 48"),
        ("diffusers", dict(num_layers="three"), "num_layers is 'three'"),
        ("diffusers", dict(patch_size=2), "wrong type"),
        ("own", dict(temperature=1), "config.json has temperature, wanted fields of Config"),
    ],
)
def test_configs_of_other_models_are_refused_by_name(folders, tmp_path, layout, changes, message):
    with pytest.raises(ValueError, match=message):
        load(copy_of(folders / layout, tmp_path, **changes)[0])


@pytest.mark.parametrize(
    "folder, given, index, message",
    [
        (
            "diffusers",
            "",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "transformer_2",
        ),
        ("diffusers/transformer_2", "", {}, "two models, it has transformer_2"),
        ("diffusers/transformer_2", "transformer_2", {}, "it has transformer_2"),
        ("diffusers/transformer_2", "transformer", {}, "it has transformer_2"),
        ("official/high_noise_model", "", {}, "it has high_noise_model"),
        ("official/low_noise_model", "low_noise_model", {}, "it has low_noise_model"),
        ("diffusers", "", {"expand_timesteps": True}, "the 5B of Wan2.2, wanted a Wan2.1"),
    ],
)
def test_a_wan_of_two_models_is_refused_whichever_part_is_given(
    folders, tmp_path, folder, given, index, message
):
    """Half of Wan2.2 would draw, without a word."""
    kind, _, second = folder.partition("/")
    target, where = copy_of(folders / kind, tmp_path)
    if second:
        shutil.copytree(where, target / second)
    (target / "model_index.json").write_text(json.dumps(index))
    assert is_wan(target / given)
    with pytest.raises(ValueError, match=message):
        load(target / given)


def test_a_wan_without_a_second_transformer_says_so_in_its_index(folders, tmp_path):
    target, _ = copy_of(folders / "diffusers", tmp_path)
    index = {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    (target / "model_index.json").write_text(json.dumps(index))
    assert weights.layout(target) == "diffusers"


@pytest.mark.parametrize("kind", ["official", "diffusers", "published"])
def test_prefixes_of_other_programs_are_stripped(folders, tmp_path, kind):
    """FSDP and torch.compile also put them within a name."""
    wrapped = lambda name: "module._orig_mod." + name.replace("attn", "_orig_mod.attn", 1)
    if kind == "published":
        stored = torch.load(folders / "published.pth")["model"]
        torch.save({"model": {wrapped(name): x for name, x in stored.items()}}, tmp_path / "m.pth")
        return assert_same_model(tmp_path / "m.pth", folders / "published.pth")
    target, where = copy_of(folders / kind, tmp_path)
    tensors = {name: x.clone() for name, x in load_file(where / FILE).items()}  # not of the file
    for prefix in ("model.", "module.", "diffusion_model.", "model.diffusion_model."):
        save_file({prefix + name: x for name, x in tensors.items()}, where / FILE)
        assert weights.config(target) == weights.config(folders / kind)
    save_file({wrapped(name): x for name, x in tensors.items()}, where / FILE)
    assert_same_model(target, folders / kind)
    name = next(iter(tensors))
    save_file(tensors | {"module." + name: tensors[name].clone()}, where / FILE)
    with pytest.raises(ValueError, match=f"{name} more than once"):
        load(target)


def assert_same_model(one, other):
    assert same(wan_part(load(one, **SMALL)), wan_part(load(other, **SMALL)))


def test_a_file_or_folder_of_another_program_is_told_for_what_it_is(folders, tmp_path):
    tensors, comfy = load_file(folders / "official" / FILE), tmp_path / "wan.safetensors"
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}
    for content, message in (
        ({f"model.diffusion_model.{n}": x for n, x in tensors.items()}, "Wan's weights .official"),
        (lora, "a LoRA, wanted a whole model"),
        ({"unet.conv_in": torch.ones(2)}, "1 tensors that are no Wan's .unet.conv_in, ...."),
    ):
        save_file(content, comfy)
        for given in (comfy, tmp_path):  # alone, and in a folder of its own
            assert is_wan(given)
            with pytest.raises(ValueError, match=f"checkpoint {comfy} holds .*{message}"):
                load(given)
    with pytest.raises(ValueError, match=f"one file of a checkpoint, .* {folders / 'own'}$"):
        load(folders / "own" / "model.safetensors")
    pointer = tmp_path / "m.pth"
    for file in (comfy, pointer):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(ValueError, match=f"{file} is a git-lfs pointer.* `git lfs pull`"):
            load(file)


@pytest.mark.parametrize(
    "layout, overrides, message",
    [
        ("official", dict(heads=3), "overrides have heads, wanted fields of Config"),
        ("official", dict(num_heads=6), "num_heads is 6 among the overrides, wanted 3 of"),
        ("official", dict(dim=64), "dim is 64 among the overrides, wanted 48 of"),
        (
            "diffusers",
            dict(patch_size=(1, 1, 1)),
            r"patch_size is \(1, 1, 1\) among the overrides, wanted \(1, 2, 2\) of",
        ),
        ("own", dict(vocab_size=30), "vocab_size is 30 among the overrides, wanted 29 of"),
        ("own", dict(text_dim=32), "4 mis-shaped: .*token_embedding.weight"),
        ("published.pth", dict(num_layers=2), "num_layers is 2 among the overrides, wanted 3 of"),
        ("official", dict(text_flow="discrete"), "text_dim is 64, wanted dim"),
        ("official", dict(dtype=torch.int64), "dtype is torch.int64"),
    ],
)
def test_overrides_that_the_checkpoint_contradicts_are_refused(folders, layout, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(folders / layout, **overrides)


@pytest.mark.parametrize(
    "layout, file",
    [
        ("official", "diffusion_pytorch_model.safetensors"),
        ("sharded", "diffusion_pytorch_model-00002-of-00003.safetensors"),
        ("own", "model.safetensors"),
        ("own", "config.json"),
        ("published", "published.pth"),
    ],
)
@pytest.mark.parametrize("left", [0, 7, 0.5, 0.999])
def test_truncated_files_are_refused_by_name(folders, tmp_path, layout, file, left):
    target = tmp_path / "copy"
    if layout == "published":
        target.mkdir()
        shutil.copy(folders / file, target)
    else:
        shutil.copytree(folders / layout, target)
    size = (target / file).stat().st_size
    os.truncate(target / file, int(left * size) if left < 1 else left)
    with pytest.raises(ValueError, match=file) as error:
        load(target)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_values_that_are_not_finite_are_refused_by_name(folders, tmp_path):
    target, where = copy_of(folders / "official", tmp_path)
    tensors = load_file(where / "diffusion_pytorch_model.safetensors")
    tensors["blocks.2.ffn.0.bias"][3] = math.nan
    save_file(tensors, where / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="blocks.2.ffn.0.bias holds NaN or infinity"):
        load(target)


def test_what_is_no_checkpoint_is_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="/no/such/folder is neither here nor on the hub"):
        load("/no/such/folder")
    with pytest.raises(
        FileNotFoundError, match="holds no checkpoint, found nothing, wanted config.json"
    ):
        load(tmp_path)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="found a.pth, b.pth"):
        load(tmp_path)
    with pytest.raises(ValueError, match="config.json is a file, wanted a folder or a .pth file"):
        load(folders / "official" / "config.json")
    for content in ([1], {"weights": {}}, {"model": [torch.ones(2)]}, {"model": {"a": 1}}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(
            ValueError,
            match="a.pth is not read, found .*, wanted torch.save of a dict with tensors",
        ):
            load(tmp_path / "a.pth")
    target, _ = copy_of(folders / "sharded", tmp_path)
    (target / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="lacks diffusion_pytorch_model-00003-of-00003.safetensors"
    ):
        load(target)
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json cannot be read: KeyError: 'weight_map'"):
        load(target)


def test_export_replaces_its_own_and_touches_nothing_else(folders, tmp_path, monkeypatch):
    model = load(folders / "official", **SMALL)
    with pytest.raises(ValueError, match="layout is 'wan', wanted one of official, diffusers"):
        export(model, tmp_path / "out", "wan")
    assert not (tmp_path / "out").exists()
    export(model, tmp_path / "out", "official")
    randomise(model, seed=1)
    export(model, tmp_path / "out", "official")
    assert same(load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"), wan_part(model))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]
    before = (tmp_path / "out/diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr(weights, "save_torch_state_dict", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "out", "official")
    assert (
        sorted(f.name for f in tmp_path.iterdir()) == ["out"]
        and (tmp_path / "out/diffusion_pytorch_model.safetensors").read_bytes() == before
    )
    (tmp_path / "out" / "Wan2.1_VAE.pth").write_bytes(b"precious")
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "out", tmp_path / "file", folders / "own", folders):
        with pytest.raises(ValueError, match="exists and is no export"):
            export(model, path, "official")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return fake_hub(tmp_path, monkeypatch)


SHARDS = {f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
REPOSITORIES = {  # layout: files beside it that nobody needs, its JSON files, its weights
    "official": (
        ["models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model", "README.md"],
        {"config.json"},
        {FILE},
    ),
    "sharded": (["Wan2.1_VAE.pth"], {"config.json", FILE + ".index.json"}, SHARDS),
    "diffusers": (
        [
            "vae/" + FILE,
            "vae/config.json",
            "text_encoder/model-00001-of-00005.safetensors",
            "model_index.json",
        ],
        {"model_index.json", "transformer/config.json"},
        {"transformer/" + FILE},
    ),
    "own": (["README.md", "training_state.pt"], {"config.json"}, {"model.safetensors"}),
    "published": (["README.md", "demo.mp4", "config.json"], set(), {"published.pth"}),
}


@pytest.fixture(params=REPOSITORIES)
def repository(request, folders, tmp_path):
    """ "someone/repo" in one layout; layout, JSON files, weights."""
    repo, (extras, stored, files) = tmp_path / "someone" / "repo", REPOSITORIES[request.param]
    if request.param == "published":
        repo.mkdir(parents=True)
        shutil.copy(folders / "published.pth", repo)
    else:
        shutil.copytree(folders / request.param, repo)
    for name in extras:
        (repo / name).parent.mkdir(exist_ok=True, parents=True)
        (repo / name).write_text('{"not": "needed"}')
    return request.param, stored, files


def test_of_a_hub_repository_only_the_transformer_is_fetched(folders, hub, repository):
    layout, stored, files = repository
    model = load("someone/repo", **SMALL)
    assert hub - {"config.json"} == (stored | files) - {"config.json"}
    assert same(wan_part(model), load_file(folders / "official" / FILE))


def test_config_and_layout_fetch_json_and_headers_but_no_weights(
    folders, tmp_path, hub, repository, capsys, monkeypatch
):
    layout, stored, files = repository
    asked = (
        stored | {f"header of {name}" for name in files}
        if layout != "published"
        else {"config.json", *files}
    )
    assert weights.layout("someone/repo") == ("official" if layout == "sharded" else layout)
    note = capsys.readouterr().err
    assert note.count("\n") == (layout == "published") and (
        "has no header to read alone" in note
    ) == (layout == "published")
    wanted = load(
        folders / (layout if layout != "published" else "published.pth"), text_shift=3.0
    ).config
    assert weights.config("someone/repo", text_shift=3.0) == wanted and hub == asked
    assert layout == "published" or not [*(tmp_path / "cache").rglob("*.safetensors")]
    assert capsys.readouterr().err == ""  # the .pth is here now: nothing needs to be said
    load("someone/repo")
    monkeypatch.setattr(weights, "parse_safetensors_file_metadata", lambda *_: 1 / 0)
    assert (
        weights.config("someone/repo", text_shift=3.0) == wanted
    )  # downloaded weights tell it without the network


def test_the_base_of_a_published_checkpoint_is_not_fetched_either(folders, tmp_path, hub):
    shutil.copytree(folders / "diffusers", tmp_path / "someone" / "repo")
    keys = published(load_file(folders / "official" / FILE))
    torch.save(
        {
            "model": {
                name: tensor
                for name, tensor in keys.items()
                if "attn" not in name and not name.startswith("patch")
            }
        },
        tmp_path / "part.pth",
    )
    assert (
        weights.config(tmp_path / "part.pth", base="someone/repo")
        == load(folders / "published.pth").config
    )
    assert hub == {"transformer/config.json", f"header of transformer/{FILE}"}


def test_hub_failures_are_one_clear_error(folders, hub, tmp_path, monkeypatch):
    (tmp_path / "someone" / "empty").mkdir(parents=True)
    for call in (load, weights.config, weights.layout):
        with pytest.raises(
            FileNotFoundError,
            match="^someone/empty holds no checkpoint, found nothing, wanted config.json",
        ):
            call("someone/empty")
    shutil.copytree(folders / "sharded", tmp_path / "someone" / "repo")
    (tmp_path / "someone" / "repo" / min(SHARDS)).unlink()
    with pytest.raises(
        FileNotFoundError,
        match="^someone/repo is neither here nor on the hub: EntryNotFoundError: 404: "
        "no diffusion_pytorch_model-00001",
    ):
        weights.config("someone/repo")
    with pytest.raises(
        FileNotFoundError, match="lacks diffusion_pytorch_model-00001-of-00003.safetensors"
    ):
        load("someone/repo")

    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(weights, "snapshot_download", fail)
    for call in (load, weights.config, weights.layout):
        with pytest.raises(
            FileNotFoundError,
            match="^someone/repo is neither here nor on the hub: ConnectionError: no network$",
        ):
            call("someone/repo")


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from wan.weights import load
load(sys.argv[2], vocab_size=50)                                    # what only the first use costs
def status(key):
    lines = open("/proc/self/status")
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
before = status("VmRSS")
model = load(sys.argv[3], vocab_size=50, dtype=getattr(torch, sys.argv[4]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, (status("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_while_loading_peaks_at_about_one_copy(folders, tmp_path):
    sizes = dict(dim=512, ffn_dim=2048, num_heads=4, num_layers=11, in_dim=16, out_dim=16)
    with torch.device("meta"):
        model = UniViGU(Config(**sizes, patch_size=(1, 2, 2), prompt_dim=4096))
    write_wan(
        tmp_path,
        dict(sizes, _class_name="WanModel", eps=1e-6, freq_dim=256, model_type="t2v", text_len=512),
        {
            name: torch.full(p.shape, 0.1)
            for name, p in model.named_parameters()
            if not model.is_text(name)
        },
    )
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, ROOT, folders / "official", tmp_path, dtype],
            capture_output=True,
            text=True,
            check=True,
        )
        size, copies = map(float, done.stdout.splitlines()[-1].split())
        print(f"\n{dtype}: {size / 1e6:.0f} MB, peak {copies:.2f} copies")
        assert size > 100e6 and 0.9 < copies < 1.5
