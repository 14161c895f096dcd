"""Measures captions: against reference texts, and by the model that wrote them.

    python -m wan.evaluate --captions captions.jsonl --references data.jsonl
    python -m wan.evaluate --captions captions.jsonl --checkpoint runs/wan/refine --videos DIR

captions.jsonl is what `sample.py understand --videos DIR --out captions.jsonl` writes.

Against references: CIDEr-D, BLEU-4 and ROUGE-L, as pycocoevalcap computes them. A row of data.jsonl
is {"video": "a.mp4", "caption": "..."}, as in an index of wan.prepare; a video may have a list of
captions, or several rows. Texts are compared as words in lower case, without punctuation. The
tokenizer of the COCO tools needs Java, so these numbers are near to theirs, not equal. METEOR and
SPICE need Java, too, and are left out.

By the model: for how many of the clips the own caption has a smaller text loss than 15 captions of
other clips. A loss is the mean over 8 clocks and noises, the same for all captions. The video is
clean, and there is no prompt.
"""

import json
import random
import re
import sys
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import sample
from engine.distributed import preferred_attention
from engine.files import check_writable, one_line, write_json
from engine.graphs import captured_text_steps
from engine.options import run_command
from engine.sampling import rows_by_columns
from engine.score import text_losses
from engine.threads import ahead
from engine.video import read_clip, read_video, to_frames

from .flags import FRAMES, failing_in_one_line, make_parser, named
from .index import find_video, read_row

OTHERS = 15  # captions of other clips, beside a clip's own


def evaluate(flags):
    """Measures what the flags ask for, prints it and, with --out, stores it."""
    check(flags)
    captions = {clip: text for clip, (text,) in read_texts("--captions", flags.captions).items()}
    found: dict = {"captions": len(captions)}
    if empty := sum(not words(text) for text in captions.values()):
        print(f"{empty} of {len(captions)} captions have no words: they count as they are")
    if flags.references:
        references = read_texts("--references", flags.references, several=True)
        found |= compare(flags, captions, references)
        show_scores(found)
        store(flags, found)  # now: asking the model takes long
    if flags.checkpoint:
        found["agreement"] = agreement(flags, captions)
        show_agreement(found["agreement"])
    else:
        print("agreement  not measured: --checkpoint and --videos ask the model")
    store(flags, found)


def store(flags, found):
    if flags.out:
        write_json(flags.out, found)


def check(flags):
    """Raises ValueError for flags that do not go together, and where --out cannot be written."""
    if bool(flags.checkpoint) != bool(flags.videos):
        raise ValueError("--checkpoint and --videos go together, found one of them")
    if not flags.references and not flags.checkpoint:
        raise ValueError("wanted --references, or --checkpoint and --videos, or all three")
    if flags.videos and not Path(flags.videos).is_dir():
        raise ValueError(f"--videos {flags.videos} is no folder")
    if flags.out:
        out = Path(flags.out)
        if out.is_dir() or out.suffix != ".json":
            raise ValueError(f"--out is {out}, wanted a file whose name ends in .json")
        check_writable(out)


# ---------------------------------------------------------------- texts of clips


def read_texts(flag, path, several=False):
    """A file of JSON lines -> {(video, window): [caption, ...]}, window 0 where a row has none.

    several: a clip may have more than one, in a list or in rows of its own; each has words.
    Raises ValueError, which names file and line, for a row that cannot be used or is one too many.
    """
    path, texts = Path(path), {}
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        for row in rows_of(line) if several else [line]:
            if not line.strip():
                continue
            try:
                video, caption, window = read_row(row, ("video", "caption"))
                of_clip = texts.setdefault((video, window or 0), [])
                if several and not words(caption):
                    raise ValueError("caption has no words")
                if of_clip and not several:
                    raise ValueError(f"{named_clip(video, window)} has a caption already")
            except ValueError as error:
                raise ValueError(f"{flag} {path}, line {number}: {error}") from None
            if caption not in of_clip:
                of_clip.append(caption)
    if not texts:
        raise ValueError(f"{flag} {path} is empty, wanted a row {{video, caption}} a line")
    return texts


def rows_of(line):
    """A line whose caption is a list, as a line for each of them; any other as it is."""
    try:
        row = json.loads(line)
        several = isinstance(row["caption"], list)
    except (ValueError, LookupError, TypeError, RecursionError):
        return [line]
    if not several or not row["caption"]:
        return [line]
    return [json.dumps(row | {"caption": text}).encode() for text in row["caption"]]


def named_clip(video, window):
    return f"window {window} of {video}" if window else video


def words(text):
    """A text as it is compared: its words in lower case, one space between two."""
    return " ".join(re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("’", "'")))


# ---------------------------------------------------------------- against references


def compare(flags, captions, references):
    """What is measured of the clips that both files have, and how many have one alone.

    Raises ValueError where there is no such clip.
    """
    common = [clip for clip in captions if clip in references]
    if not common:
        raise ValueError(
            f"--captions {flags.captions} and --references {flags.references} have no clip in "
            f"common: the first are of {named_clip(*next(iter(captions)))} and of "
            f"{named_clip(*next(iter(references)))}"
        )
    found = {
        "clips": len(common),
        "captions without references": len(captions) - len(common),
        "references without a caption": len(references) - len(common),
    }
    said, wanted = ([texts[clip] for clip in common] for texts in (captions, references))
    return found | scores(said, wanted)


def scores(said, wanted):
    """CIDEr-D (0 to 10), BLEU-4 and ROUGE-L (0 to 1) of B texts, each against a list of texts.

    CIDEr-D is None for one text alone, which says nothing of how rare a word is.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    of_clips = {i: [words(text)] for i, text in enumerate(said)}
    references = {i: [words(text) for text in texts] for i, texts in enumerate(wanted)}
    bleu, _ = Bleu(4).compute_score(references, of_clips, verbose=0)
    cider, _ = Cider().compute_score(references, of_clips) if len(said) > 1 else (None, None)
    rouge, _ = Rouge().compute_score(references, of_clips)
    found = {"CIDEr-D": cider, "BLEU-4": bleu[3], "ROUGE-L": rouge}
    return {name: None if value is None else float(value) for name, value in found.items()}


# ---------------------------------------------------------------- by the model


def agreement(flags, captions):
    """The share of clips whose own caption has the smallest text loss of at most 1 + OTHERS.

    Raises ValueError where there is nothing to measure.
    """
    device = sample.choose_device(flags.device)
    checkpoint = sample.open_checkpoint(flags.checkpoint, flags.wan, device)
    if checkpoint.stage == "generator":
        raise ValueError(sample.no_text(checkpoint))
    size = sample.chosen_size(flags, checkpoint.world)
    chosen = choose(encode(captions, checkpoint.world.tokenizer))
    if checkpoint.needs_prompt:
        print(f"{checkpoint.name}: {checkpoint.needs_prompt}; here it has none", file=sys.stderr)
    fits, model = {}, None
    for clip, z_v in latents(flags, checkpoint.world, size, chosen):
        model = model or checkpoint.load()  # now: there may be no video that can be read
        texts = torch.tensor([chosen[clip]], device=device)
        with preferred_attention(device), captured_text_steps(model):
            losses = text_losses(model, z_v.to(device), texts, reuse_video=not checkpoint.published)
        fits[clip] = bool(losses[0, 0] < losses[0, 1:].min())
    if not fits:
        raise ValueError(f"--videos {flags.videos} has none of the {len(chosen)} videos")
    return {
        "clips": len(fits),
        "share": fmean(fits.values()),
        "chance": fmean(1 / len(chosen[clip]) for clip in fits),
        "checkpoint": str(flags.checkpoint),
    }


def encode(captions, tokenizer):
    """{clip: caption} -> {clip: its tokens, a tuple}. Raises ValueError, which names the clip."""
    rows = {}
    for clip, text in captions.items():
        try:
            rows[clip] = tuple(tokenizer.encode([text])[0].tolist())
        except ValueError as error:
            raise ValueError(f"caption of {named_clip(*clip)}: {one_line(error)}") from None
    return rows


def choose(rows):
    """{clip: its row} -> {clip: its row, and at most OTHERS that differ}, the same each time.

    Raises ValueError where all rows are the same.
    """
    distinct = sorted(set(rows.values()))
    if len(distinct) == 1:
        raise ValueError("all captions are the same text, so no other can fit a clip worse")
    chosen = {}
    for clip, own in rows.items():
        drawn = random.Random(str(clip)).sample(distinct, min(OTHERS + 1, len(distinct)))
        chosen[clip] = [own, *[row for row in drawn if row != own][:OTHERS]]
    return chosen


def latents(flags, world, size, clips):
    """Yields (clip, z_v) of those that can be read, as sample.py understand reads them; names the
    rest. Files are read ahead."""
    sizes = [flags.size] if flags.size else getattr(world, "frame_sizes", None)

    def read(clip):
        video, window = clip
        path = find_video(Path(flags.videos), video)
        if world.fixed_size:
            return read_video(path, size)
        pixels, _ = read_clip(path, sizes, size[0], window)
        return to_frames(pixels)

    if size[1] * size[2] > 480 * 832:  # as sample.py
        world.codec.vae.enable_tiling()
    progress = tqdm(ahead(read, clips, 1), total=len(clips), unit="clip", disable=None)
    for clip, frames in progress:
        try:
            z_v = world.codec.encode(frames.result())
        except (ValueError, OSError) as error:
            print(f"left out: {one_line(error)}", file=sys.stderr)
            continue
        yield clip, z_v


# ---------------------------------------------------------------- the command


def show_scores(found):
    alone = [(found[name], name) for name in list(found)[2:4]]
    left = "".join(f"; {count} {name}" for count, name in alone if count)
    print(f"{found['clips']} clips have captions and references{left}")
    cider = found["CIDEr-D"]
    print(f"CIDEr-D    {'needs two clips' if cider is None else f'{cider:.3f} of 10'}")
    print(f"BLEU-4     {found['BLEU-4']:.3f}")
    print(f"ROUGE-L    {found['ROUGE-L']:.3f}")
    print(
        "CIDEr-D weighs a word by how few of the clips' references have it: it compares models on "
        "the same references, and means little with few"
    )


def show_agreement(found):
    print(
        f"agreement  {found['share']:.3f} of {found['clips']} clips, chance {found['chance']:.3f}: "
        "their own caption fits best"
    )


def parse(argv):
    parser = make_parser("wan.evaluate", __doc__)
    add = parser.add_argument
    add("--captions", required=True, help="JSONL file, a row {video, caption} a line")
    add("--references", help="JSONL file, a row {video, caption} a line, or several of a video")
    add("--out", type=named("a file"), help="JSON file that gets the numbers, too")
    add("--checkpoint", help="the model to ask, as for sample.py; with --videos")
    add("--videos", help="folder of the videos that the captions are of")
    as_written = "as for sample.py understand, when it wrote the captions"
    add("--wan", help="folder or hub id with Wan's VAE and tokenizer (default: the checkpoint's)")
    add("--frames", type=FRAMES, help=f"{as_written} (default: the checkpoint's)")
    add("--size", type=rows_by_columns, help=f"{as_written} (default: the checkpoint's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse(argv)
    with failing_in_one_line("wan.evaluate"):
        evaluate(flags)


if __name__ == "__main__":
    run_command(main)
