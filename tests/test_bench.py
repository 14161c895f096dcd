"""wan.bench measures what it says, and stores what it prints."""

import json

import pytest
import torch

import train
from wan import bench

TINY = (
    "--dim 32 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --prompt-dim 16 "
    "--prompt-len 4 --vocab-size 20 --text-len 4 --latent 16,2,4,4 --repeats 1"
).split()


def test_steps_of_all_contestants_are_timed(tmp_path, capsys):
    pytest.importorskip("diffusers")
    bench.main([*TINY, "--out", str(tmp_path / "b.json")])
    found, printed = json.loads((tmp_path / "b.json").read_text()), capsys.readouterr().out
    assert (
        found["command"] == " ".join(["python -m wan.bench", *TINY])
        and found["video tokens"] == 8
        and found["text tokens"] == 4
    )
    assert set(found["steps"]) == {
        f"{who}, {kind} step"
        for who in ("video", "video + text", "diffusers, video")
        for kind in ("training", "denoising")
    }
    for name, of in found["steps"].items():
        assert of["seconds"] > 0 and f"{of['seconds']:.3f}" in next(
            line for line in printed.splitlines() if line.startswith(name)
        )
    assert (
        found["steps"]["video, training step"]["flops"]
        == 3 * found["steps"]["diffusers, video, denoising step"]["flops"]
    )


def test_a_caption_is_timed_with_the_video_computed_once_and_anew(tmp_path, capsys, monkeypatch):
    def understand(model, z_v, steps, reuse_video):
        for _ in range(0 if reuse_video else 9):
            torch.randn(512, 512) @ torch.randn(512, 512)

    monkeypatch.setattr(bench, "understand", understand)
    bench.main([*TINY, "--understand", "7", "--out", str(tmp_path / "b.json")])
    every, first = json.loads((tmp_path / "b.json").read_text())["understand"].values()
    assert every > first and f"{every / first:.1f} times faster" in capsys.readouterr().out


def test_a_caption_is_not_said_to_be_timed_compiled(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*TINY, "--understand", "7", "--compile"])
    assert stop.value.code == 2 and "--compile" in capsys.readouterr().err


def test_the_toys_speed_is_that_of_its_log(tmp_path, capsys, monkeypatch, one_codec):
    real = train.main
    short = "--generator-steps 2 --batch 4 --log-every 1 --warmup 1 --compile no --device cpu"
    monkeypatch.setattr(bench, "TOY", ("", "--num-heads 2"))
    monkeypatch.setattr(train, "main", lambda argv: real([*argv, *short.split()]))
    bench.main(["--toy", "--out", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())["toy"]
    assert set(found) == {"", "--num-heads 2"} and all(
        of["clips_per_s"] > 0 and of["loss"] > 0 for of in found.values()
    )
    assert f"{found['']['clips_per_s']:.0f} clips/s" in capsys.readouterr().out


def test_the_neighbours_cost_is_told_against_the_rate_alone(monkeypatch, capsys, tmp_path):
    calls = {(1, 0): [400.0], (1, 1): [200.0], (2, 0): [150.0, 170.0]}
    monkeypatch.setattr(bench, "rates", lambda trainings=1, busy=0: calls[trainings, busy])
    bench.main(["--neighbour", "--out", str(tmp_path / "n.json")])
    told = capsys.readouterr().out
    assert "200 clips/s, 50% of alone" in told and "150 + 170 clips/s, 80% of alone" in told
    assert json.loads((tmp_path / "n.json").read_text())["neighbour"]["alone"] == [400.0]


@pytest.mark.slow
def test_trainings_are_timed_beside_a_busy_process(monkeypatch):
    """No bound on the rate: a machine of CI has neighbours of its own."""
    monkeypatch.setattr(bench, "STEPS", "--generator-steps 40 --batch 8 --log-every 10")
    (rate,) = bench.rates(busy=1)
    assert rate > 0


def test_a_training_step_is_the_one_that_train_takes():
    """Without autocast's cache, the gradient clipped, and a step that is not finite left out."""
    p, cached = torch.nn.Parameter(torch.ones(3)), []
    machine = bench.Machine(torch.device("cpu"), True, False, 0, 1)

    def forward():
        cached.append(torch.is_autocast_cache_enabled())
        return (p * scale).sum()

    training, denoising = bench.step_functions(bench.Contestant(forward, [p], 0), machine)
    scale = float("nan")
    training()
    assert torch.equal(p, torch.ones(3))
    scale = 1e6
    norms = []
    p.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad))
    training()
    denoising()
    assert not torch.equal(p, torch.ones(3)) and cached == [False] * 3
    assert norms[0].norm() <= 1.0001  # clipped in place after it was noted
