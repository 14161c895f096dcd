"""toy/walkthrough.ipynb runs from top to bottom in a fresh process, and gives what it stores."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE = ROOT / "toy" / "walkthrough.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TRAINS = next(i for i, cell in enumerate(CODE) if "learn(STEPS)" in "".join(cell["source"]))
TRAINED_HERE = r"^section 7's: .*$"  # what was learned here differs from CPU to CPU
MOST_STEPS = 600  # of 16 clips: about a minute on two CPU cores

# Runs cells as Jupyter does, but for the display of a last expression. Prints, as JSON, what each
# printed and how many figures it drew.
RUN = """
import io, json, sys
from contextlib import redirect_stdout
import matplotlib
matplotlib.use("Agg")
from matplotlib import pyplot
names, outputs = {"__name__": "__main__"}, []
for i, source in enumerate(json.load(sys.stdin)):
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, f"cell {i}", "exec"), names)
    outputs.append((printed.getvalue(), len(pyplot.get_fignums())))
    pyplot.close("all")
print(json.dumps(outputs))
"""


def run(sources, folder):
    """What each source prints and draws, run in this order in a fresh process."""
    process = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(sources),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and not process.stderr, process.stderr[
        -3000:
    ]  # warnings would be stored too
    return json.loads(process.stdout)


def sources(cells):
    return ["".join(cell["source"]) for cell in cells]


def stored(cell):
    """What a cell's stored outputs show: printed text, and how many pictures."""
    text = "".join(
        "".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream"
    )
    return text, sum("image/png" in out.get("data", {}) for out in cell["outputs"])


def numbers(text):
    return [float(n) for n in re.findall(r"\d+\.?\d*", text)]


def table(text):
    """The rows of the last table: name -> mean accuracy, chance."""
    return {
        name.strip(): (float(mean), float(chance))
        for name, mean, chance in re.findall(r"^(\w[^:]*: .*?) +(\d\.\d+) +(\d\.\d+)", text, re.M)
    }


def test_stored_outputs_are_those_of_one_run_and_small():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE[1:]:  # the first one imports
        assert any(stored(cell)), sources([cell])
    for out in (out for cell in CODE for out in cell["outputs"]):
        assert (
            out["output_type"] in ("stream", "display_data")
            and out.get("name", "stdout") == "stdout"
        ), out
        said = "".join(out.get("text", "")) + "".join(out.get("data", {}).get("text/plain", ""))
        assert not re.search(r"(?<![\w.])[/\\]\w+[/\\]\w|\b[A-Z]:\\", said), (
            said
        )  # a path of the machine it ran on
    assert FILE.stat().st_size < 400_000
    assert set(NOTEBOOK["metadata"]) <= {"kernelspec", "language_info"}


@pytest.mark.parametrize("folder", [ROOT, ROOT / "toy"], ids=["root", "toy"])
def test_it_starts_from_the_root_and_from_its_own_folder(folder):
    run(sources(CODE[:1]), folder)


@pytest.mark.slow
def test_it_runs_and_gives_what_is_stored():
    further = re.findall(
        r"```python\n(.*?)```",
        "".join(sources(c for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown")),
        re.S,
    )
    found = run(
        [*sources(CODE), "assert STEPS == len(losses); STEPS = 2", *further], ROOT / "toy"
    )  # what the text proposes runs too
    for i, (cell, (text, pictures)) in enumerate(zip(CODE, found)):
        known, pictures_known = stored(cell)
        assert pictures == pictures_known, (i, pictures, pictures_known)
        if i == TRAINS:  # its seconds are the machine's
            text, known = (re.sub(r"\d+ s$", "", of, flags=re.M) for of in (text, known))
        text, known = (re.sub(TRAINED_HERE, "", of, flags=re.M) for of in (text, known))
        assert re.sub(r"\d+\.?\d*", "#", text) == re.sub(r"\d+\.?\d*", "#", known), i
        assert numbers(text) == pytest.approx(numbers(known), rel=0.01, abs=0.02), (i, text, known)
    steps, clips, _ = numbers(stored(CODE[TRAINS])[0])
    assert steps <= MOST_STEPS and clips == 16
    rows, rows_known = table(found[len(CODE) - 1][0]), table(stored(CODE[-1])[0])
    assert len(rows) == 5 and rows.keys() == rows_known.keys()
    for table_of in (rows, rows_known):
        for name, (mean, chance) in table_of.items():
            assert mean > chance + 0.1, (name, mean, chance)
