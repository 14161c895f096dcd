"""sample.py: video files survive the round trip, the three modes do as told, and what cannot work
is refused in one line.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from engine.video import read_video, write_video
from toy import World, oracle, shapes
from univigu import Config, UniViGU
from wan.published import build, config_from

pytestmark = pytest.mark.usefixtures("one_codec")

FORMATS = (".gif", ".mp4", ".npy", "")
PROMPT = "a red circle moving right"
TINY = (
    "--dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --text-dim 8 "
    "--freq-dim 16 --text-output velocity --batch 4 --generator-steps 2 --recall-steps 2 "
    "--refine-steps 2 --eval-clips 0 --compile no --device cpu --precision fp32"
).split()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A run of a few steps: its folder has the checkpoints generator, recall and refine."""
    out = tmp_path_factory.mktemp("run")
    train.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def clips():
    """Drawn clips (B, 3, T, H, W) and their attributes."""
    drawn = shapes.sample(range(16), "seen", seed=4)
    return shapes.render(drawn), drawn.attributes


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def use(checkpoints, capsys):
    """Calls sample.py with words and a checkpoint; returns what it printed to stdout."""

    def call(mode, *words, checkpoint="refine"):
        capsys.readouterr()
        sample.main([mode, "--checkpoint", str(checkpoints / checkpoint), *map(str, words)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refusal(checkpoints, capsys):
    """Calls sample.py with what must fail: checks exit status and form, returns the line."""

    def call(mode, *words, checkpoint="refine"):
        capsys.readouterr()
        argv, printed = [mode, "--checkpoint", checkpoints / checkpoint, *words], io.StringIO()
        with contextlib.redirect_stdout(printed):
            text = conftest.refusal(capsys, sample.main, *argv)
        assert text.startswith("sample.py: error: ") and printed.getvalue() == ""
        return text

    return call


def to_bytes(frames):
    return (frames + 1).mul(127.5).round()


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


# ---------------------------------------------------------------- video files


@pytest.mark.parametrize("suffix", [".npy", ""])
def test_lossless_formats_give_every_pixel_back(suffix, clips, work):
    noise = torch.rand(1, 3, 5, 7, 11, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for frames in (clips[0][:1], noise):
        write_video("clip" + suffix, frames)
        assert torch.equal(to_bytes(read_video("clip" + suffix)), to_bytes(frames))


def test_a_gif_keeps_colours_to_what_a_palette_can_hold(clips, work):
    for i, frames in enumerate(clips[0]):
        write_video("clip.gif", frames[None])
        gap = (to_bytes(read_video("clip.gif")[0]) - to_bytes(frames)).abs().max()
        assert gap == 0, i  # a drawn frame has under 256 colours


@pytest.mark.parametrize("through_codec", [False, True], ids=["drawn", "decoded"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_oracle_reads_all_attributes_from_a_file(suffix, through_codec, clips, work):
    codec, (frames, attributes) = World().codec, clips
    frames = codec.decode(codec.encode(frames)) if through_codec else frames
    assert torch.equal(oracle.read(frames), attributes)
    for clip, wanted in zip(frames, attributes):
        write_video("clip" + suffix, clip[None])
        again = read_video("clip" + suffix)
        assert again.shape == (1, *clip.shape) and again.abs().max() <= 1
        assert torch.equal(oracle.read(again)[0], wanted)


@pytest.mark.parametrize("suffix", FORMATS)
def test_frames_that_repeat_are_kept(suffix, clips, work):
    first, last = clips[0][:1, :, :1], clips[0][:1, :, -1:]
    for parts in ([first] * 9, [first, first, last, last, last, first], [first]):
        frames = torch.cat(parts, 2)
        write_video("still" + suffix, frames)
        again = read_video("still" + suffix)
        assert again.shape == frames.shape and (again - frames).abs().mean() < 0.03


def test_a_written_video_replaces_the_one_before(clips, work):
    for suffix in FORMATS:
        write_video("clip" + suffix, clips[0][:1])
        write_video("clip" + suffix, clips[0][1:2, :, :4])
        assert read_video("clip" + suffix).shape[2] == 4
    assert len(list(Path("clip").iterdir())) == 4


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_video_is_complete_or_not_there(suffix, clips, work, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    for target in (
        "engine.video.write_gif",
        "engine.video.write_mp4",
        "numpy.save",
        "PIL.Image.Image.save",
    ):
        monkeypatch.setattr(target, full)
    with pytest.raises(OSError):
        write_video("clip" + suffix, clips[0][:1])
    assert files(work) == []


def test_png_frames_are_read_in_the_order_of_their_numbers(work):
    Path("frames").mkdir()
    for i in range(12):
        Image.new("RGB", (6, 6), (i, i, i)).save(f"frames/frame{i}.png")
    assert to_bytes(read_video("frames"))[0, 0, :, 0, 0].tolist() == list(range(12))


def test_an_mp4_with_even_large_frames_is_read_back(work):
    rows = torch.linspace(-1, 1, 130)[:, None].expand(130, 140)
    frames = rows.expand(1, 3, 3, 130, 140)
    write_video("large.mp4", frames)
    assert (read_video("large.mp4") - frames).abs().mean() < 0.02


# ---------------------------------------------------------------- the three modes


@pytest.mark.parametrize(
    "mode, flags",
    [
        ("understand", ["--video", "clip.npy", "--out", "out.txt"]),
        ("generate", ["--prompt", PROMPT, "--out", "out.npy"]),
        ("joint", ["--prompt", PROMPT, "--out", "out.npy"]),
    ],
)
def test_same_seed_same_output_other_seed_another(mode, flags, use, clips, work):
    write_video("clip.npy", clips[0][:1])
    results = []
    for seed in (1, 1, 2):
        printed = use(mode, *flags, "--seed", seed, "--steps", 3)
        results.append((printed, Path(flags[-1]).read_bytes()))
    assert results[0] == results[1] and results[0][1] != results[2][1]
    printed, written = results[0]
    if mode == "generate":
        assert printed == ""
    else:  # a caption, and nothing else
        assert (
            printed.endswith("\n")
            and printed.count("\n") == 1
            and set(printed.split()) <= {*World().tokenizer.words}
        )
    assert mode != "understand" or written == printed.encode()
    assert mode == "understand" or read_video("out.npy").shape == (1, *World().frame_shape)


@pytest.mark.parametrize("suffix", FORMATS)
def test_understand_sees_what_generate_wrote(suffix, use, clips, work, monkeypatch):
    codec, seen, real = World().codec, [], sample.understand
    truth = codec.encode(clips[0][:1])
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: truth)
    monkeypatch.setattr(
        sample,
        "understand",
        lambda model, z_v, c, **kwargs: seen.append(z_v) or real(model, z_v, c, **kwargs),
    )
    use("generate", "--prompt", PROMPT, "--out", "new/folder/clip" + suffix)
    use("understand", "--video", "new/folder/clip" + suffix)
    assert torch.equal(oracle.read(codec.decode(seen[0])), clips[1][:1])
    assert (seen[0] - codec.encode(codec.decode(truth))).square().mean() < 0.003


def test_captions_are_printed_from_what_the_model_says(use, clips, work, monkeypatch):
    write_video("clip.gif", clips[0][:1])
    text = "a small red circle starts top left and moves slowly right on a black background"
    y = World().tokenizer.encode([text])
    monkeypatch.setattr(sample, "understand", lambda *args, **kwargs: y)
    monkeypatch.setattr(
        sample, "joint", lambda model, c, shape, **kwargs: (torch.zeros(1, *shape), y)
    )
    assert (
        use("understand", "--video", "clip.gif") == use("joint", "--prompt", PROMPT) == text + "\n"
    )
    assert files(work) == ["clip.gif", "joint.gif"]


@pytest.mark.parametrize("mode", ["understand", "generate", "joint"])
@pytest.mark.parametrize(
    "steps, guidance, passes", [(2, 1, [1, 1]), (3, 2.5, [2, 2, 2]), (1, 0, [2])]
)
def test_steps_and_guidance_are_honoured(
    mode, steps, guidance, passes, use, clips, work, monkeypatch
):
    write_video("clip.npy", clips[0][:1])
    batches, forward = [], UniViGU.forward
    monkeypatch.setattr(
        UniViGU,
        "forward",
        lambda self, z_v, *rest, **more: (
            batches.append(len(z_v)) or forward(self, z_v, *rest, **more)
        ),
    )
    what = (
        ["--video", "clip.npy", "--recompute-video"]
        if mode == "understand"
        else ["--prompt", PROMPT]
    )
    use(mode, *what, "--steps", steps, "--guidance", guidance)
    assert batches == [
        n + (mode == "joint" and n > 1) for n in passes
    ]  # joint has a null pass for each modality


def test_the_video_is_computed_once_unless_told_otherwise(use, clips, work, monkeypatch):
    write_video("clip.npy", clips[0][:1])
    calls, real = [], sample.understand
    monkeypatch.setattr(
        sample,
        "understand",
        lambda *args, **kwargs: calls.append(kwargs["reuse_video"]) or real(*args, **kwargs),
    )
    for flags in ([], ["--recompute-video"]):
        use("understand", "--video", "clip.npy", *flags)
    assert calls == [True, False]


def test_sampling_asks_for_the_devices_fastest_attention(use, work, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sample,
        "preferred_attention",
        lambda device: asked.append(device) or contextlib.nullcontext(),
    )
    use("generate", "--prompt", PROMPT, "--steps", "1")
    assert asked == [torch.device("cuda" if torch.cuda.is_available() else "cpu")]


@pytest.mark.parametrize("flags", [[], ["--prompt", PROMPT]], ids=["none", "prompt"])
def test_understand_may_have_the_videos_prompt(flags, use, clips, work, monkeypatch):
    write_video("clip.npy", clips[0][:1])
    calls, real = [], sample.understand
    monkeypatch.setattr(
        sample, "understand", lambda *args, **kwargs: calls.append(args[2]) or real(*args, **kwargs)
    )
    use("understand", "--video", "clip.npy", *flags)
    (c,) = calls
    if flags:
        wanted = World().prompt_encoder([PROMPT])
        assert torch.equal(c, wanted[:, : c.shape[1]]) and not wanted[:, c.shape[1] :].any()
    else:
        assert c is None


def rewritten(folder, out, name, change):
    """A copy of a checkpoint in which `change` has worked on the object in a JSON file."""
    shutil.copytree(folder, out)
    content = json.loads((out / name).read_text())
    change(content)
    (out / name).write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("older", [False, True], ids=["each", "older"])
@pytest.mark.parametrize("stage, p_drop, told", [("refine", 0, True), ("refine", 0.1, False)])
def test_a_model_that_always_had_its_prompt_says_so_where_it_has_none(
    stage, p_drop, told, older, checkpoints, clips, work, capsys
):
    write_video("clip.npy", clips[0][:1])

    def set_p(content):
        del content["train"][f"{stage}_p_drop"]
        content["train"]["p_drop" if older else f"{stage}_p_drop"] = p_drop

    folder = rewritten(checkpoints / stage, work / "kept", "train.json", set_p)
    describe = ["understand", "--checkpoint", str(folder), "--video", "clip.npy"]
    for flags, wanted in (([], told), (["--prompt", PROMPT], False)):
        sample.main([*describe, *flags])
        said = capsys.readouterr().err
        assert ("never learned" in said and "give --prompt" in said) == wanted
        assert len(said.splitlines()) == wanted


def test_a_checkpoint_samples_as_its_recipe_says_unless_told_otherwise(
    checkpoints, clips, work, monkeypatch
):
    write_video("clip.npy", clips[0][:1])
    folder = rewritten(
        checkpoints / "refine",
        work / "even",
        "world.json",
        lambda content: content.update(sampling=train.PAPER_SAMPLING),
    )
    for mode, what in (
        ("understand", ["--video", "clip.npy"]),
        ("generate", ["--prompt", PROMPT]),
        ("joint", ["--prompt", PROMPT]),
    ):
        calls, real = [], getattr(sample, mode)
        monkeypatch.setattr(
            sample, mode, lambda *a, calls=calls, real=real, **k: calls.append(k) or real(*a, **k)
        )
        sample.main([mode, "--checkpoint", str(folder), *what])
        sample.main([mode, "--checkpoint", str(folder), *what, "--steps", "2"])
        for k, kwargs in zip((20, 2), calls):
            wanted = train.PAPER_SAMPLING[mode] | {"steps": k}
            assert {name: kwargs[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "sampling, words",
    [
        ([1], "sampling is [1], wanted understand"),
        ({"understand": {}, "generate": {}, "joint": {"warp": 9}}, "joint has 'warp'"),
        ({"understand": {}, "generate": {"steps": "x"}, "joint": {}}, "steps of generate is 'x'"),
    ],
)
def test_what_is_no_sampling_is_refused(sampling, words, checkpoints, work, capsys):
    folder = rewritten(
        checkpoints / "refine",
        work / "odd",
        "world.json",
        lambda content: content.update(sampling=sampling),
    )
    text = conftest.refusal(
        capsys, sample.main, "joint", "--checkpoint", folder, "--prompt", PROMPT
    )
    assert words in text


@pytest.mark.parametrize("mode", ["understand", "generate", "joint"])
def test_defaults_are_those_of_the_world(mode, use, clips, work, monkeypatch):
    write_video("clip.npy", clips[0][:1])
    calls, real = [], getattr(sample, mode)
    monkeypatch.setattr(
        sample, mode, lambda *args, **kwargs: calls.append(kwargs) or real(*args, **kwargs)
    )
    use(mode, *(["--video", "clip.npy"] if mode == "understand" else ["--prompt", PROMPT]))
    assert {
        name: value
        for name, value in calls[0].items()
        if name in ("steps", "guidance", "shift", "text_shift", "reuse_video")
    } == World.sampling[mode]
    assert [generator.initial_seed() for generator in calls[0]["generator"]] == [0]


@pytest.mark.parametrize(
    "checkpoint, flags, text",
    [
        ("refine", ["--prompt", PROMPT], PROMPT),
        ("refine", ["--prompt", PROMPT, "--caption", "a large red circle"], "a large red circle"),
        ("refine", ["--prompt", "", "--caption", "a large red circle"], "a large red circle"),
        ("generator", ["--prompt", PROMPT], None),
        ("generator", ["--prompt", ""], None),
    ],
)
def test_generate_reads_the_prompt_and_the_caption(checkpoint, flags, text, use, work, monkeypatch):
    calls, world, real = [], World(), sample.generate
    monkeypatch.setattr(
        sample,
        "generate",
        lambda model, y, c, *args, **kwargs: (
            calls.append((y, c)) or real(model, y, c, *args, **kwargs)
        ),
    )
    use("generate", *flags, "--steps", 1, checkpoint=checkpoint)
    ((y, c),) = calls
    assert torch.equal(c, world.prompt_encoder([flags[1]]))
    assert y is None if text is None else torch.equal(y, world.tokenizer.encode([text]))


def test_joint_takes_the_empty_prompt_for_none(use, work):
    use("joint", "--prompt", "", "--steps", 1)
    assert files(work) == ["joint.gif"]


IN_A_LOCALE = """
import sys
from pathlib import Path
from engine.files import read_json, write_text
from engine.options import run_command
from engine.rows import append_row, read_rows
from engine.sampling import utf8
from wan.index import find_video
def main():
    folder, file = Path(sys.argv[1]), Path(sys.argv[1], "rows.jsonl")
    video = find_video(folder, "caf\\xe9.mp4")
    append_row(file, {"video": "caf\\udce9.mp4", "caption": utf8(sys.argv[2])})
    print(video.read_bytes(), read_rows(file, "video", "caption"), "caf\\xe9")
    write_text(folder / "page.html", "caf\\xe9 \\udce9")
run_command(main)
"""


def test_files_are_utf8_and_printing_ends_nothing_in_any_locale(tmp_path):
    (tmp_path / "café.mp4").write_bytes(b"a video")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LOCALE, tmp_path, "a café"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        cwd=Path(sample.__file__).parent,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"b'a video'") and done.stdout.endswith(b" caf\\xe9\n")
    row = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert row == '{"video": "caf\\udce9.mp4", "caption": "a café"}\n'
    assert json.loads(row)["video"] == os.fsdecode(b"caf\xe9.mp4")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "café \\udce9"


def test_prompts_are_lines_of_text_or_the_prompts_of_rows(tmp_path):
    file = tmp_path / "p.txt"
    for content, wanted in (
        ("a red circle\r\n\n {a} b\n", ["a red circle", "{a} b"]),
        ("{a|b} ball\n", ["{a|b} ball"]),
        ('\ufeff{"video": "0.mp4", "prompt": "a café\u2028now"}\n', ["a café\u2028now"]),
        ('{"prompt": "x", "caption": "y"}\n\n{"prompt": "x"}\n', ["x", "x"]),
    ):
        file.write_text(content, encoding="utf-8", newline="")
        assert sample.read_prompts(file) == wanted
    for content, name in (('{"prompt": 1}', "p.txt"), ("a ball", "p.jsonl"), ("[1]", "p.json")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f'{name} has a row that .* JSON lines {{"prompt"'):
            sample.read_prompts(tmp_path / name)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "checkpoint, words",
    [
        ("nowhere", "nowhere model.safetensors"),
        ("metrics.jsonl", "metrics.jsonl is a file, wanted a folder"),
    ],
)
def test_a_missing_checkpoint_is_refused(checkpoint, words, refusal, work):
    text = refusal("generate", "--prompt", PROMPT, checkpoint=checkpoint)
    assert all(word in text for word in words.split()) and files(work) == []


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:300])


def change(name, **values):
    def act(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return act


def drop_a_tensor(folder):
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["head_t.head.bias"]
    save_file(tensors, folder / "model.safetensors")


def another_world(folder):
    UniViGU(train.parse([*TINY, "--in-dim", "16", "--out-dim", "16"])[2]).save_pretrained(folder)


@pytest.mark.parametrize(
    "damage, word",
    [
        (remove("model.safetensors"), "model.safetensors"),
        (remove("config.json"), "config.json"),
        (remove("train.json"), "train.json"),
        (cut("model.safetensors"), "cannot be read"),
        (cut("config.json"), "cannot be read"),
        (cut("train.json"), "cannot be read"),
        (change("config.json", dim=48), "mis-shaped"),
        (change("config.json", num_layers=2), "missing: blocks.1"),
        (change("config.json", num_heads=5), "dim / num_heads is 24 / 5"),
        (remove("world.json"), "world.json"),
        (change("world.json", world="films"), "'films'"),
        (drop_a_tensor, "head_t.head.bias"),
        (another_world, "in_dim"),
    ],
    ids=[
        "no weights",
        "no config",
        "no train.json",
        "cut weights",
        "cut config",
        "cut train.json",
        "wider config",
        "deeper config",
        "impossible config",
        "no world.json",
        "another world",
        "a tensor less",
        "weights of another world",
    ],
)
def test_a_damaged_checkpoint_is_refused(damage, word, checkpoints, refusal, work):
    folder = shutil.copytree(checkpoints / "refine", work / "copy")
    damage(folder)
    before = files(work)
    text = refusal("generate", "--prompt", PROMPT, checkpoint=folder)
    assert str(folder) in text and word in text and files(work) == before


@pytest.mark.parametrize(
    "mode, flags",
    [
        ("understand", ["--video", "clip.npy"]),
        ("joint", ["--prompt", PROMPT]),
        ("generate", ["--prompt", PROMPT, "--caption", PROMPT]),
    ],
)
def test_a_generator_is_not_asked_for_text(mode, flags, refusal, clips, work):
    write_video("clip.npy", clips[0][:1])
    text = refusal(mode, *flags, checkpoint="generator")
    assert "stage generator" in text and "recall or refine" in text and files(work) == ["clip.npy"]


def cut_video(suffix):
    def make(frames):
        write_video("clip" + suffix, frames)
        data = Path("clip" + suffix).read_bytes()
        Path("clip" + suffix).write_bytes(data[: len(data) // 2])
        return "clip" + suffix

    return make


def array(shape, dtype="uint8"):
    def make(_):
        np.save("clip.npy", np.zeros(shape, dtype))
        return "clip.npy"

    return make


def other_kind(name, write):
    def make(frames):
        write(name)
        return name

    return make


def changed(name, change):
    def make(frames):
        write_video(name, change(frames))
        return name

    return make


def mixed_sizes(frames):
    write_video("clip", frames)
    Image.new("RGB", (25, 24)).save("clip/0003.png")
    return "clip"


def renamed(a, b):
    def make(frames):
        write_video(a, frames)
        Path(a).rename(b)
        return b

    return make


BAD_VIDEOS = {
    "missing": (lambda _: "none.gif", "none.gif does not exist"),
    "no ending": (
        other_kind("clip", lambda name: Path(name).write_text("hello")),
        "'' .gif .mp4 .npy PNG",
    ),
    "unknown ending": (
        other_kind("clip.wmv", lambda name: Path(name).write_text("hello")),
        "'.wmv' .gif .mkv PNG JPEG",
    ),
    "empty folder": (other_kind("clip", lambda name: Path(name).mkdir()), "without PNG JPEG"),
    "empty gif": (other_kind("clip.gif", lambda name: Path(name).touch()), "cannot be read"),
    "empty mp4": (other_kind("clip.mp4", lambda name: Path(name).touch()), "cannot be read"),
    "empty npy": (other_kind("clip.npy", lambda name: Path(name).touch()), "cannot be read"),
    "cut gif": (cut_video(".gif"), "clip.gif"),
    "cut mp4": (cut_video(".mp4"), "cannot be read"),
    "cut npy": (cut_video(".npy"), "cannot be read"),
    "text as gif": (
        other_kind("clip.gif", lambda name: Path(name).write_text("hello" * 100)),
        "cannot be read",
    ),
    "text as mp4": (
        other_kind("clip.mp4", lambda name: Path(name).write_text("hello" * 100)),
        "cannot be read",
    ),
    "npy as gif": (renamed("clip.npy", "clip.gif"), "cannot be read"),
    "png as gif": (
        other_kind("clip.gif", lambda name: Image.new("RGB", (24, 24)).save(name, format="png")),
        "cannot be read",
    ),
    "npz as npy": (
        other_kind("clip.npy", lambda name: np.savez(open(name, "wb"), a=np.zeros(3))),
        "NpzFile uint8",
    ),
    "float npy": (array((9, 24, 24, 3), "float32"), "float32 (9,24,24,3) uint8"),
    "channels first npy": (array((3, 9, 24, 24)), "(3,9,24,24) frames,rows,columns,3"),
    "one frame npy": (array((24, 24, 3)), "(24,24,3) frames"),
    "npy of no frame": (array((0, 24, 24, 3)), "0 9"),
    "few frames gif": (changed("clip.gif", lambda frames: frames[:, :, :5]), "5 9"),
    "few frames mp4": (changed("clip.mp4", lambda frames: frames[:, :, :8]), "8 9"),
    "many frames npy": (
        changed("clip.npy", lambda frames: frames.repeat(1, 1, 2, 1, 1)),
        "more than 9",
    ),
    "larger gif": (changed("clip.gif", lambda frames: frames.repeat(1, 1, 1, 2, 2)), "48x48 24x24"),
    "smaller folder": (changed("clip", lambda frames: frames[..., :18]), "24x18 24x24"),
    "frames of two sizes": (mixed_sizes, "24x25 24x24"),
}


@pytest.mark.parametrize("make, words", BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_a_bad_video_is_refused(make, words, refusal, clips, work):
    name = make(clips[0][:1])
    before = files(work)
    text = refusal("understand", "--video", name, "--out", "caption.txt")
    assert name in text and all(word in text.replace(", ", ",") for word in words.split()), text
    assert files(work) == before


class Trap:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return Path.mkdir, (Path("sprung"),)


@pytest.mark.parametrize(
    "write",
    [lambda f: np.save(f, np.array([Trap()]), allow_pickle=True), lambda f: pickle.dump(Trap(), f)],
    ids=["object array", "plain pickle"],
)
def test_pickled_code_in_a_video_does_not_run(write, refusal, work):
    with open("clip.npy", "wb") as file:
        write(file)
    assert "pickle" in refusal("understand", "--video", "clip.npy") or "Object arrays" in refusal(
        "understand", "--video", "clip.npy"
    )
    assert files(work) == ["clip.npy"]


@pytest.mark.parametrize("mode", ["generate", "joint"])
@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a purple circle", ["'purple'", "wanted", "red"]),
        (" ".join(["red"] * 16), ["16 words", "15"]),
    ],
)
def test_a_prompt_outside_the_language_is_refused(mode, prompt, words, refusal, work):
    text = refusal(mode, "--prompt", prompt, "--out", "new/clip.gif")
    assert all(word in text for word in words) and files(work) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", ""], ["--prompt", "empty", "--caption"]),
        (["--prompt", "  "], ["--prompt", "empty"]),
        (["--prompt", PROMPT, "--caption", "a mauve circle"], ["'mauve'"]),
    ],
)
def test_generate_needs_words(flags, words, refusal, work):
    text = refusal("generate", *flags)
    assert all(word in text for word in words) and files(work) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steps", 0], "--steps 0 1"),
        (["--steps", -3], "--steps -3 1"),
        (["--steps", 10**9], "--steps 1000000000"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--guidance", "inf"], "--guidance inf"),
        (["--seed", -1], "--seed -1 0"),
        (["--out", "clip.avi"], "--out 'clip.avi' .gif"),
        (["--out", ""], "--out .gif"),
        (["--out", "clip.txt"], "--out 'clip.txt' .mp4"),
        (["--out", ".gif"], "--out '.gif' name"),
        (["--out", "/"], "--out '/' name"),
        (["--out", "x" * 248 + ".gif"], "--out long"),
        (["--out", "x" * 300 + "/clip.gif"], "--out long"),
        (["--size", "9" * 5000 + "x16"], "--size ROWSxCOLUMNS"),
        (["--size", "٣٢x32"], "--size ROWSxCOLUMNS"),
        (["--size", "32"], "--size ROWSxCOLUMNS"),
        (["--seed", "1.5"], "--seed '1.5'"),
        (["--device", "tpu"], "--device 'tpu' cpu"),
        (["--wan", "folder"], "--wan 'folder' toy"),
        (["--negative-prompt", PROMPT, "--guidance", 1], "--negative-prompt guidance 1"),
        (["--negative-prompt", "ugly"], "'ugly' wanted"),
        (["--prompts", "prompts.txt"], "--prompts --prompt"),
    ],
)
@pytest.mark.parametrize("mode", ["generate", "joint"])
def test_a_bad_value_is_refused(mode, flags, words, refusal, work):
    text = refusal(mode, "--prompt", PROMPT, *flags)
    assert all(word in text for word in words.split()) and files(work) == [], text


@pytest.mark.parametrize(
    "flags",
    [
        ["--colour", "red"],
        ["--step", "3"],
        ["--steps", "many"],
        ["stray"],
        ["two", "lines\nof them"],
    ],
)
def test_unknown_flags_are_refused(flags, refusal, work):
    text = refusal("generate", "--prompt", PROMPT, *flags)
    assert flags[0] in text and files(work) == []


@pytest.mark.parametrize(
    "argv", [[], ["draw"], ["understand"], ["generate"], ["joint", "--video", "clip.gif"]]
)
def test_a_command_line_without_its_parts_is_refused(argv, work, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(argv)
    text = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and text.startswith("sample.py: error: ")
        and text.count("\n") == 1
        and files(work) == []
    )


def test_an_out_that_cannot_be_written_is_refused(refusal, clips, work, monkeypatch):
    for folder in ("mine", "clip.gif", "locked"):
        Path(folder).mkdir()
    Path("loop").symlink_to("loop")
    Path("mine/notes.txt").write_text("keep")
    Path("file").write_text("keep")
    write_video("clip.npy", clips[0][:1])
    before = files(work)
    mkdir = os.mkdir

    def locked(path, *rest, **options):
        if Path(path).parent.name == "locked":
            raise PermissionError(13, "Permission denied", path)
        mkdir(path, *rest, **options)

    monkeypatch.setattr("os.mkdir", locked)  # root may write everywhere
    for flags in ([], ["--dry-run"]):
        for out, word in (
            ("mine", "not a folder of PNG"),
            ("file", "not a folder of PNG"),
            ("clip.gif", "not a file"),
            ("file/clip.gif", "Not a directory"),
            ("loop/clip.gif", "symbolic links"),
            ("locked/clip.gif", "Permission denied"),
            ("locked/new/clip.gif", "Permission denied"),
            *([("/proc/clip.gif", "/proc")] if Path("/proc").is_dir() else []),
        ):
            for mode in ("generate", "joint"):
                text = refusal(mode, "--prompt", PROMPT, "--out", out, *flags)
                assert out in text and word in text, text
        for out, word in (
            ("mine", "a folder"),
            ("file/caption.txt", "Not a directory"),
            ("locked/caption.txt", "Permission denied"),
            ("x" * 300, "long"),
            ("clip.npy", "named as a video"),
            ("/", "a folder"),
        ):
            assert word in refusal("understand", "--video", "clip.npy", "--out", out, *flags)
    assert files(work) == before


def test_whether_out_can_be_written_is_tried_beside_it_and_leaves_nothing(
    use, tmp_path, monkeypatch
):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "prompts.txt").write_text(PROMPT)
    monkeypatch.setattr(sample.cost, "print_sampling", lambda *args: None)
    for out in ("clip.gif", "new/folder/clip.gif", "new/../../clip.gif", "new"):
        use("generate", "--prompt", PROMPT, "--out", out, "--dry-run")
        use("generate", "--prompts", "prompts.txt", "--out", out, "--dry-run")
        assert files(work) == ["prompts.txt"] and list(work.parent.iterdir()) == [work]


def test_memory_that_runs_out_is_one_line_and_other_faults_are_not_hidden(
    use, refusal, work, monkeypatch
):
    def fail(*args, **kwargs):
        raise RuntimeError(message)

    monkeypatch.setattr(sample, "generate", fail)
    message = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0.\nDefaultCPUAllocator: can't allocate memory"
    )
    assert "allocate memory" in refusal("generate", "--prompt", PROMPT)
    message = "a shape is wrong"
    with pytest.raises(RuntimeError):
        use("generate", "--prompt", PROMPT)
    assert files(work) == []


@pytest.mark.parametrize(
    "command",
    [
        "sample.py",
        "train.py",
        "-m toy.experiments",
        "-m wan.bench",
        "-m wan.caption",
        "-m wan.prepare",
    ],
)
def test_ctrl_c_ends_a_program_without_a_traceback(command, work):
    """It comes while the flags are read: a module that Python loads at its start sees to that."""
    (work / "sitecustomize.py").write_text(
        "import argparse\n"
        "def stop(*args):\n"
        "    raise KeyboardInterrupt\n"
        "argparse.ArgumentParser.parse_known_args = stop\n"
    )
    end = subprocess.run(
        [sys.executable, *command.split()],
        cwd=Path(sample.__file__).parent,
        env=os.environ | {"PYTHONPATH": str(work)},
        capture_output=True,
        text=True,
    )
    assert end.returncode not in (0, 1) and end.stderr == end.stdout == ""


def test_help_says_what_an_empty_prompt_means(capsys):
    for mode, words in (
        ("generate", "empty: --caption alone says it"),
        ("joint", "empty: anything"),
    ):
        with pytest.raises(SystemExit):
            sample.main([mode, "--help"])
        assert words in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- many at once, and dry runs


def test_a_file_of_prompts_gives_what_the_prompts_give_one_by_one(use, work):
    prompts = ["a red circle moving left", PROMPT, "a blue square moving up"]
    (work / "prompts.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    said = use(
        "joint", "--prompts", "prompts.txt", "--out", "drawn", "--steps", 2, "--seed", 5
    ).splitlines()
    rows = [json.loads(line) for line in (work / "drawn" / "index.jsonl").read_text().splitlines()]
    assert all(0 < row.pop("confidence") <= 1 for row in rows)
    assert rows == [
        {"video": f"{i:05d}.gif", "prompt": prompt, "caption": said[i]}
        for i, prompt in enumerate(prompts)
    ]
    use("joint", "--prompt", prompts[2], "--out", "one.gif", "--steps", 2, "--seed", 7)
    assert (
        (work / "one.gif").read_bytes()
        == (work / "drawn" / "00002.gif").read_bytes()
        != (work / "drawn" / "00000.gif").read_bytes()
    )


def test_a_folder_of_videos_gives_a_caption_a_line(use, clips, work):
    (work / "videos").mkdir()
    for i, name in enumerate(("b.npy", "a.mp4", "c.gif", "d")):
        write_video(work / "videos" / name, clips[0][i : i + 1])
    for name in ("notes.txt", "._a.mp4"):
        (work / "videos" / name).write_text("not a video")
    said = use("understand", "--videos", "videos", "--out", "captions.jsonl")
    assert said == (work / "captions.jsonl").read_text()
    found = [json.loads(line)["video"] for line in said.splitlines()]
    assert found == ["a.mp4", "b.npy", "c.gif", "d"]


@pytest.mark.parametrize(
    "mode, flags, words",
    [
        ("generate", ["--prompts", "none.txt", "--out", "x"], ["none.txt"]),
        ("generate", ["--prompts", "empty.txt", "--out", "x"], ["empty.txt", "empty"]),
        ("joint", ["--prompts", "binary.txt", "--out", "x"], ["binary.txt", "UTF-8"]),
        ("joint", ["--prompts", "words.txt", "--out", "x"], ["'purple'"]),
        ("generate", ["--prompts", "words.txt"], ["--out", "folder"]),
        ("understand", ["--videos", "none"], ["none", "folder"]),
        ("understand", ["--videos", "."], ["no .mp4, .mov", ".npy or folder"]),
        ("generate", ["--prompt", PROMPT, "--size", "32x32"], ["32x32", "24x24"]),
        ("joint", ["--prompt", PROMPT, "--frames", 13], ["13 frames", "9 of"]),
        ("generate", ["--prompt", PROMPT, "--shift", 0], ["--shift is 0"]),
        ("understand", ["--videos", ".", "--window"], ["--window", "one length"]),
        ("understand", ["--videos", ""], ["--videos", "empty"]),
        ("understand", ["--video", "a.gif", "--batch", 2], ["--batch", "--videos", "--video"]),
        ("joint", ["--prompt", PROMPT, "--batch", 2], ["--batch", "--prompts", "--prompt"]),
        ("joint", ["--prompts", "words.txt", "--out", "x", "--batch", 0], ["--batch is 0"]),
        ("understand", ["--video", "a.gif", "--best-of", 0], ["--best-of is 0"]),
        (
            "understand",
            ["--video", "a.gif", "--best-of", 2, "--trajectory"],
            ["--trajectory", "--best-of"],
        ),
        ("understand", ["--video", ""], ["--video", "empty"]),
        ("joint", ["--prompts", ".", "--out", "x"], ["--prompts"]),
        (
            "generate",
            ["--prompts", "words.txt", "--out", "x", "--caption", PROMPT],
            ["--caption", "--prompts"],
        ),
        ("joint", ["--prompts", "words.txt", "--out", "words.txt"], ["--out", "Not a directory"]),
        ("generate", ["--prompts", "words.txt", "--dry-run"], ["--out", "folder"]),
        (
            "understand",
            ["--videos", ".", "--out", "new/said.gif", "--dry-run"],
            ["--out", "named as a video"],
        ),
    ],
)
def test_bad_lists_and_sizes_are_refused(mode, flags, words, refusal, work):
    (work / "empty.txt").write_text(" \n\n")
    (work / "binary.txt").write_bytes(b"\xff\xfe\x00a red")
    (work / "words.txt").write_text(PROMPT + "\na purple circle\n")
    before = files(work)
    text = refusal(mode, *flags)
    assert all(word in text for word in words), text
    assert files(work) == before


@pytest.mark.parametrize(
    "text",
    [
        "hello\n",
        "[1]\n",
        '{"video": "00000.gif"}\n',
        '{"video": 1, "prompt": "a"}\n',
        b"\xff\n",
        None,
        "no line end",
    ],
)
@pytest.mark.parametrize("mode", ["joint", "understand"])
def test_rows_that_no_earlier_run_wrote_are_refused_and_kept(mode, text, refusal, clips, work):
    (work / "prompts.txt").write_text(PROMPT)
    write_video(work / "clip.npy", clips[0][:1])
    index = work / "drawn" / "index.jsonl"
    index.mkdir(parents=True) if text is None else index.parent.mkdir()
    if text is not None:
        index.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files(work), text is None or index.read_bytes()
    for flags in ([], ["--dry-run"]):
        said = refusal(
            mode,
            *(
                ["--prompts", "prompts.txt", "--out", "drawn"]
                if mode == "joint"
                else ["--videos", ".", "--out", "drawn/index.jsonl"]
            ),
            *flags,
        )
        assert (
            "index.jsonl" in said
            and ("JSON" in said or text is None)
            and (files(work), text is None or index.read_bytes()) == before
        )


def test_a_batch_that_was_stopped_goes_on_and_a_line_that_was_cut_is_mended(use, work, monkeypatch):
    monkeypatch.setattr(sample.cost, "print_sampling", lambda *args: None)
    (work / "prompts.txt").write_text(
        f"{PROMPT}\na blue square moving up\na red circle moving left\n", encoding="utf-8-sig"
    )
    command = ["joint", "--prompts", "prompts.txt", "--out", "drawn", "--steps", 2]
    use(*command)
    index, whole = work / "drawn" / "index.jsonl", (work / "drawn" / "index.jsonl").read_text()
    drawn = {f: f.read_bytes() for f in sorted((work / "drawn").glob("*.gif"))}
    first, second, third = drawn
    for gone, left in (
        ([second, third], whole.splitlines(keepends=True)[0] + '{"video": "00001.gif", "pro'),
        ([first], whole),
        ([third], whole[:-1]),
    ):
        for name in gone:
            name.unlink()
        index.write_text(left)
        stamps = {f: f.stat().st_mtime_ns for f in drawn if f.exists()}
        use(*command, "--dry-run")
        assert index.read_text() == left  # a dry run changes nothing
        use(*command)
        assert index.read_text() == whole and all(
            f.read_bytes() == data for f, data in drawn.items()
        )
        assert all(f.stat().st_mtime_ns == stamp for f, stamp in stamps.items())
    stamps = [f.stat().st_mtime_ns for f in drawn]
    monkeypatch.setattr(sample.wan, "load", None)  # all is there: no model is read
    use(*command)
    assert [f.stat().st_mtime_ns for f in drawn] == stamps and index.read_text() == whole


def test_captions_of_a_folder_go_on_where_they_were(use, clips, work, monkeypatch):
    (work / "videos").mkdir()
    for i, name in enumerate("abc"):
        write_video(work / "videos" / f"{name}.npy", clips[0][i : i + 1])
    command = ["understand", "--videos", "videos", "--out", "said.jsonl"]
    whole = use(*command)
    (work / "said.jsonl").write_text(whole.splitlines(keepends=True)[0] + '{"video": "b.npy", "cap')
    assert (
        use(*command) == "".join(whole.splitlines(keepends=True)[1:])
        and (work / "said.jsonl").read_text() == whole
    )
    monkeypatch.setattr(sample.wan, "load", None)
    assert use(*command) == "" and (work / "said.jsonl").read_text() == whole
    (work / "videos" / "broken.npy").write_bytes(b"")
    assert (
        use(*command) == "" and (work / "said.jsonl").read_text() == whole
    )  # nothing new that can be read, but that was told


def test_a_dry_run_prints_sizes_and_makes_nothing(use, clips, work, monkeypatch):
    monkeypatch.setattr(sample.wan, "load", None)
    text = use("joint", "--prompt", PROMPT, "--dry-run")
    assert (
        "48 video tokens and 16 text tokens" in text
        and "8 steps, guidance 3, shift 3: 24 passes" in text
        and "1 to do" in text
        and files(work) == []
    )
    (work / "prompts.txt").write_text("\n".join([PROMPT] * 3))
    text = use(
        "generate",
        "--prompts",
        "prompts.txt",
        "--out",
        "drawn",
        "--dry-run",
        "--steps",
        5,
        "--guidance",
        1,
        "--shift",
        2.5,
    )
    assert (
        "5 steps, guidance 1, shift 2.5: 5 passes" in text
        and "3 to do" in text
        and files(work) == ["prompts.txt"]
    )
    write_video("clip.npy", clips[0][:1])
    assert "2 steps, guidance 1, shift 4: 2 passes" in use(
        "understand", "--video", "clip.npy", "--dry-run"
    )


# ---------------------------------------------------------------- the defaults of the real world


def wan_folder(folder, dim, stage):
    """A checkpoint of which only the sizes are there: Wan's official layout, or, with a stage, what
    train.py writes.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    config = Config(
        dim=dim,
        ffn_dim=64,
        num_heads=8,
        num_layers=1,
        in_dim=16,
        out_dim=16,
        patch_size=(1, 2, 2),
        prompt_dim=4096,
        prompt_len=512,
    )
    names = {"_class_name": "WanModel", "model_type": "t2v", "text_len": 512} | {
        name: getattr(config, name)
        for name in (
            "dim",
            "ffn_dim",
            "eps",
            "freq_dim",
            "in_dim",
            "out_dim",
            "num_heads",
            "num_layers",
        )
    }
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config) if stage else names))
    save_file(
        {"patch_embedding.bias": torch.zeros(dim)},
        folder / ("model.safetensors" if stage else "diffusion_pytorch_model.safetensors"),
    )
    if stage:
        (folder / "train.json").write_text(json.dumps({"stage": stage}))
        (folder / "world.json").write_text(
            json.dumps(
                dict(
                    world="wan",
                    wan="nowhere",
                    vocabulary=[0, 1],
                    text_len=16,
                    prompt_len=512,
                    latents="normalised",
                )
            )
        )
    return str(folder)


@pytest.mark.parametrize(
    "dim, stage, mode, size, wanted",
    [
        (1536, None, "generate", "480x832", (6, 8)),
        (1536, None, "generate", "720x1280", (6, 8)),
        (1536, "generator", "generate", "480x832", (6, 8)),
        (5120, None, "generate", "480x832", (5, 3)),
        (5120, None, "generate", "832x480", (5, 3)),
        (5120, None, "generate", "720x1280", (5, 5)),
        (1536, "refine", "generate", "480x832", (5, 3)),
        (1536, "refine", "generate", "720x1280", (5, 5)),
        (1536, "recall", "joint", "480x832", (5, 3)),
        (1536, "refine", "joint", "720x1280", (5, 3)),
    ],
)
def test_guidance_and_shift_are_what_wan_recommends_for_the_model_and_flags_win(
    dim, stage, mode, size, wanted, work, monkeypatch
):
    seen, checkpoint = [], wan_folder(work / "wan", dim, stage)
    monkeypatch.setattr(
        sample.cost,
        "print_sampling",
        lambda job, *rest: seen.append(job.options),
    )
    for flags in ([], ["--guidance", "2.5"], ["--shift", "1.5", "--steps", "7"]):
        sample.main(
            [
                mode,
                "--checkpoint",
                checkpoint,
                "--prompt",
                "a cat",
                "--size",
                size,
                "--dry-run",
                *flags,
            ]
        )
    guidance, shift = wanted
    assert seen == [
        dict(steps=50, guidance=guidance, shift=shift),
        dict(steps=50, guidance=2.5, shift=shift),
        dict(steps=7, guidance=guidance, shift=1.5),
    ]


@pytest.mark.parametrize("latents, kept", [("normalised", False), ("raw", True)])
def test_with_the_published_weights_guidance_leaves_out_the_prompt_alone(
    latents, kept, checkpoints, use, work, monkeypatch
):
    folder, calls, real = (
        shutil.copytree(checkpoints / "refine", work / "copy"),
        [],
        sample.generate,
    )
    values = dataclasses.asdict(UniViGU.from_pretrained(folder).config)
    values |= {"text_flow": "discrete", "latents": latents, "text_dim": values["dim"]}
    build(config_from(values)).save_pretrained(folder)
    monkeypatch.setattr(
        sample,
        "generate",
        lambda *args, **kwargs: calls.append(kwargs["keep_text"]) or real(*args, **kwargs),
    )
    use("generate", "--prompt", PROMPT, "--steps", 1, checkpoint=folder)
    assert calls == [kept]


def test_the_negative_prompt_is_where_guidance_leads_away_from(use, work):
    for name, flags in (
        ("a", []),
        ("b", ["--negative-prompt", ""]),
        ("c", ["--negative-prompt", "a blue square moving up"]),
    ):
        use("generate", "--prompt", PROMPT, "--out", name + ".npy", "--steps", 2, *flags)
    a, b, c = ((work / (name + ".npy")).read_bytes() for name in "abc")
    assert a == b != c
