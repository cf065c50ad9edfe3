"""Stamp: a patch that a defense puts on every image before the net sees it (NAB); inserted like a polarizer, saved with it."""

from __future__ import annotations

from torch import Tensor, nn


class Stamp(nn.Module):
    """Sets a size × size square in the upper left corner of x (N,C,H,W) to `value`, in [0,1]."""

    def __init__(self, size: int, value: float):
        super().__init__()
        self.size, self.value = size, value

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., : self.size, : self.size] = self.value
        return x
