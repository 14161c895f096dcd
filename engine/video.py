"""Video files in and out. PyAV is imported only where it is used: PNG, JPEG and .npy need none.

Frames are float32 in [-1, 1], colours first: (3, T, H, W). Pixels are uint8, colours last:
(T, H, W, 3). read_video gives all frames of a file as they are; read_windows and read_clip give
what is on screen 16 times a second.
"""

import math
import os
import re
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import GifImagePlugin, Image, ImageOps

from engine.files import atomic, check_writable, one_line

FORMATS = (".gif", ".mp4", ".npy", "")  # that are written; "" is a folder of PNG frames
FPS = 16  # Wan's
BEFORE = 2  # s: so far before a window its decoding begins
TOLERANCE = Fraction(1, 1000)  # s: what the times in a file may be rounded by
DEMUXERS = {  # FFmpeg's names
    ".mp4": "mov",
    ".mov": "mov",
    ".webm": "matroska",
    ".mkv": "matroska",
    ".avi": "avi",
    ".gif": "gif",
}
STILLS = (".png", ".jpg", ".jpeg")
READABLE = (*DEMUXERS, *STILLS, ".npy")
BEGINNINGS = (  # where in a file, what is there, its kind, and the demuxer that reads it
    (4, b"ftyp", "MP4 or QuickTime", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska", "matroska"),
    (8, b"AVI ", "AVI", "avi"),
    (0, b"GIF8", "GIF", "gif"),
    (0, b"\x89PNG", "PNG", None),
    (0, b"\xff\xd8\xff", "JPEG", None),
    (8, b"WEBP", "WebP", None),
)


def to_pixels(frames):
    """frames (3, ..., H, W) in [-1, 1] -> (..., H, W, 3) uint8 numpy."""
    frames = rearrange(frames.detach().float().cpu(), "rgb ... h w -> ... h w rgb")
    return frames.add(1).mul(127.5).round().clamp(0, 255).byte().numpy()


def to_frames(pixels):
    """pixels (T, H, W, 3) uint8 numpy -> frames (1, 3, T, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(pixels), "t h w rgb -> 1 rgb t h w").float() / 127.5 - 1


# ---------------------------------------------------------------- what is in a file


def is_video(path):
    """Whether a file, or a folder of frames, is named like something that can be read."""
    if path.is_dir():
        return os.access(path, os.R_OK) and bool(stills_of(path))
    return path.suffix.lower() in READABLE


def stills_of(folder):
    """The PNG and JPEG files of a folder, 2.png before 10.png; none that are hidden."""

    def by_number(file):
        parts = re.split(r"(\d+)", file.name)
        return [int(part) if part.isdecimal() else part for part in parts]

    files = (file for file in folder.iterdir() if file.suffix.lower() in STILLS)
    return sorted((file for file in files if file.name[0] != "."), key=by_number)


@contextmanager
def reading(path):
    """Whatever goes wrong with a video becomes a ValueError that names it, or FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"video {path} does not exist")
    if path.is_dir() and not is_video(path):
        raise ValueError(f"video {path} is a folder without PNG or JPEG frames")
    if not is_video(path):
        wanted = f"wanted one of {', '.join(READABLE)}, or a folder of PNG or JPEG frames"
        raise ValueError(f"video {path} ends in {path.suffix!r}, {wanted}")
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # each decoder has errors of its own
        said = None if path.is_dir() else getattr(error, "strerror", None)  # without the path
        raise ValueError(f"video {path} cannot be read: {said or one_line(error)}") from None


def timed_pictures(path, since=0):
    """What a video shows: (time, picture) pairs, and last (its length, None).

    The time is a Fraction, in seconds after the first picture, from when the picture is on screen;
    picture() is a PIL image, RGB, as players show it. What has no times has 16 a second. Pictures
    that are gone at the time `since` may be missing. Raises ValueError, or the decoder's errors.
    """
    ending = "" if path.is_dir() else path.suffix.lower()
    if ending in DEMUXERS:
        yield from decoded(path, ending, since)
        return
    if ending == ".npy":
        pictures = [partial(Image.fromarray, frame) for frame in stored_array(path)]
    else:
        files = [path] if ending else stills_of(path)
        pictures = [partial(upright_still, file) for file in files]
    for i, picture in enumerate([*pictures, None]):
        yield Fraction(i, FPS), picture


def stored_array(path):
    """A .npy file -> pixels (T, H, W, 3) uint8. Raises ValueError for another array."""
    pixels = np.load(path, allow_pickle=False)
    if getattr(pixels, "ndim", 0) == 4 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
        return pixels
    found = type(pixels).__name__
    if isinstance(pixels, np.ndarray):
        found = f"{pixels.dtype} of shape {pixels.shape}"
    raise ValueError(f"holds {found}, wanted uint8 (frames, rows, columns, 3)")


def upright_still(path):
    """A PNG or JPEG file -> a PIL image, RGB, turned as its EXIF orientation says."""
    with Image.open(path, formats=("PNG", "JPEG")) as stored:
        image = ImageOps.exif_transpose(stored)
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decoded(path, ending, since=0):
    """timed_pictures of a file that FFmpeg reads. Seeks where `since` is late enough."""
    import av

    check_beginning(path, DEMUXERS[ending])
    # A named format, no guessing: what passes for a playlist would open other files.
    with av.open(str(path), format=DEMUXERS[ending]) as file:
        stream, start = file.streams.best("video"), None
        if stream is None:
            raise ValueError("it has no pictures")
        stream.thread_type = "AUTO"
        # AVI does not say when pictures are shown: one after the other, as they are decoded.
        clock, ticks = "dts" if ending == ".avi" else "pts", -1
        show, time, gap, end = screen(stream), Fraction(0), Fraction(0), 0
        packets, sought = file.demux(stream), False
        if since > BEFORE and ending != ".gif":  # in a GIF one cannot seek
            first = next((frame for packet in packets for frame in packet.decode()), None)
            start, sought = getattr(first, clock, None) or 0, True
            file.seek(start + int((since - BEFORE) / stream.time_base), stream=stream)
            packets = file.demux(stream)
        for packet in packets:
            began = getattr(packet, clock)
            if began is not None and packet.duration and not packet.is_discard:
                end = max(end, began + packet.duration)
            for frame in packet.decode():
                last, ticks = ticks, getattr(frame, clock)
                if ticks is None and ending == ".avi":
                    ticks = last + 1
                if ticks is None and file.streams.audio:
                    raise ValueError("it is a song with cover art, wanted moving pictures")
                if ticks is None:
                    raise ValueError("it has a frame without a time")
                if packet.is_corrupt or frame.is_corrupt:
                    raise ValueError("it has a frame that is damaged")
                start = ticks if start is None else start
                before, time = time, (ticks - start) * frame.time_base
                gap = time - before
                if sought and time > since:  # a file without a good index
                    yield from decoded(path, ending)
                    return
                sought = False
                yield time, partial(show, frame)
        if start is None:
            raise ValueError("it has no frames")
        length = (end - start) * stream.time_base
        if length <= time and file.duration:  # the last picture does not say how long it lasts
            length = Fraction((file.start_time or 0) + file.duration, 10**6)
            length -= start * stream.time_base
        yield max(length if length > time else time + gap, Fraction(1, FPS)), None


def check_beginning(path, demuxer):
    """Raises ValueError where a file begins like one of a kind that `demuxer` does not read."""
    with open(path, "rb") as file:
        begins = file.read(16)
    for at, mark, kind, right in BEGINNINGS:
        if begins[at:].startswith(mark) and right != demuxer:
            names = " or ".join(ending for ending in DEMUXERS if DEMUXERS[ending] == right)
            wanted = f"it named {names}" if names else "a video"
            raise ValueError(f"it is a {kind} file, wanted {wanted}")


def screen(stream):
    """A function that makes a PIL image, RGB, of a frame of the stream, as ffmpeg shows it.

    FFmpeg's scale filter knows the colour matrix and range of a frame (PyAV's own conversion, in
    some versions, does not), and stretches pixels that are not square.
    """
    import av

    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not Fraction(1, 20) < aspect < 20:
        raise ValueError(f"its pixels have an aspect ratio of {aspect}, wanted 1/20 to 20")
    graph, fits = None, None

    def show(frame):
        nonlocal graph, fits
        kind = frame.width, frame.height, frame.format.name
        if kind != fits:  # the first frame, or the video goes on with another size
            width = round(frame.width * max(aspect, 1))
            height = round(frame.height / min(aspect, 1))
            graph, fits = av.filter.Graph(), kind
            sizes = dict(width=frame.width, height=frame.height)
            graph.link_nodes(
                graph.add_buffer(**sizes, format=frame.format.name, time_base=frame.time_base),
                graph.add("scale", f"{width}:{height}"),
                graph.add("format", "rgb24"),
                graph.add("buffersink"),
            ).configure()
        graph.push(frame)
        return Image.fromarray(turned(graph.pull().to_ndarray(), frame.side_data))

    return show


def turned(pixels, side_data):
    """Pixels (H, W, 3) -> as a frame's display matrix shows them: turned, mirrored, or as they are.

    A matrix (a b, c d) puts column x, row y at column ax + cy, row bx + dy. One that turns by
    another angle is taken for the nearest of the eight that keep a picture upright.
    """
    for data in side_data:
        if data.type.name == "DISPLAYMATRIX":
            (a, b), (c, d) = np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2].tolist()
            if abs(a) + abs(d) < abs(b) + abs(c):
                pixels, a, d = pixels.transpose(1, 0, 2), c, b
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


# ---------------------------------------------------------------- all frames, as they are


def read_video(path, shape=None):
    """A video -> all of its frames, without regard to their times: (1, 3, T, H, W) in [-1, 1].

    shape: the (T, H, W) to insist on; reading stops at the first frame that does not fit. Raises
    ValueError for a file that is no video of a known kind or has another shape, FileNotFoundError
    where there is none.
    """
    path, frames = Path(path), []
    t, *size = shape or (None, None, None)
    with reading(path):
        for _, picture in timed_pictures(path):
            if picture is None:
                break
            frames.append(np.asarray(picture()))
            h, w = size = size if size[0] else frames[0].shape[:2]
            if frames[-1].shape[:2] != (h, w):
                found = "{}x{}".format(*frames[-1].shape)
                raise ValueError(f"frame {len(frames)} is {found}, wanted {h}x{w}")
            if t and len(frames) > t:
                raise ValueError(f"more than {t} frames, wanted {t}")
    if len(frames) != (t or len(frames)) or not frames:
        raise ValueError(f"video {path} has {len(frames)} frames, wanted {t or 'at least 1'}")
    return to_frames(np.stack(frames))


# ---------------------------------------------------------------- 16 frames per second


def on_screen(timed, k=0):
    """(time, picture) pairs -> the picture that is on screen at k / 16 s, (k + 1) / 16 s, ..."""
    _, shown = next(timed)
    if shown is None:
        raise ValueError("it has no frames")
    for time, following in timed:
        while Fraction(k, FPS) + TOLERANCE < time:
            yield shown
            k += 1
        shown = following


def fitted(pictures, fit):
    """Pictures -> what `fit` makes of each image; of one that stays on screen, once."""
    last, made = None, None
    for picture in pictures:
        if picture is not last:
            last, made = picture, fit(picture())
        yield made


def read_windows(path, frames, fit, first=0):
    """A video at 16 fps, cut into windows of `frames` frames: yields (window, goes_on).

    window: what `fit` made of its frames, upright PIL images; a list of 4n + 1, the nearest below
    what is there. goes_on: whether the video has frames after these. first: the number of the
    window to begin with, from 0. Raises ValueError or FileNotFoundError, which name the video, also
    where it has no such window.
    """
    path = Path(path)
    with reading(path):
        k = first * frames
        images = fitted(on_screen(timed_pictures(path, Fraction(k, FPS)), k), fit)
        rest = list(islice(images, 1))
        if not rest:
            raise ValueError(f"it ends before window {first} of {frames} frames")
        while rest:
            window = rest + list(islice(images, frames - 1))
            rest = list(islice(images, 1))
            kept = (len(window) - 1) // 4 * 4 + 1
            yield window[:kept], bool(rest) or kept < len(window)


def crop_to(sizes):
    """A function that makes pixels of an image: of `sizes`, (rows, columns) pairs, it gets the one
    of nearest aspect ratio, and loses what does not fit, at its sides."""

    def fit(image):
        def distance(size):
            return abs(math.log(size[0] / size[1] * image.width / image.height))

        rows, columns = min(sizes, key=distance)
        return np.asarray(ImageOps.fit(image, (columns, rows), Image.Resampling.BICUBIC))

    return fit


def read_clip(path, sizes, frames, window=0):
    """A window of a video at 16 fps -> pixels (T, H, W, 3) uint8, and whether the video goes on.

    T is 4n + 1, at most `frames`. sizes: see crop_to. Raises as read_windows does.
    """
    images, goes_on = next(read_windows(path, frames, crop_to(sizes), window))
    return np.stack(images), goes_on


# ---------------------------------------------------------------- out


def check_video_out(path):
    """Raises ValueError where a video cannot be written, before it is made."""
    path = Path(path)
    if path.suffix not in FORMATS or path.name in FORMATS:
        raise ValueError(
            f"--out is {str(path)!r}, wanted a name that ends in .gif, .mp4 or .npy, "
            "or has no ending, for a folder of PNG frames"
        )
    check_writable(path)
    if path.suffix and path.is_dir():
        raise ValueError(f"--out {path} exists and is not a file")
    if not path.suffix and path.exists() and not is_png_folder(path):
        raise ValueError(f"--out {path} exists and is not a folder of PNG frames")


def is_png_folder(path):
    return path.is_dir() and all(file.suffix == ".png" for file in path.iterdir())


def write_video(path, frames, fps=8):
    """frames (1, 3, T, H, W) in [-1, 1] -> a file of the kind its ending names, whole or not there.

    Raises OSError, which names the file.
    """
    path, pixels = Path(path), to_pixels(frames[0])
    with atomic(path) as part:
        if path.suffix == ".gif":
            write_gif(part, pixels, fps)
        elif path.suffix == ".mp4":
            write_mp4(part, pixels, fps)
        elif path.suffix == ".npy":
            np.save(part, pixels)
        else:
            part.mkdir()
            for i, frame in enumerate(pixels):
                Image.fromarray(frame).save(part / f"{i:04d}.png")


def write_gif(path, pixels, fps=8, zoom=1, hold_ms=None):
    """pixels (T, H, W, 3) uint8 -> a GIF that repeats, each pixel zoom x zoom.

    hold_ms: how long the last frame is shown, where not as long as the others. Written frame by
    frame, for Pillow's save would merge frames that look alike.
    """
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    images = [Image.fromarray(frame).quantize(256) for frame in pixels]
    durations = [1000 // fps] * len(images)
    if hold_ms is not None:
        durations[-1] = hold_ms
    with open(path, "wb") as file:
        file.writelines(GifImagePlugin.getheader(images[0].copy(), info={"loop": 0})[0])
        for image, duration in zip(images, durations):
            data = GifImagePlugin.getdata(image, duration=duration, include_color_table=True)
            file.writelines(data)
        file.write(b";")


def write_mp4(path, pixels, fps=8):
    """pixels (T, H, W, 3) uint8 -> H.264.

    Small frames keep full colour resolution: halved, their colours would run.
    """
    import av

    h, w = pixels.shape[1:3]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "8"})
        stream.height, stream.width = h, w
        stream.pix_fmt = "yuv444p" if min(h, w) < 128 else "yuv420p"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
