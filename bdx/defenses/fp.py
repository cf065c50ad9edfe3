"""FP: features that sleep on clean images are cut, and the net is tuned further without them.

Source: Liu et al., Fine-Pruning, RAID 2018, arXiv 1805.12185; BackdoorBench's budget and fine-tuning.

Features are cut in the order of their mean size on the reserved images, one step after another while accuracy there allows:
those that the classifier gets, by their columns in its first Linear layer, as BackdoorBench does. The paper cuts channels of
the last convolution, which is the same where its output goes to the classifier alone; in a residual net the skip path
carries the channel on, so that a cut convolution (`layer`) silences its branch only. recipe=code ranks by the signed mean
instead, cuts one column fewer than asked for, and goes on from the net of the first step that cost too much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor, nn

from bdx import places, surgery
from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError, one_of
from bdx.pruning import Curve, Rule, feeders, silence


class FP(Tuning):
    """layer      classifier: the features that it gets; or a convolution whose channels are cut: a module's name, or last,
                penultimate, …
    step        share of the channels that one step adds
    threshold   share of the channels to cut, for select=fixed
    select      accuracy: while accuracy on the reserved images falls by max_drop at most; or fixed
    recipe      paper, or code, which asks for no layer: the classifier's input, as released
    """

    trains = "all weights, but the features that are cut"
    cost = "three passes over the clean images, what follows the layer for each share, then a training step per image and epoch"

    def __init__(
        self, net: nn.Module, *, layer: str, step: float, threshold: float, select: str, max_drop: float, recipe: str, **loop
    ):
        one_of("defense.recipe", recipe, ("paper", "code"))
        if not 0 < step < 1 or not 0 <= threshold < 1:
            raise UserError(f"defense.step={step}, threshold={threshold}: expected shares of the channels, below 1")
        super().__init__(net, **loop)
        self.rule, self.step, self.recipe = Rule(select, threshold, max_drop), step, recipe
        self.columns = recipe == "code" or layer == "classifier"  # of a Linear layer are cut, and no rows of a convolution
        self.at, self.norm = self.choose(layer)
        self.cut = torch.empty(0, dtype=torch.long)  # channels that stay silent

    def choose(self, layer: str) -> tuple[str, str | None]:
        """(the layer that is pruned, the BatchNorm that it feeds or None)"""
        if self.columns:
            names = {m: n for n, m in self.net.named_modules()}
            linear = [m for m in places.linears(self.net, "classifier") if isinstance(m, nn.Linear)]
            return names[linear[0]], None
        at = places.locate(self.net, layer, self.net.sample())
        if not isinstance(self.net.get_submodule(at), nn.Conv2d):
            raise UserError(f"defense.layer={layer}: {at} is no convolution; name one, or take classifier, whose input is cut")
        return at, next((norm for norm, convs in feeders(self.net).items() if convs == (at,)), None)

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        order = self.activation(data).argsort()
        grid = [i * self.step for i in range(1, ceil(1 / self.step - 1e-9))]
        curve = self.rule.prune(self.net, lambda net, share: self.prune(net, order, share), grid, data, self.at)
        if self.recipe == "code" and (tried := curve.spec["thresholds"]):
            curve = Curve(tried, curve.spec["accuracies"], tried[-1], replace(curve.replay, chosen=tried[-1]))
        self.cut = self.prune(self.net, order, curve.chosen or 0.0)
        curve.report(self)
        self.facts["silent_channels"] = len(self.cut)
        return super().run(data, make_trainer)

    @torch.no_grad()
    def activation(self, data: ImageData) -> Tensor:
        """(C,) mean over the reserved images and positions: of the size, or as recipe=code has it with the sign."""
        sums = []
        batches = data.batches(data.clean, size=self.batch, shuffle=False, augment=self.augment, stage=2)
        with surgery.mode(self.net, False):
            for batch in batches:
                if self.columns:
                    with surgery.watch_input(self.net, self.at, (seen := []).append):
                        self.net(batch.x)
                    z = seen[0].reshape(len(batch.x), -1, seen[0].shape[-1]).transpose(1, 2)  # (N,C,positions)
                else:
                    with surgery.watch_output(self.net, self.norm or self.at) as seen:
                        self.net(batch.x)
                    z = seen[0].flatten(2)
                sums.append((z if self.recipe == "code" else z.abs()).mean(2).sum(0))
        return torch.stack(sums).sum(0) / len(data.clean)

    def prune(self, net: nn.Module, order: Tensor, share: float) -> Tensor:
        """Silence the first `share` of `order` in `net`, and return them."""
        count = ceil(len(order) * share - 1e-9)
        cut = order[: max(count - (self.recipe == "code"), 0)]
        self.hush(net, cut)
        return cut

    @torch.no_grad()
    def hush(self, net: nn.Module, cut: Tensor) -> None:
        module = net.get_submodule(self.at)
        if self.columns:
            module.weight[:, cut] = 0
            return
        module.weight[cut] = 0
        if module.bias is not None:
            module.bias[cut] = 0
        if self.norm:
            silence(net.get_submodule(self.norm), cut, beta=True)

    def on_train_batch_end(self, *_):
        self.hush(self.net, self.cut)
