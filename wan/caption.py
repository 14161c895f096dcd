"""Writes detailed captions with a vision-language model: the paper's recipe for data, section 4.1.

    python -m wan.caption --videos DIR --index prompts.jsonl \\
        --model Qwen/Qwen2.5-VL-7B-Instruct --out index.jsonl

It is the step before wan.prepare. A row of prompts.jsonl is {"video": "a.mp4", "prompt": "..."}: a
prompt, and the video that a generator made of it, relative to DIR. index.jsonl gets the rows with
their captions, ready for wan.prepare. Rows without a video that can be read, or whose captions stay
too short or too long, are listed with their reason beside it, in index.rejected.jsonl. A run that
was stopped goes on when started again.

A caption is of a video's first --frames frames, as wan.prepare takes them. With --window, each
further --frames frames get a row of their own, with "window": 1, 2, ..., which wan.prepare heeds.
"""

from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from engine.files import alone, append_line, check_writable, one_line
from engine.options import run_command
from engine.video import FPS, read_windows

from .flags import FRAMES, SPAN, WAN, at_least, failing_in_one_line, make_parser, named
from .index import REJECTED, find_video, read_index, read_lines, write_lines

QUESTION = """These are {frames} frames of one video of {seconds:.1f} seconds, in order. \
It was made from this prompt: "{prompt}"
Describe the video in one paragraph of about {words} words. Cover everything in the prompt as it \
is seen in the video, and add the details that the prompt
leaves out: the subjects and how they look, where they are, how they move and change, the \
background, light, colours, style and the camera. State only
what can be seen. Answer with the description alone."""
AGAIN = "\nYour last description was too {fault} ({found} words): write about {words}."
WORDS = 0.7  # English words a umT5 token
TRIES = 4
CAPTIONED = ("video", "prompt", "caption")  # what a line of --out has


def captioner(model):
    """A hub id or folder of any image-text-to-text model -> answer(images, question, sample).

    Raises ValueError where it is none.
    """
    from transformers import pipeline

    device = 0 if torch.cuda.is_available() else -1
    options = {"dtype": "auto", "trust_remote_code": False, "device": device}
    try:
        pipe = pipeline("image-text-to-text", model=model, **options)
    except Exception as error:  # other models and missing packages fail in many ways
        reason = f"{type(error).__name__}: {one_line(error)[:500]}"
        raise ValueError(f"--model {model} cannot be loaded: {reason}") from None

    def answer(images, question, sample):
        content = [{"type": "image", "image": image} for image in images]
        content.append({"type": "text", "text": question})
        said = pipe(
            text=[{"role": "user", "content": content}],
            return_full_text=False,
            generate_kwargs={"max_new_tokens": 512, "do_sample": sample},
        )
        return said[0]["generated_text"]

    return answer


def describe(images, seconds, prompt, answer, tokenizer, low, high):
    """Asks until a caption has `low` to `high` umT5 tokens, EOS not counted, at most TRIES times.

    Returns the last caption and its tokens. The first answer is the likeliest one; those after it
    are drawn at random, and told what was wrong.
    """
    words = round((low + high) / 2 * WORDS)
    question = QUESTION.format(frames=len(images), seconds=seconds, prompt=prompt, words=words)
    again = ""
    for i in range(TRIES):
        text = " ".join(answer(images, question + again, i > 0).split())
        tokens = len(tokenizer.ids(text)) - 1
        if low <= tokens <= high:
            break
        fault = "short" if tokens < low else "long"
        again = AGAIN.format(fault=fault, found=len(text.split()), words=words)
    return text, tokens


def evenly(frames, n):
    """n of the frames, the first and the last among them; all where there are no more."""
    n = min(n, len(frames))
    return [frames[i] for i in torch.linspace(0, len(frames) - 1, n).round().int().tolist()]


def small(image):
    image.thumbnail((640, 640))
    return image


def caption(flags):
    """Captions the rows that are not done yet."""
    videos, out = Path(flags.videos), Path(flags.out)
    refused = out.with_suffix(".rejected.jsonl")
    if not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos} is no folder")
    index = read_index(flags.index, ("video", "prompt"))
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder, wanted a file to write")
    check_writable(out)
    captioned, rejected = read_lines(out, CAPTIONED), read_lines(refused, REJECTED)

    # Here, for it takes seconds: --help and bad flags need not wait. Of av, only that it is there.
    import av  # noqa: F401

    from .codec import Tokenizer

    tokenizer, answer = Tokenizer(flags.wan), captioner(flags.model)
    write_lines(out, captioned)  # a kill may have cut the last line
    write_lines(refused, rejected)

    def reject(line, window, reason):
        row = {"line": line, "video": index.video(line), "reason": reason}
        append_line(refused, row | numbered(window))

    done = {(row["video"], row["prompt"], row.get("window")) for row in captioned}
    bad = {(row["line"], row["video"], row.get("window")) for row in rejected}
    low, high = flags.caption_tokens
    cut = 0
    for line, window, frames, goes_on in clips(index, left(index, done, bad), flags, reject):
        video, prompt, _ = index.rows[line]
        if (video, prompt, window) in done or (line, video, window) in bad:
            continue
        cut += goes_on and window is None
        images, seconds = evenly(frames, flags.show), len(frames) / FPS
        text, tokens = describe(images, seconds, prompt, answer, tokenizer, low, high)
        if low <= tokens <= high:
            row = {"video": video, "prompt": prompt, "caption": text}
            append_line(out, row | numbered(window))
        else:
            found = f"{tokens} tokens after {TRIES} tries"
            reject(line, window, f"caption has {found}, wanted {low} to {high}")
    good, not_good = (path.read_bytes().count(b"\n") for path in (out, refused))
    print(f"{good} rows captioned, see {out}; {not_good} rejected, see {refused}")
    if cut:
        print(
            f"{cut} captions are of a video's first frames, 4n + 1 and at most {flags.frames}; "
            "--window captions the rest, too"
        )


def numbered(window):
    """What a row says of its window: nothing where the video was not cut into windows."""
    return {} if window is None else {"window": window}


def clips(index, lines, flags, reject):
    """What to caption: yields (line, window, frames, goes_on). Rejects what cannot be read.

    window: its number; None where it is a video's beginning and the rest is not asked for.
    """
    for line in tqdm(lines, unit="row", disable=None):
        own = None
        try:
            video, _, own = index.row(line)
            path = find_video(Path(flags.videos), video)
            numbers = count() if flags.window and own is None else [own]
            found = read_windows(path, flags.frames, small, own or 0)
            for window, (frames, goes_on) in zip(numbers, found):
                yield line, window, frames, goes_on
        except (ValueError, OSError) as error:
            reject(line, own, one_line(error))


def left(index, done, bad):
    """The lines of the index that are not known to be captioned or rejected as a whole."""

    def is_left(line):
        *_, window = row = index.rows.get(line, (None,))
        return row not in done and (line, index.video(line), window) not in bad

    return list(filter(is_left, index.lines()))


# ---------------------------------------------------------------- the command


def parse(argv):
    parser = make_parser("wan.caption", __doc__)
    add = parser.add_argument
    add("--videos", required=True, help="folder of the videos")
    add("--index", required=True, help="JSONL file, a row {video, prompt} a line")
    add(
        "--model",
        required=True,
        help="folder or hub id of a vision-language model that reads several images",
    )
    add(
        "--out",
        type=named("a file"),
        required=True,
        help="JSONL file to append rows {video, prompt, caption} to",
    )
    add(
        "--wan",
        default=WAN,
        help="folder or hub id with umT5's tokenizer (default: %(default)s)",
    )
    add(
        "--frames",
        type=FRAMES,
        default=81,
        help="frames of a clip at 16 fps, 4n + 1, as for wan.prepare (default: %(default)s)",
    )
    add("--window", action="store_true", help="caption longer videos --frames by --frames frames")
    add(
        "--show",
        type=at_least(1),
        default=8,
        help="how many of them the model sees, evenly spaced (default: %(default)s)",
    )
    add(
        "--caption-tokens",
        type=SPAN,
        default="128-256",
        help="umT5 tokens that a caption may have, EOS not counted (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse(argv)
    out = Path(flags.out)
    with failing_in_one_line("wan.caption"), alone(out.with_name(f".{out.name}.lock"), out):
        caption(flags)


if __name__ == "__main__":
    run_command(main)
