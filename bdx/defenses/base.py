"""Defense: a backdoored net in, a repaired net out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.archs.base import fresh
from bdx.contrastive import Projector, contrast, nt_xent
from bdx.datasets.base import Batches, ImageData
from bdx.errors import UserError
from bdx.pruning import Replay
from bdx.split import Split, pixels
from bdx.training import at_least_one, optimizers, try_out
from bdx.views import Twice


class Defense(pl.LightningModule):
    """What every defense is. Class attributes declare what it needs; they are checked before anything is trained.

    needs            which splits: "clean" (reserved images), "train" (the poisoned training set), or nothing
    needs_batchnorm  whether the net must have BatchNorm layers
    takes_scaled     whether train.precision=16-mixed will do, which scales a loss before its gradient is taken
    takes_mixed      whether CutMix will do, which gives an image two labels
    trains, cost     in words, for `bdx info defenses`: which parameters, and what that takes

    `run` gets an ImageData in which only the declared splits can be touched, never the test set. What it leaves besides
    the net is kept by the run: `facts` (name -> number or word) in the row, `pictures` (name -> rows of images, (R,N,C,H,W) in
    [0,1]) and `extras` (name -> module with a `spec` to build it again) beside the net.
    """

    needs: frozenset[str] = frozenset({"clean"})
    needs_batchnorm = False
    takes_scaled = True
    takes_mixed = True

    def __init__(self, net: nn.Module):
        super().__init__()
        if not isinstance(self.needs, frozenset) or not self.needs <= {"clean", "train"}:
            raise UserError(f"{type(self).__name__}.needs={self.needs!r}: expected a frozenset of clean, train, or of none")
        if self.needs_batchnorm and not surgery.batchnorms(net):
            raise UserError(
                f"{type(self).__name__} works on BatchNorm layers, and {net.spec['arch']['_target_']} has none; "
                "take another defense, or an arch with BatchNorm such as preact_resnet18"
            )
        self.net = net
        self.facts: dict[str, float | str] = {}
        self.notes: list[str] = []
        self.pictures: dict[str, Tensor] = {}
        self.extras: dict[str, nn.Module] = {}
        self.replay: Replay | None = None  # of a threshold's choice

    def face(self, attack) -> None:
        """Called before `run`, for a method that can be told to let the attacker shape its own training; of no other."""

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        """make_trainer(stage, epochs) -> a Trainer for one stage. Returns the repaired net, in any mode."""
        raise NotImplementedError(f"{type(self).__name__} must say how it repairs a net")

    def trusted(self, data: ImageData) -> Split:
        """The reserved images; which classes they lack is said by the run."""
        counts = data.clean.y.cpu().bincount(minlength=data.num_classes).tolist()
        missing = [name for name, count in zip(data.classes, counts, strict=True) if not count]
        note = (
            f"the {len(data.clean)} reserved images lack {len(missing)} of {data.num_classes} classes "
            f"({', '.join(missing[:3])}{', …' * (len(missing) > 3)}): {type(self).__name__} is told nothing of them; take more "
            "images, or as many of each class by dataset.reserved.balanced=true"
        )
        if missing and note not in self.notes:
            self.notes.append(note)
        return data.clean

    def tunes(self, stage: str) -> bool:
        """Whether the loop `stage` tunes the very net that is returned, so that it could have ended after any epoch."""
        return False

    def renew(self, names: tuple[str, ...] = ("normalize", "body")) -> None:
        """The named modules get the weights of a net just built; the first such net is, at one seed, what the victim started
        from."""
        new = fresh(self.net)
        for name in names:
            self.net.get_submodule(name).load_state_dict(new.get_submodule(name).state_dict())


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

    def tunes(self, stage: str) -> bool:
        mine = {id(p) for p in self.net.parameters()}
        return stage == type(self).__name__ and all(id(p) in mine for p in self.trained())

    def batches(self, data: ImageData):
        return data.batches(self.trusted(data), size=self.batch, shuffle=True, augment=self.augment, stage=1)

    def ready(self) -> Tuning:
        """What the loop starts from: here, everything in train mode."""
        return self.train()

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        make_trainer(type(self).__name__, self.epochs).fit(self.ready(), self.batches(data))
        return self.net


class Stage(pl.LightningModule):
    """One loop of several: `loss(batch)`, a tensor or a dict with `loss`, is lowered by `params` and those of `extra`.
    how: optimizer and schedule."""

    def __init__(self, net: nn.Module, how: dict, loss: Callable, params: Iterable, extra: nn.Module | None):
        super().__init__()
        self.net, self.how, self.loss, self.extra = net, how, loss, extra
        self.tuned = [*params, *(extra.parameters() if extra else ())]

    def training_step(self, batch, _):
        return self.loss(batch)

    def configure_optimizers(self):
        return optimizers(self.tuned, self.how["optimizer"], self.how["schedule"])


class Staged(Defense):
    """A defense of several loops, each a key of its YAML with epochs, batch, optimizer, schedule and what else it takes:
    drop_last: false, where a last batch that is not full is no small part of the images."""

    def __init__(self, net: nn.Module, **stages: dict):
        for name, how in stages.items():
            at_least_one(f"defense.{name}", epochs=how["epochs"], batch=how["batch"])
            try_out(f"defense.{name}", SimpleNamespace(**how))
        super().__init__(net)
        self.stages = stages

    def batches(self, name: str, data: ImageData, split: Split, augment, part: int = 0) -> Batches:
        """What the loop `name` goes over; its random numbers are its own. part: of several splits that it goes over at once,
        each with its own, too."""
        own = self.stages[name]
        how = {"size": own["batch"], "shuffle": True, "drop_last": own.get("drop_last", True)}
        return data.batches(split, augment=augment, stage=1 + list(self.stages).index(name) + part * len(self.stages), **how)

    def fit(self, name: str, batches, loss: Callable, make_trainer: Callable, params=None, extra: nn.Module | None = None):
        """Run the loop `name`, all in train mode. params: what is tuned, by default the whole net; extra: a module that
        the loss has besides."""
        stage = Stage(self.net, self.stages[name], loss, self.net.parameters() if params is None else params, extra)
        make_trainer(name, self.stages[name]["epochs"]).fit(stage.train(), batches)

    def away_from(self, at: str) -> list[nn.Parameter]:
        """The parameters outside the module named `at`."""
        inside = set(self.net.get_submodule(at).parameters())
        return [p for p in self.net.parameters() if p not in inside]

    def learn_views(self, name: str, data: ImageData, view: Callable, make_trainer: Callable, near: Callable | None) -> str:
        """Contrastive learning of everything before the classifier, whose name is returned. near(batch) -> (N,N), see
        contrastive.contrast; None: SimCLR. The loop's further keys: temperature, width (of the projection), projector_norm."""
        how, at = self.stages[name], places.classifier(self.net)
        width = math.prod(places.input_shape(self.net, at, pixels(data.train.x[:1])))
        head = Projector(width, how["width"], how["projector_norm"])

        def loss(batch) -> Tensor:
            z = head(surgery.features(self.net, at, batch.x))
            return contrast(z, near(batch), how["temperature"]) if near else nt_xent(z, how["temperature"])

        self.fit(name, self.batches(name, data, data.train, Twice(view)), loss, make_trainer, self.away_from(at), head)
        return at
