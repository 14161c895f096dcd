"""Writes detailed captions with a vision-language model: the paper's recipe for data (section 4.1), the step before wan.prepare.

    python -m wan.caption --videos DIR --index prompts.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --out index.jsonl

A row of prompts.jsonl is {"video": "a.mp4", "prompt": "..."}: a prompt, and the video that a generator made of it, relative to DIR. index.jsonl gets
the rows with their captions, ready for wan.prepare. Rows without a video that can be read, or whose captions stay too short or too long, are
listed with their reason beside it, in index.rejected.jsonl. A run that was stopped goes on when started again.
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from .prepare import FPS, REJECTED, check_folder, find, read_frames, read_index, read_lines, run, span, write
from .weights import one_line

QUESTION = """These are {frames} frames of one video of {seconds:.1f} seconds, in order. It was made from this prompt: "{prompt}"
Describe the video in one paragraph of about {words} words. Cover everything in the prompt as it is seen in the video, and add the details that the prompt
leaves out: the subjects and how they look, where they are, how they move and change, the background, light, colours, style and the camera. State only
what can be seen. Answer with the description alone."""
AGAIN = "\nYour last description was too {fault} ({found} words): write about {words}."
WORDS = 0.7  # English words a umT5 token
TRIES = 4


def load(model):
    """A hub id or folder of any image-text-to-text model -> a function (images, question, sample) -> answer. Raises ValueError where it is none."""
    from transformers import pipeline

    try:
        pipe = pipeline("image-text-to-text", model=model, dtype="auto", trust_remote_code=False, device=0 if torch.cuda.is_available() else -1)
    except Exception as error:  # models of other kinds and packages that are missing fail in many ways
        raise ValueError(f"--model {model} cannot be loaded: {type(error).__name__}: {one_line(error)[:500]}") from None

    def answer(images, question, sample):
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
        options = dict(max_new_tokens=512, do_sample=sample)
        return pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=options)[0]["generated_text"]

    return answer


def describe(images, seconds, prompt, answer, tokenizer, low, high):
    """Asks until a caption has `low` to `high` umT5 tokens, EOS not counted, at most TRIES times. Returns the last caption and its tokens.

    The first answer is the likeliest one; those after it are drawn at random, and told what was wrong.
    """
    words = round((low + high) / 2 * WORDS)
    question, again = QUESTION.format(frames=len(images), seconds=seconds, prompt=prompt, words=words), ""
    for i in range(TRIES):
        text = " ".join(answer(images, question + again, i > 0).split())
        found = len(tokenizer.ids(text)) - 1
        if low <= found <= high:
            break
        again = AGAIN.format(fault="short" if found < low else "long", found=len(text.split()), words=words)
    return text, found


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def caption(flags, load=load):
    """Captions the rows that are not done yet. load(flags.model) gives a function (images, question, sample) -> answer."""
    videos, out, (low, high) = Path(flags.videos), Path(flags.out), flags.caption_tokens
    refused = out.with_suffix(".rejected.jsonl")
    if not videos.is_dir():
        raise FileNotFoundError(f"--videos {videos} is no folder")
    rows, rejected, _ = read_index(Path(flags.index), ("video", "prompt"))
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder, wanted a file to write")
    check_folder(out.parent)
    before = {out: read_lines(out, ("video", "prompt", "caption")), refused: read_lines(refused, REJECTED)}
    import av  # noqa: F401  it is needed below: if it is missed, then here

    from .codec import Tokenizer  # here, for it takes seconds: --help and bad flags need not wait

    tokenizer, answer = Tokenizer(flags.wan), load(flags.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, lines in before.items():
        write(path, "".join(json.dumps(row) + "\n" for row in lines))   # a kill may have cut the last line
    done = {(row["video"], row["prompt"]) for row in before[out]} | {(row["line"], row["video"]) for row in before[refused]}
    todo = [line for line, row in sorted((rows | rejected).items()) if (line, row[0]) not in done and rows.get(line) not in done]
    for line in tqdm(todo, unit="row", disable=None):
        video, prompt = rows[line] if line in rows else (rejected[line][0], None)
        try:
            if line in rejected:
                raise ValueError(rejected[line][1])
            frames = read_frames(find(videos, video), flags.frames, lambda image: image.thumbnail((640, 640)) or image)
        except (ValueError, OSError) as error:
            append(refused, {"line": line, "video": video, "reason": one_line(error)})
            continue
        chosen = torch.linspace(0, len(frames) - 1, min(flags.show, len(frames))).round().int().tolist()
        text, found = describe([frames[i] for i in chosen], len(frames) / FPS, prompt, answer, tokenizer, low, high)
        if low <= found <= high:
            append(out, {"video": video, "prompt": prompt, "caption": text})
        else:
            append(refused, {"line": line, "video": video, "reason": f"caption has {found} tokens after {TRIES} tries, wanted {low} to {high}"})
    captioned, left = (path.read_bytes().count(b"\n") for path in (out, refused))
    print(f"{captioned} rows captioned, see {out}; {left} rejected, see {refused}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="wan.caption", usage="python -m wan.caption [--flag value ...]      --help lists the flags", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"wan.caption: error: {one_line(message)}\n")
    parser.add_argument("--videos", required=True, help="folder of the videos")
    parser.add_argument("--index", required=True, help="JSONL file, a row {video, prompt} a line")
    parser.add_argument("--model", required=True, help="folder or hub id of a vision-language model that reads several images")
    parser.add_argument("--out", required=True, help="JSONL file to append rows {video, prompt, caption} to")
    parser.add_argument("--wan", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder or hub id with umT5's tokenizer (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=81, help="frames of a clip at 16 fps, as for wan.prepare (default: %(default)s)")
    parser.add_argument("--show", type=int, default=8, help="how many of them the model sees, evenly spaced (default: %(default)s)")
    parser.add_argument("--caption-tokens", type=span, default="128-256", help="umT5 tokens that a caption may have, EOS not counted (default: %(default)s)")
    flags = parser.parse_args(argv)
    tokens = flags.caption_tokens
    for name, good, wanted in (("frames", flags.frames > 0, "at least 1"), ("show", flags.show > 0, "at least 1"), ("out", flags.out, "the name of a file"),
                               ("caption_tokens", len(tokens) == 2 and tokens[0] <= tokens[1], "LOW-HIGH")):
        if not good:
            parser.error(f"--{name.replace('_', '-')} is {getattr(flags, name)!r}, wanted {wanted}")
    run("wan.caption", caption, flags)


if __name__ == "__main__":
    main()
