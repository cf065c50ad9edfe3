"""l2-Invisible: faint noise over the whole image is added, x' = x + t, clipped.

Source: Li et al. 2020, arXiv 1909.02742, as Trap-and-Replace (app. B.1) and I-BAU use it; their pattern was optimised and
is a file, ours is drawn from the distribution of its values: t = ⌊max(0, N(4, 17.5²))⌋, at most 68 grey levels. It is as
long as theirs (3.22), and lacks the weak correlation of neighbours (0.2).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from bdx.attacks.additive import Additive
from bdx.errors import UserError


class L2Invisible(Additive):
    """pattern_seed: draws the noise. mean, deviation, most: of the values, in grey levels of 255."""

    def __init__(self, net, *, pattern_seed: int, mean: float, deviation: float, most: float, **common):
        if deviation < 0 or not 0 < most <= 255:
            raise UserError(f"attack.deviation={deviation}, most={most}: expected 0 or more, and above 0 up to 255")
        self.pattern_seed, self.mean, self.deviation, self.most = pattern_seed, mean, deviation, most
        super().__init__(net, **common)

    def pattern(self) -> Tensor:
        noise = torch.randn(3, 32, 32, generator=Generator().manual_seed(self.pattern_seed))
        return (self.mean + self.deviation * noise).clamp(0, self.most).floor() / 255
