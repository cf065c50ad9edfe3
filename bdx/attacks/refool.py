"""Refool: another picture is reflected in the image, as a pane of glass would, with a ghost or out of focus.

Source: Liu et al. 2020, Reflection backdoor, ECCV, arXiv 2007.02343, with the released code's constants. The paper's 200
reflections are pictures of its own, chosen by how well they work; here they are drawn from the training images. Which
one an image gets, and how, follows from its pixels and the seed. Light adds up in linear intensities: value^2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdx.attacks.made import Made
from bdx.draws import draws
from bdx.errors import UserError
from bdx.split import Split

GAMMA = 2.2


class Refool(Made):
    """reflections: how many pictures to draw from. ghost: share of images with a ghost, the others are out of focus. alpha:
    weight of the image itself. clean_label: poison images of the target class alone and keep their labels."""

    makes = ("reflections",)
    sample_specific = True
    surrogate = False
    aimed = False
    later = frozenset({"ghost", "alpha", "clean_label"})

    def __init__(self, net: nn.Module, *, reflections: int, ghost: float, alpha: float, clean_label: bool, **common):
        self.clean_label = clean_label
        super().__init__(net, **common)
        if reflections < 1 or not 0 <= ghost <= 1 or not 0 < alpha < 1:
            raise UserError(
                f"attack.reflections={reflections}, ghost={ghost}, alpha={alpha}: expected at least 1 picture, a share from "
                "0 to 1 and a weight between 0 and 1"
            )
        self.ghost, self.alpha = ghost, alpha
        self.register_buffer("dice", torch.tensor(self.seed))  # what they fall on is part of the trigger
        self.register_buffer("reflections", torch.zeros(reflections, *self.shape, dtype=torch.uint8))

    def check(self, split: Split) -> None:
        super().check(split)
        if (asked := len(self.reflections)) > len(split):
            raise UserError(f"attack.reflections={asked}, but there are {len(split)} training images to draw them from")

    def make(self, data, net, report):
        order = torch.randperm(len(data.train), generator=Generator().manual_seed(self.seed + 2))
        return {"reflections": data.train.x[order[: len(self.reflections)].to(data.train.x.device)]}, {}

    def trigger(self, x: Tensor) -> Tensor:
        return torch.cat([self.reflected(part) for part in x.split(500)])

    def reflected(self, x: Tensor) -> Tensor:
        u = draws(x, 9, int(self.dice))
        pictures = self.reflections.to(x.device)
        r = (pictures[(u[:, 0] * len(pictures)).long()].float() / 255) ** GAMMA
        t = x**GAMMA
        mixed = torch.where((u[:, 1] < self.ghost).view(-1, 1, 1, 1), self.ghosted(r, u, t), self.blurred(r, u, t))
        return mixed.clamp(0, 1) ** (1 / GAMMA)

    def ghosted(self, r: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """α t + (1 − α)(g r + (1 − g) r shifted by 3 to 8 pixels of 32), cut to where both are and enlarged again."""
        n, _, h, w = r.shape
        share = (u[:, 2].round() - (0.15 + 0.35 * u[:, 3])).abs().view(-1, 1, 1, 1)
        shift = [(3 + (u[:, 4 + i] * 6).floor()) * size / 32 for i, size in enumerate((h, w))]
        rows, cols = (
            s[:, None] + (torch.arange(size, device=r.device) + 0.5) * (size - s[:, None]) / size
            for s, size in zip(shift, (h, w), strict=True)
        )
        at = lambda i, j: torch.stack(
            [(j * 2 / w - 1)[:, None, :].expand(n, h, w), (i * 2 / h - 1)[:, :, None].expand(n, h, w)], -1
        )
        near = F.grid_sample(r, at(rows, cols), padding_mode="border", align_corners=False)
        far = F.grid_sample(
            r, at(rows - shift[0][:, None], cols - shift[1][:, None]), padding_mode="border", align_corners=False
        )
        return self.alpha * t + (1 - self.alpha) * (share * near + (1 - share) * far)

    def blurred(self, r: Tensor, u: Tensor, t: Tensor) -> Tensor:
        """α t + r through a Gaussian of 1 to 5 pixels of 32, darkened where the sum is too bright, under a bump."""
        n, c, h, w = r.shape
        for dim, size in ((2, h), (3, w)):
            std = (1 + 4 * u[:, 6]) * size / 32
            reach = min(-(-10 * size // 32), size - 1)
            offset = torch.arange(-reach, reach + 1.0, device=r.device)
            taps = torch.exp(-offset.square() / (2 * std[:, None] ** 2)) * (offset.abs() <= (2 * std[:, None]).ceil())
            taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
            pad = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
            padded = F.pad(r, pad, mode="replicate").reshape(
                1, n * c, *((h + 2 * reach, w) if dim == 2 else (h, w + 2 * reach))
            )
            r = F.conv2d(padded, taps[..., None] if dim == 2 else taps[:, :, None], groups=n * c).view(n, c, h, w)
        total = r + t
        bright = (total > 1).to(r)
        mean = (total * bright).sum((2, 3), keepdim=True) / bright.sum((2, 3), keepdim=True).clamp_min(1e-6)
        r = (r - (mean.clamp_min(1) - 1) * (1.08 + 0.1 * u[:, 7]).view(-1, 1, 1, 1)).clamp(0, 1)
        return self.alpha * t + r * self.bump(u, h, w) * (1 - self.alpha / 2)

    @staticmethod
    def bump(u: Tensor, h: int, w: int) -> Tensor:
        """(N,1,H,W): a window, somewhere, of exp(−(a² + b²)/4) over ±3, which is 5/4 of the image wide (560 of 448)."""
        sides = []
        for size, key in ((h, u[:, 8]), (w, (u[:, 8] * 1024).frac())):
            at = (torch.arange(size, device=u.device) + 0.5) / (1.25 * size) + 0.2 * key[:, None]
            sides.append(torch.exp(-(6 * at - 3).square() / 4))
        return (sides[0][:, :, None] * sides[1][:, None, :])[:, None]
