"""MCR: a net from the curve of low clean loss between the attacked net and its fine-tuned copy.

Source: Zhao et al., Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness, ICLR 2020, arXiv 2005.00060;
sec. 3.

    θ(t) = Σ_i C(n,i) tⁱ(1−t)ⁿ⁻ⁱ P_i,   P_0 the attacked net, P_n the copy, the others learned:
    min of CE(f_θ(t)(x), y),   t uniform in [0,1] for each batch

The net returned is θ(t) at a t that is given, with BatchNorm's statistics taken anew from the clean images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import comb
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError
from bdx.training import at_least_one, try_out


class MCR(Tuning):
    """points   of the Bezier curve, both ends included
    t           where the net is taken: 0 is the attacked net, 1 the copy
    end         epochs, batch, augment, optimizer, schedule of the copy's fine-tuning
    """

    trains = "all weights, twice: the far end and the bends"
    cost = "per clean image and epoch: one training step; before that, 100 epochs of the same for the far end"

    def __init__(self, net: nn.Module, *, points: int, t: float, end: dict, **loop):
        if points < 3 or not 0 <= t <= 1:
            raise UserError(f"defense.points={points}, t={t}: expected 3 points or more, and t from 0 to 1")
        at_least_one("defense.end", epochs=end["epochs"], batch=end["batch"])
        try_out("defense.end", SimpleNamespace(**end))
        super().__init__(net, **loop)
        self.points, self.t, self.end = points, t, end

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        end = Tuning(copy.deepcopy(self.net), **self.end)
        make_trainer("fine-tuning", end.epochs).fit(end.ready(), end.batches(data))
        self.draw(end.net)
        super().run(data, make_trainer)
        with torch.no_grad():
            for p, value in zip(self.net.parameters(), self.curve(self.t), strict=True):
                p.copy_(value)
        update_bn(data.batches(data.clean, size=self.batch, shuffle=False, augment=False), self.net)
        return self.net.requires_grad_(True)

    def draw(self, end: nn.Module) -> None:
        """The curve starts as a straight line, from the net to `end` (both kept as they are)."""
        ends = [[p.detach().clone() for p in n.parameters()] for n in (self.net, end)]
        n = self.points - 1
        rows = [[torch.lerp(a, b, i / n) for a, b in zip(*ends, strict=True)] for i in range(self.points)]
        self.control = nn.ModuleList(nn.ParameterList(row) for row in rows)
        for fixed in (self.control[0], self.control[-1], self.net):
            fixed.requires_grad_(False)

    def trained(self):
        return (p for row in self.control[1:-1] for p in row)

    def curve(self, t: float | Tensor) -> list[Tensor]:
        """θ(t), parameter by parameter."""
        n = self.points - 1
        weights = [comb(n, i) * t**i * (1 - t) ** (n - i) for i in range(self.points)]
        return [sum(w * p for w, p in zip(weights, row, strict=True)) for row in zip(*self.control, strict=True)]

    def training_step(self, batch, _):
        point = self.curve(torch.rand((), device=batch.x.device))
        names = (name for name, _ in self.net.named_parameters())
        return F.cross_entropy(functional_call(self.net, dict(zip(names, point, strict=True)), (batch.x,)), batch.y)
