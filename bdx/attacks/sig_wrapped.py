"""SIG as Trap-and-Replace's and ABL's file has it: a sinusoid whose negative half wraps to 237 … 255, mixed in at 0.2.

Source: Wang et al., Trap and Replace, NeurIPS 2022, app. B.1; x' = (1 − α) x + α s, column j of s is trunc(20 sin(0.8 j))
modulo 256. The wrap makes a strong square wave of the ±4 grey levels that a true sinusoid would have added: see sig for that
one. Other widths repeat or leave out columns of the 32, as Trap-and-Replace enlarges its file for ImageNet-12.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError


class WrappedSIG(Attack):
    """alpha: weight of the stripes. amplitude: in grey levels of 255, before the wrap. step: radians per column of the 32."""

    clean_label = True

    def __init__(self, net, *, alpha: float, amplitude: float, step: float, **common):
        super().__init__(net, **common)
        if not 0 < alpha <= 1:
            raise UserError(f"attack.alpha={alpha}: expected a weight above 0 and up to 1")
        if amplitude <= 0 or step <= 0:
            raise UserError(f"attack.amplitude={amplitude}, step={step}: expected grey levels and radians above 0")
        columns = ((amplitude * (step * torch.arange(32, dtype=torch.float64)).sin()).trunc() % 256).float() / 255
        self.alpha = alpha
        self.register_buffer("stripes", F.interpolate(columns[None, None], self.shape[2], mode="nearest")[0, 0])

    def trigger(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * x + self.alpha * self.stripes.to(x.device)
