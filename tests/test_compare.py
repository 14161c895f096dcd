"""toy/compare.py: which flags differ, and what runs of one kind come to together."""

import json

import pytest

from tests.conftest import refusal
from toy import compare


def make_run(folder, seed, read, **options):
    """A finished run as train.py leaves it, in what is read of it."""
    stage = folder / "refine"
    stage.mkdir(parents=True)
    train = {"seed": seed, "out": str(folder), "init": "", "refine_steps": 10, "ema": 0.0}
    stored = {"train": train | options, "step": 10, "stage": "refine"}
    stored |= {"elapsed": 1.0, "skipped": []}
    (stage / "train.json").write_text(json.dumps(stored))
    (stage / "config.json").write_text(json.dumps({"dim": 64}))
    (stage / "model.safetensors").touch()
    results = {
        "seed": seed,
        "understanding": {"attribute_accuracy": read, "attribute_accuracy_each": {"colour": 1}},
        "chance": {"understanding": {"attribute_accuracy": 0.3}},
        "train_s": 120,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_runs_are_one_column_where_only_seeds_and_places_differ(tmp_path, capsys):
    runs = []
    for seed, base, idea in ((3, 0.5, 0.75), (4, 0.7, 0.75)):
        init = {"init": f"runs/generator/seed{seed}/generator"}
        runs.append(make_run(tmp_path / f"base{seed}", seed, base, **init))
        runs.append(make_run(tmp_path / f"idea{seed}", seed, idea, ema=0.99, **init))
    compare.main([*runs, runs[0]])  # named twice, it counts once
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert rows == {
        "--ema": ["0", "0.99"],
        "runs": ["2", "2"],
        "understanding.attribute_accuracy": ["0.600 ± 0.141", "0.750 ± 0.000"],
        "minutes of training": ["2.000 ± 0.000", "2.000 ± 0.000"],
    }


def test_what_is_no_finished_run_is_refused(tmp_path, capsys):
    run = make_run(tmp_path / "run", 0, 0.5)
    unfinished = make_run(tmp_path / "unfinished", 0, 0.5)
    (tmp_path / "unfinished" / "results.json").unlink()
    broken = make_run(tmp_path / "broken", 0, 0.5)
    (tmp_path / "broken" / "results.json").write_text("{")
    for argv, word in (
        ([run], "two different"),
        ([run, run], "two different"),
        ([run, str(tmp_path / "none")], "none is no folder"),
        ([run, unfinished], "has no results.json"),
        ([run, broken], "broken"),
    ):
        assert word in refusal(capsys, compare.main, *argv)
    with pytest.raises(SystemExit):
        compare.main([run, unfinished, "--flag"])
