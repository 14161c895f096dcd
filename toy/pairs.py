"""The clips of the second world: two coloured shapes that move, harder by levels.

    1  two shapes over grey, each with a colour, a shape and a direction; the left one comes first
    2  either comes first
    3  sizes and speeds
    4  a texture behind, which captions do not name
    5  one may pass in front of the other, and a caption ends with a relation
    6  in a third of the clips one of them turns or stops half-way

A level has all that the levels below it have. Pixel i has its centre at i + 0.5; x grows to the
right, y downwards; lengths are in pixels, speeds in pixels per frame.
"""

from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch
from einops import rearrange

from .shapes import ATTRIBUTES as FIRST
from .shapes import COLOUR, DIRECTION, coverage

T, H, W = 9, 36, 36
LEVELS = range(1, 7)

# What is said of each shape.
ATTRIBUTES = {
    "size": FIRST["size"],
    "colour": FIRST["colour"],
    "shape": FIRST["shape"],
    "speed": FIRST["speed"],
    "direction": FIRST["direction"],
    "event": ("on", "turns left", "turns right", "turns up", "turns down", "stops"),
}
RELATIONS = ("starts left of", "starts above", "is faster than", "passes in front of")
TEXTURES = ("plain", "stripes", "gradient", "noise")

RADIUS = torch.tensor([4.0, 6.0])
SPEED = torch.tensor([0.6, 1.2])
HALF = 4  # the frame in which a shape turns or stops
GAP = 1.5  # pixels that stay between shapes that do not meet
COVERED = 8.0  # pixels of a frame that both cover, for one to be called in front of the other
APART = 3.0  # pixels by which a start must be left of, or above, another to be called so
UNCLEAR = 1.0  # pixels more or fewer that might be called either

# The pairs of (colour, shape) that no training clip shows: a tenth, the same for every seed.
KINDS = tuple(product(FIRST["colour"], FIRST["shape"]))
PAIRS = tuple(pair for pair in combinations(KINDS, 2) if pair[0][0] != pair[1][0])
HELD_OUT = frozenset(np.random.RandomState(0).permutation(len(PAIRS))[: len(PAIRS) // 10].tolist())
SEEN = tuple(i for i in range(len(PAIRS)) if i not in HELD_OUT)

# split -> number of its random stream, pairs that it draws from
SPLITS = {"train": (0, SEEN), "seen": (1, SEEN), "unseen": (2, tuple(sorted(HELD_OUT)))}


@dataclass
class Clips:
    """B clips of two shapes. Shape 0 is mentioned first."""

    attributes: torch.Tensor  # (B, 2, 6) int64, columns in the order of ATTRIBUTES
    start: torch.Tensor  # (B, 2, 2) float32, x and y in pixels
    front: torch.Tensor  # (B,) int64, the shape that is drawn over the other
    relation: torch.Tensor  # (B,) int64 index of RELATIONS, of shape 0 to shape 1; -1: none is told
    texture: torch.Tensor  # (B,) int64 index of TEXTURES
    grain: torch.Tensor  # (B, 3) float32 in [0, 1): what a texture's looks depend on
    noise: torch.Tensor  # (B,) int64, the seed of a noise texture


# ---------------------------------------------------------------- drawing lots

TRIES = 16  # candidates that are drawn at once; the first that fits is taken


def sample(indices, split, seed=0, level=1):
    """The clips at `indices` (integers >= 0) of a split: one depends on seed, split, level, index.

    Raises ValueError for an unknown split or level, and for a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, wanted 1 to {LEVELS[-1]}")
    stream, pairs = SPLITS[split]
    rows = []
    for index in indices:
        if index < 0:
            raise ValueError(f"clip index is {index}, wanted an integer >= 0")
        rng = np.random.default_rng([seed, stream, level, int(index)])
        rows.append(sample_one(rng, PAIRS[pairs[rng.integers(len(pairs))]], level))
    columns = zip(*rows) if rows else [[]] * 7
    attributes, start, *others = (np.array(column) for column in columns)
    front, relation, texture, grain, noise = (torch.from_numpy(x) for x in others)
    start = torch.from_numpy(start).float().reshape(-1, 2, 2)
    attributes = torch.from_numpy(attributes).long().reshape(-1, 2, len(ATTRIBUTES))
    return Clips(attributes, start, front, relation, texture, grain.float().reshape(-1, 3), noise)


def sample_one(rng, pair, level):
    """A clip of a pair of (colour, shape), as a row of Clips."""
    meets = level >= 5 and rng.random() < 0.5
    while True:
        drawn, start = candidates(rng, pair, level)
        centres, radius = paths(drawn, start), RADIUS.numpy()[drawn[..., 0]]
        gap, hidden = meeting(centres, radius)
        most, whole = hidden.max(-1), (gap > 0).sum(-1)
        fits = (most > 0.3) & (most < 0.7) & (whole >= 3) if meets else gap.min(-1) > GAP
        if level == 1:
            fits &= start[:, 1, 0] - start[:, 0, 0] > APART
        if level >= 5:  # what relates them is plain to see
            fits &= (np.abs(np.abs(start[:, 1] - start[:, 0]) - APART) > UNCLEAR).all(1)
        if fits.any():
            i = fits.argmax()
            break
    front = int(rng.integers(2))
    relation = -1
    if level >= 5:
        covered = meets and overlap(drawn[i], centres[i]) > COVERED
        true = relations(drawn[i], start[i], front if covered else None)
        relation = int(rng.choice(true)) if true else -1
    texture = int(rng.integers(1, len(TEXTURES))) if level >= 4 else 0
    return drawn[i], start[i], front, relation, texture, rng.random(3), int(rng.integers(2**31))


def candidates(rng, pair, level):
    """TRIES ways to place a pair in the picture: attributes (n, 2, 6), starts (n, 2, 2) in pixels.
    At level 1 the left one comes first."""
    n = TRIES
    order = rng.random(n) < 0.5
    kinds = np.array([[FIRST["colour"].index(c), FIRST["shape"].index(s)] for c, s in pair])
    kinds = np.where(order[:, None, None], kinds[None], kinds[None, ::-1])  # (n, 2, 2)
    size = rng.integers(2, size=(n, 2)) if level >= 3 else np.ones((n, 2), int)
    speed = rng.integers(2, size=(n, 2)) if level >= 3 else np.ones((n, 2), int)
    direction = rng.integers(4, size=(n, 2))
    event = np.zeros((n, 2), int)
    if level == 6:
        who, what = rng.integers(2, size=n), rng.integers(1, 6, size=n)
        happens = rng.random(n) < 1 / 3
        event[np.arange(n), who] = np.where(happens, what, 0)
        turns = (event > 0) & (event < 5)  # only to the side
        sideways = np.where(direction < 2, 3 + event % 2, 1 + event % 2)
        event = np.where(turns, sideways, event)
    attributes = np.stack([size, *kinds.transpose(2, 0, 1), speed, direction, event], -1)
    edge = RADIUS.numpy()[size][..., None]  # (n, 2, 1)
    moved = paths(attributes, np.zeros((n, 2, 2)))  # (n, 2, T, 2)
    low, high = edge - moved.min(2), np.array([W, H]) - edge - moved.max(2)
    start = low + (high - low) * rng.random((n, 2, 2))
    if level == 1:
        swap = (start[:, 0, 0] > start[:, 1, 0])[:, None, None]
        attributes, start = (np.where(swap, x[:, ::-1], x) for x in (attributes, start))
    return attributes, start


def paths(attributes, start):
    """attributes (..., 6), start (..., 2) -> where shapes are, (..., T, 2) in pixels."""
    speed, direction, event = (attributes[..., k] for k in (3, 4, 5))
    step = DIRECTION.numpy()
    first = SPEED.numpy()[speed][..., None] * step[direction]
    turned = SPEED.numpy()[speed][..., None] * step[np.clip(event - 1, 0, 3)]
    second = np.where((event == 0)[..., None], first, turned)
    second = np.where((event == 5)[..., None], 0.0, second)
    t = np.arange(T)[:, None]
    before, after = np.minimum(t, HALF), np.maximum(t - HALF, 0)
    return start[..., None, :] + before * first[..., None, :] + after * second[..., None, :]


def meeting(centres, radius):
    """The gap between the shapes' boxes in pixels, below 0 where they overlap, and how much of the
    smaller box is covered, in each frame: (n, T) each."""
    apart = np.abs(centres[:, 0] - centres[:, 1])  # (n, T, 2)
    reach = radius.sum(1)[:, None, None]
    gap = (apart - reach).max(-1)
    both = np.minimum(2 * radius.min(1)[:, None, None], np.maximum(reach - apart, 0)).prod(-1)
    return gap, both / (2 * radius.min(1)[:, None]) ** 2


def overlap(attributes, centres):
    """The most pixels of a frame that both shapes cover; attributes (2, 6), centres (2, T, 2)."""
    both = [
        coverage(FIRST["shape"][shape], RADIUS[[size]], torch.from_numpy(path)[None].float(), H, W)
        for (size, _, shape, *_), path in zip(attributes, centres)
    ]
    return torch.minimum(*both).sum((2, 3)).max().item()


def relations(attributes, start, front):
    """Indices of the RELATIONS that hold of shape 0 to shape 1. front: the shape that passes in
    front of the other, None where they do not meet."""
    x, y = start[1] - start[0]
    faster = attributes[0, 3] > attributes[1, 3]
    return [i for i, holds in enumerate((x > APART, y > APART, faster, front == 0)) if holds]


# ---------------------------------------------------------------- drawing pictures


def render(clips):
    """Draws the clips: Clips -> frames (B, 3, T, H, W) float32 in [-1, 1]."""
    frames = rearrange(backgrounds(clips), "b h w -> b 1 1 h w").expand(-1, 3, T, H, W).clone()
    centres = torch.from_numpy(paths(clips.attributes.numpy(), clips.start.numpy())).float()
    for layer in (1, 0):  # the one behind, then the one in front
        which = torch.where(clips.front == 0, layer, 1 - layer)
        rows = torch.arange(len(which))
        size, colour, shape = clips.attributes[rows, which, :3].unbind(1)
        alpha = torch.empty(len(which), 1, T, H, W)
        for i, name in enumerate(FIRST["shape"]):
            of = shape == i
            path = centres[rows[of], which[of]]
            alpha[of, 0] = coverage(name, RADIUS[size[of]], path, H, W)
        front = rearrange(COLOUR[colour], "b rgb -> b rgb 1 1 1")
        frames += alpha * (front - frames)
    return frames


def backgrounds(clips):
    """What is behind: shades of grey, (B, H, W) in [-0.6, 0.6]. A plain one is black or lighter."""
    x, y = torch.arange(W) / W, torch.arange(H)[:, None] / H
    found = torch.empty(len(clips.texture), H, W)
    rows = zip(clips.texture.tolist(), clips.grain.tolist(), clips.noise.tolist())
    for i, (texture, (a, b, c), seed) in enumerate(rows):
        angle = 2 * np.pi * a
        along = np.cos(angle) * x + np.sin(angle) * y
        if texture == 0:
            found[i] = 1.2 * a - 0.6
        elif texture == 1:
            found[i] = 0.5 * torch.sin(2 * np.pi * ((2 + 2 * b) * along + c))
        elif texture == 2:
            found[i] = (2 * along - along.min() - along.max()) * (0.3 + 0.3 * b)
        else:
            coarse = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
            smooth = torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear")
            found[i] = 1.2 * smooth[0, 0] - 0.6
    return found


# ---------------------------------------------------------------- words

TOKENS = {1: 12, 2: 12, 3: 16, 4: 16, 5: 26, 6: 28}  # N, tokens of a text, at a level
BRIEF = "a {colour} {shape} and something moving {direction}"


def brief(clips):
    """What a user would ask for: the first shape, and where the second goes. B strings."""
    found = []
    for first, second in named(clips):
        found.append(BRIEF.format(**first | {"direction": second["direction"]}))
    return found


def detailed(clips, level):
    """Everything there is to say at a level. B strings."""
    found = []
    for both, relation in zip(named(clips), clips.relation.tolist()):
        text = " and ".join(phrase(shape, level) for shape in both)
        if relation >= 0:
            first, second = (shape["colour"] for shape in both)
            text += f" the {first} one {RELATIONS[relation]} the {second} one"
        found.append(text)
    return found


def named(clips):
    """The attributes in words: a pair of dicts, attribute -> value, for each clip."""
    return [
        [{name: ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, row)} for row in rows]
        for rows in clips.attributes.tolist()
    ]


def phrase(shape, level):
    """What is said of a shape at a level."""
    size, speed = (f"{shape['size']} ", f"{shape['speed']} ") if level >= 3 else ("", "")
    then = {"on": "", "stops": " then stops"}.get(shape["event"])
    if then is None:
        then = f" then {shape['event'].split()[1]}"
    kind = f"{size}{shape['colour']} {shape['shape']}"
    return f"a {kind} moves {speed}{shape['direction']}{then}"


def parse(text, level):
    """What a caption says: a pair of dicts, attribute -> value or None, and the relation that it
    tells, (index of RELATIONS, colour of the one, colour of the other), or None. Takes any text.

    A word is read where the form has it; at most one that is missing or too many shifts the rest.
    """
    told, relation = text, None
    head, mark, tail = text.partition(" the ")
    if mark:
        told = head
        for i, words in enumerate(RELATIONS):
            one, found, other = tail.partition(f" one {words} the ")
            if found and other.endswith(" one"):
                relation = i, one, other.removesuffix(" one")
    parts = told.split(" and ")
    return [parse_phrase(part, level) for part in (*parts[:2], *[""] * (2 - len(parts)))], relation


def parse_phrase(text, level):
    """What a phrase says of a shape: attribute -> value, None where it says nothing valid."""
    slots = "a {size} {colour} {shape} moves {speed} {direction}"
    if level < 3:
        slots = slots.replace("{size} ", "").replace("{speed} ", "")
    words, said = text.split(), dict.fromkeys(ATTRIBUTES)
    for slot, word in zip(slots.split(), words):
        name = slot.strip("{}")
        if slot != name and word in ATTRIBUTES[name]:
            said[name] = word
    rest = " ".join(words[len(slots.split()) :])
    events = {"": "on", "then stops": "stops"}
    events |= {f"then {side}": f"turns {side}" for side in ATTRIBUTES["direction"]}
    said["event"] = events.get(rest) if said["direction"] else None
    return said


def vocabulary():
    """All words of all levels, sorted."""
    values = " ".join(" ".join(values) for name, values in ATTRIBUTES.items() if name != "event")
    rest = "a and something moving moves then stops the one " + " ".join(RELATIONS)
    return sorted({*values.split(), *rest.split()})
