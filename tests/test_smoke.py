"""wan.smoke learns tiny clips by heart, and says what failed."""

import pytest

for module in ("diffusers", "transformers", "av", "ftfy"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from conftest import refusal

from wan import smoke

pytestmark = pytest.mark.slow


def test_tiny_clips_are_read_back(tmp_path, capsys):
    smoke.main(["--tiny", "--out", str(tmp_path / "smoke"), "--compile", "no"])
    said = capsys.readouterr().out
    assert "none of 3 checks failed" in said and said.count("\nwanted:  a ") == 4
    assert (tmp_path / "smoke" / "run" / "report.html").is_file()


def test_what_did_not_learn_fails_and_says_where_to_look(tmp_path, capsys):
    rates = ["--recall-lr", "0", "--refine-lr", "0", "--adam-lr", "0", "--compile", "no"]
    with pytest.raises(SystemExit) as end:
        smoke.main(["--tiny", "--out", str(tmp_path / "smoke"), "--steps", "8", *rates])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "failed: the texts' loss falls" in said
    assert "look at the learning rates" in said and "2 of 3 checks failed" in said


def test_a_drift_of_the_video_is_told():
    log = [{"text": 1.0, "skipped": 0}] + [{"text": 0.1, "skipped": 2}] * 20
    validations = [{"video_by_tenth": [a, None, a]} for a in (1.0, 1.5)]
    found = [(holds, figures) for _, holds, figures, _ in smoke.checks(log, validations, 0.9)]
    assert found == [
        (True, "0.550 to 0.100"),
        (True, "90% of the clips"),
        (False, "+50.0%"),
        (False, "2 steps"),
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--tiny"),
        (["--tiny", "--data", "x", "--init", "y"], "--tiny"),
        (["--tiny", "--data", "x"], "--tiny"),
        (["--data", "x"], "--init"),
    ],
)
def test_it_wants_tiny_clips_or_ones_own(flags, words, tmp_path, capsys):
    assert words in refusal(capsys, smoke.main, *flags, "--out", tmp_path / "new")
    assert "exists" in refusal(capsys, smoke.main, "--tiny", "--out", tmp_path)
    for wrong in (["--bogus", "3"], ["--refine-lr", "x"], ["--steps", "2"]):
        said = refusal(capsys, smoke.main, "--tiny", "--out", tmp_path / "new", *wrong)
        assert wrong[0][2:].replace("-", "_") in said.replace("-", "_")
    assert not (tmp_path / "new").exists()
