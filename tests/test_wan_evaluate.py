"""wan.evaluate and wan.vbench: numbers against closed forms, and what is refused."""

import json
import math

import pytest
import torch

for module in ("diffusers", "transformers", "av", "ftfy", "pycocoevalcap"):
    pytest.importorskip(
        module, reason=f"{module} is not installed: pip install -r requirements-wan.txt"
    )

from conftest import refusal

import toy
from engine.video import write_video
from univigu import PRESETS, UniViGU
from wan import evaluate, vbench

A = "a small dog runs over green grass"
B = "two white boats cross the quiet bay"
C = "snow falls on an empty street tonight"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(video, caption, **more):
    return {"video": video, "caption": caption, **more}


def measured(tmp_path, *flags):
    out = tmp_path / "scores.json"
    evaluate.main([str(flag) for flag in (*flags, "--out", out)])
    return json.loads(out.read_text())


def compared(tmp_path, captions, references):
    captions = write(tmp_path / "captions.jsonl", *captions)
    references = write(tmp_path / "data.jsonl", *references)
    return measured(tmp_path, "--captions", captions, "--references", references)


# ---------------------------------------------------------------- against references


def test_equal_texts_have_the_largest_scores_and_disjoint_ones_none():
    found = evaluate.scores([A, B, C], [[A], [B], [C]])
    assert found == pytest.approx({"CIDEr-D": 10, "BLEU-4": 1, "ROUGE-L": 1})
    found = evaluate.scores([A, B, C], [[B], [C], [A]])
    assert found["CIDEr-D"] == found["ROUGE-L"] == 0 and found["BLEU-4"] < 1e-6


def test_scores_are_those_computed_by_hand():
    """ "a b c d e" for "a b c d f": 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours.

    The other clip, which is right, has 5, 4, 3 and 2. Every n-gram is in the references of one
    clip alone, so all weigh the same.
    """
    said, wanted = ["a b c d e", "v w x y z"], [["a b c d f"], ["v w x y z"]]
    found = evaluate.scores(said, wanted)
    shares = [9 / 10, 7 / 8, 5 / 6, 3 / 4]
    assert found["BLEU-4"] == pytest.approx(math.prod(shares) ** 0.25)
    assert found["ROUGE-L"] == pytest.approx((4 / 5 + 1) / 2)  # precision and recall are both 4/5
    cosines = [4 / 5, 3 / 4, 2 / 3, 1 / 2]
    assert found["CIDEr-D"] == pytest.approx((10 * sum(cosines) / 4 + 10) / 2)


def test_a_short_caption_is_penalised_and_the_best_of_several_references_counts():
    short = evaluate.scores(["a b c d", A], [["a b c d e f g h"], [A]])
    assert short["BLEU-4"] == pytest.approx(math.exp(1 - 15 / 11))  # all is right, 4 words lack
    recall, f = 1 / 2, 1 + 1.2**2
    assert short["ROUGE-L"] == pytest.approx((f * recall / (recall + 1.2**2) + 1) / 2)
    several = evaluate.scores([A, B], [[C, A], [B]])
    assert several["BLEU-4"] == pytest.approx(1) and several["ROUGE-L"] == pytest.approx(1)
    assert several["CIDEr-D"] == pytest.approx((5 + 10) / 2)  # the mean over references


def test_case_and_punctuation_do_not_count_and_inner_ones_stay():
    assert evaluate.words('The dog\'s "slow-motion" leap -- at 5 p.m.!') == (
        "the dog's slow-motion leap at 5 p m"
    )
    assert evaluate.words("It’s été, Ünal.") == "it's été ünal"
    found = evaluate.scores([A.upper() + ".", B], [[A.replace(" ", ", ")], [B]])
    assert found == pytest.approx({"CIDEr-D": 10, "BLEU-4": 1, "ROUGE-L": 1})


def test_clips_are_matched_by_video_and_window_and_the_rest_is_told(tmp_path, capsys):
    captions = [row("b", B), row("a", A, window=0), row("a", C, window=1), row("only", A)]
    references = [row("a", A), row("a", C, window=1, prompt="snow"), row("b", [B, A])]
    references += [row("b", C), row("left", C), row("gone", C)]
    found = compared(tmp_path, captions, references)
    assert found["captions"] == 4 and found["clips"] == 3 and found["ROUGE-L"] == pytest.approx(1)
    assert found["captions without references"] == 1 and "agreement" not in found
    assert found["references without a caption"] == 2
    assert found["CIDEr-D"] == pytest.approx((10 + 10 + 10 / 3) / 3)  # b's has three references
    said = capsys.readouterr().out
    assert "1 captions without references; 2 references without a caption" in said
    assert "CIDEr-D    7.778 of 10" in said and "not measured: --checkpoint" in said


def test_one_clip_has_no_cider_and_an_empty_caption_counts_as_wrong(tmp_path, capsys):
    found = compared(tmp_path, [row("a", A)], [row("a", A)])
    assert found["CIDEr-D"] is None and found["BLEU-4"] == pytest.approx(1)
    assert "needs two clips" in capsys.readouterr().out
    found = compared(tmp_path, [row("a", A), row("b", " ")], [row("a", A), row("b", B)])
    assert found["CIDEr-D"] == pytest.approx(5) and found["ROUGE-L"] == pytest.approx(0.5)
    assert "1 of 2 captions have no words" in capsys.readouterr().out


@pytest.mark.parametrize(
    "captions, references, words",
    [
        ("", "r", ["--captions", "captions.jsonl is empty"]),
        ("c", "", ["--references", "data.jsonl is empty"]),
        ("c{", "r", ["--captions", "captions.jsonl, line 2: line is not JSON"]),
        ("c", "r[]", ["--references", "data.jsonl, line 2: video is missing"]),
        ("c", "r{}", ["--references", "data.jsonl, line 2: video is missing"]),
        ("cc", "r", ["--captions", "captions.jsonl, line 2: a.mp4 has a caption already"]),
        ("c" + json.dumps(row("a", [A])), "r", ["--captions", "line 2: caption is missing"]),
        ("c", "r" + json.dumps(row("a", [])), ["--references", "line 2: caption is missing"]),
        ("c", "r" + json.dumps(row("a", [A, "?!"])), ["line 2: caption has no words"]),
        ("c", "r" + json.dumps(row("a", A, window=-1)), ["line 2: window is -1"]),
        ("c", json.dumps(row("x", A)), ["no clip in common", "a.mp4", "x"]),
    ],
)
def test_files_that_cannot_be_used_are_refused(captions, references, words, tmp_path, capsys):
    lines = {"c": json.dumps(row("a.mp4", B)), "r": json.dumps(row("a.mp4", A))}
    paths = tmp_path / "captions.jsonl", tmp_path / "data.jsonl"
    for path, text in zip(paths, (captions, references)):
        for letter, line in lines.items():
            while text.startswith(letter):
                text = text.removeprefix(letter)
                path.write_text((path.read_text() if path.exists() else "") + line + "\n")
        path.write_text((path.read_text() if path.exists() else "") + text)
    flags = "--captions", paths[0], "--references", paths[1]
    said = refusal(capsys, evaluate.main, *flags)
    assert said.startswith("wan.evaluate: error: ") and all(word in said for word in words), said


def test_flags_that_do_not_go_together_are_refused(tmp_path, capsys):
    here = write(tmp_path / "a.jsonl", row("a", A))
    for flags, words in (
        ([], "wanted --references, or --checkpoint"),
        (["--videos", tmp_path], "go together"),
        (["--checkpoint", tmp_path], "go together"),
        (["--checkpoint", tmp_path, "--videos", here], "is no folder"),
        (["--checkpoint", tmp_path, "--videos", tmp_path], "has no model.safetensors"),
        (["--references", tmp_path / "none.jsonl"], "none.jsonl cannot be read"),
        (["--references", here, "--out", here], "ends in .json"),
        (["--references", here, "--out", here / "x.json"], "cannot be written"),
    ):
        assert words in refusal(capsys, evaluate.main, "--captions", here, *flags)
    assert here.read_text() == json.dumps(row("a", A)) + "\n"


# ---------------------------------------------------------------- by the model


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with a toy checkpoint, videos and captions.jsonl; the model never saw anything."""
    root, world = tmp_path_factory.mktemp("toy"), toy.World()
    torch.manual_seed(0)
    checkpoint = root / "checkpoint"
    UniViGU(PRESETS["toy"]).save_pretrained(checkpoint)
    (checkpoint / "train.json").write_text(json.dumps({"stage": "refine"}))
    (checkpoint / "world.json").write_text(json.dumps(world.state))
    (root / "videos").mkdir()
    batch = world.dataset("seen").__getitems__(list(range(6)))
    rows = []
    for i, text in enumerate(world.tokenizer.decode(batch["caption"])):
        video = f"{i}.gif"
        write_video(root / "videos" / video, world.codec.decode(batch["z_v"][i : i + 1]), world.fps)
        rows.append(row(video, text))
    assert len({of["caption"] for of in rows}) == 6
    write(root / "captions.jsonl", *rows)
    return root


def asked(root, captions=None):
    captions = captions or root / "captions.jsonl"
    here = ["--captions", captions, "--checkpoint", root / "checkpoint"]
    return [str(flag) for flag in (*here, "--videos", root / "videos", "--device", "cpu")]


def test_a_model_that_sees_the_video_agrees_with_its_caption(clips, tmp_path, monkeypatch, capsys):
    """The texts' order, and which video goes with them, as a stub of the loss is given them."""
    world, seen = toy.World(), []
    own = {of["caption"] for of in map(json.loads, (clips / "captions.jsonl").open())}

    def losses(model, z_v, texts, *, reuse_video):
        said = world.tokenizer.decode(texts[0])
        seen.append(said)
        assert z_v.shape[1:] == world.shape and reuse_video and set(said) == own
        return torch.tensor([[float(k > 0) for k in range(len(said))]])

    monkeypatch.setattr(evaluate, "text_losses", losses)
    found = measured(tmp_path, *asked(clips))["agreement"]
    assert found["clips"] == 6 and found["share"] == 1
    assert found["chance"] == pytest.approx(1 / 6) and len({said[0] for said in seen}) == 6
    assert "agreement  1.000 of 6 clips, chance 0.167" in capsys.readouterr().out

    monkeypatch.setattr(evaluate, "text_losses", lambda *a, **k: torch.zeros(1, 6))
    assert measured(tmp_path, *asked(clips))["agreement"]["share"] == 0  # equal is not smaller


def test_a_model_that_knows_nothing_agrees_by_chance(clips, tmp_path):
    """Its losses hardly depend on the video: the easiest text is so for all, and one clip's own."""
    found = measured(tmp_path, *asked(clips))["agreement"]
    assert found["clips"] == 6 and found["share"] <= 2 / 6


def test_others_are_fifteen_that_differ_and_the_same_each_time():
    rows = {(f"{i}.mp4", 0): (i // 2, 7) for i in range(80)}  # two clips a text
    chosen = evaluate.choose(rows)
    for clip, own in rows.items():
        first, *others = chosen[clip]
        assert first == own and own not in others and len(set(others)) == 15
    assert chosen == evaluate.choose(dict(reversed(rows.items())))  # in any order of the file
    assert len({tuple(others) for _, *others in chosen.values()}) > 70


def test_what_the_model_cannot_be_asked_is_refused_or_left_out(clips, tmp_path, capsys):
    rows = [json.loads(line) for line in (clips / "captions.jsonl").open()]
    other = write(tmp_path / "other.jsonl", *rows[:2], row("../x.gif", rows[2]["caption"]))
    assert measured(tmp_path, *asked(clips, other))["agreement"]["clips"] == 2
    assert "left out: video leaves the folder" in capsys.readouterr().err
    same = write(tmp_path / "same.jsonl", *(row(of["video"], "a red circle") for of in rows))
    references = ["--references", str(clips / "captions.jsonl"), "--out", str(tmp_path / "s.json")]
    said = refusal(capsys, evaluate.main, *asked(clips, same), *references)
    assert "all captions are the same" in said
    assert json.loads((tmp_path / "s.json").read_text())["clips"] == 6  # what was known is kept
    odd = write(tmp_path / "odd.jsonl", rows[0], row("9.gif", "a zeppelin"))
    assert "caption of 9.gif: word is 'zeppelin'" in refusal(
        capsys, evaluate.main, *asked(clips, odd)
    )
    gone = write(
        tmp_path / "gone.jsonl", *(row(f"{k}.mp4", of["caption"]) for k, of in enumerate(rows))
    )
    assert "has none of the 6 videos" in refusal(capsys, evaluate.main, *asked(clips, gone))


# ---------------------------------------------------------------- names for VBench


def drawn(folder, *prompts):
    folder.mkdir()
    rows = []
    for i, prompt in enumerate(prompts):
        (folder / f"{i:05d}.mp4").write_text(f"video {i}")
        rows.append({"video": f"{i:05d}.mp4", "prompt": prompt})
    return write(folder / "index.jsonl", *rows)


def named(folder, out):
    return vbench.main(["--videos", str(folder), "--out", str(out)])


def test_videos_are_named_by_prompt_and_number(tmp_path, capsys):
    drawn(tmp_path / "drawn", "a cat.", "Été, à 3", "a cat.", "a cat.")
    named(tmp_path / "drawn", tmp_path / "new" / "named")
    found = {path.name: path.read_text() for path in (tmp_path / "new" / "named").iterdir()}
    assert found == {
        "a cat.-0.mp4": "video 0",
        "Été, à 3-0.mp4": "video 1",
        "a cat.-1.mp4": "video 2",
        "a cat.-2.mp4": "video 3",
    }
    assert "4 videos of 2 prompts" in capsys.readouterr().out
    assert len(list((tmp_path / "drawn").iterdir())) == 5


@pytest.mark.parametrize("prompt", ["left/right", "nul\0", "é" * 125])
def test_a_prompt_that_is_no_name_is_refused_before_anything_is_made(prompt, tmp_path, capsys):
    drawn(tmp_path / "drawn", "a cat", prompt)
    said = refusal(capsys, vbench.main, "--videos", tmp_path / "drawn", "--out", tmp_path / "named")
    assert "00001.mp4 cannot be named as its prompt" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn"]


def test_the_longest_prompt_that_fits_is_a_name(tmp_path):
    drawn(tmp_path / "drawn", "é" * 124)
    named(tmp_path / "drawn", tmp_path / "named")
    assert len(list((tmp_path / "named").iterdir())) == 1


def test_folders_that_cannot_be_named_are_refused(tmp_path, capsys):
    def said(out="named"):
        flags = "--videos", tmp_path / "drawn", "--out", tmp_path / out
        return refusal(capsys, vbench.main, *flags)

    assert "has no index.jsonl" in said()
    index = drawn(tmp_path / "drawn", "a cat")
    assert "exists" in said("drawn")
    index.write_text(index.read_text() + "{")
    assert "index.jsonl, line 2: line is not JSON" in said()
    (tmp_path / "drawn" / "00000.mp4").unlink()
    write(index, {"video": "00000.mp4", "prompt": "a cat"})
    assert "names 00000.mp4, which is not there" in said()
    write(index, {"video": "../index.jsonl", "prompt": "a cat"})
    assert "leaves the folder" in said()
    assert not (tmp_path / "named").exists()
