"""The method learns: the toy's first losses are the stored ones, and a short run beats chance."""

import json

import pytest

import train
from engine.world import Evaluation

# Loss of the first steps of each stage of `python train.py`, seed 0, fp32, eager.
GOLDEN = {
    "generator": [2.145983, 2.077567, 2.170609, 1.862654],
    "recall": [19.817026, 19.95116, 13.911478, 11.150528],
    "refine": [22.326303, 21.161417, 17.017588, 17.3869],
}


def run(tmp_path, **steps):
    """Trains the default toy with other step counts; returns the lines of metrics.jsonl."""
    flags = [part for stage, n in steps.items() for part in (f"--{stage}-steps", str(n))]
    plain = "--precision fp32 --compile no --log-every 1 --warmup 0"
    train.main(["--out", str(tmp_path), *plain.split(), *flags])
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_first_losses_are_the_stored_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("toy.evaluate.evaluate", lambda *args: Evaluation({}))
    lines = run(tmp_path, generator=4, recall=4, refine=4)
    found = {stage: [line["loss"] for line in lines if line["stage"] == stage] for stage in GOLDEN}
    for stage, losses in GOLDEN.items():
        assert found[stage] == pytest.approx(losses, rel=2e-3), (stage, found[stage])


@pytest.mark.slow
def test_a_short_run_learns_to_read_and_draw(tmp_path, capsys):
    """Half of the default run's generator, a fifth of its text stages. Chance, of the answers for
    other clips, is about .3."""
    steps = "--generator-steps 100 --recall-steps 20 --refine-steps 300 --eval-clips 64"
    train.main(["--out", str(tmp_path), *steps.split()])
    results = json.loads((tmp_path / "results.json").read_text())
    print(capsys.readouterr().out[-1500:])
    for split in ("", "_unseen"):
        assert (
            results["understanding"]["attribute_accuracy" + split]
            > results["chance"]["understanding"]["attribute_accuracy" + split] + 0.3
        )
        assert (
            results["generation"]["attribute_accuracy" + split]
            > results["chance"]["generation"]["attribute_accuracy" + split] + 0.15
        )
        assert (
            results["joint"]["agreement" + split]
            > results["chance"]["joint"]["agreement" + split] + 0.1
        )
    assert (tmp_path / "samples.png").stat().st_size > 0


@pytest.mark.slow
def test_the_discrete_flow_learns_to_read_too(tmp_path, capsys):
    steps = "--generator-steps 50 --recall-steps 50 --refine-steps 350 --eval-clips 64 --batch 32"
    train.main(["--out", str(tmp_path), "--text-flow", "discrete", *steps.split()])
    results = json.loads((tmp_path / "results.json").read_text())
    print(capsys.readouterr().out[-1500:])
    for split in ("", "_unseen"):
        assert (
            results["understanding"]["attribute_accuracy" + split]
            > results["chance"]["understanding"]["attribute_accuracy" + split] + 0.2
        )
