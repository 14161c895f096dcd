"""The whole real path on a tiny random Wan: prepare, train recall and refine from the loaded generator, sample the three modes from and to files."""

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
    pytest.importorskip(module, reason=f"{module} is not installed: pip install -r requirements-wan.txt")

import av
import sample
import train
from tiny_wan import fake_hub, write_clip, write_wan_folder

import wan
from univigu import UniViGU
from wan import prepare, published
from wan.weights import PUBLISHED, rename

pytestmark = pytest.mark.slow

SIZE = ["--size", "32x48", "--frames", "9", "--steps", "3"]
TRAIN = ["--recall-steps", "3", "--refine-steps", "4", "--batch", "2", "--log-every", "1", "--warmup", "0"]
PROMPTS = ["a red ball moves right", "a blue box moves up", "a green cat"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The folder in which the path was walked once: wan, videos, data, run."""
    root, begin = tmp_path_factory.mktemp("path"), time.time()
    write_wan_folder(root / "wan")
    (root / "videos").mkdir()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        write_clip(root / "videos" / f"{i}.mp4", seed=i)
        rows.append({"video": f"{i}.mp4", "prompt": prompt, "caption": prompt + " on a dark background with a static camera"})
    (root / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(["--videos", str(root / "videos"), "--index", str(root / "index.jsonl"), "--out", str(root / "data"), "--wan", str(root / "wan"),
                  "--frames", "9", "--sizes", "32x48", "--caption-tokens", "4-40"])
    train.main(["--data", str(root / "data"), "--init", str(root / "wan"), "--out", str(root / "run"), *TRAIN])
    (root / "seconds").write_text(str(time.time() - begin))
    return root


def use(capsys, *flags):
    sample.main([str(flag) for flag in flags])
    return capsys.readouterr().out


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as end:
        sample.main([str(flag) for flag in flags])
    found = capsys.readouterr()
    text = (str(end.value.code) if isinstance(end.value.code, str) else found.err).strip()
    assert end.value.code not in (0, None) and text.startswith("sample.py: error: ") and "\n" not in text
    return text


def frames_of(path):
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").shape for frame in file.decode(video=0)], file.streams.video[0].average_rate


def test_stages_start_from_the_generator_and_move_every_text_parameter(path):
    lines = [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["recall"] * 3 + ["refine"] * 4
    recall, start = UniViGU.from_pretrained(path / "run" / "recall"), wan.load(path / "wan")
    moved = {name for name, p in recall.named_parameters() if name in dict(start.named_parameters()) and p.shape == start.get_parameter(name).shape
             and not p.equal(start.get_parameter(name))}
    assert {"patch_embedding.weight", "blocks.0.ffn.0.weight", "blocks.1.ffn_t.2.weight", "head_t.head.weight"} <= moved
    largest = max((recall.get_parameter(name) - p).abs().max().item() for name, p in start.named_parameters() if not UniViGU.is_text(name))
    assert 0 < largest < 0.01                                                               # three steps of 2e-4: it is still Wan


def test_the_run_uses_the_papers_settings_and_the_vocabulary_of_the_data(path):
    stored = json.loads((path / "run" / "refine" / "train.json").read_text())["train"]
    assert (stored["clocks"], stored["anchor"], stored["recall_optimizer"], stored["recall_lr"], stored["refine_lr"]) == ("independent", 0.0, "adam", 2e-4, 5e-5)
    config = json.loads((path / "run" / "refine" / "config.json").read_text())
    manifest, world = (json.loads((path / name).read_text()) for name in ("data/manifest.json", "run/refine/world.json"))
    assert config["vocab_size"] == len(manifest["vocabulary"]) == len(world["vocabulary"]) < 60
    results = json.loads((path / "run" / "results.json").read_text())
    assert results["clips"] == 3 and results["loss"]["train"]["video (caption)"] > 0 and len(results["captions"]) == 2
    assert isinstance(results["joint"], str) and all(len(frames_of(path / "run" / f"{mode}.mp4")[0]) == 9 for mode in ("generate", "joint"))


@pytest.mark.parametrize("checkpoint", ["run/recall", "run/refine"])
def test_three_modes_from_and_to_files(path, checkpoint, tmp_path, capsys):
    here = ["--checkpoint", path / checkpoint, *SIZE]
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "drawn.mp4")
    sizes, fps = frames_of(tmp_path / "drawn.mp4")
    assert sizes == [(32, 48, 3)] * 9 and fps == 16
    caption = use(capsys, "joint", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "both.mp4")
    assert frames_of(tmp_path / "both.mp4")[0] == sizes and caption.endswith("\n") and caption.count("\n") == 1
    said = use(capsys, "understand", *here, "--video", path / "videos" / "0.mp4", "--out", tmp_path / "said.txt")
    assert said == (tmp_path / "said.txt").read_text()
    assert said == use(capsys, "understand", *here, "--video", path / "videos" / "0.mp4")  # the same seed


def test_many_prompts_and_a_folder_of_videos(path, tmp_path, capsys):
    here = ["--checkpoint", path / "run" / "refine", *SIZE]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    use(capsys, "generate", *here, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "drawn")
    rows = [json.loads(line) for line in (tmp_path / "drawn" / "index.jsonl").read_text().splitlines()]
    assert rows == [{"video": f"{i:05d}.mp4", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    assert all(len(frames_of(tmp_path / "drawn" / row["video"])[0]) == 9 for row in rows)
    use(capsys, "understand", *here, "--videos", tmp_path / "drawn", "--out", tmp_path / "captions.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["video"] for row in rows] == [f"{i:05d}.mp4" for i in range(3)] and all(isinstance(row["caption"], str) for row in rows)


def test_a_run_that_was_stopped_goes_on_where_it_was(path, tmp_path, capsys):
    here = ["generate", "--checkpoint", path / "run" / "refine", *SIZE, "--out", tmp_path / "drawn", "--prompts"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    use(capsys, *here, tmp_path / "prompts.txt")
    files = [tmp_path / "drawn" / f"{i:05d}.mp4" for i in range(3)]
    whole, index = files[1].read_bytes(), (tmp_path / "drawn" / "index.jsonl").read_text()
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    (tmp_path / "drawn" / "index.jsonl").write_text(index[:index.index("\n") + 1])
    use(capsys, *here, tmp_path / "prompts.txt")
    assert files[1].read_bytes() == whole and files[0].stat().st_mtime_ns == stamp
    assert (tmp_path / "drawn" / "index.jsonl").read_text() == index


def test_a_broken_video_of_many_is_left_out_and_said_so(path, tmp_path, capsys):
    write_clip(tmp_path / "good.mp4")
    write_clip(tmp_path / "short.mp4", frames=4)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    sample.main([str(flag) for flag in ["understand", "--checkpoint", path / "run" / "refine", *SIZE, "--videos", tmp_path, "--out", tmp_path / "said.jsonl"]])
    found = capsys.readouterr()
    assert [json.loads(line)["video"] for line in found.out.splitlines()] == ["good.mp4"] and found.out == (tmp_path / "said.jsonl").read_text()
    assert "short.mp4" in found.err and "cut.mp4" in found.err


def test_the_published_layout_samples_in_all_modes_and_may_be_trained(path, tmp_path, capsys):
    """The authors' layout on the tiny Wan's sizes: text is discrete, its padding is not looked at, latents are raw."""
    vocab = len(wan.World.restore(dict(wan=path / "wan", vocabulary=None, latents="raw", text_len=12, prompt_len=512)).tokenizer)
    config = published.config_from(dataclasses.asdict(wan.config(path / "wan")) | dict(text_flow="discrete", text_dim=24, vocab_size=vocab, latents="raw", text_ffn_dim=48))
    torch.manual_seed(0)
    tensors = {rename(name, PUBLISHED): p.detach() + 0.02 * torch.randn_like(p) for name, p in published.build(config).named_parameters()}
    tensors["rotary_emb_text.inv_freq"] = 10000 ** -(torch.arange(0, 12, 2) / 12)
    torch.save({"model": tensors}, tmp_path / "published.pth")
    here = ["--checkpoint", tmp_path / "published.pth", "--wan", path / "wan", *SIZE]
    assert use(capsys, "understand", *here, "--video", path / "videos" / "0.mp4").count("\n") == 1
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "drawn.mp4")
    use(capsys, "joint", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "both.mp4")
    assert len(frames_of(tmp_path / "drawn.mp4")[0]) == len(frames_of(tmp_path / "both.mp4")[0]) == 9

    prepare.main(["--videos", str(path / "videos"), "--index", str(path / "index.jsonl"), "--out", str(tmp_path / "data"), "--wan", str(path / "wan"),
                  "--frames", "9", "--sizes", "32x48", "--caption-tokens", "4-256", "--latents", "raw"])
    train.main(["--data", str(tmp_path / "data"), "--vocabulary", "full", "--init", str(tmp_path / "published.pth"), "--stages", "refine", "--refine-steps", "1",
                "--refine-lr", "0", "--out", str(tmp_path / "run"), "--batch", "1", "--eval-clips", "0"])
    trained, start = published.PublishedUniViGU.from_pretrained(tmp_path / "run" / "refine"), wan.load(tmp_path / "published.pth")
    assert all(trained.get_parameter(name).equal(p) for name, p in start.named_parameters())     # nothing trained was initialised anew


def test_stages_may_go_on_from_a_runs_checkpoint_but_not_with_other_tokens(path, tmp_path):
    again = ["--init", str(path / "run" / "recall"), "--stages", "refine", "--refine-steps", "1", "--batch", "1", "--eval-clips", "0"]
    train.main(["--data", str(path / "data"), "--out", str(tmp_path / "again"), *again])
    assert (tmp_path / "again" / "refine" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (path / "index.jsonl").read_text().splitlines()]
    rows[0]["caption"] = rows[0]["caption"].replace("dark", "grey").replace("camera", "sky")
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(["--videos", str(path / "videos"), "--index", str(tmp_path / "index.jsonl"), "--out", str(tmp_path / "other"), "--wan", str(path / "wan"),
                  "--frames", "9", "--sizes", "32x48", "--caption-tokens", "4-40"])
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(tmp_path / "other"), "--out", str(tmp_path / "wrong"), *again])
    assert "vocab" in str(end.value.code) and not (tmp_path / "wrong").exists()


# ---------------------------------------------------------------- a run that is stopped

def assert_same_weights(out, path):
    """Bit for bit those of the run that nobody stopped, and the same losses on the way there."""
    for stage in ("recall", "refine"):
        found, wanted = (load_file(run / stage / "model.safetensors") for run in (out, path / "run"))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), stage
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (out, path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_training_stopped_after_every_step_ends_with_the_same_weights(path, tmp_path):
    out, calls, flags = tmp_path / "run", 0, ["--data", str(path / "data"), "--init", str(path / "wan"), *TRAIN]
    while not (out / "refine").exists():
        train.main([*flags, "--out", str(out), "--time-limit", "1e-9", "--eval-clips", "0"])
        flags, calls = ["--resume"], calls + 1
    assert calls == 7
    assert_same_weights(out, path)


def test_training_that_was_killed_goes_on_from_its_checkpoint_to_the_same_weights(path, tmp_path):
    """SIGKILL in step 6; the last checkpoint is an earlier one."""
    code = ("import os, signal, sys\nimport train\nreal, count = train.uni_flow_loss, iter(range(9))\n"
            "def loss(*args, **options):\n    next(count) == 5 and os.kill(os.getpid(), signal.SIGKILL)\n    return real(*args, **options)\n"
            "train.uni_flow_loss = loss\ntrain.main(sys.argv[1:])")
    flags = ["--data", path / "data", "--init", path / "wan", *TRAIN, "--save-every", 2, "--eval-clips", 0, "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=Path(train.__file__).parent, capture_output=True)
    assert done.returncode == -9 and not (tmp_path / "run" / "refine").exists(), done.stderr.decode()[-3000:]
    assert 2 <= train.checkpoints(tmp_path / "run")[-1][0] <= 5
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert_same_weights(tmp_path / "run", path)


@pytest.mark.parametrize("workers, step, bytes_left", [(0, 5, 0), (0, 5, 300), (0, 5, 0.9), (2, 3, 0.9)])
def test_a_shard_that_is_cut_while_training_runs_ends_it_with_one_line(workers, step, bytes_left, path, tmp_path, monkeypatch):
    """Cut in `step`, long after the dataset was opened, and before the next batch is read; workers read a stage's few batches at once, so its last step."""
    data, out, real, count = shutil.copytree(path / "data", tmp_path / "data"), tmp_path / "run", train.uni_flow_loss, iter(range(1, 100))
    shard, = data.glob("shard-*")
    whole = shard.read_bytes()

    def loss(*args, **options):
        if next(count) == step:
            os.truncate(shard, int(len(whole) * bytes_left) if bytes_left < 1 else bytes_left)
        return real(*args, **options)

    monkeypatch.setattr(train, "uni_flow_loss", loss)
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(data), "--init", str(path / "wan"), *TRAIN, "--save-every", "2", "--eval-clips", "0", "--workers", str(workers), "--out", str(out)])
    text = end.value.code
    assert text.startswith(f"train.py: error: shard {shard} has {shard.stat().st_size} bytes and cannot be read") and "wan.prepare again" in text, text
    assert "\n" not in text and not (out / "refine").exists()
    shard.write_bytes(whole)
    saved, last = train.checkpoints(out)[-1]
    assert 3 <= saved <= step and wan.load(last).config == UniViGU.from_pretrained(path / "run" / "refine").config
    train.main(["--resume", "--out", str(out)])
    assert_same_weights(out, path)


# ---------------------------------------------------------------- sampling

def test_wan_itself_draws_but_does_not_describe(path, tmp_path, capsys):
    here = ["--checkpoint", path / "wan", *SIZE]
    use(capsys, "generate", *here, "--prompt", PROMPTS[0], "--out", tmp_path / "drawn.mp4")
    assert len(frames_of(tmp_path / "drawn.mp4")[0]) == 9
    assert "knows no text" in refused(capsys, "understand", *here, "--video", path / "videos" / "0.mp4")
    assert "knows no text" in refused(capsys, "joint", *here, "--prompt", "a cat")


def test_the_negative_prompt_is_what_guidance_leads_away_from(path, tmp_path, capsys):
    here = ["generate", "--checkpoint", path / "wan", *SIZE, "--prompt", PROMPTS[0], "--out"]
    use(capsys, *here, tmp_path / "a.npy")
    use(capsys, *here, tmp_path / "b.npy", "--negative-prompt", "a white dog")
    use(capsys, *here, tmp_path / "c.npy", "--negative-prompt", wan.World.negative_prompt)
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.npy", "b.npy", "c.npy"))
    assert a == c != b


def test_dry_run_reads_no_weights(path, capsys, monkeypatch):
    monkeypatch.setattr(wan, "load", None)
    text = use(capsys, "generate", "--checkpoint", path / "wan", "--prompt", "a cat", "--dry-run", "--size", "480x832", "--frames", "81")
    assert "32,760 video tokens" in text and "minutes" in text and "GB" in text


def test_dry_runs_from_the_hub_download_no_weights(path, tmp_path, capsys, monkeypatch):
    shutil.copytree(path / "wan", tmp_path / "someone" / "wan")
    fetched = fake_hub(tmp_path, monkeypatch)
    headers = {"transformer/config.json", "header of transformer/diffusion_pytorch_model.safetensors"}
    text = use(capsys, "generate", "--checkpoint", "someone/wan", "--prompt", "a cat", "--dry-run", "--size", "480x832", "--frames", "81")
    assert "32,760 video tokens" in text and fetched == headers
    fetched.clear()
    train.main(["--data", str(path / "data"), "--init", "someone/wan", "--out", str(tmp_path / "run"), "--dry-run"])
    assert "parameters" in capsys.readouterr().out and fetched == headers and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["generate", "--prompt", "a cat", "--frames", "10"], ["10 frames", "4n + 1"]),
    (["generate", "--prompt", "a cat", "--size", "30x48"], ["30x48", "16"]),
    (["generate", "--prompt", "a cat", "--size", "0x0"], ["0x0", "16"]),
    (["generate", "--prompt", "a cat " * 400], ["800 tokens", "128"]),
    (["generate", "--prompts", "nothing.txt", "--out", "x"], ["nothing.txt"]),
    (["understand", "--video", "nothing.mp4"], ["nothing.mp4", "does not exist"]),
    (["understand", "--videos", "nothing"], ["nothing"]),
], ids=["frames", "size", "no size", "long prompt", "no prompts", "no video", "no videos"])
def test_bad_input_is_one_clear_line(path, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused(capsys, *flags, "--checkpoint", path / "run" / "refine", *([] if "--size" in flags or "--frames" in flags else SIZE))
    assert all(word in text for word in words), text
    assert list(tmp_path.iterdir()) == []


def test_a_short_video_is_refused_with_its_number_of_frames(path, tmp_path, capsys):
    write_clip(tmp_path / "short.mp4", frames=5)
    text = refused(capsys, "understand", "--checkpoint", path / "run" / "refine", *SIZE, "--video", tmp_path / "short.mp4")
    assert "too short" in text and "wanted 9" in text


def test_data_of_another_size_are_refused(path, tmp_path):
    with pytest.raises(SystemExit) as end:
        train.main(["--data", str(path / "data"), "--out", str(tmp_path / "run")])             # the toy's preset, without --init
    assert "in_dim is 24" in str(end.value.code) and "has 16" in str(end.value.code)


def test_the_path_takes_under_two_minutes(path):
    assert float((path / "seconds").read_text()) < 120
