"""Two pages: what a sampler passes through (`sample.py --trajectory`), and how a run went (the
`report.html` of train.py).

Each is one HTML file with its pictures inside: it opens from file://, and asks no server and no
network for anything. The templates lie in templates/; what stands in {{ }} there is escaped.
"""

import base64
import io
import json
import math
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from engine.files import read_json, read_lines, write_text
from engine.video import to_pixels

WIDTH = 192  # pixels that a frame is reduced to where it is wider
STEPS = 65  # that a page shows of a longer trajectory
UNSURE = 0.5  # a token is called uncertain below this


def sheet(frames, columns, gap=0):
    """frames (3, T, H, W) in [-1, 1] -> one picture of all of them, `columns` a row, as a data URI.

    Lossless, unless the frames were wider than WIDTH.
    """
    pixels = to_pixels(frames)
    t, h, w = pixels.shape[:3]
    large = w > WIDTH
    if large:
        h, w = max(1, round(h * WIDTH / w)), WIDTH
    size = columns * (w + gap) - gap, math.ceil(t / columns) * (h + gap) - gap
    picture = Image.new("RGB", size, "steelblue")
    for i, frame in enumerate(pixels):
        row, column = divmod(i, columns)
        image = Image.fromarray(frame).resize((w, h))
        picture.paste(image, (column * (w + gap), row * (h + gap)))
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=not large, quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------- the trajectory of a sample


def trajectory(title, lead, about, steps):
    """The text of a page with a slider over the steps of one sample.

    title, lead: a heading and a sentence. about: (name, value) pairs. steps: dicts of "step", its
    number; "tau_v" and "tau_t" (None: there is no text stream); "video" and "text", each a dict of
    what there is: "state", on its way from noise to data, "guess", the data that the model expects
    from there, or "given"; and "sure", N certainties in [0, 1] of the text's guess, where there is
    one. Videos are frames (3, T, H, W) in [-1, 1], texts are N tokens: strings, or None for the
    end.
    """
    pictures, rows = {}, []  # steps that show the same frames share one picture
    for step in steps:
        video = {}
        for kind, frames in step["video"].items():
            video[kind] = pictures.setdefault(sheet(frames, 3, gap=1), len(pictures))
        rows.append(step | {"video": video})
    first_video = next(iter(steps[0]["video"].values()))
    return TEMPLATES.get_template("trajectory.html").render(
        title=title,
        lead=lead,
        about=about,
        frames=first_video.shape[1],
        first=steps[0],
        data={"steps": rows, "pictures": list(pictures), "unsure": UNSURE},
    )


# ---------------------------------------------------------------- the report of a run


def write_report(folder, shown, configuration):
    """Writes folder/report.html from the folder's metrics.jsonl, validation.jsonl, results.json and
    what validations left in val/, where they exist.

    configuration: name -> value. shown: what else the world's evaluation has to show, each part
    only where there is one:
        "accuracy": rows, dicts of name, seen, unseen, chance (shares), each (attribute -> share),
            clips and, where there is one, reference: "seen" and "unseen" -> (mean, the lowest share
            that is no worse)
        "reference": stage -> "video" and "text" -> losses of reference runs, (steps into the
            stage, lowest, highest)
        "confusion": attribute -> (its values, counts (values, values + 1)): a row is the truth, a
            column what was said, "nothing" last
        "gallery": dicts of mode, right (True, False or None: unknown), frames (3, T, H, W) in
            [-1, 1], and lines [(name, text)]
    """
    folder, results = Path(folder), {}
    metrics = read_lines(folder / "metrics.jsonl")
    if (folder / "results.json").exists():
        results = read_json(folder / "results.json")
    drift, validated = validations(folder)
    page = report(metrics, results, shown, configuration, drift, validated)
    write_text(folder / "report.html", page)


def write_gallery(folder, gallery):
    """Writes the gallery of a validation, see write_report, where the report will find it."""
    entries = [clip(entry) | {"mode": entry["mode"]} for entry in gallery]
    write_text(Path(folder) / "gallery.json", json.dumps(entries))


def validations(folder):
    """What a run's validations say: drift, see below, and (name, gallery) of each, newest first.

    drift: the video's loss by tenth of the clock, of the generator before text was trained, or of
    the first validation, and of the last one: "before" and "now", their steps, and "rows".
    """
    lines = [line for line in read_lines(folder / "validation.jsonl") if line.get("video_by_tenth")]
    drift = None
    if len(lines) > 1:
        now = lines[-1]
        before = next((x for x in reversed(lines) if x.get("stage") == "generator"), lines[0])
        pairs = zip(before["video_by_tenth"], now["video_by_tenth"])
        drift = {"before": before["step"], "now": now["step"], "rows": [*enumerate(pairs)]}
    files = sorted(folder.glob("val/step-*/gallery.json"), reverse=True)
    galleries = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return drift, [(file.parent.name, gallery) for file, gallery in zip(files, galleries)]


def report(metrics, results, shown, configuration, drift=None, validated=()):
    """The text of write_report's page. drift, validated: see validations()."""
    accuracy, reference = shown.get("accuracy", []), shown.get("reference", {})
    stages = groupby(metrics, lambda line: line["stage"])
    modes = groupby(shown.get("gallery", []), lambda entry: entry["mode"])
    # Without "out": the page lies there, or where the folder was moved to.
    configuration = {name: value for name, value in configuration.items() if name != "out"}
    return TEMPLATES.get_template("report.html").render(
        title=f"Uni-ViGU: {configuration.get('data')}, seed {configuration.get('seed')}",
        about=facts(metrics, results),
        configuration=configuration,
        banded=bool(reference),
        accuracy=accuracy,
        attributes=list(dict.fromkeys(name for row in accuracy for name in row["each"])),
        losses=results.get("loss", {}),
        held_out=results.get("split") != "train",
        curves=[curve(stage, list(lines), reference.get(stage, {})) for stage, lines in stages],
        confusions=[confusion(name, *found) for name, found in shown.get("confusion", {}).items()],
        gallery={mode: [clip(entry) for entry in entries] for mode, entries in modes},
        drift=drift,
        validated=validated,
    )


def facts(metrics, results):
    """What the report begins with: (name, value) pairs."""
    found = []
    if metrics:
        found.append(("steps", metrics[-1]["step"]))
    if "wall_s" in results:
        total, training = results["wall_s"] / 60, results["train_s"] / 60
        found.append(("minutes", f"{total:.1f} in all, {training:.1f} of them training"))
    if "clips" in results:
        found.append(("clips evaluated", results["clips"]))
    return found


def wilson(share, n):
    """The 95% confidence interval of a share of n clips (Wilson, 1927): (low, high).

    Of a mean of values in [0, 1] it is at least as wide as it need be.
    """
    z = 1.96
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def curve(stage, lines, reference):
    """A stage's losses as lines in a box of 300 x 170 at (44, 10), on a logarithmic scale.

    Neighbours are averaged where there are over 300 points. reference: see write_report; a band as
    far as the stage goes.
    """
    group, begin, end = math.ceil(len(lines) / 300), lines[0]["step"], lines[-1]["step"]
    points = {}
    for name in ("video", "text"):
        found = [(line["step"], line[name]) for line in lines if line.get(name)]
        groups = [found[i : i + group] for i in range(0, len(found), group)]
        if groups:
            points[name] = [tuple(sum(x) / len(x) for x in zip(*near)) for near in groups]
    bands = {}
    for name in points:
        known = [(begin + x, *losses) for x, *losses in reference.get(name, [])]
        bands[name] = [point for point in known if point[0] <= end and point[1] > 0]
    values = [y for line in points.values() for _, y in line] or [1]
    values += [y for known in bands.values() for _, *losses in known for y in losses]
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05

    def at(x, y):
        across = (x - begin) / max(1, end - begin)
        down = (high - math.log10(y)) / (high - low)
        return round(44 + 300 * across, 1), round(10 + 170 * down, 1)

    marks = [m * 10.0**k for k in range(-6, 5) for m in (1, 2, 3, 5)]
    ticks = [(at(begin, y)[1], f"{y:g}") for y in marks if low <= math.log10(y) <= high]
    drawn = []
    for name, line in points.items():
        first, last = (f"{y:.3g}" for _, y in (line[0], line[-1]))
        upper = [at(x, high) for x, _, high in bands[name]]
        lower = [at(x, low) for x, low, _ in reversed(bands[name])]
        drawn.append({"name": name, "points": [at(*p) for p in line], "band": upper + lower})
        drawn[-1] |= {"first": first, "last": last}
    return {"stage": stage, "begin": begin, "end": end, "ticks": ticks, "lines": drawn}


def confusion(name, values, counts):
    """An attribute's counts, each with how dark it is drawn: its share of the row, at most 45%."""
    heads = [*values, "nothing"] if counts[:, -1].any() else [*values]
    totals = counts.sum(1).clamp(min=1).tolist()
    rows = []
    for value, row, total in zip(values, counts.tolist(), totals):
        rows.append((value, [(n, round(45 * n / total)) for n in row[: len(heads)]]))
    return {"name": name, "heads": heads, "rows": rows}


def clip(entry):
    """A clip of the gallery: one picture of at most 32 of its frames, which the page animates."""
    frames = entry["frames"][:, :: math.ceil(entry["frames"].shape[1] / 32)]
    t, h, w = frames.shape[1:]
    width = 144 if w <= WIDTH else 172
    return {
        "right": entry["right"],
        "lines": entry["lines"],
        "frames": t,
        "width": width,
        "height": round(width * h / w),
        "picture": sheet(frames, t),
    }


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
TEMPLATES.globals["wilson"] = wilson
