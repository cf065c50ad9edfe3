"""RNP: a net unlearns the clean task; channels that recovering it does not bring back are the backdoor's, and are cut.

Source: Li et al., Reconstructive Neuron Pruning, ICML 2023, arXiv 2305.14876; sec. 3.

Unlearn, on a copy:   max over all weights of CE, until accuracy on the clean images is down to `stop`
Recover, there:       min over m in [0,1]ᶜ of α CE, m in front of BatchNorm's γ
Cut, in the net as it came:  γ = 0 where m ≤ a threshold. The released code picks it by ASR on test images; not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Defense
from bdx.errors import UserError
from bdx.pruning import Masks, Rule, thresholds
from bdx.training import at_least_one, optimizers, try_out


class Stage(pl.LightningModule):
    """Loss times `sign` on `model`; `stop`: the accuracy over an epoch's batches at which it is the last one."""

    def __init__(self, model: nn.Module, params, how: dict, factor: float, stop: float | None = None):
        super().__init__()
        self.model, self.params, self.how, self.factor, self.stop = model, params, how, factor, stop

    def configure_optimizers(self):
        return optimizers(self.params, self.how["optimizer"], self.how["schedule"])

    def on_train_epoch_start(self):
        self.hits, self.seen = 0, 0

    def training_step(self, batch, _):
        logits = self.model(batch.x)
        y = batch.y if batch.y.ndim == 1 else batch.y.argmax(1)  # after CutMix, the larger part
        self.hits, self.seen = self.hits + (logits.detach().argmax(1) == y).sum(), self.seen + len(y)
        return self.factor * F.cross_entropy(logits, batch.y)

    def on_before_optimizer_step(self, _):
        if clip := self.how.get("clip"):
            nn.utils.clip_grad_norm_(self.params, clip)

    def on_train_batch_end(self, *_):
        if isinstance(self.model, Masks):
            self.model.clip()

    def on_train_epoch_end(self):
        if self.stop is not None and float(self.hits) <= self.stop * self.seen:
            self.trainer.should_stop = True


class RNP(Defense):
    """images     how many of the reserved images, drawn at random
    batch, augment   of both stages
    stop        accuracy at which unlearning ends
    unlearn, recover   epochs, optimizer, schedule of each stage; unlearn: clip, the gradient's largest norm or null;
                recover: alpha
    threshold   masks up to it are cut, for select=fixed
    select      accuracy: the last threshold of 0, step, … last up to which accuracy on the reserved images falls by
                max_drop at most; or fixed
    """

    trains = "all weights of a copy, then a mask for each BatchNorm channel"
    cost = "per clean image: at most 20 epochs of unlearning and 20 of recovery; then one pass for each threshold tried"
    needs_batchnorm = True

    def __init__(
        self, net: nn.Module, *, images: int, batch: int, augment: bool, stop: float, unlearn: dict, recover: dict,
        threshold: float, select: str, max_drop: float, step: float, last: float,
    ):  # fmt: skip
        at_least_one("defense", images=images, batch=batch)
        for name, stage in (("unlearn", unlearn), ("recover", recover)):
            at_least_one(f"defense.{name}", epochs=stage["epochs"])
            try_out(f"defense.{name}", SimpleNamespace(**stage))
        if not 0 <= stop < 1:
            raise UserError(f"defense.stop={stop}: expected 0 <= stop < 1")
        super().__init__(net)
        self.images, self.batch, self.augment, self.stop = images, batch, augment, stop
        self.unlearn, self.recover, self.rule = unlearn, recover, Rule(select, threshold, max_drop)
        self.grid = thresholds(step, last)

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        scratch = copy.deepcopy(self.net)
        stage = Stage(scratch, list(scratch.parameters()), self.unlearn, -1.0, self.stop)
        self.fit("unlearn", stage, data, make_trainer)
        self.facts["unlearned_acc"] = float(stage.hits) / stage.seen
        masks = Masks(scratch)
        self.fit("recover", Stage(masks, [masks.mask], self.recover, self.recover["alpha"]), data, make_trainer)
        self.rule.prune(self.net, masks.prune, self.grid, data).report(self)
        return self.net

    def fit(self, name: str, stage: Stage, data: ImageData, make_trainer: Callable) -> None:
        order = torch.randperm(len(data.clean), generator=torch.Generator().manual_seed(data.seed))[: self.images]
        some, seed = self.trusted(data)[order.to(data.clean.x.device)], {"unlearn": 1, "recover": 2}[name]
        how = {"size": self.batch, "shuffle": True, "augment": self.augment, "stage": seed}
        make_trainer(name, stage.how["epochs"]).fit(stage.train(), data.batches(some, **how))
