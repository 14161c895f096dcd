"""Many samples at once: each comes out as it would alone.

And how sure a model is of captions, and the best of several.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import sample
import train
from engine.cost import MOST_AT_ONCE, Sampling, samples_at_once
from engine.score import Confidence, text_losses
from engine.video import read_video, write_video
from toy import World, shapes, words
from univigu import PRESETS, Config, UniViGU, generate, joint, noise_like, understand
from wan.published import PublishedConfig, PublishedUniViGU

SMALL = dict(
    in_dim=4, out_dim=4, dim=48, ffn_dim=64, text_ffn_dim=64, num_heads=2, num_layers=2,
    prompt_dim=16, prompt_len=8, text_len=8, vocab_size=40,
)  # fmt: skip
SHAPE = (4, 3, 4, 4)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make(kind):
    """A random model: as the toy's, as Wan's, as the published one."""
    torch.manual_seed(0)
    config = {
        "toy": Config(**SMALL, text_dim=16, text_output="x1", text_shift=4.0),
        "wan": Config(**SMALL, text_dim=16, patch_size=(1, 2, 2)),
        "published": PublishedConfig(**SMALL, text_dim=48, patch_size=(1, 2, 2)),
    }[kind]
    model = (PublishedUniViGU if kind == "published" else UniViGU)(config)
    with torch.no_grad():  # a new model's last layers are zero
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module", params=["toy", "wan", "published"])
def model(request):
    return make(request.param)


def given(b):
    """z_v, y, c of b samples."""
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(b, *SHAPE, generator=g),
        torch.randint(2, 40, (b, 8), generator=g),
        torch.randn(b, 8, 16, generator=g),
    )


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("mode", ["understand", "understand once", "generate", "joint"])
def test_samples_of_a_batch_are_what_they_are_alone(mode, guidance, model):
    z_v, y, c = given(3)

    def run(*which):
        more = {"steps": 4, "guidance": guidance, "generator": seeded(*which)}
        which = list(which)
        if mode == "generate":
            return (generate(model, y[which], c[which], SHAPE, **more),)
        if mode == "joint":
            return joint(model, c[which], SHAPE, **more)
        once = mode.endswith("once")
        return (understand(model, z_v[which], c[which], reuse_video=once, **more),)

    together, alone = run(0, 1, 2), [run(i) for i in range(3)]
    for found, *each in zip(together, *alone):
        wanted = torch.cat(each)
        if found.is_floating_point():
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            assert (found[0] - found[1]).abs().max() > 0.1
        else:
            assert found.equal(wanted)


def test_one_generator_in_a_list_draws_what_it_draws_alone(model):
    z_v, _, c = given(1)
    for draw in (
        lambda g: noise_like(z_v, g),
        lambda g: understand(model, z_v, c, steps=3, generator=g),
        lambda g: joint(model, c, SHAPE, steps=3, guidance=2, generator=g)[0],
    ):
        assert draw(seeded(5)[0]).equal(draw(seeded(5)))


def test_there_is_a_generator_for_each_sample(model):
    with pytest.raises(ValueError):
        noise_like(torch.zeros(3, 2), seeded(0, 1))
    with pytest.raises(ValueError):
        model.text_flow.noise(model, torch.zeros(2, 4), 8, seeded(0, 1, 2))


# ---------------------------------------------------------------- how sure, and the best of some


def test_confidence_is_the_mean_certainty_of_what_is_written():
    """Over token ids: logits of known probabilities; what follows the end does not count."""
    model = SimpleNamespace()
    p = torch.tensor([[[0.1, 0.2, 0.7], [0.1, 0.6, 0.3], [0.9, 0.05, 0.05]]])  # (1, N, V)
    q = torch.tensor([[[0.2, 0.3, 0.5], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3]]])
    y = torch.zeros(1, 3, dtype=torch.int64)
    sure = Confidence(model)
    for k, of in enumerate((None, p, q)):
        sure(k, 1.0, k / 2, None, y, None, None if of is None else of.log())
    whole = (0.7 + 0.6 + 0.9 + 0.5 + 0.8 + 0.4) / 6
    assert sure.of(torch.tensor([[2, 2, 0]])).item() == pytest.approx(whole)
    ended = (0.7 + 0.6 + 0.5 + 0.8) / 4
    assert sure.of(torch.tensor([[2, 1, 0]])).item() == pytest.approx(ended)


def test_over_embeddings_a_row_itself_is_certain_and_between_two_is_not():
    model, y = make("toy"), torch.tensor([[3, 4]])
    E = model.embedding_matrix().detach()
    found = []
    for z_t1 in (E[y], (E[y] + E[y + 2]) / 2):
        sure = Confidence(model)
        sure(0, 1.0, 0.0, None, torch.zeros_like(z_t1), None, None)
        sure(1, 1.0, 1.0, None, z_t1, None, z_t1)
        found.append(sure.of(y).item())
    on_it, between = found
    assert on_it == 1 and 0 < between < 0.6


# ---------------------------------------------------------------- sample.py


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A toy of random weights, as train.py writes it."""
    out = tmp_path_factory.mktemp("run")
    flags = "--stages generator,recall,refine --generator-steps 1 --recall-steps 1 --refine-steps 1"
    tiny = "--dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --batch 4"
    end = "--eval-clips 0 --compile no --device cpu --precision fp32"
    train.main([*flags.split(), *tiny.split(), *end.split(), "--out", str(out)])
    return out / "refine"


@pytest.fixture
def use(checkpoint, capsys):
    def call(mode, *words):
        capsys.readouterr()
        sample.main([mode, "--checkpoint", str(checkpoint), *map(str, words)])
        return capsys.readouterr().out

    return call


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def assert_alike(found, wanted):
    """Rows that differ in the last digit of confidence at most."""
    assert [row.pop("confidence") for row in found] == pytest.approx(
        [row.pop("confidence") for row in wanted], abs=0.0011
    )
    assert found == wanted


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """Five clips, and one that cannot be read."""
    monkeypatch.chdir(tmp_path)
    frames = shapes.render(shapes.sample(range(5), "seen"))
    (tmp_path / "videos").mkdir()
    for i in range(5):
        write_video(tmp_path / "videos" / f"{i}.npy", frames[i : i + 1])
    (tmp_path / "videos" / "2b.npy").write_bytes(b"broken")
    return "videos"


def test_captions_of_a_batch_are_those_of_one_by_one(use, videos, tmp_path):
    wanted = rows_of(use("understand", "--videos", videos))
    for n in (2, 3, 16):
        said = use("understand", "--videos", videos, "--batch", n, "--out", f"{n}.jsonl")
        assert said == (tmp_path / f"{n}.jsonl").read_text()
        assert_alike(rows_of(said), [dict(row) for row in wanted])
    assert [row["video"] for row in wanted] == [f"{i}.npy" for i in range(5)]


@pytest.mark.parametrize("mode", ["generate", "joint"])
def test_videos_of_a_batch_are_those_of_one_by_one(mode, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = words.brief(shapes.sample(range(5), "seen").attributes)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    use(mode, "--prompts", "prompts.txt", "--out", "one", "--steps", 3)
    use(mode, "--prompts", "prompts.txt", "--out", "many", "--steps", 3, "--batch", 2)
    one, many = (rows_of((tmp_path / name / "index.jsonl").read_text()) for name in ("one", "many"))
    if mode == "joint":
        assert_alike(one, many)
    assert one == many and len(one) == 5
    for row in one:
        a, b = (read_video(tmp_path / name / row["video"]) for name in ("one", "many"))
        assert (a - b).abs().max() < 0.02  # a shade of 255


def test_a_stop_keeps_the_batches_before(use, videos, tmp_path, monkeypatch):
    whole, calls, real = use("understand", "--videos", videos), [], sample.understand

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    flags = ["--videos", videos, "--batch", 2, "--out", "said.jsonl"]
    monkeypatch.setattr(sample, "understand", stopped)
    with pytest.raises(KeyboardInterrupt):
        use("understand", *flags)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 2
    use("understand", *flags)
    assert_alike(rows_of((tmp_path / "said.jsonl").read_text()), rows_of(whole))


def test_the_best_of_several_has_the_smallest_text_loss(use, videos, checkpoint, monkeypatch):
    drawn, losses, real = [], [], sample.understand
    monkeypatch.setattr(
        sample, "understand", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1]
    )
    monkeypatch.setattr(
        sample, "text_losses", lambda *a, **k: losses.append(text_losses(*a, **k)) or losses[-1]
    )
    first = rows_of(use("understand", "--videos", videos, "--batch", 5))
    assert losses == [] and len(drawn) == 1
    best = rows_of(use("understand", "--videos", videos, "--batch", 5, "--best-of", 3))
    (alone, *texts), (of,) = drawn, losses
    assert texts[0].equal(alone) and not texts[1].equal(alone)  # the first is that of best-of 1
    which = of.argmin(1).tolist()
    wanted = [World().tokenizer.decode(texts[k][i : i + 1])[0] for i, k in enumerate(which)]
    assert [row["caption"] for row in best] == wanted and len(first) == len(best) == 5


def test_a_single_caption_is_printed_alone(use, videos):
    text = use("understand", "--video", f"{videos}/0.npy", "--best-of", 2)
    assert text.count("\n") == 1 and "{" not in text


def test_as_many_as_fit_a_gpu_go_at_once(monkeypatch):
    options, config = {"guidance": 1.0, "reuse_video": True}, PRESETS["wan-1.3b"]
    job = Sampling(config, 1_400_000_000, (16, 21, 60, 104), "understand", options, True)
    gpu = SimpleNamespace(type="cuda")
    each = job.memory(gpu)
    assert 1e9 < each < 2e10
    for free, wanted in ((0, 1), (2.8e9 + each * 4 / 0.8 + 1, 4), (1e15, MOST_AT_ONCE)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (math.ceil(free), 0))
        assert samples_at_once(job, gpu) == wanted
    assert samples_at_once(job, torch.device("cpu")) == 1


def test_a_dry_run_counts_the_batch(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle moving right\n" * 4)
    flags = ["--prompts", "prompts.txt", "--out", "drawn", "--dry-run"]
    assert "at once" not in use("joint", *flags)
    assert "GB of activations for 4 at once" in use("joint", *flags, "--batch", 4)
