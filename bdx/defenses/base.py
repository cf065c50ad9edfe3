"""Defense: a backdoored net in, a repaired net out."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import surgery
from bdx.datasets.base import ImageData
from bdx.errors import UserError
from bdx.training import at_least_one, optimizers


class Defense(pl.LightningModule):
    """What every defense is. Class attributes declare what it needs; they are checked before anything is trained.

    needs            which splits: "clean" (reserved images), "train" (the poisoned training set), or nothing
    needs_batchnorm  whether the net must have BatchNorm layers
    trains, cost     in words, for `bdx info defenses`: which parameters, and what that takes

    `run` gets an ImageData in which only the declared splits can be touched, never the test set. What it leaves besides
    the net is kept by the run: `facts` (name -> number) in the row, `pictures` (name -> rows of images, (R,N,C,H,W) in
    [0,1]) and `extras` (name -> module with a `spec` to build it again) beside the net.
    """

    needs: frozenset[str] = frozenset({"clean"})
    needs_batchnorm = False

    def __init__(self, net: nn.Module):
        super().__init__()
        if self.needs_batchnorm and not surgery.batchnorms(net):
            raise UserError(
                f"{type(self).__name__} works on BatchNorm layers, and {net.spec['arch']['_target_']} has none; "
                "take another defense, or an arch with BatchNorm such as preact_resnet18"
            )
        self.net = net
        self.facts: dict[str, float] = {}
        self.pictures: dict[str, Tensor] = {}
        self.extras: dict[str, nn.Module] = {}

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        """make_trainer(stage, epochs) -> a Trainer for one stage. Returns the repaired net, in any mode."""
        raise NotImplementedError(f"{type(self).__name__} must say how it repairs a net")


class Tuning(Defense):
    """A defense of one loop over the reserved images: override `training_step`.

    epochs, batch, augment (the data set's augmentation or none) · optimizer(params), schedule(optimizer): partials
    """

    def __init__(self, net: nn.Module, *, epochs: int, batch: int, augment: bool, optimizer: Callable, schedule):
        super().__init__(net)
        at_least_one("defense", epochs=epochs, batch=batch)
        self.epochs, self.batch, self.augment = epochs, batch, augment
        self.optimizer, self.schedule = optimizer, schedule

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch.x), batch.y)

    def trained(self):
        """The parameters that the optimizer gets."""
        return self.net.parameters()

    def configure_optimizers(self):
        return optimizers(self.trained(), self.optimizer, self.schedule)

    def batches(self, data: ImageData):
        return data.batches(data.clean, size=self.batch, shuffle=True, augment=self.augment, stage=1)

    def ready(self) -> Tuning:
        """What the loop starts from: here, everything in train mode."""
        return self.train()

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        make_trainer(type(self).__name__, self.epochs).fit(self.ready(), self.batches(data))
        return self.net
