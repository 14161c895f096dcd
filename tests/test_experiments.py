"""toy/experiments.py: its variants are runs that train.py accepts, its verdicts follow from the
numbers, and a call goes on where the last one stopped.
"""

import json
import shutil
import signal

import pytest
import torch

import toy
import train
import univigu
from toy import experiments, measures, words
from toy.experiments import EXPERIMENTS, Budget, Check, judge
from toy.runs import FULL, Run, arguments, run_folder
from univigu import Config, UniViGU

pytestmark = pytest.mark.usefixtures("one_codec")

TINY = Budget(
    generator=2,
    recall=2,
    refine=2,
    clips=4,
    default=(2, 2, 2),
    flags="--dim 24 --text-dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 "
    "--freq-dim 16 --batch 4 --warmup 1 --compile no --device cpu --precision fp32",
)
VARIANTS = {(e.name, v.name): v for e in EXPERIMENTS for v in e.variants}
OF = {variant.name: variant for variant in VARIANTS.values()}


def parsed(variant, seed, out):
    """The flags of a variant's run as train.py reads them: all options by name, and the config."""
    options, run, config, _ = train.parse(arguments(variant, seed, FULL, out))
    return vars(options) | vars(run), config


def test_every_variant_is_a_run_that_train_accepts(tmp_path):
    world = toy.World()
    for variant in OF.values():
        options, config = parsed(variant, 1, tmp_path)
        assert options["seed"] == 1 and options["eval_clips"] == 0
        assert options["out"] == str(run_folder(tmp_path, variant, 1))
        start = variant.start and str(run_folder(tmp_path, variant.start, 1) / "generator")
        assert options["init"] == (start or "")
        with torch.device("meta"):
            model = variant.make_model(config)
        world.check(model.config)


def test_one_name_is_one_variant_and_budgets_are_equal(tmp_path):
    by_name = {}
    for variant in VARIANTS.values():
        assert by_name.setdefault(variant.name, variant) == variant
    assert not by_name.keys() & {e.name for e in EXPERIMENTS}  # both are folders
    wanted = {
        "generator": 800,
        "scratch, long": 1200,
        "default": sum(FULL.default),
        "whole": sum(FULL.default[1:]),
    }
    for variant in by_name.values():
        options, _ = parsed(variant, 0, tmp_path)
        steps = sum(options[f"{stage}_steps"] for stage in options["stages"].split(","))
        name = variant.name.rstrip(" 0123456789.")
        if name.startswith("whole"):
            name = "whole"
        assert steps == wanted.get(name, 400), variant.name


def test_every_check_reads_a_variant_of_its_experiment():
    for experiment in EXPERIMENTS:
        names = {variant.name for variant in experiment.variants}
        for check in experiment.checks:
            for side in (check.more, check.less):
                if not isinstance(side, float):
                    read = {key.split(": ")[0] for key in side.split(" + ")}
                    assert read <= names, (experiment.name, check.says)


def test_models_of_variants_are_what_they_say():
    config = Config(dim=24, ffn_dim=32, text_ffn_dim=32, num_layers=1, text_dim=24)
    y = torch.arange(6)[None]

    model = OF["shared FFN"].make_model(config)
    assert model.blocks[0].ffn_t is model.blocks[0].ffn
    assert not any("ffn_t" in name for name in model.state_dict())

    assert not OF["frozen"].make_model(config).embed(y).requires_grad

    E = OF["centred"].make_model(config).embedding_matrix()
    assert E.square().mean(1).allclose(torch.ones(len(E)), atol=1e-4)
    assert E.mean(0).abs().max() < 0.1

    model = OF["patch"].make_model(config)
    model.start_text()
    z = torch.randn(1, 24)
    patch = model.patch_embedding(z[..., None, None, None]).flatten(1)
    assert model.text_in(z).allclose(patch, atol=1e-5)

    model = OF["fixed target"].make_model(config)
    z_t, u_t = model.text_flow.corrupt(model, y, torch.full((1,), 0.5))
    assert z_t.requires_grad and not u_t.requires_grad
    z_t, u_t = UniViGU.text_flow.corrupt(UniViGU(config), y, torch.full((1,), 0.5))
    assert u_t.requires_grad  # and the model of all other variants is as it was


def test_padding_is_out_of_the_loss_or_out_of_sight():
    config = Config(dim=24, ffn_dim=32, text_ffn_dim=32, num_layers=2, num_heads=2, gate_init=1.0)
    batch = toy.World().dataset("train").__getitems__(range(2))
    y, half = batch["prompt"], torch.full((2,), 0.5)
    pad = y == words.PAD
    assert pad.any() and not pad.all()
    for name in ("PAD without loss", "PAD unseen"):
        torch.manual_seed(0)
        model = OF[name].make_model(config)
        for head in (model.head.head, model.head_t.head):
            torch.nn.init.normal_(head.weight)
        z_t, u_t = torch.randn(2, 2, 16, 64)
        v_t, other = torch.randn(2, 2, 16, 64)
        kept = torch.where(pad[..., None], other, v_t)  # differs from v_t in PAD positions alone
        flow = model.text_flow
        losses = [flow.loss(model, v, z_t, u_t, y, half, 0.1) for v in (v_t, kept, other)]
        assert all(torch.equal(a, b) for a, b in zip(losses[0], losses[1]))
        assert not torch.equal(losses[0][0], losses[2][0])

        moved = torch.where(pad[..., None], z_t + 1, z_t)

        def apart(model=model, states=(z_t, moved)):
            with torch.no_grad():
                found = [model(batch["z_v"], z, half, half, batch["c"]) for z in states]
            (v_v, v_t), (other_v, other_t) = found
            return max((v_v - other_v).abs().max(), (v_t - other_t)[~pad].abs().max())

        assert apart() > 1e-4
        if name == "PAD unseen":
            model.hide(pad)
            assert apart() < 1e-5
            model.hide(None)
            assert apart() > 1e-4


def test_losses_and_data_of_variants_are_what_they_say():
    dataset = OF["256 clips"].make_world("toy", 0, None).dataset("train")
    assert list(dataset.batch(3, 128)) == [*range(128, 256)]
    assert list(dataset.batch(1, 192)) == [*range(192, 256), *range(128)]

    mixture = OF["one clock"].loss.keywords["mixture"]
    tau_v, tau_t, loss_mask_v, loss_mask_t, keep = univigu.sample_clocks(
        "mixture", 1000, 4.0, 0.5, mixture=mixture, joint_shift=0.5
    )
    assert torch.equal(tau_t, univigu.warp(tau_v, 0.5))
    assert loss_mask_v.all() and loss_mask_t.all() and 400 < keep.sum() < 600

    mixture = OF["p 0.9"].loss.keywords["mixture"]
    clocks = univigu.sample_clocks("mixture", 1000, 4.0, 1.0, mixture=mixture)
    assert not clocks[-1].any()
    assert univigu.MIXTURE["generate"][1] == 0.1
    assert OF["no video loss"].loss.keywords == {"lambda_v": 0.0}


def test_verdicts_follow_from_the_numbers():
    seeds = [{"a": {"x": 0.9 + noise}, "b": {"x": 0.5}} for noise in (-0.1, 0.0, 0.1)]
    better, worse = Check("better", "a: x", "b: x"), Check("worse", "b: x", "a: x")
    assert judge([better], seeds)[0] == "supported"
    assert judge([worse], seeds)[0] == "not supported"
    assert judge([better, worse], seeds)[0] == "mixed"
    assert judge([better, Check("worse", "b: x", "a: x", ours=True)], seeds)[0] == "supported"
    narrow = Check("by less than the spread", "a: x", "b: x", above=0.35)
    assert judge([narrow], seeds)[0] == "not supported"
    (told,) = judge([better], seeds)[1]
    assert told["gain"] == [0.3, 0.4, 0.5] and told["mean"] == 0.4 and told["spread"] == 0.1
    del seeds[0]["b"], seeds[1]["a"]
    assert judge([better], seeds)[1][0]["gain"] == [0.5]
    assert judge([better], seeds[:2]) == ("not decided", [])


@pytest.mark.parametrize(
    "argv, word", [(["warp-drive"], "warp-drive"), (["recall", "--seeds", "x"], "x")]
)
def test_what_is_unknown_is_refused_in_one_line(argv, word, tmp_path):
    with pytest.raises(SystemExit) as stop:
        experiments.main([*argv, "--out", str(tmp_path)])
    assert word in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_two_experiments_end_to_end_and_a_second_call_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(experiments.WORLDS, "toy", (EXPERIMENTS, FULL, TINY))
    argv = ["experts", "survival", "--quick", "--out", str(tmp_path)]
    experiments.main(argv)
    for name in ("experts", "survival"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["verdict"] in ("supported", "mixed", "not supported")
        assert results["seeds"] == [0]
        drawn = results["each seed"][0]["base"]["drawn"]
        assert results["mean and spread"]["base"]["drawn"] == [drawn, 0.0]
        assert 0 < (tmp_path / name / "figure.png").stat().st_size < 60_000
    variants = {p.parent.name for p in tmp_path.glob("*/seed0")}
    assert variants == {
        "generator",
        "base",
        "shared FFN",
        "FFN_t an eighth",
        "FFN_t half",
        "copied FFN_t",
        "no video loss",
    }
    assert results["variants"]["no video loss"]["arguments"] == {
        "loss": "uni_flow_loss(lambda_v=0.0)"
    }
    assert capsys.readouterr().out.count("training ") == 7

    monkeypatch.setattr(train, "main", lambda *args, **kwargs: pytest.fail("it trained again"))
    experiments.main(argv)
    assert "training " not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "no video loss")
    experiments.main(["survival", "--quick", "--finished", "--out", str(tmp_path)])
    left = json.loads((tmp_path / "survival" / "results.json").read_text())
    assert results["not trained"] == [] and left["not trained"] == ["no video loss"]
    assert left["checks"] == [c for c in results["checks"] if "no video loss" not in c["less"]]
    with pytest.raises(SystemExit, match="no finished run of experiment recall"):
        experiments.main(["recall", "--finished", "--out", str(tmp_path / "empty")])
    figure = tmp_path / "experts" / "figure.png"
    drawn = figure.read_bytes()
    figure.unlink()
    experiments.main(["experts", "--figures", "--out", str(tmp_path)])
    assert figure.read_bytes() == drawn
    with pytest.raises(SystemExit, match="recall/results.json"):
        experiments.main(["recall", "--figures", "--out", str(tmp_path)])
    for name in ("measured.json", "metrics.jsonl"):
        (tmp_path / "base" / "seed0" / name).write_text("")
        with pytest.raises(SystemExit, match=rf"^toy.experiments: error: .*base/seed0/{name}"):
            experiments.main(argv)
        (tmp_path / "base" / "seed0" / "measured.json").unlink(missing_ok=True)


@pytest.fixture
def at_refine(monkeypatch):
    """Has a function called in the first batch of refine, by way of the loss that train.py uses."""
    real = train.main

    def install(patch, interrupt):
        def main(argv, loss=univigu.uni_flow_loss, **arguments):
            seen = []

            def interrupted(model, z_v1, y, c, **options):
                # captions are longer than prompts: refine's targets have a token at position 9
                if y is not None and (y[:, 9] > 0).any() and not seen:
                    seen.append(True)
                    interrupt()
                return loss(model, z_v1, y, c, **options)

            return real(argv, loss=interrupted, **arguments)

        patch.setattr(train, "main", main)

    return install


def test_sigterm_ends_it_and_a_second_call_goes_on(tmp_path, monkeypatch, capsys, at_refine):
    monkeypatch.setitem(experiments.WORLDS, "toy", (EXPERIMENTS, FULL, TINY))
    argv = ["recall", "--quick", "--out", str(tmp_path)]
    handler = signal.getsignal(signal.SIGTERM)
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="same command goes on"),
    ):
        at_refine(patch, lambda: signal.raise_signal(signal.SIGTERM))
        experiments.main(argv)
    assert {p.name for p in tmp_path.iterdir()} == {"generator", "base"}
    assert signal.getsignal(signal.SIGTERM) == handler == signal.SIG_DFL
    experiments.main(argv)
    assert (tmp_path / "recall" / "results.json").exists()
    assert capsys.readouterr().out.count("training base") == 2


def test_coevolution_sees_the_states_that_were_reached(tmp_path):
    """Six points along tau, none at the start; an exchanged stream is the neighbour's."""
    config = Config(
        dim=24, ffn_dim=32, text_ffn_dim=32, num_layers=1, text_dim=24, num_heads=2, freq_dim=16
    )
    run = Run(OF["default"], tmp_path, 4, train.Train(), config)
    run.model = UniViGU(config).eval()
    numbers = measures.coevolution(run, steps=6)
    points = [name for name in numbers if name.startswith("agreement at @ ")]
    assert [float(name.split("@ ")[1]) for name in points] == [0.17, 0.33, 0.5, 0.67, 0.83, 1.0]

    z_v, z_t = torch.randn(3, 2, 1, 1, 1), torch.randn(3, 4, 2)
    before = z_t.clone()
    exchange = measures.exchange("text", 2)
    for k in (0, 1, 3):
        exchange(k, 0.5, 0.5, z_v, z_t, None, None)
    assert torch.equal(z_t, before)
    exchange(2, 0.5, 0.5, z_v, z_t, None, None)
    assert torch.equal(z_t, before.roll(1, 0))


@pytest.mark.slow
def test_all_experiments_end_to_end_and_a_stopped_one_goes_on(tmp_path, monkeypatch, at_refine):
    monkeypatch.setitem(experiments.WORLDS, "toy", (EXPERIMENTS, FULL, TINY))
    monkeypatch.setattr(measures, "STEPS", (1, 8, 16, 64))
    argv = ["--quick", "--seeds", "3", "--out", str(tmp_path)]

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_refine(patch, interrupt)
        experiments.main(argv)
    assert (tmp_path / "base" / "seed3" / "recall").exists()
    assert not (tmp_path / "base" / "seed3" / "refine").exists()
    experiments.main(argv)
    names = {e.name for e in EXPERIMENTS}
    for file in ("results.json", "figure.png"):
        assert {p.parent.name for p in tmp_path.glob(f"*/{file}")} == names
