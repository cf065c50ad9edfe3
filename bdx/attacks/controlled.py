"""Controlled: the attacker trains the net himself and hands over its weights; there is no poisoned training set.

Three kinds of it. Controlled: in each step every image has one role. Twofold: every image is seen twice, clean and
triggered. Joint: a network that makes triggers is trained along with the victim, and travels with its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdx.adversarial import hardened
from bdx.attacks.base import Attack
from bdx.datasets.base import Batches, ImageData
from bdx.errors import UserError
from bdx.sharpness import sharpness_aware
from bdx.split import pixels
from bdx.training import optimizers, try_out


class Roles(NamedTuple):
    """Rows of a batch of n, no row twice. backdoor (k,): triggered, labelled as the attacker wants · cross (m,): changed
    in a way that must not work, label kept · clean (n − k − m,)"""

    backdoor: Tensor
    cross: Tensor
    clean: Tensor


class Mixed(NamedTuple):
    """A batch as bdx.datasets.base.Batch, and the roles of its images."""

    x: Tensor
    y: Tensor
    index: Tensor
    roles: Roles


class Mixing(Batches):
    """Batches whose images get roles, drawn with the batch from the pass's own generator. How many of each follows from
    how many images came before: over a pass each share is met to an image, whatever the batch size."""

    def __init__(self, plain: Batches, attack: Controlled):
        vars(self).update(vars(plain))
        self.attack, self.before = attack, 0

    def __iter__(self) -> Iterator[Mixed]:
        self.before = 0
        return super().__iter__()

    def batch(self, index: Tensor, g: Generator) -> Mixed:
        roles = self.attack.roles(len(index), self.before, g)
        self.before += len(index)
        x, y = self.split.x[index], self.split.y[index]
        y = y.index_copy(0, roles.backdoor, self.attack.relabel(y[roles.backdoor]))
        x = self.attack.plant(x, roles, g)
        x, y = (pixels(x), y) if self.augment is None else self.augment(x, y, self.classes, g)
        return Mixed(x, y, index, roles)


def drawn_anew(attack: Attack) -> None:
    """Refuse what would pick images of a poisoned training set."""
    for key, only in (("ratio_of", "train"), ("select", "random"), ("include_target", True)):
        if (value := getattr(attack, key)) != only:
            raise UserError(
                f"attack.{key}={str(value).lower()}: {type(attack).__name__} poisons no training set, it triggers other "
                f"images in every step; leave it at {str(only).lower()}"
            )


def whole_labels(attack: Attack) -> None:
    """Refuse images with the labels of two: which class shall follow them?"""
    if (alpha := attack.recipe.augment["cutmix"]) > 0:
        raise UserError(
            f"dataset.augment.cutmix={alpha}: {type(attack).__name__} triggers images after augmentation, and needs one "
            "label for each; set dataset.augment.cutmix=0.0"
        )


class Controlled(Attack):
    """ratio, cross_ratio: shares of the images of each step in these roles (see Roles).

    Triggers are put on before augmentation, in whole grey levels: as they are at test time.
    """

    leaves_poison = False

    def __init__(self, net: nn.Module, *, cross_ratio: float, **common):
        super().__init__(net, **common)
        self.cross_ratio = cross_ratio
        if not (0 < self.ratio <= 1 and 0 <= cross_ratio <= 1 - self.ratio):
            raise UserError(
                f"attack.ratio={self.ratio}, attack.cross_ratio={cross_ratio}: expected shares of the images of a step, "
                "the first above 0, together at most 1"
            )
        drawn_anew(self)

    def cross(self, x: Tensor, rows: Tensor, g: Generator) -> Tensor:
        """x (n,C,H,W) uint8, a batch without triggers -> x[rows], changed in a way that must not work, uint8."""
        raise NotImplementedError(f"{type(self).__name__} must say what its cross images look like")

    def plant(self, x: Tensor, roles: Roles, g: Generator) -> Tensor:
        """x (n,C,H,W) uint8, without triggers -> the same images in their roles."""
        planted = x.index_copy(0, roles.backdoor, self.stamp(x[roles.backdoor]))
        return planted.index_copy(0, roles.cross, self.cross(x, roles.cross, g))

    def roles(self, n: int, before: int, g: Generator) -> Roles:
        """Of n images, of which `before` came earlier in the same pass."""
        k, m = (round(share * (before + n)) - round(share * before) for share in (self.ratio, self.cross_ratio))
        order = torch.randperm(n, generator=g, device=g.device)
        return Roles(*order.tensor_split([k, min(k + m, n)]))

    def batches(self, data: ImageData) -> Mixing:
        return Mixing(super().batches(data), self)


class Twofold(Attack):
    """Every image is seen twice in a step: as it is, and triggered under the wanted label. ratio: 1, all of them."""

    leaves_poison = False

    def __init__(self, net: nn.Module, **common):
        super().__init__(net, **common)
        if self.ratio != 1:
            raise UserError(f"attack.ratio={self.ratio}: {type(self).__name__} triggers every image of a step; leave it at 1.0")
        drawn_anew(self)
        whole_labels(self)

    def losses(self, batch, triggered: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies: of the images as they are, and of the triggered ones with the wanted class.

        Both go through the net in one pass. In a pass of its own (the released codes) a batch of triggered images can be
        told from a clean one by BatchNorm's batch statistics, which are not there at test time.
        """
        x, y = torch.cat([batch.x, triggered]), torch.cat([batch.y, self.relabel(batch.y)])
        logits = self.net(hardened(self.net, x, y, self.recipe.budget))
        smooth = self.recipe.label_smoothing
        parts = zip(logits.chunk(2), y.chunk(2), strict=True)
        return tuple(F.cross_entropy(*part, label_smoothing=smooth) for part in parts)


class Joint(Attack):
    """`maker`, a network that makes triggers, has an optimizer of its own; its schedule, if any, counts epochs.

    generator: {optimizer, schedule}, partials. The victim's come from the recipe.
    """

    def __init__(self, net: nn.Module, *, generator: dict, **common):
        super().__init__(net, **common)
        self.generator, self.automatic_optimization = generator, False
        try_out("attack.generator", SimpleNamespace(**generator, epochs=self.recipe.epochs))
        if self.recipe.precision == "16-mixed":
            raise UserError(
                f"train.precision=16-mixed: {type(self).__name__} has two optimizers, and this precision scales the gradients "
                "for one; set train.precision=bf16-mixed or 32-true"
            )

    def configure_optimizers(self):
        made = super().configure_optimizers(), optimizers(self.maker.parameters(), **self.generator)
        return [one if isinstance(one, dict) else {"optimizer": one} for one in made]

    def differentiate(self, closure: Callable):
        """What `closure` returns, which clears the gradients and computes them; with train.sam_rho they are those at the worst
        weights near the victim's."""
        r = self.recipe
        return sharpness_aware(self.net, closure, r.sam_rho, r.sam_adaptive, beside=self)() if r.sam_rho else closure()

    def move_rates(self) -> None:
        """Step the schedules that are due; to be called at the end of a step, which an ordinary training need not."""
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step" or self.trainer.is_last_batch:
                config.scheduler.step()
