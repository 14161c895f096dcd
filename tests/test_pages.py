"""The pages of engine/pages.py: what they hold is what the samplers did and the run measured; in a
browser, the slider shows the step it says, by keyboard, readably, without a network.
"""

import base64
import dataclasses
import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

import sample
import train
import wan
from engine import pages, trajectory
from engine.files import write_text
from engine.video import to_pixels
from toy import World, evaluate, shapes, words
from univigu import UniViGU, clock_grid, interpolate, joint, understand
from wan.published import build, config_from

pytestmark = pytest.mark.usefixtures("one_codec")

PROMPT, STEPS, SEED = "a red circle moving right", 6, 5
EVIL = "</script><b id=evil>&amp;\"'"
SMALL = dict(
    dim=24,
    num_heads=2,
    num_layers=1,
    ffn_dim=32,
    text_ffn_dim=32,
    text_dim=24,
    freq_dim=16,
    text_output="velocity",
    text_shift=4.0,
    joint_shift=0.5,
)


def save(folder, stage="refine", **changed):
    """A checkpoint of random weights, heads and all, as train.py writes it."""
    torch.manual_seed(0)
    model = build(config_from(SMALL | changed))
    for head in (model.head, model.head_t):
        torch.nn.init.normal_(head.head.weight, std=0.3)
    model.save_pretrained(folder)
    for name, values in {
        "config": dataclasses.asdict(model.config),
        "world": World().state,
        "train": {"stage": stage},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_codec):
    """A folder with checkpoints, a clip, and the pages and outputs of the three modes."""
    folder = tmp_path_factory.mktemp("made")
    (
        save(folder / "refine"),
        save(folder / "discrete", text_flow="discrete", text_dim=SMALL["dim"]),
        save(folder / "generator", "generator"),
    )
    np.save(folder / "clip.npy", to_pixels(shapes.render(World().dataset("seen").clips([0]))[0]))
    common = [
        "--checkpoint",
        str(folder / "refine"),
        "--steps",
        str(STEPS),
        "--seed",
        str(SEED),
        "--trajectory",
    ]
    sample.main(
        [
            "understand",
            "--video",
            str(folder / "clip.npy"),
            "--out",
            str(folder / "said.txt"),
            *common,
            str(folder / "understand.html"),
        ]
    )
    for mode in ("generate", "joint"):
        sample.main(
            [
                mode,
                "--prompt",
                PROMPT,
                "--out",
                str(folder / f"{mode}.npy"),
                *common,
                str(folder / f"{mode}.html"),
            ]
        )
    return folder


def data(page):
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>',
            Path(page).read_text(),
            re.S,
        )[1]
    )


def frames_in(uri, t=9, side=(24, 24)):
    """The frames of a picture that pages.sheet made, three a row: (t, *side, 3) uint8."""
    picture, (h, w) = (
        np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")),
        side,
    )
    return np.stack([picture[i // 3 * (h + 1) :, i % 3 * (w + 1) :][:h, :w] for i in range(t)])


def states(folder):
    """The states after each step of joint with the flags of `made`, from its own callback.

    [(tau_v, tau_t, frames (9, 24, 24, 3) uint8, words)].
    """
    world, model, found = World(), UniViGU.from_pretrained(folder / "refine").eval(), []

    def keep(k, tau_v, tau_t, z_v, z_t, v_v, v_t):
        if k > 0:
            frames = to_pixels(world.codec.decode(z_v)[0])
            words = [world.tokenizer.words[i] for i in model.decode(z_t)[0]]
            found.append((tau_v, tau_t, frames, words))

    joint(
        model,
        world.prompt_encoder([PROMPT]),
        world.shape,
        generator=torch.Generator().manual_seed(SEED),
        callback=keep,
        **world.sampling["joint"] | dict(steps=STEPS),
    )
    return found


NAMES = {None: "EOS", "·": "PAD"}


# ---------------------------------------------------------------- the trajectory


@pytest.mark.parametrize("mode", ["understand", "generate", "joint"])
def test_a_page_has_every_step_with_the_samplers_clocks_and_ends_with_its_output(mode, made):
    page = data(made / f"{mode}.html")
    steps, last = page["steps"], page["steps"][-1]
    assert [step["step"] for step in steps] == list(range(STEPS + 1))
    one, shift = [1.0] * (STEPS + 1), World.sampling[mode].get("shift", 1.0)
    shifts = {"understand": (None, 4.0), "generate": (shift, None), "joint": (shift, 0.5 * shift)}
    clocks = [one if s is None else clock_grid(STEPS, s) for s in shifts[mode]]
    assert [step["tau_v"] for step in steps] == pytest.approx(clocks[0]) and [
        step["tau_t"] for step in steps
    ] == pytest.approx(clocks[1])
    assert set(last["video"]) == ({"given"} if mode == "understand" else {"guess", "state"})
    assert set(last["text"]) == ({"given"} if mode == "generate" else {"guess", "state"})
    if mode == "understand":
        clip = torch.from_numpy(np.load(made / "clip.npy")).permute(3, 0, 1, 2)[None] / 127.5 - 1
        codec = World().codec
        assert len(page["pictures"]) == 1 and np.array_equal(
            frames_in(page["pictures"][0]), to_pixels(codec.decode(codec.encode(clip))[0])
        )
        said = [NAMES.get(word, word) for word in last["text"]["state"]]
        assert " ".join(said).split(" EOS")[0] == (made / "said.txt").read_text().strip()
    else:
        assert len(page["pictures"]) == 2 * STEPS  # the last velocity leads to the end itself
        for kind in ("guess", "state"):
            assert np.array_equal(
                frames_in(page["pictures"][last["video"][kind]]), np.load(made / f"{mode}.npy")
            )
    if mode == "generate":
        assert all(step["text"]["given"] == [*PROMPT.split(), None, *["·"] * 10] for step in steps)


def test_states_are_those_of_the_samplers_callback(made):
    page = data(made / "joint.html")
    for step, (tau_v, tau_t, frames, said) in zip(page["steps"][1:], states(made), strict=True):
        assert (step["tau_v"], step["tau_t"]) == pytest.approx((tau_v, tau_t))
        assert np.array_equal(frames_in(page["pictures"][step["video"]["state"]]), frames)
        assert [NAMES.get(word, word) for word in step["text"]["state"]] == said


def watched(sampler, model, *args, **options):
    """What a sampler returns, and the snapshots of its steps and of the end."""
    record = trajectory.Recorder(model)
    found = sampler(model, *args, callback=record, **options)
    return found, record.finish(found[1] if sampler is joint else None)


def test_the_guess_is_the_data_that_the_velocity_points_at(made, monkeypatch):
    """A network that knows: its velocity leads to one clip and one caption, from everywhere.

    Guidance leads past them.
    """
    model, world = UniViGU.from_pretrained(made / "refine").eval(), World()
    batch = world.dataset("seen").__getitems__([3])
    z_v1, z_t1 = batch["z_v"], model.embed(batch["caption"])

    def forward(z_v, z_t, tau_v, tau_t, c):
        elsewhere = torch.arange(len(z_v)).float()
        v = [
            (z1 - z) / (1 - tau).view(-1, *[1] * (z.ndim - 1))
            for z, z1, tau in ((z_v, z_v1, tau_v), (z_t, z_t1, tau_t))
        ]
        return [x + 7 * elsewhere.view(-1, *[1] * (x.ndim - 1)) for x in v]

    monkeypatch.setattr(model, "forward", forward)
    for guidance in (1.0, 3.0):
        out, steps = watched(
            joint,
            model,
            batch["c"],
            world.shape,
            steps=4,
            guidance=guidance,
            generator=torch.Generator().manual_seed(0),
        )
        for step in steps[:-1]:
            guided = 14 * (1 - step.tau_v) if guidance == 3 else 0.0  # v_cond + 2 (v_cond - v_null)
            torch.testing.assert_close(step.z_v1_hat, z_v1 - guided, atol=1e-4, rtol=1e-4)
            if guidance == 3:  # the text's null pass is the third one
                z_t1_hat = z_t1 - 28 * (1 - step.tau_t)
                assert step.y_hat.equal(model.decode(z_t1_hat)[0])
                continue
            assert step.y_hat.equal(batch["caption"][0]) and min(step.sure) > 0.999
        first, second = steps[0], steps[1]
        assert not first.y.equal(batch["caption"][0]) and (first.tau_v, first.tau_t) == (
            0,
            0,
        )
        if guidance == 1:
            torch.testing.assert_close(
                second.z_v, interpolate(first.z_v, z_v1, torch.tensor([0.25]))[0]
            )
            torch.testing.assert_close(out[0], z_v1, atol=1e-4, rtol=1e-4)


def test_certainty_is_one_on_a_row_and_little_between_rows(made):
    model = UniViGU.from_pretrained(made / "refine")
    E = model.embedding_matrix().detach()
    z_t = torch.stack([E[5], 0.5 * (E[5] + E[9]), 0 * E[5], 2 * E[5]])[None]
    found = trajectory.snapshot(model, 1.0, 1.0, torch.zeros(1, 24, 3, 4, 4), z_t)
    logits = z_t[0, 1] @ E.T / 24**0.5
    exact = (E @ E.T / 24**0.5).softmax(-1).diagonal()
    assert found.sure[0] == found.sure[3] == 1 and found.y_hat[0] == 5
    assert (
        found.sure[1]
        == pytest.approx((logits.softmax(-1).max() / exact[found.y_hat[1]]).item(), abs=1e-3)
        and 0 < found.sure[1] < 1
    )
    assert (
        found.sure[2] == pytest.approx((1 / 34 / exact[found.y_hat[2]]).item(), abs=1e-3)
        and found.sure[2] < pages.UNSURE
    )


def test_the_discrete_flow_shows_tokens_and_what_its_logits_say(made):
    model = wan.load(made / "discrete").eval()
    y, logits = torch.randint(34, (1, 16)), torch.randn(1, 16, 34)
    found = trajectory.snapshot(
        model, 0.2, 0.3, torch.zeros(1, 24, 3, 4, 4), y, torch.zeros(1, 24, 3, 4, 4), logits
    )
    assert found.y.equal(y[0]) and found.y_hat.equal(logits[0].argmax(-1))
    assert found.sure == pytest.approx(logits[0].softmax(-1).max(-1).values.tolist(), abs=1e-3)
    (_, y_hat), steps = watched(
        joint,
        model,
        torch.zeros(1, 16, 64),
        World().shape,
        steps=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(steps) == 3 + 1 and steps[-1].y_hat.equal(y_hat[0])  # joint's last look at its end


def test_a_text_that_reuses_the_videos_keys_is_watched_too(made):
    model, z_v = (
        UniViGU.from_pretrained(made / "refine").eval(),
        World().dataset("seen").__getitems__([0])["z_v"],
    )
    y_hat, steps = watched(
        understand,
        model,
        z_v,
        steps=3,
        reuse_video=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert (
        len(steps) == 4
        and steps[-1].y.equal(y_hat[0])
        and all(step.z_v1_hat.equal(z_v) for step in steps)
    )


def test_watching_changes_nothing_and_a_generator_has_no_text(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = [
        "joint",
        "--checkpoint",
        str(made / "refine"),
        "--prompt",
        PROMPT,
        "--steps",
        str(STEPS),
        "--seed",
        str(SEED),
        "--out",
        "again.npy",
    ]
    sample.main(call)
    assert Path("again.npy").read_bytes() == (made / "joint.npy").read_bytes() and not list(
        Path().glob("*.html")
    )
    sample.main([*call, "--trajectory"])  # without a name: the mode's
    assert Path("joint.html").read_text().count("<dt>") == 5 and data("joint.html") == data(
        made / "joint.html"
    )
    sample.main(
        [
            "generate",
            "--checkpoint",
            str(made / "generator"),
            "--prompt",
            PROMPT,
            "--steps",
            "2",
            "--out",
            "drawn.gif",
            "--trajectory",
            "new/drawn.html",
        ]
    )
    steps = data("new/drawn.html")["steps"]
    assert [(step["tau_t"], step["text"]) for step in steps] == [
        (None, {})
    ] * 3 and "no text stream" in Path("new/drawn.html").read_text()
    assert not list(Path().rglob(".part*"))


def test_a_page_stays_small(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(
        [
            "joint",
            "--checkpoint",
            str(made / "refine"),
            "--prompt",
            PROMPT,
            "--steps",
            "80",
            "--out",
            "a.gif",
            "--trajectory",
            "a.html",
        ]
    )
    steps = data("a.html")["steps"]
    assert (
        len(steps) == pages.STEPS
        and steps[0]["step"] == 0
        and steps[-1]["step"] == 80
        and steps[-1]["tau_v"] == 1
    )
    assert (
        all(1 <= b["step"] - a["step"] <= 2 for a, b in pairwise(steps))
        and "65 of 81" in Path("a.html").read_text()
    )
    assert Path("a.html").stat().st_size < 5e6
    noise = torch.rand(3, 9, 480, 832, generator=torch.Generator().manual_seed(0)) * 2 - 1
    smooth = torch.nn.functional.interpolate(noise[:, :, ::40, ::40], (480, 832), mode="bilinear")
    assert (
        pages.STEPS * len(pages.sheet(smooth, 3, gap=1)) < 3e6
        and pages.STEPS * len(pages.sheet(noise, 3, gap=1)) < 10e6
    )


def test_text_cannot_break_out(tmp_path):
    frames = torch.zeros(3, 1, 4, 4)
    steps = [
        dict(
            step=i,
            tau_v=1.0,
            tau_t=float(i),
            video={"given": frames},
            text={"guess": [EVIL, None], "state": [EVIL, "·"]},
            sure=[0.2, 1],
        )
        for i in range(2)
    ]
    write_text(tmp_path / "a.html", pages.trajectory(EVIL, EVIL, [(EVIL, EVIL)], steps))
    gallery = [dict(mode=EVIL, right=None, frames=frames, lines=[(EVIL, EVIL)])]
    write_text(
        tmp_path / "b.html",
        pages.report(
            [], {"loss": {EVIL: {EVIL: 1.0}}}, {"gallery": gallery}, {EVIL: EVIL, "data": EVIL}
        ),
    )
    for name, wanted in (("a.html", 1), ("b.html", 0)):
        text = (tmp_path / name).read_text()
        assert (
            "<b id" not in text
            and "&lt;/script&gt;&lt;b id=evil&gt;" in text
            and text.count("</script>") == wanted + 1
        )
    assert data(tmp_path / "a.html")["steps"][0]["text"]["guess"][0] == EVIL


@pytest.mark.parametrize(
    "mode, words, said",
    [
        (
            "joint",
            ["--prompt", PROMPT, "--trajectory", "page.txt"],
            ["--trajectory", "'page.txt'", ".html"],
        ),
        ("joint", ["--prompt", PROMPT, "--trajectory", ""], ["--trajectory", "''", ".html"]),
        (
            "joint",
            ["--prompt", PROMPT, "--trajectory", "folder.html"],
            ["--trajectory", "folder.html"],
        ),
        (
            "joint",
            ["--prompt", PROMPT, "--trajectory", "file/page.html"],
            ["--trajectory", "cannot be written"],
        ),
        (
            "understand",
            ["--video", "clip.npy", "--out", "a.html", "--trajectory", "./a.html"],
            ["--trajectory", "--out", "two names"],
        ),
        (
            "understand",
            ["--videos", ".", "--trajectory"],
            ["--trajectory", "one --video", "--videos"],
        ),
        (
            "understand",
            ["--video", "clip.npy", "--window", "--trajectory"],
            ["--trajectory", "one clip", "--window"],
        ),
        (
            "generate",
            ["--prompts", "p.txt", "--out", "x", "--trajectory", "a.html"],
            ["--trajectory", "one --prompt", "--prompts"],
        ),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_work(
    mode, words, said, made, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    Path("file").touch()
    Path("p.txt").write_text(PROMPT)
    shutil.copy(made / "clip.npy", "clip.npy")
    before = sorted(tmp_path.rglob("*"))
    text = refusal(capsys, sample.main, mode, "--checkpoint", made / "refine", *words)
    assert text.startswith("sample.py: error: ") and all(word in text for word in said), text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_writes_no_page(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample.main(
        [
            "joint",
            "--checkpoint",
            str(made / "refine"),
            "--prompt",
            PROMPT,
            "--trajectory",
            "--dry-run",
        ]
    )
    assert not list(tmp_path.iterdir())


def test_a_page_is_complete_or_the_one_before(tmp_path, monkeypatch):
    write_text(tmp_path / "a.html", "before")
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError):
        write_text(tmp_path / "a.html", "after")
    assert [f.name for f in tmp_path.iterdir()] == ["a.html"] and (
        tmp_path / "a.html"
    ).read_text() == "before"


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_intervals_are_wilsons(right, n, low, high):
    assert pages.wilson(right / n, n) == pytest.approx(
        (low, high), abs=1e-4
    )  # the last: Newcombe 1998, table I


def test_confusions_count_what_was_said():
    truth = torch.tensor([[0, 5, 0, 8, 1, 3, 2], [0, 5, 1, 8, 0, 3, 2], [1, 0, 1, 0, 0, 0, 0]])
    answers = truth.clone()
    answers[1, 1], answers[2, 6] = 2, -1  # cyan called blue; a background that says nothing
    found = evaluate.confusion(answers, truth)
    assert all(
        counts.sum() == 3 and counts.shape == (len(values), len(values) + 1)
        for values, counts in found.values()
    )
    assert found["colour"][1][5].tolist() == [0, 0, 1, 0, 0, 1, 0] and found["background"][1][
        0
    ].tolist() == [0, 0, 0, 1]
    assert found["size"][1].tolist() == [[2, 0, 0], [0, 1, 0]]
    text = pages.report([], {}, {"confusion": {"colour": found["colour"]}}, {})
    assert (
        re.findall(r'class="mistake" style="--share: (\d+)%">1<', text) == ["22"]
        and "nothing" not in text
    )
    assert "nothing" in pages.report([], {}, {"confusion": {"background": found["background"]}}, {})


def test_the_gallery_has_right_and_wrong_cases_of_each_mode():
    """Clips whose captions are right, but for two words, and whose drawings are the clips
    themselves, but for one.
    """
    truth = World().dataset("seen").clips(range(8))
    frames, wanted = list(shapes.render(truth)), words.detailed(truth.attributes)
    captions, drawn = list(wanted), list(frames)
    captions[2] = (
        captions[2].replace("small", "large")
        if "small" in captions[2]
        else captions[2].replace("large", "small")
    )
    drawn[5] = frames[0]
    found = evaluate.Found(
        truth=truth.attributes,
        prompts=words.brief(truth.attributes),
        wanted=wanted,
        drawn=drawn,
        frames=frames,
        captions=captions,
        joint_frames=frames,
        joint_captions=wanted,
        prompted=wanted,
        drawn_briefly=frames,
    )
    shown = evaluate.gallery(found, evaluate.compare(found))
    verdicts = {
        mode: [e["right"] for e in shown if e["mode"] == mode]
        for mode in ("understand", "generate", "joint")
    }
    assert verdicts == {
        "understand": [True] * 3 + [False],
        "generate": [True] * 3 + [False],
        "joint": [True] * 3,
    }
    mistaken = shown[3]
    assert mistaken["frames"] is frames[2] and dict(mistaken["lines"]) == {
        "the truth": wanted[2],
        "the model wrote": captions[2],
        "wrong": "size",
    }
    assert (
        dict(shown[7]["lines"])["the oracle sees"] == wanted[0]
        and dict(shown[7]["lines"])["asked"] == wanted[5]
    )
    assert "No wrong case" in pages.report([], {}, {"gallery": shown}, {})


TINY = (
    "--dim 24 --num-heads 2 --num-layers 1 --ffn-dim 32 --text-ffn-dim 32 --text-dim 8 "
    "--freq-dim 16 --batch 4 --generator-steps 2 --recall-steps 2 --refine-steps 3 --log-every 1 "
    "--compile no --device cpu --precision fp32"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_codec):
    out = tmp_path_factory.mktemp("run")
    train.main(
        [*TINY, "--eval-clips", "6", "--val-every", "3", "--val-clips", "2", "--out", str(out)]
    )
    return out


def test_a_run_ends_with_its_report(run):
    text, results = (
        (run / "report.html").read_text(),
        json.loads((run / "results.json").read_text()),
    )
    for mode, name in (
        ("understanding", "attribute_accuracy"),
        ("generation", "attribute_accuracy"),
        ("joint", "agreement"),
    ):
        share = results[mode][name]
        low, high = pages.wilson(share, 6)
        interval = f'<span class="soft interval">{low:.3f} – {high:.3f}</span>'
        mark = "( <strong class=.text.>▼</strong>)?"
        assert re.search(rf"{mode}.{name}</th>\s*<td>{share:.3f}{mark}<br>{interval}", text)
    assert [f"{stage}: video" in text for stage in train.STAGES] == [True] * 3 and text.count(
        "<polyline"
    ) == 5  # the generator has no text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[2], lines[3]  # of recall
    for name in ("video", "text"):
        assert f"{name} {first[name]:.3g} to {last[name]:.3g}" in text
    assert (
        "<dt>refine_steps</dt><dd>3</dd>" in text
        and "<dt>text_dim</dt><dd>8</dd>" in text
        and f"{results['loss']['unseen']['text (caption)']:.4f}" in text
    )
    assert (
        text.count('class="confusion"') == 7
        and text.count('class="clip"') >= 3 * 3
        and "http" not in text.replace("http-equiv", "")
    )
    assert not list((run / "val").rglob("report.html"))  # a validation stays what it was


def test_a_finished_run_may_be_resumed_and_an_evaluation_left_out(run, tmp_path):
    before = (run / "report.html").read_text()
    train.main(["--resume", "--out", str(run)])
    after = (run / "report.html").read_text()
    plain = lambda text: re.sub(r"<dt>minutes</dt><dd>.*?</dd>", "", text)
    assert plain(after) == plain(before)
    train.main([*TINY, "--stages", "generator", "--eval-clips", "0", "--out", str(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    assert (
        "generator: video" in text
        and "Configuration" in text
        and "Accuracy" not in text
        and "Gallery" not in text
    )


def test_long_and_odd_logs_are_drawn():
    lines = [{"step": i, "stage": "recall", "video": 1 / i, "text": None} for i in range(1, 5001)]
    points = re.search(r'points="(.*?)"', pages.report(lines, {}, {}, {}))[1].split()
    assert 250 <= len(points) <= 300
    x, y = zip(*(map(float, p.split(",")) for p in points))
    assert all(b > a for a, b in pairwise(x)) and all(
        b >= a for a, b in pairwise(y)
    )  # a falling loss falls on the page
    assert "no loss" in pages.report(
        [{"step": 1, "stage": "recall", "video": None, "text": None}], {}, {}, {}
    )
    assert "<polyline" in pages.report(lines[:1], {}, {}, {})


def test_a_reference_is_a_band_behind_the_curve_as_far_as_the_run_goes():
    lines = [{"step": 120 + i, "stage": "refine", "video": 0.5, "text": 0.1} for i in (0, 20, 40)]
    band = [(0, 0.25, 1.0), (20, 0.2, 0.9), (40, 0.1, 0.8), (60, 0.01, 0.02)]  # 60: beyond its end
    text = pages.report(lines, {}, {"reference": {"refine": {"video": band}}}, {})
    (drawn,) = re.findall(r'<polygon points="(.*?)"', text, re.S)
    points = [tuple(map(float, point.split(","))) for point in drawn.split()]
    assert len(points) == 6 and points[0][0] == points[5][0] == 44 and points[2][0] == 344
    assert points[5][1] - points[0][1] > 0  # lower on the page is a smaller loss
    (line,) = re.findall(r'<polyline points="(.*?)".*?var\(--video\)', text, re.S)
    _, y = map(float, line.split()[0].split(","))
    assert points[0][1] < y < points[5][1]
    assert "three runs of the" in text and "<polygon" not in pages.report(lines, {}, {}, {})


def test_figures_below_the_reference_are_marked():
    row = {"name": "x", "chance": 0.2, "each": {}, "clips": 512, "seen": 0.9, "unseen": 0.99}
    known = {"seen": (0.98, 0.96), "unseen": (0.98, 0.96)}
    text = pages.report([], {}, {"accuracy": [row | {"reference": known}]}, {})
    assert text.count("▼</strong>") == 1 and text.count("reference 0.980") == 2
    assert "reference" not in pages.report([], {}, {"accuracy": [row]}, {})


def test_a_report_of_real_clips_stays_small():
    frames = torch.rand(3, 81, 48, 400, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = pages.report(
        [],
        {},
        {"gallery": [dict(mode="generate", right=None, frames=frames, lines=[("asked", "a cat")])]},
        {},
    )
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,(.*?)\)", text)[1])))
    assert (
        picture.size == (27 * 192, 23)
        and "--n: 27;" in text
        and "✓" not in text
        and "✗" not in text
    )


@pytest.mark.slow
def test_the_real_world_has_pages_too(tmp_path, monkeypatch, capsys):
    """A tiny random Wan of 17 frames: the guess's first nine are shown; Wan itself has no text."""
    for module in ("diffusers", "transformers", "av", "ftfy"):
        pytest.importorskip(
            module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
        )
    from tiny_wan import write_wan_folder

    import wan
    from wan.codec import Tokenizer

    monkeypatch.chdir(tmp_path)
    write_wan_folder("wan")
    model = wan.load("wan", vocab_size=len(Tokenizer("wan")), text_len=16)
    model.save_pretrained("refine")
    state = dict(
        world="wan",
        wan="wan",
        vocabulary=None,
        latents="normalised",
        text_len=16,
        prompt_len=model.config.prompt_len,
    )
    for name, values in {
        "config": dataclasses.asdict(model.config),
        "world": state,
        "train": {"stage": "refine"},
    }.items():
        Path("refine", f"{name}.json").write_text(json.dumps(values))
    size = ["--size", "32x48", "--frames", "17", "--steps", "2", "--trajectory"]
    sample.main(
        ["joint", "--checkpoint", "refine", "--prompt", "a red ball", "--out", "a.npy", *size]
    )
    sample.main(["understand", "--checkpoint", "refine", "--video", "a.npy", *size])
    sample.main(["generate", "--checkpoint", "wan", "--prompt", "a red ball", *size])
    for mode, texts in (
        ("joint", {"guess", "state"}),
        ("understand", {"guess", "state"}),
        ("generate", set()),
    ):
        page = data(f"{mode}.html")
        picture = Image.open(io.BytesIO(base64.b64decode(page["pictures"][-1].split(",")[1])))
        assert (
            len(page["steps"]) == 3
            and picture.size == (3 * 49 - 1, 3 * 33 - 1)
            and set(page["steps"][-1]["text"]) == texts
        )
        assert list(page["steps"][0]["video"]) == (["given"] if mode == "understand" else ["guess"])
    last = frames_in(data("joint.html")["pictures"][-1], side=(32, 48))
    assert (
        np.abs(last.astype(int) - np.load("a.npy")[:9]).max() <= 1
    )  # a causal codec: the first nine frames of the whole


# ---------------------------------------------------------------- in a browser


def picture_of(page, id):
    return frames_in(page.get_attribute(f"#{id}", "src"))


def words_of(page, id):
    return [
        {"end": "EOS"}.get(word, NAMES.get(word, word))
        for word in page.locator(f"#{id} .token").all_inner_texts()
    ]


def test_the_slider_shows_the_step_it_says_by_keyboard(made, view):
    page, wanted = view(made / "joint.html"), states(made)
    assert (
        page.evaluate("document.activeElement.id") == "step"
    )  # the keyboard is there from the start, and one sees where
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown = 0
    for key, step in [
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowUp", 3),
        ("End", STEPS),
        ("ArrowLeft", STEPS - 1),
        ("Home", 0),
        ("ArrowRight", 1),
    ]:
        page.keyboard.press(key)
        tau_v, tau_t, frames, said = wanted[step - 1] if step else (0.0, 0.0, None, None)
        now = f"step {step} of {STEPS}, τ video {tau_v:.2f}, τ text {tau_t:.2f}"
        assert page.inner_text("#now") == now and page.get_attribute(
            "#step", "aria-valuetext"
        ).startswith(now)
        assert (
            float(page.get_attribute("#point", "cx")),
            float(page.get_attribute("#point", "cy")),
        ) == pytest.approx((100 * tau_v, 100 - 100 * tau_t))
        assert len(page.get_attribute("#walked", "points").split()) == step + 1
        if step:
            assert (
                np.array_equal(picture_of(page, "video-state"), frames)
                and words_of(page, "text-state") == said
            )
            shown += 1
        if step > 1:
            changed = [a != b for a, b in zip(wanted[step - 2][3], said)]
            assert [
                token.evaluate("t => getComputedStyle(t).textDecorationLine === 'underline'")
                for token in page.locator("#text-state .token").all()
            ] == changed
    assert shown == 6
    page.keyboard.press("End")
    assert (
        np.array_equal(picture_of(page, "video-guess"), wanted[-1][2])
        and words_of(page, "text-guess") == wanted[-1][3]
    )


@pytest.mark.parametrize("mode", ["understand", "generate"])
def test_what_is_given_stays_and_what_moves_is_that_of_the_step(mode, made, view):
    page, content = view(made / f"{mode}.html"), data(made / f"{mode}.html")
    for key, at in (("End", STEPS), ("Home", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        step = content["steps"][at]
        for kind, picture in step["video"].items():
            assert np.array_equal(
                picture_of(page, f"video-{kind}"), frames_in(content["pictures"][picture])
            )
        for kind, said in step["text"].items():
            assert words_of(page, f"text-{kind}") == [NAMES.get(word, word) for word in said]
    kinds = {"given"} if mode == "understand" else {"guess", "state"}
    assert set(step["video"]) == kinds and set(step["text"]) == {"given", "guess", "state"} - kinds


def test_uncertain_words_are_dashed_and_spoken_of(made, view):
    page, steps = view(made / "understand.html"), data(made / "understand.html")["steps"]
    for step in (0, STEPS):
        page.locator("#step").press("End" if step else "Home")
        dashed = [
            token.evaluate("t => getComputedStyle(t).borderTopStyle") == "dashed"
            for token in page.locator("#text-guess .token").all()
        ]
        assert dashed == [sure < pages.UNSURE for sure in steps[step]["sure"]]
        read = list(steps[step]["text"]["guess"])
        spoken = " ".join(read[: read.index(None)] if None in read else read)
        assert page.get_attribute("#step", "aria-valuetext").endswith(f"The guess reads: {spoken}")
    assert any(sure < pages.UNSURE for step in steps for sure in step["sure"])
    assert (
        page.locator("#video-given").count() == 1
        and page.locator("#video-guess, #video-state").count() == 0
    )
    page.locator("summary").press("Enter")
    assert (
        page.locator("#all tr").count() == STEPS + 1 and page.locator("#all tr").last.is_visible()
    )


def test_play_walks_to_the_end_and_pauses(made, view):
    page = view(made / "generate.html")
    page.clock.install(time=0)
    page.clock.pause_at(1)  # from here on, time passes only where the test says so
    page.locator("#step").press("End")
    page.locator("#step").press("Tab")
    page.keyboard.press("Enter")
    assert (
        page.inner_text("#play") == "Pause" and page.input_value("#step") == "0"
    )  # from the end it starts again
    page.clock.run_for(1100)
    assert page.input_value("#step") == "2"
    page.keyboard.press("Enter")
    assert page.inner_text("#play") == "Play"
    page.clock.run_for(5000)
    assert page.input_value("#step") == "2" and page.inner_text("#now").startswith("step 2 ")
    page.keyboard.press("Space")
    page.clock.run_for(5000)
    assert page.inner_text("#play") == "Play" and page.input_value("#step") == str(STEPS)


# The lowest contrast of a page's texts with what lies behind them (WCAG 2's formula), the text that
# has it, and how many texts there are.
CONTRAST = """() => {
  const paper = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    paper.clearRect(0, 0, 1, 1);
    paper.fillStyle = colour;
    paper.fillRect(0, 0, 1, 1);
    return [...paper.getImageData(0, 0, 1, 1).data];
  };
  const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const weights = [.2126, .7152, .0722];
  const light = c => weights.reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
  let worst = [99, "", 0];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("").trim();
    if (!text || ["SCRIPT", "STYLE"].includes(e.tagName) || !e.checkVisibility()) continue;
    let behind = e;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255)
      behind = behind.parentElement;
    const {fill, color} = getComputedStyle(e), own = e.namespaceURI.endsWith("svg") ? fill : color;
    const paint = getComputedStyle(behind ?? document.body).backgroundColor;
    const [a, b] = [light(rgba(own)), light(rgba(paint))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    worst = [...(ratio < worst[0] ? [ratio, text] : worst.slice(0, 2)), worst[2] + 1];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme, made, run, view):
    backgrounds = set()
    for file in (
        made / "joint.html",
        made / "understand.html",
        made / "generate.html",
        run / "report.html",
    ):
        page = view(file, color_scheme=scheme)
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        if "report" not in file.name:
            page.locator("#step").press("ArrowRight")
        ratio, text, texts = page.evaluate(CONTRAST)
        assert ratio >= 4.5 and texts > 40, (file.name, ratio, text)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate("document.documentElement.lang") == "en" and page.title()
        whole = "i => i.hasAttribute('alt') && i.complete && i.naturalWidth > 0"
        assert page.evaluate(f"[...document.images].every({whole})")
    assert backgrounds == {{"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]}


def test_the_reports_clips_play_and_pause(run, view):
    state = "getComputedStyle(document.querySelector('.clip')).animationPlayState"
    page = view(run / "report.html")
    picture = page.evaluate("getComputedStyle(document.querySelector('.clip')).backgroundImage")
    assert page.evaluate(state) == "running" and picture.startswith('url("data:image/webp')
    page.locator("#pause").press("Enter")
    assert page.evaluate(state) == "paused" and page.inner_text("#pause") == "Play"
    still = view(run / "report.html", reduced_motion="reduce")
    assert still.evaluate(state) == "paused" and still.inner_text("#pause") == "Play"


def test_text_is_shown_as_text(tmp_path, view):
    texts = {"guess": [EVIL, None], "state": ["a", "·"]}
    steps = [
        dict(
            step=i,
            tau_v=1.0,
            tau_t=i / 2,
            video={"given": torch.zeros(3, 1, 4, 4)},
            text=texts,
            sure=[0.2, 1],
        )
        for i in range(3)
    ]
    write_text(tmp_path / "a.html", pages.trajectory(EVIL, EVIL, [(EVIL, EVIL)], steps))
    page = view(tmp_path / "a.html")
    assert page.locator("#evil").count() == 0 and page.title() == EVIL
    assert page.inner_text("h1") == EVIL and page.inner_text("#text-guess .token >> nth=0") == EVIL
    page.locator("#step").press("ArrowRight")
    assert page.inner_text("#now").startswith("step 1 of 2")
