"""Compares finished runs: the flags in which they differ, and their measures over seeds.

python -m toy.compare runs/base-0 runs/base-1 runs/idea-0 runs/idea-1

Runs that differ in nothing but the seed are one column: mean and standard deviation.
"""

import re
import statistics
import sys
from pathlib import Path

from engine.checkpoint import checkpoints, read_options
from engine.files import one_line, read_json
from engine.options import Parser, Run, run_command

# Flags that leave the numbers as they are.
ASIDE = {"seed", *vars(Run())} - {"precision", "micro_batch", "eval_clips"}


def read_run(folder):
    """A run's folder -> its options, and its measures by name. Raises ValueError, OSError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder, wanted one that train.py wrote")
    found = checkpoints(folder)
    if not found or not (folder / "results.json").is_file():
        raise ValueError(f"{folder} has no results.json beside a checkpoint, wanted a finished run")
    results = read_json(folder / "results.json")
    measures = {}
    for mode in results.get("chance", {}):
        for name, value in results.get(mode, {}).items():
            if isinstance(value, (int, float)):
                measures[f"{mode}.{name}"] = float(value)
    if not measures:
        raise ValueError(f"{folder / 'results.json'} has no measures, wanted those of a toy")
    measures["minutes of training"] = results["train_s"] / 60
    options = read_options(found[-1][1])
    if options["init"]:  # seeds have generators of their own
        options["init"] = re.sub(rf"(?<!\d){options['seed']}(?!\d)", "*", options["init"])
    return options, measures


def differing(options):
    """The names of the options in which some of the dicts differ, seeds and places aside."""
    names = {name: None for of in options for name in of if name not in ASIDE}  # in their order
    return [name for name in names if len({repr(of.get(name)) for of in options}) > 1]


def group(runs):
    """(options, measures) of each run -> the names in which they differ, and, for each different
    choice of them, (values, the measures of its runs)."""
    names = differing([options for options, _ in runs])
    groups = {}
    for options, measures in runs:
        values = tuple(told(options.get(name)) for name in names)
        groups.setdefault(values, []).append(measures)
    return names, list(groups.items())


def told(value):
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def table(names, groups):
    """Lines: the flags that differ, then each measure, a column a group."""
    rows = [["--" + name.replace("_", "-")] for name in names]
    for k, row in enumerate(rows):
        row += [values[k] for values, _ in groups]
    rows.append(["runs", *(str(len(measures)) for _, measures in groups)])
    known = {name: None for _, of in groups for measures in of for name in measures}
    for name in known:
        cells = []
        for _, of in groups:
            values = [measures[name] for measures in of if name in measures]
            cells.append(mean_and_spread(values) if values else "")
        rows.append([name, *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def mean_and_spread(values):
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main(argv=None):
    parser = Parser(
        prog="toy.compare", usage="python -m %(prog)s RUN RUN [RUN ...]", description=__doc__
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    folders = parser.parse_args(argv).runs
    try:
        if len({Path(folder).resolve() for folder in folders}) < 2:
            raise ValueError(f"runs are {', '.join(folders)}, wanted two different ones at least")
        print(table(*group([read_run(folder) for folder in dict.fromkeys(folders)])))
    except (ValueError, OSError, LookupError) as error:
        sys.exit(f"toy.compare: error: {one_line(error)}")


if __name__ == "__main__":
    run_command(main)
