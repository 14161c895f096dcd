"""Measures whether a toy knows when it is right: its captions by confidence, and the best of some.

python -m toy.confidence runs/toy/refine --split unseen --out confidence.json

Of each clip captions are drawn, as `sample.py understand` draws them. They are sorted by the
model's confidence and cut into parts of one size; of each part it prints how many captions have all
attributes right. AUC is the probability that a right caption has a higher confidence than a wrong
one. Then it keeps, of the first n captions of a clip, the one of the smallest text loss.
"""

import sys

import torch

from engine.files import check_writable, one_line, write_json
from engine.options import Parser, number, run_command
from engine.score import Confidence, text_losses
from sample import open_checkpoint
from univigu import understand

from . import evaluate, pairs_evaluate

PARTS = 8
BEST_OF = 1, 2, 4, 8
BATCH = 64


def parse(argv):
    parser = Parser(
        prog="toy.confidence",
        usage="python -m %(prog)s CHECKPOINT [--flag value ...]",
        description=__doc__,
    )
    add = parser.add_argument
    add("checkpoint", help="a folder that train.py wrote, such as runs/toy/refine")
    add("--out", help="JSON file for the numbers")
    add("--clips", type=number(int, 1, 10**6), default=256, help="of the split (default: 256)")
    add("--split", choices=("seen", "unseen"), default="seen", help="(default: seen)")
    add("--steps", type=number(int, 1, 10**4), help="of the sampler (default: the world's)")
    return parser.parse_args(argv)


def right(world, clips, texts):
    """Where captions of clips say what is so, (B, attributes) bool."""
    if world.state["world"] == "toy":
        return evaluate.said(texts) == clips.attributes
    wanted = pairs_evaluate.truth(clips).attributes
    names = [*pairs_evaluate.ATTRIBUTES]
    told = [names.index(name) for name in pairs_evaluate.names_of(world.level)]
    found = pairs_evaluate.right_in(pairs_evaluate.said(texts, world.level), wanted)
    return found[..., told].flatten(1)


@torch.no_grad()
def draw(model, world, split, indices, options):
    """Captions of clips, max(BEST_OF) of each: "right" (B, K, attributes) bool, and (B, K) each of
    "confidence", that of the "first step" and the "last step" alone, and "text loss"."""
    data = world.dataset(split)
    z_v, clips = data.__getitems__(indices)["z_v"], data.clips(indices)
    generators = [torch.Generator().manual_seed(i) for i in indices]
    texts = []
    found = {name: [] for name in ("right", "confidence", "first step", "last step")}
    for _ in range(max(BEST_OF)):
        states = []
        more = {"generator": generators, "callback": lambda k, *of, to=states: to.append(of)}
        texts.append(understand(model, z_v, **options, **more))
        found["right"].append(right(world, clips, world.tokenizer.decode(texts[-1])))
        for name, of in (
            ("confidence", states),
            ("first step", states[:2]),
            ("last step", states[-2:]),
        ):
            sure = Confidence(model)
            for k, state in enumerate(of):
                sure(k, *state)
            found[name].append(sure.of(texts[-1]))
    y_hat = torch.stack(texts, 1)
    losses = text_losses(model, z_v, y_hat, reuse_video=options["reuse_video"])
    return {name: torch.stack(of, 1) for name, of in found.items()} | {"text loss": losses}


def auc(score, good):
    """The probability that a good one has a higher score than another, (n,) each; None where all
    are good, or none is. A tie counts a half."""
    if good.all() or not good.any():
        return None
    gap = score[good][:, None] - score[~good]
    return round(((gap > 0).double() + 0.5 * (gap == 0)).mean().item(), 4)


def share(good):
    return round(good.double().mean().item(), 4)


def reliability(sure, good, whole):
    """Captions by confidence, in PARTS of one size: a dict each. sure (n,); good (n, attributes)
    bool; whole (n,), whether all are."""
    parts = []
    for rows in sure.argsort().tensor_split(PARTS):
        part = {"from": sure[rows].min(), "to": sure[rows].max(), "mean": sure[rows].mean()}
        part = {name: round(value.item(), 4) for name, value in part.items()}
        part |= {"captions": len(rows), "all right": share(whole[rows])}
        parts.append(part | {"attribute accuracy": share(good[rows])})
    return parts


def best_of(found, whole):
    """For each n of BEST_OF what is right of the captions that are kept."""
    rows, kept = torch.arange(len(whole)), {}
    for n in BEST_OF:
        least = found["text loss"][:, :n].argmin(1)
        surest = found["confidence"][:, :n].argmax(1)
        kept[str(n)] = {
            "all right": share(whole[rows, least]),
            "attribute accuracy": share(found["right"][rows, least]),
            "all right, by confidence": share(whole[rows, surest]),
            "any of them right": share(whole[:, :n].any(1)),
        }
    return kept


def measure(flags):
    """The numbers of a checkpoint. Raises ValueError, OSError."""
    checkpoint = open_checkpoint(flags.checkpoint, None, torch.device("cpu"))
    world = checkpoint.world
    if world.state["world"] not in ("toy", "pairs") or checkpoint.stage == "generator":
        raise ValueError(f"{flags.checkpoint} is no toy that has learned text")
    options = world.options("understand", world.shape)
    options |= {"steps": flags.steps} if flags.steps else {}
    model, parts = checkpoint.load(), []
    for first in range(0, flags.clips, BATCH):
        indices = range(first, min(first + BATCH, flags.clips))
        parts.append(draw(model, world, flags.split, indices, options))
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    whole = found["right"].all(2)  # (clips, K)
    scores = {name: found[name] for name in ("confidence", "first step", "last step")}
    scores["text loss"] = -found["text loss"]
    return {
        "world": world.state["world"],
        "level": getattr(world, "level", None),
        "split": flags.split,
        "clips": flags.clips,
        "steps": options["steps"],
        "captions of a clip": max(BEST_OF),
        "all right": share(whole),
        "auc": {name: auc(of.flatten(), whole.flatten()) for name, of in scores.items()},
        "reliability": reliability(
            found["confidence"].flatten(), found["right"].flatten(0, 1), whole.flatten()
        ),
        "best of": best_of(found, whole),
    }


def show(results):
    print(f"{'confidence':>17} {'captions':>9} {'all right':>10} {'attributes':>11}")
    for part in results["reliability"]:
        print(
            f"{part['from']:8.3f} {part['to']:8.3f} {part['captions']:9} "
            f"{part['all right']:10.3f} {part['attribute accuracy']:11.3f}"
        )
    for name, value in results["auc"].items():
        print(f"AUC of {name}: {'no caption is wrong, or all' if value is None else value}")
    for n, of in results["best of"].items():
        print(f"best of {n}: " + ", ".join(f"{name} {value:.3f}" for name, value in of.items()))


def main(argv=None):
    flags = parse(argv)
    try:
        if flags.out:
            check_writable(flags.out)
        words = [flags.checkpoint, "--split", flags.split, "--clips", str(flags.clips)]
        words += ["--steps", str(flags.steps)] if flags.steps else []
        results = {"command": f"python -m toy.confidence {' '.join(words)}"} | measure(flags)
        show(results)
        if flags.out:
            write_json(flags.out, results)
    except (ValueError, OSError, LookupError) as error:
        sys.exit(f"toy.confidence: error: {one_line(error)}")


if __name__ == "__main__":
    run_command(main)
