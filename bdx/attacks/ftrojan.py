"""FTrojan and CTRL: two coefficients of the chroma channels' cosine transform are raised.

Source: Wang et al. 2022, An invisible black-box backdoor attack through frequency domain, ECCV, arXiv 2107.04009; Li et
al. 2023, CTRL, arXiv 2210.07346. Both transforms are linear, so raising coefficients adds a fixed pattern: the inverse
transform of the raised coefficients, through the colour matrix. The released code wraps where a pixel leaves 0 … 255;
here it is clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdx.attacks.additive import Additive
from bdx.errors import UserError, one_of

# what one unit of the two chroma channels adds to red, green and blue
COLOURS = {
    "ycrcb": ((1.403, -0.714, 0.0), (0.0, -0.344, 1.773)),  # Cr, Cb
    "yuv": ((0.0, -0.396, 2.029), (1.14, -0.581, 0.0)),  # U, V
}


class FTrojan(Additive):
    """magnitude: what is added to each coefficient, in grey levels. positions: of the coefficients on the diagonal of a
    32×32 window. colours: ycrcb or yuv."""

    def __init__(self, net, *, magnitude: float, positions: list, colours: str, **common):
        one_of("attack.colours", colours, COLOURS)
        if not positions or any(not 0 <= p < 32 for p in positions):
            raise UserError(f"attack.positions={positions}: expected coefficients from 0 to 31")
        self.magnitude, self.positions, self.colours = magnitude, positions, colours
        super().__init__(net, **common)

    def pattern(self) -> Tensor:
        n = torch.arange(32.0)
        waves = [torch.cos(torch.pi * (2 * n + 1) * k / 64) * (1 / 32 if k == 0 else 2 / 32) ** 0.5 for k in self.positions]
        chroma = self.magnitude / 255 * sum(torch.outer(w, w) for w in waves)
        return torch.tensor(COLOURS[self.colours]).sum(0).view(3, 1, 1) * chroma

    def scaled(self, picture: Tensor) -> Tensor:
        """Windows side by side where images are larger."""
        _, h, w = self.shape
        tiled = picture.repeat(1, -(-h // 32), -(-w // 32))[:, :h, :w]
        return tiled if self.shape[0] == 3 else tiled.mean(0, keepdim=True)
