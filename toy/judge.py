"""Measures a trained toy again, as train.py did, with other settings of the samplers or more clips.

python -m toy.judge runs/paper/refine --guidance 3 --out runs/paper/guidance-3
"""

import sys
from pathlib import Path

import torch

from engine.files import check_folder, one_line, read_json
from engine.options import Parser, number, run_command
from sample import open_checkpoint


def parse(argv):
    parser = Parser(
        prog="toy.judge",
        usage="python -m %(prog)s CHECKPOINT [--flag value ...]",
        description=__doc__,
    )
    add = parser.add_argument
    add("checkpoint", help="a folder that train.py wrote, such as runs/toy/refine")
    add("--out", help="folder for results.json and pictures (default: CHECKPOINT/judged)")
    add("--clips", type=number(int, 1, 10**6), default=512, help="of a split (default: 512)")
    add("--guidance", type=number(float, -100, 100), help="of generate and joint")
    add("--steps", type=number(int, 1, 10**4), help="of all three samplers")
    return parser.parse_args(argv)


def judge(flags):
    """Evaluates a checkpoint as the flags say. Raises ValueError, OSError."""
    checkpoint = open_checkpoint(flags.checkpoint, None, torch.device("cpu"))
    world, folder = checkpoint.world, Path(flags.checkpoint)
    name = world.state["world"]
    if name not in ("toy", "pairs"):
        raise ValueError(f"{folder} was trained on {name!r}, wanted 'toy' or 'pairs'")
    given = {name: getattr(flags, name) for name in ("guidance", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    world.sampling = {mode: options | given for mode, options in world.sampling.items()}
    world.sampling["understand"]["guidance"] = 1.0
    done = read_json(folder / "train.json")
    world.seed = done["train"]["seed"]
    out = Path(flags.out or folder / "judged")
    check_folder(out)
    model = checkpoint.load()
    out.mkdir(parents=True, exist_ok=True)
    has_text = checkpoint.stage != "generator"
    world.evaluate(model, out, flags.clips, done["elapsed"], has_text)
    if has_text and checkpoint.needs_prompt:
        print(checkpoint.needs_prompt)


def main(argv=None):
    try:
        judge(parse(argv))
    except (ValueError, OSError, LookupError) as error:
        sys.exit(f"toy.judge: error: {one_line(error)}")


if __name__ == "__main__":
    run_command(main)
