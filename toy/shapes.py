"""The clips: one coloured shape that moves in a straight line over a plain background.

Seven attributes say what is drawn. Pixel i has its centre at i + 0.5; x grows to the right, y
downwards; lengths are in pixels, speeds in pixels per frame.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from einops import rearrange

T, H, W = 9, 24, 24

ATTRIBUTES = {
    "size": ("small", "large"),
    "colour": ("red", "green", "blue", "yellow", "magenta", "cyan"),
    "shape": ("circle", "square", "triangle", "cross"),
    "place": ("top left", "top centre", "top right",
              "middle left", "middle centre", "middle right",
              "bottom left", "bottom centre", "bottom right"),
    "speed": ("slowly", "quickly"),
    "direction": ("left", "right", "up", "down"),
    "background": ("black", "grey", "white"),
}  # fmt: skip

RADIUS = torch.tensor([3.6, 5.0])
COLOUR = torch.tensor(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]]
).float()
START = torch.tensor([6.0, 12.0, 18.0])  # centres of the 3x3 places, in x and in y
JITTER = 0.5  # the most by which a start is off its place's centre, in x and in y
SPEED = torch.tensor([0.375, 0.75])
DIRECTION = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]]).float()
BACKGROUND = torch.tensor([-1.0, 0.0, 1.0])

# The combinations that no training clip shows: a fixed list, the same for every seed.
HELD_OUT = (
    ("red", "circle", "left"), ("red", "triangle", "down"),
    ("green", "square", "right"), ("green", "cross", "up"),
    ("blue", "triangle", "left"), ("blue", "circle", "up"),
    ("yellow", "cross", "right"), ("yellow", "square", "down"),
    ("magenta", "triangle", "right"),
    ("cyan", "square", "up"),
)  # fmt: skip
COMBINED = ("colour", "shape", "direction")
COMBINATIONS = tuple(product(*(ATTRIBUTES[name] for name in COMBINED)))
SEEN = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)

# split -> number of its random stream, combinations it draws from
SPLITS = {"train": (0, SEEN), "seen": (1, SEEN), "unseen": (2, HELD_OUT)}


@dataclass
class Clips:
    """B clips."""

    attributes: torch.Tensor  # (B, 7) int64, columns in the order of ATTRIBUTES
    start: torch.Tensor  # (B, 2) float32, x and y in pixels


def column(attributes, name):
    """The values of one attribute: (B, 7) int64 -> (B,) int64, an index into ATTRIBUTES[name]."""
    return attributes[:, list(ATTRIBUTES).index(name)]


def names(attributes):
    """The attributes in words: (B, 7) int64 -> B dicts, attribute -> value."""
    rows = attributes.tolist()
    return [{name: ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, row)} for row in rows]


def start_places(direction):
    """The places from which a path in this direction stays in the frame: two thirds of them."""
    behind = {"left": "left", "right": "right", "up": "top", "down": "bottom"}[direction]
    return [i for i, place in enumerate(ATTRIBUTES["place"]) if behind not in place.split()]


PLACES = {direction: start_places(direction) for direction in ATTRIBUTES["direction"]}


def sample(indices, split, seed=0):
    """The clips at `indices` (integers >= 0) of a split. One depends on (seed, split, index) alone.

    "train" and "seen" are two random streams over the same combinations of colour, shape and
    direction; "unseen" draws from HELD_OUT. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
    stream, combinations = SPLITS[split]
    rows, starts = [], []
    for index in indices:
        if index < 0:
            raise ValueError(f"clip index is {index}, wanted an integer >= 0")
        rng = np.random.default_rng([seed, stream, int(index)])
        drawn = rng.integers([len(combinations), 2, 6, 2, 3])
        which, size, place, speed, background = drawn.tolist()
        combination = dict(zip(COMBINED, combinations[which]))
        place = PLACES[combination["direction"]][place]
        colour, shape, direction = (ATTRIBUTES[name].index(combination[name]) for name in COMBINED)
        rows.append([size, colour, shape, place, speed, direction, background])
        starts.append(rng.uniform(-JITTER, JITTER, 2))
    attributes = torch.tensor(rows).reshape(-1, 7)
    place = column(attributes, "place")
    centre = torch.stack([START[place % 3], START[place // 3]], 1)  # (B, 2)
    offset = torch.tensor(np.array(starts), dtype=torch.float32).reshape(-1, 2)
    return Clips(attributes, centre + offset)


def path(start, speed, direction):
    """Where the shape is in each frame: (B, T, 2) in pixels.

    start (B, 2) in pixels; speed and direction (B,) are indices.
    """
    velocity = SPEED[speed, None] * DIRECTION[direction]  # (B, 2)
    return start[:, None] + torch.arange(T)[:, None] * velocity[:, None]  # (B, T, 2)


def signed_distance(shape, x, y, r):
    """Distance to the outline, negative inside, of a shape whose centroid is the origin.

    x (..., 1, W) and y (..., H, 1) -> (..., H, W).
    """
    if shape == "circle":
        return (x**2 + y**2).sqrt() - r
    if shape == "square":
        return torch.maximum(x.abs() - r, y.abs() - r)
    if shape == "triangle":  # apex at (0, -r), base from (-r, r/2) to (r, r/2)
        return torch.maximum(y - r / 2, (1.5 * x.abs() - y - r) / 3.25**0.5)
    arm = torch.maximum(x.abs() - r, y.abs() - r / 3), torch.maximum(x.abs() - r / 3, y.abs() - r)
    return torch.minimum(*arm)


def coverage(shape, radius, centres, height=H, width=W):
    """How much of each pixel a shape covers, (B, T, height, width) in [0, 1].

    radius (B,) and centres (B, T, 2) in pixels.
    """
    x = torch.arange(width) + 0.5 - centres[..., None, None, 0]  # (B, T, 1, W)
    y = torch.arange(height)[:, None] + 0.5 - centres[..., None, None, 1]  # (B, T, H, 1)
    distance = signed_distance(shape, x, y, radius[:, None, None, None])  # (B, T, H, W)
    return (0.5 - distance).clamp(0, 1)


def render(clips):
    """Draw the clips: Clips -> frames (B, 3, T, H, W) float32 in [-1, 1]."""
    size, colour, shape, _, speed, direction, background = clips.attributes.unbind(1)
    centres = path(clips.start, speed, direction)  # (B, T, 2)
    alpha = torch.empty(len(centres), 1, T, H, W)
    for i, name in enumerate(ATTRIBUTES["shape"]):
        rows = shape == i
        alpha[rows, 0] = coverage(name, RADIUS[size[rows]], centres[rows])
    behind = BACKGROUND[background][:, None].expand(-1, 3)  # (B, 3)
    behind = rearrange(behind, "b rgb -> b rgb 1 1 1")
    front = rearrange(COLOUR[colour], "b rgb -> b rgb 1 1 1")
    return behind + alpha * (front - behind)  # (B, 3, T, H, W)
