"""Random numbers that follow from an image: whoever stamps it, when, and beside which others, draws the same."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def draws(x: Tensor, count: int, seed: int) -> Tensor:
    """x (N,C,H,W) in [0,1], taken at 256 levels -> (N, count) in [0,1), uniform over images, the same on every device.

    Whole numbers modulo 2^64: a random linear form of the pixels, then a random odd multiple of it for each number.
    """
    g = Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-(2**63), 2**63 - 1, shape, generator=g).to(x.device)
    weights, odd, shift = whole(x.shape[1:].numel()), whole(count) | 1, whole(count)
    key = torch.cat([((p * 255).round().long().flatten(1) * weights).sum(1) for p in x.split(500)])
    key = (key ^ (key >> 29)) * 0x2545F4914F6CDD1D
    mixed = (key[:, None] ^ (key[:, None] >> 32)) * odd + shift
    return ((mixed >> 11) & (2**53 - 1)).double().div(2**53).float().clamp_max(1 - 2**-24)
