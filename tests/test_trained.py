"""The toys that come trained read and draw as their README says, from a fresh clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from toy import evaluate, oracle, pairs_evaluate
from univigu import generate, understand

ROOT = Path(sample.__file__).parent
CLIPS = 64
PAIRS = sample.INCLUDED.with_name("pairs")


@pytest.fixture(scope="module")
def trained():
    """Model, world, a batch of clips never shown, and what they show."""
    checkpoint = sample.open_checkpoint(str(sample.INCLUDED), None, torch.device("cpu"))
    dataset = checkpoint.world.dataset("unseen")
    batch, clips = dataset.__getitems__(range(CLIPS)), dataset.clips(range(CLIPS))
    return checkpoint.load(), checkpoint.world, batch, clips.attributes


def test_it_reads(trained):
    model, world, batch, truth = trained
    g = torch.Generator().manual_seed(0)
    y_hat = understand(model, batch["z_v"], generator=g, **world.sampling["understand"])
    mean, _ = evaluate.score(evaluate.said(world.tokenizer.decode(y_hat)), truth)
    assert mean > 0.98


def test_it_draws(trained):
    model, world, batch, truth = trained
    options = world.sampling["generate"] | {"generator": torch.Generator().manual_seed(0)}
    z_v = generate(model, batch["caption"], batch["c"], world.shape, **options)
    mean, _ = evaluate.score(oracle.read(world.codec.decode(z_v)), truth, evaluate.BRIEF)
    assert mean > 0.95


def test_the_one_of_two_shapes_reads_and_draws():
    checkpoint = sample.open_checkpoint(str(PAIRS), None, torch.device("cpu"))
    model, world = checkpoint.load(), checkpoint.world
    found = pairs_evaluate.sample_split(model, world, "seen", CLIPS, has_text=True)
    clips = world.dataset("seen").clips(range(CLIPS))
    compared = pairs_evaluate.compare(found, clips, world.level)
    right = {mode: pairs_evaluate.score(*of, world.level) for mode, of in compared.items()}
    assert right["understanding"]["attribute_accuracy"] > 0.97
    assert right["understanding"]["binding"] > 0.9
    assert right["generation"]["attribute_accuracy"] > 0.55


def test_sample_takes_it_and_says_so_until_something_is_trained(tmp_path):
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    flags = ["joint", "--prompt", "a red circle moving right", "--device", "cpu"]
    argv = [sys.executable, str(ROOT / "sample.py"), *flags]
    done = subprocess.run(argv, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint: {sample.INCLUDED}" in done.stderr and "red circle" in done.stdout
    assert (tmp_path / "joint.gif").is_file()
    (tmp_path / "runs" / "toy" / "refine").mkdir(parents=True)
    done = subprocess.run(argv, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode != 0 and "checkpoint runs/toy/refine has no model" in done.stderr


@pytest.mark.parametrize("folder", [sample.INCLUDED, PAIRS], ids=lambda folder: folder.name)
def test_it_is_small_and_names_no_machine(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.2e6
    assert f'"out": "runs/{folder.name}"' in (folder / "train.json").read_text()
