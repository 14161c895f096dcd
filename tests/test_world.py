"""engine.world.World: one contract, which toy.World and a wan.World of tiny videos both keep."""

import inspect
import json

import pytest
import torch

import toy
from engine.world import Evaluation, World
from univigu import Config, UniViGU

MEMBERS = [name for name in vars(World) if not name.startswith("_")]


@pytest.fixture(scope="module")
def wan_world(tmp_path_factory):
    """A wan.World of three tiny clips."""
    for module in ("diffusers", "transformers", "av", "ftfy"):
        pytest.importorskip(module, reason=f"{module} is not installed: requirements-wan.txt")
    from tiny_wan import write_clip, write_wan_folder

    import wan.data
    from wan import prepare

    root = tmp_path_factory.mktemp("world")
    write_wan_folder(root / "wan")
    (root / "videos").mkdir()
    rows = []
    for i, prompt in enumerate(["a red ball moves right", "a blue box moves up", "a green cat"]):
        write_clip(root / "videos" / f"{i}.mp4", seed=i)
        rows.append({"video": f"{i}.mp4", "prompt": prompt, "caption": f"{prompt} in the night"})
    (root / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {"--videos": "videos", "--index": "index.jsonl", "--out": "data", "--wan": "wan"}
    argv = [word for flag, name in folders.items() for word in (flag, str(root / name))]
    argv += ["--frames", "9", "--sizes", "32x48", "--caption-tokens", "4-40"]
    prepare.main(argv)
    return wan.data.World(root / "data")


@pytest.fixture(params=["toy", "wan"])
def world(request, one_codec):
    return toy.World() if request.param == "toy" else request.getfixturevalue("wan_world")


@pytest.fixture
def config(world):
    """A tiny model's, that fits the world."""
    batch = world.dataset("train").__getitems__([0])
    return Config(
        in_dim=world.shape[0],
        out_dim=world.shape[0],
        patch_size=(1, 2, 2),
        vocab_size=len(world.tokenizer),
        text_len=world.text_len,
        prompt_dim=batch["c"].shape[2],
        prompt_len=512,
        dim=24,
        num_heads=2,
        num_layers=1,
        ffn_dim=32,
        text_ffn_dim=16,
        text_dim=24,
        freq_dim=16,
    )


def test_every_member_is_documented_once():
    assert len(MEMBERS) > 15
    for name in MEMBERS:
        member = inspect.getattr_static(World, name)
        assert inspect.getdoc(member), name


def test_it_has_every_member(world):
    for name in MEMBERS:
        assert hasattr(world, name), name
    for name in ("dataset", "check", "evaluate"):
        wanted = list(inspect.signature(getattr(World, name)).parameters)[1:]
        assert list(inspect.signature(getattr(world, name)).parameters) == wanted, name


def test_a_batch_has_the_promised_shapes(world):
    dataset = world.dataset("train")
    indices = dataset.batch(0, 2)
    assert len(indices) == 2
    assert [*world.dataset("train").batch(0, 2)] == [*indices]
    batch = dataset.__getitems__(indices)
    assert batch.keys() == {"z_v", "prompt", "caption", "c"}
    assert batch["z_v"].shape == (2, *world.shape) and batch["z_v"].dtype == torch.float32
    assert batch["c"].shape[0] == 2 and batch["c"].ndim == 3 and batch["c"].dtype == torch.float32
    for name in ("prompt", "caption"):
        assert batch[name].shape == (2, world.text_len) and batch[name].dtype == torch.int64
        assert 0 <= batch[name].min() and batch[name].max() < len(world.tokenizer)
    with pytest.raises(ValueError, match="split is 'nowhere', wanted one of"):
        world.dataset("nowhere")


def test_codec_tokenizer_and_prompt_encoder_fit_the_batches(world):
    batch = world.dataset("train").__getitems__([0, 1])
    frames = world.codec.decode(batch["z_v"])
    assert frames.shape == (2, *world.frame_shape)
    assert frames.min() >= -1 and frames.max() <= 1
    assert world.codec.encode(frames).shape == batch["z_v"].shape

    texts = world.tokenizer.decode(batch["prompt"])
    assert all(texts) and torch.equal(world.tokenizer.encode(texts), batch["prompt"])

    c = world.prompt_encoder(texts)
    assert c.ndim == 3 and len(c) == 2 and c.shape[2] == batch["c"].shape[2]
    length = min(c.shape[1], batch["c"].shape[1])
    assert torch.allclose(c[:, :length].float(), batch["c"][:, :length], atol=0.02)


def test_plain_members(world):
    assert len(world.shape) == 4 and world.frame_shape[0] == 3 and len(world.frame_shape) == 4
    assert isinstance(world.fixed_size, bool) and world.fps > 0
    assert isinstance(world.negative_prompt, str)
    assert world.sampling.keys() == {"understand", "generate", "joint"}
    assert json.loads(json.dumps(world.state))["world"] in ("toy", "wan")
    fields = Config.__dataclass_fields__
    assert all(name in fields for name in world.sizes)


def test_check_names_what_does_not_fit(world, config):
    world.check(config)
    for name in ("vocab_size", "text_len", "prompt_dim"):
        wrong = Config(**vars(config) | {name: getattr(config, name) + 24})
        with pytest.raises(ValueError, match=f"^{name} is"):
            world.check(wrong)


def test_an_evaluation_writes_what_it_returns(world, config, tmp_path, capsys, monkeypatch):
    for options in world.sampling.values():
        monkeypatch.setitem(options, "steps", 2)
    torch.manual_seed(0)
    model = UniViGU(config).eval()
    found = world.evaluate(model, tmp_path, 2, 1.5, True)
    assert isinstance(found, Evaluation) and not hasattr(world, "shown")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(
        json.dumps(found.results)
    )
    assert found.results["train_s"] == 1.5 and found.results["wall_s"] >= 1.5
    assert found.shown and capsys.readouterr().out
