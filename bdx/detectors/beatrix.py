"""Beatrix: a trigger shifts how the channels of a feature map go together, far out of the range of the class's clean images.

Source: Ma et al., The "Beatrix" Resurrections, NDSS 2023, arXiv 2209.11715; sec. 4 and the authors' code.

    G_p = (z^p (z^p)ᵀ)^{1/p}, z (C, HW), p = 1 … orders: the entries on and above the diagonal, sign kept by the root
    [min, max] = median ∓ width · median |G − median|, per entry, over the clean images of the class
    score = Σ over entries, orders of relu(min − G)/|min| + relu(G − max)/|max|

The class of an image is its label in the training set, and what the net says of it in use. Flagged is what lies above
the `keep` quantile of the class's clean images, each judged by statistics of the other folds. The paper's second test,
which class is the target (regularised MMD between groups), is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdx import places
from bdx.detectors.base import Detector, classes, inputs, quantile
from bdx.errors import UserError
from bdx.training import at_least_one


class Beatrix(Detector):
    """layer   whose input is z: a module's name, or a place by depth
    orders     largest p
    width      half the accepted range, in median deviations
    keep       share of clean images that is accepted
    folds      of the clean images, for the threshold
    """

    judges = ("test", "train")
    needs = frozenset({"clean"})

    def __init__(self, *, layer: str, orders: int, width: float, keep: float, folds: int, **common):
        super().__init__(**common)
        at_least_one("detector", orders=orders, folds=folds)
        if not 0 < keep < 1 or width <= 0:
            raise UserError(f"detector.keep={keep}, width={width}: expected keep between 0 and 1, and width above 0")
        self.layer, self.orders, self.width, self.keep, self.folds = layer, orders, width, keep, folds

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        at = places.locate(net, self.layer, torch.zeros(2, *data.shape, device=split.x.device))
        scores = torch.zeros(len(split), device=split.x.device)
        self.threshold, clean_all, least = torch.full_like(scores, torch.inf), data.clean, 2 * self.folds
        few, there = [], list(classes(split.y))
        for c, of in self.through("classes", there):
            clean = clean_all.x[clean_all.y == c]
            if len(clean) < least:  # too few to know the class: nothing is suspicious
                few.append(c)
                continue
            known, seen = self.maps(net, at, clean), self.maps(net, at, split.x[of])
            scores[of], held_out = self.deviations(known, seen)
            self.threshold[of] = quantile(held_out, self.keep)
        if few:
            told = f"Beatrix: {len(few)} of {len(there)} classes have fewer than {least} reserved images (2 × detector.folds)"
            if len(few) == len(there):
                raise UserError(f"{told}, so that it knows none; take more by dataset.reserved.count, or fewer folds")
            self.notes.append(f"{told}: no image of these is suspicious to it")
        return scores

    def maps(self, net: nn.Module, at: str, x: Tensor) -> Tensor:
        """(n, C, HW): the module's input, its channels or the entries of its tokens first."""
        z = inputs(net, at, x)
        tokens = places.tokens_at(net.get_submodule(at), tuple(z.shape[1:])) and z.ndim >= 3
        return z.flatten(1, -2).transpose(1, 2) if tokens else z.reshape(*z.shape[:2], -1)

    def deviations(self, known: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """known (n, C, HW), seen (m, C, HW) of one class -> (scores of seen (m,), of known (n,) by the other folds)."""
        fold = torch.arange(len(known), device=known.device) % self.folds
        scores, held_out = seen.new_zeros(len(seen)), known.new_zeros(len(known))
        for p in range(1, self.orders + 1):
            g = gram(known, p)
            for k in range(self.folds if self.folds > 1 else 0):
                held_out[fold == k] += outside(g[fold == k], *self.range(g[fold != k]))
            low, high = self.range(g)
            scores += torch.cat([outside(gram(part, p), low, high) for part in seen.split(200)])
            held_out += outside(g, low, high) if self.folds == 1 else 0
        return scores, held_out

    def range(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """(n, E) -> lowest and highest accepted value of each entry."""
        middle = g.quantile(0.5, dim=0) if g.numel() < 1e7 else g.median(0).values
        away = (g - middle).abs()
        spread = self.width * (away.quantile(0.5, dim=0) if g.numel() < 1e7 else away.median(0).values)
        return middle - spread, middle + spread


def gram(z: Tensor, p: int) -> Tensor:
    """(n, C, HW) -> (n, C(C+1)/2)"""
    z = z / (size := z.abs().amax((1, 2), keepdim=True).clamp_min(1e-12))  # the 9th power of 100 is no float16, nor fit
    zp = z.pow(p)
    rows, columns = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
    g = (zp @ zp.transpose(1, 2))[:, rows, columns]
    return g.sign() * g.abs().pow(1 / p) * size[:, 0].square()


def outside(g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(n, E) -> (n,)"""
    below, above = (low - g).clamp_min(0) / (low.abs() + 1e-6), (g - high).clamp_min(0) / (high.abs() + 1e-6)
    return (below + above).sum(1)
