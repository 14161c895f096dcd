"""train.py: a run can be stopped anywhere and goes on bit for bit.

Its stages, optimizers, figures and refusals are as documented.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import refusal
from safetensors.torch import load_file

import toy.evaluate
import train
from engine import checkpoint, files, metrics
from engine.checkpoint import Average, checkpoints
from engine.metrics import Meter
from engine.optim import Muon, orthogonalise
from engine.options import Run
from engine.world import Evaluation
from toy import World, judge
from train import RECIPES, STAGES, Train, make_optimizers, schedule
from univigu import PRESETS, Config, UniViGU, joint, uni_flow_loss
from wan.published import PublishedConfig

pytestmark = pytest.mark.usefixtures("one_codec")

ROOT = Path(train.__file__).parent
SIZES = "--num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --text-dim 8 --freq-dim 16"
MODEL = ["--dim", "24", *SIZES.split()]
TINY = [
    *MODEL,
    *(
        "--batch 4 --generator-steps 5 --recall-steps 4 --refine-steps 5 --warmup 2 --log-every 3 "
        "--save-every 4 --keep 1 "
        "--eval-clips 0 --compile no --device cpu --precision fp32"
    ).split(),
]
STEPS = 5 + 4 + 5
TIMINGS = {"samples_per_s", "tokens_per_s", "data_wait", "eta_s", "wall_s"}


def optimizer_flags(kind):
    kinds = [word for stage in STAGES for word in (f"--{stage}-optimizer", kind)]
    return [*kinds, "--recall-muon-decay", ".1", "--refine-muon-decay", ".1"]


def run(out, *flags, **changes):
    train.main([*TINY, "--out", str(out), *flags], **changes)


def figures(out):
    """The lines of metrics.jsonl without what the clock on the wall decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def contents(folder):
    """Every file below a folder: path -> bytes; {} where there is no folder."""
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def assert_same_run(out, reference):
    assert figures(out) == figures(reference)
    for stage in STAGES:
        assert weights(out / stage) == weights(reference / stage), stage


class Killed(BaseException):
    """Stands for SIGKILL: nothing in train.py catches it."""


def at_step(step, act):
    """uni_flow_loss, but act(loss) in global step `step` of a run of seed 0; act may raise."""

    def loss_at(*args, generator, **kwargs):
        loss, parts = uni_flow_loss(*args, generator=generator, **kwargs)
        return (act(loss) if generator.initial_seed() == step else loss), parts

    return loss_at


def killed_at(step, out, *flags):
    """A run of seed 0 that is stopped in the middle of global step `step`."""

    def die(_):
        raise Killed

    with pytest.raises(Killed):
        run(out, *flags, loss=at_step(step, die))


def refused(capsys, *argv, **changes):
    """The line with which train.py refuses these flags."""
    capsys.readouterr()
    text = refusal(capsys, partial(train.main, **changes), *argv)
    assert text.startswith("train.py: error: "), text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run for each optimizer."""
    outs = {kind: tmp_path_factory.mktemp(kind) / "run" for kind in ("muon", "adam")}
    for kind, out in outs.items():
        run(out, *optimizer_flags(kind))
    return outs


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "kind, step, starts",
    [
        pytest.param("muon", 4, [1], id="generator, mid log window"),
        pytest.param("muon", 5, [0], id="generator's end"),
        pytest.param("muon", 7, [0], id="recall, before its checkpoint"),
        pytest.param("muon", 8, [], id="recall, mid log window"),
        pytest.param("muon", 9, [], id="recall's end"),
        pytest.param("muon", 13, [], id="refine"),
        pytest.param("adam", 4, [1], id="generator, adam"),
        pytest.param("adam", 8, [], id="recall, adam"),
        pytest.param("adam", 13, [], id="refine, adam"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(kind, step, starts, whole, tmp_path, monkeypatch):
    killed_at(step, tmp_path, *optimizer_flags(kind))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "stage": "reca')  # a line that the kill cut
    _, text_starts = spied(
        monkeypatch, tmp_path, "--resume", "--save-every", "4", *optimizer_flags(kind)
    )
    assert_same_run(tmp_path, whole[kind])
    assert text_starts == starts  # losses of the resumed run before the text stream starts


def test_a_run_stopped_twice_goes_on_bit_for_bit(whole, tmp_path):
    killed_at(4, tmp_path, *optimizer_flags("muon"))
    killed_at(11, tmp_path, *optimizer_flags("muon"), "--resume")
    run(tmp_path, "--resume")
    assert_same_run(tmp_path, whole["muon"])


def test_resuming_a_finished_run_changes_nothing_it_learned(whole, tmp_path):
    out = shutil.copytree(whole["adam"], tmp_path / "run")
    before = contents(out)
    run(out, "--resume")
    assert contents(out) == before


def test_resume_needs_no_flag_but_out(whole, tmp_path):
    killed_at(7, tmp_path, *optimizer_flags("adam"))
    train.main(["--resume", "--out", str(tmp_path), "--device", "cpu"])
    assert_same_run(tmp_path, whole["adam"])


SLOWLY = """
import time, train
loss = train.uni_flow_loss
train.main(loss=lambda *args, **kwargs: time.sleep(0.05) or loss(*args, **kwargs))
"""


def test_a_killed_process_leaves_a_run_that_goes_on_bit_for_bit(whole, tmp_path):
    metrics, begin = tmp_path / "metrics.jsonl", time.time()
    command = [
        sys.executable,
        "-c",
        SLOWLY,
        *TINY,
        *optimizer_flags("muon"),
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        while (
            child.poll() is None
            and time.time() - begin < 300
            and not (metrics.exists() and metrics.read_text().count("\n") >= 3)
        ):
            time.sleep(0.003)
        child.kill()
    assert child.returncode == -signal.SIGKILL and len(figures(tmp_path)) < len(
        figures(whole["muon"])
    )
    run(tmp_path, "--resume")
    assert_same_run(tmp_path, whole["muon"])


def kill(patch):
    """Ends a run as SIGKILL does: nothing is cleaned up."""
    patch.setattr(files, "remove", lambda path: None)
    raise Killed


def cut_weights(patch, count):
    real = checkpoint.save_file

    def save(tensors, path, metadata):
        real(tensors, path, metadata)
        if next(count) == 2:
            path.write_bytes(path.read_bytes()[:100])
            kill(patch)

    patch.setattr(checkpoint, "save_file", save)


def cut_state(patch, count):
    real = torch.save

    def save(state, path):
        if next(count) == 2:
            Path(path).write_bytes(b"PK")
            kill(patch)
        real(state, path)

    patch.setattr(torch, "save", save)


def cut_rename(patch, count):
    real = Path.replace

    def replace(self, target):
        if self.is_dir() and next(count) == 2:
            kill(patch)
        return real(self, target)

    patch.setattr(Path, "replace", replace)


@pytest.mark.parametrize(
    "cut",
    [cut_weights, cut_state, cut_rename],
    ids=["in the weights", "in the optimizer's state", "before the rename"],
)
def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(cut, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        cut(patch, iter(range(100)))  # saves are at steps 4, 5 and 8: the third one is cut
        run(tmp_path, *optimizer_flags("muon"))
    assert (tmp_path / ".part-step-000008").exists() and not (tmp_path / "step-000008").exists()
    assert [(step, folder.name) for step, folder in checkpoints(tmp_path)] == [
        (4, "step-000004"),
        (5, "generator"),
    ]
    UniViGU.from_pretrained(tmp_path / "generator", strict=True)
    run(tmp_path, "--resume")
    assert_same_run(tmp_path, whole["muon"])
    assert not list(tmp_path.glob(".*"))


def test_old_checkpoints_go_and_those_of_stage_ends_stay(whole, tmp_path):
    assert {f.name for f in whole["muon"].iterdir() if f.is_dir()} == {
        "generator",
        "recall",
        "refine",
        "step-000012",
    }
    run(tmp_path, "--keep", "2")
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {
        "generator",
        "recall",
        "refine",
        "step-000008",
        "step-000012",
    }


def test_resume_accepts_what_does_not_change_the_result(whole, tmp_path):
    killed_at(7, tmp_path, *optimizer_flags("muon"))
    run(tmp_path, "--resume", "--save-every", "2", "--keep", "2")
    assert_same_run(tmp_path, whole["muon"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batch", "8"], ("batch", "8", "4")),
        (["--dim", "36"], ("dim", "36", "24")),
        (["--stages", "recall"], ("stages", "recall", "generator,recall,refine")),
        (["--patch-size", "1,2,2"], ("patch-size", "(1, 2, 2)", "1, 1, 1")),
        (["--overwrite"], ("--overwrite", "--resume")),
    ],
)
def test_resume_refuses_a_flag_that_contradicts_the_run(flags, words, whole, capsys):
    before = contents(whole["muon"])
    text = refused(capsys, "--resume", "--out", whole["muon"], *flags)
    assert all(word in text for word in words), text
    assert contents(whole["muon"]) == before


def test_resume_without_a_run_is_refused(tmp_path, capsys):
    assert str(tmp_path / "none") in refused(capsys, "--resume", "--out", tmp_path / "none")
    killed_at(1, tmp_path / "young")  # before the first checkpoint
    assert "no checkpoint" in refused(capsys, "--resume", "--out", tmp_path / "young")
    run(tmp_path / "young", "--stages", "generator")  # nothing to protect: starts anew unasked


# ---------------------------------------------------------------- the stages


def spied(monkeypatch, out, *flags):
    """Runs. Returns (args, kwargs) of every loss, and before which of them the text started."""
    calls, starts, start = [], [], UniViGU.start_text

    def loss(*args, **kwargs):
        calls.append((args, kwargs))
        return uni_flow_loss(*args, **kwargs)

    def start_text(self):
        starts.append(len(calls))
        start(self)

    monkeypatch.setattr(UniViGU, "start_text", start_text)
    run(out, "--save-every", "1000", *flags, loss=loss)
    return calls, starts


def test_stages_differ_in_the_target_text_and_steps_in_their_clips_and_noise(monkeypatch, tmp_path):
    calls, _ = spied(
        monkeypatch, tmp_path, "--seed", "3", "--recall-p-drop", "0.6", "--refine-p-drop", "0.2"
    )
    assert len(calls) == STEPS
    for step, ((_, z_v, y, c), kwargs) in enumerate(calls):
        batch = World(3).dataset("train").__getitems__(range(4 * step, 4 * step + 4))
        assert torch.equal(z_v, batch["z_v"]) and torch.equal(c, batch["c"])
        if step < 5:
            assert y is None and kwargs["p_drop"] == 0.1
        else:
            target, p_drop = ("prompt", 0.6) if step < 9 else ("caption", 0.2)
            assert torch.equal(y, batch[target]) and kwargs["p_drop"] == p_drop
    assert len({kwargs["generator"].initial_seed() for _, kwargs in calls}) == STEPS


def test_the_generator_leaves_the_text_stream_alone(whole):
    stored = json.loads((whole["muon"] / "generator" / "train.json").read_text())
    config = UniViGU.from_pretrained(whole["muon"] / "generator").config
    torch.manual_seed(stored["train"]["seed"])
    first = UniViGU(config).state_dict()
    for kind in whole:
        for stage, text_changes in (("generator", False), ("recall", True)):
            tensors = load_file(whole[kind] / stage / "model.safetensors")
            changed = {
                UniViGU.is_text(name): not torch.equal(tensor, first[name])
                for name, tensor in tensors.items()
            }
            assert changed == {False: True, True: text_changes}


@pytest.mark.parametrize(
    "case, flags, wanted",
    [
        ("a whole run", [], [5]),
        ("from a generator", ["--init", "/generator", "--stages", "recall,refine"], [0]),
        ("from weights of unknown origin", ["--init", "/foreign", "--stages", "recall"], [0]),
        ("from a model with text", ["--init", "/recall", "--stages", "refine"], []),
        (
            "a generator made from one with text",
            ["--init", "/recall", "--stages", "generator,refine"],
            [5],
        ),
    ],
)
def test_the_text_stream_starts_once_from_the_generator(
    case, flags, wanted, whole, tmp_path, monkeypatch
):
    source = shutil.copytree(whole["muon"], tmp_path / "source")
    shutil.copytree(source / "generator", source / "foreign")
    (source / "foreign" / "train.json").unlink()
    flags = [str(source) + word if word.startswith("/") else word for word in flags]
    assert spied(monkeypatch, tmp_path / "out", *flags)[1] == wanted


@pytest.mark.parametrize("stages, has_text", [("generator", False), ("recall", True)])
def test_the_evaluation_knows_whether_there_is_text(stages, has_text, tmp_path, monkeypatch):
    calls = []

    def evaluate(self, model, out, clips, elapsed, has_text, share):
        calls.append((clips, has_text, model.training))
        return Evaluation({})

    monkeypatch.setattr(World, "evaluate", evaluate)
    run(tmp_path, "--stages", stages, "--eval-clips", "7")
    assert calls == [(7, has_text, False)]


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stage", [*STAGES, "step-000012"])
def test_a_checkpoint_holds_the_model_and_the_resolved_configuration(stage, whole):
    folder = whole["adam"] / stage
    flags = [*TINY, "--out", str(whole["adam"]), *optimizer_flags("adam")]
    recipe, machine, config, _ = train.parse(flags)
    model = UniViGU.from_pretrained(folder, strict=True)
    assert model.config == config
    assert all(
        torch.equal(p, load_file(folder / "model.safetensors")[name])
        for name, p in model.state_dict().items()
    )
    stored = json.loads((folder / "train.json").read_text())
    assert stored["train"] == dataclasses.asdict(recipe) | dataclasses.asdict(machine)
    assert (stored["step"], stored["stage"]) == {
        "generator": (5, "generator"),
        "recall": (9, "recall"),
        "refine": (14, "refine"),
        "step-000012": (12, "refine"),
    }[stage]
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )


def test_init_starts_from_the_weights_of_a_checkpoint(whole, tmp_path):
    run(
        tmp_path,
        "--init",
        str(whole["muon"] / "refine"),
        "--stages",
        "refine",
        "--refine-lr",
        "0",
        "--adam-lr",
        "0",
        "--refine-steps",
        "1",
    )
    assert weights(tmp_path / "refine") == weights(whole["muon"] / "refine")


def test_init_may_lie_in_the_run_that_overwrite_replaces(whole, tmp_path):
    out = shutil.copytree(whole["muon"], tmp_path / "run")
    run(out, "--init", str(out / "generator"), "--stages", "recall", "--overwrite")
    assert {f.name for f in out.iterdir() if f.is_dir()} == {"recall"}


def test_an_existing_run_is_refused_and_intact(whole, capsys):
    before = contents(whole["muon"])
    text = refused(capsys, *TINY, "--out", whole["muon"])
    assert (
        str(whole["muon"]) in text
        and "step 14" in text
        and "--resume" in text
        and "--overwrite" in text
    )
    assert contents(whole["muon"]) == before


def test_overwrite_starts_anew(whole, tmp_path):
    out = shutil.copytree(whole["adam"], tmp_path / "run")
    run(out, "--overwrite", *optimizer_flags("muon"))
    assert_same_run(out, whole["muon"])


# ---------------------------------------------------------------- optimizers and figures


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_muon_is_that_of_torch_up_to_bf16(decay):
    torch.manual_seed(0)
    shapes = (8, 8), (24, 6), (6, 24), (8, 8), (24, 6)
    start = [torch.randn(*shape) for shape in shapes]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=decay),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=decay),
    )
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.03 * (b - p).norm()


def test_a_step_that_muon_leaves_out_changes_and_decays_nothing():
    p = torch.ones(4, 4, requires_grad=True)
    optimizer = Muon([p], lr=0.1, weight_decay=0.5)
    for found_inf, grad, changes in ((1.0, math.nan, False), (0.0, 1.0, True)):
        optimizer.found_inf, p.grad = torch.tensor(found_inf), torch.full_like(p, grad)
        optimizer.step()
        assert torch.equal(p, torch.ones(4, 4)) is not changes and p.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_orthogonalise_is_its_polynomial_on_the_singular_values(shape):
    torch.manual_seed(1)
    g = torch.randn(3, *shape, dtype=torch.float64)
    a, b, c = coefficients = torch.optim.Muon([torch.zeros(2, 2)]).defaults["ns_coefficients"]
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalise(g, coefficients, 5), u @ torch.diag_embed(s) @ vh)
    assert 0.6 < s.min() and s.max() < 1.3  # nearly orthogonal


@pytest.mark.parametrize("kind", ["muon", "adam"])
def test_every_parameter_has_one_optimizer(kind):
    model = UniViGU(train.parse(MODEL)[2])
    optimizers = make_optimizers(model, kind, lr=0.5, adam_lr=0.25)
    groups = [group for o in optimizers for group in o.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(names) == sorted(id(p) for group in groups for p in group["params"])
    if kind == "adam":
        assert [group["peak"] for group in groups] == [0.5]
        return
    (adam, muon), (of_adam, of_muon) = groups, optimizers
    assert (
        isinstance(of_adam, torch.optim.Adam)
        and isinstance(of_muon, Muon)
        and (adam["peak"], muon["peak"]) == (0.25, 0.5)
    )
    assert adam["betas"] == (0.9, 0.95)
    of_muon = {names[id(p)] for p in muon["params"]}
    assert of_muon == {
        name
        for name in names.values()
        if name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
    }


@pytest.mark.parametrize(
    "steps, warmup, decay, shares",
    [
        (8, 4, 0.5, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        (4, 0, 1.0, [1, 0.75, 0.5, 0.25]),
        (4, 2, 0.0, [0.5, 1, 1, 1]),
        (6, 4, 1.0, [0.25, 0.5, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),  # rise and fall meet
    ],
)
def test_the_learning_rate_rises_stays_and_falls(steps, warmup, decay, shares):
    assert [schedule(step, steps, warmup, decay) for step in range(steps)] == pytest.approx(shares)


def test_each_stage_runs_through_its_own_schedule(whole):
    stored = json.loads((whole["adam"] / "refine" / "train.json").read_text())["train"]
    for line in figures(whole["adam"]):
        first, steps = {"generator": (0, 5), "recall": (5, 4), "refine": (9, 5)}[line["stage"]]
        assert line["lr"] == pytest.approx(
            stored[line["stage"] + "_lr"]
            * schedule(line["step"] - 1 - first, steps, 2, stored["decay"])
        )


def test_figures_are_means_over_the_samples_that_counted():
    meter = Meter("cpu")
    meter.add(
        torch.tensor(3.0),
        dict(
            video=torch.tensor([1.0, 2, 4, 8]),
            tau_v=torch.tensor([0.0, 0.05, 0.15, 1]),
            loss_mask_v=torch.tensor([1.0, 1, 1, 0]),
            text=torch.tensor([10.0, 20, 30, 40]),
            tau_t=torch.tensor([1.0, 0.95, 0.55, 0.5]),
            loss_mask_t=torch.tensor([0.0, 1, 1, 1]),
        ),
    )
    meter.add(
        torch.tensor(5.0),
        dict(
            video=torch.tensor([6.0, 7]),
            tau_v=torch.tensor([0.19, 0.31]),
            loss_mask_v=torch.tensor([1.0, 1]),
        ),
    )
    assert meter.read() == {
        "loss": 4.0,
        "video": 4.0,
        "video_by_tau": [1.5, 5.0, None, 7.0, None, None, None, None, None, None],
        "text": 30.0,
        "text_by_tau": [None, None, None, None, None, 35.0, None, None, None, 20.0],
    }
    empty = meter.read()
    assert (
        empty.pop("loss") is None
        and empty.pop("video") is None
        and set(empty["video_by_tau"]) == {None}
    )


def test_the_rates_of_a_line_are_of_the_same_steps(whole):
    for line in map(json.loads, (whole["muon"] / "metrics.jsonl").read_text().splitlines()):
        assert line["tokens_per_s"] / line["samples_per_s"] == pytest.approx(
            48 + 16 * (line["stage"] != "generator"), rel=0.01
        )


def test_the_figures_of_a_run_are_its_losses(tmp_path):
    losses = []

    def record(*args, **kwargs):
        loss, parts = uni_flow_loss(*args, **kwargs)
        losses.append(loss.item())
        return loss, parts

    run(tmp_path, loss=record)
    lines, begin = figures(tmp_path), 0
    assert [(line["step"], line["stage"]) for line in lines] == [
        (3, "generator"),
        (5, "generator"),
        (6, "recall"),
        (9, "recall"),
        (12, "refine"),
        (14, "refine"),
    ]
    for line in lines:
        window = losses[begin : line["step"]]
        assert line["loss"] == pytest.approx(sum(window) / len(window), abs=1e-5)
        assert (line["text"] is None) == (line["stage"] == "generator")
        begin = line["step"]


# ---------------------------------------------------------------- flags


def test_recipe_paper_is_the_papers_choices(monkeypatch, tmp_path):
    calls, _ = spied(monkeypatch, tmp_path, "--recipe", "paper")
    config = calls[0][0][0].config
    assert config.text_output == "velocity" and config.text_shift == 1
    text = [
        kwargs for _, kwargs in calls if kwargs["clocks"] != "logit-normal"
    ]  # the generator is not the paper's to choose
    assert text and all(
        kwargs["clocks"] == "independent" and kwargs["anchor"] == 0 and kwargs["lambda_t"] is None
        for kwargs in text
    )
    stored = json.loads((tmp_path / "refine" / "train.json").read_text())["train"]
    assert stored["recall_optimizer"] == stored["refine_optimizer"] == "adam"
    assert {kwargs["p_drop"] for kwargs in text[:4]} == {0.7}  # recall's
    assert {kwargs["p_drop"] for kwargs in text[4:]} == {0.0}  # refinement keeps the prompt
    for stage in STAGES:
        world = json.loads((tmp_path / stage / "world.json").read_text())
        assert world["sampling"] == train.PAPER_SAMPLING
    paper = train.parse(["--recipe", "paper"])[0]
    assert paper.recall_steps / (paper.recall_steps + paper.refine_steps) == 0.4  # 40K of 100K
    assert paper.recall_lr / paper.refine_lr == 4  # 2e-4 and 5e-5
    for optimizer in train.make_optimizers(calls[0][0][0], "adam", 1e-3, 1e-3):
        assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize("data", ["toy", "pairs"])
def test_a_generator_may_be_prompted_with_captions(data, monkeypatch, tmp_path):
    flags = "--data", data, "--generator-prompt", "caption"
    calls, _ = spied(monkeypatch, tmp_path, *flags)
    dataset = train.make_world(data, 0).dataset("train")
    for step, ((_, _, _, c), _) in enumerate(calls):
        texts = dataset.texts(dataset.clips(range(4 * step, 4 * step + 4)))
        wanted = texts["caption" if step < 5 else "prompt"]
        assert torch.equal(c, dataset.world.prompt_encoder(wanted))


def test_repulsion_reaches_the_loss_and_each_stages_decay_its_muon(monkeypatch, tmp_path):
    decays = []

    class Spied(Muon):
        def __init__(self, parameters, **options):
            decays.append(options["weight_decay"])
            super().__init__(parameters, **options)

    monkeypatch.setattr(train, "Muon", Spied)
    flags = [f"--{stage}-muon-decay {i / 10}" for i, stage in enumerate(STAGES, 1)]
    calls, _ = spied(monkeypatch, tmp_path, *" ".join(flags).split(), "--repulsion", "0.3")
    assert decays == [0.1, 0.2, 0.3]
    assert {kwargs["repulsion"] for _, kwargs in calls} == {0.3}


def test_joint_of_the_paper_has_one_clock_and_even_steps():
    """Eq. 18: both streams move by the same Delta tau."""
    config = train.parse(["--recipe", "paper"])[2]
    clocks, world = [], World()
    model = UniViGU(config).eval()
    joint(
        model,
        torch.zeros(1, 1, config.prompt_dim),
        world.shape,
        callback=lambda k, tau_v, tau_t, *_: clocks.append((tau_v, tau_t)),
        **train.PAPER_SAMPLING["joint"],
    )
    assert clocks == [pytest.approx((k / 20, k / 20)) for k in range(21)]


def test_the_papers_evaluation_samples_as_the_paper(monkeypatch, tmp_path, capsys):
    seen = {}
    for mode in ("understand", "generate", "joint"):
        real = getattr(toy.evaluate, mode)

        def spy(*args, mode=mode, real=real, **options):
            seen.setdefault(mode, []).append(options)
            return real(*args, **options | {"steps": 1})

        monkeypatch.setattr(toy.evaluate, mode, spy)
    run(tmp_path, "--recipe", "paper", "--eval-clips", "4")
    for mode, wanted in train.PAPER_SAMPLING.items():
        for options in seen[mode]:
            assert {name: options[name] for name in wanted} == wanted
    assert "refine_p_drop was 0" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["understanding"]["with_prompt"] <= 1

    argv = [str(tmp_path / "refine"), "--guidance", "3", "--steps", "2", "--clips", "4"]
    seen.clear()
    judge.main([*argv, "--out", str(tmp_path / "again")])
    assert {o["guidance"] for o in seen["generate"] + seen["joint"]} == {3.0}
    assert {(o["guidance"], o["steps"]) for o in seen["understand"]} == {(1.0, 2)}
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["clips"] == 4 and "refine_p_drop was 0" in capsys.readouterr().out


def test_judge_refuses_what_is_no_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        judge.main([str(tmp_path)])
    assert end.value.code.startswith("toy.judge: error: ") and str(tmp_path) in end.value.code


def test_one_dropout_of_both_stages_in_an_older_checkpoint_is_each_stages(tmp_path):
    run(tmp_path, "--refine-steps", "2", "--eval-clips", "0")
    file = tmp_path / "refine" / "train.json"
    content = json.loads(file.read_text())
    for stage in ("recall", "refine"):
        del content["train"][f"{stage}_p_drop"]
    content["train"]["p_drop"] = 0.25
    file.write_text(json.dumps(content))
    found, *_ = train.parse(["--resume", "--out", str(tmp_path)])
    assert found.recall_p_drop == found.refine_p_drop == 0.25


def test_a_flag_is_stronger_than_the_recipe_and_the_recipe_than_the_preset():
    flags = ["--recipe", "paper", "--anchor", "0.3", "--text-shift", "2"]
    values, _, config, _ = train.parse(flags)
    assert (values.anchor, values.clocks, config.text_shift, config.text_output) == (
        0.3,
        "independent",
        2.0,
        "velocity",
    )
    values, machine, config, _ = train.parse([])
    assert (values, machine, config) == (Train(), Run(micro_batch=64), PRESETS["toy"])
    assert RECIPES["default"] == {}


OTHER = dict(
    recipe="paper",
    out="elsewhere",
    stages="refine",
    init="somewhere",
    generator_optimizer="adam",
    recall_optimizer="adam",
    refine_optimizer="adam",
    clocks="independent",
    device="cpu",
    precision="fp32",
    compile="no",
    patch_size="1,2,2",
    text_ffn_init="copy",
    text_output="velocity",
    embedding="literal",
    preset="wan-1.3b",
    text_flow="discrete",
    latents="raw",
    discrete_loss="generalised-kl",
)
PUBLISHED = dataclasses.fields(PublishedConfig)[len(dataclasses.fields(Config)) :]
FIELDS = [*map(dataclasses.fields, (Train, Run, Config))]
FIELDS = [*itertools.chain(*FIELDS), *PUBLISHED]


def other_value(field, default):
    """A valid value of a field that is not its default, where there is one."""
    if field.name in OTHER or isinstance(default, str):
        return OTHER.get(field.name, default)
    if field.type is bool:
        return not default
    return default * 2 or 1 if isinstance(default, int) else default / 2 or 0.5


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag(field):
    defaults = map(dataclasses.asdict, (PublishedConfig(), Train(), Run(), PRESETS["toy"]))
    wanted = other_value(field, dict(itertools.chain(*map(dict.items, defaults)))[field.name])
    flag = "--" + field.name.replace("_", "-")
    flags = [flag] if wanted is True else [flag, str(wanted)]
    *found, _ = train.parse([*flags, *["--text-flow", "discrete"] * (field in PUBLISHED)])
    found = {name: value for part in found for name, value in dataclasses.asdict(part).items()}
    assert found[field.name] == ((1, 2, 2) if field.name == "patch_size" else wanted)


def test_help_says_a_sentence_on_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # no line is broken
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and " --resume " in text and " --overwrite " in text
    for field in FIELDS:
        flag, value = field.name.replace("_", "-"), field.name.upper()
        forms = f"--{flag}, --no-{flag}" if field.type is bool else f"--{flag} {value}"
        assert f" {forms} {field.metadata['help']}" in text, field.name


@pytest.mark.parametrize(
    "flags", [["--colour", "red"], ["--generator-step", "3"], ["--res"], ["stray"]]
)
def test_unknown_and_abbreviated_flags_are_refused(flags, tmp_path, capsys):
    assert flags[0] in refused(capsys, *TINY, "--out", tmp_path / "out", *flags)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and not contents(tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--stages generator,reread", "stages 'generator,reread' generator,recall,refine"),
        ("--stages refine,recall", "stages 'refine,recall' order"),
        ("--stages recall,recall", "stages 'recall,recall'"),
        ("--stages ,", "stages ','"),
        ("--recall-steps -5", "recall_steps -5 1"),
        ("--generator-steps 0", "generator_steps 0 1"),
        ("--refine-lr nan", "refine_lr nan 0"),
        ("--adam-lr -1", "adam_lr -1 0"),
        ("--clip 0", "clip 0.0"),
        ("--refine-p-drop 1.5", "refine_p_drop 1.5 0 1"),
        ("--seed -1", "seed -1 0"),
        ("--batch 0", "batch 0 1"),
        ("--save-every 0", "save_every 0 1"),
        ("--eval-clips -1", "eval_clips -1 0"),
        ("--recipe home", "recipe 'home' default paper"),
        ("--preset wan-2b", "preset 'wan-2b' toy wan-1.3b wan-14b"),
        ("--preset wan-1.3b", "in_dim 'toy' 24"),
        ("--data films", "data 'films' toy"),
        ("--clocks sundial", "clocks 'sundial' independent mixture"),
        ("--recall-optimizer sgd", "recall_optimizer 'sgd' muon adam"),
        ("--device tpu", "device 'tpu' auto cpu cuda"),
        ("--precision fp8", "precision 'fp8' auto fp32 bf16"),
        ("--compile maybe", "compile 'maybe' yes no"),
        ("--num-heads 5", "dim 24 num_heads 5"),
        ("--dim -24", "dim -24 1"),
        ("--text-output x2", "text_output 'x2' velocity x1"),
        ("--text-ffn-init copy --text-ffn-dim 40", "text_ffn_init text_ffn_dim 40 32"),
        ("--text-shift nan", "text_shift nan"),
        ("--text-len 8", "text_len 8 16"),
        ("--vocab-size 35", "vocab_size 35 34"),
        ("--prompt-dim 32", "prompt_dim 32 64"),
        ("--prompt-len 4", "prompt_len 4 16"),
        ("--out-dim 23", "out_dim 23 24"),
        ("--patch-size 1,3,1", "patch_size (1,3,1) (3,4,4)"),
        ("--patch-size 1,1", "patch_size (1,1) three"),
        ("--init nowhere", "nowhere model.safetensors"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_and_nothing_is_written(flags, words, tmp_path, capsys):
    text = refused(capsys, *TINY, "--out", tmp_path / "out", *flags.split())
    assert all(word in text.replace(", ", ",") for word in words.split()), text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch many", "--batch 'many'"),
        ("--patch-size 1,a,1", "--patch-size '1,a,1'"),
        ("--dim 2.5", "--dim '2.5'"),
        ("--refine-lr", "--refine-lr"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(flags, words, tmp_path, capsys):
    text = refused(capsys, *TINY, "--out", tmp_path / "out", *flags.split())
    assert all(word in text for word in words.split()), text
    assert not list(tmp_path.iterdir())


def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def without_a_tensor(folder):
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.0.ffn.0.bias"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage, flags, words",
    [
        (without("model.safetensors"), [], "no model.safetensors"),
        (without("config.json"), [], "no config.json"),
        (truncated("model.safetensors"), [], "cannot be read"),
        (truncated("config.json"), [], "cannot be read"),
        (truncated("train.json"), [], "cannot be read"),
        (without_a_tensor, [], "blocks.0.ffn.0.bias"),
        (lambda folder: None, ["--dim", "36"], "dim 24 36"),
        (lambda folder: None, ["--text-shift", "9"], "text_shift 9"),
    ],
    ids=[
        "no weights",
        "no config",
        "cut weights",
        "cut config",
        "cut train.json",
        "a tensor less",
        "other width",
        "other clock",
    ],
)
def test_init_from_a_damaged_or_other_checkpoint_is_refused(
    damage, flags, words, whole, tmp_path, capsys
):
    folder = shutil.copytree(whole["muon"] / "recall", tmp_path / "init")
    damage(folder)
    text = refused(
        capsys, *TINY, "--init", folder, "--stages", "refine", "--out", tmp_path / "out", *flags
    )
    assert str(folder) in text and all(word in text for word in words.split()), text
    assert [f.name for f in tmp_path.iterdir()] == ["init"]


def test_a_damaged_init_does_not_cost_the_run_to_overwrite(whole, tmp_path, capsys):
    out = shutil.copytree(whole["muon"], tmp_path / "run")
    before = contents(out)
    refused(capsys, *TINY, "--init", tmp_path / "nowhere", "--out", out, "--overwrite")
    assert contents(out) == before


def test_an_out_that_cannot_be_written_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in refused(capsys, *TINY, "--out", out)
    (tmp_path / "locked").mkdir()
    mkdir = os.mkdir

    def locked(path, *mode):  # root may write everywhere
        if Path(path).parent == tmp_path / "locked":
            raise PermissionError(13, "Permission denied")
        mkdir(path, *mode)

    monkeypatch.setattr("os.mkdir", locked)
    assert "locked" in refused(capsys, *TINY, "--out", tmp_path / "locked")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_loss_that_is_no_number_stops_the_run_and_costs_nothing(whole, tmp_path, capsys):
    flags = [*TINY, "--out", tmp_path, "--max-skipped", "0", *optimizer_flags("muon")]
    text = refused(capsys, *flags, loss=at_step(6, lambda loss: loss * math.nan))
    assert "step 6" in text and "stage recall" in text and "nan" in text
    assert checkpoints(tmp_path)[-1][0] == 5
    run(tmp_path, "--resume")
    assert_same_run(tmp_path, whole["muon"])


def test_a_full_disk_stops_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused(capsys, *TINY, "--out", tmp_path)


def test_a_full_disk_stops_a_run_that_saves_asynchronously(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in refused(capsys, *TINY, "--out", tmp_path, "--async-save")
    assert checkpoints(tmp_path) == []


# ---------------------------------------------------------------- averages, validation, trackers


def test_the_average_follows_the_weights_and_gives_them_back():
    model = torch.nn.Linear(3, 2)
    average, wanted = (
        Average(model, 0.9),
        {name: p.detach().clone() for name, p in model.named_parameters()},
    )
    for _ in range(3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += torch.randn_like(p)
                wanted[name] = 0.9 * wanted[name] + 0.1 * p
        average.update()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.in_place():
        assert all(
            torch.allclose(p, wanted[name], atol=1e-6) and not torch.equal(p, before[name])
            for name, p in model.named_parameters()
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("asynchronous", ["--no-async-save", "--async-save"])
def test_a_run_with_averages_goes_on_bit_for_bit_and_leaves_the_weights_alone(
    asynchronous, whole, tmp_path
):
    flags = [*optimizer_flags("muon"), "--ema", "0.8", asynchronous]
    run(tmp_path / "whole", *flags)
    killed_at(12, tmp_path / "cut", *flags)
    run(tmp_path / "cut", "--resume")
    assert_same_run(tmp_path / "whole", whole["muon"])
    assert_same_run(tmp_path / "cut", whole["muon"])
    for stage in STAGES:
        ema = [
            load_file(tmp_path / name / stage / "ema" / "model.safetensors")
            for name in ("whole", "cut")
        ]
        now = load_file(tmp_path / "whole" / stage / "model.safetensors")
        assert all(torch.equal(ema[0][name], ema[1][name]) for name in now) and any(
            not torch.equal(ema[0][name], now[name]) for name in now
        )
    assert (
        UniViGU.from_pretrained(tmp_path / "cut" / "refine" / "ema", strict=True).config
        == UniViGU.from_pretrained(whole["muon"] / "refine").config
    )


@pytest.mark.parametrize("name", [".part-step-000006", ".step-000006.part"])  # the latter was older
def test_an_unfinished_checkpoint_is_ignored_and_said_so(name, whole, tmp_path, capsys):
    killed_at(7, tmp_path, *optimizer_flags("muon"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.json").write_text('{"step": 6}')
    run(tmp_path, "--resume")
    assert f"{name} is no complete checkpoint: ignored" in capsys.readouterr().err
    assert_same_run(tmp_path, whole["muon"])


def test_resuming_a_finished_run_says_that_nothing_is_left(whole, tmp_path, capsys):
    shutil.copytree(whole["muon"], tmp_path / "run")
    run(tmp_path / "run", "--resume")
    assert "is at its last step, 14: nothing is left to train" in capsys.readouterr().out


def test_validation_always_has_the_same_clips_and_changes_nothing(whole, tmp_path):
    run(tmp_path, *optimizer_flags("muon"), "--val-every", "5", "--val-clips", "3")
    assert_same_run(tmp_path, whole["muon"])
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["stage"]) for line in lines]  # before each stage, and each 5
    assert steps == [
        *((0, "generator"), (5, "generator"), (5, "recall")),
        *((9, "refine"), (10, "refine")),
    ]
    assert ["understanding" in line for line in lines] == [False, False, True, True, True]
    assert all(len(line["video_by_tenth"]) == 10 for line in lines)
    folders = sorted(f.name for f in (tmp_path / "val").iterdir())
    assert folders == [f"step-{step:06d}-{stage}" for step, stage in steps]
    page = (tmp_path / "report.html").read_text()
    shown = [page.index(f"Validation at {name.replace('-', ' ')}") for name in folders]
    assert shown == sorted(shown, reverse=True)  # the newest first
    assert "at step 5, before text was trained, and at step 10" in page
    assert {f.name for f in (tmp_path / "val" / "step-000010-refine").iterdir()} >= {
        "understand.gif",
        "generate.gif",
        "joint.gif",
        "samples.png",
    }
    model = UniViGU.from_pretrained(tmp_path / "generator")
    found = World(seed=0).evaluate(model.eval(), tmp_path, 3, 0.0, has_text=False)
    for name in ("loss", "video_by_tenth"):
        assert found.results[name] == lines[1][name]
    run(tmp_path, *optimizer_flags("muon"), "--overwrite")
    assert not (tmp_path / "val").exists()
    assert "Validation at" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("trained", ["all", "text"])
def test_where_nothing_is_learned_every_validation_finds_the_same(trained, whole, tmp_path):
    rates = [f"--{name}-lr 0".split() for name in ("recall", "refine", "adam")]
    flags = [*sum(rates, []), "--stages", "recall,refine", "--train", trained]
    run(tmp_path, "--init", str(whole["muon"] / "generator"), "--val-every", "2", *flags)
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 4, 6, 8]
    for line in lines[1:]:
        for name, value in line.items():
            assert name in ("step", "stage") or name.endswith("_s") or value == lines[0][name]
    for sample in ("generate.gif", "joint.gif", "samples.png"):
        first, *others = [
            (tmp_path / "val" / f"step-{line['step']:06d}-{line['stage']}" / sample).read_bytes()
            for line in lines
        ]
        assert all(other == first for other in others)


def test_validation_is_of_the_averaged_weights_and_goes_on_after_a_kill(tmp_path):
    flags = [*optimizer_flags("muon"), "--ema", "0.8", "--val-every", "7", "--val-clips", "2"]
    run(tmp_path / "whole", *flags)
    killed_at(
        12, tmp_path / "cut", *flags
    )  # after step 7 was validated, before its line counts: the checkpoint is of step 9
    run(tmp_path / "cut", "--resume")
    read = lambda name: [
        {k: v for k, v in json.loads(line).items() if not k.endswith("_s")}
        for line in (tmp_path / name / "validation.jsonl").read_text().splitlines()
    ]
    assert read("cut") == read("whole")
    assert [line["step"] for line in read("cut")] == [0, 5, 7, 9, 14]
    losses = [
        World(seed=0)
        .evaluate(UniViGU.from_pretrained(folder).eval(), tmp_path, 2, 0.0, has_text=True)
        .results["loss"]
        for folder in (tmp_path / "whole" / "refine" / "ema", tmp_path / "whole" / "refine")
    ]
    assert losses[0] == read("whole")[-1]["loss"] != losses[1]


@pytest.mark.parametrize("rank, built", [(0, True), (3, False)])
def test_an_evaluation_decodes_on_the_trainings_device_in_process_0_alone(
    rank, built, tmp_path, monkeypatch
):
    """A codec on the CPU would take hours, and each process's would take memory."""
    worlds, device = [], torch.device("meta")

    class Noted(World):
        def __getattribute__(self, name):
            if name == "codec" and "device" in vars(self):
                self.used = self.device
            return super().__getattribute__(name)

    def make_world(data, seed, vocabulary="full"):
        worlds.append(Noted(seed=seed))
        return worlds[-1]

    machine = train.distributed.Machine(device, False, False, rank, 1)
    monkeypatch.setattr(train.distributed, "join_processes", lambda *args: machine)
    monkeypatch.setattr(train.cost, "choose_recompute", lambda *args: "none")
    parsed = train.parse([*MODEL, "--out", str(tmp_path), "--val-every", "5"], make_world)
    made = train.make_worlds(parsed[0], make_world)
    train.prepare(*parsed, made, train.build, train.load_start)
    assert worlds[-1].device == device
    assert vars(worlds[-1]).get("used") == (device if built else None)


class FakeTracker:
    """Stands for tensorboard's SummaryWriter and for wandb."""

    def __init__(self, *args, **options):
        self.lines, self.run = [], None

    def add_scalar(self, name, value, step):
        self.lines.append((step, name, value))

    def init(self, **options):
        self.options = options
        return self

    def log(self, figures, step):
        self.lines += [(step, name, value) for name, value in figures.items()]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_trackers_get_the_figures_of_the_log(kind, tmp_path, monkeypatch):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    monkeypatch.setattr(
        sys.modules["torch.utils.tensorboard"], "SummaryWriter", lambda folder: fake, raising=False
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    run(tmp_path, "--track", kind)
    wanted = [
        (line["step"], name, value)
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        for name, value in line.items()
        if isinstance(value, (int, float))
    ]
    assert fake.lines == wanted and {"loss", "grad_norm", "samples_per_s"} <= {
        name for _, name, _ in wanted
    }


def test_a_tracker_that_is_not_installed_is_missed_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "track is 'wandb', which is not installed: pip install wandb" in refused(
        capsys, *TINY, "--out", tmp_path / "run", "--track", "wandb"
    )
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(tmp_path, capsys, monkeypatch):
    real = os.sysconf
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else real(name))

    def load_start(*args):
        pytest.fail("the checkpoint was read")

    flags = [*TINY, "--out", tmp_path / "run", "--init", tmp_path]
    text = refused(capsys, *flags, load_start=load_start)
    assert (
        "21,656 parameters and 4 clips at once take 0.0 GB in each of 1 processes" in text
        and "cpu has 0.0 GB" in text
        and not (tmp_path / "run").exists()
    )


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("ends", ["returns", "is killed", "is refused"])
def test_a_run_leaves_no_settings_behind(ends, tmp_path, capsys):
    def settings():
        compiler = torch._dynamo.config.recompile_limit, torch._dynamo.config.optimize_ddp
        return signal.getsignal(signal.SIGTERM), compiler, torch.backends.cuda.cudnn_sdp_enabled()

    def loss(*args, **kwargs):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        return uni_flow_loss(*args, **kwargs)

    before = settings()
    if ends == "returns":
        run(tmp_path, loss=loss)
    elif ends == "is killed":
        killed_at(2, tmp_path)
    else:
        refused(capsys, *TINY, "--out", tmp_path, "--max-skipped", "0", loss=at_step(2, spoil))
    assert settings() == before


def spoil(loss):
    return loss * math.nan


def as_older_versions_wrote(folder, **values):
    """Gives a checkpoint the train.json and config.json of a version before engine/."""
    stored = json.loads((folder / "train.json").read_text())
    stored["train"] |= {"async_save": "no", "discrete_loss": "cross-entropy"} | values
    (folder / "train.json").write_text(json.dumps(stored))
    config = json.loads((folder / "config.json").read_text())
    config.pop("discrete_loss", None)
    config.setdefault("latents", "normalised")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("async_save", ["no", "yes"])
def test_runs_of_older_versions_go_on_bit_for_bit(async_save, whole, tmp_path):
    killed_at(12, tmp_path, *optimizer_flags("muon"))
    for _, folder in checkpoints(tmp_path):
        as_older_versions_wrote(folder, async_save=async_save)
    run(tmp_path, "--resume")
    assert_same_run(tmp_path, whole["muon"])
    stored = json.loads((tmp_path / "refine" / "train.json").read_text())["train"]
    assert stored["async_save"] is (async_save == "yes")


def test_runs_of_the_discrete_flow_by_older_versions_go_on_bit_for_bit(tmp_path):
    discrete = "--text-dim 24 --text-flow discrete --discrete-loss generalised-kl".split()
    run(tmp_path / "whole", *discrete)
    killed_at(12, tmp_path / "cut", *discrete)
    for _, folder in checkpoints(tmp_path / "cut"):
        as_older_versions_wrote(folder, discrete_loss="generalised-kl")
    run(tmp_path / "cut", "--resume", "--text-dim", "24")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    config = json.loads((tmp_path / "cut" / "refine" / "config.json").read_text())
    assert config["discrete_loss"] == "generalised-kl"


# ---------------------------------------------------------------- SIGKILL

KILLER = """
import os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads: a child made by fork has none
sys.path[:0] = sys.argv[1:3]
import test_train, train
from engine.checkpoint import checkpoints
from univigu import UniViGU
out, saving = sys.argv[3], 0
random.seed(0)
often = "--save-every 1 --refine-steps 4000 --log-every 1 --ema 0.9".split()
flags = [*test_train.TINY, *often, "--out", out]
for kill in range(20):
    before = checkpoints(out)
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        save, replace = torch.save, pathlib.Path.replace
        # a slow disk: more of the kills meet a save

        def slow_replace(path, target):
            time.sleep(0.05 * path.is_dir())
            return replace(path, target)

        torch.save = lambda *args: (time.sleep(0.05), save(*args))
        pathlib.Path.replace = slow_replace
        try:
            train.main([*flags, "--resume"] if before else flags)
        finally:
            os._exit(1)
    seen, times = before, []
    while len(times) < 2:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        if (now := checkpoints(out)) != seen:
            seen, times = now, [*times, time.time()]
        time.sleep(0.002)
    time.sleep(random.random() * (times[1] - times[0]))  # any moment until the next checkpoint
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    saving += any(name.startswith(".part-s") for name in os.listdir(out))
    (*_, (step, folder)) = checkpoints(out)
    assert step >= (before[-1][0] if before else 1)
    for state in (folder, folder / "ema"):
        UniViGU.from_pretrained(state, strict=True)
    torch.load(folder / "training_state.pt", weights_only=True)
print("killed while saving:", saving)
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_never_cost_a_checkpoint(tmp_path):
    """Of a run that saves after every step. Each time it goes on from a complete checkpoint."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(ROOT), str(ROOT / "tests"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 3, "too few of the kills met a save"


def test_the_estimate_counts_dearer_steps_and_leaves_compiling_out(monkeypatch, capsys):
    """30 s of compiling and first steps, 1 s a step until 50, then steps of thrice the cost."""
    now = 100.0
    monkeypatch.setattr(metrics.time, "time", lambda: now)
    estimate = metrics.Estimate([2.0] * 60 + [6.0] * 40)
    for step in range(100):
        now += 31 if step == 0 else 1
        estimate.step()
    told = capsys.readouterr().out  # 80 s for 50 steps, 10 s, and 40 steps of 3 s
    assert told == "about 3.5 minutes of training in all\n"


def test_a_run_of_50_steps_tells_its_minutes_once(tmp_path, capsys):
    flags = "--batch 4 --num-layers 1 --log-every 60 --eval-clips 0 --compile no --stages generator"
    train.main([*flags.split(), "--generator-steps", "60", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("minutes of training in all") == 1
