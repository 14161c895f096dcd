"""The oracle: reads a clip's seven attributes from its pixels, by geometry alone."""

import torch
from einops import einsum, rearrange, reduce

import toy.shapes as shapes

from .shapes import ATTRIBUTES, BACKGROUND, COLOUR, DIRECTION, RADIUS, SPEED, START, H, T, W

NEAR = 7  # pixels: no shape reaches further from its centre, whatever blur or a wavering path adds


def read(frames):
    """frames (B, 3, T, H, W) in [-1, 1] -> attributes (B, 7) int64, in the order of ATTRIBUTES.

    Always answers, with the nearest value of each attribute. Raises ValueError for another shape.
    """
    if frames.ndim != 5 or frames.shape[1:] != (3, T, H, W):
        raise ValueError(f"frames have shape {tuple(frames.shape)}, wanted (B, 3, {T}, {H}, {W})")
    batches = frames.float().cpu().split(32)  # fit the processor's cache: several times faster
    return torch.cat([read_batch(batch) for batch in batches])  # (B, 7)


def read_batch(frames):
    """As read, in one go."""
    background, behind = read_background(frames)  # (B,), (B, 3)
    difference = frames - rearrange(behind, "b rgb -> b rgb 1 1 1")
    colour, alpha = read_colour(difference, behind)  # (B,), (B, T, H, W)
    speed, direction, start = read_motion(alpha)  # (B,), (B,), (B, 2)
    place = nearest(start[:, 1], START) * 3 + nearest(start[:, 0], START)
    size, shape = read_shape(alpha, shapes.path(start, speed, direction))
    return torch.stack([size, colour, shape, place, speed, direction, background], 1)  # (B, 7)


def nearest(value, options):
    """Index of the option closest to each value: (B,), (K,) -> (B,) int64."""
    return (value[:, None] - options).abs().argmin(1)


def read_background(frames):
    """The nearest shade (B,), and the colour found (B, 3): the median of the border, over time."""
    border = torch.ones(H, W, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    behind = rearrange(frames[..., border], "b rgb t pixel -> b rgb (t pixel)").median(-1).values
    return nearest(behind.mean(1), BACKGROUND), behind


def read_colour(difference, behind):
    """The colour whose difference from the background points as the pixels' does.

    difference (B, 3, T, H, W) from the background, behind (B, 3) -> colour (B,), and how far each
    pixel goes along it, alpha (B, T, H, W): 0 background, 1 colour.
    """
    strength = difference.square().sum(1, keepdim=True)  # weak pixels may be noise
    summed = reduce(difference * strength, "b rgb t h w -> b rgb", "sum")
    steps = COLOUR - behind[:, None]  # (B, colour, 3)
    directions = steps / steps.norm(dim=2, keepdim=True)
    colour = einsum(summed, directions, "b rgb, b colour rgb -> b colour").argmax(1)
    step = steps[torch.arange(len(steps)), colour]  # (B, 3)
    step = step / step.square().sum(1, keepdim=True)
    return colour, einsum(difference, step, "b rgb t h w, b rgb -> b t h w")


def read_motion(alpha):
    """alpha (B, T, H, W) -> speed (B,), direction (B,), start (B, 2) in pixels.

    A line through the centroids gives the velocity. The start is where the nearest velocity that is
    drawn has the same mean position.
    """
    weight = (alpha.clamp(max=1) - 0.25).clamp(min=0) + 1e-6  # less than a quarter may be noise
    time = torch.arange(T) - (T - 1) / 2
    middle, velocity = fit_line(weight, time)
    line = middle[:, None] + time[:, None] * velocity[:, None]  # (B, T, 2)
    x = torch.arange(W) + 0.5 - line[..., None, None, 0]  # (B, T, 1, W)
    y = torch.arange(H)[:, None] + 0.5 - line[..., None, None, 1]  # (B, T, H, 1)
    near = (x.abs() < NEAR) & (y.abs() < NEAR)  # (B, T, H, W)
    middle, velocity = fit_line(weight * near + 1e-6, time)
    along = velocity @ DIRECTION.T  # (B, direction)
    direction, speed = along.argmax(1), nearest(along.amax(1), SPEED)
    travelled = shapes.path(torch.zeros(1, 2), speed, direction)  # (B, T, 2)
    return speed, direction, middle - travelled.mean(1)


def fit_line(weight, time):
    """Least squares through the centroids of weight (B, T, H, W).

    Returns the position at time 0 and the velocity, (B, 2) each.
    """
    mass = reduce(weight, "b t h w -> b t", "sum")
    x = einsum(weight, torch.arange(W) + 0.5, "b t h w, w -> b t") / mass
    y = einsum(weight, torch.arange(H) + 0.5, "b t h w, h -> b t") / mass
    centres = torch.stack([x, y], 2)  # (B, T, 2)
    return centres.mean(1), einsum(centres, time / time.square().sum(), "b t xy, t -> b xy")


def read_shape(alpha, centres):
    """Draws every size and shape along the path, and takes the closest: (B,) and (B,).

    alpha (B, T, H, W), centres (B, T, 2). They are drawn as pale as the video is, judged by the
    four strongest pixels of each frame: else a pale large shape would be nearest to a small one.
    All have the same contrast, since one fitted to each would let wrong shapes explain blur.
    """
    strongest = rearrange(alpha, "b t h w -> b t (h w)").topk(4, 2).values  # (B, T, 4)
    contrast = strongest.mean((1, 2)).clamp(0.2, 1)  # (B,)
    errors = []
    for radius in RADIUS:
        for shape in ATTRIBUTES["shape"]:
            template = shapes.coverage(shape, radius.expand(len(alpha)), centres)  # (B, T, H, W)
            template = template * rearrange(contrast, "b -> b 1 1 1")
            errors.append((alpha - template).square().sum((1, 2, 3)))
    best = torch.stack(errors, 1).argmin(1)  # (B,)
    return best // len(ATTRIBUTES["shape"]), best % len(ATTRIBUTES["shape"])
