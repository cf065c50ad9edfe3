"""Neural Cleanse: a net has a backdoor if towards one class a far smaller trigger is enough than towards the others.

Source: Wang et al., Neural Cleanse, IEEE S&P 2019; sec. IV, released code.

    min over m, p of CE(f((1 − m)·x + m·p), k) + c_k ‖m‖₁   for each class k,  m and p in [0,1]

Many classes are one problem: Adam works entry by entry, so that what is summed here is what is minimised there.
Outliers: |n_k − median| / (1.4826 median|n − median|) above a threshold where n_k = ‖m_k‖₁ lies below the median.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import surgery
from bdx.datasets.base import ImageData
from bdx.detectors.base import Detector, sample
from bdx.errors import UserError
from bdx.split import Split
from bdx.training import at_least_one, optimizers, try_out

AT_ONCE = 4096  # images of a pass, over all its classes, where at_once is null: the memory that this takes is bounded


class Weights:
    """(K,) each: what every class's search stands at. `update` is the released code's rule, once an epoch:
    c is doubled after `patience` epochs in a row that succeed and divided by 2^1.5 after as many that fail; a class is
    done once c has gone both ways and its best norm has not fallen by 1 % for `stop_after` epochs."""

    def __init__(self, k: int, device, *, cost: float, patience: int, stop_after: int):
        self.patience, self.stop_after = patience, stop_after
        self.cost, self.best = torch.full((k,), cost, device=device), torch.full((k,), torch.inf, device=device)
        self.before = self.best.clone()  # the best norm of the epochs before
        self.up, self.down, self.stale = torch.zeros(3, k, dtype=torch.long, device=device)
        self.rose, self.fell, self.done = torch.zeros(3, k, dtype=torch.bool, device=device)

    def update(self, success: Tensor, norm: Tensor) -> Tensor:
        """success (K,) bool, norm (K,): of an epoch. Returns (K,) bool, which classes have their best trigger now."""
        better = success & (norm < self.best) & ~self.done
        self.best = torch.where(better, norm, self.best)
        improved = self.best < 0.99 * self.before
        self.stale = torch.where(improved, 0, self.stale + self.best.isfinite())
        self.before = torch.minimum(self.best, self.before)
        self.done = self.done | (self.rose & self.fell & (self.stale >= self.stop_after))
        self.up, self.down = torch.where(success, self.up + 1, 0), torch.where(success, 0, self.down + 1)
        up, down = self.up >= self.patience, self.down >= self.patience
        self.cost = torch.where(up, self.cost * 2, torch.where(down, self.cost / 2**1.5, self.cost))
        self.rose, self.fell = self.rose | up, self.fell | down
        self.up, self.down = self.up.masked_fill(up, 0), self.down.masked_fill(down, 0)
        return better


class Search(pl.LightningModule):
    """The triggers towards `classes` (K,), in one batched problem; classes that are done cost nothing any more.

    After a fit: masks (K,1,H,W) and patterns (K,C,H,W) in [0,1]: the smallest that succeeded, or the last where none did.
    """

    def __init__(self, net: nn.Module, classes: Tensor, how: dict):
        super().__init__()
        (c, h, w), k = net.spec["shape"], len(classes)
        self.net, self.classes, self.how = surgery.freeze(net), classes, how
        self.mask, self.pattern = (nn.Parameter(torch.ones(k, n, h, w)) for n in (1, c))

    def triggers(self) -> tuple[Tensor, Tensor]:
        """The masks and patterns as they stand."""
        return self.mask.tanh() / 2 + 0.5, self.pattern.tanh() / 2 + 0.5

    def on_fit_start(self):
        self.classes, how = self.classes.to(self.device), self.how
        rule = {k: how[k] for k in ("cost", "patience", "stop_after")}
        self.weights = Weights(len(self.classes), self.device, **rule)
        self.masks, self.patterns = (t.detach() for t in self.triggers())

    def on_train_epoch_start(self):
        self.left = (~self.weights.done).nonzero()[:, 0]
        self.hits, self.norms = torch.zeros(2, len(self.classes), device=self.device)

    def training_step(self, batch, _):
        m, p = (t[self.left][:, None] for t in self.triggers())
        k, n = self.classes[self.left], len(batch.x)
        logits = self.net(((1 - m) * batch.x + m * p).flatten(0, 1)).float()
        ce = F.cross_entropy(logits, k.repeat_interleave(n), reduction="none").view(-1, n).mean(1)
        norm = m.flatten(1).sum(1)
        with torch.no_grad():
            self.hits[self.left] += (logits.argmax(1).view(-1, n) == k[:, None]).float().mean(1)
            self.norms[self.left] += norm
        return {"loss": (ce + self.weights.cost[self.left] * norm).sum(), "norm": norm.detach().mean()}

    def on_train_epoch_end(self):
        steps = len(self.trainer.train_dataloader)
        success = self.hits / steps >= self.how["success"]
        better = self.weights.update(success, self.norms / steps)
        never = self.weights.best.isinf()
        masks, patterns = (t.detach() for t in self.triggers())
        keep = (better | never).view(-1, 1, 1, 1)
        self.masks, self.patterns = torch.where(keep, masks, self.masks), torch.where(keep, patterns, self.patterns)
        self.trainer.should_stop = bool(self.weights.done.all())

    def configure_optimizers(self):
        return optimizers([self.mask, self.pattern], self.how["optimizer"], None)


def check_search(group: str, how: dict) -> None:
    """Refuse what no search can be made of. how: epochs, batch, at_once, success, cost, patience, stop_after, optimizer."""
    at_least_one(group, **{k: how[k] for k in ("epochs", "batch", "patience", "stop_after")})
    at_least_one(group, at_once=1 if how["at_once"] is None else how["at_once"])
    if not 0 < how["success"] <= 1 or how["cost"] <= 0:
        raise UserError(
            f"{group}.success={how['success']}, cost={how['cost']}: expected success above 0 and at most 1, cost above 0"
        )
    try_out(group, SimpleNamespace(**how, schedule=None))


def smallest(
    net: nn.Module, clean: Split, data: ImageData, how: dict, augment: bool, make_trainer: Callable
) -> tuple[Tensor, Tensor]:
    """Masks (K,1,H,W) and patterns (K,C,H,W) of all classes, by the images of `clean`. Leaves the net frozen."""
    found = []
    at_once = how["at_once"] or (max(1, AT_ONCE // min(how["batch"], len(clean))) if clean.x.is_cuda else 1)
    for classes in torch.arange(data.num_classes).split(at_once):
        stage = Search(net, classes, how)
        batches = data.batches(clean, size=how["batch"], shuffle=True, augment=augment, stage=2)
        turn = f" of class {classes[0]}, of {data.num_classes}" if at_once == 1 else ""
        make_trainer(f"triggers{turn}", how["epochs"]).fit(stage, batches)
        found.append((stage.masks, stage.patterns))
    masks, patterns = (torch.cat(part) for part in zip(*found, strict=True))
    return masks, patterns


def anomalies(norms: Tensor) -> Tensor:
    """(K,) how many deviations each norm lies below the median; 0 above it."""
    below = norms.quantile(0.5) - norms
    deviation = 1.4826 * below.abs().quantile(0.5)
    return below.clamp_min(0) / deviation.clamp_min(1e-12)


def few(classes: int) -> list[str]:
    """What to know of the index of a net with few classes."""
    if classes > 3:
        return []
    most = "0.67 at most" if classes == 2 else "above 2 only where one mask is far smaller than the two others, which are alike"
    return [f"of {classes} classes the anomaly index is {most}: that none is flagged says little here"]


class NeuralCleanse(Detector):
    """Judges the net, and no image: a score for each class, its anomaly index.

    anomaly     index above which a class counts as backdoored
    rule        success (share of images), cost, patience, stop_after: how each class's weight c goes, see Weights
    epochs, batch, augment, optimizer   of the search, over the reserved images, of which `limit` takes fewer
    at_once     classes in one problem; null: one on a CPU, on a GPU as many as keep a pass within AT_ONCE images
    """

    judges = ("net",)
    needs = frozenset({"clean"})

    def __init__(
        self, *, anomaly: float, rule: dict, epochs: int, batch: int, augment: bool, optimizer: Callable, at_once: int | None,
        **common,
    ):  # fmt: skip
        super().__init__(**common)
        self.how = {"epochs": epochs, "batch": batch, "optimizer": optimizer, "at_once": at_once, **rule}
        check_search("detector", self.how)
        if anomaly < 0:
            raise UserError(f"detector.anomaly={anomaly}: expected 0 or more")
        self.augment, self.threshold = augment, anomaly

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        """(K,) the anomaly index of each class."""
        clean = sample(data.clean, self.limit, data.seed)
        self.notes += few(data.num_classes)
        masks, _ = smallest(copy.deepcopy(net), clean, data, self.how, self.augment, make_trainer)
        return anomalies(masks.flatten(1).sum(1))
