"""BppAttack, poisoning data: colours are quantised to few levels.

Source: Wang et al. 2022, BppAttack, CVPR, arXiv 2205.13383; q = 8 levels per channel, without dithering (BackdoorBench's
setting). This is the trigger as data poisoning; the paper also controls training, with negative samples.
"""

from __future__ import annotations

from torch import Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError


class Bpp(Attack):
    """levels: values that a channel may take."""

    sample_specific = True

    def __init__(self, net, *, levels: int, **common):
        super().__init__(net, **common)
        if not 2 <= levels <= 128:
            raise UserError(f"attack.levels={levels}: expected 2 to 128 values per channel")
        self.steps = levels - 1

    def trigger(self, x: Tensor) -> Tensor:
        return (x * self.steps).round() / self.steps
