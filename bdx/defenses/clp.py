"""CLP: channels through which a small change can grow more than through their neighbours are cut. No data are used.

Source: Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv 2208.03111; sec. 4.

    σ_c = |γ_c| / √(var_c + ε) · ‖W_c‖₂,   W_c = the convolution's weights of output channel c as (inputs, kernel)
    a channel goes where σ_c > mean + u·std over its layer

Where a BatchNorm's input is a sum of convolutions (pre-activation blocks), ‖W_c‖₂ is the root of their summed squares: a
bound on the sum as a function of all their inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Defense
from bdx.errors import UserError, one_of
from bdx.pruning import LINEAR_MAPS, Rule, affine, cut_outliers, feeders


class CLP(Defense):
    """u         standard deviations above the layer's mean, for select=fixed
    select      fixed, or accuracy: the smallest u at which accuracy on the reserved images falls by max_drop at most
    recipe      paper: a BatchNorm goes with what feeds it, and has its ε; code: with the convolution before it in the list
                of modules, and without
    """

    trains = "nothing: channels are cut"
    cost = "the singular values of the weights; with select=accuracy one pass for each threshold tried"
    needs = frozenset()
    needs_batchnorm = True

    def __init__(self, net: nn.Module, *, u: float, select: str, max_drop: float, recipe: str):
        one_of("defense.recipe", recipe, ("paper", "code"))
        super().__init__(net)
        self.rule, self.recipe = Rule(select, u, max_drop), recipe
        self.needs = self.needs | self.rule.needs
        pairs = feeders(net) if recipe == "paper" else before(net)
        self.pairs = {norm: convs for norm, convs in pairs.items() if norm in affine(net)}
        if not self.pairs:
            raise UserError("CLP cuts channels of convolutions that feed a BatchNorm, and this net has none such")

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        return cut_outliers(self, {norm: self.bound(norm, convs) for norm, convs in self.pairs.items()}, data)

    @torch.no_grad()
    def bound(self, norm: str, convs: tuple[str, ...]) -> Tensor:
        """(C,) how much a channel changes at most, per change of the patches that it sees."""
        bn, eps = self.net.get_submodule(norm), self.net.get_submodule(norm).eps if self.recipe == "paper" else 0
        squares = sum(largest_singular(self.net.get_submodule(conv).weight).square() for conv in convs)
        return bn.weight.abs() / (bn.running_var + eps).sqrt() * squares.sqrt()


def largest_singular(weight: Tensor) -> Tensor:
    """(C,) of each channel's weights as a matrix (inputs, kernel): the root of the largest eigenvalue of MᵀM."""
    m = weight.double().reshape(len(weight), weight.shape[1], -1)
    return torch.linalg.eigvalsh(m.mT @ m)[:, -1].clamp_min(0).sqrt().float()


def before(net: nn.Module) -> dict[str, tuple[str]]:
    """BatchNorm's name -> the convolution before it in the order of modules, if it has as many channels (released code)."""
    found, last = {}, None
    for name, module in net.named_modules():
        if isinstance(module, LINEAR_MAPS):
            last = name, len(module.weight)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and last and last[1] == module.num_features:
            found[name] = (last[0],)
    return found
