"""README's generated tables match the code and the stored results. `python -m tests.test_readme` writes them anew."""

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from toy.evaluate import SAMPLING
from toy.experiments import EXPERIMENTS, FULL, MARGIN, finding, judge
from toy.measures import STEPS
from train import REAL, Train, forward_flops
from univigu import PRESETS

ROOT = Path(__file__).parent.parent
NUMBERS = {12: "twelve", 13: "thirteen", 14: "fourteen"}
README = ROOT / "README.md"
ABOUT = {"univigu.py": "the method: model, loss, samplers", "train.py": "the training loop, every stage", "sample.py": "the three modes on files and prompts",
         "pages.py": "the pages: a sample's trajectory, a run's report",
         "bench.py": "speed of a step, against diffusers'",
         "toy/shapes.py": "the clips: attributes, renderer, split", "toy/words.py": "prompts, captions, tokenizer, prompt encoder",
         "toy/codec.py": "frames <-> latents", "toy/oracle.py": "reads attributes back from pixels", "toy/evaluate.py": "numbers, table, pictures",
         "toy/__init__.py": "the world as the loop sees it",
         "toy/muon.py": "Muon, in fp32 and batched", "toy/experiments.py": "the paper's claims, tested one by one", "toy/measures.py": "what those experiments measure",
         "wan/weights.py": "Wan2.1's and the published Uni-ViGU's checkpoints, in and out", "wan/codec.py": "Wan's VAE, umT5 and its tokenizer",
         "wan/prepare.py": "videos and texts -> shards of latents and tokens", "wan/data.py": "those shards as the loop sees them",
         "wan/caption.py": "detailed captions from a vision-language model", "wan/__init__.py": "the names of the real world"}


def files():
    lines = {name: (ROOT / name).read_text().count("\n") for name in ABOUT}
    return "\n".join(["| file | lines | what |", "|---|---|---|"] + [f"| `{name}` | {n} | {ABOUT[name]} |" for name, n in lines.items()])


def equations():
    """Equation -> where univigu.py names it beside code, with the function it stands in."""
    found, scope = {}, ""
    for number, line in enumerate((ROOT / "univigu.py").read_text().splitlines(), 1):
        if match := re.match(r"\s*(?:def|class) (\w+)", line):
            scope = match[1] if match[1] not in ("forward", "__init__") or line.startswith(("def", "class")) else scope
        code, _, comment = line.partition("#")
        for k in re.findall(r"\beq\. (\d+)", comment) if code.strip() else ():
            found.setdefault(int(k), []).append(f"{number} (`{scope}`)")
    return "\n".join(["| eq. | line of univigu.py |", "|---|---|"] + [f"| {k} | {', '.join(found[k])} |" for k in sorted(found)])


ROWS = {"caption, mean over seven attributes": "understanding.attribute_accuracy", "caption, all seven right": "understanding.exact_match",
        "generated video, colour, shape, direction": "generation.attribute_accuracy", "joint: caption against video": "joint.agreement"}


def results():
    """The results.json of three seeds of the default run and of --recipe paper: seen / unseen."""
    runs = {title: json.loads((ROOT / "toy" / "results" / f"{name}.json").read_text())
            for title, name in (("seed 0", "seed0"), ("seed 1", "seed1"), ("seed 2", "seed2"), ("`--recipe paper`", "paper"))}
    lines = ["| | " + " | ".join(runs) + " | chance |", "|---|" + "---|" * (len(runs) + 1)]
    for about, path in ROWS.items():
        mode, name = path.split(".")
        cells = [f"{r[mode][name]:.3f} / {r[mode][name + '_unseen']:.3f}" for r in runs.values()]
        lines.append(f"| {about} | " + " | ".join(cells) + f" | {runs['seed 0']['chance'][mode][name]:.3f} |")
    minutes = [f"{r['wall_s'] / 60:.1f} ({r['train_s'] / 60:.1f})" for title, r in runs.items() if title.startswith("seed")]
    return "\n".join([*lines, "| minutes in all (training) | " + " | ".join(minutes) + " | | |"])


def stored(name):
    return json.loads((ROOT / "toy" / "results" / f"{name}.json").read_text())


def experiments():
    """Of each experiment that was run in full: itself, and what it stored."""
    return [(e, stored(f"experiments/{e.name}/results")) for e in EXPERIMENTS if (ROOT / "toy" / "results" / "experiments" / e.name).exists()]


def claims():
    """Each claim, what was found, and its figure; how long the trainings took."""
    lines = ["| claim | outcome: each check, and its gain over three seeds | figure |", "|---|---|---|"]
    for _, r in experiments():
        verdict, found = r["found"].split(": ", 1)
        claim, found = (text.replace("|", r"\|") for text in (r["claim"], found))
        lines.append(f"| {claim} | **{verdict}**: {found} | [{r['name']}](toy/results/experiments/{r['name']}/figure.png) |")
    runs = {name: of["training seconds"] for _, r in experiments() for name, of in r["variants"].items()}
    runs |= {"generator": stored("experiments/survival/results")["variants"]["generator"]["training seconds"]}
    hours, (alone, beside) = sum(map(sum, runs.values())) / 3600, (statistics.median(runs[name]) for name in ("scratch", "base"))
    return "\n".join([*lines, "", f"{sum(map(len, runs.values()))} trainings of {hours:.1f} hours in all (Intel Xeon, two cores): the default runs, `scratch`, `lambda_t` and the variants of "
                      f"`recall` and `clocks` alone on both cores, the others two at a time. A short run of 400 steps takes {alone:.0f} seconds alone and {beside:.0f} beside another."])


CHOICES = (("clocks, whole runs", "independent", "whole: whole, independent", "the mixture", "whole: default"),
           ("clocks, short runs, p .5", "independent", "clocks: independent", "the mixture", "clocks: p 0.5"),
           ("text head", "velocity", "text_flow: velocity", "x1", "text_flow: base"),
           ("E", "free", "embedding: literal", "unit rows, anchor .1", "embedding: base"),
           ("loss", "eq. 11", "embedding: no anchor", "and an anchor of .1", "embedding: base"))


def choices():
    """The paper's choice beside ours, where they were measured: mean over three seeds."""
    lines = ["| | the paper's | read | drawn | agreement | ours | read | drawn | agreement |", "|---|---|---|---|---|---|---|---|---|"]
    for about, *sides in CHOICES:
        cells = []
        for title, key in (sides[:2], sides[2:]):
            name, variant = key.split(": ")
            of = stored(f"experiments/{name}/results")["mean and spread"][variant]
            cells += [title, *("{:.3f} ± {:.3f}".format(*of[n]) if n in of else "" for n in ("read", "drawn", "agreement"))]
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed():
    """What `bench.py --toy` stored."""
    rows = [f"| {f'`{flags}`' if flags else 'the default'} | {of['clips_per_s']:.0f} | {of['loss']:.3f} |" for flags, of in stored("bench-toy")["toy"].items()]
    return "\n".join(["| | clips/s | loss after 120 steps |", "|---|---|---|", *rows])


def steps():
    """Seconds of a step, ours beside diffusers'."""
    runs, who = [stored("bench-eager"), stored("bench-compile")], ("video", "video + text", "diffusers, video")
    lines = [f"| `{runs[0]['command']}` | {' | '.join(who)} | video : diffusers' |", "|---|" + "---|" * (len(who) + 1)]
    for run in runs:
        for kind in ("training step", "denoising step"):
            of = [run["steps"][f"{name}, {kind}"]["seconds"] for name in who]
            cells = [f"{seconds:.2f}" for seconds in (*of, of[0] / of[2])]
            lines.append(f"| {kind}, {run['device']}, {run['kind'].removesuffix(', recompute none')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "| wan-1.3b, 32,760 + 256 tokens, GPU | not measured yet | | | |"])


def caption_flops(config, n_v, n_t, steps=50):
    """A caption's FLOPs with the video's tokens run in every step, and in the first alone: then text tokens that also attend to the video's, the prompt's keys
    and values being there too."""
    whole, d = forward_flops(config, n_v, n_t), config.dim
    text = forward_flops(config, 0, n_t) + 4 * config.num_layers * d * (n_t * n_v - d * config.prompt_len)
    return steps * whole, whole + (steps - 1) * text


def reuse():
    """Seconds of a caption in 50 steps with the video's tokens run in every step, and in the first alone; and the ratio by arithmetic."""
    lines = ["| | video, text tokens | every step | first alone | times faster | by FLOPs |", "|---|---|---|---|---|---|"]
    mid = dataclasses.replace(PRESETS["wan-1.3b"], dim=512, num_layers=8, num_heads=8, ffn_dim=2048, text_ffn_dim=512, vocab_size=1000)
    for n_t in (16, 64, 256):
        run = stored(f"bench-understand-{n_t}")
        every, first = run["understand"].values()
        full, less = caption_flops(mid, run["video tokens"], n_t)
        lines.append(f"| the sizes above, `--text-len {n_t} --understand 50` | {run['video tokens']:,}, {n_t} | {every:.1f} s | {first:.1f} s | {every / first:.1f} | {full / less:.1f} |")
    full, less = caption_flops(PRESETS["wan-1.3b"], 32760, 256)
    return "\n".join([*lines, f"| wan-1.3b | 32,760, 256 | {full / 1e15:.1f} PFLOP | {less / 1e15:.2f} PFLOP | not measured | {full / less:.1f} |"])


def reading():
    """Accuracy of the default runs' captions by the sampler's steps, with the video computed in each and in the first alone."""
    of = stored("experiments/text_flow/results")["mean and spread"]["default"]
    lines = ["| steps | " + " | ".join(map(str, STEPS)) + " |", "|---|" + "---|" * len(STEPS)]
    for about, name in (("every step", "read in"), ("first alone", "video reused, read in")):
        lines.append(f"| {about} | " + " | ".join("{:.3f} ± {:.3f}".format(*of[f"{name} @ {k}"]) for k in STEPS) + " |")
    return "\n".join(lines)


TABLES = {"results": results, "claims": claims, "choices": choices, "speed": speed, "steps": steps, "reuse": reuse, "reading": reading, "files": files, "equations": equations}


def written(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(), re.S)[1].strip()


@pytest.mark.parametrize("name", TABLES)
def test_generated_tables_are_as_stored(name):
    assert written(name) == TABLES[name]()


def test_the_claims_are_judged_by_the_stored_numbers():
    full = json.loads(json.dumps(vars(FULL)))
    assert len(experiments()) == len(EXPERIMENTS)
    for experiment, found in experiments():
        verdict, checks = judge(experiment.checks, found["each seed"])
        assert (found["claim"], found["verdict"], found["checks"]) == (experiment.claim, verdict, checks) and len(found["seeds"]) >= 3
        assert found["found"] == finding(verdict, checks) and found["budget"] == full


def test_numbers_and_words_in_prose_are_those_of_the_code():
    text = " ".join(README.read_text().split())
    pictures, real = stored("seed0")["pictures"], SimpleNamespace(**vars(Train()) | REAL)
    said = [*(f"*{pictures[f'{mode}.gif']}*" for mode in ("understand", "generate", "joint")),
            f"{FULL.recall + FULL.refine} steps of text where the default has {sum(FULL.default[1:]):,}", f"{MARGIN} for \"better\"".removeprefix("0"),
            f"recall {real.recall_steps:,} steps at {real.recall_lr:.0e}, refine {real.refine_steps:,} at {real.refine_lr:.0e}".replace("e-0", "e-"),
            f"here {real.batch}, {real.p_drop} and {real.warmup:,} steps", f"`--p-drop` {Train.p_drop}", f"(`text_shift` {SAMPLING['joint']['text_shift']})",
            f"{NUMBERS[len(EXPERIMENTS)]} experiments"]
    assert [words for words in said if words not in text] == []


def test_reuse_is_ten_times_faster_where_the_text_is_short_and_costs_no_accuracy():
    short = stored("bench-understand-16")
    assert short["video tokens"] >= 2000 and "--understand 50" in short["command"] and short["understand"]["every"] > 10 * short["understand"]["first"]
    checks = [c for c in stored("experiments/text_flow/results")["checks"] if "computed once" in c["says"]]
    assert len(checks) == 2 and all(c["holds"] and c["above"] >= -0.005 for c in checks)


def test_the_map_of_files_is_complete():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not tracked or {name for name in tracked if not name.startswith("tests/")} == set(ABOUT)


def test_the_map_of_equations_is_complete():
    assert {int(k) for k in re.findall(r"^\| (\d+) \|", equations(), re.M)} == set(range(1, 19))


def commands():
    """Every command of the README's blocks: (script or module, mode of sample.py, its words), a continued line as one."""
    readme = README.read_text()
    blocks = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", readme, re.M | re.S) if not kind] + re.findall(r"`((?:OMP_NUM_THREADS=1 taskset -c 0 )?(?:python|bench\.py) [^`]*)`", readme)
    for line in re.sub(r"\\\n *", " ", "\n".join(blocks)).splitlines():
        if match := re.search(r"\b(?:python (?:-m )?)?((?:train|sample|bench)\.py|wan\.(?:prepare|caption)|toy\.experiments)\b(.*)", line):
            words = re.split(" {3,}", match[2])[0].split()          # what follows is about it
            yield match[1], words[0] if match[1] == "sample.py" else None, words


def test_commands_name_flags_and_files_that_there_are():
    helps, found = {}, list(commands())
    assert len(found) > 20
    for script, mode, words in found:
        if (script, mode) not in helps:
            start = [script] if script.endswith(".py") else ["-m", script]
            helps[script, mode] = subprocess.run([sys.executable, *start, *([mode] if mode else []), "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", helps[script, mode]), (script, flag)
        if script == "toy.experiments":
            assert {word for word in words if not word.startswith("--")} <= {e.name for e in EXPERIMENTS}, words
    for name in re.findall(r"\]\(((?!http|#)[^)]*)\)", README.read_text()):
        assert (ROOT / name).exists(), name
    titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", README.read_text(), re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", README.read_text())) <= titles


def test_tests_that_are_named_exist():
    """`pytest -k twenty tests/test_train.py` selects something."""
    for words, path in re.findall(r"`pytest(?: -s)? (?:-k (\w+) )?(tests/\w+\.py)`", README.read_text()):
        names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.M)
        assert any(words in name for name in names), (words, path)


@pytest.mark.slow
def test_the_idea_in_ten_lines_runs(tmp_path, monkeypatch, capsys, one_codec):
    from toy.experiments import Budget

    code = re.search(r"^```python\n(from toy\.experiments.*?)^```", README.read_text(), re.M | re.S)[1]
    code = code.replace('"runs/ideas"', repr(str(tmp_path))).replace("seeds=[0, 1, 2]", "seeds=[0, 1]")
    tiny = "--batch 4 --dim 24 --text-dim 24 --ffn-dim 32 --text-ffn-dim 16 --num-layers 1 --warmup 1 --compile no --device cpu"
    monkeypatch.setattr("toy.experiments.FULL", Budget(generator=2, recall=1, refine=2, clips=2, default=(2, 1, 2), flags=tiny))
    exec(compile(code, "README.md", "exec"), {})
    assert "four heads read better" in capsys.readouterr().out and {f.name for f in (tmp_path / "heads").iterdir()} == {"results.json", "figure.png"}


if __name__ == "__main__":
    text = README.read_text()
    for name, table in TABLES.items():
        text, places = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + table() + "\n" + m[2], text, flags=re.S)
        assert places == 1, f"README has {places} places for the table {name}"
    README.write_text(text)
