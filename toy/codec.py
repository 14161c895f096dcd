"""The video codec: linear, and causal in time as Wan's VAE, for which it stands in untrained.

A cell of 6 x 6 pixels, 3 colours and 4 frames is projected on C = 24 orthonormal vectors: a cosine
transform in time, height and width times a colour transform. The first frame is coded alone, as if
it were a group of four that stands still.
"""

import torch
from einops import einsum, rearrange

STRIDE_T, STRIDE = 4, 6  # frames and pixels of a cell

# The vectors kept, by falling deviation in the training clips. A name is a colour axis (L light
# against dark, a red against green, b yellow against blue), then a frequency: each t, y or x is
# half a wave more along that axis.
FIRST = (
    "L b a Ly Lx by ay bx ax Lyx byx ayx Lxx Lyy Lyxx Lyyx bxx byy axx ayy Lyyxx Lyyy Lxxx byxx"
).split()
GROUP = (
    "L b a Ly Lx by ay bx ax Lyx Lyy byx ayx Lxx byy Lt ayy axx bxx Lyxx Lyyx Lyyy Lty Ltx"
).split()

COLOUR_AXES = {"L": (1, 1, 1), "a": (1, -1, 0), "b": (1, 1, -2)}

DEVIATION = torch.tensor([
    15.7, 2.9, 2.8, 1.95, 1.9, 1.5, 1.5, 1.5, 1.45, 1.1, 0.85, 0.8,
    0.75, 0.73, 0.6, 0.57, 0.56, 0.55, 0.55, 0.55, 0.5, 0.5, 0.47, 0.45,
])  # fmt: skip


def weight(name, motion):
    """The background's lightness would hold nine tenths of the energy: it is divided by four.

    Without what changes within a group of frames, speed is seen too late or never: it counts
    `motion` times.
    """
    if name == "L":
        return 0.25
    return motion if "t" in name else 1.0


# z_v = projection * weight / unit, of an overall RMS of 1.09. Every hue and shade has its opposite,
# so means are zero.


def cosines(n):
    """The orthonormal cosine transform (DCT-II) of n samples: (n, n) float32, a frequency a row."""
    frequency, sample = torch.arange(n)[:, None], torch.arange(n) + 0.5
    waves = torch.cos(torch.pi / n * frequency * sample)
    return waves / waves.norm(dim=1, keepdim=True)


def basis(channels, frames):
    """The named vectors over a cell of so many frames: (c, rgb, t, y, x) float32, orthonormal."""
    vectors = []
    for name in channels:
        colour = torch.tensor(COLOUR_AXES[name[0]]).float()
        t = cosines(frames)[name.count("t")]
        y = cosines(STRIDE)[name.count("y")]
        x = cosines(STRIDE)[name.count("x")]
        vectors.append(einsum(colour / colour.norm(), t, y, x, "rgb, t, y, x -> rgb t y x"))
    return torch.stack(vectors)


def to_cells(frames, t):
    """Cut into cells of t frames: (B, 3, F*t, H*6, W*6) -> (B, F, H, W, rgb*t*y*x)."""
    pattern = "b rgb (f t) (h y) (w x) -> b f h w (rgb t y x)"
    return rearrange(frames, pattern, t=t, y=STRIDE, x=STRIDE)


def from_cells(cells, t):
    """The inverse of to_cells: (B, F, H, W, rgb*t*y*x) -> (B, 3, F*t, H*6, W*6)."""
    pattern = "b f h w (rgb t y x) -> b rgb (f t) (h y) (w x)"
    return rearrange(cells, pattern, rgb=3, t=t, y=STRIDE, x=STRIDE)


class Codec:
    """frames (B, 3, 1 + 4n, 6H, 6W) in [-1, 1] <-> z_v (B, C, 1 + n, H, W), where the input is.

    first, group: names of the vectors of a first frame and of a group; deviation: what the former
    have in training clips; motion: the weight of what changes within a group.
    """

    channels = len(GROUP)

    def __init__(self, first=FIRST, group=GROUP, deviation=DEVIATION, motion=5.0):
        flat = "c rgb t y x -> c (rgb t y x)"
        self.channels = len(group)
        self.first = rearrange(basis(first, 1), flat) * STRIDE_T**0.5  # (C, 108)
        self.group = rearrange(basis(group, STRIDE_T), flat)  # (C, 432)
        weights = [[weight(name, motion) for name in names] for names in (first, group)]
        self.weight = torch.tensor(weights)
        # One unit for all channels keeps fine ones weak: a flow settles them last.
        self.unit = (deviation * self.weight[0]).square().mean().sqrt()

    def latent_shape(self, frames, height, width):
        """(C, F, H, W) of z_v for a video of this many frames and pixels.

        Raises ValueError for sizes that it cannot code.
        """
        if frames % STRIDE_T != 1:
            raise ValueError(f"video has {frames} frames, wanted {STRIDE_T}n + 1 (1, 5, 9, ...)")
        if height % STRIDE or width % STRIDE or not height or not width:
            raise ValueError(f"video has {height} x {width} pixels, wanted multiples of {STRIDE}")
        return self.channels, 1 + frames // STRIDE_T, height // STRIDE, width // STRIDE

    def scale(self, z_v):
        """What z_v (B, C, F, H, W) was divided by: (C, F, 1, 1)."""
        first, group = (self.unit / self.weight).to(z_v)
        return torch.stack([first] + [group] * (z_v.shape[2] - 1), 1)[..., None, None]

    def encode(self, frames):
        """frames (B, 3, 1 + 4n, 6H, 6W) -> z_v (B, C, 1 + n, H, W), of an RMS of about 1.

        Raises ValueError for frames that are not (B, 3, T, H, W) or whose sizes do not fit.
        """
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise ValueError(f"frames have shape {tuple(frames.shape)}, wanted (B, 3, T, H, W)")
        self.latent_shape(*frames.shape[2:])
        first = to_cells(frames[:, :, :1], 1) @ self.first.T.to(frames)  # (B, 1, H, W, C)
        rest = to_cells(frames[:, :, 1:], STRIDE_T) @ self.group.T.to(frames)  # (B, n, H, W, C)
        z_v = rearrange(torch.cat([first, rest], 1), "b f h w c -> b c f h w")  # (B, C, F, H, W)
        return z_v / self.scale(z_v)

    def decode(self, z_v):
        """z_v (B, C, 1 + n, H, W) -> frames (B, 3, 1 + 4n, 6H, 6W), clamped to [-1, 1].

        Raises ValueError for latents that are not (B, C, F, H, W).
        """
        if z_v.ndim != 5 or z_v.shape[1] != self.channels:
            found = f"z_v has shape {tuple(z_v.shape)}"
            raise ValueError(f"{found}, wanted (B, {self.channels}, F, H, W)")
        z_v = z_v * self.scale(z_v)
        cells = rearrange(z_v, "b c f h w -> b f h w c")  # (B, F, H, W, C)
        first = from_cells(cells[:, :1] @ self.first.to(z_v) / STRIDE_T, 1)  # (B, 3, 1, 6H, 6W)
        rest = from_cells(cells[:, 1:] @ self.group.to(z_v), STRIDE_T)  # (B, 3, 4n, 6H, 6W)
        return torch.cat([first, rest], 2).clamp(-1, 1)
