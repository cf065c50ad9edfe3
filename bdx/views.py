"""Views: the strong augmentation of contrastive learning (SimCLR, Chen et al. 2020), on whole batches on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bdx.augment import random_flip, random_resized_crop
from bdx.errors import UserError
from bdx.split import pixels

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601


@dataclass(frozen=True, kw_only=True)
class View:
    """A crop scaled up again, a flip, jittered colours, grey, a blur: every image draws its own, the order of the colour
    changes is drawn per batch.

    scale      smallest share of the area that a crop may have; its sides are in a ratio between 3/4 and 4/3
    jitter     how far brightness, contrast and saturation go from 1; hue: in turns; jitter_p: of how many images
    grey, blur  of how many images; sigma: range of the blur's deviation in pixels
    """

    scale: float
    jitter: float
    hue: float
    jitter_p: float
    grey: float
    blur: float
    sigma: list[float]

    def __post_init__(self):
        if not 0 < self.scale <= 1 or not 0 <= self.jitter <= 1 or not 0 <= self.hue <= 0.5:
            raise UserError(
                f"defense.view.scale={self.scale}, jitter={self.jitter}, hue={self.hue}: "
                "expected 0 to 1, hue at most 0.5, and a scale above 0"
            )
        if not all(0 <= p <= 1 for p in (self.jitter_p, self.grey, self.blur)):
            raise UserError(f"defense.view.jitter_p={self.jitter_p}, grey={self.grey}, blur={self.blur}: expected 0 to 1")
        if len(self.sigma) != 2 or not 0 < self.sigma[0] <= self.sigma[1]:
            raise UserError(f"defense.view.sigma={self.sigma}: expected two numbers above 0, the smaller one first")

    def __call__(self, x: Tensor, y: Tensor, classes: int, g: Generator) -> tuple[Tensor, Tensor]:
        """x (N,C,H,W) uint8 -> float in [0,1]; y as it came."""
        x = random_flip(random_resized_crop(pixels(x), self.scale, g, mode="bicubic"), g)
        if x.shape[1] == 3:
            some = chance(x, self.jitter_p, g)
            x = torch.where(some, jittered(x, self.jitter, self.hue, g), x)
            x = torch.where(chance(x, self.grey, g), grey(x), x)
        if self.blur:
            x = torch.where(chance(x, self.blur, g), random_blur(x, self.sigma, g), x)
        return x, y


@dataclass(frozen=True)
class Twice:
    """Two draws of one augmentation: x (2N,C,H,W), first the one, then the other; y (N,) once."""

    once: Callable

    def __call__(self, x: Tensor, y: Tensor, classes: int, g: Generator) -> tuple[Tensor, Tensor]:
        return torch.cat([self.once(x, y, classes, g)[0] for _ in range(2)]), y


def uniform(x: Tensor, low: float, high: float, g: Generator) -> Tensor:
    """(N,1,1,1)"""
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=g, device=x.device)


def chance(x: Tensor, p: float, g: Generator) -> Tensor:
    return uniform(x, 0, 1, g) < p


def grey(x: Tensor) -> Tensor:
    """(N,3,H,W) -> the same shape, three equal channels."""
    return (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(x)


def jittered(x: Tensor, strength: float, hue: float, g: Generator) -> Tensor:
    """Brightness, contrast and saturation by U(1 − strength, 1 + strength), hue by U(−hue, hue), in a random order."""
    factor = [uniform(x, 1 - strength, 1 + strength, g) for _ in range(3)] + [uniform(x, -hue, hue, g)]
    away = (torch.zeros_like, lambda x: grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), grey)
    for i in torch.randperm(4, generator=g, device=x.device).tolist():
        x = turn_hue(x, factor[3]) if i == 3 else torch.lerp(away[i](x), x, factor[i]).clamp(0, 1)
    return x


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """x (N,3,H,W) with its hue turned by `turns` (N,1,1,1) of a full circle; value and saturation stay (HSV)."""
    top, span = x.amax(1), x.amax(1) - x.amin(1)
    r, g, b = x.unbind(1)
    safe = span.clamp_min(1e-8)
    sixths = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    positions = [(n + sixths + 6 * turns[:, 0]) % 6 for n in (5, 3, 1)]  # red, green, blue on the hexagon
    return torch.stack([top - span * torch.minimum(k, 4 - k).clamp(0, 1) for k in positions], 1)


def random_blur(x: Tensor, sigma: list[float], g: Generator) -> Tensor:
    """Gaussian blur, its deviation drawn per image: a matrix for the rows and one for the columns, renormalised where
    the border cuts the bell off."""
    s = uniform(x, *sigma, g)

    def bell(n: int) -> Tensor:
        i = torch.arange(n, device=x.device, dtype=x.dtype)
        k = (-((i[:, None] - i) ** 2) / (2 * s**2)).exp()  # (N,1,n,n)
        return k / k.sum(-1, keepdim=True)

    return bell(x.shape[2]) @ x @ bell(x.shape[3]).transpose(2, 3)
