"""TeCo: clean images give way to all corruptions at about the same severity, triggered ones to some early, to others never.

Source: Liu et al., Detecting Backdoors During the Inference Stage Based on Corruption Robustness Consistency, CVPR 2023,
arXiv 2303.18191; sec. 4.

    t_c: lowest severity 1 to 5 of corruption c at which the net's label changes, 6 where it never does
    score = standard deviation of t_c over corruptions

The paper gives no threshold; flagged is what lies above the `keep` quantile of clean images. recipe=code: the released
loops change the images (or the list of transforms) in place, so that each corruption is laid over all before it.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from bdx.corruptions import CORRUPTIONS
from bdx.detectors.base import Detector, quantile
from bdx.errors import UserError, one_of
from bdx.split import pixels
from bdx.training import predict


class TeCo(Detector):
    """corruptions   names
    keep             share of clean images that is accepted
    recipe           paper: each corruption of the image as it is; code: of what all before it, in turn, have left of it
    """

    judges = ("test", "train")
    needs = frozenset({"clean"})

    def __init__(self, *, corruptions: list, keep: float, recipe: str, **common):
        super().__init__(**common)
        one_of("detector.recipe", recipe, ("paper", "code"))
        for name in corruptions:
            one_of("detector.corruptions", name, CORRUPTIONS)
        if len(corruptions) < 2 or not 0 < keep < 1:
            raise UserError(
                f"{len(corruptions)} detector.corruptions, keep={keep}: expected two or more, and keep between 0 and 1"
            )
        self.corruptions, self.keep, self.recipe = corruptions, keep, recipe

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        self.threshold = quantile(self.spread(net, self.some(data.clean, data.seed).x, data.seed), self.keep)
        return self.spread(net, split.x, data.seed)

    def spread(self, net: nn.Module, x: Tensor, seed: int) -> Tensor:
        """x (N,C,H,W) uint8 -> (N,)"""
        g = Generator(x.device).manual_seed(seed)
        return torch.cat(
            [self.gives_way(net, part, g).std(0, correction=0) for part in self.through("severities", x.split(500))]
        )

    def gives_way(self, net: nn.Module, x: Tensor, g: Generator) -> Tensor:
        """x (N,C,H,W) uint8 -> (corruptions, N) severities 1 to 6."""
        before, at, found = predict(net, x), pixels(x), []
        for name in self.corruptions:
            of, severities = CORRUPTIONS[name]
            held = []
            for c in severities:
                worse = (of(at, c, g).clamp(0, 1) * 255).to(torch.uint8)
                held.append(predict(net, worse) == before)
                at = pixels(worse) if self.recipe == "code" else at
            found.append(1.0 + torch.stack(held).cumprod(0).sum(0))
        return torch.stack(found)
