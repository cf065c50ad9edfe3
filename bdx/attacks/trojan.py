"""Trojan (TrojanNN): a trigger inside a mask is optimised until two neurons of a clean net fire, and is added.

Source: Liu et al. 2018, Trojaning attack on neural networks, NDSS, sec. 4.1, as BackdoorBench poisons data with it: the two
inputs of the last Linear layer with the largest Σ|W|; cost Σ(activation − 100)²; sign steps of 0.1, at most 0.3 away from
where it starts; x' = x + t, clipped. The benchmark builds its net with 1000 classes, so that the layer it reads is random,
shows it pixels that are not normalised, takes an apple from a file as mask and start, and adds bytes, which wrap modulo 256
where a sum exceeds 255. Here the net has the right classes, and normalises as in its training; mask and start are drawn, and
sums are clipped.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from bdx import places
from bdx.attacks.made import Made, Progress
from bdx.errors import UserError, one_of
from bdx.surgery import watch_input


class Trojan(Made):
    """form: disc or square. side, margin: of the mask at 32×32, in pixels, and from the lower right corner. neurons,
    activation: how many shall reach what. radius: how far a pixel may move from its start. step, steps: of the search; it
    ends where the cost falls below `enough`. file: a picture to add instead (black adds nothing)."""

    makes = ("added",)
    aimed = False  # no class is asked for: the neurons are chosen by their weights

    def __init__(
        self, net: nn.Module, *, form: str, side: int, margin: int, neurons: int, activation: float, radius: float,
        step: float, steps: int, enough: float, file: str | None, **common,
    ):  # fmt: skip
        super().__init__(net, **common)
        one_of("attack.form", form, ("disc", "square"))
        if side < 1 or margin < 0 or side + margin > 32:
            raise UserError(f"attack.side={side}, margin={margin}: expected a mask inside 32×32, which is scaled afterwards")
        if min(neurons, steps) < 1 or min(radius, step) <= 0:
            raise UserError(f"attack.neurons={neurons}, steps={steps}, radius={radius}, step={step}: expected more than 0")
        layers = [m for m in places.linears(net, "classifier") if isinstance(m, nn.Linear)]
        if neurons > layers[-1].in_features:
            raise UserError(f"attack.neurons={neurons}: this net's last layer has {layers[-1].in_features} inputs")
        self.form, self.side, self.margin, self.neurons, self.activation = form, side, margin, neurons, activation
        self.radius, self.step, self.steps, self.enough, self.file = radius, step, steps, enough, file
        self.register_buffer("added", self.own_picture(file))

    @property
    def wanting(self) -> bool:
        return self.file is None and super().wanting

    def mask(self) -> Tensor:
        """(C,H,W) of 0 and 1."""
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        centre, half = 32 - self.margin - (self.side + 1) / 2, self.side / 2
        dy, dx = (y - centre).abs(), (x - centre).abs()
        inside = (dy.maximum(dx) if self.form == "square" else (dy.square() + dx.square()).sqrt()) < half
        return self.scaled(inside.float().expand(3, 32, 32))

    def make(self, data, net, report):
        last = [m for m in places.linears(net, "classifier") if isinstance(m, nn.Linear)][-1]
        chosen = last.weight.abs().sum(0).topk(self.neurons).indices
        at = next(name for name, module in net.named_modules() if module is last)
        device, mask = data.train.x.device, self.mask().to(data.train.x.device)
        start = torch.rand(self.shape, generator=Generator().manual_seed(self.seed)).to(device)
        low, high = (start - self.radius).clamp_min(0) * mask, (start + self.radius).clamp_max(1) * mask
        t, best, least = start * mask, start * mask, torch.tensor(torch.inf, device=device)
        say, first = Progress(report, "trigger", self.steps), None
        for i in range(self.steps):
            t = t.detach().requires_grad_()
            cost = (self.fired(net, at, t)[chosen] - self.activation).square().sum()
            better = cost.detach() < least
            best, least = torch.where(better, t.detach(), best), torch.where(better, cost.detach(), least)
            first = least if first is None else first
            say(i + 1, least)
            if i % 20 == 0 and float(least) < self.enough:
                break
            (grad,) = torch.autograd.grad(cost, t)
            t = (t - self.step * grad.sign()).clamp(low, high)
        return {"added": best}, {"neurons": chosen.tolist(), "cost_first": float(first), "cost": float(least)}

    @staticmethod
    def fired(net: nn.Module, at: str, t: Tensor) -> Tensor:
        """(features,): the input of the module `at` when the net sees the trigger on black."""
        seen = []
        with watch_input(net, at, lambda z: seen.append(z.flatten())):
            net(t[None])
        return seen[0]

    def trigger(self, x: Tensor) -> Tensor:
        return (x + self.added.to(x.device)).clamp(0, 1)
