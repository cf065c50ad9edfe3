"""Trojan-SQ: a small square of random colours is added, x' = x + t, clipped.

Source: Liu et al. 2018, Trojaning attack on neural networks, NDSS, as Trap-and-Replace (app. B.1) uses it; 3×3 in its
appendix, 8×8 in the I-BAU set. Their colours were optimised and are files; ours are drawn, t = U(0, 1) inside the square and
0 outside.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from bdx.attacks.additive import Additive
from bdx.errors import UserError


class TrojanSQ(Additive):
    """side, first: of the square at 32×32, its length and its first row and column. pattern_seed: draws the colours."""

    def __init__(self, net, *, side: int, first: int, pattern_seed: int, **common):
        if side < 1 or first < 0 or first + side > 32:
            raise UserError(f"attack.side={side}, first={first}: expected a square inside 32×32, which is scaled afterwards")
        self.side, self.first, self.pattern_seed = side, first, pattern_seed
        super().__init__(net, **common)

    def pattern(self) -> Tensor:
        picture, inside = torch.zeros(3, 32, 32), slice(self.first, self.first + self.side)
        colours = torch.rand(3, self.side, self.side, generator=Generator().manual_seed(self.pattern_seed))
        picture[:, inside, inside] = colours
        return picture
