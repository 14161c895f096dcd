"""The READMEs' tables, commands and links against the code and the stored results.

`python -m tests.test_readme` writes the tables anew.
"""

import dataclasses
import io
import json
import re
import statistics
import textwrap
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest

import sample
import train
from engine.cost import forward_flops
from toy.experiments import EXPERIMENTS, FULL, MARGIN, Budget, finding, judge
from toy.measures import STEPS
from toy.pairs_claims import AS_LONG, CAPTIONED, EVER_NEW, TEXT, shown
from toy.pairs_claims import EXPERIMENTS as PAIRS
from toy.pairs_claims import FULL as PAIRS_FULL
from univigu import PRESETS

ROOT = Path(__file__).parent.parent
README = "README.md"
TOY, RESULTS, WAN = "toy/README.md", "toy/results/README.md", "wan/README.md"
DOCUMENTS = README, TOY, RESULTS, WAN, "CHANGELOG.md", "CONTRIBUTING.md"
TINY = (
    "--batch 4 --dim 24 --text-dim 24 --ffn-dim 32 --text-ffn-dim 16 --num-layers 1 --warmup 1 "
    "--compile no --device cpu"
)


def text_of(document):
    return (ROOT / document).read_text()


def stored(path):
    return json.loads((ROOT / f"{path}.json").read_text())


def markdown(head, rows):
    """A table; head and rows are lists of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


# ---------------------------------------------------------------- the toy's results

SEEDS = [stored(f"toy/results/seed{seed}") for seed in (0, 1, 2)]
PAPER = {
    guidance: [stored(f"toy/results/paper{seed}{suffix}") for seed in (0, 1, 2)]
    for guidance, suffix in ((1, ""), (3, "-guidance3"))
}
MODES = ("understand", "generate", "joint")
MEASURES = {
    "understanding.attribute_accuracy": "caption, mean over seven attributes",
    "understanding.exact_match": "caption, all seven right",
    "understanding.with_prompt": "caption with the prompt at hand, mean over seven",
    "generation.attribute_accuracy": "generated video: colour, shape, direction",
    "generation.from_prompt": "generated from the prompt alone",
    "joint.agreement": "joint: caption against video",
}
MAIN = {
    "understanding.attribute_accuracy": "**understand**: attributes that the caption has right",
    "understanding.with_prompt": "the same, the prompt at hand",
    "generation.attribute_accuracy": "**generate**: attributes of the prompt that the video shows",
    "joint.agreement": "**joint**: attributes that caption and video agree on",
}


def number(run, measure, suffix=""):
    mode, name = measure.split(".")
    return run[mode][name + suffix]


def pictures():
    """The three pictures with what the model was asked and what it wrote."""
    said = {mode: SEEDS[0]["pictures"][f"{mode}.gif"] for mode in MODES}
    written = {
        "understand": f"*{said['understand']}*",
        "generate": f"*{said['generate']}*",
        "joint": f"asked *a yellow circle moving up*, wrote *{said['joint']}*",
    }
    head = ["it watched, and wrote", "it was asked, and drew", "it was asked, and drew and wrote"]
    images = [f"![a moving shape](toy/pictures/{mode}.gif)" for mode in MODES]
    return markdown(head, [images, [written[mode] for mode in MODES]])


def pairs():
    """The same of the second world's run at level 1."""
    said = stored("toy/results/pairs/level1")["pictures"]
    images = [f"![two moving shapes](pictures/pairs/{mode}.gif)" for mode in MODES]
    verbs = {"asked": "asked", "the model wrote": "wrote"}
    texts = []
    for mode in MODES:
        of = said[f"{mode}.gif"]
        texts.append(", ".join(f"{verb} *{of[key]}*" for key, verb in verbs.items() if key in of))
    head = ["it watched", "it drew", "it drew and wrote"]
    return markdown(head, [images, texts])


def results():
    """Mean and standard deviation over three seeds of the default run and of --recipe paper."""
    rows = []
    for measure, about in MAIN.items():
        cells = [over_seeds(SEEDS, measure, suffix) for suffix in ("", "_unseen")]
        cells.append(f"{number(SEEDS[0]['chance'], measure):.3f}")
        cells.append(over_seeds(PAPER[1], measure))
        cells.append("" if measure.startswith("underst") else over_seeds(PAPER[3], measure))
        rows.append([about, *cells])
    head = ["", "seen combinations", "unseen combinations", "chance"]
    return markdown([*head, "`--recipe paper`, seen", "with guidance 3"], rows)


def worlds():
    """Both worlds and the central claim, a line each."""
    first = [
        statistics.fmean(number(run, f"{mode}.attribute_accuracy") for run in SEEDS)
        for mode in ("understanding", "generation")
    ]
    second, claim = at_level(1), in_pairs("pretraining")
    reads, binds, draws = (over_seeds(second, LEVELS[k]) for k in ("reads", "binds", "draws"))
    few, *_, most = CAPTIONED
    starts = "generator", "scratch", "wrong prompts", "no prompts"

    def seeds(clips, starts):
        (n,) = {how_many_seeds(claim, TEXT[start, clips].name) for start in starts}  # alike
        return n

    def read(start, clips, when="read"):
        return f"{claim['mean and spread'][TEXT[start, clips].name][when][0]:.3f}"

    early, late = (
        {start: read(start, most, when) for start in starts} for when in ("read early", "read")
    )
    judged = {check["says"]: check["holds"] for check in claim["checks"]}

    def clear(clips):
        holds = judged[f"read: the generator beats scratch, {shown(clips)}"]
        return "" if holds else ", no clear difference"

    central = (
        f"a quarter of the way {early['generator']} is read, {early['scratch']} from nothing, "
        f"{early['wrong prompts']} and {early['no prompts']} from generators that know no words; "
        f"at the end {late['generator']}, {late['scratch']}, {late['wrong prompts']} and "
        f"{late['no prompts']}{clear(most)} "
        f"({seeds(most, starts)}); with {few} captioned clips {read('generator', few)}, and "
        f"{read('scratch', few)} from nothing{clear(few)} "
        f"({seeds(few, starts[:2])})"
    )
    rows = [
        ["one shape", f"after minutes it reads {first[0]:.3f} and draws {first[1]:.3f}"],
        [
            "[two shapes](toy/README.md#the-second-world)",
            f"after half an hour it reads {reads} of the attributes, both shapes in {binds} of the "
            f"clips, and draws {draws} ({so_many(len(second))})",
        ],
        [
            "[text learned from a generator, or from nothing](toy/results/README.md"
            "#does-a-generator-make-understanding-easier-to-learn)",
            central,
        ],
    ]
    return markdown(["", "what came out"], rows)


def over_seeds(runs, measure, suffix=""):
    """Mean and standard deviation; of one run, its number."""
    values = [number(run, measure, suffix) for run in runs]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def seeds():
    """Each seed of the default run and of --recipe paper, guidance 1."""
    runs = [*SEEDS, *PAPER[1]]
    rows = []
    for measure, about in MEASURES.items():
        cells = [f"{number(r, measure):.3f} / {number(r, measure, '_unseen'):.3f}" for r in runs]
        rows.append([about, *cells, f"{number(SEEDS[0]['chance'], measure):.3f}"])
    minutes = [f"{r['wall_s'] / 60:.1f} ({r['train_s'] / 60:.1f})" for r in runs]
    rows.append(["minutes in all (training)", *minutes, ""])
    rates = []
    for seed in (0, 1, 2):
        log = (ROOT / f"toy/results/seed{seed}.jsonl").read_text().splitlines()
        of = [line["samples_per_s"] for line in map(json.loads, log) if line["stage"] == "refine"]
        rates.append(f"{statistics.median(of):.0f}")
    rows.append(["clips/s in stage refine, median", *rates, "", "", "", ""])
    paper = [f"paper, seed {seed}" for seed in (0, 1, 2)]
    return markdown(["", "seed 0", "seed 1", "seed 2", *paper, "chance"], rows)


def at_level(level):
    """The second world's default runs at a level, by seed."""
    more = sorted((ROOT / "toy/results/pairs").glob(f"level{level}-seed*.json"))
    names = [f"level{level}", *(file.stem for file in more)]
    return [stored(f"toy/results/pairs/{name}") for name in names]


LEVELS = {
    "reads": "understanding.attribute_accuracy",
    "binds": "understanding.binding",
    "binds, unseen pairs": "understanding.binding_unseen",
    "binds, told a prompt": "understanding_with_prompt.binding",
    "draws": "generation.attribute_accuracy",
}


def levels():
    """What runs at a level of the second world came to; chance is of reading, seed 0."""
    names = "level1-brief", "level1-repulsion-0", "level2-brief"
    runs = [at_level(level) for level in range(1, 7)]
    runs += [[stored(f"toy/results/pairs/{name}")] for name in names]
    rows = []
    for of in sorted(runs, key=lambda of: of[0]["level"]):
        first = of[0]
        cells = [over_seeds(of, measure) for measure in LEVELS.values()]
        chance = f"{number(first['chance'], LEVELS['reads']):.3f}"
        rows.append([first["level"], f"`{first['command']}`", cells[0], chance, *cells[1:]])
    reads, *others = LEVELS
    return markdown(["level", "command", reads, "chance", *others], rows)


BY_LEVEL = {
    **{name: name for name in ("size", "colour", "shape", "speed", "direction")},
    "event": "turns or stops",
    "attribute_accuracy": "**attributes, mean**",
    "shape_right": "all of a shape",
    "binding": "**binding**",
    "binding_by_product": "binding, by the product",
    "binding_unseen": "binding, unseen pairs",
    "binding_by_product_unseen": "the same, by the product",
    "relation": "relation",
    "exact_match": "all that a caption tells",
    "exact_match_unseen": "the same, unseen pairs",
}


def measured(run, mode):
    return run[mode] | run[mode]["attribute_accuracy_each"]


def by_level():
    """Every measure of the default runs at each level, the mean over seeds, with chance."""
    runs = [at_level(level) for level in range(1, 7)]
    parts = []
    for mode, says in {
        "understanding": "Captions of clips",
        "understanding_with_prompt": "Captions of clips, a prompt at hand",
        "generation": "Videos drawn of captions",
        "joint_agreement": "Captions against videos, drawn together from a prompt",
    }.items():
        rows = []
        for name, about in BY_LEVEL.items():
            cells = []
            for of in runs:
                here = [measured(run, mode) for run in of]
                by_chance = [measured(run["chance"], mode) for run in of]
                if name in here[0]:
                    mean, chance = (statistics.fmean(r[name] for r in s) for s in (here, by_chance))
                    cells.append(f"{mean:.3f} ({chance:.2f})")
                else:
                    cells.append("")
            rows += [[about, *cells]] if any(cells) else []
        head = [says, *(f"level {of[0]['level']}" for of in runs)]
        parts.append(markdown(head, rows))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the paper's claims

CLAIMS = {
    "pretraining": "What a generator has learned makes understanding easier to learn",
    "recall": "Knowledge Recall before refinement helps",
    "dropout": "Dropping the prompt in recall makes the model look at the video",
    "refine_dropout": "In refinement the prompt may stay: captions say more than it does",
    "experts": "A text expert of its own, new and light, beats a shared FFN",
    "survival": "Learning text leaves the generator's videos as good as they were",
    "clocks": "Independent clocks beat one clock for both in all three modes",
    "whole": "In full-length runs, recall and independent clocks cost no mode anything",
    "joint_shift": "One clock for both is as good a line for joint sampling as another",
    "train_text": "(ours) The text stream alone, all else frozen, learns as well as all together",
    "padding": "(ours) Padding may be attended to, and be in the loss",
    "lambda_t": r"The weight \|z_v\| / \|z_t\| balances the text's loss against the video's",
    "embedding": "Token embeddings need alignment with the video to stay alive; in `pairs`: "
    "learning them costs no reading",
    "text_flow": "Text can flow over embeddings, by its velocity, in few steps",
    "coevolution": "Drawn together, video and text shape each other",
    "understanding": "After refinement the model looks at the video, not at the prompt alone",
    "scaling": "Width and more clips improve reading and drawing",
}


# The others were made with an earlier default recipe, of 3,600 steps.
RETAKEN = (
    *("dropout", "refine_dropout", "experts", "joint_shift", "padding", "understanding"),
    "train_text",
)


def found(name):
    return stored(f"toy/results/experiments/{name}/results")


def in_pairs(name):
    """What the experiment of this name found in the second world; None where it was not run."""
    path = f"toy/results/pairs/{name}/results"
    return stored(path) if (ROOT / f"{path}.json").exists() else None


def verdicts():
    """A line an experiment, with its verdict in either world."""
    rows = []
    for name, claim in CLAIMS.items():
        told = [verdict(of) if of else "" for of in (found(name), in_pairs(name))]
        rows.append([f"[{name}](#{name})", claim, *told])
    return markdown(["experiment", "claim", "in the first world", "in `pairs`"], rows)


def verdict(of):
    checks = [check for check in of["checks"] if not check["ours"]]
    held = f"{sum(check['holds'] for check in checks)} of {len(checks)}"
    counts = [len(check["gain"]) for check in checks]
    few, most = min(counts), max(counts)
    seeds = so_many(few) if few == most else f"{few} to {most} seeds"
    return f"**{of['verdict']}**, {held}" + f", {seeds}" * (few < len(SEEDS))


def so_many(seeds):
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def claims():
    """A section an experiment: the claim, what would refute it, each check, the figure."""
    parts = []
    for name in CLAIMS:
        of = found(name)
        refuted = f"*Refuted if:* {of['refuted if']}"
        parts += [f"### {name}", *(textwrap.fill(text, 120) for text in (of["claim"], refuted))]
        parts += [f"Verdict: **{of['verdict']}**", checks_of(of)]
        parts.append(f"![figure of {name}](experiments/{name}/figure.png)")
        if second := in_pairs(name):
            about = textwrap.fill(f"In `pairs`: {verdict(second)}. {second['claim']}", 120)
            parts += [about, checks_of(second)]
            if left := second["not trained"]:
                parts.append(textwrap.fill(f"Not trained yet: {'; '.join(left)}.", 120))
            parts.append(f"![figure of {name} in pairs](pairs/{name}/figure.png)")
    return "\n\n".join(parts)


def checks_of(experiment):
    rows = []
    for check in experiment["checks"]:
        about = check["says"].replace("|", r"\|") + " (ours, not counted)" * check["ours"]
        gain = f"{check['mean']:+.3f}"
        gain += f" ± {check['spread']:.3f}" * (len(check["gain"]) > 1)
        gain += f", {so_many(len(check['gain']))}" * (len(check["gain"]) < len(SEEDS))
        rows.append(["yes" if check["holds"] else "no", about, gain, f"{check['above']:+.3f}"])
    return markdown(["holds", "check", "gain", "has to exceed"], rows)


STARTED = {
    "generator": "a generator, 3,000 steps",
    "generator, a fifth": "a generator, 600 steps",
    "no prompts": "a generator that never saw a prompt",
    "wrong prompts": "a generator that saw other clips' prompts",
    "scratch": "nothing",
}


def how_many_seeds(results, variant):
    return so_many(sum(variant in measured for measured in results["each seed"]))


def central():
    """What text stages came to, by what they start from and how many captioned clips they see."""
    results, rows = in_pairs("pretraining"), []
    of = results["mean and spread"]

    def cells(variant):
        if variant not in of:
            return ""
        names = ("read early", "read", "read bound", "drawn")
        numbers = " / ".join(f"{of[variant][name][0]:.3f}" for name in names)
        return f"{numbers} ({how_many_seeds(results, variant)})"

    for start, about in STARTED.items():
        rows.append([about, *(cells(TEXT[start, n].name) for n in CAPTIONED)])
    rows.append([f"nothing, {PAIRS_FULL.generator:,} steps more", "", "", cells(AS_LONG.name)])
    head = [f"{n:,} captioned clips" for n in CAPTIONED if n < EVER_NEW]
    return markdown(["text stages start from", *head, "none seen twice"], rows)


def kinds_of_e():
    """What the second world's captions came to with each kind of E, over seeds."""
    of, lines = in_pairs("embedding")["mean and spread"], []
    for variant, numbers in of.items():
        curve = [name for name in numbers if name.startswith("largest cosine @ ")]
        last = max(curve, key=lambda name: int(name.rpartition(" ")[2]))
        names = (last, "read shape", "read", "read bound", "drawn")
        lines.append([variant, *("{:.3f} ± {:.3f}".format(*numbers[name]) for name in names)])
    head = ["largest cosine", "shapes read", "all attributes read", "both bound", "drawn"]
    return markdown(["", *head], lines)


def trainings():
    """How long the experiments' runs are and took."""
    runs = {}
    for name in CLAIMS:
        for variant, of in found(name)["variants"].items():
            runs[name in RETAKEN, variant] = of["training seconds"]
    hours = sum(map(sum, runs.values())) / 3600
    steps = [f"{sum(found(name)['budget']['default'][1:]):,}" for name in ("recall", "dropout")]
    rows = [
        ["trainings", sum(map(len, runs.values()))],
        ["their hours together", f"{hours:.1f}"],
        ["text steps of a short run", FULL.recall + FULL.refine],
        ["text steps of a run of full length", f"{steps[0]}, taken anew {steps[1]}"],
        ["seconds of a short run", f"{statistics.median(runs[True, 'base']):.0f}"],
        ['margin of "better"', f"{MARGIN:+}"],
    ]
    return markdown(["", ""], rows)


CHOICES = {
    "clocks, full-length runs": (
        ("independent, the text's warped", "whole: whole, independent"),
        ("mixture", "whole: default"),
    ),
    "clocks, short runs with p = .5": (
        ("independent, the text's warped", "clocks: independent"),
        ("mixture", "clocks: p 0.5"),
    ),
    "text head": (("velocity", "text_flow: velocity"), ("x1", "text_flow: base")),
    "E": (("free", "embedding: literal"), ("unit rows, anchor 0.1", "embedding: base")),
    "loss": (("eq. 11", "embedding: no anchor"), ("with an anchor of 0.1", "embedding: base")),
}


def choices():
    """The paper's choice beside ours where both were measured."""
    measures = ["read", "drawn", "agreement"]
    rows = []
    for about, sides in CHOICES.items():
        cells = [about]
        for title, key in sides:
            name, variant = key.split(": ")
            of = found(name)["mean and spread"][variant]
            cells.append(title)
            cells += ["{:.3f} ± {:.3f}".format(*of[m]) if m in of else "" for m in measures]
        rows.append(cells)
    return markdown(["", "nearer the paper", *measures, "ours", *measures], rows)


def widths():
    """What a text expert of each width takes: of the 1.3B and of the 14B model."""
    rows = []
    for name in ("wan-1.3b", "wan-14b"):
        preset = PRESETS[name]
        dim, whole = preset.dim, preset.ffn_dim
        for width in sorted({whole // 8, preset.text_ffn_dim, whole // 2, whole}):
            config = dataclasses.replace(preset, text_ffn_dim=width)
            count = preset.num_layers * (2 * dim * width + dim + width)
            flops = preset.num_layers * 4 * dim * width * preset.text_len
            of = forward_flops(config, 32760, preset.text_len)
            about = f"{name}, {width:,} of {whole:,}" + " (the preset)" * (config == preset)
            cells = f"{count / 1e6:,.0f} M", f"{16 * count / 1e9:.1f} GB"
            rows.append([about, *cells, f"{flops / 1e12:.2f} of {of / 1e12:,.0f} TFLOP"])
    head = ["FFN_t's width", "parameters", "weights, gradients, moments", "a forward pass"]
    return markdown(head, rows)


def reading():
    """Accuracy of captions by the sampler's steps, the video computed in each or once."""
    of = found("text_flow")["mean and spread"]["default"]
    rows = []
    for about, name in (("every step", "read in"), ("the first step", "video reused, read in")):
        rows.append([about, *("{:.3f} ± {:.3f}".format(*of[f"{name} @ {k}"]) for k in STEPS)])
    return markdown(["video computed in, by steps", *STEPS], rows)


# ---------------------------------------------------------------- how sure it is

SURE = {"toy": "toy, unseen combinations", "pairs1": "pairs, level 1", "pairs2": "pairs, level 2"}


def sure(name):
    return stored(f"toy/results/confidence/{name}")


def confidence():
    """What is right by confidence: captions in eight parts of one size, the least sure first."""
    rows = []
    for name, about in SURE.items():
        of, ranks = sure(name), sure(name)["auc"]
        parts = [f"{part['all right']:.2f}" for part in of["reliability"]]
        auc = f"{ranks['confidence']:.2f}", f"{ranks['last step']:.2f}", f"{ranks['text loss']:.2f}"
        rows.append([about, f"{of['all right']:.3f}", *parts, *auc])
    parts = ["1st eighth", *(f"{k}th" for k in range(4, 9))]
    parts[1:1] = ["2nd", "3rd"]
    head = ["captions that are all right", "of all", *parts]
    return markdown([*head, "AUC", "AUC, last step", "AUC, text loss"], rows)


def best_of():
    """What is right of the captions that are kept, of one to eight."""
    rows = []
    for name, about in SURE.items():
        of = sure(name)["best of"]
        cells = [f"{kept['all right']:.3f}" for kept in of.values()]
        most = of["8"]
        others = f"{most['all right, by confidence']:.3f}", f"{most['any of them right']:.3f}"
        rows.append([about, *cells, *others])
    head = ["captions that are all right, best of", "1", "2", "4", "8"]
    return markdown([*head, "8, by confidence", "any of 8"], rows)


# ---------------------------------------------------------------- costs


def speed():
    """What `python -m wan.bench --toy` stored."""
    rows = []
    for flags, of in stored("toy/results/bench-toy")["toy"].items():
        about = f"`{flags}`" if flags else "the default"
        rows.append([about, f"{of['clips_per_s']:.0f}", f"{of['loss']:.3f}"])
    return markdown(["", "clips/s", "loss after 120 steps"], rows)


def neighbour():
    """What `python -m wan.bench --neighbour` stored."""
    of = stored("toy/results/bench-neighbour")["neighbour"]
    (alone,) = of["alone"]
    rows = []
    for about, rates in of.items():
        told = " + ".join(f"{rate:.0f}" for rate in rates)
        rows.append([about, told, f"{sum(rates) / alone:.0%}"])
    return markdown(["", "clips/s", "of alone"], rows)


def settings():
    """The defaults of training on real data."""
    values = vars(train.Train()) | train.REAL
    targets = {"recall": "the prompt", "refine": "the detailed caption"}
    rows = []
    for stage, target in targets.items():
        names = ("steps", "lr", "optimizer", "p_drop")
        n, lr, kind, p_drop = (values[f"{stage}_{name}"] for name in names)
        rows.append([stage, target, f"{n:,}", f"{lr:g}", kind, values["clocks"], p_drop])
    head = ["stage", "text to write", "steps", "learning rate", "optimizer", "clocks"]
    head.append("prompt dropped")
    return markdown(head, rows)


COLUMNS = ("video", "video + text", "diffusers, video")
KINDS = ("training step", "denoising step")


def steps():
    """Seconds of a step on two CPU cores, ours beside diffusers'."""
    rows = []
    for run in (stored("wan/results/cpu-eager"), stored("wan/results/cpu-compile")):
        for kind in KINDS:
            of = [run["steps"][f"{name}, {kind}"]["seconds"] for name in COLUMNS]
            mode = run["kind"].split(", ")[1]
            rows.append([f"{kind}, {mode}", *(f"{x:.2f}" for x in (*of, of[0] / of[2]))])
    return markdown(["seconds", *COLUMNS, "video : diffusers' video"], rows)


# A part of tests/gpu.sh, and which of its steps -> what the README calls it.
H100 = {
    "eager-keep-attention": "training step, recompute keep-attention",
    "compiled-keep-attention": "the same, compiled",
    "eager-full": "training step, recompute full",
    "text-keep-attention": "`--train text`, recompute keep-attention",
    "text-full": "`--train text`, recompute full",
    "sampling step": "denoising step",
    "sampling guided_step": "the same with guidance",
    "sampling guided_joint_step": "joint's step with guidance",
    "understanding every": "text step of understand, with the video's tokens",
    "understanding reused": "the same, with their KV cache",
    "understanding captured": "the same, as a CUDA graph",
    "vae": "the VAE decodes 81 frames, fp32",
}


def h100():
    """What tests/gpu.sh found on one H100: seconds, share of its peak, memory and the estimate."""
    lines = (ROOT / "wan/results/h100.jsonl").read_text().splitlines()
    runs = {run["part"]: run for run in map(json.loads, lines)}
    rows = []
    for part, what in H100.items():
        part, _, step = part.partition(" ")
        of, step = runs[part], step and f"{step}_"
        seconds = of[f"{step}s" if step else "seconds"]
        mfu = f"{of['mfu']:.0%}" if "mfu" in of else ""
        told = "8.2, now 9.9" if part == "vae" else f"{of[f'{step}estimated_gb']:.1f}"
        gb = f"{of[f'{step}gb']:.1f}", told
        rows.append([what, f"{seconds:.3g}", mfu, *gb])
    return markdown(["", "seconds", "MFU", "GB", "GB told"], rows)


def caption_flops(config, n_v, n_t, steps=50):
    """FLOPs of a caption with the video's tokens computed in every step, and in the first alone.

    Later steps then compute the text's tokens, which attend to the video's; the keys and values of
    the prompt are there, too.
    """
    whole, d = forward_flops(config, n_v, n_t), config.dim
    attended = 4 * config.num_layers * d * (n_t * n_v - d * config.prompt_len)
    text = forward_flops(config, 0, n_t) + attended
    return steps * whole, whole + (steps - 1) * text


MID_SIZE = {
    "dim": 512,
    "num_layers": 8,
    "num_heads": 8,
    "ffn_dim": 2048,
    "text_ffn_dim": 512,
    "vocab_size": 1000,
}


def reuse():
    """Seconds of a caption in 50 steps, the video computed in every step or once."""
    mid, rows = dataclasses.replace(PRESETS["wan-1.3b"], **MID_SIZE), []
    for n_t in (16, 64, 256):
        run = stored(f"wan/results/cpu-understand-{n_t}")
        n_v, every, once = run["video tokens"], *run["understand"].values()
        full, less = caption_flops(mid, n_v, n_t)
        times = f"{every / once:.1f}", f"{full / less:.1f}"
        rows.append([f"mid-size, {n_v:,} and {n_t}", f"{every:.1f} s", f"{once:.1f} s", *times])
    full, less = caption_flops(PRESETS["wan-1.3b"], 32760, 256)
    flops = f"{full / 1e15:.1f} PFLOP", f"{less / 1e15:.2f} PFLOP"
    rows.append(["wan-1.3b, 32,760 and 256", *flops, "", f"{full / less:.1f}"])
    head = ["video and text tokens", "every step", "once", "times faster", "times fewer FLOPs"]
    return markdown(head, rows)


# ---------------------------------------------------------------- the model's forward

# How a line of univigu.py begins, and what it does.
FORWARD = {
    "streams = {": "Turns each patch of the video latent into a token, and the video's clock into "
    "shifts, scales and gates.",
    'streams["t"] =': "Turns each text embedding into a token, and the text's clock into "
    "shifts, scales and gates.",
    "c = self.text_embedding(c)": "Brings the prompt to the width of the network.",
    "h, kept = block(": "Each block updates the tokens `h` of both modalities.",
    "x = join([self.norm1": "Normalises, scales and shifts the tokens of each modality by its own "
    "clock, and joins them into one sequence.",
    "a, kv = self.self_attn(": "All tokens attend to all: this is where video and text meet.",
    "a, kv_c = self.cross_attn(": "All tokens attend to the prompt, as in Wan.",
    "h = {m: h[m] + mod[m].gate_ffn": "Each modality goes through its own expert, `experts[m]`.",
    "v_v = -self.unpatchify(": "Turns video tokens back into a latent's velocity, data minus "
    "noise; Wan's head gives noise minus data.",
    "v_t = None if z_t is None": "Turns text tokens into the velocity of the text.",
}


def source(start):
    """The line of univigu.py that starts so, without its comment."""
    lines = [line.strip() for line in text_of("univigu.py").splitlines()]
    (line,) = {line for line in lines if line.startswith(start)}
    return line.split("  #")[0].strip()


def forward():
    rows = [[k, f"`{source(start)}`", about] for k, (start, about) in enumerate(FORWARD.items(), 1)]
    return markdown(["", "line", "what it does"], rows)


# ---------------------------------------------------------------- the tests

TABLES = {
    README: [pictures, results, worlds, forward],
    TOY: [levels, pairs, speed, neighbour],
    RESULTS: [
        *(central, seeds, verdicts, claims, trainings, widths, kinds_of_e, choices, reading),
        *(by_level, confidence, best_of),
    ],
    WAN: [settings, h100, steps, reuse],
}
PLACES = [(document, table) for document, tables in TABLES.items() for table in tables]


def place(table):
    name = table.__name__
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)


@pytest.mark.parametrize("document, table", PLACES, ids=[t.__name__ for _, t in PLACES])
def test_generated_tables_are_as_stored(document, table):
    found = place(table).search(text_of(document))[0]
    assert found.splitlines()[1:-1] == table().splitlines()


def test_the_claims_are_judged_by_the_stored_numbers():
    now = json.loads(json.dumps(vars(FULL)))
    assert list(CLAIMS) == [experiment.name for experiment in EXPERIMENTS]
    for experiment in EXPERIMENTS:
        of = found(experiment.name)
        verdict, checks = judge(experiment.checks, of["each seed"])
        assert (of["claim"], of["verdict"], of["checks"]) == (experiment.claim, verdict, checks)
        assert of["found"] == finding(verdict, checks)
        full = now if experiment.name in RETAKEN else now | {"default": [800, 200, 2600]}
        assert of["budget"] == full and len(of["seeds"]) >= 3


@pytest.mark.parametrize("experiment", PAIRS, ids=[e.name for e in PAIRS])
def test_the_second_worlds_claims_are_judged_by_the_stored_numbers(experiment):
    of = in_pairs(experiment.name)
    if of is None:
        pytest.skip("not run yet")
    verdict, checks = judge(experiment.checks, of["each seed"])
    assert (of["claim"], of["verdict"], of["checks"]) == (experiment.claim, verdict, checks)
    unused = {"default": None}  # no variant of this world trains as long as the default run
    assert of["budget"] | unused == json.loads(json.dumps(vars(PAIRS_FULL))) | unused


def test_reuse_is_ten_times_faster_where_the_text_is_short_and_costs_no_accuracy():
    short = stored("wan/results/cpu-understand-16")
    assert short["video tokens"] >= 2000 and "--understand 50" in short["command"]
    assert short["understand"]["every"] > 10 * short["understand"]["first"]
    checks = [c for c in found("text_flow")["checks"] if "computed once" in c["says"]]
    assert len(checks) == 2 and all(c["holds"] and c["above"] >= -0.005 for c in checks)


def test_confidence_tells_right_from_wrong_in_both_worlds():
    """Else sample.py would not show it."""
    for name in SURE:
        assert sure(name)["auc"]["confidence"] > 0.7
        first, *_, last = [part["all right"] for part in sure(name)["reliability"]]
        assert last > first


def test_the_map_names_every_room():
    names = {path.name for path in ROOT.glob("*.py")}
    names |= {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")}
    assert set(re.findall(r"^\| `([\w./]+)` \|", text_of(README), re.M)) == names


PROGRAM = re.compile(
    r"\b(?:python (?:-m )?)?"
    r"((?:train|sample)\.py|wan\.(?:bench|prepare|caption|evaluate|vbench)|"
    r"toy\.(?:experiments|square))\b(.*)"
)


def commands(document):
    """(program, mode of sample.py, its words) of each command; a continued line is one."""
    text = text_of(document)
    blocks = [
        body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if not kind
    ]
    blocks += re.findall(r"`((?:\w+=\S+ )*(?:taskset -c 0 )?python [^`]*)`", text)
    for line in re.sub(r"\\\n *", " ", "\n".join(blocks)).splitlines():
        if match := PROGRAM.search(line):
            words = re.split(" {3,}", match[2])[0].split()  # the rest explains the command
            yield match[1], words[0] if match[1] == "sample.py" else None, words


@pytest.fixture(scope="module")
def help_of():
    """(program, mode) -> what --help prints."""
    texts = {}

    def ask(program, mode=None):
        if (program, mode) not in texts:
            main = import_module(program.removesuffix(".py")).main
            with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
                main([*filter(None, [mode]), "--help"])
            assert end.value.code in (0, None)
            texts[program, mode] = printed.getvalue()
        return texts[program, mode]

    return ask


def test_commands_name_flags_and_experiments_that_there_are(help_of):
    everything = [command for document in TABLES for command in commands(document)]
    assert len(everything) > 20
    for program, mode, words in everything:
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", help_of(program, mode)), (program, flag)
        if program == "toy.experiments":
            valued = ("--data", "--out", "--seeds")
            names = [w for w, before in zip(words, ["", *words]) if before not in valued]
            assert {w for w in names if not w.startswith("--")} <= set(CLAIMS), words


# Flags of torchrun, pip, hf, ruff, VBench and .ci/run, and flags that are gone, as the changelog
# says.
OTHERS = set(
    "--nproc-per-node --nnodes --max-restarts --shutdown-timeout --rdzv-id --rdzv-backend "
    "--rdzv-endpoint --include --check --lowest --nodes --ntasks-per-node --gpus-per-node "
    "--cpus-per-task --signal --mode --p-drop".split()  # the last is gone, as CHANGELOG.md says
)


def test_flags_in_the_text_are_flags_of_a_program(help_of):
    programs = [("sample.py", mode) for mode in MODES]
    programs += [
        (name, None)
        for name in (
            *("train.py", "wan.bench", "wan.prepare", "wan.caption", "wan.smoke"),
            *("wan.evaluate", "wan.vbench"),
            *("toy.experiments", "toy.judge", "toy.square", "toy.confidence"),
        )
    ]
    known = {flag for program in programs for flag in re.findall(r"--[\w-]+", help_of(*program))}
    for document in DOCUMENTS:
        flags = set(
            re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub("<!--|-->", "", text_of(document)))
        )
        assert flags <= known | OTHERS, (document, flags - known - OTHERS)


def anchors(document):
    """What GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", text_of(document), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = re.sub("`[^`\n]*`", "", text_of(document))
    for link in re.findall(r"\]\(((?!http)[^)]*)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), link


def test_tests_that_are_named_exist():
    """`pytest -k twenty tests/test_train.py` selects something."""
    pattern = r"`pytest(?: -s)? (?:-k (\w+) )?(tests/\w+\.py)`"
    for document in DOCUMENTS:
        for words, path in re.findall(pattern, text_of(document)):
            names = re.findall(r"^def (test_\w+)", text_of(path), re.M)
            assert any(words in name for name in names), (document, words, path)


@pytest.mark.slow
def test_the_first_commands_run(tmp_path, monkeypatch, capsys):
    """README's training and its three samples, on a model that has learned nothing."""
    monkeypatch.chdir(tmp_path)
    stages = "--generator-steps 1 --recall-steps 1 --refine-steps 1 --eval-clips 2"
    train.main([*TINY.split(), *stages.split()])
    block = re.search(r"^```\n(python sample\.py .*?)^```", text_of(README), re.M | re.S)[1]
    for line in block.splitlines():
        _, _, *words = re.split(r" (?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", line)
        sample.main([word.strip('"') for word in words])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "circle.gif", "both.gif"}


def python_block(document, start):
    """The block of Python in a document that begins so."""
    return re.search(rf"^```python\n({re.escape(start)}.*?)^```", text_of(document), re.M | re.S)[1]


def test_the_model_of_ones_own_trains(tmp_path, monkeypatch):
    code, main = python_block(TOY, "from functools"), train.main
    tiny = f"{TINY} --generator-steps 1 --recall-steps 1 --refine-steps 1 --eval-clips 0".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "main", lambda argv, **options: main([*argv, *tiny], **options))
    exec(compile(code, TOY, "exec"), {})
    assert all((run / "refine" / "model.safetensors").is_file() for run in Path("runs").iterdir())


@pytest.mark.slow
def test_the_experiment_of_ones_own_runs(tmp_path, monkeypatch, capsys, one_codec):
    code = python_block(TOY, "from toy.experiments")
    code = code.replace('"runs/ideas"', repr(str(tmp_path))).replace("[0, 1, 2]", "[0, 1]")
    budget = Budget(generator=2, recall=1, refine=2, clips=2, default=(2, 1, 2), flags=TINY)
    monkeypatch.setattr("toy.experiments.FULL", budget)
    exec(compile(code, TOY, "exec"), {})
    assert "four heads read better" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "heads").iterdir()}
    assert files == {"results.json", "figure.png"}


def write():
    for document, tables in TABLES.items():
        text = text_of(document)
        for table in tables:
            text, places = place(table).subn(lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text)
            assert places == 1, f"{document} has {places} places for the table {table.__name__}"
        (ROOT / document).write_text(text)


if __name__ == "__main__":
    write()
