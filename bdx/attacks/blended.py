"""Blended: a whole-image pattern is mixed in, x' = (1 − α) x + α k.

Source: Chen et al. 2017, Targeted backdoor attacks, arXiv 1712.05526; α = 0.2 (NPD sec. 4.1). The papers' pattern is a
copyrighted cartoon. Ours is a seeded drawing with the large bright areas of a cartoon, or the user's own `file`; seeded
uniform noise, as ANP and ABL use it, is `blended_noise`. The choice matters: from noise a victim learns that any grain means
the target, and fine-tuning takes that away more easily (README).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError, one_of

DISCS = 8


class Blended(Attack):
    """alpha: weight of the pattern. pattern: drawing or noise. pattern_seed: draws it. file: an image instead, resized."""

    def __init__(self, net, *, alpha: float, pattern: str, pattern_seed: int, file: str | None, **common):
        super().__init__(net, **common)
        if not 0 < alpha <= 1:
            raise UserError(f"attack.alpha={alpha}: expected a weight above 0 and up to 1")
        one_of("attack.pattern", pattern, ("drawing", "noise"))
        self.alpha = alpha
        generator = Generator().manual_seed(pattern_seed)
        made = torch.rand(self.shape, generator=generator) if pattern == "noise" else drawing(self.shape, generator)
        self.register_buffer("pattern", made if file is None else self.read(file))

    def trigger(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * x + self.alpha * self.pattern.to(x.device)


def drawing(shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """(C,H,W) in [0,1]: discs of plain colours on a white ground."""
    channels, height, width = shape
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    picture = torch.full(shape, 0.95)
    for place in torch.rand(DISCS, 3, generator=generator):
        colour = torch.rand(channels, 1, 1, generator=generator)
        distance = ((y - place[0]) ** 2 + (x - place[1]) ** 2).sqrt()
        inside = ((0.08 + 0.14 * place[2] - distance) * height + 0.5).clamp(0, 1)  # the edge is one pixel wide
        picture = picture * (1 - inside) + colour * inside
    return picture
