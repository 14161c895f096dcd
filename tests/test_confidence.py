"""toy.confidence: what it counts, and that it runs in both worlds."""

import json

import conftest
import pytest
import torch

import train
from toy import World, confidence
from toy.pairs_world import World as Pairs

TINY = (
    "--dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --batch 4 "
    "--generator-steps 1 --recall-steps 1 --refine-steps 1 --eval-clips 0 --compile no "
    "--device cpu --precision fp32"
).split()


def test_auc_is_the_probability_that_a_right_one_scores_higher():
    good = torch.tensor([True, True, False, False])
    assert confidence.auc(torch.tensor([4.0, 3.0, 2.0, 1.0]), good) == 1
    assert confidence.auc(torch.tensor([1.0, 3.0, 2.0, 3.0]), good) == (0 + 0 + 1 + 0.5) / 4
    assert confidence.auc(torch.arange(4.0), torch.ones(4).bool()) is None


def test_parts_go_from_the_least_sure_to_the_surest():
    sure = torch.tensor([0.9, 0.1, 0.5, 0.6, 0.2, 0.8, 0.3, 0.7])
    good = (sure > 0.4)[:, None].expand(-1, 2)
    parts = confidence.reliability(sure, good, good.all(1))
    assert [part["captions"] for part in parts] == [1] * confidence.PARTS
    assert [part["all right"] for part in parts] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_the_kept_caption_is_that_of_the_smallest_loss_of_the_first_n():
    loss = torch.tensor([[5.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0, 1.0]])
    right = torch.zeros(1, 8, 3, dtype=torch.bool)
    right[0, [3, 7]] = True
    found = {"text loss": loss, "confidence": -loss, "right": right}
    kept = confidence.best_of(found, right.all(2))
    assert [kept[n]["all right"] for n in "1248"] == [0, 0, 1, 1]
    assert [kept[n]["any of them right"] for n in "1248"] == [0, 0, 1, 1]


@pytest.mark.parametrize("world", [World(), Pairs(level=2)], ids=["toy", "pairs"])
def test_true_captions_are_right_and_those_of_others_are_not(world):
    data = world.dataset("seen")
    y, clips = data.__getitems__(range(16))["caption"], data.clips(range(16))
    assert confidence.right(world, clips, world.tokenizer.decode(y)).all()
    others = confidence.right(world, clips, world.tokenizer.decode(y.roll(1, 0)))
    assert others.shape[0] == 16 and not others.all(1).any()


@pytest.mark.parametrize("data", [[], ["--data", "pairs", "--level", "2"]], ids=["toy", "pairs"])
def test_it_measures_a_run(data, tmp_path, capsys):
    train.main([*TINY, *data, "--out", str(tmp_path / "run")])
    out = tmp_path / "sure.json"
    confidence.main([str(tmp_path / "run" / "refine"), "--clips", "3", "--out", str(out)])
    found = json.loads(out.read_text())
    assert sum(part["captions"] for part in found["reliability"]) == 3 * 8
    assert [*found["best of"]] == ["1", "2", "4", "8"] and "best of 8" in capsys.readouterr().out
    line = conftest.refusal(capsys, confidence.main, tmp_path / "run" / "generator")
    assert "no toy that has learned text" in line
