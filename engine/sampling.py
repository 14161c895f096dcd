"""The flags of sample.py."""

import argparse
import os
import re

from engine.options import Parser, number


def rows_by_columns(text):
    """ "480x832" -> (480, 832)."""
    if not re.fullmatch("[0-9]{1,5}x[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is no size, wanted ROWSxCOLUMNS such as 480x832"
        )
    rows, columns = text.split("x")
    return int(rows), int(columns)


def utf8(text):
    """A text as it was typed: where the locale is not UTF-8, Python keeps its bytes escaped."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise argparse.ArgumentTypeError(f"is {text!a:.60}, wanted UTF-8") from None


MODES = {
    "understand": "video -> caption",
    "generate": "prompt -> video",
    "joint": "prompt -> video and caption",
}
HELP = {  # flag, or mode and flag, -> what --help says
    "checkpoint": "folder that train.py wrote, or Wan2.1 or the published Uni-ViGU, path or hub id "
    "(default: runs/toy/refine, or where nothing was trained yet, the toy that came with the code)",
    "wan": "folder or hub id with Wan's VAE, umT5 and tokenizer (default: the checkpoint's own)",
    "video": "the video to describe",
    "videos": "folder of videos to describe, one after the other",
    "window": "describe longer videos whole, --frames by --frames frames, as JSON lines",
    "recompute-video": "run the video's tokens in every step, not in the first alone: exact, and "
    "many times slower (always so with the published weights)",
    "understand out": "text file to write the caption to as well; with --videos or --window: "
    "{video, caption} as JSON lines; an existing file is continued",
    "understand prompt": "the brief prompt of --video, where there is one (default: none). The "
    "model believes it: what a wrong prompt says may turn up in the caption",
    "generate prompt": 'what to draw, for example "a red circle moving right"; empty: --caption '
    "alone says it",
    "joint prompt": 'what to draw, for example "a red circle moving right"; empty: anything',
    "prompts": "text file, a prompt a line, or JSON lines with prompts, as an index has; --out is "
    "then a folder, which gets the videos and index.jsonl; videos that are there are kept",
    "out": "video file to write (default: named as the mode, .gif, or .mp4 for the real world)",
    "negative-prompt": "what guidance leads away from (default: Wan's; the toy has none)",
    "caption": "detailed caption for the text stream (default: the prompt)",
    "trajectory": "also write a page, one HTML file, with a slider over the steps: states, guesses "
    "and clocks (without a name: %(const)s)",
    "batch": "how many samples at once; each has its own noise, so that it comes out as it would "
    "alone (default: on a GPU as many as fit, at most 16; 1 on a CPU)",
    "best-of": "captions to draw of each video, from one noise after the other; the one of the "
    "smallest text loss is kept (default: 1)",
    "size": "rows x columns of the video, multiples of 16 (default: the world's)",
    "frames": "frames of the video, 4n + 1 (default: the world's)",
    "steps": "solver steps (default: the world's)",
    "shift": "warp of the solver's times, above 1 = longer near noise (default: the world's, or "
    "Wan's for its model and size)",
    "guidance": "1 = conditional, 0 = unconditional, above 1 = exaggerated (default: the world's, "
    "or Wan's for its model)",
    "seed": "seed of the noise (default: 0); sample number i of many has seed + i",
    "device": "default: a GPU if there is one",
    "dry-run": "print sizes, memory and time, load no weights",
}


def parse(argv, description):
    """The command line as a namespace. Ends the process with one line for a wrong one."""
    parser = Parser(prog="sample.py", description=description)
    usage = "%(prog)s [--flag value ...]      --help lists the flags"
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for mode, about in MODES.items():
        sub = modes.add_parser(mode, help=about, description=about, usage=usage)
        add_flags(sub, mode)
    flags = parser.parse_args(argv)
    if flags.mode == "understand" and flags.prompt is not None and flags.videos is not None:
        parser.error("--prompt goes with one --video, found --videos")
    if flags.mode == "generate" and flags.caption and flags.prompts:
        parser.error("--caption goes with one --prompt, found --prompts")
    many = "videos" if flags.mode == "understand" else "prompts"
    if flags.trajectory is not None and getattr(flags, many) is not None:
        parser.error(f"--trajectory goes with one --{many[:-1]}, found --{many}")
    if flags.trajectory is not None and flags.mode == "understand" and flags.window:
        parser.error("--trajectory goes with one clip, found --window")
    if flags.mode == "understand" and flags.trajectory is not None and flags.best_of > 1:
        parser.error("--trajectory goes with one caption, found --best-of")
    one = getattr(flags, many) is None and not (flags.mode == "understand" and flags.window)
    if flags.batch is not None and one:
        parser.error(f"--batch goes with --{many}, found one --{many[:-1]}")
    return flags


def add_flags(parser, mode):
    """The flags of a mode."""

    def add(name, to=parser, **kind):
        to.add_argument(f"--{name}", help=HELP.get(f"{mode} {name}") or HELP[name], **kind)

    add("checkpoint")
    add("wan")
    one_of = parser.add_mutually_exclusive_group(required=True)
    if mode == "understand":
        add("video", one_of)
        add("videos", one_of)
        add("window", action="store_true")
        add("prompt", type=utf8)
        add("recompute-video", action="store_true")
        add("best-of", type=number(int, 1, 1000), default=1)
    else:
        add("prompt", one_of, type=utf8)
        add("prompts", one_of)
        add("negative-prompt", type=utf8)
    if mode == "generate":
        add("caption", type=utf8)
    add("batch", type=number(int, 1, 10**4))
    add("out")
    add("trajectory", nargs="?", const=f"{mode}.html", metavar="PAGE")
    add("size", type=rows_by_columns)
    add("frames", type=number(int, 1, 10**5))
    add("steps", type=number(int, 1, 10**4))
    add("shift", type=number(float, 1e-3, 1e3))
    add("guidance", type=number(float, -100, 100))
    add("seed", type=number(int, 0, 2**62), default=0)
    add("device", choices=("auto", "cpu", "cuda"), default="auto")
    add("dry-run", action="store_true")
