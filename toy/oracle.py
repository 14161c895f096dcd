"""The oracle: reads a clip's seven attributes back from its pixels, with no learning and no knowledge of how it was made."""

import torch
from einops import einsum, rearrange, reduce

from .shapes import ATTRIBUTES, BACKGROUND, COLOUR, DIRECTION, RADIUS, SPEED, START, H, T, W, coverage, path


def read(frames):
    """frames (B, 3, T, H, W) float in [-1, 1] -> attributes (B, 7) int64, columns in the order of ATTRIBUTES.

    Always answers, with the nearest clip that could have been drawn. Raises ValueError for frames of another shape.
    """
    if frames.ndim != 5 or frames.shape[1:] != (3, T, H, W):
        raise ValueError(f"frames have shape {tuple(frames.shape)}, wanted (B, 3, {T}, {H}, {W})")
    frames = frames.float().cpu()
    background, behind = read_background(frames)                                              # (B,), (B, 3)
    difference = frames - rearrange(behind, "b rgb -> b rgb 1 1 1")
    colour, alpha = read_colour(difference, behind)                                           # (B,), (B, T, H, W)
    speed, direction, start = read_motion(alpha)                                              # (B,), (B,), (B, 2)
    place = nearest(start[:, 1], START) * 3 + nearest(start[:, 0], START)
    size, shape = read_shape(alpha, path(start, speed, direction))
    found = dict(size=size, colour=colour, shape=shape, place=place, speed=speed, direction=direction, background=background)
    return torch.stack([found[name] for name in ATTRIBUTES], 1)                               # (B, 7)


def nearest(value, options):
    """Index of the option closest to each value: (B,), (K,) -> (B,) int64."""
    return (value[:, None] - options).abs().argmin(1)


def read_background(frames):
    """The border is nearly all background: its median colour over time, and the nearest shade -> (B,), (B, 3)."""
    border = torch.ones(H, W, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    behind = rearrange(frames[..., border], "b rgb t pixel -> b rgb (t pixel)").median(-1).values
    return nearest(behind.mean(1), BACKGROUND), behind


def read_colour(difference, behind):
    """The colour whose difference from the background points the same way, and how far each pixel goes along it.

    difference (B, 3, T, H, W) from the background, behind (B, 3) -> colour (B,), alpha (B, T, H, W) in [0, 1].
    """
    size = difference.square().sum(1, keepdim=True)                     # strong pixels count most: noise has no direction
    summed = reduce(difference * size, "b rgb t h w -> b rgb", "sum")
    steps = COLOUR - behind[:, None]                                                          # (B, colour, 3)
    colour = einsum(summed, steps / steps.norm(dim=2, keepdim=True), "b rgb, b colour rgb -> b colour").argmax(1)
    step = steps[torch.arange(len(steps)), colour]                                            # (B, 3)
    alpha = einsum(difference, step, "b rgb t h w, b rgb -> b t h w")
    return colour, (alpha / step.square().sum(1)[:, None, None, None]).clamp(0, 1)


def read_motion(alpha):
    """Follow the centroid: alpha (B, T, H, W) -> speed (B,), direction (B,), start (B, 2) in pixels.

    The line through the centroids gives the velocity; with the nearest one that is drawn, the start is their mean.
    """
    weight = (alpha - 0.25).clamp(min=0) + 1e-6                         # below a quarter it may be noise
    mass = reduce(weight, "b t h w -> b t", "sum")
    x = einsum(weight, torch.arange(W) + 0.5, "b t h w, w -> b t") / mass
    y = einsum(weight, torch.arange(H) + 0.5, "b t h w, h -> b t") / mass
    centres = torch.stack([x, y], 2)                                                          # (B, T, 2)
    time = torch.arange(T) - (T - 1) / 2
    velocity = einsum(centres, time / time.square().sum(), "b t xy, t -> b xy")
    along = velocity @ DIRECTION.T                                                            # (B, direction)
    direction = along.argmax(1)
    speed = nearest(along.amax(1), SPEED)
    start = (centres - path(torch.zeros(1, 2), speed, direction)).mean(1)                     # (B, 2)
    return speed, direction, start


def read_shape(alpha, centres):
    """Draw every size and shape along the path and take the closest: alpha (B, T, H, W), centres (B, T, 2) -> (B,), (B,)."""
    errors = []
    for radius in RADIUS:
        for shape in ATTRIBUTES["shape"]:
            template = coverage(shape, radius.expand(len(alpha)), centres)                    # (B, T, H, W)
            errors.append((alpha - template).square().sum((1, 2, 3)))
    best = torch.stack(errors, 1).argmin(1)                                                   # (B,)
    return best // len(ATTRIBUTES["shape"]), best % len(ATTRIBUTES["shape"])
