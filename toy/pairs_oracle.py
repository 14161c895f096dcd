"""Reads a clip of two shapes from its pixels, by geometry alone; -1 where it is not sure."""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange

from . import pairs
from .pairs import ATTRIBUTES, COLOUR, RADIUS, SPEED, H, T, W
from .shapes import coverage

STRONG = 0.4  # chroma below this may be noise
WHOLE = 0.85  # of its most visible mass: a frame in which nothing hides a shape
UNLIKE = 0.45  # a shape whose best drawing misses more of it than this is none

CHROMA = COLOUR - COLOUR.mean(1, keepdim=True)  # (colour, rgb)


def motions():
    """Every way to move: (speed, direction, event), and displacements (K, T, 2) in pixels."""
    kinds = []
    for speed in range(len(SPEED)):
        for direction in range(4):
            for event in (0, 5, *((3, 4) if direction < 2 else (1, 2))):
                kinds.append((speed, direction, event))
    attributes = torch.zeros(len(kinds), len(ATTRIBUTES), dtype=torch.int64)
    attributes[:, 3:] = torch.tensor(kinds)
    moved = pairs.paths(attributes.numpy(), torch.zeros(len(kinds), 2).numpy())
    return torch.tensor(kinds), torch.from_numpy(moved).float()


KINDS, MOVED = motions()


@dataclass
class Seen:
    """What is in B clips; the left one, by its start, is shape 0."""

    attributes: torch.Tensor  # (B, 2, 6) int64, columns as ATTRIBUTES, -1: not sure
    start: torch.Tensor  # (B, 2, 2) in pixels
    front: torch.Tensor  # (B,) the shape in front where they meet, else -1


def read(frames, events=True):
    """frames (B, 3, T, H, W) in [-1, 1] -> Seen. events: whether a shape may turn or stop.

    Raises ValueError for another shape.
    """
    if frames.ndim != 5 or frames.shape[1:] != (3, T, H, W):
        raise ValueError(f"frames have shape {tuple(frames.shape)}, wanted (B, 3, {T}, {H}, {W})")
    chroma = frames - frames.mean(1, keepdim=True)  # textures are grey
    colours = read_colours(chroma)  # (B, 2)
    alpha = read_alpha(chroma, colours)  # (B, 2, T, H, W)
    found, starts, drawn = [], [], []
    for k in range(2):
        motion, start, size, shape, template, off = read_one(alpha[:, k], alpha[:, 1 - k], events)
        speed, direction, event = KINDS[motion].unbind(1)
        row = torch.stack([size, colours[:, k], shape, speed, direction, event], 1)
        found.append(torch.where((off < UNLIKE)[:, None], row, -1))
        starts.append(start)
        drawn.append(template)
    attributes, start = torch.stack(found, 1), torch.stack(starts, 1)
    both = torch.minimum(*drawn)
    more = ((alpha[:, 0] - alpha[:, 1]) * both).sum((1, 2, 3))
    meets = both.sum((2, 3)).amax(1) > pairs.COVERED / 2
    front = torch.where(meets, (more < 0).long(), -1)
    swap = start[:, 0, 0] > start[:, 1, 0]
    attributes = torch.where(swap[:, None, None], attributes.flip(1), attributes)
    start = torch.where(swap[:, None, None], start.flip(1), start)
    front = torch.where(swap & (front >= 0), 1 - front, front)
    return Seen(attributes, start, front)


def read_colours(chroma):
    """The two colours that most of the coloured pixels have: (B, 3, T, H, W) -> (B, 2)."""
    along = einsum(chroma, CHROMA / CHROMA.norm(dim=1, keepdim=True), "b r t h w, k r -> b k t h w")
    strength, nearest = along.max(1)
    weight = (strength - STRONG).clamp(min=0)
    votes = torch.stack([(weight * (nearest == k)).sum((1, 2, 3)) for k in range(len(CHROMA))], 1)
    return votes.topk(2, 1).indices


def read_alpha(chroma, colours):
    """How much of each pixel either colour has: (B, 2, T, H, W), about 0 to 1."""
    vectors = CHROMA[colours]  # (B, 2, rgb)
    onto = einsum(chroma, vectors, "b r t h w, b k r -> b k t h w")
    gram = vectors @ vectors.mT  # (B, 2, 2)
    size, cross = gram[:, 0, 0], gram[:, 0, 1]
    opposite = (cross / size < -0.9)[:, None, None, None, None]  # such as red and cyan
    both = einsum(torch.linalg.pinv(gram), onto, "b k j, b j t h w -> b k t h w")
    alone = onto / rearrange(size, "b -> b 1 1 1 1")
    return torch.where(opposite, alone, both).clamp(0, 1.2)


def read_one(alpha, other, events):
    """alpha, other (B, T, H, W) -> motion, an index of MOVED, start, and what read_shape gives: of
    the likeliest motions, the one whose drawing is nearest."""
    found = []
    for motion, start in zip(*read_motion(alpha, events)):
        shape = read_shape(alpha, other, start[:, None] + MOVED[motion])
        found.append((motion, start, *shape))
    best = torch.stack([of[-1] for of in found]).argmin(0)  # (B,)
    rows = torch.arange(len(best))
    return [torch.stack(column)[best, rows] for column in zip(*found)]


def read_motion(alpha, events):
    """alpha (B, T, H, W) -> indices of MOVED (3, B), starts (3, B, 2): the motions whose
    displacements leave the centroids most alike, over the frames in which the shape is whole."""
    weight = (alpha - 0.25).clamp(min=0) + 1e-6
    mass = weight.sum((2, 3))  # (B, T)
    x = einsum(weight, torch.arange(W) + 0.5, "b t h w, w -> b t") / mass
    y = einsum(weight, torch.arange(H) + 0.5, "b t h w, h -> b t") / mass
    start = torch.stack([x, y], 2)[:, None] - MOVED  # (B, K, T, 2)
    sure = (mass > WHOLE * mass.amax(1, keepdim=True)).float() + 0.02  # (B, T)
    sure = (sure / sure.sum(1, keepdim=True))[:, None, :, None]
    mean = (start * sure).sum(2)  # (B, K, 2)
    error = ((start - mean[:, :, None]).square() * sure).sum((2, 3))  # (B, K)
    if not events:
        error = error + 1e3 * (KINDS[:, 2] > 0)
    best = error.topk(3, 1, largest=False).indices.T  # (3, B)
    return best, mean[torch.arange(best.shape[1]), best]


def read_shape(alpha, other, centres):
    """Draws every size and shape along the path, but where the other shape is; takes the nearest.

    alpha, other (B, T, H, W), centres (B, T, 2). Returns size and shape (B,), how they are drawn
    (B, T, H, W), and how much of what is there they miss (B,).
    """
    free = (1 - other.clamp(0, 1)).square()
    errors, drawn = [], []
    for radius in RADIUS:
        for name in pairs.FIRST["shape"]:
            template = coverage(name, radius.expand(len(alpha)), centres, H, W)
            drawn.append(template)
            errors.append(((alpha - template).square() * free).sum((1, 2, 3)))
    error, best = torch.stack(errors, 1).min(1)
    template = torch.stack(drawn, 1)[torch.arange(len(best)), best]
    there = ((alpha.square() + template.square()) / 2 * free).sum((1, 2, 3)).clamp(min=1e-6)
    kinds = len(pairs.FIRST["shape"])
    return best // kinds, best % kinds, template, error / there
