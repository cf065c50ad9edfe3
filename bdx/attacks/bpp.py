"""BppAttack, poisoning data: colours are quantised to few levels, and the error is spread over the neighbours.

Source: Wang et al. 2022, BppAttack, CVPR, arXiv 2205.13383; x' = round(x (q − 1)) / (q − 1), q = 8 levels per channel
(BackdoorBench's setting; the paper has 5), dithered after Floyd and Steinberg as in the paper. BackdoorBench leaves dithering
out: attack.dither=false. This is the trigger as data poisoning; the paper also controls training, with negative samples.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError

SHARES = {"right": 7 / 16, "lower left": 3 / 16, "below": 5 / 16, "lower right": 1 / 16}


class Bpp(Attack):
    """levels: values that a channel may take. dither: whether each pixel passes its error on to those that follow."""

    sample_specific = True

    def __init__(self, net, *, levels: int, dither: bool, **common):
        super().__init__(net, **common)
        if not 2 <= levels <= 128:
            raise UserError(f"attack.levels={levels}: expected 2 to 128 values per channel")
        self.steps, self.dither = levels - 1, dither

    def trigger(self, x: Tensor) -> Tensor:
        return dithered(x, self.steps) if self.dither else (x * self.steps).round() / self.steps


def dithered(x: Tensor, steps: int) -> Tensor:
    """x (N,C,H,W) in [0,1] -> values k/steps, pixel after pixel in reading order: the error of each goes to the right, to the
    lower left, below and to the lower right.

    A pixel waits for the one before it and for three above it, the last of which is the upper right one. So pixels (i, j)
    with one j + 2i are independent, and are done at once, for all images: W + 2H steps in place of H·W.
    """
    n, c, h, w = x.shape
    wide = w + 2  # a border takes what would leave the image; rows then lie `wide` apart, pixels of one step `w`
    flat = F.pad(x, (1, 1, 0, 1)).permute(2, 3, 0, 1).reshape((h + 1) * wide, n * c)
    to = {"right": 1, "lower left": wide - 1, "below": wide, "lower right": wide + 1}
    for t in range(w + 2 * (h - 1)):
        top, bottom = max(0, (t - w + 2) // 2), min(h - 1, t // 2)
        start, count = top * wide + t - 2 * top + 1, bottom - top + 1
        here = flat[start::w][:count]
        value = (here * steps).round().clamp(0, steps) / steps
        error = here - value
        for where, by in sorted(to.items(), key=lambda item: -item[1]):  # as they would come in reading order
            flat[start + by :: w][:count] += SHARES[where] * error
        here.copy_(value)
    return flat.view(h + 1, wide, n, c)[:h, 1:-1].permute(2, 3, 0, 1).contiguous()
