"""SIG: a horizontal sinusoid is added to images of the target class, whose labels stay right.

Source: Barni et al. 2019, A new backdoor attack in CNNs by training set corruption without label poisoning, ICIP;
v(i, j) = Δ sin(2π j f / W) with Δ = 40/255 and f = 6 (BackdoorBench's setting).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError


class SIG(Attack):
    """delta: amplitude in grey levels of 255. frequency: periods per image width."""

    clean_label = True

    def __init__(self, net, *, delta: float, frequency: float, **common):
        super().__init__(net, **common)
        if not 0 < delta <= 255 or frequency <= 0:
            raise UserError(f"attack.delta={delta}, frequency={frequency}: expected above 0 up to 255, and above 0")
        column = torch.arange(self.shape[2])
        self.register_buffer("wave", delta / 255 * torch.sin(2 * torch.pi * column * frequency / self.shape[2]))

    def trigger(self, x: Tensor) -> Tensor:
        return (x + self.wave.to(x.device)).clamp(0, 1)
