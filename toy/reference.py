"""What the default run came to, over three seeds: the reference beside a run of one's own."""

import statistics
from pathlib import Path

from engine.files import read_json, read_lines

FOLDER = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


def band(mode, name, clips):
    """A measure of the default run: (mean, the lowest share that is no worse).

    That is two standard deviations below the mean: those over seeds, but at least those of a share
    of so many clips.
    """
    runs = [read_json(FOLDER / f"seed{seed}.json") for seed in SEEDS]
    shares = [run[mode][name] for run in runs]
    mean = statistics.fmean(shares)
    deviation = max(statistics.stdev(shares), (mean * (1 - mean) / clips) ** 0.5)
    return mean, mean - 2 * deviation


def curves():
    """Stage -> "video" and "text" -> (steps into the stage, lowest, highest loss over seeds)."""
    logs = [read_lines(FOLDER / f"seed{seed}.jsonl") for seed in SEEDS]
    first, found = {}, {}
    for logged in zip(*logs):
        stage, step = logged[0]["stage"], logged[0]["step"]
        into = step - first.setdefault(stage, step)
        for name in ("video", "text"):
            losses = [line[name] for line in logged]
            if None not in losses:
                points = found.setdefault(stage, {}).setdefault(name, [])
                points.append((into, min(losses), max(losses)))
    return found
