"""Bad input, a case a line: what is broken, the command, the words that its error must have (the
thing, what was found, what is wanted).

Whatever the input: the process ends with a status that is not 0 after one line, without a
traceback; no file is changed, lost or half-written; no code that a file carries runs, and no memory
is taken because a file claims so.
"""

import ctypes
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import toy.experiments
import train
from engine.checkpoint import checkpoints, truncate
from engine.files import alone
from engine.video import write_video
from toy import shapes
from univigu import UniViGU

pytestmark = pytest.mark.usefixtures("one_codec")

ROOT = Path(train.__file__).parent
PROMPT = "a red circle moving right"
TINY = (
    "--dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --text-dim 8 "
    "--freq-dim 16 --batch 4 --generator-steps 2 --recall-steps 2 --refine-steps 3 --log-every 1 "
    "--eval-clips 0 --compile no --device cpu --precision fp32"
).split()
WEIGHTS, SHARD = "diffusion_pytorch_model.safetensors", "shard-0000-00000.safetensors"


# ---------------------------------------------------------------- what every case is held to


def snapshot(folder):
    """Everything below a folder: path -> bytes, target of a link, or None for a folder."""

    def content(path):
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Breaks the working folder, calls a tool's main and checks how it ends.

    words: what the error must have; leaves: files that may be new.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(tool, argv, words, breaks=None, leaves=()):
        if breaks:
            breaks(tmp_path)
        before, most = snapshot(tmp_path), peak()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            mains()[tool]([str(word) for word in argv])
        said = capsys.readouterr()
        # without transformers' progress
        lines = [line for line in said.err.split("\n") if "Loading weights:" not in line]
        text = "\n".join(lines).strip() + (
            end.value.code if isinstance(end.value.code, str) else ""
        )
        assert end.value.code not in (0, None) and "Traceback" not in said.err
        assert len(text.splitlines()) == 1 and text.startswith(f"{tool}: error: "), text
        assert all(word in text for word in words.split()), text
        before, after = (
            {name: value for name, value in files.items() if name not in leaves}
            for files in (before, snapshot(tmp_path))
        )
        assert after == before, "something was changed, lost or left behind"
        assert peak() < most + 2**30, "memory was taken because a file claims so"

    return call


def peak():
    """The most bytes of memory that this process ever had (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mains():
    found = {
        "train.py": train.main,
        "sample.py": sample.main,
        "toy.experiments": toy.experiments.main,
    }
    try:
        from wan import caption, prepare
    except ModuleNotFoundError:
        return found
    return found | {"wan.prepare": prepare.main, "wan.caption": caption.main}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished toy run: folders generator, recall, refine, and step-000006 amid refine."""
    out = tmp_path_factory.mktemp("toy") / "run"
    train.main([*TINY, "--out", str(out), "--save-every", "6"])
    return out


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny Wan2.1 (wan), videos with their index (v, i.jsonl), and these prepared (data)."""
    for module in ("diffusers", "transformers", "av", "ftfy"):
        pytest.importorskip(
            module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
        )
    from tiny_wan import write_clip, write_wan_folder

    root = tmp_path_factory.mktemp("real")
    write_wan_folder(root / "wan")
    (root / "v").mkdir()
    write_clip(root / "v" / "a.mp4"), write_clip(root / "v" / "b.gif")
    (root / "i.jsonl").write_text(
        "".join(json.dumps(row(video)) + "\n" for video in ("a.mp4", "b.gif"))
    )
    mains()["wan.prepare"](
        [
            "--videos",
            str(root / "v"),
            "--index",
            str(root / "i.jsonl"),
            "--out",
            str(root / "data"),
            "--wan",
            str(root / "wan"),
            *PREPARE,
        ]
    )
    return root


PREPARE = "--frames 9 --min-frames 9 --sizes 32x48 --caption-tokens 4-40".split()


def row(video, prompt="a red ball moves", caption="a red ball moves right on a dark background"):
    return {"video": video, "prompt": prompt, "caption": caption}


# ---------------------------------------------------------------- ways to break a file


class Trap:
    """Makes a file called SPRUNG when it is unpickled; every case sees whether there is one."""

    def __reduce__(self):
        return os.system, ("touch SPRUNG",)


def write(name, content):
    """content: text, bytes, or what becomes JSON."""
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )

    def act(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return act


def change(name, **values):
    """Other values in a JSON file."""
    return lambda folder: write(name, json.loads((folder / name).read_text()) | values)(folder)


def without(name, *keys):
    return lambda folder: write(
        name,
        {
            key: value
            for key, value in json.loads((folder / name).read_text()).items()
            if key not in keys
        },
    )(folder)


def cut(name, left=100):
    return lambda folder: write(name, (folder / name).read_bytes()[:left])(folder)


def only(*names):
    """All other files of the folder are gone."""
    return lambda folder: [f.unlink() for f in folder.iterdir() if f.name not in names]


def as_folder(name):
    return lambda folder: (
        (folder / name).unlink(missing_ok=True),
        (folder / name).mkdir(parents=True),
    )


def as_loop(name):
    return lambda folder: (
        (folder / name).unlink(missing_ok=True),
        (folder / name).symlink_to(Path(name).name),
    )


def tensors(name, change):
    """A safetensors file whose tensors change(name, tensor) gives, with its metadata."""

    def act(folder):
        with safe_open(folder / name, "pt") as file:
            told = file.metadata()
        save_file(
            {
                key: change(key, tensor).contiguous()
                for key, tensor in load_file(folder / name).items()
            },
            folder / name,
            metadata=told,
        )

    return act


def with_value(part, value):
    return lambda name, tensor: torch.full_like(tensor, value) if part in name else tensor


def terabytes(name):
    """A header that tells of one tensor of 4 TB; the file ends there."""
    header = json.dumps(
        {"head.head.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    return write(name, struct.pack("<Q", len(header)) + header)


def long_header(name):
    """The first eight bytes tell of a header of 4 TB."""
    return write(name, struct.pack("<Q", 2**42) + b"{}")


DEEP = "[" * 100_000  # deeper than a parser may follow


def below(name, breaks):
    """The same, in a folder of the working folder."""
    return lambda folder: breaks(folder / name)


# ---------------------------------------------------------------- sample.py: checkpoints


@pytest.mark.parametrize(
    "mode, breaks, words",
    [
        (
            "generate",
            tensors("model.safetensors", with_value("head.head.weight", torch.nan)),
            "c head.head.weight NaN",
        ),
        (
            "joint",
            tensors("model.safetensors", with_value("blocks.0.ffn.0.bias", torch.inf)),
            "c blocks.0.ffn.0.bias infinity",
        ),
        (
            "understand",
            tensors("model.safetensors", with_value("token_embedding", torch.nan)),
            "c token_embedding.weight NaN",
        ),
        (
            "generate",
            tensors("model.safetensors", lambda name, x: x.to(torch.int8)),
            "c/model.safetensors I8 wanted floating-point",
        ),
        (
            "generate",
            tensors(
                "model.safetensors", lambda name, x: x.T if name == "blocks.0.ffn.0.weight" else x
            ),
            "c blocks.0.ffn.0.weight (24, 32), wanted (32, 24)",
        ),
        ("generate", terabytes("model.safetensors"), "c/model.safetensors cannot be read"),
        ("joint", long_header("model.safetensors"), "c/model.safetensors cannot be read eader"),
        (
            "generate",
            write("model.safetensors", pickle.dumps(Trap())),
            "c/model.safetensors cannot be read",
        ),
        ("generate", write("model.safetensors", b""), "c/model.safetensors cannot be read"),
        ("generate", as_folder("model.safetensors"), "c no model.safetensors wanted"),
        ("understand", only("config.json"), "c no model.safetensors wanted folder train.py"),
        ("generate", only("model.safetensors"), "c no config.json wanted"),
        ("generate", write("config.json", [1]), "c/config.json list wanted an object"),
        ("generate", write("config.json", DEEP), "config.json cannot be read recursion"),
        (
            "generate",
            write("config.json", json.dumps({"dim": 24}).encode("utf-16")),
            "config.json cannot be read utf-8",
        ),
        (
            "generate",
            change("config.json", text_shift=float("nan")),
            "c text_shift nan wanted a number from",
        ),
        ("generate", change("config.json", dim="24"), "c dim is '24' wanted an integer"),
        (
            "generate",
            change("config.json", num_layers=10**9),
            "c num_layers is 1000000000 wanted 1 to 1000",
        ),
        ("generate", change("config.json", text_len=10**5), "c text_len 100000 'toy' has 16"),
        ("joint", as_loop("config.json"), "c no config.json"),
        ("generate", write("train.json", []), "c/train.json list wanted an object"),
        (
            "understand",
            change("train.json", stage="finish"),
            "train.json stage 'finish' wanted generator, recall or refine",
        ),
        (
            "understand",
            change("train.json", stage="generator"),
            "c stage generator no text wanted recall or refine",
        ),
        ("generate", write("world.json", "{"), "world.json cannot be read"),
        ("generate", change("world.json", world=["toy"]), "c world ['toy'] wanted 'toy' or 'wan'"),
    ],
)
def test_sample_with_a_broken_checkpoint(mode, breaks, words, run, refused, tmp_path):
    shutil.copytree(run / "refine", tmp_path / "c")
    write_video(tmp_path / "clip.npy", shapes.render(shapes.sample(range(1), "seen")))
    what = ["--video", "clip.npy"] if mode == "understand" else ["--prompt", PROMPT]
    refused(
        "sample.py",
        [
            mode,
            "--checkpoint",
            "c",
            *what,
            "--out",
            "said.txt" if mode == "understand" else "out.gif",
        ],
        words,
        below("c", breaks),
    )


# ---------------------------------------------------------------- sample.py: videos, prompts, flags


def gif(frames, width, height):
    def act(folder):
        first, *rest = [Image.new("RGB", (width, height), (7 * i, 0, 0)) for i in range(frames)]
        first.save(folder / "clip.gif", save_all=True, append_images=rest, duration=100)

    return act


def gif_bomb(folder):
    """A few bytes that claim 65535 x 65535 pixels."""
    gif(1, 24, 24)(folder)
    data = (folder / "clip.gif").read_bytes()
    (folder / "clip.gif").write_bytes(data[:6] + b"\xff" * 4 + data[10:])


def npy(shape):
    """An array's header, and 100 bytes of data."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return write(
        "clip.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 100
    )


@pytest.mark.parametrize(
    "video, breaks, words",
    [
        ("clip.gif", gif(1, 24, 24), "clip.gif 1 frames, wanted 9"),
        ("clip.gif", gif(9, 24, 10_000), "clip.gif 10000x24 wanted 24x24"),
        ("clip.gif", gif(9, 25, 23), "clip.gif 23x25 wanted 24x24"),
        ("clip.gif", gif_bomb, "clip.gif cannot be read"),
        ("clip.npy", npy((9, 10**6, 10**6, 3)), "clip.npy cannot be read"),
        ("clip.npy", npy((-9, 24, 24, 3)), "clip.npy cannot be read"),
        ("clip.npy", npy("__import__('os').system('touch SPRUNG')"), "clip.npy cannot be read"),
        (
            "clip.npy",
            lambda folder: np.savez(open(folder / "clip.npy", "wb"), a=np.array([Trap()])),
            "clip.npy NpzFile wanted uint8",
        ),
        (
            "clip.mp4",
            write("clip.mp4", "#EXTM3U\n#EXTINF:10,\n/etc/passwd\n"),
            "clip.mp4 cannot be read",
        ),
        (
            "clip",
            below("clip", lambda folder: (folder.mkdir(), as_loop("0.png")(folder))),
            "clip cannot be read 0.png",
        ),
        ("clip.gif", as_loop("clip.gif"), "clip.gif does not exist"),
    ],
)
def test_understand_with_a_broken_video(video, breaks, words, run, refused):
    refused(
        "sample.py",
        ["understand", "--checkpoint", run / "refine", "--video", video, "--out", "said.txt"],
        words,
        breaks,
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", "red " * 10_000], "10000 words wanted at most 15"),
        (["--prompt", "a red circle 😀"], "word is '😀' wanted one of circle"),
        (["--prompt", "a\0red circle"], r"word is 'a\x00red' wanted"),
        (["--prompt", "<script>alert(1)</script>"], "word is '<script>alert(1)</script>' wanted"),
        (["--prompt", ""], "--prompt empty wanted"),
        (["--prompts", "long.txt", "--out", "o"], "10000 words wanted at most 15"),
        (["--prompts", "latin.txt", "--out", "o"], "latin.txt UTF-8"),
        (["--prompts", "one.txt", "--out", "old"], "old/index.jsonl wanted lines of JSON"),
        (["--prompt", PROMPT, "--seed", -1], "--seed -1 wanted 0"),
        (["--prompt", PROMPT, "--seed", 2**70], f"--seed {2**70} wanted 0 to {2**62}"),
        (["--prompt", PROMPT, "--steps", 0], "--steps 0 wanted 1"),
        (["--prompt", PROMPT, "--guidance", "nan"], "--guidance nan wanted"),
        (["--prompt", PROMPT, "--frames", 0], "--frames 0 wanted 1"),
        (["--prompt", PROMPT, "--size", "24x25"], "24x25 checkpoint has 9 of 24x24"),
        (["--prompt", PROMPT, "--fps", 0], "--fps 0"),
        (
            ["--prompt", PROMPT, "--out", "one.txt/clip.gif"],
            "one.txt/clip.gif cannot be written Not a directory",
        ),
        (["--prompt", PROMPT, "--out", "made.gif"], "made.gif exists and is not a file"),
    ],
)
def test_generate_with_bad_prompts_and_flags(flags, words, run, refused, tmp_path):
    (
        write("long.txt", "red " * 10_000)(tmp_path),
        write("latin.txt", "café".encode("latin-1"))(tmp_path),
        write("one.txt", PROMPT)(tmp_path),
    )
    write("old/index.jsonl", DEEP + "\n")(tmp_path), as_folder("made.gif")(tmp_path)
    refused("sample.py", ["generate", "--checkpoint", run / "refine", *flags], words)


# ---------------------------------------------------------------- train.py


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--micro-batch -4", "micro_batch -4 wanted 1"),
        (f"--refine-steps {10**20}", f"refine_steps {10**20} wanted 1 to 1000000000"),
        (f"--seed {2**70}", f"seed {2**70} wanted 0"),
        ("--guidance nan", "--guidance nan"),
        ("--refine-lr 1e400", "refine_lr inf wanted 0 to 10"),
        ("--dim 900000", "parameters GB wanted smaller"),
        ("--num-layers 1000000000", "num_layers 1000000000 wanted 1 to 1000"),
        ("--resume --out empty", "--resume no checkpoint empty wanted"),
        ("--resume --out half", "--resume no checkpoint half wanted"),
        ("--out file/below", "file/below Not a directory"),
        ("--out loop", "loop wanted a folder symbolic links"),
        ("--out notes", "notes/recall is no checkpoint"),
        ("--out results", "results results.json no checkpoint --overwrite"),
        ("--out=", "out '' wanted"),
        ("--init file", "file is a file, wanted a folder"),
        ("--init run/recall/model.safetensors", "run/recall/model.safetensors wanted folder"),
        ("--data empty", "'empty' wanted 'toy' manifest.json"),
        ("--out run", "run holds a run at step 7 --resume --overwrite"),
    ],
)
def test_train_with_bad_flags(flags, words, run, refused, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (
        write("run/.launch", "another call of torchrun")(tmp_path),
        write("half/.generator.part/train.json", {"step": 2})(tmp_path),
        write("file", "mine")(tmp_path),
    )
    (
        write("notes/recall/notes.txt", "mine")(tmp_path),
        write("results/results.json", "mine")(tmp_path),
        as_loop("loop")(tmp_path),
        (tmp_path / "empty").mkdir(),
    )
    refused("train.py", [*TINY, "--out", "o", *flags.split()], words)


def state(content):
    return lambda folder: torch.save(content, folder / "step-000006" / "training_state.pt")


STEP, STATE = "step-000006/", "step-000006 training state cannot be read remove"


@pytest.mark.parametrize(
    "breaks, words",
    [
        (terabytes(STEP + "model.safetensors"), "step-000006 cannot be read"),
        (write(STEP + "model.safetensors", pickle.dumps(Trap())), "step-000006 cannot be read"),
        (
            tensors(STEP + "model.safetensors", with_value("head.head.bias", torch.nan)),
            "step-000006 head.head.bias NaN",
        ),
        (write(STEP + "config.json", []), "step-000006/config.json list wanted an object"),
        (change(STEP + "config.json", dim="24"), "step-000006 dim '24' wanted"),
        (cut(STEP + "train.json"), "step-000006/train.json cannot be read: remove"),
        (write(STEP + "train.json", DEEP), "step-000006/train.json cannot be read: remove"),
        (change(STEP + "train.json", step="6"), "step-000006/train.json cannot be read: remove"),
        (without(STEP + "train.json", "train"), "step-000006/train.json cannot be read train"),
        (
            change(STEP + "train.json", train=vars(train.Train(stages=3))),
            "step-000006 stages 3 wanted",
        ),
        (write(STEP + "world.json", "{"), "step-000006/world.json cannot be read"),
        (change(STEP + "world.json", world="wan"), "step-000006 world 'wan' the data have 'toy'"),
        (state({"optimizers": Trap()}), STATE),
        (state([1]), STATE),
        (write(STEP + "training_state.pt", pickle.dumps(Trap())), STATE),
        (
            lambda folder: shutil.copy(folder / "generator" / "training_state.pt", folder / STEP),
            STATE,
        ),
        (write("metrics.jsonl", "hello\n"), "metrics.jsonl wanted JSON step"),
        (write("metrics.jsonl", b"\xff\xfe\n"), "metrics.jsonl wanted JSON step"),
        (write("refine", "mine"), "refine is no checkpoint"),
        (below("refine", write("notes.txt", "mine")), "refine is no checkpoint"),
    ],
)
def test_resume_of_a_broken_run(breaks, words, run, refused, tmp_path):
    """The run stopped amid its last stage. What was logged after its checkpoint is dropped before
    the training state is read.
    """
    out = shutil.copytree(
        run, tmp_path / "run", ignore=shutil.ignore_patterns("refine", "report.html")
    )
    truncate(out / "metrics.jsonl", 6)
    refused(
        "train.py", ["--resume", "--out", "run", "--device", "cpu"], words, below("run", breaks)
    )


def test_resume_with_other_data_is_refused(run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(toy.Shapes, "digest", "now", raising=False)
    shutil.copytree(run / "step-000006", tmp_path / "run" / "step-000006")
    seen = change("run/step-000006/train.json", data={"recall": "now", "refine": "before"})
    words = "step-000006 other data: refine changed since, before to now. --resume --init"
    refused("train.py", ["--resume", "--out", "run", "--device", "cpu"], words, seen)
    train.main(["--out", str(tmp_path / "new"), *TINY, "--stages", "generator"])
    stored = json.loads((tmp_path / "new" / "generator" / "train.json").read_text())
    assert stored["data"] == {"generator": "now"}


def test_resume_mends_a_log_that_was_cut_in_a_line(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("refine"))
    (out / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-9])
    train.main(["--resume", "--out", str(out), "--device", "cpu"])
    assert [
        json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()
    ] == list(range(1, 8))


# ---------------------------------------------------------------- the toy


@pytest.mark.parametrize(
    "argv, words",
    [
        (["recal"], "experiment 'recal' wanted one of recall"),
        (["--seeds", "²"], "seeds '²' wanted integers"),
        (["--seeds", "1,1"], "seeds '1,1' wanted different"),
        (["--seeds", ""], "seeds '' wanted"),
        (["--seeds", "99999999999"], "seeds '99999999999' wanted 1000000000"),
        (["--out", "file"], "out file wanted a folder"),
        (["--quik"], "--quik"),
        (["recall", "--fps", "0"], "--fps 0"),
    ],
)
def test_experiments_with_bad_flags(argv, words, refused, tmp_path):
    write("file", "mine")(tmp_path)
    refused("toy.experiments", argv, words)


HOLDER = """
import pathlib, sys, time
from engine.files import alone
with alone(pathlib.Path(sys.argv[1]), sys.argv[2]):
    print(flush=True)
    time.sleep(99)
"""


def test_a_lock_is_of_one_process_and_a_kill_leaves_none(tmp_path):
    lock, place = tmp_path / "a" / "b" / ".lock", tmp_path / "a"
    holder = [sys.executable, "-c", HOLDER, str(lock), str(place)]
    process = subprocess.Popen(holder, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(ValueError, match=f"--out {place} is in use: another process"):
        with alone(lock, place):
            pass
    process.kill()
    process.wait()
    with alone(lock, place):  # the file is still there
        with pytest.raises(ValueError, match="in use"):
            with alone(lock, place):
                pass
        assert lock.exists()
    assert list(lock.parent.iterdir()) == []
    with alone(tmp_path / "new" / "b" / ".lock", "new"):
        (tmp_path / "new" / "file").touch()
    assert sorted(snapshot(tmp_path)) == ["a", "a/b", "new", "new/file"]


@pytest.mark.parametrize(
    "tool, lock, argv",
    [
        ("train.py", "o/.lock-0", []),
        ("train.py", "o/.lock-0", ["--overwrite"]),
        ("toy.experiments", "o/.lock", ["recall", "--quick"]),
        ("sample.py", "o/.lock", ["generate", "--prompts", "p.txt"]),
        ("sample.py", ".o.lock", ["understand", "--videos", "."]),
        ("wan.prepare", "o/.lock-0", ["--videos", ".", "--index", "p.txt"]),
        ("wan.caption", ".o.lock", ["--videos", ".", "--index", "p.txt", "--model", "m"]),
    ],
)
def test_a_place_that_another_process_writes_to_is_refused(tool, lock, argv, tmp_path, refused):
    if tool not in mains():
        pytest.skip("requirements-wan.txt is not installed")
    (tmp_path / "p.txt").write_text("a red circle")
    with alone(tmp_path / lock, "o"):
        refused(tool, [*argv, "--out", "o"], "--out o is in use: another process")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda world: world.dataset("test"), "split 'test' wanted train seen unseen"),
        (lambda world: world.dataset("seen").clips([-1]), "index is -1 wanted >= 0"),
        (lambda world: world.tokenizer.encode([DEEP]), "word wanted"),
        (lambda world: world.tokenizer.decode(torch.tensor([[2**62]])), f"{2**62} wanted 0..33"),
        (lambda world: world.codec.encode(torch.zeros(1, 3, 0, 24, 24)), "0 frames wanted 4n + 1"),
        (
            lambda world: world.codec.encode(torch.zeros(1, 3, 9, 25, 24)),
            "25 x 24 wanted multiples of 6",
        ),
        (
            lambda world: world.codec.decode(torch.zeros(24, 3, 4, 4)),
            "(24, 3, 4, 4) wanted (B, 24, F, H, W)",
        ),
    ],
)
def test_the_toy_world_names_what_is_wrong(call, words):
    with pytest.raises(ValueError) as error:
        call(toy.World())
    assert all(word in str(error.value) for word in words.split()) and "\n" not in str(error.value)


# ---------------------------------------------------------------- wan.load


def published(content):
    return lambda folder: torch.save({"model": content}, folder / "m.pth")


def names_files(**weight_map):
    return below("wan/transformer", write(f"{WEIGHTS}.index.json", {"weight_map": weight_map}))


CONFIG, MODEL = "wan/transformer/config.json", f"wan/transformer/{WEIGHTS}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, breaks, words",
    [
        ("m.pth", published(Trap()), "m.pth could run code"),
        (
            "m.pth",
            lambda folder: torch.save({"model": {}, "extra": Trap()}, folder / "m.pth"),
            "m.pth could run code",
        ),
        ("m.pth", write("m.pth", pickle.dumps(Trap())), "m.pth is not read wanted"),
        ("m.pth", published({}), "m.pth no tensors wanted published"),
        ("m.pth", published({"a": torch.ones(2)}), "m.pth has a, wanted published"),
        ("m.pth", published({"vocab_embed.weight": torch.ones(3, 4)}), "m.pth dim 4"),
        ("wan", terabytes(MODEL), "cannot be read"),
        ("wan", long_header(MODEL), "cannot be read eader"),
        (
            "wan",
            tensors(MODEL, lambda name, x: x.to(torch.int8)),
            f"{WEIGHTS} I8 wanted floating-point",
        ),
        ("wan", tensors(MODEL, with_value("proj_out.bias", torch.nan)), "proj_out.bias NaN"),
        (
            "wan",
            tensors(MODEL, lambda name, x: x[:0] if name == "proj_out.bias" else x),
            "proj_out.bias (0,), wanted (64,)",
        ),
        (
            "wan",
            names_files(a="../../outside.safetensors"),
            "index.json '../../outside.safetensors' own folder",
        ),
        (
            "wan",
            names_files(a="/outside.safetensors"),
            "index.json '/outside.safetensors' own folder",
        ),
        ("wan", names_files(a="b.safetensors", c=3), "index.json names the file 3"),
        ("wan", names_files(a="none.safetensors"), "lacks none.safetensors"),
        ("wan", write(CONFIG, DEEP), "config.json cannot be read"),
        ("wan", write(CONFIG, []), "config.json list wanted an object"),
        ("wan", change(CONFIG, num_attention_heads=None), "config.json wrong type"),
        ("wan", change(CONFIG, num_layers=7), "missing: blocks.2"),
        ("wan", change(CONFIG, num_layers=10**9), "num_layers is 1000000000 wanted 1 to 1000"),
        ("wan", change(CONFIG, num_layers=2.0), "num_layers is 2.0 wanted an integer"),
        ("wan", change(CONFIG, patch_size=[1.0, 2.0, 2.0]), "patch_size (1.0, 2.0, 2.0) wanted"),
        (
            "wan",
            change(CONFIG, _class_name=["WanModel"]),
            "config.json _class_name wanted one of WanModel",
        ),
        ("none", None, "none neither here nor on the hub"),
        ("😀/\n", None, "neither here nor on the hub"),
    ],
)
def test_load_refuses(path, breaks, words, real, tmp_path, monkeypatch):
    import wan

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "wan.weights.snapshot_download", None
    )  # no network: that the hub is asked at all is an error here
    if path == "wan":
        shutil.copytree(real / "wan", tmp_path / "wan")
    if breaks:
        breaks(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        wan.load(path)
    assert (
        all(word in str(error.value) for word in words.split()) and snapshot(tmp_path) == before
    ), error.value


# ---------------------------------------------------------------- wan.prepare, wan.caption


def index(*rows):
    return write(
        "i.jsonl",
        b"".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in rows
        ),
    )


LISTED = (
    "o",
    "o/settings.json",
    "o/rejected.jsonl",
    "o/rejected-0000.jsonl",
)  # the rows that were refused, and why


@pytest.mark.slow
@pytest.mark.parametrize(
    "breaks, words",
    [
        (index(row("../outside.mp4")), "1 rows were rejected video leaves the folder"),
        (index(row("/etc/passwd")), "video leaves the folder"),
        (
            lambda folder: (
                (folder / "v/link.mp4").symlink_to("/etc/passwd"),
                index(row("link.mp4"))(folder),
            ),
            "video leaves the folder",
        ),
        (index('{"video": "café.mp4"}\n'.encode("latin-1")), "line is not UTF-8"),
        (index(json.dumps(row("a.mp4")).encode("utf-16")), "line is not UTF-8"),
        (index(DEEP.encode()), "line is not JSON"),
        (index(row("none.mp4"), row("none.mp4")), "2 rows were rejected line 1 does not exist"),
        (index(row("a.mp4", prompt="red " * 10_000)), "prompt has 10000 tokens, wanted 0 to 128"),
        (index(row("a.mp4", caption="")), "caption has 0 tokens, wanted 4 to 40"),
        (index(row("a.mp4", prompt="red</s>")), "text spells <pad> or </s>"),
        (
            lambda folder: (write("v/empty.mp4", b"")(folder), index(row("empty.mp4"))(folder)),
            "video cannot be read",
        ),
        (
            lambda folder: (
                Image.new("RGB", (9, 9)).save(folder / "v/still.png"),
                index(row("still.png"))(folder),
            ),
            "1 frames at 16 fps, wanted 9",
        ),
    ],
)
def test_prepare_lists_what_is_wrong_with_a_row(breaks, words, real, refused, tmp_path):
    shutil.copytree(real / "v", tmp_path / "v")
    refused(
        "wan.prepare",
        ["--videos", "v", "--index", "i.jsonl", "--out", "o", "--wan", real / "wan", *PREPARE],
        words,
        breaks,
        LISTED,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, breaks, words",
    [
        ("--frames 0", None, "--frames 0 wanted 4n + 1"),
        ("--sizes 160000000x16", None, "--sizes 160000000 wanted below 10000"),
        ("--sizes 33x48", None, "--sizes '33x48' wanted multiples of 16"),
        ("--fps 0", None, "--fps 0"),
        ("--out=", None, "--out '' wanted"),
        ("--index empty", write("empty", ""), "--index empty is empty"),
        (
            "--out file/below",
            write("file", "mine"),
            "file/below wanted a folder that can be written to Not a directory",
        ),
        ("", write("o/settings.json", DEEP), "o/settings.json cannot be read"),
        ("", write("o/settings.json", {"format": "another"}), "o was begun with 'another'"),
        ("", long_header("o/" + SHARD), f"{SHARD} cannot be read delete"),
        (
            "",
            lambda folder: (
                (folder / "o").mkdir()
                or save_file({"a": torch.ones(2)}, folder / "o" / SHARD, metadata={"clips": "[1]"})
            ),
            f"{SHARD} header delete",
        ),
        (
            "",
            write("o/rejected-0000.jsonl", "hello\n"),
            "line 1 of o/rejected-0000.jsonl b'hello' wanted",
        ),
        (
            "",
            below("wan/vae", write(f"{WEIGHTS}.index.json", {"weight_map": {"a": "../../x"}})),
            "index.json '../../x' own folder",
        ),
        (
            "",
            tensors(f"wan/vae/{WEIGHTS}", lambda name, x: x.to(torch.int8)),
            "wan/vae I8 wanted floating-point",
        ),
        ("", write("wan/tokenizer/tokenizer.json", "[]"), "tokenizer.json cannot be read"),
    ],
)
def test_prepare_refuses(flags, breaks, words, real, refused, tmp_path):
    shutil.copytree(
        real, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("data", "transformer")
    )
    argv = [
        "--videos",
        "v",
        "--index",
        "i.jsonl",
        "--out",
        "o",
        "--wan",
        "wan",
        *PREPARE,
        *flags.split(),
    ]
    refused("wan.prepare", argv, words, breaks, ("o/settings.json", "o/rejected-0000.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--caption-tokens 5", "--caption-tokens '5' wanted LOW-HIGH"),
        ("--out=", "--out '' wanted"),
        ("--show 0", "--show 0 wanted at least 1"),
        ("--index none", "--index none does not exist"),
        ("--fps 0", "--fps 0"),
    ],
)
def test_caption_refuses(flags, words, real, refused):
    refused(
        "wan.caption",
        [
            "--videos",
            real / "v",
            "--index",
            real / "i.jsonl",
            "--model",
            "none",
            "--out",
            "said.jsonl",
            *flags.split(),
        ],
        words,
    )


@pytest.mark.slow
def test_code_that_a_captioning_model_brings_does_not_run(real, refused, tmp_path):
    write(
        "model/config.json",
        {
            "model_type": "evil",
            "architectures": ["Evil"],
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"},
        },
    )(tmp_path)
    write("model/evil.py", "open('ran', 'w')")(tmp_path)
    refused(
        "wan.caption",
        [
            "--videos",
            real / "v",
            "--index",
            real / "i.jsonl",
            "--wan",
            real / "wan",
            "--model",
            "model",
            "--out",
            "said.jsonl",
        ],
        "--model model cannot be loaded",
    )
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- train.py on prepared data


def header(**values):
    """Other values in what a shard says of its clips, its size in the manifest mended."""

    def act(folder):
        with safe_open(folder / SHARD, "pt") as file:
            told = json.loads(file.metadata()["clips"])
        told["clips"] = [clip | values for clip in told["clips"]]
        save_file(load_file(folder / SHARD), folder / SHARD, metadata={"clips": json.dumps(told)})
        sized(folder)

    return act


def sized(folder):
    clips = json.loads((folder / "manifest.json").read_text())["shards"][SHARD]["clips"]
    change(
        "manifest.json", shards={SHARD: {"clips": clips, "bytes": (folder / SHARD).stat().st_size}}
    )(folder)


def clip(part, act):
    """Other tensors in a shard, its size in the manifest mended."""
    return lambda folder: (
        tensors(SHARD, lambda name, x: act(x) if name.endswith(part) else x)(folder),
        sized(folder),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "breaks, words",
    [
        (without("manifest.json", "codec"), "manifest.json codec wanted"),
        (change("manifest.json", shards=[]), "manifest.json shards '[]' wanted"),
        (
            change("manifest.json", shards={"../x": {"clips": 1, "bytes": 9}}),
            "manifest.json '../x' own folder",
        ),
        (change("manifest.json", shards={SHARD: {"clips": 1}}), "manifest.json form run it again"),
        (
            change("manifest.json", buckets={"9x16x16": {"clips": 2, "z_v": [16, 3, 2, 2]}}),
            f"{SHARD} 9x32x48 wanted 9x16x16",
        ),
        (write("manifest.json", DEEP), "manifest.json cannot be read"),
        (cut(SHARD, 900), f"{SHARD} 900 bytes wanted"),
        (header(video=3), f"{SHARD} header delete"),
        (
            lambda folder: (terabytes(SHARD)(folder), sized(folder)),
            f"{SHARD} cannot be read delete",
        ),
        (clip(".z_v", lambda x: x.to(torch.int8)), f"{SHARD} line z_v torch.int8 wanted delete"),
        (clip(".z_v", lambda x: x[:, :1]), f"{SHARD} line z_v (16, 1, 4, 6) wanted (16, 3, 4, 6)"),
        (clip(".caption", lambda x: x + 10**6), f"{SHARD} line ids vocabulary delete"),
        (clip(".c", lambda x: x.repeat(1, 2)), f"{SHARD} line c 64 wanted 32"),
    ],
)
def test_train_on_broken_data_costs_no_run(breaks, words, real, run, refused, tmp_path):
    """--overwrite must not delete the old run first. Only of a clip that is damaged itself,
    train.py learns when it reads it.
    """
    shutil.copytree(real / "data", tmp_path / "data")
    late = "line" in words
    if not late:
        shutil.copytree(run, tmp_path / "o")
    argv = [
        "--data",
        "data",
        "--init",
        real / "wan",
        "--out",
        "o",
        *"--recall-steps 1 --refine-steps 1 --eval-clips 0 --device cpu --workers 0".split(),
    ]
    refused(
        "train.py", argv if late else [*argv, "--overwrite"], words, below("data", breaks), ("o",)
    )


# ---------------------------------------------------------------- whole processes


def start(code, *argv, cwd, first=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)):
    """A Python process, which Ctrl-C reaches, as in a terminal."""
    return subprocess.Popen(
        [sys.executable, *code, *map(str, argv)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=first,
    )


@pytest.mark.parametrize(
    "tool", ["train.py", "sample.py", "toy.experiments", "wan.prepare", "wan.caption"]
)
def test_help_is_no_error(tool, capsys):
    if tool not in mains():
        pytest.skip("pip install -r requirements-wan.txt")
    with pytest.raises(SystemExit) as end:
        mains()[tool](["--help"])
    said = capsys.readouterr()
    assert end.value.code == 0 and "--" in said.out and said.err == ""


@pytest.mark.slow
def test_an_unknown_flag_ends_the_process_with_one_line(tmp_path):
    output, errors = (
        process := start([ROOT / "train.py"], "--colour", "red", cwd=tmp_path)
    ).communicate(timeout=120)
    assert (process.returncode, output, errors) == (
        2,
        "",
        "train.py: error: unrecognized arguments: --colour red\n",
    ) and snapshot(tmp_path) == {}


@pytest.mark.slow
def test_ctrl_c_while_training_leaves_whole_checkpoints(tmp_path):
    process, begin = (
        start(
            [ROOT / "train.py"],
            *TINY,
            "--generator-steps",
            10**6,
            "--save-every",
            5,
            "--out",
            "o",
            cwd=tmp_path,
        ),
        time.time(),
    )
    while process.poll() is None and time.time() < begin + 120 and not checkpoints(tmp_path / "o"):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 1) and errors == ""
    (step, folder), *_ = checkpoints(tmp_path / "o")
    UniViGU.from_pretrained(folder, strict=True)
    train.main(
        ["--resume", "--out", str(tmp_path / "o"), "--time-limit", "0.0001"]
    )  # it goes on, and stops at once
    assert checkpoints(tmp_path / "o")[-1][0] > step


SLOW = """
import sample
from engine.options import run_command
real = sample.generate
sample.generate = lambda *a, **k: print("drawing", flush=True) or real(*a, **k)
run_command(sample.main)
"""


@pytest.mark.slow
def test_ctrl_c_while_sampling_leaves_nothing(run, tmp_path):
    process = start(
        ["-c", SLOW],
        "generate",
        "--checkpoint",
        run / "refine",
        "--prompt",
        PROMPT,
        "--steps",
        10_000,
        "--out",
        "o.gif",
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "drawing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, 1) and errors == "" and snapshot(tmp_path) == {}


def bound():
    """Root without the capability to write where permissions say no.

    prctl 24 drops it for the program that is started next.
    """
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1, 0, 0, 0):
        os._exit(99)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes root's capabilities away as Linux does")
@pytest.mark.parametrize(
    "tool, argv, words",
    [
        (
            "train.py",
            [*TINY, "--out", "locked"],
            "out is locked, wanted a folder that can be written to",
        ),
        (
            "sample.py",
            ["generate", "--prompt", PROMPT, "--out", "locked/o.gif"],
            "--out locked/o.gif cannot be written Permission denied",
        ),
        (
            "toy.experiments",
            ["recall", "--out", "locked"],
            "out is locked, wanted a folder that can be written to",
        ),
        (
            "wan.prepare",
            ["--videos", ".", "--index", ROOT / "README.md", "--out", "locked/o"],
            "locked/o wanted a folder that can be written to Permission denied",
        ),
        (
            "wan.caption",
            [
                "--videos",
                ".",
                "--index",
                ROOT / "README.md",
                "--model",
                "none",
                "--out",
                "locked/o.jsonl",
            ],
            "locked wanted a folder that can be written to Permission denied",
        ),
    ],
)
def test_a_folder_without_write_permission_is_refused(tool, argv, words, run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    argv += ["--checkpoint", run / "refine"] * (tool == "sample.py")
    output, errors = (
        process := start(
            [ROOT / tool] if tool.endswith(".py") else ["-m", tool],
            *argv,
            cwd=tmp_path,
            first=bound,
        )
    ).communicate(timeout=120)
    assert (
        process.returncode == 1
        and output == ""
        and errors.count("\n") == 1
        and errors.startswith(f"{tool}: error: ")
    ), errors
    assert all(word in errors for word in words.split()) and list(snapshot(tmp_path)) == [
        "locked"
    ], errors


@pytest.fixture
def small_disk(tmp_path):
    """Makes the working folder a disk of so many bytes, which only root may."""

    def mount(size):
        if not shutil.which("mount"):
            pytest.skip("no small disk can be mounted here: there is no mount")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    yield mount
    os.chdir("/")
    subprocess.run(
        ["umount", "--lazy", str(tmp_path)], capture_output=True
    )  # a writer that failed may still hold its file


@pytest.mark.parametrize(
    "tool, size, argv, words, leaves",
    [
        *(
            (
                "train.py",
                size,
                [*TINY, "--out", "o", *flags],
                "o/generator cannot be written bytes were free",
                ("o", "o/metrics.jsonl"),
            )
            for size in ("48k", "108k", "200k")
            for flags in ([], ["--async-save"])
        ),  # in the weights, between, in the training state
        *(
            (
                "sample.py",
                size,
                ["generate", "--prompt", PROMPT, "--out", name],
                f"{name} cannot be written",
                (),
            )
            for size, name in (("4k", "o.gif"), ("8k", "o.npy"), ("4k", "o.mp4"), ("8k", "o"))
        ),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tool, size, argv, words, leaves, run, small_disk, refused, tmp_path
):
    small_disk(size)
    os.chdir(tmp_path)  # into what is mounted there now
    refused(
        tool,
        [*argv, *(["--checkpoint", run / "refine"] if tool == "sample.py" else [])],
        words,
        leaves=leaves,
    )
