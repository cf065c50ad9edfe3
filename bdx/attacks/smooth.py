"""Smooth: a low-frequency glow is added, then each image is stretched to the whole range.

Source: Zeng et al. 2021, Rethinking the backdoor attacks' triggers: a frequency perspective, arXiv 2104.03413, as
Trap-and-Replace (app. B.1) uses it. Their pattern was optimised and is a file; ours is the sum of a Gaussian for each
channel and a constant that fits it within two grey levels: A exp(−(x − x₀)²/2σ_x² − (y − y₀)²/2σ_y²) + c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdx.attacks.additive import Additive
from bdx.errors import UserError


class Smooth(Additive):
    """gaussians: (A, x₀, y₀, σ_x, σ_y, c) for red, green and blue, in grey levels and pixels of a 32×32 image.
    stretch: whether each image is rescaled to 0 … 1 over all pixels and channels afterwards."""

    sample_specific = True

    def __init__(self, net, *, gaussians: list, stretch: bool, **common):
        if [len(g) for g in gaussians if isinstance(g, list)] != [6, 6, 6] or any(0 in g[3:5] for g in gaussians):
            raise UserError(f"attack.gaussians={gaussians}: expected [A,x0,y0,sx,sy,c] for red, green, blue, sx and sy not 0")
        self.gaussians, self.stretch = gaussians, stretch
        super().__init__(net, **common)

    def pattern(self) -> Tensor:
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        glow = [
            a * torch.exp(-((x - x0) ** 2) / (2 * sx**2) - (y - y0) ** 2 / (2 * sy**2)) + c
            for a, x0, y0, sx, sy, c in self.gaussians
        ]
        return torch.stack(glow).clamp_min(0).round() / 255

    def trigger(self, x: Tensor) -> Tensor:
        x = x + self.added.to(x.device)
        if not self.stretch:
            return x.clamp(0, 1)
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return (x - low) / (high - low).clamp_min(1e-6)
