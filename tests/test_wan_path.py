"""The whole real path on a tiny random Wan: prepare, train, sample.

Recall and refine start from the loaded generator; the three modes sample from and to files.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

for module in ("diffusers", "transformers", "av", "ftfy"):
    pytest.importorskip(
        module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
    )

import av
from conftest import refusal
from tiny_wan import fake_hub, write_clip, write_wan_folder

import sample
import train
import wan
from engine.checkpoint import checkpoints
from engine.video import read_video
from univigu import UniViGU, uni_flow_loss
from wan import evaluate, prepare
from wan.names import PUBLISHED, rename
from wan.published import PublishedUniViGU, build, config_from

pytestmark = pytest.mark.slow

SIZE = "--size 32x48 --frames 9 --steps 3".split()
PREPARE = "--frames 9 --sizes 32x48 --caption-tokens 4-40".split()
TRAIN = "--recall-steps 3 --refine-steps 4 --batch 2 --log-every 1 --warmup 0".split()
ONE_STEP = "--stages refine --refine-steps 1 --batch 1 --eval-clips 0".split()
PROMPTS = ["a red ball moves right", "a blue box moves up", "a green cat"]


def start(path):
    return ["--init", path / "wan"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_json(path):
    return json.loads(path.read_text())


def prepare_into(out, root, index, *flags):
    here = ["--videos", root / "videos", "--index", index, "--wan", root / "wan", "--out", out]
    prepare.main([str(flag) for flag in (*here, *PREPARE, *flags)])


def trained(data, out, *flags, **varied):
    train.main([str(flag) for flag in ("--data", data, "--out", out, *flags)], **varied)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The folder in which the path was walked once: wan, videos, data, run."""
    root, begin = tmp_path_factory.mktemp("path"), time.time()
    write_wan_folder(root / "wan")
    (root / "videos").mkdir()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        write_clip(root / "videos" / f"{i}.mp4", seed=i)
        caption = f"{prompt} on a dark background with a static camera"
        rows.append({"video": f"{i}.mp4", "prompt": prompt, "caption": caption})
    write_rows(root / "index.jsonl", rows)
    prepare_into(root / "data", root, root / "index.jsonl")
    trained(root / "data", root / "run", "--init", root / "wan", *TRAIN)
    for row in rows:
        del row["caption"]
    write_rows(root / "prompts.jsonl", rows)
    prepare_into(root / "prompts", root, root / "prompts.jsonl")
    (root / "seconds").write_text(str(time.time() - begin))
    return root


def use(capsys, *flags):
    sample.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def refused(capsys, *flags):
    line = refusal(capsys, sample.main, *flags)
    assert line.startswith("sample.py: error: ")
    return line


def frames_of(path):
    """The shapes of a video's frames, and its rate."""
    with av.open(str(path)) as file:
        shapes = [frame.to_ndarray(format="rgb24").shape for frame in file.decode(video=0)]
        return shapes, file.streams.video[0].average_rate


def test_stages_start_from_the_generator_and_move_every_text_parameter(path):
    stages = [line["stage"] for line in read_rows(path / "run" / "metrics.jsonl")]
    assert stages == ["recall"] * 3 + ["refine"] * 4
    recall, start = UniViGU.from_pretrained(path / "run" / "recall"), wan.load(path / "wan")
    after, before = dict(recall.named_parameters()), dict(start.named_parameters())
    same_shape = [
        name for name in after if name in before and after[name].shape == before[name].shape
    ]
    moved = {name for name in same_shape if not after[name].equal(before[name])}
    video = {"patch_embedding.weight", "blocks.0.ffn.0.weight"}
    text = {"blocks.1.ffn_t.2.weight", "head_t.head.weight"}
    assert video | text <= moved
    gaps = [(after[n] - p).abs().max().item() for n, p in before.items() if not start.is_text(n)]
    assert 0 < max(gaps) < 0.01  # three steps of 2e-4: it is still Wan


def test_the_run_uses_the_papers_settings_and_all_of_umt5s_tokens(path):
    stored = read_json(path / "run" / "refine" / "train.json")["train"]
    assert (stored["clocks"], stored["anchor"]) == ("independent", 0.0)
    assert (stored["recall_p_drop"], stored["refine_p_drop"]) == (0.7, 0.1)
    assert (stored["recall_optimizer"], stored["recall_lr"], stored["refine_lr"]) == (
        "adam",
        2e-4,
        5e-5,
    )
    config = read_json(path / "run" / "refine" / "config.json")
    manifest = read_json(path / "data" / "manifest.json")
    world = read_json(path / "run" / "refine" / "world.json")
    assert config["vocab_size"] == manifest["vocab_size"] > len(manifest["vocabulary"])
    assert world["vocabulary"] is None and world["sampling"] == wan.World.sampling
    results = read_json(path / "run" / "results.json")
    assert results["clips"] == 3 and results["loss"]["train"]["video (caption)"] > 0
    assert len(results["captions"]) == 2 and isinstance(results["joint"], str)
    assert results["captions"][0].keys() == {"written", "with prompt", "wanted"}
    for mode in ("generate", "joint"):
        assert len(frames_of(path / "run" / f"{mode}.mp4")[0]) == 9


@pytest.mark.parametrize("checkpoint", ["run/recall", "run/refine"])
def test_three_modes_from_and_to_files(path, checkpoint, tmp_path, capsys):
    here = ["--checkpoint", path / checkpoint, *SIZE]
    drawn, both, text = (tmp_path / name for name in ("drawn.mp4", "both.mp4", "said.txt"))
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", drawn)
    sizes, fps = frames_of(drawn)
    assert sizes == [(32, 48, 3)] * 9 and fps == 16
    caption = use(capsys, "joint", *here, "--prompt", PROMPTS[0], "--out", both)
    assert frames_of(both)[0] == sizes
    assert caption.endswith("\n") and caption.count("\n") == 1
    describe = ["understand", *here, "--video", path / "videos" / "0.mp4"]
    said = use(capsys, *describe, "--out", text)
    assert said == text.read_text()
    assert said == use(capsys, *describe)  # the same seed


def test_an_evaluation_draws_what_sample_draws_with_the_same_seed(path, tmp_path, capsys):
    """From the same noise, with the same prompt, null prompt and sampler."""
    found = read_json(path / "run" / "results.json")
    world = wan.World(path / "data", full_vocabulary=True)
    assert (path / "data" / "negative.safetensors").is_file() and world.c_null.any()
    clip = world.dataset(found["split"])[0]
    prompt, caption = world.tokenizer.decode(torch.stack([clip["prompt"], clip["caption"]]))
    here = ["--checkpoint", path / "run" / "refine", "--prompt", prompt, "--seed", found["seed"]]
    use(capsys, "generate", *here, "--caption", caption, "--out", tmp_path / "generate.mp4")
    said = use(capsys, "joint", *here, "--out", tmp_path / "joint.mp4")
    assert said == found["joint"] + "\n"
    for name in ("generate.mp4", "joint.mp4"):
        assert (tmp_path / name).read_bytes() == (path / "run" / name).read_bytes()
    (path / "data" / "negative.safetensors").rename(tmp_path / "negative")  # as older data
    try:
        assert not wan.World(path / "data", full_vocabulary=True).c_null.any()
    finally:
        (tmp_path / "negative").rename(path / "data" / "negative.safetensors")


def test_the_text_alone_is_trained_and_its_checkpoint_is_taken_by_every_command(
    path, tmp_path, capsys
):
    out, whole = tmp_path / "run", path / "run" / "refine" / "model.safetensors"
    trained(path / "data", out, "--init", path / "wan", "--train", "text", *TRAIN)
    weights = load_file(out / "refine" / "model.safetensors")
    assert weights and all(UniViGU.is_text(name) for name in weights)
    assert (out / "refine" / "model.safetensors").stat().st_size < whole.stat().st_size / 2
    base = read_json(out / "refine" / "train.json")["base"]
    assert base["checkpoint"] == str(path / "wan") and len(base["digest"]) == 16
    state = torch.load(out / "refine" / "training_state.pt", weights_only=True)
    assert all(UniViGU.is_text(name) for name in state["optimizers"]["state"])
    before, after = wan.load(path / "wan"), wan.load(out / "refine")
    kept = dict(before.named_parameters())
    for name, p in after.named_parameters():
        assert UniViGU.is_text(name) or torch.equal(p, kept[name]), name
    assert all(torch.equal(x, after.get_parameter(name)) for name, x in weights.items())

    here = ["--checkpoint", out / "refine", *SIZE]
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "drawn.mp4")
    assert use(capsys, "understand", *here, "--video", path / "videos" / "0.mp4")
    assert "parameters" in use(capsys, "joint", *here, "--prompt", PROMPTS[0], "--dry-run")
    more = tmp_path / "more"  # goes on from it, with the same base
    trained(path / "data", more, "--init", out / "refine", "--train", "text", *ONE_STEP)
    assert read_json(more / "refine" / "train.json")["base"] == base
    trained(path / "data", tmp_path / "all", "--init", out / "refine", *ONE_STEP)
    assert "base" not in read_json(tmp_path / "all" / "refine" / "train.json")
    wan.export(after, tmp_path / "exported", "official")

    shutil.move(path / "wan" / "transformer", tmp_path / "transformer")
    try:
        said = refused(capsys, "joint", *here, "--prompt", PROMPTS[0])
        assert "lacks its base" in said and str(path / "wan") in said
    finally:
        shutil.move(tmp_path / "transformer", path / "wan" / "transformer")
    other = write_wan_folder(tmp_path / "other", seed=7)
    change_json(out / "refine" / "train.json", base=base | {"checkpoint": str(other)})
    said = refused(capsys, "joint", *here, "--prompt", PROMPTS[0])
    assert "was trained on the weights" in said and base["digest"] in said
    for wrong, words in (
        (base | {"checkpoint": 5}, "wanted the path or hub id"),
        ("wan", "wanted the path or hub id"),
        (base | {"checkpoint": str(more / "refine")}, "holds a text stream alone"),
    ):
        change_json(out / "refine" / "train.json", base=wrong)
        assert words in refused(capsys, "joint", *here, "--prompt", PROMPTS[0])


@pytest.mark.parametrize(
    "flags", [["--stages", "refine"], ["--init", "x", "--stages", "generator,recall"]]
)
def test_the_text_alone_needs_a_generator(flags, tmp_path, capsys):
    said = refusal(capsys, train.main, "--train", "text", "--out", tmp_path / "run", *flags)
    assert "train is 'text'" in said and "--init" in said


def change_json(file, **values):
    file.write_text(json.dumps(read_json(file) | values))


def test_words_that_the_data_never_had_may_be_asked_for(path, tmp_path, capsys):
    here = ["--checkpoint", path / "run" / "refine", *SIZE, "--out", tmp_path / "drawn.mp4"]
    for mode in ("generate", "joint"):
        use(capsys, mode, *here, "--prompt", "Zeppelins, 99 of them!")
    trained(path / "data", tmp_path / "run", "--vocabulary", "data", *start(path), *ONE_STEP)
    manifest = read_json(path / "data" / "manifest.json")
    config = read_json(tmp_path / "run" / "refine" / "config.json")
    assert config["vocab_size"] == len(manifest["vocabulary"]) < 60
    here[1] = tmp_path / "run" / "refine"
    assert "Zeppelins" in refused(capsys, "generate", *here, "--prompt", "Zeppelins, 99 of them!")


# ---------------------------------------------------------------- two sets of data


def test_each_stage_may_have_its_own_data_and_recall_needs_no_captions(path, tmp_path, capsys):
    seen = []

    def loss(model, z_v1, y, *args, **options):
        seen.append(y)
        return uni_flow_loss(model, z_v1, y, *args, **options)

    sets = ["--recall-data", path / "prompts", "--refine-data", path / "data"]
    for vocabulary in ("full", "data"):
        out, seen[:] = tmp_path / vocabulary, []
        flags = [*sets, *start(path), *TRAIN, "--vocabulary", vocabulary, "--out", out]
        train.main([str(flag) for flag in flags], loss=loss)
        world = wan.World.restore(read_json(out / "refine" / "world.json"))
        texts = [set(world.tokenizer.decode(y)) for y in seen]
        assert all(said <= {*PROMPTS} for said in texts[:3])
        assert all(said and not said & {*PROMPTS} for said in texts[3:])
    assert (tmp_path / "data" / "results.json").exists()


def test_recall_alone_learns_and_is_measured_without_captions(path, tmp_path, capsys):
    flags = [*start(path), *TRAIN]
    for stages in ([], ["--stages", "refine"]):
        with pytest.raises(SystemExit):
            trained(path / "prompts", tmp_path / "no", *flags, *stages)
        assert "no captions, which stage refine learns to write" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    trained(path / "prompts", tmp_path / "run", *flags, "--stages", "recall")
    results = read_json(tmp_path / "run" / "results.json")
    assert results["captions"][0]["wanted"] in PROMPTS
    assert not any("(caption)" in name for name in results["loss"]["train"])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--latents", "raw"], ["latents is", "'raw'", "'normalised'"]),
        (["--prompt-tokens", "0-150"], ["text_len is", "150", "128"]),
    ],
)
def test_two_sets_that_differ_in_what_a_model_sees_are_refused(more, words, path, tmp_path, capsys):
    prepare_into(tmp_path / "other", path, path / "prompts.jsonl", *more)
    flags = ["--recall-data", tmp_path / "other", *start(path), *TRAIN]
    with pytest.raises(SystemExit):
        trained(path / "data", tmp_path / "run", *flags)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert all(word in line for word in words) and not (tmp_path / "run").exists()


def test_the_toy_and_a_folder_do_not_go_together(path, tmp_path, capsys):
    with pytest.raises(SystemExit):
        trained("toy", tmp_path / "run", "--recall-data", path / "prompts")
    assert "wanted folders, or the toy" in capsys.readouterr().err
    asks = "--stages", "generator", "--generator-prompt", "caption"
    said = refusal(capsys, train.main, "--data", path / "data", *asks)
    assert "generator_prompt is 'caption', wanted 'prompt'" in said


def test_many_prompts_and_a_folder_of_videos(path, tmp_path, capsys):
    here = ["--checkpoint", path / "run" / "refine", *SIZE]
    prompts, drawn, said = (tmp_path / name for name in ("prompts.txt", "drawn", "said.jsonl"))
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    use(capsys, "generate", *here, "--prompts", prompts, "--out", drawn)
    names = [f"{i:05d}.mp4" for i in range(3)]
    wanted = [{"video": name, "prompt": prompt} for name, prompt in zip(names, PROMPTS)]
    assert read_rows(drawn / "index.jsonl") == wanted
    assert all(len(frames_of(drawn / name)[0]) == 9 for name in names)
    use(capsys, "understand", *here, "--videos", drawn, "--out", said)
    assert [row["video"] for row in read_rows(said)] == names
    assert all(isinstance(row["caption"], str) for row in read_rows(said))


def test_captions_are_measured_by_the_model_that_wrote_them(path, tmp_path, capsys):
    """Windows are read as sample.py reads them: the latents that the model sees are the same."""
    pytest.importorskip("pycocoevalcap", reason="pip install -r requirements-wan.txt")
    seen: list = []

    def spy(function):
        def call(model, z_v, *rest, **options):
            seen.append(z_v)
            return function(model, z_v, *rest, **options)

        return call

    here = ["--checkpoint", path / "run" / "refine", "--size", "32x48", "--frames", "5"]
    said, out = tmp_path / "said.jsonl", tmp_path / "scores.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "understand", spy(sample.understand))
        videos = ["--videos", path / "videos"]
        use(capsys, "understand", *here, *videos, "--window", "--steps", "2", "--out", said)
    described, seen[:] = list(seen), []
    rows = [row | {"caption": f"a cat {i}"} for i, row in enumerate(read_rows(said))]
    write_rows(said, rows)
    assert len(rows) > 3 and {row["window"] for row in rows} >= {0, 1}
    flags = ["--captions", said, "--references", path / "index.jsonl", *here, *videos]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "text_losses", spy(evaluate.text_losses))
        evaluate.main([str(flag) for flag in (*flags, "--out", out)])
    assert all(map(torch.equal, seen, described)) and len(seen) == len(described) == len(rows)
    found = read_json(out)
    assert found["clips"] == 3 and found["captions without references"] == len(rows) - 3
    assert found["agreement"]["clips"] == len(rows) and 0 <= found["agreement"]["share"] <= 1


def test_many_at_once_are_what_they_are_alone_though_sizes_differ(path, tmp_path, capsys):
    here = ["--checkpoint", path / "run" / "refine", *SIZE]
    (tmp_path / "videos").mkdir()
    for i, frames in enumerate((9, 9, 5, 6, 9)):
        write_clip(tmp_path / "videos" / f"{i}.mp4", seed=i, frames=frames, fps=16)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert_same_in_batches(tmp_path, capsys, here)


def assert_same_in_batches(folder, capsys, here):
    """The three modes on folder's videos/ and prompts.txt, one by one and up to three at once."""
    few = [], ["--batch", 3]
    one, many = (use(capsys, "understand", *here, "--videos", folder / "videos", *n) for n in few)
    one, many = ([json.loads(line) for line in text.splitlines()] for text in (one, many))
    assert same_rows(one, many) and len(one) == len(list((folder / "videos").iterdir()))
    for mode in ("generate", "joint"):
        out = [folder / f"{mode}-{len(n)}" for n in few]
        for n, to in zip(few, out):
            use(capsys, mode, *here, "--prompts", folder / "prompts.txt", "--out", to, *n)
        one, many = (read_rows(to / "index.jsonl") for to in out)
        assert same_rows(one, many) and len(one) == 3
        for row in one:
            a, b = (read_video(to / row["video"], (9, 32, 48)) for to in out)
            assert (a - b).abs().mean() < 0.01  # mp4 loses some


def same_rows(one, many):
    """Whether rows are the same, but for the last digit of a confidence."""
    sure = [[row.pop("confidence", 0) for row in rows] for rows in (one, many)]
    return sure[0] == pytest.approx(sure[1], abs=0.0011) and one == many


def test_a_run_that_was_stopped_goes_on_where_it_was(path, tmp_path, capsys):
    prompts, drawn = tmp_path / "prompts.txt", tmp_path / "drawn"
    prompts.write_text("\n".join(PROMPTS))
    here = ["--checkpoint", path / "run" / "refine", *SIZE]
    flags = ["generate", *here, "--prompts", prompts, "--out", drawn]
    use(capsys, *flags)
    first, second, _ = files = [drawn / f"{i:05d}.mp4" for i in range(3)]
    whole, index = second.read_bytes(), (drawn / "index.jsonl").read_text()
    stamp = first.stat().st_mtime_ns
    second.unlink()
    (drawn / "index.jsonl").write_text(index[: index.index("\n") + 1])
    use(capsys, *flags)
    assert all(file.is_file() for file in files)
    assert second.read_bytes() == whole and first.stat().st_mtime_ns == stamp
    assert (drawn / "index.jsonl").read_text() == index


def test_a_broken_video_of_many_is_left_out_and_said_so(path, tmp_path, capsys):
    write_clip(tmp_path / "good.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    here, said = ["--checkpoint", path / "run" / "refine", *SIZE], tmp_path / "said.jsonl"
    sample.main(["understand", *map(str, here), "--videos", str(tmp_path), "--out", str(said)])
    found = capsys.readouterr()
    assert [row["video"] for row in read_rows(said)] == ["good.mp4"]
    assert found.out == said.read_text()
    assert "cut.mp4" in found.err


def test_the_published_layout_samples_in_all_modes_and_may_be_trained(path, tmp_path, capsys):
    """The authors' layout on the tiny Wan's sizes.

    Text is discrete, its padding is not looked at, latents are raw.
    """
    state = dict(wan=path / "wan", vocabulary=None, latents="raw", text_len=12, prompt_len=512)
    vocab = len(wan.World.restore(state).tokenizer)
    sizes = dict(text_flow="discrete", text_dim=24, text_ffn_dim=48, vocab_size=vocab)
    values = dataclasses.asdict(wan.config(path / "wan")) | sizes | {"latents": "raw"}
    torch.manual_seed(0)
    tensors = {
        rename(name, PUBLISHED): p.detach() + 0.02 * torch.randn_like(p)
        for name, p in build(config_from(values)).named_parameters()
    }
    tensors["rotary_emb_text.inv_freq"] = 10000 ** -(torch.arange(0, 12, 2) / 12)
    torch.save({"model": tensors}, tmp_path / "published.pth")
    here = ["--checkpoint", tmp_path / "published.pth", "--wan", path / "wan", *SIZE]
    drawn, both = tmp_path / "drawn.mp4", tmp_path / "both.mp4"
    assert use(capsys, "understand", *here, "--video", path / "videos" / "0.mp4").count("\n") == 1
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", drawn)
    use(capsys, "joint", *here, "--prompt", PROMPTS[0], "--out", both)
    assert len(frames_of(drawn)[0]) == len(frames_of(both)[0]) == 9

    shutil.copytree(path / "videos", tmp_path / "videos")
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], PROMPTS[0][::-1], "a cat"]))
    assert_same_in_batches(tmp_path, capsys, here)

    more = ["--caption-tokens", "4-256", "--latents", "raw"]
    prepare_into(tmp_path / "data", path, path / "index.jsonl", *more)
    once = ["--init", tmp_path / "published.pth", "--vocabulary", "full", *ONE_STEP]
    trained(tmp_path / "data", tmp_path / "run", *once, "--refine-lr", 0)
    after, start = wan.load(tmp_path / "run" / "refine"), wan.load(tmp_path / "published.pth")
    assert isinstance(after, PublishedUniViGU) and after.config.latents == "raw"
    # nothing trained was initialised anew
    assert all(after.get_parameter(name).equal(p) for name, p in start.named_parameters())


def test_stages_may_go_on_from_a_runs_checkpoint_but_not_with_other_tokens(path, tmp_path):
    data_alone = ["--vocabulary", "data", *ONE_STEP]
    trained(path / "data", tmp_path / "first", *start(path), *data_alone)
    again = ["--init", tmp_path / "first" / "refine", *data_alone]
    trained(path / "data", tmp_path / "again", *again)
    assert (tmp_path / "again" / "refine" / "model.safetensors").is_file()
    rows = read_rows(path / "index.jsonl")
    rows[0]["caption"] = rows[0]["caption"].replace("dark", "grey").replace("camera", "sky")
    write_rows(tmp_path / "index.jsonl", rows)
    prepare_into(tmp_path / "other", path, tmp_path / "index.jsonl")
    with pytest.raises(SystemExit) as end:
        trained(tmp_path / "other", tmp_path / "wrong", *again)
    assert "vocab" in str(end.value.code) and not (tmp_path / "wrong").exists()


# ---------------------------------------------------------------- a run that is stopped


def assert_same_weights(out, path):
    """Bit for bit those of the run that nobody stopped, and the same losses on the way there."""
    for stage in ("recall", "refine"):
        found = load_file(out / stage / "model.safetensors")
        wanted = load_file(path / "run" / stage / "model.safetensors")
        assert found.keys() == wanted.keys(), stage
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), stage
    found, wanted = (
        [line["loss"] for line in read_rows(run / "metrics.jsonl")] for run in (out, path / "run")
    )
    assert found == wanted and len(found) == 7


def test_training_stopped_after_every_step_ends_with_the_same_weights(path, tmp_path):
    out, calls = tmp_path / "run", 0
    first = ["--data", str(path / "data"), "--init", str(path / "wan"), *TRAIN]
    while not (out / "refine").exists():
        flags = ["--resume"] if calls else first
        train.main([*flags, "--out", str(out), "--time-limit", "1e-9", "--eval-clips", "0"])
        calls += 1
    assert calls == 7
    assert_same_weights(out, path)


KILLED = """
import os, signal, sys
import train
from univigu import uni_flow_loss
count = iter(range(9))
def loss(*args, **options):
    next(count) == 5 and os.kill(os.getpid(), signal.SIGKILL)
    return uni_flow_loss(*args, **options)
train.main(sys.argv[1:], loss=loss)
"""


def test_training_that_was_killed_goes_on_from_its_checkpoint_to_the_same_weights(path, tmp_path):
    """SIGKILL in step 6; the last checkpoint is an earlier one."""
    out = tmp_path / "run"
    flags = ["--data", path / "data", "--init", path / "wan", *TRAIN, "--out", out]
    flags += ["--save-every", 2, "--eval-clips", 0]
    command = [sys.executable, "-c", KILLED, *map(str, flags)]
    done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-3000:]
    assert not (out / "refine").exists() and 2 <= checkpoints(out)[-1][0] <= 5
    train.main(["--resume", "--out", str(out)])
    assert_same_weights(out, path)


@pytest.mark.parametrize(
    "workers, step, bytes_left", [(0, 5, 0), (0, 5, 300), (0, 5, 0.9), (2, 3, 0.9)]
)
def test_a_shard_that_is_cut_while_training_runs_ends_it_with_one_line(
    workers, step, bytes_left, path, tmp_path
):
    """Cut in `step`, long after the dataset was opened, and before the next batch is read.

    Workers read a stage's few batches at once, so it is the stage's last step.
    """
    data, out = shutil.copytree(path / "data", tmp_path / "data"), tmp_path / "run"
    (shard,) = data.glob("shard-*")
    whole, count = shard.read_bytes(), iter(range(1, 100))

    def loss(*args, **options):
        if next(count) == step:
            os.truncate(shard, int(len(whole) * bytes_left) if bytes_left < 1 else bytes_left)
        return uni_flow_loss(*args, **options)

    flags = ["--init", path / "wan", *TRAIN, "--save-every", 2, "--eval-clips", 0]
    with pytest.raises(SystemExit) as end:
        trained(data, out, *flags, "--workers", workers, loss=loss)
    text = end.value.code
    size = shard.stat().st_size
    assert text.startswith(f"train.py: error: shard {shard} has {size} bytes and cannot be read"), (
        text
    )
    assert "wan.prepare again" in text and "\n" not in text and not (out / "refine").exists()
    shard.write_bytes(whole)
    saved, last = checkpoints(out)[-1]
    wanted = UniViGU.from_pretrained(path / "run" / "refine").config
    assert 3 <= saved <= step and wan.load(last).config == wanted
    train.main(["--resume", "--out", str(out)])
    assert_same_weights(out, path)


# ---------------------------------------------------------------- sampling


def test_wan_itself_draws_but_does_not_describe(path, tmp_path, capsys):
    here = ["--checkpoint", path / "wan", *SIZE]
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "drawn.mp4")
    assert len(frames_of(tmp_path / "drawn.mp4")[0]) == 9
    describe = ["understand", *here, "--video", path / "videos" / "0.mp4"]
    assert "knows no text" in refused(capsys, *describe)
    assert "knows no text" in refused(capsys, "joint", *here, "--prompt", "a cat")


def test_the_negative_prompt_is_what_guidance_leads_away_from(path, tmp_path, capsys):
    here = ["generate", "--checkpoint", path / "wan", *SIZE, "--prompt", PROMPTS[0], "--out"]
    use(capsys, *here, tmp_path / "a.npy")
    use(capsys, *here, tmp_path / "b.npy", "--negative-prompt", "a white dog")
    use(capsys, *here, tmp_path / "c.npy", "--negative-prompt", wan.World.negative_prompt)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.npy", "b.npy", "c.npy"))
    assert a == c != b


DRY = "--dry-run --size 480x832 --frames 81".split()


def test_dry_run_reads_no_weights(path, capsys, monkeypatch):
    monkeypatch.setattr(wan, "load", None)
    flags = ["--checkpoint", path / "wan", "--prompt", "a cat", *DRY]
    text = use(capsys, "generate", *flags)
    assert "32,760 video tokens" in text and "minutes" in text and "GB" in text


def test_dry_runs_from_the_hub_download_no_weights(path, tmp_path, capsys, monkeypatch):
    shutil.copytree(path / "wan", tmp_path / "someone" / "wan")
    fetched = fake_hub(tmp_path, monkeypatch)
    file = "transformer/diffusion_pytorch_model.safetensors"
    headers = {"model_index.json", "transformer/config.json", f"header of {file}"}
    flags = ["--checkpoint", "someone/wan", "--prompt", "a cat", *DRY]
    text = use(capsys, "generate", *flags)
    assert "32,760 video tokens" in text and fetched == headers
    fetched.clear()
    trained(path / "data", tmp_path / "run", "--init", "someone/wan", "--dry-run")
    assert "parameters" in capsys.readouterr().out
    assert fetched == headers and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["generate", "--prompt", "a cat", "--frames", "10"], ["10 frames", "4n + 1"]),
        (["generate", "--prompt", "a cat", "--size", "30x48"], ["30x48", "16"]),
        (["generate", "--prompt", "a cat", "--size", "0x0"], ["0x0", "16"]),
        (["generate", "--prompt", "a cat " * 400], ["800 tokens", "128"]),
        (["generate", "--prompts", "nothing.txt", "--out", "x"], ["nothing.txt"]),
        (["understand", "--video", "nothing.mp4"], ["nothing.mp4", "does not exist"]),
        (["understand", "--videos", "nothing"], ["nothing"]),
    ],
    ids=["frames", "size", "no size", "long prompt", "no prompts", "no video", "no videos"],
)
def test_bad_input_is_one_clear_line(path, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = [] if "--size" in flags or "--frames" in flags else SIZE
    text = refused(capsys, *flags, "--checkpoint", path / "run" / "refine", *size)
    assert all(word in text for word in words), text
    assert list(tmp_path.iterdir()) == []


def test_videos_of_any_length_are_described_in_windows_if_asked_for(path, tmp_path, capsys):
    write_clip(tmp_path / "long.MP4", frames=32, fps=16)
    write_clip(tmp_path / "short.mkv", frames=6, fps=16, kind="matroska")
    here = ["understand", "--checkpoint", path / "run" / "refine", *SIZE]
    sample.main(list(map(str, [*here, "--videos", tmp_path])))
    found = capsys.readouterr()
    first = [json.loads(line) for line in found.out.splitlines()]
    assert [row["video"] for row in first] == ["long.MP4", "short.mkv"]
    assert found.err.count("--window") == 1 and "long.MP4: its first 9 frames" in found.err
    windows = ["--video", tmp_path / "long.MP4", "--window", "--out", tmp_path / "said.jsonl"]
    use(capsys, *here, *windows)
    rows = read_rows(tmp_path / "said.jsonl")
    assert [row["window"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["caption"] == first[0]["caption"] and use(capsys, *here, *windows) == ""


def test_data_of_another_size_are_refused(path, tmp_path):
    with pytest.raises(SystemExit) as end:
        trained(path / "data", tmp_path / "run")  # the toy's preset, without --init
    assert "in_dim is 24" in str(end.value.code) and "wanted 16" in str(end.value.code)


def test_the_path_takes_under_two_minutes(path):
    assert float((path / "seconds").read_text()) < 120
