"""toy/experiments.py: its variants are runs that train.py accepts, its verdicts follow from the numbers, and a call goes on where the last one stopped."""

import json
import signal

import pytest
import torch

import toy
import train
import univigu
from toy import experiments, measures
from toy.experiments import EXPERIMENTS, Budget, Check, arguments, folder, judge, patched
from univigu import Config, UniViGU

pytestmark = pytest.mark.usefixtures("one_codec")

TINY = Budget(generator=2, recall=2, refine=2, clips=4, default=(2, 2, 2), flags="--dim 24 --text-dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 16 --freq-dim 16 --batch 4 "
              "--warmup 1 --compile no --device cpu --precision fp32")
VARIANTS = {(e.name, v.name): v for e in EXPERIMENTS for v in e.variants}


def test_every_variant_is_a_run_that_train_accepts(tmp_path):
    world = toy.World()
    for variant in {v.name: v for v in VARIANTS.values()}.values():
        settings, config, _ = train.parse(arguments(variant, 1, experiments.FULL, tmp_path))
        assert settings.seed == 1 and settings.eval_clips == 0 and settings.out == str(folder(tmp_path, variant, 1))
        assert settings.init == (str(folder(tmp_path, variant.start, 1) / "generator") if variant.start else "")
        with patched(variant), torch.device("meta"):
            model = train.build(config)
        world.check(model.config)


def test_one_name_is_one_variant_and_budgets_are_equal(tmp_path):
    by_name = {}
    for variant in VARIANTS.values():
        assert by_name.setdefault(variant.name, variant) == variant
    assert not by_name.keys() & {e.name for e in EXPERIMENTS}       # both are folders
    for variant in by_name.values():
        settings, *_ = train.parse(arguments(variant, 0, experiments.FULL, tmp_path))
        steps = sum(getattr(settings, f"{stage}_steps") for stage in settings.stages.split(","))
        name = variant.name.split(", ")[0] if variant.name.startswith("whole") else variant.name.rstrip(" 0123456789")
        assert steps == {"generator": 800, "scratch, long": 1200, "default": sum(experiments.FULL.default), "whole": sum(experiments.FULL.default[1:])}.get(name, 400), variant.name


def test_every_check_reads_a_variant_of_its_experiment():
    for experiment in EXPERIMENTS:
        names = {variant.name for variant in experiment.variants}
        for check in experiment.checks:
            for side in (check.more, check.less):
                assert isinstance(side, float) or {key.split(": ")[0] for key in side.split(" + ")} <= names, (experiment.name, check.says)


def test_patches_do_what_they_say():
    config, torch_e = Config(dim=24, ffn_dim=32, text_ffn_dim=32, num_layers=1, text_dim=24), torch.arange(6)[None]
    of = {name: v for (_, name), v in VARIANTS.items()}
    with patched(of["shared FFN"]):
        model = train.build(config)
        assert model.blocks[0].ffn_t is model.blocks[0].ffn and not any("ffn_t" in name for name in model.state_dict())
    with patched(of["frozen"]):
        assert not train.build(config).embed(torch_e).requires_grad
    with patched(of["centred"]):
        E = train.build(config).embedding_matrix()
        assert E.square().mean(1).allclose(torch.ones(len(E)), atol=1e-4) and E.mean(0).abs().max() < 0.1
    with patched(of["patch"]):
        model = train.build(config)
        model.start_text()
        z = torch.randn(1, 24)
        assert model.text_in(z).allclose(model.patch_embedding(z[..., None, None, None]).flatten(1), atol=1e-5)
    with patched(of["fixed target"]):
        z_t, u_t = train.build(config).text_flow.corrupt(train.build(config), torch_e, torch.full((1,), 0.5))
        assert z_t.requires_grad and not u_t.requires_grad
    with patched(of["256 clips"]):
        assert list(toy.World().dataset("train").batch(3, 128))[:2] == [128, 129]
    with patched(of["one clock"]):
        mixture = train.uni_flow_loss.keywords["mixture"]
        tau_v, tau_t, on_v, on_t, keep = univigu.sample_clocks("mixture", 1000, 4.0, 0.5, mixture=mixture)
        assert torch.equal(tau_t, univigu.warp(tau_v, 4.0)) and on_v.all() and on_t.all() and 400 < keep.sum() < 600
    with patched(of["p 1"]):
        mixture = train.uni_flow_loss.keywords["mixture"]
        assert not univigu.sample_clocks("mixture", 1000, 4.0, 1.0, mixture=mixture)[-1].any()
    assert univigu.MIXTURE["generate"][1] == 0.1 and type(train.build(config)) is UniViGU    # and all of it is undone
    assert train.uni_flow_loss is univigu.uni_flow_loss


def test_verdicts_follow_from_the_numbers():
    seeds = [{"a": {"x": 0.9 + noise}, "b": {"x": 0.5}} for noise in (-0.1, 0.0, 0.1)]
    better, worse = Check("better", "a: x", "b: x"), Check("worse", "b: x", "a: x")
    assert judge([better], seeds)[0] == "supported" and judge([worse], seeds)[0] == "not supported" and judge([better, worse], seeds)[0] == "mixed"
    assert judge([better, Check("worse", "b: x", "a: x", ours=True)], seeds)[0] == "supported"
    assert judge([Check("by less than the spread", "a: x", "b: x", above=0.35)], seeds)[0] == "not supported"
    (told,) = judge([better], seeds)[1]
    assert told["gain"] == [0.3, 0.4, 0.5] and told["mean"] == 0.4 and told["spread"] == 0.1


@pytest.mark.parametrize("argv, word", [(["warp-drive"], "warp-drive"), (["recall", "--seeds", "x"], "x")])
def test_what_is_unknown_is_refused_in_one_line(argv, word, tmp_path):
    with pytest.raises(SystemExit) as stop:
        experiments.main([*argv, "--out", str(tmp_path)])
    assert word in stop.value.code and len(stop.value.code.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_two_experiments_end_to_end_and_a_second_call_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "QUICK", TINY)
    argv = ["experts", "survival", "--quick", "--out", str(tmp_path)]
    experiments.main(argv)
    for name in ("experts", "survival"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["verdict"] in ("supported", "mixed", "not supported") and results["seeds"] == [0]
        assert results["mean and spread"]["base"]["drawn"] == [results["each seed"][0]["base"]["drawn"], 0.0]
        assert 0 < (tmp_path / name / "figure.png").stat().st_size < 60_000
    assert {p.parent.name for p in tmp_path.glob("*/seed0")} == {"generator", "base", "shared FFN", "narrow FFN_t", "no video loss"}
    told = capsys.readouterr().out
    assert told.count("training ") == 5

    monkeypatch.setattr(train, "run_stage", lambda *args: pytest.fail("it trained again"))
    experiments.main(argv)
    assert "training " not in capsys.readouterr().out
    for name in ("measured.json", "metrics.jsonl"):
        (tmp_path / "base" / "seed0" / name).write_text("")
        with pytest.raises(SystemExit, match=rf"^toy.experiments: error: .*base/seed0/{name}"):
            experiments.main(argv)
        (tmp_path / "base" / "seed0" / "measured.json").unlink(missing_ok=True)


def test_sigterm_ends_it_and_a_second_call_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "QUICK", TINY)
    real, argv = train.run_stage, ["recall", "--quick", "--out", str(tmp_path)]

    def terminated(stage, *args):
        if stage == "refine":
            signal.raise_signal(signal.SIGTERM)
        return real(stage, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="same command goes on"):
        patch.setattr(train, "run_stage", terminated)
        experiments.main(argv)
    assert {p.name for p in tmp_path.iterdir()} == {"generator", "base"} and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    experiments.main(argv)
    assert (tmp_path / "recall" / "results.json").exists() and capsys.readouterr().out.count("training base") == 2


@pytest.mark.slow
def test_all_experiments_end_to_end_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "QUICK", TINY)
    monkeypatch.setattr(measures, "STEPS", (1, 8, 16, 64))
    real, argv = train.run_stage, ["--quick", "--seeds", "3", "--out", str(tmp_path)]

    def stops_before_refine(stage, *args):
        if stage == "refine":
            raise KeyboardInterrupt
        return real(stage, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "run_stage", stops_before_refine)
        experiments.main(argv)
    assert (tmp_path / "base" / "seed3" / "recall").exists() and not (tmp_path / "base" / "seed3" / "refine").exists()
    experiments.main(argv)
    assert {p.parent.name for p in tmp_path.glob("*/results.json")} == {p.parent.name for p in tmp_path.glob("*/figure.png")} == {e.name for e in EXPERIMENTS}
