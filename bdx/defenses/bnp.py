"""BNP: channels whose statistics on clean images are far from those that BatchNorm recorded while training are cut.

Source: Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022, sec. 4.

Score = KL( N(μ, v) ‖ N(μ_r, v_r) ) = ½ [ log(v_r/v) + (v + (μ − μ_r)²)/v_r − 1 ],  r: the running statistics.
A channel goes where its score > mean + u·std of its layer. recipe=code takes the statistics of poisoned training images
instead, which its clean batch was overwritten with, and leaves out the logarithm's ½.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Defense
from bdx.errors import UserError, one_of
from bdx.pruning import Rule, cut_outliers, watch_norms
from bdx.training import at_least_one


class BNP(Defense):
    """images    how many images at most, drawn at random
    augment     as in training, or as they are
    u           standard deviations above the layer's mean, for select=fixed
    select      fixed, or accuracy: the smallest u at which accuracy on the reserved images falls by max_drop at most
    recipe      paper: the reserved images; code: images of the poisoned training set, and a factor missing (bnp_code)
    """

    trains = "nothing: channels are cut"
    cost = "one batch of clean images; with select=accuracy, a pass over them for each threshold"
    needs_batchnorm = True
    form = "paper"

    def __init__(self, net: nn.Module, *, images: int, augment: bool, u: float, select: str, max_drop: float, recipe: str):
        one_of("defense.recipe", recipe, ("paper", "code"))
        if recipe != self.form:
            name = {"paper": "bnp", "code": "bnp_code"}[recipe]
            raise UserError(f"defense.recipe={recipe}: take defense={name}, which sets all that differs")
        at_least_one("defense", images=images)
        super().__init__(net)
        self.images, self.augment, self.rule = images, augment, Rule(select, u, max_drop)
        self.needs = self.needs | self.rule.needs

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        split = data.train if "train" in self.needs else self.trusted(data)
        batch = next(iter(data.batches(split, size=self.images, shuffle=True, augment=self.augment, stage=1)))
        half = 0.5 if self.form == "paper" else 1.0
        return cut_outliers(self, watch_norms(self.net, batch.x, partial(divergence, half=half)), data)


class BNPCode(BNP):
    """The released form."""

    cost = "one batch of training images; with select=accuracy, a pass over the clean ones for each threshold"
    needs = frozenset({"train"})
    form = "code"


def divergence(z: Tensor, norm: nn.Module, half: float) -> Tensor:
    """(C,) of the input z (N,C,…) of `norm` from its running statistics; half: the logarithm's factor."""
    var, mean = torch.var_mean(z.float(), [0, *range(2, z.ndim)], correction=0)
    run, var = norm.running_var.clamp_min(1e-12), var.clamp_min(1e-12)
    return half * (run / var).log() + (var + (mean - norm.running_mean).square()) / (2 * run) - 0.5
