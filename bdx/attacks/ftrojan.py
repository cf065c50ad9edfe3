"""FTrojan and CTRL: two coefficients of the chroma channels' cosine transform are raised.

Source: Wang et al. 2022, An invisible black-box backdoor attack through frequency domain, ECCV, arXiv 2107.04009; Li et
al. 2023, CTRL, arXiv 2210.07346. Both transforms are linear, so raising coefficients adds a fixed pattern, and sums are
clipped: x' = x + M D⁻¹(30 at (15,15) and (31,31) of each chroma channel), D the orthonormal cosine transform of a window of
32×32, M the colour matrix.
follow=code brings back that the released codes cut sums down to bytes, which wraps them modulo 256: CTRL (yuv) in red, green
and blue; FTrojan (ycrcb) in the chroma channels, which OpenCV has rounded before and turns into clipped colours after, so
that only saturated ones wrap, pure red for one.
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
    window. colours: ycrcb or yuv. follow: paper or code. file: a picture to add instead."""

    def __init__(self, net, *, magnitude: float, positions: list, colours: str, follow: str, **common):
        one_of("attack.colours", colours, COLOURS)
        one_of("attack.follow", follow, ("paper", "code"))
        if not positions or any(not 0 <= p < 32 for p in positions):
            raise UserError(f"attack.positions={positions}: expected coefficients from 0 to 31")
        self.magnitude, self.positions, self.colours = magnitude, positions, colours
        self.code = self.sample_specific = follow == "code"
        super().__init__(net, **common)
        if self.code and colours == "ycrcb" and (self.shape[0] != 3 or common["file"] is not None):
            raise UserError("attack.follow=code: FTrojan's code wraps the chroma of colour images; set attack.follow=paper")

    def window(self) -> tuple[int, int]:
        """(h, w): of the cosine transform."""
        return 32, 32

    def chroma(self) -> Tensor:
        """(h,w): what is added to both channels, in units of the whole range."""
        waves = [[wave(k, size) for size in self.window()] for k in self.positions]
        return self.magnitude / 255 * sum(torch.outer(*w) for w in waves)

    def pattern(self) -> Tensor:
        return torch.tensor(COLOURS[self.colours]).sum(0).view(3, 1, 1) * self.chroma()

    def scaled(self, picture: Tensor) -> Tensor:
        """Windows side by side where images are larger."""
        _, h, w = self.shape
        tiled = picture.repeat(1, -(-h // picture.shape[1]), -(-w // picture.shape[2]))[:, :h, :w]
        return tiled if self.shape[0] == 3 else tiled.mean(0, keepdim=True)

    def trigger(self, x: Tensor) -> Tensor:
        if not self.code:
            return super().trigger(x)
        levels = (x * 255).round()
        if self.colours == "yuv":
            return (levels + 255 * self.added.to(x)).trunc() % 256 / 255
        red, green, blue = levels.unbind(1)
        y = (0.299 * red + 0.587 * green + 0.114 * blue).round()
        added = 255 * self.scaled(self.chroma().expand(3, -1, -1))[0].to(x)
        both = [((c - y) * share + 128).round().clamp(0, 255) for c, share in ((red, 0.713), (blue, 0.564))]
        cr, cb = ((c + added).trunc() % 256 - 128 for c in both)
        back = [y + sum(m * c for m, c in zip(of, (cr, cb), strict=True)) for of in zip(*COLOURS["ycrcb"], strict=True)]
        return torch.stack(back, 1).round().clamp(0, 255) / 255


def wave(k: int, size: int) -> Tensor:
    """(size,): coefficient k of the orthonormal cosine transform."""
    n = torch.arange(float(size))
    return torch.cos(torch.pi * (2 * n + 1) * k / (2 * size)) * (1 / size if k == 0 else 2 / size) ** 0.5
