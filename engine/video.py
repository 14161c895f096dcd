"""Video files in and out. PyAV is imported only where it is used: GIF, PNG and .npy need none.

Frames are float32 in [-1, 1], colours first: (3, T, H, W). Pixels are uint8, colours last:
(T, H, W, 3). read_video takes a file as it is; read_clip and read_resized retime and crop it.
"""

import math
import re
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import GifImagePlugin, Image, ImageOps

from engine.files import atomic, check_writable, one_line

FORMATS = (".gif", ".mp4", ".npy", "")  # "" is a folder of PNG frames
FPS = 16  # Wan's
DEMUXERS = {
    ".mp4": "mov",
    ".mov": "mov",
    ".webm": "matroska",
    ".gif": "gif",
    ".png": "png_pipe",
    ".jpg": "jpeg_pipe",
    ".jpeg": "jpeg_pipe",
}


def to_pixels(frames):
    """frames (3, ..., H, W) in [-1, 1] -> (..., H, W, 3) uint8 numpy."""
    frames = rearrange(frames.detach().float().cpu(), "rgb ... h w -> ... h w rgb")
    return frames.add(1).mul(127.5).round().clamp(0, 255).byte().numpy()


def to_frames(pixels):
    """pixels (T, H, W, 3) uint8 numpy -> frames (1, 3, T, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(pixels), "t h w rgb -> 1 rgb t h w").float() / 127.5 - 1


# ---------------------------------------------------------------- frames as they are in the file


def read_video(path, shape=None):
    """A .gif, .mp4, .npy or a folder of PNG frames -> frames (1, 3, T, H, W) in [-1, 1].

    shape: the (T, H, W) to insist on; reading stops at the first frame that does not fit. Raises
    ValueError for a file that is no video of a known kind or has another shape, FileNotFoundError
    where there is none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"video {path} does not exist")
    if path.is_file() and path.suffix not in FORMATS[:3]:
        raise ValueError(
            f"video {path} ends in {path.suffix!r}, "
            "wanted .gif, .mp4, .npy or a folder of PNG frames"
        )
    t, *size = shape or (None, None, None)
    frames = []
    try:
        for frame in stored_frames(path):
            frames.append(frame)
            h, w = size = size if size[0] else frame.shape[:2]
            if frame.shape[:2] != (h, w):
                found = f"{frame.shape[0]}x{frame.shape[1]}"
                raise ValueError(f"frame {len(frames)} is {found}, wanted {h}x{w}")
            if t and len(frames) > t:
                raise ValueError(f"more than {t} frames, wanted {t}")
    except Exception as error:  # each decoder has errors of its own
        raise ValueError(f"video {path} cannot be read: {one_line(error)}") from None
    if len(frames) != (t or len(frames)) or not frames:
        raise ValueError(f"video {path} has {len(frames)} frames, wanted {t or 'at least 1'}")
    return to_frames(np.stack(frames))


def stored_frames(path):
    """The frames of a video, one after the other: (H, W, 3) uint8."""
    if path.is_dir():
        for file in sorted(path.glob("*.png"), key=by_number):
            with Image.open(file, formats=["PNG"]) as image:
                yield np.array(image.convert("RGB"))
    elif path.suffix == ".npy":
        yield from stored_array(path)
    elif path.suffix == ".gif":
        with Image.open(path, formats=["GIF"]) as gif:
            for i in range(gif.n_frames):
                gif.seek(i)
                yield np.array(gif.convert("RGB"))
    else:
        for _, frame in timed_frames(path):
            yield frame.to_ndarray(format="rgb24")


def by_number(path):
    """The key that sorts 2.png before 10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def stored_array(path):
    """A .npy file -> pixels (T, H, W, 3) uint8. Raises ValueError for another array."""
    pixels = np.load(path, allow_pickle=False)
    if getattr(pixels, "ndim", 0) == 4 and pixels.shape[-1] == 3 and pixels.dtype == np.uint8:
        return pixels
    found = type(pixels).__name__
    if isinstance(pixels, np.ndarray):
        found = f"{pixels.dtype} of shape {pixels.shape}"
    raise ValueError(f"holds {found}, wanted uint8 (frames, rows, columns, 3)")


# ---------------------------------------------------------------- clips at 16 fps, cut to a size


def read_resized(path, sizes, t):
    """A video file -> its first t frames at 16 fps, (1, 3, t, H, W) in [-1, 1].

    sizes: (H, W) pairs; see read_clip. Raises FileNotFoundError or ValueError, which name the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"video {path} does not exist")
    if path.suffix.lower() not in DEMUXERS:
        wanted = ", ".join(DEMUXERS)
        raise ValueError(f"video {path} ends in {path.suffix!r}, wanted one of {wanted}")
    try:
        pixels, _ = read_clip(path, sizes, least=t, most=t)
    except (ValueError, OSError) as error:
        raise ValueError(f"video {path} cannot be read: {error}") from None
    return to_frames(pixels)


def timed_frames(path):
    """The frames of a video or an image: (time, frame).

    The time is a Fraction, in seconds after the first frame; the frame is an av.VideoFrame. Raises
    ValueError, OSError or av.FFmpegError for a file that is damaged or of another kind than its
    ending says.
    """
    import av

    # A named format, no guessing: what passes for a playlist would open other files.
    with av.open(str(path), format=DEMUXERS[path.suffix.lower()]) as file:
        stream, start = file.streams.best("video"), None
        if stream is None:
            raise ValueError("video has no pictures")
        stream.thread_type = "AUTO"
        for packet in file.demux(stream):
            for frame in packet.decode():
                if frame.pts is None:
                    raise ValueError("video has a frame without a time")
                if packet.is_corrupt or frame.is_corrupt:
                    raise ValueError("video has a frame that is damaged")
                start = frame.pts if start is None else start
                yield (frame.pts - start) * frame.time_base, frame
        if start is None:
            raise ValueError("video has no frames")


def retime(frames):
    """(time, frame) pairs -> the frame nearest to k / 16 s for k = 0, 1, ...

    Ends half a frame after the last one's time.
    """
    k, gap = 0, Fraction(1, FPS)
    time, frame = next(frames)
    for next_time, next_frame in chain(frames, [(None, None)]):
        gap = gap if next_time is None else next_time - time
        while Fraction(k, FPS) < time + gap / 2:
            yield frame
            k += 1
        time, frame = next_time, next_frame


def read_frames(path, limit, fit):
    """The first `limit` frames of a video at 16 fps: what `fit` made of each, a list.

    fit: gets upright PIL images. Raises ValueError or OSError.
    """
    import av

    kept, last = [], None
    try:
        for frame in islice(retime(timed_frames(path)), limit):
            if frame is last:
                kept.append(kept[-1])
            else:
                kept.append(fit(frame.to_image().rotate(frame.rotation, expand=True)))
            last = frame
    except av.FFmpegError as error:  # of many kinds, some of which are ValueErrors too
        raise OSError(error.strerror or str(error)) from None
    return kept


def read_clip(path, sizes, least, most):
    """A video -> pixels (T, H, W, 3) uint8, T = 4n + 1 at most `most`, and whether it had more.

    sizes: (rows, columns) pairs; the clip gets the one of nearest aspect ratio. Raises ValueError
    for fewer than `least` frames at 16 fps.
    """

    def fit(image):
        ratio = math.log(image.height / image.width)

        def distance(size):
            return abs(math.log(size[0] / size[1]) - ratio)

        rows, columns = min(sizes, key=distance)
        return np.asarray(ImageOps.fit(image, (columns, rows), Image.Resampling.BICUBIC))

    frames = read_frames(path, most + 1, fit)
    if len(frames) < least:
        raise ValueError(f"video is too short: {len(frames)} frames at {FPS} fps, wanted {least}")
    kept = (min(len(frames), most) - 1) // 4 * 4 + 1
    return np.stack(frames[:kept]), len(frames) > kept


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
