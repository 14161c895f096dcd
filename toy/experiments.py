"""Does the method work? The paper's claims, each tested in the toy.

    python -m toy.experiments                      all of them: hours on two CPU cores
    python -m toy.experiments pretraining recall   some of them
    python -m toy.experiments --data pairs         those of the second world: many hours
    python -m toy.experiments --quick              one seed, few steps: does it run
    python -m toy.experiments --figures --out toy/results/experiments    stored numbers -> figures

A second call goes on where the first stopped. A variant is a run of train.py, in
<out>/<variant>/seed<k>, that differs in one thing from the variant "base", the default recipe
shortened; "default" and those named "whole" are not shortened. All text stages start from one
generator for each seed, unless that is the question. An experiment writes
<out>/<name>/results.json and figure.png.

What was found is computed, never written here: see toy/claims.py and toy/pairs_claims.py. A claim
is supported where all its checks hold, not supported where none does, not decided where none was
measured, else mixed.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

from engine.files import alone, one_line, read_json, write_json
from engine.options import Parser, run_command

from . import pairs_claims
from .claims import BASE, EXPERIMENTS, MARGIN, Check, Experiment, from_generator
from .figures import bars, write_figure
from .runs import FULL, QUICK, Budget, Variant, is_trained, trained

__all__ = [  # what an experiment of one's own is made of, see toy/README.md
    "BASE",
    "EXPERIMENTS",
    "FULL",
    "MARGIN",
    "QUICK",
    "Budget",
    "Check",
    "Experiment",
    "Variant",
    "bars",
    "from_generator",
    "perform",
    "table",
]

MAIN = (  # the numbers printed
    *("read", "read all", "read bound", "drawn", "drawn bound"),
    *("agreement", "prompt followed", "agreed"),
)
WORLDS = {  # experiments, and the budget of a full and of a quick pass
    "toy": (EXPERIMENTS, FULL, QUICK),
    "pairs": (pairs_claims.EXPERIMENTS, pairs_claims.FULL, pairs_claims.QUICK),
}


# ---------------------------------------------------------------- the verdict


def summary(values):
    """Over seeds: mean, and spread, their standard deviation (0 for one seed)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return round(statistics.fmean(values), 4), round(spread, 4)


def judge(checks, seeds):
    """checks against one {variant: {name: number}} a seed -> verdict, and a dict a check.

    A check goes by the seeds that have its variants; one without any is left out.
    """
    told = []
    for check in checks:
        gains = [round(check.gain(of), 4) for of in seeds if check.variants() <= of.keys()]
        if not gains:
            continue
        mean, spread = summary(gains)
        holds = mean - check.above > spread
        told.append(vars(check) | {"gain": gains, "mean": mean, "spread": spread, "holds": holds})
    counted = [check["holds"] for check in told if not check["ours"]]
    if not counted:
        return "not decided", told
    if all(counted):
        return "supported", told
    return "mixed" if any(counted) else "not supported", told


def finding(verdict, checks):
    """The verdict, and the gain that decided each check: mean and standard deviation over seeds."""
    sentences = {False: [], True: []}  # by whether the check is ours
    for c in checks:
        holds = "yes" if c["holds"] else "no"
        gain = f"{c['mean']:+.3f} ± {c['spread']:.3f}"
        sentences[c["ours"]].append(f"{holds}, {c['says']} ({gain})")
    found = f"{verdict}: {'; '.join(sentences[False])}."
    if sentences[True]:
        found += f" Ours: {'; '.join(sentences[True])}."
    return found


def perform(experiment, seeds, budget, out, finished=False):
    """Trains, measures and judges; writes <out>/<name>/results.json and figure.png.

    finished: trains nothing, and leaves out what is not trained yet. Returns what the JSON holds.
    Raises ValueError where nothing is left.
    """
    todo = {
        seed: [v for v in experiment.variants if not finished or is_trained(v, seed, budget, out)]
        for seed in seeds
    }
    todo = {seed: variants for seed, variants in todo.items() if variants}
    if not todo:
        raise ValueError(f"{out} has no finished run of experiment {experiment.name}")
    runs = []  # of each seed: variant -> Run
    measured = []  # of each seed: variant -> name -> number
    for seed, variants in todo.items():
        runs.append({v.name: trained(v, seed, budget, out) for v in variants})
        measured.append({name: r.measure(experiment.measures) for name, r in runs[-1].items()})
    numbers, described = {}, {}
    for v in experiment.variants:
        found = [of[v.name] for of in measured if v.name in of]
        if not found:
            continue
        numbers[v.name] = {name: summary([of[name] for of in found]) for name in found[0]}
        seconds = [of[v.name].seconds() for of in runs if v.name in of]
        described[v.name] = v.describe(budget) | {"training seconds": seconds}
    verdict, checks = judge(experiment.checks, measured)
    results = {
        "name": experiment.name,
        "claim": experiment.claim,
        "refuted if": experiment.refuted_if,
        "verdict": verdict,
        "found": finding(verdict, checks),
        "checks": checks,
        "seeds": list(todo),
        "budget": vars(budget),
        "variants": described,
        "not trained": [v.name for v in experiment.variants if v.name not in numbers],
        "mean and spread": numbers,
        "each seed": measured,
    }
    folder = Path(out) / experiment.name
    write_json(folder / "results.json", results)
    write_figure(folder / "figure.png", experiment.name, experiment.panels, numbers)
    return results


def redraw(experiment, out):
    """Draws the figure of what perform() stored, anew. Returns what the JSON holds.

    Raises FileNotFoundError or ValueError where there is none.
    """
    folder = Path(out) / experiment.name
    results = read_json(folder / "results.json")
    numbers = results["mean and spread"]
    write_figure(folder / "figure.png", experiment.name, experiment.panels, numbers)
    return results


def table(results):
    """Verdicts; under each its variants' main numbers, then its checks.

    A check's gain has to exceed what stands in brackets by more than its spread.
    """
    lines = []
    for r in results:
        lines.append(f"{r['name']:14} {r['verdict']}")
        for variant, of in r["mean and spread"].items():
            main = [f"{name} {of[name][0]:.3f} ± {of[name][1]:.3f}" for name in MAIN if name in of]
            if main:
                lines.append(f"    {variant:16} {'   '.join(main)}")
        for c in r["checks"]:
            gain = f"{c['mean']:+.3f} ± {c['spread']:.3f} (above {c['above']:+.2f})"
            ours = " [ours]" if c["ours"] else ""
            lines.append(f"    {'yes' if c['holds'] else 'no':4} {gain}  {c['says']}{ours}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def parse(argv):
    """Flags -> experiments, what to do with each, folder. Raises ValueError for bad values."""
    parser = Parser(
        prog="toy.experiments",
        usage="python -m %(prog)s [NAME ...] [--flag value ...]",
        description=__doc__,
    )
    told = (f"{data}: {', '.join(by_name(data))}" for data in WORLDS)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"which (default: all). {'; '.join(told)}"
    )
    parser.add_argument("--data", choices=WORLDS, default="toy", help="which world (default: toy)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, few steps and clips, in a folder of its own",
    )
    parser.add_argument(
        "--figures",
        action="store_true",
        help="train nothing: draw the figures of the results in --out anew",
    )
    parser.add_argument(
        "--finished",
        action="store_true",
        help="train nothing: judge the variants that are trained, and leave out the others",
    )
    parser.add_argument("--seeds", help="with commas (default: 0,1,2; quick: 0)")
    parser.add_argument(
        "--out",
        help="folder of runs, results and figures "
        "(default: runs/experiments, for pairs runs/experiments-pairs; quick: ...-quick)",
    )
    flags = parser.parse_args(argv)
    known = by_name(flags.data)
    for name in flags.names:
        if name not in known:
            raise ValueError(f"experiment is {name!r}, wanted one of {', '.join(known)}")
    seeds = ("0" if flags.quick else "0,1,2") if flags.seeds is None else flags.seeds
    out = "runs/experiments" + "-pairs" * (flags.data == "pairs") + "-quick" * flags.quick
    _, full, quick = WORLDS[flags.data]
    chosen = [known[name] for name in known if name in (flags.names or known)]
    seeds, budget = different_seeds(seeds), quick if flags.quick else full
    work = partial(perform, seeds=seeds, budget=budget, finished=flags.finished)
    work = redraw if flags.figures else work
    return chosen, work, flags.out or out


def by_name(data):
    return {experiment.name: experiment for experiment in WORLDS[data][0]}


def different_seeds(text):
    """ "0,1,2" -> [0, 1, 2]."""
    seeds = text.split(",")
    valid = all(seed.isdecimal() and int(seed) <= 10**9 for seed in seeds)
    if not valid or len(set(seeds)) < len(seeds):
        wanted = f"different integers from 0 to {10**9}, with commas"
        raise ValueError(f"seeds is {text!r}, wanted {wanted}")
    return [int(seed) for seed in seeds]


def main(argv=None):
    begin, results = time.time(), []
    try:
        experiments, work, out = parse(argv)
        with alone(Path(out, ".lock"), out):
            for experiment in experiments:
                print(f"\n{experiment.name}: {experiment.claim}")
                print(f"Refuted if: {experiment.refuted_if}")
                results.append(work(experiment, out=out))
                print(table(results[-1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"toy.experiments: error: {one_line(error)}")
    minutes = (time.time() - begin) / 60
    print(f"\n{table(results)}")
    print(f"{minutes:.0f} minutes; numbers and figures: {out}/*/results.json, {out}/*/figure.png")


if __name__ == "__main__":
    run_command(main)
