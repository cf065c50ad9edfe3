"""WaNet: images are warped by a smooth random field; warps with noise on top teach the net to heed this field alone.

Source: Nguyen and Tran 2021, WaNet, ICLR, arXiv 2102.10369; sec. 3. The field: k×k offsets drawn from U(−1, 1), divided by
their mean size, upsampled bicubically, times s pixel pitches of 1/H. Cross images: the same field plus U(−1, 1)/H for each
pixel, drawn anew for each image. Warping is linear and stays inside the image, so that [0,1] pixels and the originals'
normalised ones give the same. The authors augment the warped images, and so do we, by the recipe's augmentation (theirs:
crop, rotation of ±10°, one draw for a whole batch). The originals' constant learning rate is train.schedule=null.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bdx.attacks.controlled import Controlled
from bdx.errors import UserError


class WaNet(Controlled):
    """k: side of the control grid. s: strength. pattern_seed: draws the field."""

    leaves_poison = False
    sample_specific = True

    def __init__(self, net, *, k: int, s: float, pattern_seed: int, **common):
        super().__init__(net, **common)
        _, h, w = self.shape
        if not 2 <= k <= min(h, w) or s <= 0:
            raise UserError(f"attack.k={k}, attack.s={s}: expected 2 to {min(h, w)} points a side, and a strength above 0")
        self.register_buffer("pitch", 1 / torch.tensor([w, h]))
        self.register_buffer("grid", self.field(k, s, pattern_seed))

    def field(self, k: int, s: float, seed: int) -> Tensor:
        """(H,W,2): from where, as (x, y) from −1 to 1, each pixel is taken."""
        _, h, w = self.shape
        offsets = torch.rand(1, 2, k, k, generator=Generator().manual_seed(seed)) * 2 - 1
        offsets = F.interpolate(offsets / offsets.abs().mean(), (h, w), mode="bicubic", align_corners=True)
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        return (torch.stack([x, y], 2) + s * offsets[0].permute(1, 2, 0) * self.pitch).clamp(-1, 1)

    def trigger(self, x: Tensor) -> Tensor:
        return warp(x, self.grid.to(x.device).expand(len(x), -1, -1, -1))

    def cross(self, x: Tensor, rows: Tensor, g: Generator) -> Tensor:
        noise = torch.rand(len(rows), *self.grid.shape, generator=g, device=x.device) * 2 - 1
        grids = (self.grid.to(x.device) + noise * self.pitch.to(x.device)).clamp(-1, 1)
        return (warp(x[rows].float() / 255, grids) * 255).round().to(torch.uint8)


def warp(x: Tensor, grids: Tensor) -> Tensor:
    """x (N,C,H,W) in [0,1], grids (N,H,W,2)"""
    return F.grid_sample(x, grids, align_corners=True).clamp(0, 1)
