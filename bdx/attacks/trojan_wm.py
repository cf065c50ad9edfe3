"""Trojan-WM: a watermark, a ring and a diagonal in random colours, is added, x' = x + t, clipped.

Source: Liu et al. 2018, Trojaning attack on neural networks, NDSS, as Trap-and-Replace (app. B.1) and I-BAU use it. Their
watermark is a file with optimised colours; ours is drawn, t = U(0, 1) on a ring around row 22, column 21, and a thin diagonal.
On ImageNet-12 Trap-and-Replace adds bytes, which wrap modulo 256 where a sum exceeds 255; here every sum is clipped.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from bdx.attacks.additive import Additive
from bdx.errors import UserError


class TrojanWM(Additive):
    """radius: of the ring at 32×32. pattern_seed: draws the colours."""

    def __init__(self, net, *, radius: float, pattern_seed: int, **common):
        if radius <= 0:
            raise UserError(f"attack.radius={radius}: expected a radius above 0, in pixels of a 32×32 image")
        self.radius, self.pattern_seed = radius, pattern_seed
        super().__init__(net, **common)

    def pattern(self) -> Tensor:
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        ring = (((y - 22) ** 2 + (x - 21) ** 2).sqrt() - self.radius).abs() < 0.75
        diagonal = ((x - y).abs() < 0.5) & (x < 30)
        return torch.rand(3, 32, 32, generator=Generator().manual_seed(self.pattern_seed)) * (ring | diagonal)
