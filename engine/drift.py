"""Whether training keeps what the generator knew: its loss on held-out clips by tenth of the clock.

A video model's loss says little by itself: it is large near noise and near data, and other clips
have another one. Beside the untouched generator's, on the same clips, clocks and noise, it says
whether something was lost.
"""

import statistics

import torch

from univigu import interpolate, noise_like

TENTHS = 10


@torch.no_grad()
def losses_by_tenth(model, z_v1, c, first, seed):
    """The video's loss without a text stream (eq. 2) of each clip in two tenths of the clock.

    z_v1 (B, C, F, H, W) and c (B, L, width) of clips number `first` and on; clip i is measured in
    tenths i and i + 5, modulo 10, at clocks and with noise that `seed` decides. Returns pairs
    (tenth, mean squared error of an entry of the velocity).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
    numbers, found = torch.arange(first, first + len(z_v1)), []
    for apart in (0, TENTHS // 2):
        tenth = (numbers + apart) % TENTHS
        tau = (tenth + torch.rand(len(numbers), generator=generator)) / TENTHS
        tau = tau.to(z_v1.device)
        z_v, u_v = interpolate(noise_like(z_v1, generator), z_v1, tau)
        v_v, _ = model(z_v, None, tau, None, c)
        losses = (v_v - u_v).square().flatten(1).mean(1)
        found += zip(tenth.tolist(), losses.tolist())
    return found


def mean_by_tenth(pairs):
    """(tenth, loss) pairs -> the mean of each of the ten, None where there is none."""
    groups = [[loss for tenth, loss in pairs if tenth == k] for k in range(TENTHS)]
    return [round(statistics.fmean(losses), 6) if losses else None for losses in groups]
