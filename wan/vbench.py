"""Names drawn videos as VBench wants them: <prompt>-0.mp4, <prompt>-1.mp4, ...

    python sample.py generate --checkpoint runs/wan/refine --prompts prompts.txt --out drawn
    python -m wan.vbench --videos drawn --out named

VBench takes five videos of each prompt (25 for temporal flickering), and a folder that holds
nothing else. A prompt that stands five times in prompts.txt is drawn five times, with other noise.
The new folder has links to the same videos, or copies where the disk has no links. For VBench's
--mode=custom_input any names will do.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

from engine.files import atomic, check_folder, shorten
from engine.options import run_command

from .flags import failing_in_one_line, make_parser, named
from .index import find_video, read_row

LONGEST = 255  # bytes of a file's name, in all usual file systems


def name(flags):
    """Makes the folder --out of the videos in --videos that its index.jsonl names."""
    folder, out = Path(flags.videos), Path(flags.out)
    if out.exists():
        raise ValueError(f"--out is {out}, which exists: wanted a new folder")
    check_folder(out)
    rows = drawn(folder)
    videos = [find_video(folder, video) for video, _ in rows]
    if missing := [video.name for video in videos if not video.is_file()]:
        raise ValueError(f"{folder}/index.jsonl names {shorten(missing)}, which is not there")
    names = vbench_names(rows)
    with atomic(out) as part:
        part.mkdir()
        for video, new in zip(videos, names):
            link(video, part / os.fsdecode(new.encode()))  # in UTF-8, whatever the locale
    print(f"{len(rows)} videos of {len({prompt for _, prompt in rows})} prompts: see {out}")


def drawn(folder):
    """[(video, prompt), ...] of what sample.py drew. Raises ValueError where there is none."""
    path, rows = folder / "index.jsonl", []
    if not path.is_file():
        raise ValueError(f"--videos {folder} has no index.jsonl, wanted a folder of sample.py")
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            video, prompt, _ = read_row(line, ("video", "prompt"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append((video, prompt))
    return rows


def vbench_names(rows):
    """A name for each (video, prompt). Raises ValueError for a prompt that is no file's name."""
    seen = Counter()
    names = []
    for video, prompt in rows:
        names.append(f"{prompt}-{seen[prompt]}{Path(video).suffix}")
        seen[prompt] += 1
        if {"/", "\0"} & set(prompt) or len(names[-1].encode()) > LONGEST:
            raise ValueError(
                f"{video} cannot be named as its prompt {prompt[:60]!r}, wanted one without a "
                f"slash, of at most {LONGEST} bytes with its ending"
            )
    return names


def link(video, new):
    try:
        os.link(video, new)
    except OSError:  # another disk, or one without links
        shutil.copy(video, new)


def parse(argv):
    parser = make_parser("wan.vbench", __doc__)
    add = parser.add_argument
    add("--videos", required=True, help="folder that sample.py --prompts drew, with index.jsonl")
    add("--out", type=named("a folder"), required=True, help="a new folder for the named videos")
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse(argv)
    with failing_in_one_line("wan.vbench"):
        name(flags)


if __name__ == "__main__":
    run_command(main)
