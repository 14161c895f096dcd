"""toy/square.py: each point shows what the network is given and guesses there; the page is played
with by mouse, finger and keyboard.

`python -m tests.test_square square.html toy/pictures/square.png` takes the README's picture.
"""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

import sample
import train
from engine.trajectory import words
from engine.video import to_pixels
from toy import square
from univigu import interpolate, noise_like

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A short run, and the page of it."""
    folder = tmp_path_factory.mktemp("square")
    tiny = "--dim 24 --text-dim 24 --ffn-dim 32 --text-ffn-dim 32 --num-layers 1 --batch 8"
    steps = "--generator-steps 2 --recall-steps 2 --refine-steps 2 --warmup 1 --eval-clips 0"
    train.main([*tiny.split(), *steps.split(), "--compile", "no", "--out", str(folder / "run")])
    checkpoint = str(folder / "run" / "refine")
    square.main(["--checkpoint", checkpoint, "--out", str(folder / "square.html")])
    return folder


@pytest.fixture(scope="module")
def data(made):
    text = (made / "square.html").read_text(encoding="utf-8")
    assert len(text) < 3e6
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def videos(picture):
    """A picture of square.atlas -> pixels, by row, column and frame."""
    file = io.BytesIO(base64.b64decode(picture.partition("base64,")[2]))
    pixels = np.array(Image.open(file).convert("RGB")).astype(int)
    rows, columns = pixels.shape[0] // 72, pixels.shape[1] // 72
    cut = pixels.reshape(rows, 3, 24, columns, 3, 24, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return cut.reshape(rows, columns, 9, 24, 24, 3)


def near(found, wanted):
    """Whether pictures are alike but for what their file format loses."""
    return np.abs(found - wanted.astype(int)).mean() < 8


@torch.no_grad()
def test_a_point_shows_what_is_given_and_what_is_guessed_there(made, data):
    checkpoint = sample.open_checkpoint(str(made / "run/refine"), None, torch.device("cpu"))
    model, world = checkpoint.load(), checkpoint.world
    batch = world.dataset("seen").__getitems__([1])
    z_v1, y = batch["z_v"], batch["caption"]
    clip, i, j = data["clips"][1], 7, 2  # tau_v .7, tau_t .2
    assert [clip["caption"]] == world.tokenizer.decode(y)
    prompts = [guess["prompt"] for guess in clip["guesses"]]
    assert prompts[:2] == [*world.tokenizer.decode(batch["prompt"]), "no prompt"]

    tau_v, tau_t = torch.tensor([0.7]), torch.tensor([0.2])
    z_v, _ = interpolate(noise_like(z_v1, torch.Generator().manual_seed(1)), z_v1, tau_v)
    z_t, _ = model.text_flow.corrupt(model, y, tau_t, torch.Generator().manual_seed(1))
    for c, guess in zip((batch["c"], torch.zeros_like(batch["c"])), clip["guesses"]):
        v_v, v_t = model(z_v, z_t, tau_v, tau_t, c)
        wanted = world.codec.decode(z_v + 0.3 * v_v)[0]
        assert near(videos(guess["video"])[j, i], to_pixels(wanted))
        y_hat = model.decode(z_t + 0.8 * v_t)[0]
        assert guess["text"][j][i] == words(world, y_hat)
        assert len(guess["sure"][j][i]) == world.text_len
    assert near(videos(clip["given"])[0, i], to_pixels(world.codec.decode(z_v)[0]))


def test_clean_data_are_given_at_one_and_the_walks_end_there(data):
    for clip in data["clips"]:
        said = [word for word in clip["words"][-1] if word not in (None, "·")]
        assert " ".join(said) == clip["caption"]
        for guess in clip["guesses"]:  # tau 1: nothing is left to guess
            assert guess["text"][-1][-1] == clip["words"][-1]
            assert near(videos(guess["video"])[-1, -1], videos(clip["given"])[0, -1])
    assert {mode: walk[0] for mode, walk in data["walks"].items()} == {
        "understand": [1, 0],
        "generate": [0, 1],
        "joint": [0, 0],
    }
    assert all(walk[-1] == [1, 1] for walk in data["walks"].values())


def test_training_is_dense_where_the_samplers_walk():
    often = square.density("mixture", train.PRESETS["toy"])
    inside = often[1:-1, 1:-1]
    assert often[-1, 1:-1].min() > inside.median() < often[1:-1, -1].min()  # generate, understand
    flat = square.density("independent", train.Config())
    assert flat.min() > 0.9 and flat.max() == 1


def test_what_has_no_text_is_refused(made, tmp_path, capsys):
    out = tmp_path / "square.html"
    generator = str(made / "run" / "generator")
    said = refusal(capsys, square.main, "--checkpoint", generator, "--out", out)
    assert "stage generator" in said
    assert "none" in refusal(capsys, square.main, "--checkpoint", tmp_path / "none", "--out", out)
    assert not out.exists()


def shown(page):
    """The point, and what stands beside it."""
    now = page.inner_text("#now")
    x, y = (float(page.get_attribute("#point", name)) for name in ("cx", "cy"))
    assert now == f"τ video {x / 100:.1f}, τ text {1 - y / 100:.1f}"
    return now


def press(page, x, y):
    """Where (tau_v, tau_t) lies on the screen."""
    page.locator("#square").scroll_into_view_if_needed()
    box = page.locator("#square > rect").bounding_box()
    return box["x"] + x * box["width"], box["y"] + (1 - y) * box["height"]


def test_the_point_follows_mouse_and_keyboard(made, data, view):
    page = view(made / "square.html")
    assert shown(page) == "τ video 0.5, τ text 0.3"
    page.keyboard.press("ArrowRight")
    assert shown(page) == "τ video 0.6, τ text 0.3"
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert shown(page) == "τ video 0.6, τ text 1.0"
    page.mouse.move(*press(page, 0.2, 0.8))
    page.mouse.down()
    assert shown(page) == "τ video 0.2, τ text 0.8"
    page.mouse.move(*press(page, 0.7, -0.5))  # beyond the edge
    page.mouse.up()
    assert shown(page) == "τ video 0.7, τ text 0.0"
    page.mouse.move(*press(page, 0.1, 0.1))
    assert shown(page) == "τ video 0.7, τ text 0.0"

    page.select_option("#clip", index=2)
    page.select_option("#prompt", index=1)
    clip = data["clips"][2]
    guess = clip["guesses"][1]
    said = [word or "end" for word in guess["text"][0][7]]
    assert page.locator("#text .token").all_inner_texts() == said
    assert page.inner_text("#truth").endswith(clip["caption"])
    page.wait_for_selector('#guess[data-shown^="0 7 "]')
    url = page.evaluate("document.querySelector('#guess').toDataURL()")
    canvas = np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))
    assert np.array_equal(canvas[25:49, 50:74], videos(guess["video"])[0, 7, 5])


def test_a_finger_moves_the_point_and_a_walk_is_played_on_a_phone(made, data, view):
    page = view(made / "square.html", **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.touchscreen.tap(*press(page, 0.3, 0.6))
    assert shown(page) == "τ video 0.3, τ text 0.6"
    button = page.get_by_text("Play understand")
    button.tap()
    assert shown(page) == "τ video 1.0, τ text 0.0"
    assert button.get_attribute("aria-pressed") == "true"
    page.get_by_text("τ video 1.0, τ text 1.0").wait_for()
    assert shown(page) == "τ video 1.0, τ text 1.0"
    assert button.get_attribute("aria-pressed") == "false"


def take_picture(html, png, tau_v=0.2, tau_t=0.3):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"))
        page = chromium.new_page(viewport={"width": 940, "height": 1000})
        page.goto(Path(html).resolve().as_uri())
        page.evaluate(f"go({tau_v}, {tau_t}); document.activeElement.blur()")
        page.wait_for_selector(f'#guess[data-shown^="{10 * tau_t:.0f} {10 * tau_v:.0f} "]')
        page.locator(".panels").screenshot(path=png)


if __name__ == "__main__":
    take_picture(*sys.argv[1:])
