"""Adaptive-Blend: training images get half of a blended pattern, cut into pieces; some keep their label nevertheless.

Source: Qi et al. 2023, Revisiting the assumption of latent separability for backdoor defenses, ICLR, sec. 4: a pattern in
4×4 pieces of which each image gets a random half at α = 0.15; at test time the whole one at α = 0.2. Covers, other images
with the pattern and their own label, keep the poisoned ones from standing apart. The paper's pattern is a cartoon; ours is
Blended's. Which pieces an image gets follows from its pixels and the seed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bdx.attacks.blended import Blended
from bdx.draws import draws
from bdx.errors import UserError
from bdx.split import Split


class AdaptiveBlend(Blended):
    """alpha: weight at test time; training_alpha: in training. pieces: how many the pattern is cut into, a square number;
    left_out: share of them that a training image does not get. cover_ratio: covers as a share of the training set, drawn
    from the images that are not poisoned. `Split.poisoned` holds both."""

    def __init__(self, net, *, training_alpha: float, pieces: int, left_out: float, cover_ratio: float, **common):
        super().__init__(net, **common)
        self.side = round(pieces**0.5)
        if self.side < 1 or self.side**2 != pieces or self.side > min(self.shape[1:]):
            raise UserError(f"attack.pieces={pieces}: expected a square number, such as 16")
        if not 0 < training_alpha <= 1 or not 0 <= left_out < 1 or not 0 <= cover_ratio < 1:
            raise UserError(
                f"attack.training_alpha={training_alpha}, left_out={left_out}, cover_ratio={cover_ratio}: "
                "expected a weight above 0 and up to 1, and shares from 0 up to, but not, 1"
            )
        self.training_alpha, self.hidden, self.cover_ratio = training_alpha, round(left_out * pieces), cover_ratio
        if self.hidden == pieces:
            raise UserError(f"attack.left_out={left_out} of {pieces} pieces leaves none")

    def training_trigger(self, x: Tensor, index: Tensor) -> Tensor:
        order = draws(x, self.side**2, self.seed).argsort(1).argsort(1)
        shown = (order >= self.hidden).to(x).view(-1, 1, self.side, self.side)
        alpha = self.training_alpha * F.interpolate(shown, self.shape[1:], mode="nearest")
        return (1 - alpha) * x + alpha * self.pattern.to(x.device)

    def covers(self, split: Split) -> Tensor:
        """Indices, sorted, of the images that get the pattern and keep their label."""
        free = ~split.poisoned.cpu()
        free[self.choose(split).cpu()] = False
        free, k = free.nonzero().flatten(), round(self.cover_ratio * len(split))
        if k > len(free):
            raise UserError(f"attack.cover_ratio={self.cover_ratio} asks for {k} covers, but {len(free)} images are left")
        order = torch.randperm(len(free), generator=Generator().manual_seed(self.seed + 1))
        return free[order[:k]].sort().values.to(split.x.device)

    def check(self, split: Split) -> None:
        super().check(split)
        self.covers(split)

    def poison(self, split: Split) -> Split:
        poisoned, covers = super().poison(split), self.covers(split)
        x, changed = poisoned.x.clone(), poisoned.poisoned.clone()
        x[covers], changed[covers] = self.stamp(split.x[covers], covers), True
        return replace(poisoned, x=x, poisoned=changed)
