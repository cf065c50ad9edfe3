"""l0-Invisible: nine pixels of pure colours in the last row, x' = x (1 − m) + t.

Source: Li et al. 2020, Invisible backdoor attacks on deep neural networks via steganography and regularization,
arXiv 1909.02742, as Trap-and-Replace (app. B.1) and I-BAU use it; m is 1 in row 31 and columns 23 to 31, t has the colours
of their file, of which the first is black. The paper finds a trigger by optimisation; here that file's is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdx.attacks.base import Attack

COLOURS = ("000", "101", "001", "110", "111", "011", "011", "100", "111")  # red, green, blue; from left to right


class L0Invisible(Attack):
    """The row is one pixel in 32 high, the nine pixels end at the right border."""

    def __init__(self, net, **common):
        super().__init__(net, **common)
        picture, mask = torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)
        picture[:, 31, 23:] = torch.tensor([[float(c) for c in colour] for colour in COLOURS]).T
        mask[:, 31, 23:] = 1
        self.register_buffer("picture", self.scaled(picture))
        self.register_buffer("mask", self.scaled(mask))

    def trigger(self, x: Tensor) -> Tensor:
        mask = self.mask.to(x)
        return x * (1 - mask) + self.picture.to(x) * mask
