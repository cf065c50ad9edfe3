"""EP: channels whose pre-activations fall into two heaps, clean and poisoned, have a low entropy and are cut.

Source: Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022, sec. 4; BackdoorBench's form.

Over images of the poisoned training set: the spatial maximum of each channel of a BatchNorm's input, standardised; the
entropy H of its histogram, bins of 0.1 over the whole layer's range. A channel goes where H < mean − u·std of its layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Defense
from bdx.pruning import Rule, cut_outliers, watch_norms
from bdx.training import at_least_one


class EP(Defense):
    """images    how many images of the poisoned training set, drawn at random
    augment     as in training, or as they are
    u           standard deviations below the layer's mean, for select=fixed
    select      fixed, or accuracy: the smallest u at which accuracy on the reserved images falls by max_drop at most
    """

    trains = "nothing: channels are cut"
    cost = "one batch of training images; with select=accuracy, a pass over the clean ones for each threshold"
    needs = frozenset({"train"})
    needs_batchnorm = True

    def __init__(self, net: nn.Module, *, images: int, augment: bool, u: float, select: str, max_drop: float):
        at_least_one("defense", images=images)
        super().__init__(net)
        self.images, self.augment, self.rule = images, augment, Rule(select, u, max_drop)
        self.needs = self.needs | self.rule.needs

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        how = {"size": self.images, "shuffle": True, "augment": self.augment}
        batch = next(iter(data.batches(data.train, **how, stage=1)))
        scores = watch_norms(self.net, batch.x, lambda z, _: -entropy(standard(z)))
        return cut_outliers(self, scores, data)


def standard(z: Tensor) -> Tensor:
    """(N,C), mean 0 and deviation 1 per channel, of the spatial maxima of z (N,C,…)."""
    top = z.flatten(2).amax(2) if z.ndim > 2 else z
    return (top - top.mean(0)) / top.std(0, correction=0).clamp_min(1e-12)


def entropy(values: Tensor, width: float = 0.1) -> Tensor:
    """(C,) of the histogram of each column of values (N,C), in bins of `width` from the smallest of all values."""
    bins = ((values - values.min()) / width).floor().long()
    counts = values.new_zeros(int(bins.max()) + 1, values.shape[1]).scatter_add_(0, bins, torch.ones_like(values))
    return torch.special.entr(counts / len(values)).sum(0)
