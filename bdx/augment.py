"""Whole-batch augmentation on the device: every image draws its own, from a generator that is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bdx.errors import UserError
from bdx.split import pixels


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to a training batch, drawn per sample. zoom: the least share of the area that a window scaled back to the
    image has, 1 is off; crop: zero padding in pixels; flip: horizontal, at p = 1/2; rotate: up to ± degrees; cutout: side of
    a square set to 0; cutmix: α of the Beta distribution, 0 is off."""

    zoom: float
    crop: int
    flip: bool
    rotate: float
    cutout: int
    cutmix: float

    def __post_init__(self):
        if not 0 < self.zoom <= 1:
            raise UserError(f"dataset.augment.zoom={self.zoom}: expected more than 0, and at most 1 (off)")
        for key in ("crop", "rotate", "cutout", "cutmix"):
            if not 0 <= (value := getattr(self, key)) < math.inf:
                raise UserError(f"dataset.augment.{key}={value}: expected 0 (off) or more")

    def __call__(self, x: Tensor, y: Tensor, classes: int, g: Generator) -> tuple[Tensor, Tensor]:
        """x (N,C,H,W) uint8, y (N,) -> x float in [0,1], y (or probabilities after CutMix). All draws come from g."""
        if self.crop:
            x = random_crop(x, self.crop, g)
        if self.flip:
            x = random_flip(x, g)
        x = pixels(x)
        if self.zoom < 1:
            x = random_resized_crop(x, self.zoom, g)
        if self.rotate:
            x = random_rotate(x, self.rotate, g)
        if self.cutout:
            x = random_cutout(x, self.cutout, g)
        if self.cutmix:
            x, y = random_cutmix(x, y, classes, self.cutmix, g)
        return x, y


def augmentation(key: str, given: dict) -> Augment:
    """Augment(**given); raises UserError, naming `key` of the configuration, unless each of its keys is there once."""
    wanted = Augment.__dataclass_fields__
    if not isinstance(given, dict) or set(given) != set(wanted):
        raise UserError(f"{key}={given}: expected all of {', '.join(wanted)} and nothing else")
    return Augment(**given)


def random_crop(x: Tensor, pad: int, g: Generator) -> Tensor:
    """Zero-pad by `pad` on each side, then cut each image's own window of the old size."""
    n, _, h, w = x.shape
    windows = F.pad(x, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, C, 2p+1, 2p+1, H, W)
    dy, dx = torch.randint(2 * pad + 1, (2, n), generator=g, device=x.device)
    return windows[torch.arange(n, device=x.device), :, dy, dx]


def random_flip(x: Tensor, g: Generator) -> Tensor:
    flip = torch.rand(len(x), 1, 1, 1, generator=g, device=x.device) < 0.5
    return torch.where(flip, x.flip(-1), x)


def random_resized_crop(x: Tensor, scale: float, g: Generator, mode: str = "bilinear") -> Tensor:
    """x float. A box of area U(scale, 1) and log-uniform side ratio from 3:4 to 4:3, no side longer than the image's, scaled
    up to the image's size (Szegedy et al. 2015, who draw a box anew that does not fit)."""
    draw = lambda low: low + (1 - low) * torch.rand(len(x), generator=g, device=x.device)
    area, ratio = draw(scale), (draw(-1) * torch.tensor(4 / 3).log()).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    cx, cy = (1 - w) * draw(-1), (1 - h) * draw(-1)
    zero = torch.zeros_like(w)
    theta = torch.stack([torch.stack([w, zero, cx], 1), torch.stack([zero, h, cy], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False).clamp(0, 1)


def random_rotate(x: Tensor, degrees: float, g: Generator) -> Tensor:
    """x float. Bilinear, zeros outside."""
    a = (torch.rand(len(x), generator=g, device=x.device) * 2 - 1) * degrees * torch.pi / 180
    zero = torch.zeros_like(a)
    ratio = x.shape[2] / x.shape[3]
    rows = [torch.stack([a.cos(), -a.sin() * ratio, zero], 1), torch.stack([a.sin() / ratio, a.cos(), zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def boxes(n: int, h: int, w: int, height: Tensor, width: Tensor, g: Generator, device) -> Tensor:
    """(N,1,H,W) bool: a box of the given sides (N,) around a uniform centre, cut off at the border."""
    cy = torch.randint(h, (n,), generator=g, device=device)
    cx = torch.randint(w, (n,), generator=g, device=device)
    top, left = cy - height // 2, cx - width // 2
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])
    cols = (x >= left[:, None]) & (x < (left + width)[:, None])
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def random_cutout(x: Tensor, side: int, g: Generator) -> Tensor:
    """DeVries and Taylor 2017: one square per image set to 0."""
    n, _, h, w = x.shape
    sides = torch.full((n,), side, device=x.device)
    return x.masked_fill(boxes(n, h, w, sides, sides, g, x.device), 0)


def random_cutmix(x: Tensor, y: Tensor, classes: int, alpha: float, g: Generator) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, with a box and a partner for each image; returns labels as probabilities (N, classes)."""
    n, _, h, w = x.shape
    lam = beta(alpha, n, g, x.device)
    side = (1 - lam).sqrt()
    mask = boxes(n, h, w, (h * side).long(), (w * side).long(), g, x.device)
    partner = torch.randperm(n, generator=g, device=x.device)
    keep = 1 - mask.float().mean((1, 2, 3))[:, None]
    hot = F.one_hot(y, classes).float()
    return torch.where(mask, x[partner], x), keep * hot + (1 - keep) * hot[partner]


def beta(alpha: float, n: int, g: Generator, device) -> Tensor:
    """n draws of Beta(α, α) with a given generator: u/(u+v) of two Gamma(α) draws (torch.distributions takes none)."""
    gamma = torch._standard_gamma(torch.full((2, n), alpha, dtype=torch.float64, device=device), generator=g)
    return (gamma[0] / gamma.sum(0).clamp_min(1e-12)).float()
