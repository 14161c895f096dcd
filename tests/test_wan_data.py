"""The way of real data: what reaches the model is what the videos and the index say.

However often a run of wan.prepare or wan.caption is stopped.
"""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

for module in ("diffusers", "transformers", "av", "ftfy"):
    pytest.importorskip(
        module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
    )

import av
from conftest import refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_wan import write_wan_folder

from engine.options import run_command
from engine.video import on_screen, read_clip, read_windows, timed_pictures
from univigu import Config, UniViGU
from wan import caption, prepare
from wan.codec import Codec, PromptEncoder, Tokenizer
from wan.data import World
from wan.shards import FIELDS, FORMAT, Shards, held_out, read_header, read_manifest

pytestmark = pytest.mark.slow

ROOT = Path(prepare.__file__).parent.parent
TOOLS = {"wan.prepare": prepare, "wan.caption": caption}
PROMPT = "a red circle"
CAPTION = "a large red circle moves right on a black background"


# ---------------------------------------------------------------- films that tell what they show


def film(path, times, size=(48, 64), level=10, picture=None, rate=240, keys=250, **options):
    """A video of frames shown at `times` (s); frame i is grey of value level * i, or picture(i).

    size: rows, columns; rate: ticks a second, and the last frame lasts one; keys: frames from one
    key frame to the next; options: the format's.
    """
    picture = picture or (lambda i: np.full((*size, 3), level * i, np.uint8))
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(
            {".webm": "libvpx-vp9"}.get(path.suffix, "libx264"),
            rate=rate,
            options={"crf": "4", "g": str(keys)},
        )
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts, frame.time_base = round(time * rate), Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def gif(path, frames, milliseconds, size=(48, 64), level=10):
    first, *rest = [Image.new("RGB", size[::-1], (level * i,) * 3) for i in range(frames)]
    first.save(path, save_all=True, append_images=rest, duration=milliseconds)
    return path


def shown(path, level=10):
    """The number of the frame that each frame at 16 fps is."""
    return [
        round(np.asarray(picture()).mean() / level) for picture in on_screen(timed_pictures(path))
    ]


def wanted(times, end):
    """Which frame is on screen at k / 16 s, from the first one's time to `end`, all in seconds."""
    times, end = [time - times[0] for time in times], end - times[0]
    return [
        max(i for i, time in enumerate(times) if time <= k / 16 + 0.0005)
        for k in range(math.ceil(end * 16 - 0.01))
    ]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv", ".avi"])
@pytest.mark.parametrize("fps", [8, 16, 24, 30, 60])
def test_a_video_is_retimed_by_its_timestamps(suffix, fps, tmp_path):
    times = [i / fps for i in range(17)]
    path = film(tmp_path / f"clip{suffix}", times, rate=fps)
    assert shown(path) == wanted(times, 17 / fps)


def test_retiming_follows_uneven_timestamps_and_ignores_a_late_start(tmp_path):
    times = [0, 0.05, 0.3, 0.35, 0.4, 0.9, 1.0, 1.5]
    assert shown(film(tmp_path / "uneven.mp4", times)) == wanted(times, 1.5 + 1 / 240)
    late = [time + 1 for time in times]
    assert shown(film(tmp_path / "late.mp4", late)) == wanted(late, 2.5 + 1 / 240)


def test_a_picture_is_shown_until_the_next_and_the_last_as_long_as_the_file_says(tmp_path):
    for times in ([0.5, 0.7, 1.3], [2, 2, 2], [0.12] * 5):
        path = gif(tmp_path / "clip.gif", len(times), [round(1000 * time) for time in times])
        starts = [sum(times[:i]) for i in range(len(times))]
        assert shown(path) == wanted(starts, sum(times))
    slides = film(tmp_path / "slides.mkv", [0, 1, 3])  # says no more than how long it lasts
    with av.open(str(slides)) as file:
        length = file.duration / 1e6
    assert 3 < length and shown(slides) == wanted([0, 1, 3], length)


def test_a_clip_at_16_fps_and_images_keep_their_frames(tmp_path):
    for n in (1, 5, 9, 16):
        assert shown(film(tmp_path / f"{n}.webm", [i / 16 for i in range(n)])) == list(range(n))
    (tmp_path / "frames").mkdir()
    for i, name in enumerate(("2.png", "10.JPG", "11.jpeg")):
        Image.new("RGB", (64, 48), (70 + 10 * i,) * 3).save(tmp_path / "frames" / name)
    assert shown(tmp_path / "frames") == [7, 8, 9]
    assert shown(tmp_path / "frames/2.png") == [7] and shown(tmp_path / "frames/10.JPG") == [8]
    np.save(tmp_path / "a.npy", np.full((3, 48, 64, 3), 40, np.uint8))
    assert shown((tmp_path / "a.npy").rename(tmp_path / "a.NPY")) == [4, 4, 4]


# ---------------------------------------------------------------- sizes


def test_a_clip_is_resized_and_cropped_at_the_centre(tmp_path):
    rows, columns = 48, 96
    picture = np.zeros((rows, columns, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(columns) * 2, np.arange(rows)[:, None] * 5
    Image.fromarray(picture).save(tmp_path / "ramp.png")
    frames, cut = read_clip(tmp_path / "ramp.png", [(16, 16)], 1)
    assert frames.shape == (1, 16, 16, 3) and frames.dtype == np.uint8 and not cut
    centre = (
        np.arange(16) + 0.5
    ) * 3 - 0.5  # of an output pixel, in rows or columns of the middle square
    assert np.abs(frames[0, :, 3:-3, 0] - 2 * (24 + centre[3:-3])).max() <= 1
    assert np.abs(frames[0, 3:-3, :, 1] - 5 * centre[3:-3, None]).max() <= 1


def test_a_clip_goes_to_the_nearest_aspect_ratio(tmp_path):
    sizes = [(32, 48), (48, 32), (32, 32)]
    for rows, columns, wanted in (
        (20, 30, (32, 48)),
        (90, 50, (48, 32)),
        (50, 45, (32, 32)),
        (10, 100, (32, 48)),
    ):
        Image.new("RGB", (columns, rows)).save(tmp_path / "image.png")
        assert read_clip(tmp_path / "image.png", sizes, 1)[0].shape[1:3] == wanted


CORNERS = np.zeros((32, 64, 3), np.uint8)  # a picture that looks the same in no other position
CORNERS[:16, :32], CORNERS[:16, 32:], CORNERS[16:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
# A display matrix (a b, c d) or an EXIF orientation, and what it makes of the stored pixels: as
# EXIF's standard draws its eight.
POSITIONS = [
    ((1, 0, 0, 1), 1, lambda x: x),
    ((-1, 0, 0, 1), 2, lambda x: x[:, ::-1]),
    ((-1, 0, 0, -1), 3, lambda x: x[::-1, ::-1]),
    ((1, 0, 0, -1), 4, lambda x: x[::-1]),
    ((0, 1, 1, 0), 5, lambda x: x.transpose(1, 0, 2)),
    ((0, 1, -1, 0), 6, lambda x: np.rot90(x, -1)),
    ((0, -1, -1, 0), 7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
    ((0, -1, 1, 0), 8, lambda x: np.rot90(x)),
]


@pytest.mark.parametrize("matrix, orientation, position", POSITIONS)
def test_a_video_or_photograph_stands_upright(matrix, orientation, position, tmp_path):
    """Phones film lying and note how in the track header, as a matrix, or in EXIF."""
    path = film(tmp_path / "phone.mp4", [0, 1 / 16], size=(32, 64), picture=lambda i: CORNERS)
    raw = path.read_bytes()
    at = raw.index(b"tkhd") + 44
    a, b, c, d = matrix
    packed = struct.pack(">5i", *(65536 * n for n in (a, b, 0, c, d)))
    path.write_bytes(raw[:at] + packed + raw[at + 20 :])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("photo.jpg", "photo.png"):
        Image.fromarray(CORNERS).save(tmp_path / name, exif=exif)
    for name in ("phone.mp4", "photo.jpg", "photo.png"):
        _, picture = next(timed_pictures(tmp_path / name))
        found, upright = np.asarray(picture()), position(CORNERS)
        assert found.shape == upright.shape and np.abs(found - 1.0 * upright).mean() < 12, name


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_pixels_that_are_not_square_are_stretched(suffix, tmp_path):
    """Stored 64 x 48, with pixels twice as wide as high, and half as wide."""
    for aspect, size in ((Fraction(2), (128, 48)), (Fraction(1, 2), (64, 96))):
        path = tmp_path / f"wide{suffix}"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=16)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.sample_aspect_ratio = aspect
            for _ in range(2):
                blank = np.zeros((48, 64, 3), np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(blank, format="rgb24")))
            file.mux(stream.encode())
        _, picture = next(timed_pictures(path))
        assert picture().size == size


@pytest.mark.parametrize("matrix, luma", [(1, (0.2126, 0.0722)), (5, (0.299, 0.114))])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_are_those_of_the_matrix_and_range_that_a_file_names(matrix, luma, full, tmp_path):
    """BT.709 and BT.601, by their formulas; matrix is FFmpeg's number."""
    rgb = np.array([200, 60, 30]) / 255
    red, blue = luma
    y = rgb @ (red, 1 - red - blue, blue)
    chroma = [(rgb[2] - y) / (2 - 2 * blue), (rgb[0] - y) / (2 - 2 * red)]
    scale, least = (255, 255) if full else (219, 224)
    planes = [y * scale + (0 if full else 16), *(c * least + 128 for c in chroma)]
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full
        grey = np.ones((3, 48, 64))
        pixels = (grey * np.reshape(planes, (3, 1, 1))).round().astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(pixels, format="yuv444p")
        frame.colorspace, frame.color_range = matrix, 1 + full
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    pixels, _ = read_clip(tmp_path / "clip.mp4", [(48, 64)], 1)
    assert np.abs(pixels - 255 * rgb).max() < 2


def test_grey_of_16_bits_is_not_clipped(tmp_path):
    Image.fromarray(np.full((48, 64), 300 * 100, np.uint16)).save(tmp_path / "deep.png")
    pixels, _ = read_clip(tmp_path / "deep.png", [(48, 64)], 1)
    assert (pixels == 30000 // 256).all()


def test_what_is_another_kind_than_its_name_says_is_named(tmp_path):
    film(tmp_path / "clip.webm", [0, 1 / 16]).rename(tmp_path / "clip.mp4")
    gif(tmp_path / "clip.gif", 2, 100).rename(tmp_path / "clip.mkv")
    song(tmp_path / "song.mp4")
    for name, words in (
        ("clip.mp4", "it is a WebM or Matroska file, wanted it named .webm or .mkv"),
        ("clip.mkv", "it is a GIF file, wanted it named .gif"),
        ("song.mp4", "it is a song with cover art"),
    ):
        with pytest.raises(ValueError, match=f"{name} cannot be read: {words}"):
            read_clip(tmp_path / name, [(16, 16)], 1)


def song(path):
    """Half a second of silence, and a cover as players' libraries store it: moov/udta/.../covr."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.rate = 16000
        file.mux([*stream.encode(sound), *stream.encode()])
    Image.new("RGB", (64, 48)).save(path.with_suffix(".jpg"))

    def box(name, content):
        return struct.pack(">I", 8 + len(content)) + name + content

    data = box(b"data", struct.pack(">2I", 13, 0) + path.with_suffix(".jpg").read_bytes())
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    meta = box(b"meta", bytes(4) + handler + box(b"ilst", box(b"covr", data)))
    raw = path.read_bytes()
    at = raw.index(b"moov") - 4  # the last box of the file
    path.write_bytes(raw[:at] + box(b"moov", raw[at + 8 :] + box(b"udta", meta)))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_longer_video_is_cut_into_windows_of_4n_plus_1_frames(suffix, tmp_path):
    """Whether they are read one after the other or one alone, which seeks."""
    path = film(tmp_path / f"long{suffix}", [i / 16 for i in range(60)], rate=16, level=4, keys=9)
    number = lambda image: round(np.asarray(image).mean() / 4)
    cut = list(read_windows(path, 21, number))
    assert cut == [([*range(21)], True), ([*range(21, 42)], True), ([*range(42, 59)], True)]
    for i, window in enumerate(cut):
        assert next(read_windows(path, 21, number, first=i)) == window
    with pytest.raises(ValueError, match="cannot be read: it ends before window 3 of 21"):
        read_clip(path, [(48, 64)], 21, window=3)


# ---------------------------------------------------------------- a prepared folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return str(write_wan_folder(tmp_path_factory.mktemp("wan") / "tiny"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with good videos of several kinds, rates and sizes, and bad ones."""
    folder = tmp_path_factory.mktemp("films") / "videos"
    (folder / "more").mkdir(parents=True)
    film(folder / "a.mp4", [i / 24 for i in range(20)])
    film(folder / "more/b.webm", [i / 12 for i in range(9)], size=(80, 48))
    film(folder / "c.mov", [i / 30 for i in range(24)])
    gif(folder / "d.gif", 8, 100, size=(70, 50))
    film(folder / "short.mp4", [i / 16 for i in range(7)])
    Image.new("RGB", (64, 48)).save(folder / "image.png")
    (folder / "text.mp4").write_text("#EXTM3U\n#EXTINF:10,\na.mp4\n")
    noise = lambda i: np.random.RandomState(i).randint(0, 256, (48, 64, 3)).astype(np.uint8)
    noisy = film(
        folder / "noisy.mp4", [i / 16 for i in range(9)], picture=noise, movflags="faststart"
    ).read_bytes()
    (folder / "cut header.mp4").write_bytes(noisy[:300])
    (folder / "cut.mp4").write_bytes(noisy[: len(noisy) // 2])
    at = len(noisy) // 2
    (folder / "damaged.mp4").write_bytes(
        noisy[:at] + bytes(byte ^ 0x5A for byte in noisy[at : at + 40]) + noisy[at + 40 :]
    )
    (folder / "zeros.mp4").write_bytes(noisy[:at] + bytes(3000) + noisy[at + 3000 :])
    (folder / "notes.txt").write_text("hello")
    shutil.copy(folder / "a.mp4", folder.parent / "outside.mp4")
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    return folder


def write_index(path, rows):
    """rows: dicts, or bytes that are taken as they are."""
    path.write_bytes(
        b"".join(
            row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
        )
    )
    return path


def row(video, prompt=PROMPT, caption=CAPTION, **more):
    return {"video": video, "prompt": prompt, "caption": caption, **more}


@pytest.fixture(scope="module")
def index(films, wan):
    """12 good rows among 6 bad ones."""
    texts = [f"{CAPTION} and {word}" for word in ("left", "up", "down")]
    good = [
        row(video, caption=text)
        for text in texts
        for video in ("a.mp4", "more/b.webm", "c.mov", "d.gif")
    ]
    bad = [
        row("short.mp4"),
        b"not json\n",
        row("none.mp4"),
        row("a.mp4", caption="no"),
        row("a.mp4", prompt=CAPTION * 9),
        good[1],
    ]
    mixed = [line for i in range(6) for line in (good[2 * i], bad[i], good[2 * i + 1])]
    return write_index(films.parent / "index.jsonl", mixed)


@pytest.fixture(scope="module")
def limits(wan):
    """Flags with token limits that the texts above keep to."""
    count = lambda text: len(Tokenizer(wan).ids(text)) - 1
    assert count("no") < count(CAPTION) and count(PROMPT) < count(CAPTION * 9)
    return {
        "--prompt-tokens": f"0-{count(PROMPT) + 2}",
        "--caption-tokens": f"{count('no') + 1}-{count(CAPTION + ' and down') + 20}",
    }


def words(flags):
    """{"--flag": value} as a command line."""
    return [str(part) for pair in flags.items() for part in pair]


@pytest.fixture(scope="module")
def usual(films, index, wan, limits):
    """The flags of wan.prepare but --out."""
    flags = {"--videos": films, "--index": index, "--wan": wan, "--frames": 9, "--min-frames": 9}
    return flags | {"--sizes": "32x48,48x32", "--shard-clips": 4} | limits


@pytest.fixture(scope="module")
def go(usual):
    """Runs prepare into a folder; flags override the usual ones."""

    def go(out, *flags, **paths):
        known = usual | {f"--{name}": path for name, path in paths.items()} | {"--out": out}
        prepare.main([*words(known), *map(str, flags)])
        return out

    return go


@pytest.fixture(scope="module")
def whole(go, tmp_path_factory):
    return go(tmp_path_factory.mktemp("whole") / "out")


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def clips_of(folder):
    """Every clip of a prepared folder: (video, caption ids) -> its tensors."""
    found = {}
    for path in folder.glob("shard-*.safetensors"):
        tensors = load_file(path)
        for clip in read_header(path)["clips"]:
            own = [tensors[f"{clip['line']}.{name}"] for name in FIELDS]
            assert found.setdefault((clip["video"], tuple(own[3].tolist())), own) is own
    return found


def rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_a_clip_is_stored_as_codec_encoder_and_tokenizer_give_it(whole, films, wan):
    codec, encoder, tokenizer = (
        Codec(wan, "cpu", torch.float32),
        PromptEncoder(wan, "cpu", torch.float32),
        Tokenizer(wan),
    )
    manifest, clips = json.loads((whole / "manifest.json").read_text()), clips_of(whole)
    assert (
        len(clips) == manifest["clips"] == 12
        and manifest["rejected"] == 6
        and manifest["cut"] == 12
    )
    for video in ("a.mp4", "more/b.webm"):
        ids = tokenizer.ids(f"{CAPTION} and left")
        z_v, c, prompt, caption_ids = clips[video, tuple(ids)]
        frames, _ = read_clip(films / video, [(32, 48), (48, 32)], 9)
        assert frames.shape == ((9, 32, 48, 3) if video == "a.mp4" else (9, 48, 32, 3))
        wanted = codec.encode(
            torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        )[0]
        assert z_v.dtype == torch.float16 and torch.equal(z_v, wanted.half())
        length = len(tokenizer.ids(PROMPT))
        assert (
            c.dtype == torch.bfloat16
            and torch.equal(c, encoder([PROMPT])[0, :length].bfloat16())
            and len(c) == length
        )
        assert (
            prompt.tolist() == list(tokenizer.ids(PROMPT))
            and prompt.dtype == caption_ids.dtype == torch.int32
        )
        assert manifest["buckets"]["x".join(map(str, frames.shape[:3]))]["z_v"] == list(z_v.shape)
    texts = [PROMPT, *(f"{CAPTION} and {word}" for word in ("left", "up", "down"))]
    assert manifest["vocabulary"] == sorted({0, 1}.union(*(tokenizer.ids(text) for text in texts)))
    assert (
        manifest["codec"] == codec.fingerprint and manifest["prompt_encoder"] == encoder.fingerprint
    )
    assert (
        sum(bucket["clips"] for bucket in manifest["buckets"].values())
        == sum(shard["clips"] for shard in manifest["shards"].values())
        == 12
    )
    assert not list(whole.glob(".*")) and len({f.stat().st_mode for f in whole.iterdir()}) == 1


# ---------------------------------------------------------------- what is refused


def test_every_bad_row_is_listed_with_its_line_and_reason(go, films, tmp_path, limits):
    bad = [
        (b"\xff\xfe\n", "not UTF-8"),
        (b"{\n", "not JSON"),
        (b"\n", "not JSON"),
        (b"[1]\n", "video is missing"),
        (b"[" * 9000 + b"\n", "not JSON"),
        ({"video": "a.mp4", "prompt": "x"}, "caption is missing"),
        (row("a.mp4", prompt=3), "prompt is missing or no string"),
        (row("a.mp4", prompt="\ud800"), "prompt is not valid Unicode"),
        (row("../outside.mp4"), "leaves the folder"),
        (row("link.mp4"), "leaves the folder"),
        (row(str(films / "a.mp4")), "leaves the folder"),
        (row("loop.mp4"), "does not exist"),
        (row("a\0.mp4"), "null"),
        (row("x" * 300 + ".mp4"), "name too long"),
        (row("more"), "without PNG or JPEG frames"),
        (row("none.mp4"), "does not exist"),
        (row("notes.txt"), "'.txt', wanted one of .mp4"),
        (row("text.mp4"), "cannot be read"),
        (row("cut header.mp4"), "no pictures"),
        (row("cut.mp4"), "video "),
        (row("damaged.mp4"), "video "),
        (row("zeros.mp4"), "video"),
        (row("short.mp4"), "5 frames at 16 fps, wanted 9"),
        (row("image.png"), "1 frames at 16 fps, wanted 9"),
        (row("a.mp4", prompt=PROMPT * 20), "prompt has"),
        (row("a.mp4", caption="no"), "caption has"),
        (row("a.mp4"), "repeats line 1"),
    ]
    rows = [row("a.mp4"), *(line for line, _ in bad)]
    out = go(tmp_path / "out", index=write_index(tmp_path / "index.jsonl", rows))
    listed = {entry["line"]: entry for entry in rejected(out)}
    assert list(listed) == list(range(2, len(rows) + 1))
    for line, (given, reason) in enumerate(bad, 2):
        assert reason in listed[line]["reason"] and listed[line]["reason"], (given, listed[line])
    assert len(clips_of(out)) == 1


def test_videos_of_any_length_give_what_their_windows_show(go, tmp_path):
    rows = [row("short.mp4"), row("image.png"), row("a.mp4"), row("a.mp4", window=1)]
    rows += [row("a.mp4", window=9), row("a.mp4", window="1")]
    out = go(tmp_path / "out", "--min-frames", 1, index=write_index(tmp_path / "index.jsonl", rows))
    manifest = json.loads((out / "manifest.json").read_text())
    assert {size: bucket["clips"] for size, bucket in manifest["buckets"].items()} == {
        "1x32x48": 1,
        "5x32x48": 2,
        "9x32x48": 1,
    }
    assert manifest["cut"] == 2
    late, text = rejected(out)
    assert late["line"] == 5 and "ends before window 9 of 9 frames" in late["reason"]
    assert text["line"] == 6 and text["reason"] == "window is '1', wanted its number, from 0"


def test_latents_and_embeddings_that_are_not_finite_are_refused(go, tmp_path, monkeypatch):
    real, factors = Codec.encode, iter((1, math.nan, 1e6))
    monkeypatch.setattr(Codec, "encode", lambda self, frames: real(self, frames) * next(factors))
    out = go(
        tmp_path / "out",
        index=write_index(tmp_path / "index.jsonl", [row("a.mp4"), row("c.mov"), row("d.gif")]),
    )
    assert [(entry["line"], entry["reason"]) for entry in rejected(out)] == [
        (2, "latent is not finite"),
        (3, "latent is not finite"),
    ]


def refused(capsys, main, *argv, tool="wan.prepare"):
    line = refusal(capsys, main, *argv)
    assert line.startswith(f"{tool}: error: "), line
    return line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--frames", 80], "--frames 80 4n + 1"),
        (["--frames", 9, "--min-frames", 13], "--min-frames 13 9"),
        (["--sizes", "32x40"], "--sizes 16"),
        (["--sizes", "wide"], "--sizes wide"),
        (["--sizes", "32"], "--sizes ROWSxCOLUMNS"),
        (["--prompt-tokens", "9-3"], "--prompt-tokens LOW-HIGH"),
        (["--caption-tokens", "many"], "--caption-tokens many"),
        (["--shard-clips", 0], "--shard-clips 0"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_bad_flag_is_one_line(flags, words, go, tmp_path, capsys):
    out = tmp_path / "out"
    text = refused(capsys, lambda argv: go(out, *argv), *flags)
    assert all(word in text for word in words.split()), text
    with pytest.raises(SystemExit) as end:
        go(out, *flags)
    assert end.value.code == 2 and not out.exists()


def test_what_cannot_be_prepared_is_one_line(go, films, tmp_path, capsys):
    bad = write_index(tmp_path / "bad.jsonl", [b"x\n", row("none.mp4")])
    out, nowan = tmp_path / "out", tmp_path / "nowan"
    assert str(nowan) in refused(capsys, lambda argv: go(out, *argv), "--wan", nowan)
    text = refused(capsys, lambda argv: go(out, *argv), "--prompt-tokens", "0-9999")
    assert "--prompt-tokens" in text and not out.exists()
    text = refused(capsys, lambda _: go(out, index=bad))
    assert "2 rows were rejected" in text and "not JSON" in text and len(rejected(out)) == 2
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    "tool, flag, name, words",
    [
        *(
            (tool, *case)
            for tool in TOOLS
            for case in (
                ("--index", "none", "does not exist"),
                ("--index", "empty", "is empty"),
                ("--index", "folder", "is a folder, wanted a file"),
                ("--videos", "none", "is no folder"),
                ("--videos", "file", "is no folder"),
                ("--out", "file/in/it", "wanted a folder that can be written to Not a directory"),
            )
        ),
        ("wan.prepare", "--out", "file", "wanted a folder that can be written to Not a directory"),
        ("wan.caption", "--out", "folder", "is a folder, wanted a file"),
        (
            "wan.caption",
            "--out",
            "file",
            "line 1 is b'keep', wanted an object with video, prompt, caption",
        ),
    ],
)
def test_paths_are_checked_before_anything_is_loaded(
    tool, flag, name, words, films, index, tmp_path, capsys
):
    """Were a part of Wan looked for, it would be missed, for there is none."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_text("keep\n")
    flags = {
        "--videos": films,
        "--index": index,
        "--out": tmp_path / "out",
        "--wan": tmp_path / "nowan",
        flag: tmp_path / name,
    }
    flags |= {"--model": "none"} if tool == "wan.caption" else {}
    argv = [str(part) for pair in flags.items() for part in pair]
    text = refused(capsys, TOOLS[tool].main, *argv, tool=tool)
    assert all(word in text for word in words.split()), text
    assert str(tmp_path / name.split("/")[0]) in text, text
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "keep\n"


@pytest.mark.parametrize(
    "tool, missing",
    [
        *(("wan.prepare", name) for name in ("diffusers", "transformers", "ftfy", "av")),
        ("wan.caption", "tokenizers"),
        ("wan.caption", "av"),
    ],
)
def test_without_the_extras_one_line_says_what_to_install(tool, missing, films, index, tmp_path):
    # to import it is a ModuleNotFoundError
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    flags = {"--videos": films, "--index": index, "--out": tmp_path / "out"}
    flags |= {"--model": "none"} if tool == "wan.caption" else {}
    command = [sys.executable, "-m", tool, *words(flags)]
    for flags in ([], ["--help"]):
        done = subprocess.run(
            [*command, *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        if flags:
            assert done.returncode == 0 and "--index" in done.stdout and not done.stderr
        else:
            wanted = (
                f"{tool}: error: {missing} is not installed: pip install -r requirements-wan.txt\n"
            )
            assert (done.returncode, done.stdout, done.stderr) == (1, "", wanted)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused(go, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    before = contents(out)
    other = write_index(tmp_path / "other.jsonl", [row("a.mp4")])
    for flags, index_flag, words in (
        (["--frames", 5, "--min-frames", 5], {}, "frames 5 9"),
        (["--sizes", "48x32"], {}, "sizes [[48,"),
        (["--latents", "raw"], {}, "raw normalised"),
        ([], {"index": other}, "index"),
    ):
        text = refused(capsys, lambda argv, paths=index_flag: go(out, *argv, **paths), *flags)
        assert all(word in text for word in [*words.split(), str(out)]), text
    assert contents(out) == before


# ---------------------------------------------------------------- stopping and sharing the work


class Killed(BaseException):
    """Stands for SIGKILL: nothing in prepare.py catches it."""


def stopped(go, out, monkeypatch, name, calls):
    """A run that dies at call number `calls` of a function of prepare.py."""
    real, count = getattr(prepare, name), iter(range(1, 10**6))

    def act(*args, **kwargs):
        if next(count) == calls:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepare, name, act)
        go(out)


@pytest.mark.parametrize(
    "name, calls",
    [
        ("encode", [1]),
        ("encode", [3]),
        ("encode", [6, 4]),
        ("encode", [12]),
        ("save_file", [1]),
        ("save_file", [3, 1]),
        ("merge", [1]),
        ("write_shared", [3]),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(name, calls, go, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for call in calls:
        stopped(go, out, monkeypatch, name, call)
        assert not (out / "manifest.json").exists()
    with open(out / "rejected-0000.jsonl", "a") as file:
        file.write('{"line": 17, "vid')  # a line that was being written
    (out / ".part-shard-0000-00001.safetensors").write_bytes(b"half a shard")
    done = {f.name: f.stat().st_mtime_ns for f in out.glob("shard-*")}
    go(out)
    (out / ".part-shard-0000-00001.safetensors").unlink(missing_ok=True)
    assert contents(out) == contents(whole)
    # what was written is not written again
    assert all((out / name).stat().st_mtime_ns == time for name, time in done.items())
    go(out)
    assert contents(out) == contents(whole)


SIGKILL = """
import os, signal, sys
from wan import prepare
real, count = prepare.encode, iter(range(9))
def encode(*args):
    next(count) == 5 and os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
prepare.encode = encode
prepare.main(sys.argv[1:])
"""
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def test_sigkill_in_the_middle(go, whole, usual, tmp_path):
    """The real thing: a process that kills itself as it encodes its sixth clip."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SIGKILL, *words(usual | {"--out": out})]
    done = subprocess.run(command, cwd=ROOT, env=ON_CPU, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert [f.name for f in out.glob("shard-*")] == ["shard-0000-00000.safetensors"]
    go(out)
    assert contents(out) == contents(whole)


def test_ctrl_c_ends_a_run_without_a_traceback(usual, tmp_path):
    rows = [row("a.mp4", prompt=str(i)) for i in range(300)]
    out, index = tmp_path / "out", write_index(tmp_path / "index.jsonl", rows)
    flags = usual | {"--index": index, "--shard-clips": 1, "--out": out}
    run = subprocess.Popen(
        [sys.executable, "-m", "wan.prepare", *words(flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ON_CPU,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not [*out.glob("shard-*")] and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT, errors  # so that a shell ends its script, too
    assert "Traceback" not in errors and "manifest" not in output, errors
    assert 0 < len([*out.glob("shard-*")]) < len(rows) and not (out / "manifest.json").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_neither_tool_keeps_ctrl_c_to_itself(tool, films, index, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TOOLS[tool], "check_writable", interrupt)
    flags = {"--videos": films, "--index": index, "--out": tmp_path / "out"}
    flags |= {"--model": "none"} if tool == "wan.caption" else {}
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run_command(lambda: TOOLS[tool].main(words(flags)))
    assert sent == [(os.getpid(), signal.SIGINT)] and capsys.readouterr() == ("", "")


def test_a_shard_that_was_deleted_is_made_again(go, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "shard-0000-00001.safetensors").unlink()
    go(out)
    assert contents(out) == contents(whole)


def test_ranks_share_the_work(go, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in "2013":
        assert not (out / "manifest.json").exists()
        monkeypatch.setenv("RANK", rank)
        go(out)
    one, four = clips_of(whole), clips_of(out)
    assert one.keys() == four.keys()
    assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], four[key]))
    assert rejected(out) == rejected(whole)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, out)]
    for name in ("clips", "rejected", "cut", "vocabulary", "buckets"):
        assert manifests[0][name] == manifests[1][name]
    assert [name[:10] for name in manifests[1]["shards"]] == [
        f"shard-000{rank}" for rank in range(4)
    ]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "ranks is 2" in refused(capsys, lambda _: go(out))


def test_torchrun_gives_the_clips_of_one_process(whole, usual, tmp_path):
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "wan.prepare"]
    command += words(usual | {"--out": out})
    done = subprocess.run(command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = clips_of(whole), clips_of(out)
    assert one.keys() == two.keys()
    assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], two[key]))
    ranks = {name[:10] for name in contents(out) if name.startswith("shard")}
    assert ranks == {"shard-0000", "shard-0001"} and rejected(out) == rejected(whole)
    a, b = (json.loads((folder / "manifest.json").read_text()) for folder in (whole, out))
    assert {name for name in a if a[name] != b[name]} == {"ranks", "shards"}


# ---------------------------------------------------------------- the dataset


def test_an_index_without_captions_gives_clips_for_recall(
    go, films, whole, tmp_path, capsys, limits
):
    rows = [row("a.mp4"), row("c.mov")]
    for r in rows:
        del r["caption"]
    write_index(tmp_path / "prompts.jsonl", rows)
    index = ["--index", str(tmp_path / "prompts.jsonl")]
    go(tmp_path / "out", *index)
    said = capsys.readouterr().out
    assert "serve stage recall alone" in said
    manifest = read_manifest(tmp_path / "out")
    assert manifest["texts"] == ["prompt"] and read_manifest(whole)["texts"] == [
        "prompt",
        "caption",
    ]
    dataset = Shards(tmp_path / "out")
    batch = dataset.__getitems__([0])
    assert batch.keys() == {"z_v", "c", "prompt"}
    assert World(tmp_path / "out").texts == ("prompt",)

    rows[1]["caption"] = CAPTION  # a caption in one row: then all need one
    write_index(tmp_path / "mixed.jsonl", rows)
    go(tmp_path / "mixed", "--index", str(tmp_path / "mixed.jsonl"))
    (left_out,) = rejected(tmp_path / "mixed")
    assert left_out["line"] == 1 and left_out["reason"] == "caption is missing or no string"


def test_folders_of_before_captions_were_optional_are_read(whole, tmp_path):
    old = shutil.copytree(whole, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest.pop("texts") == ["prompt", "caption"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    a, b = Shards(whole)[0], Shards(old)[0]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    (old / "manifest.json").write_text(json.dumps(manifest | {"texts": ["smell"]}))
    with pytest.raises(ValueError, match="texts .'smell'."):
        Shards(old)


def test_the_dataset_gives_what_is_stored(whole, wan):
    manifest, stored = json.loads((whole / "manifest.json").read_text()), clips_of(whole)
    for full in (False, True):
        shards = Shards(whole, split="train", full_vocabulary=full)
        batch = shards.__getitems__(shards.batch(0, 3))
        b, n = 3, manifest["text_len"]
        assert (
            batch["z_v"].dtype == batch["c"].dtype == torch.float32
            and batch["prompt"].dtype == batch["caption"].dtype == torch.int64
        )
        assert batch["prompt"].shape == batch["caption"].shape == (b, n) and batch["c"].shape == (
            b,
            manifest["prompt_len"],
            manifest["prompt_dim"],
        )
        for i, index in enumerate(shards.batch(0, 3)):
            z_v, c, prompt, caption_ids = shards.read(index)
            assert any(torch.equal(z_v, other[0]) for other in stored.values())
            assert (
                torch.equal(batch["z_v"][i], z_v.float())
                and torch.equal(batch["c"][i, : len(c)], c.float())
                and not batch["c"][i, len(c) :].any()
            )
            for ids, y in ((prompt, batch["prompt"][i]), (caption_ids, batch["caption"][i])):
                y = y if full else torch.tensor(manifest["vocabulary"])[y]
                assert torch.equal(y[: len(ids)], ids.long()) and not y[len(ids) :].any()
    text = f"{CAPTION} and left"
    tokenizer = Tokenizer(wan, length=manifest["text_len"], vocabulary=manifest["vocabulary"])
    ids = torch.tensor(Tokenizer(wan).ids(text))
    assert torch.equal(Shards(whole).tokens(ids), torch.as_tensor(tokenizer.encode([text]))[0])
    assert {name: value.shape for name, value in shards[0].items()} == {
        name: value.shape[1:] for name, value in shards.__getitems__([0]).items()
    }


def test_a_text_of_exactly_n_tokens_goes_without_eos(whole):
    shards = Shards(whole, full_vocabulary=True)
    n = shards.text_len
    ids = torch.arange(2, n + 2, dtype=torch.int32)
    assert shards.tokens(torch.cat([ids, torch.ones(1).int()])).tolist() == ids.tolist()
    assert shards.tokens(torch.cat([ids[:-1], torch.ones(1).int()])).tolist() == [
        *ids[:-1].tolist(),
        1,
    ]
    assert shards.tokens(torch.tensor([5, 1])).tolist() == [5, 1] + [0] * (n - 2)


def many(folder, sizes, shard_clips=16, channels=2):
    """A prepared folder of small clips, sizes[s] of size s.

    Every entry of a clip's latent (channels, 1, 2, 2 (s + 1)) is its line.
    """
    folder.mkdir()
    line, y = iter(range(10**6)), torch.tensor([5, 1], dtype=torch.int32)
    clips = [
        {"line": next(line), "size": [1, 16, 16 * (s + 1)], "cut": False}
        for s, n in enumerate(sizes)
        for _ in range(n)
    ]
    clips = [{"video": f"{clip['line']}.mp4", **clip} for clip in clips]
    manifest = {
        "format": FORMAT,
        "text_len": 4,
        "prompt_len": 3,
        "prompt_dim": 2,
        "vocab_size": 9,
        "vocabulary": [0, 1, 5],
        "wan": "none",
        "codec": "none",
        "prompt_encoder": "none",
        "latents": "normalised",
        "shards": {},
        "buckets": {
            f"1x16x{16 * (s + 1)}": {"clips": n, "z_v": [channels, 1, 2, 2 * (s + 1)]}
            for s, n in enumerate(sizes)
        },
    }
    for i in range(0, len(clips), shard_clips):
        tensors, some = {}, clips[i : i + shard_clips]
        for clip in some:
            z_v = torch.full((channels, 1, 2, clip["size"][2] // 8), clip["line"]).half()
            tensors |= {
                f"{clip['line']}.{name}": tensor
                for name, tensor in zip(
                    FIELDS, (z_v, torch.ones(1, 2).bfloat16(), y.clone(), y.clone())
                )
            }
        path = folder / f"shard-0000-{i:05d}.safetensors"
        save_file(
            tensors,
            path,
            metadata={"clips": json.dumps({"format": FORMAT, "clips": some, "vocabulary": [5]})},
        )
        manifest["shards"][path.name] = {"clips": len(some), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_digest_is_of_what_is_in_a_batch(tmp_path):
    """Not of where the folder is, nor of how its clips are cut into shards."""
    wanted = Shards(many(tmp_path / "a", [9, 3])).digest
    assert Shards(many(tmp_path / "b", [9, 3], shard_clips=5)).digest == wanted
    assert Shards(many(tmp_path / "c", [9, 2])).digest != wanted
    assert Shards(many(tmp_path / "d", [8, 4])).digest != wanted
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text()) | {"index": "other"}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert Shards(tmp_path / "a").digest != wanted


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_an_epoch_visits_every_clip_once_in_batches_of_one_size(size, tmp_path):
    shards = Shards(many(tmp_path / "many", [40, 13, 3]), seed=3)
    counts = [len(clips) for clips in shards.members]
    per_epoch = sum(math.ceil(n / size) for n in counts)
    orders = []
    for epoch in range(3):
        batches = [shards.batch(epoch * per_epoch + i, size) for i in range(per_epoch)]
        assert all(
            len(batch) == size and len(set(shards.bucket[batch].tolist())) == 1 for batch in batches
        )
        visited = Counter(index for batch in batches for index in batch)
        assert set(visited) == set(range(len(shards)))
        fill = [
            math.ceil(n / size) * size - n for n in counts
        ]  # places that the next shuffle fills
        assert sum(visited.values()) - len(shards) == sum(fill)
        assert all(
            visited[i] <= 1 + math.ceil(fill[b] / counts[b])
            for i, b in enumerate(shards.bucket.tolist())
        )
        orders.append(batches)
    assert orders[0] != orders[1] != orders[2]
    again = Shards(tmp_path / "many", seed=3)
    assert [again.batch(i, size) for i in range(per_epoch, 2 * per_epoch)] == orders[
        1
    ]  # without the batches before
    assert [Shards(tmp_path / "many", seed=4).batch(i, size) for i in range(per_epoch)] != orders[0]


def test_validation_clips_are_apart(tmp_path):
    folder = many(tmp_path / "many", [90, 30])
    train, val = Shards(folder), Shards(folder, split="val")
    assert (
        len(val) == 2
        and len(train) == 118
        and not set(train.line.tolist()) & set(val.line.tolist())
    )
    assert {len(Shards(many(tmp_path / str(n), [n]), split="val")) for n in (1, 10)} == {0}
    assert len(Shards(many(tmp_path / "11", [11]), split="val")) == 1
    assert held_out([f"{i}.mp4" for i in range(120)]) == held_out(
        [f"{i // 3}.mp4" for i in reversed(range(360))]
    )
    with pytest.raises(ValueError, match="'test', wanted one of train, val"):
        Shards(folder, split="test")


def test_the_loader_reads_a_batch_at_a_time(tmp_path):
    shards = Shards(many(tmp_path / "many", [20, 9]))
    sampler = [shards.batch(step, 4) for step in range(5)]
    loader = torch.utils.data.DataLoader(
        shards, batch_sampler=sampler, collate_fn=lambda batch: batch
    )
    for indices, batch in zip(sampler, loader):
        assert batch["z_v"][:, 0, 0, 0, 0].tolist() == shards.line[indices].tolist()
    with pytest.raises(ValueError, match="1x16x16, 1x16x32, wanted one size"):
        shards.__getitems__([int(shards.members[0][0]), int(shards.members[1][0])])


READ_ALL = """
import sys, torch
from wan.data import Shards
def status(key):
    lines = open("/proc/self/status")
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
def read(folder):
    shards, total = Shards(folder), 0
    sampler = [shards.batch(i, 1) for i in range(len(shards))]
    for batch in torch.utils.data.DataLoader(shards, batch_sampler=sampler, collate_fn=lambda x: x):
        total += batch["z_v"].mean().item()  # every byte of every clip is looked at
    return total, len(shards)
read(sys.argv[1])  # what only the first use costs
before = status("VmRSS")
total, clips = read(sys.argv[2])
print(total, clips, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """2 MB a shard: 40 MB and 160 MB of data, after 8 MB that both runs read first."""
    peak, size = {}, {}
    for shards in (4, 20, 80):
        folder = many(tmp_path / str(shards), [4 * shards], shard_clips=4, channels=2**16)
        size[shards] = sum(f.stat().st_size for f in folder.glob("shard-*"))
        if shards > 4:
            done = subprocess.run(
                [sys.executable, "-c", READ_ALL, tmp_path / "4", folder],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            total, clips, peak[shards] = map(float, done.stdout.split())
            lines = Shards(folder).line
            assert clips == len(lines) and total == pytest.approx(lines.sum().item(), rel=1e-6)
    growth, more = peak[80] - peak[20], size[80] - size[20]
    for n in (20, 80):
        print(f"\n{size[n] / 1e6:.0f} MB of shards: peak +{peak[n] / 1e6:.1f} MB")
    assert more > 110e6 and growth < 0.1 * more


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: next(f.glob("shard-*")).unlink(), "does not exist wanted 16 clips"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json does not exist wan.prepare"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json holds a list"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": "uni-vigu clips 9"}'),
            "'uni-vigu clips 9' wanted 'uni-vigu clips 1'",
        ),
        (
            lambda f: os.truncate(f / "shard-0000-00016.safetensors", 900),
            "shard-0000-00016 has 900 bytes, wanted delete it",
        ),
        (lambda f: flip(f / "shard-0000-00016.safetensors"), "shard-0000-00016 cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_when_it_is_opened(damage, words, tmp_path):
    folder = many(tmp_path / "many", [30])
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Shards(folder)
    assert (
        all(word in str(error.value) for word in words.split())
        and str(folder) in str(error.value)
        and "\n" not in str(error.value)
    )


def flip(path):
    """Same size, another header."""
    raw = path.read_bytes()
    path.write_bytes(raw[:20] + b"?" * 20 + raw[40:])


# ---------------------------------------------------------------- the world


def config(world, **changes):
    manifest = world.state
    sizes = dict(
        in_dim=world.shape[0],
        out_dim=world.shape[0],
        patch_size=(1, 2, 2),
        vocab_size=world.vocab_size,
        text_len=manifest["text_len"],
        prompt_dim=manifest["prompt_dim"],
        prompt_len=manifest["prompt_len"],
        dim=16,
        num_heads=2,
        num_layers=1,
        ffn_dim=16,
        text_ffn_dim=16,
        text_dim=8,
        freq_dim=16,
    )
    return Config(**sizes | changes)


def test_a_model_that_does_not_fit_is_refused(whole):
    world = World(whole)
    world.check(config(world))
    for name, value in dict(
        in_dim=7,
        out_dim=7,
        vocab_size=7,
        text_len=7,
        prompt_dim=7,
        prompt_len=7,
        patch_size=(1, 4, 4),
    ).items():
        wanted = world.shape[1] if name == "patch_size" else getattr(config(world), name)
        with pytest.raises(ValueError) as error:
            world.check(config(world, **{name: value}))
        assert all(str(word) in str(error.value) for word in (name, value, wanted, whole)), (
            error.value
        )
    full = World(whole, full_vocabulary=True)
    full.check(config(world, vocab_size=world.state["vocab_size"]))
    assert world.vocab_size == len(world.tokenizer) == len(world.state["vocabulary"])
    assert world.vocab_size < full.vocab_size == len(full.tokenizer)


def test_the_world_loads_what_prepared_the_data_and_nothing_else(whole, wan, tmp_path):
    world = World(whole)
    assert world.codec.latent_shape(*world.frame_shape[1:]) == world.shape
    assert world.prompt_encoder.width == world.state["prompt_dim"]
    assert world.tokenizer.decode(world.dataset("train")[0]["prompt"][None])[0] == PROMPT
    changed = shutil.copytree(whole, tmp_path / "out")
    manifest = json.loads((whole / "manifest.json").read_text())
    (changed / "manifest.json").write_text(
        json.dumps(manifest | {"codec": "another codec", "prompt_encoder": "another encoder"})
    )
    for name, found in (("codec", "another codec"), ("prompt_encoder", "another encoder")):
        with pytest.raises(ValueError) as error:
            getattr(World(changed), name)
        assert all(str(word) in str(error.value) for word in (found, manifest[name], changed, wan))


def test_evaluation_caches_no_casts_and_decodes_in_one_process(whole, tmp_path, monkeypatch):
    world = World(whole)
    monkeypatch.setitem(World.sampling, "understand", dict(steps=1, guidance=1.0))
    monkeypatch.setitem(World.sampling, "generate", dict(steps=1))
    monkeypatch.setitem(World.sampling, "joint", dict(steps=1))
    model = UniViGU(config(world)).eval()
    cached, decoded = [], []
    model.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    real = world.codec.decode
    monkeypatch.setattr(world.codec, "decode", lambda z_v: decoded.append(1) or real(z_v))
    found = world.evaluate(model, None, 2, 1.0, True)
    assert found.results == {} and not decoded and list(tmp_path.iterdir()) == []
    found = world.evaluate(model, tmp_path, 2, 1.0, True)
    assert len(decoded) == 4 and (tmp_path / "generate.mp4").exists()  # two drawn, two read
    assert cached and not any(cached)


@pytest.mark.parametrize("has_text", [True, False])
def test_evaluation_is_the_same_twice(has_text, whole, tmp_path, capsys, monkeypatch):
    world = World(whole, seed=1)
    monkeypatch.setitem(World.sampling, "understand", dict(steps=2, guidance=1.0))
    torch.manual_seed(0)
    model = UniViGU(config(world)).eval()
    found = [world.evaluate(model, tmp_path, 3, 5.0, has_text) for _ in range(2)]
    results = [evaluation.results for evaluation in found]
    assert all(results[0][name] == results[1][name] for name in ("loss", "captions"))
    assert json.loads((tmp_path / "results.json").read_text())["loss"] == results[1]["loss"]
    assert results[0]["clips"] == 3 and results[0]["split"] == "train"
    assert all(math.isfinite(value) for value in results[0]["loss"]["train"].values())
    names = (
        [
            f"{name} ({target})"
            for target in ("prompt", "caption")
            for name in ("video", "text", "anchor")
        ]
        if has_text
        else ["video"]
    )
    assert (
        list(results[0]["loss"]["train"]) == names and len(results[0]["captions"]) == 2 * has_text
    )
    assert {f.stem for f in tmp_path.glob("*.mp4")} == (
        {"generate", "joint"} if has_text else {"generate"}
    )
    if has_text:
        assert results[0]["captions"][0]["wanted"].startswith(CAPTION)


# ---------------------------------------------------------------- captions


def test_captions_are_asked_for_until_their_length_fits(
    films, wan, limits, tmp_path, monkeypatch, capsys
):
    asked = []

    def load(model):
        def answer(images, question, sample):
            asked.append((model, len(images), images[0].size, question, sample))
            if "never" in question:
                return "no"
            return "no" if "short" not in question else f" {CAPTION}\n and more "

        return answer

    monkeypatch.setattr(caption, "captioner", load)
    prompts = write_index(
        tmp_path / "prompts.jsonl",
        [
            {"video": "a.mp4", "prompt": PROMPT},
            {"video": "none.mp4", "prompt": PROMPT},
            b"x\n",
            {"video": "d.gif", "prompt": "never"},
            {"video": "a.mp4", "prompt": PROMPT},
        ],
    )
    out = tmp_path / "new/index.jsonl"
    flags = {"--videos": films, "--index": prompts, "--model": "vlm", "--out": out, "--wan": wan}
    flags |= {"--show": 3, "--caption-tokens": limits["--caption-tokens"]}
    for _ in range(2):
        caption.main(words(flags))
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert rows == [row("a.mp4", caption=f"{CAPTION} and more")]
        lines = (tmp_path / "new/index.rejected.jsonl").read_text().splitlines()
        reasons = {entry["line"]: entry["reason"] for entry in map(json.loads, lines)}
        assert list(reasons) == [2, 3, 4, 5]
        assert "does not exist" in reasons[2] and "not JSON" in reasons[3]
        assert "after 4 tries" in reasons[4] and "repeats line 1" in reasons[5]
        assert len(asked) == 2 + 4  # the second time, nothing is asked
        with open(out, "a") as file:
            file.write('{"video": "a.m')  # as a kill leaves it
    prompts.write_text(json.dumps({"video": "a.mp4", "prompt": PROMPT}) + "\n")
    flags |= {"--out": tmp_path / "windows.jsonl", "--frames": 9}
    for _ in range(2):
        caption.main([*words(flags), "--window"])
        rows = [json.loads(line) for line in (tmp_path / "windows.jsonl").read_text().splitlines()]
        assert rows == [row("a.mp4", caption=f"{CAPTION} and more", window=i) for i in range(2)]
        assert [shown for _, shown, *_ in asked[6:]] == [3, 3, 3, 3]  # nothing is asked again
    (model, shown, size, question, sample), (*_, again) = asked[:2]
    assert (model, shown, size) == ("vlm", 3, (64, 48)) and PROMPT in question
    assert (sample, again) == (False, True)
    monkeypatch.undo()
    missing = words(flags | {"--videos": "none"})
    assert "no folder" in refused(capsys, caption.main, *missing, tool="wan.caption")


def test_a_real_pipeline_of_transformers_answers(tmp_path):
    """A vision-language model of random weights, through the pipeline that real ones go through."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = ["<unk>", "<pad>", "</s>", "<image>", *caption.QUESTION.split()]
    words = Words(
        models.WordLevel(
            {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}, unk_token="<unk>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    template = (
        "{% for part in messages[0].content %}"
        "{% if part.type == 'image' %} <image> {% else %}{{ part.text }}{% endif %}"
        "{% endfor %}"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    eyes, mouth = (
        CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        LlamaConfig(vocab_size=len(tokenizer), **sizes),
    )
    both = LlavaConfig(
        vision_config=eyes, text_config=mouth, image_token_index=3, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(both).save_pretrained(tmp_path)
    answer = caption.captioner(str(tmp_path))
    pictures = [Image.new("RGB", (64, 48), (40 * i, 0, 0)) for i in range(3)]
    first = answer(pictures, "Describe the video", False)
    assert (
        first
        and first == answer(pictures, "Describe the video", False)
        and set(first.split()) <= {*vocabulary}
    )
