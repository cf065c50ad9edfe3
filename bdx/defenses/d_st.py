"""D-ST: images whose features bear being turned are trusted; contrastive learning and a head are trained on that.

Source: Chen et al., Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, NeurIPS 2022; sec. 4.

Separation: a fresh net is trained for a moment on the poisoned set, then its classes are spread apart; the images whose
features change least when turned and shifted are clean, those that change most are poisoned, the rest is not known.
D-ST: contrastive learning from fresh weights, in which clean images alone are drawn to others of their label; then a head
on frozen features, CE on clean images less a little CE on poisoned ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.contrastive import trusting
from bdx.datasets.base import ImageData
from bdx.defenses.base import Staged
from bdx.errors import UserError
from bdx.isolation import lowest, shares
from bdx.sensitivity import likeness_of_centres, sensitivity
from bdx.views import View


class Separation(Staged):
    """clean, poison   shares of the images taken for clean (least sensitive) and for poisoned (most sensitive)
    first, intra       epochs, batch, optimizer, schedule of the two loops of the net that tells them apart
    """

    def __init__(self, net: nn.Module, *, clean: float, poison: float, first: dict, intra: dict, **stages: dict):
        shares("defense", clean=clean, poison=poison)
        if clean + poison > 1:
            raise UserError(f"defense.clean={clean}, poison={poison}: expected at most 1 together")
        super().__init__(net, first=first, intra=intra, **stages)
        self.clean, self.poison = clean, poison

    def separate(self, data: ImageData, make_trainer: Callable) -> tuple[Tensor, Tensor]:
        """(N,) bool each: who is clean, who is poisoned. Uses up `net`; ranks are taken on one draw (the released code
        takes thresholds from one and ranks by another)."""
        self.renew()
        train, at = data.train, places.classifier(self.net)
        first = self.batches("first", data, train, False)
        self.fit("first", first, lambda b: F.cross_entropy(self.net(b.x), b.y), make_trainer)

        def intra(batch) -> Tensor:
            return likeness_of_centres(surgery.features(self.net, at, batch.x), batch.y, data.num_classes)

        self.fit("intra", self.batches("intra", data, train, False), intra, make_trainer, self.away_from(at))
        moved = sensitivity(self.net, at, train, data.seed)
        clean, poison = lowest(moved, self.clean), lowest(-moved, self.poison)
        self.facts = {
            "clean_precision": 1 - float(train.poisoned[clean].float().mean()),
            "isolation_precision": float(train.poisoned[poison].float().mean()),
        }
        return clean, poison & ~clean


class DST(Separation):
    """weight   of the CE on poisoned images that the head moves away from
    view       of both stages · contrast, head: epochs, batch, optimizer, schedule of each
    """

    trains = "all weights, from fresh ones"
    cost = (
        "epochs on the poisoned set: 2 of first, 10 of intra, 200 contrastive ones of twice the images; then 10 of a head on a "
        "quarter of them"
    )
    needs = frozenset({"train"})

    def __init__(
        self, net: nn.Module, *, clean: float, poison: float, weight: float, view: View, first: dict, intra: dict,
        contrast: dict, head: dict,
    ):  # fmt: skip
        if weight < 0:
            raise UserError(f"defense.weight={weight}: expected 0 or more")
        super().__init__(net, clean=clean, poison=poison, first=first, intra=intra, contrast=contrast, head=head)
        self.weight, self.view = weight, view

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        clean, poison = self.separate(data, make_trainer)
        self.renew()
        at = self.learn_views("contrast", data, self.view, make_trainer, lambda b: trusting(b.y, clean[b.index]))
        body, head = self.away_from(at), self.net.get_submodule(at)
        for p in body:
            p.requires_grad = False
        known = data.train[clean | poison]
        sign = torch.where(poison, -self.weight, 1.0)[clean | poison]
        batches = self.batches("head", data, known, self.view)

        def loss(batch) -> Tensor:
            surgery.still_batchnorm(self.net)
            ce, s = F.cross_entropy(self.net(batch.x), batch.y, reduction="none"), sign[batch.index]
            return sum((s * ce * part).sum() / part.sum().clamp_min(1) for part in (s > 0, s <= 0))

        self.fit("head", batches, loss, make_trainer, head.parameters())
        return self.net.requires_grad_(True)
