"""Two pages to look at: what a sampler passes through (`sample.py --trajectory`), and how a run went (`report.html` of train.py).

Each is one HTML file with its pictures inside: it opens from file://, and asks no server and no network for anything.
"""

import base64
import io
import json
import math
from itertools import groupby
from pathlib import Path

from einops import rearrange
from jinja2 import DictLoader, Environment, StrictUndefined
from PIL import Image

WIDTH = 192   # pixels that a frame is reduced to where it is wider
STEPS = 65    # that a page shows of a longer trajectory
UNSURE = 0.5  # a token is called uncertain below this


def write(path, page):
    """The page as a file, complete or not there at all."""
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def to_pixels(frames):
    """frames (3, T, H, W) in [-1, 1] -> (T, H, W, 3) uint8 numpy."""
    return rearrange(frames.detach().float().cpu(), "rgb t h w -> t h w rgb").add(1).mul(127.5).round().clamp(0, 255).byte().numpy()


def sheet(frames, columns, gap=0):
    """frames (3, T, H, W) in [-1, 1] -> all of them in one picture, `columns` a row, as a data URI. Lossless, unless they were wider than WIDTH."""
    pixels = to_pixels(frames)
    (t, h, w), large = pixels.shape[:3], pixels.shape[2] > WIDTH
    h, w = (max(1, round(h * WIDTH / w)), WIDTH) if large else (h, w)
    picture = Image.new("RGB", (columns * (w + gap) - gap, math.ceil(t / columns) * (h + gap) - gap), "steelblue")
    for i, frame in enumerate(pixels):
        picture.paste(Image.fromarray(frame).resize((w, h)), (i % columns * (w + gap), i // columns * (h + gap)))
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=not large, quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------- the trajectory of a sample

def trajectory(title, lead, about, steps):
    """A page with a slider over the steps of one sample, headed by a title and a sentence; as text.

    about: (name, value) pairs. steps: dicts of step, its number; tau_v and tau_t (tau_t None: there is no text stream); video and text, each a dict of
    what is there: "state", on its way from noise to data, "guess", the data that the model expects from there, or "given"; sure. Videos are frames
    (3, T, H, W) in [-1, 1], texts N tokens: strings, or None for the end. sure: N certainties in [0, 1] of the text's guess, where there is one.
    """
    pictures, rows = {}, []                                         # steps that show the same frames share one picture
    for step in steps:
        rows.append(step | {"video": {kind: pictures.setdefault(sheet(frames, 3, gap=1), len(pictures)) for kind, frames in step["video"].items()}})
    frames = next(iter(steps[0]["video"].values())).shape[1]
    return TEMPLATES.get_template("trajectory").render(title=title, lead=lead, about=about, frames=frames, first=steps[0],
                                                       data={"steps": rows, "pictures": list(pictures), "unsure": UNSURE})


# ---------------------------------------------------------------- the report of a run

def write_report(folder, shown, configuration):
    """Writes folder/report.html from the folder's metrics.jsonl and results.json, as far as they are there.

    configuration: name -> value. shown: what else the world's evaluation has to show, each part only where there is one. "accuracy": rows of dicts, name,
    seen, unseen, chance (shares), each (attribute -> share), clips; "confusion": attribute -> (its values, counts (values, values + 1): the truth a row,
    what was said a column, "nothing" last); "gallery": dicts of mode, right (True, False or None: nobody knows), frames (3, T, H, W) in [-1, 1],
    lines [(name, text)].
    """
    folder = Path(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if (folder / "metrics.jsonl").exists() else []
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    write(folder / "report.html", report(metrics, results, shown, configuration))


def report(metrics, results, shown, configuration):
    """The page of write_report, as text."""
    configuration = {name: value for name, value in configuration.items() if name != "out"}  # the page lies there, or where it was moved to
    about = [("steps", metrics[-1]["step"])] if metrics else []
    about += [("minutes", f"{results['wall_s'] / 60:.1f} in all, {results['train_s'] / 60:.1f} of them training")] if "wall_s" in results else []
    about += [("clips evaluated", results["clips"])] if "clips" in results else []
    accuracy = shown.get("accuracy", [])
    return TEMPLATES.get_template("report").render(
        title=f"Uni-ViGU: {configuration.get('data')}, seed {configuration.get('seed')}", about=about, configuration=configuration, accuracy=accuracy, losses=results.get("loss", {}),
        curves=[curve(stage, list(lines)) for stage, lines in groupby(metrics, lambda line: line["stage"])],
        attributes=list(dict.fromkeys(name for row in accuracy for name in row["each"])), held_out=results.get("split") != "train",
        confusions=[confusion(name, *counted) for name, counted in shown.get("confusion", {}).items()],
        gallery={mode: [clip(entry) for entry in entries] for mode, entries in groupby(shown.get("gallery", []), lambda entry: entry["mode"])})


def wilson(share, n):
    """The 95% confidence interval of a share of n clips (Wilson, 1927): (low, high). Of a mean of values in [0, 1] it is at least as wide as it need be."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def curve(stage, lines):
    """A stage's losses as lines in a box of 300 x 170 at (44, 10), on a logarithmic scale; means of neighbours where there are over 300."""
    size, begin, end, points = math.ceil(len(lines) / 300), lines[0]["step"], lines[-1]["step"], {}
    for name in ("video", "text"):
        found = [(line["step"], line[name]) for line in lines if line.get(name)]
        if found:
            points[name] = [tuple(sum(x) / len(x) for x in zip(*found[i:i + size])) for i in range(0, len(found), size)]
    values = [y for line in points.values() for _, y in line] or [1]
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    at = lambda x, y: (round(44 + 300 * (x - begin) / max(1, end - begin), 1), round(10 + 170 * (high - math.log10(y)) / (high - low), 1))
    ticks = [(at(begin, tick)[1], f"{tick:g}") for tick in (m * 10.0**k for k in range(-6, 5) for m in (1, 2, 3, 5)) if low <= math.log10(tick) <= high]
    drawn = [dict(name=name, points=[at(*p) for p in line], first=f"{line[0][1]:.3g}", last=f"{line[-1][1]:.3g}") for name, line in points.items()]
    return dict(stage=stage, begin=begin, end=end, ticks=ticks, lines=drawn)


def confusion(name, values, counts):
    """An attribute's counts, with how dark each is, at most 45%: a share of its row."""
    heads, totals = [*values, *["nothing"] * bool(counts[:, -1].any())], counts.sum(1).clamp(min=1).tolist()
    rows = zip(values, counts.tolist(), totals)
    return dict(name=name, heads=heads, rows=[(value, [(n, round(45 * n / total)) for n in row[:len(heads)]]) for value, row, total in rows])


def clip(entry):
    """A clip of the gallery as the picture of at most 32 of its frames side by side, which the page's style moves through."""
    frames = entry["frames"][:, ::math.ceil(entry["frames"].shape[1] / 32)]
    t, h, w = frames.shape[1:]
    width = 144 if w <= WIDTH else 172
    return dict(right=entry["right"], lines=entry["lines"], frames=t, width=width, height=round(width * h / w), picture=sheet(frames, t))


# ---------------------------------------------------------------- the pages; what stands in {{ }} is escaped

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2128; --soft: #4f5863; --paper: #fff; --panel: #f2f4f7; --line: #848d97; --video: #0b58a8; --text: #963a00; --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebef; --soft: #abb4bf; --paper: #15181c; --panel: #20252b; --line: #717b87; --video: #84bdff; --text: #ffb582; --mark: #453400; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: .3rem 0; } p { max-width: 75ch; }
.soft, figcaption, dt { color: var(--soft); } .video { color: var(--video); } .text { color: var(--text); }
:focus-visible { outline: 3px solid var(--video); outline-offset: 2px; }
button { font: inherit; padding: .3rem .9rem; min-width: 5.5rem; color: inherit; background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; }
figure { margin: 0 0 1rem; } img, .clip { image-rendering: pixelated; border: 1px solid var(--line); } svg { font: 11px system-ui, sans-serif; fill: currentColor; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .scroll { overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { padding: .15rem .6rem; text-align: right; } tbody th { text-align: left; font-weight: 400; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; }
{% block style %}{% endblock %}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% block main %}{% endblock %}
</main>
<script>
{% block script %}{% endblock %}
</script>
</body>
</html>
"""

FACTS = """{% macro facts(rows) %}<dl>{% for name, value in rows %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>{% endmacro %}"""

TRAJECTORY = """{% extends "page" %}{% from "facts" import facts %}
{% set says = {"guess": "The model's guess: the data it expects from here", "state": "The state: where the sampler is on its way",
               "given": "Given, and clean all the way"} %}
{% block style %}
.controls { position: sticky; top: 0; padding: .6rem 0; background: var(--paper); display: flex; flex-wrap: wrap; gap: .8rem; align-items: center; }
.controls input { flex: 1; min-width: 12rem; accent-color: var(--video); } output { min-width: 19rem; font-variant-numeric: tabular-nums; }
.panels { gap: 1rem 2rem; } .panels > section { flex: 1 1 300px; } .panels > section:first-child { flex: 0 0 240px; } img { width: 300px; max-width: 100%; }
td { vertical-align: top; } td img { width: 110px; max-width: none; }
.tokens { margin: .3rem 0; line-height: 2.2; } td.tokens { line-height: 1.9; text-align: left; min-width: 22rem; }
.token { display: inline-block; line-height: 1.3; padding: 0 .35rem; margin-right: .25rem; background: var(--panel); white-space: pre; }
.token { border: 2px solid transparent; border-radius: .3rem; }
.changed { background: var(--mark); text-decoration: underline 2px; text-underline-offset: 3px; font-weight: 600; }
.unsure { border: 2px dashed var(--text); font-style: italic; }
.end, .after { color: var(--soft); font-size: .8rem; }
{% endblock %}
{% block main %}
<p>{{ lead }}</p>
{{ facts(about) }}
<section class="controls">
<label for="step">Step</label> <input id="step" type="range" min="0" value="0"> <button id="play">Play</button> <output id="now" for="step"></output>
</section>
<div class="row panels">
<section><h2>The two clocks</h2>
<svg id="clocks" viewBox="-32 -14 148 148" width="240" role="img">
<rect width="100" height="100" fill="none" stroke="var(--line)"/><polyline id="path" fill="none" stroke="var(--line)" stroke-dasharray="2 3"/>
<polyline id="walked" fill="none" stroke="currentColor" stroke-width="2.5"/>
<line id="down" stroke="var(--video)" stroke-dasharray="3 2"/><line id="across" stroke="var(--text)" stroke-dasharray="3 2"/><circle id="point" r="4.5"/>
<g class="video" text-anchor="middle"><text x="0" y="112">0</text><text x="100" y="112">1</text><text x="50" y="126">τ video</text></g>
<g class="text" text-anchor="end"><text x="-5" y="103">0</text><text x="-5" y="4">1</text>
<text transform="translate(-20 50) rotate(-90)" text-anchor="middle">τ text</text></g>
<text x="-12" y="126" fill="var(--soft)">noise</text><text x="100" y="-6" text-anchor="end" fill="var(--soft)">data</text>
</svg></section>
<section><h2 class="video">Video: {{ frames }} frames, row by row</h2>
{% for kind in first.video %}<figure><figcaption>{{ says[kind] }}</figcaption><img id="video-{{ kind }}" alt=""></figure>
{% endfor %}</section>
<section><h2 class="text">Text</h2>
{% for kind in first.text %}<figure><figcaption>{{ says[kind] }}</figcaption><p id="text-{{ kind }}" class="tokens" lang=""></p></figure>
{% else %}<p>This checkpoint has no text stream.</p>
{% endfor %}</section>
</div>
<p>Both modalities go from noise (τ = 0) to data (τ = 1), each on its own clock, drawn as a point in the square of both. At each step the network sees
both states and says where each one is heading: that is its guess, z + (1 − τ) v, here before guidance.
<span class="token changed">word</span> changed since the step shown before (underlined).
<span class="token unsure">word</span> uncertain (dashed): softmax over the embedding's rows gives it under half of what it gives an exact row, or, in the
discrete flow, under half. <span class="token end">end</span> ends the text; what comes after it is small, and · is padding.</p>
<details><summary>All steps</summary><div class="scroll"><table><thead><tr><th scope="col">step</th><th scope="col">τ video</th><th scope="col">τ text</th>
<th scope="col">video, {{ first.video | first }}</th>{% for kind in first.text %}<th scope="col">text, {{ kind }}</th>{% endfor %}</tr></thead>
<tbody id="all"></tbody></table></div></details>
<script type="application/json" id="data">{{ data | tojson }}</script>
{% endblock %}
{% block script %}
const at = id => document.getElementById(id), data = JSON.parse(at("data").textContent), steps = data.steps, slider = at("step"), play = at("play");
const point = s => [100 * s.tau_v, 100 - 100 * (s.tau_t ?? 0)], two = tau => tau === null ? "none" : tau.toFixed(2);

function tokens(s, before, kind) {
  const ends = s.text[kind].indexOf(null);
  return s.text[kind].map((word, k) => {
    const token = document.createElement("span"), given = kind === "given";
    token.textContent = word ?? "end";
    token.className = "token" + (word === null ? " end" : ends >= 0 && k > ends ? " after" : "")
      + (!given && word !== before.text[kind][k] ? " changed" : "") + (kind === "guess" && s.sure[k] < data.unsure ? " unsure" : "");
    if (kind === "guess") token.title = "certainty " + two(s.sure[k]);
    return token;
  });
}

function read(words) {
  const ends = words.indexOf(null);
  return words.slice(0, ends < 0 ? words.length : ends).join(" ");
}

function show(i) {
  const s = steps[i], before = steps[Math.max(0, i - 1)], [x, y] = point(s), set = (id, names) => { for (const n in names) at(id).setAttribute(n, names[n]); };
  const now = `step ${s.step} of ${steps.at(-1).step}, τ video ${two(s.tau_v)}, τ text ${two(s.tau_t)}`;
  for (const kind in s.video) {
    at("video-" + kind).src = data.pictures[s.video[kind]];
    at("video-" + kind).alt = `frames of the video, ${kind}, at step ${s.step}`;
  }
  for (const kind in s.text) at("text-" + kind).replaceChildren(...tokens(s, before, kind));
  set("walked", {points: steps.slice(0, i + 1).map(point).join(" ")});
  set("point", {cx: x, cy: y}), set("down", {x1: x, y1: y, x2: x, y2: 100}), set("across", {x1: x, y1: y, x2: 0, y2: y});
  at("clocks").setAttribute("aria-label", `the square of both clocks: τ video ${two(s.tau_v)}, τ text ${two(s.tau_t)}`);
  at("now").textContent = now;
  slider.setAttribute("aria-valuetext", now + (s.text.guess ? `. The guess reads: ${read(s.text.guess)}` : ""));
}

let timer = 0;
function pause() { clearInterval(timer); timer = 0; play.textContent = "Play"; }
function go(i) { slider.value = i; show(i); if (i === steps.length - 1) pause(); }
play.onclick = () => {
  if (timer) return pause();
  play.textContent = "Pause";
  timer = setInterval(() => go(+slider.value + 1), 500);
  go(+slider.value === steps.length - 1 ? 0 : +slider.value);
};
slider.max = steps.length - 1;
slider.oninput = () => { pause(); show(+slider.value); };
at("path").setAttribute("points", steps.map(point).join(" "));
steps.forEach((s, i) => {
  const row = at("all").insertRow(), picture = new Image();
  for (const number of [s.step, two(s.tau_v), two(s.tau_t)]) row.insertCell().textContent = number;
  picture.src = data.pictures[s.video.guess ?? s.video.given], picture.alt = "", row.insertCell().append(picture);
  for (const kind in s.text) {
    const cell = row.insertCell();
    cell.className = "tokens";
    cell.append(...tokens(s, steps[Math.max(0, i - 1)], kind));
  }
});
show(0);
slider.focus();
{% endblock %}
"""

REPORT = """{% extends "page" %}{% from "facts" import facts %}
{% macro measured(share, n) %}<td>{{ "%.3f" | format(share) }}<br><span class="soft interval">{{ "%.3f – %.3f" | format(*wilson(share, n)) }}</span></td>{% endmacro %}
{% block style %}
.card { width: 172px; font-size: .9rem; } .card dl { grid-template-columns: 1fr; gap: 0; } .card dd { margin-bottom: .3rem; }
.interval { font-size: .85rem; white-space: nowrap; }
.clip { background-size: calc(var(--n) * 100%) 100%; animation: play calc(var(--n) * .125s) steps(var(--n)) infinite; } .still .clip { animation-play-state: paused; }
@keyframes play { to { background-position-x: calc(-1 * var(--n) * var(--width)); } }
.confusion { margin-right: 1rem; } .confusion caption { text-align: left; font-weight: 600; } .confusion thead th { border: 0; padding: .2rem; vertical-align: bottom; }
.confusion thead span { writing-mode: vertical-rl; transform: rotate(180deg); font-weight: 400; }
.confusion td { background: color-mix(in srgb, var(--video) var(--share, 0%), var(--paper)); border: 1px solid var(--paper); min-width: 1.6rem; }
.confusion .mistake { box-shadow: inset 0 0 0 2px var(--text); font-weight: 600; }
.configuration { font-size: .9rem; } @media (min-width: 900px) { .configuration dl { grid-template-columns: repeat(3, max-content 1fr); } }
{% endblock %}
{% block main %}
{{ facts(about) }}

{% if curves %}
<h2>Losses while training</h2>
<p class="soft">Mean squared error of a velocity's entry (text in the discrete flow: loss of a token), on a logarithmic scale: <span class="video">video, solid</span>,
<span class="text">text, dashed</span>.</p>
<div class="row">
{% for curve in curves %}
<figure><figcaption>{{ curve.stage }}:
{%- for line in curve.lines %} {{ line.name }} {{ line.first }} to {{ line.last }}{{ "," if not loop.last }}{% else %} no loss was logged{% endfor %}</figcaption>
<svg viewBox="0 0 430 200" width="430" role="img" aria-label="losses of {{ curve.stage }}">
<rect x="44" y="10" width="300" height="170" fill="none" stroke="var(--line)"/>
{% for y, value in curve.ticks %}
<line x1="44" x2="344" y1="{{ y }}" y2="{{ y }}" stroke="var(--line)" stroke-opacity=".4"/><text x="40" y="{{ y + 4 }}" text-anchor="end">{{ value }}</text>
{% endfor %}
<text x="44" y="196">{{ curve.begin }}</text><text x="344" y="196" text-anchor="end">step {{ curve.end }}</text>
{% for line in curve.lines %}
<polyline points="{% for x, y in line.points %}{{ x }},{{ y }} {% endfor %}" fill="none" stroke="var(--{{ line.name }})" stroke-width="2"
stroke-dasharray="{{ "5 3" if line.name == "text" else "none" }}"/>
<text class="{{ line.name }}" x="{{ line.points[-1][0] + 5 }}" y="{{ line.points[-1][1] + 4 }}">{{ line.name }} {{ line.last }}</text>
{% endfor %}
</svg></figure>
{% endfor %}
</div>
{% endif %}

{% if accuracy %}
<h2>Accuracy</h2>
<p class="soft">Below each share: its 95% confidence interval (Wilson, over clips; for means over attributes it is wider than it need be). Seen: new clips of
combinations that were trained on. Unseen: of combinations that were not. Chance: the same answers held against another clip. The means of generation and
of joint.prompt_followed count colour, shape and direction, which a brief prompt names.</p>
<div class="scroll"><table><thead><tr><td></td><th scope="col">seen</th><th scope="col">unseen</th><th scope="col">chance</th></tr></thead><tbody>
{% for row in accuracy %}
<tr><th scope="row">{{ row.name }}</th>{{ measured(row.seen, row.clips) }}{{ measured(row.unseen, row.clips) }}<td>{{ "%.3f" | format(row.chance) }}</td></tr>
{% endfor %}
</tbody></table></div>
<h3>Each attribute, seen</h3>
<div class="scroll"><table><thead><tr><td></td>{% for name in attributes %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in accuracy if row.each %}
<tr><th scope="row">{{ row.name }}</th>{% for name in attributes %}{{ measured(row.each[name], row.clips) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

{% if losses %}
<h2>{{ "Losses on held-out clips" if held_out else "Losses on training clips: too few to hold some back" }}</h2>
<div class="scroll"><table><thead><tr><td></td>{% for split in losses %}<th scope="col">{{ split }}</th>{% endfor %}</tr></thead><tbody>
{% for name in losses.values() | first %}
<tr><th scope="row">{{ name }}</th>{% for column in losses.values() %}<td>{{ "%.4f" | format(column[name]) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

{% if confusions %}
<h2>What captions said, against the truth</h2>
<p class="soft">Clips of split seen. A row is the true value, a column what the model wrote; framed: mistakes.</p>
<div class="row">
{% for table in confusions %}
<table class="confusion"><caption>{{ table.name }}</caption>
<thead><tr><td></td>{% for head in table.heads %}<th scope="col"><span>{{ head }}</span></th>{% endfor %}</tr></thead><tbody>
{% for value, cells in table.rows %}
<tr><th scope="row">{{ value }}</th>
{% for n, share in cells %}
<td class="{{ "soft" if not n else "mistake" if table.heads[loop.index0] != value else "" }}" style="--share: {{ share }}%">{{ n }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% endfor %}
</div>
{% endif %}

{% if gallery %}
<h2>Gallery</h2>
<p><button id="pause">Pause</button></p>
{% for mode, clips in gallery.items() %}
<h3>{{ mode }}</h3>
<div class="row">
{% for clip in clips %}
<div class="card">
<div class="clip" role="img" aria-label="a clip of {{ clip.frames }} frames" style="--n: {{ clip.frames }}; --width: {{ clip.width }}px; width: {{ clip.width }}px;
height: {{ clip.height }}px; background-image: url({{ clip.picture }})"></div>
{% if clip.right is not none %}<strong{% if not clip.right %} class="text"{% endif %}>{{ "✓ right" if clip.right else "✗ wrong" }}</strong>{% endif %}
{{ facts(clip.lines) }}
</div>
{% endfor %}
</div>
{% if clips | map(attribute="right") | unique | list == [true] %}<p class="soft">No wrong case was found.</p>{% endif %}
{% endfor %}
{% endif %}

<h2>Configuration</h2>
<div class="configuration">{{ facts(configuration.items()) }}</div>
{% endblock %}
{% block script %}
{% if gallery %}
const button = document.getElementById("pause"), still = on => { document.body.classList.toggle("still", on); button.textContent = on ? "Play" : "Pause"; };
button.onclick = () => still(button.textContent === "Pause");
still(matchMedia("(prefers-reduced-motion: reduce)").matches);
{% endif %}
{% endblock %}
"""

TEMPLATES = Environment(loader=DictLoader(dict(page=PAGE, facts=FACTS, trajectory=TRAJECTORY, report=REPORT)), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                        undefined=StrictUndefined)
TEMPLATES.globals["wilson"] = wilson
