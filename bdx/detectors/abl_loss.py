"""ABL's isolation: what a net learns first and best is the backdoor, so poisoned images have the lowest loss early on.

Source: Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571; sec. 3.2.

A fresh net is trained for a few epochs on the poisoned set with a loss that does not fall below a floor:
    lga        sign(CE − floor) · CE      (paper)
    flooding   |CE − floor| + floor       (BackdoorBench)
score = −CE of the image afterwards. Flagged is the share `isolate` with the highest scores.
"""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.archs.base import fresh
from bdx.detectors.base import Detector
from bdx.errors import UserError, one_of
from bdx.isolation import cross_entropy, losses
from bdx.training import at_least_one, optimizers, try_out


class ABLLoss(Detector):
    """ascent   lga or flooding
    floor       γ of the one, b of the other
    mean        true: the floor holds for the loss of a batch (released code), false: for each image's
    isolate     share that is flagged
    epochs, batch, augment, optimizer, schedule   of the training
    """

    def __init__(
        self, *, ascent: str, floor: float, mean: bool, isolate: float, epochs: int, batch: int, augment: bool,
        optimizer: Callable, schedule: Callable | None, **common,
    ):  # fmt: skip
        super().__init__(**common)
        one_of("detector.ascent", ascent, ("lga", "flooding"))
        at_least_one("detector", epochs=epochs, batch=batch)
        if not 0 < isolate < 1 or floor < 0:
            raise UserError(f"detector.isolate={isolate}, floor={floor}: expected isolate between 0 and 1, floor not below 0")
        self.ascent, self.floor, self.mean, self.isolate = ascent, floor, mean, isolate
        self.epochs, self.batch, self.augment = epochs, batch, augment
        self.optimizer, self.schedule = optimizer, schedule
        try_out("detector", self)

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        how = {"size": self.batch, "shuffle": True, "augment": self.augment, "drop_last": True}
        early = Early(fresh(net), self)
        make_trainer("abl_loss", self.epochs).fit(early.train(), data.batches(split, **how))
        return -losses(early.net, split, cross_entropy)

    def loss(self, ce: Tensor) -> Tensor:
        """ce: (N,), of each image."""
        ce = ce.mean() if self.mean else ce
        bent = (ce - self.floor).abs() + self.floor if self.ascent == "flooding" else (ce.detach() - self.floor).sign() * ce
        return bent.mean()

    def flag(self, scores: Tensor, y: Tensor) -> Tensor:
        flagged = torch.zeros_like(scores, dtype=torch.bool)
        flagged[scores.topk(max(1, round(self.isolate * len(scores)))).indices] = True
        return flagged


class Early(pl.LightningModule):
    """The training; `how` is an ABLLoss."""

    def __init__(self, net: nn.Module, how: ABLLoss):
        super().__init__()
        self.net, self.how = net, how

    def training_step(self, batch, _):
        return self.how.loss(F.cross_entropy(self.net(batch.x), batch.y, reduction="none"))

    def configure_optimizers(self):
        return optimizers(self.net.parameters(), self.how.optimizer, self.how.schedule)
