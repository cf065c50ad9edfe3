"""Pruning: which convolution feeds which BatchNorm, a mask over BatchNorm channels, and how far to prune.

How far is never decided on test images (`Rule`). What is pruned is set to zero in the weights themselves, so that the net
keeps its modules and its interface.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bdx import surgery
from bdx.errors import UserError, one_of
from bdx.split import Split, pieces, pixels

LINEAR_MAPS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def affine(net: nn.Module) -> dict[str, nn.Module]:
    """name -> BatchNorm layer, of those that have γ and β."""
    norms = surgery.batchnorms(net)
    return {n: m for n, m in net.named_modules() if m in norms and m.weight is not None}


def feeders(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """BatchNorm's name -> names of the convolutions (or Linear layers) whose outputs, summed, are that layer's input.

    Read off the graph of one forward pass, not off the order of modules. One name for a BatchNorm right behind a
    convolution; several in a pre-activation block, whose first BatchNorm gets what a stage has summed up so far. Left
    out: a BatchNorm behind anything else (an activation, a concatenation), or that runs twice on different inputs.
    """
    made: dict = {}  # the graph's nodes that convolutions end in
    fed: dict[str, set[tuple[str, ...] | None]] = {}

    def sources(node) -> tuple[str, ...] | None:
        if node in made:
            return (made[node],)
        if type(node).__name__ != "AddBackward0":
            return None
        parts = [sources(n) for n, _ in node.next_functions]
        return None if None in parts else tuple(dict.fromkeys(name for part in parts for name in part))

    handles = []
    for name, module in net.named_modules():
        if isinstance(module, LINEAR_MAPS):
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: made.update({out.grad_fn: name})))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            take = lambda _, args, name=name: fed.setdefault(name, set()).add(sources(args[0].grad_fn))
            handles.append(module.register_forward_pre_hook(take))
    sample = torch.zeros(2, *net.spec["shape"], device=next(net.parameters()).device, requires_grad=True)
    try:
        with torch.enable_grad(), surgery.mode(net, False):
            net(sample)
    finally:
        for handle in handles:
            handle.remove()
    return {name: next(iter(convs)) for name, convs in fed.items() if len(convs) == 1 and None not in convs}


def silence(norm: nn.Module, channels: Tensor, beta: bool) -> None:
    """γ = 0, and β = 0 too if asked, for `channels`: (C,) bool or indices."""
    with torch.no_grad():
        norm.weight[channels] = 0
        if beta:
            norm.bias[channels] = 0


def above(score: Tensor, u: float) -> Tensor:
    """(C,) bool: channels whose score is more than u standard deviations above their layer's mean."""
    return score > score.mean() + u * score.std() if len(score) > 1 else torch.zeros_like(score, dtype=torch.bool)


def cut_outliers(defense, scores: dict[str, Tensor], data) -> nn.Module:
    """Channels whose score stands out in their layer lose γ and β; scores: BatchNorm's name -> (C,). How many standard
    deviations stand out is for `defense.rule` to say: its threshold, or the last of 10, 9.5, … 0. Returns the net."""
    grid = [10 - i / 2 for i in range(21)]
    defense.rule.prune(defense.net, lambda net, u: prune_outliers(net, scores, u), grid, data).report(defense)
    return defense.net


def prune_outliers(net: nn.Module, scores: dict[str, Tensor], u: float) -> None:
    for name, score in scores.items():
        silence(net.get_submodule(name), above(score, u), beta=True)


def watch_norms(net: nn.Module, x: Tensor, visit: Callable[[Tensor, nn.Module], Tensor]) -> dict[str, Tensor]:
    """BatchNorm's name -> visit(its input, the layer), in one pass of x (N,C,H,W) in eval mode and full precision."""
    norms, seen = affine(net), {}

    def keep(module, args, name):
        seen[name] = visit(args[0], module)

    handles = [m.register_forward_pre_hook(lambda m, args, n=n: keep(m, args, n)) for n, m in norms.items()]
    try:
        with torch.no_grad(), surgery.mode(net, False):
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Masks(nn.Module):
    """A number for each BatchNorm channel of `net`, all in one vector, in front of γ; the net itself is frozen."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.norms = affine(net)
        self.sizes = [len(m.weight) for m in self.norms.values()]
        self.mask = nn.Parameter(torch.ones(sum(self.sizes)))

    def forward(self, x: Tensor, gamma: Tensor | None = None, beta: Tensor | float = 1.0) -> Tensor:
        """Logits with `gamma`·γ (the mask if None) and `beta`·β: vectors over all channels."""
        gamma = self.mask if gamma is None else gamma
        parts = zip(self.norms.items(), gamma.split(self.sizes), strict=True)
        changed = {f"{name}.weight": m.weight * g for (name, m), g in parts}
        if isinstance(beta, Tensor):
            parts = zip(self.norms.items(), beta.split(self.sizes), strict=True)
            changed |= {f"{name}.bias": m.bias * b for (name, m), b in parts}
        return functional_call(self.net, changed, (x,))

    @torch.no_grad()
    def clip(self) -> None:
        self.mask.clamp_(0, 1)

    def prune(self, net: nn.Module, threshold: float) -> None:
        """γ = 0 in `net` wherever the mask is not above `threshold`; β stays, as the authors of ANP and RNP have it."""
        for name, mask in zip(self.norms, self.mask.detach().split(self.sizes), strict=True):
            silence(net.get_submodule(name), mask <= threshold, beta=False)


@dataclass(frozen=True)
class Rule:
    """How far to prune: select=fixed prunes at `threshold`; select=accuracy at the last of a grid of thresholds, mild
    ones first, up to which accuracy on the reserved images stays within `max_drop` (a fraction) of what it was.

    All reserved images are used, those too on which masks were learned: there is no second set to hold out.
    """

    select: str
    threshold: float
    max_drop: float

    def __post_init__(self):
        one_of("defense.select", self.select, ("accuracy", "fixed"))
        if not 0 <= self.max_drop <= 1:
            raise UserError(f"defense.max_drop={self.max_drop}: expected a fraction from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"clean"} if self.select == "accuracy" else ())

    def prune(self, net: nn.Module, prune: Callable, grid: list[float], data, at: str | None = None) -> Curve:
        """prune(net, threshold) prunes in place, nothing that runs before the module `at` (null: anything). `net` is left
        as the rule says; where even the first threshold costs too much, as it was. Returns the thresholds looked at."""
        state = {k: v.clone() for k, v in net.state_dict().items()}
        if self.select == "fixed":
            prune(net, self.threshold)
            return Curve([], [], self.threshold, Replay(state, prune, sorted({*grid, self.threshold}), self.threshold))
        replay, before, chosen, seen = Replay(state, prune, grid, None), accuracy(net, data.clean), None, {}
        for threshold, seen[threshold] in replay.behind(net, at, data.clean) if at else replay.one_by_one(net, data.clean):
            if seen[threshold] < before - self.max_drop - 1e-9:
                break
            chosen = threshold
        net.load_state_dict(state)
        if chosen is not None:
            prune(net, chosen)
        return Curve(list(seen), list(seen.values()), chosen, replace(replay, chosen=chosen))


@dataclass(frozen=True)
class Replay:
    """The choice of a threshold, to be gone through again: the net's state before, prune(net, threshold), the thresholds."""

    state: dict[str, Tensor]
    prune: Callable[[nn.Module, float], None]
    grid: list[float]
    chosen: float | None

    def at(self, net: nn.Module) -> Iterator[float]:
        """The thresholds, `net` being pruned at each in turn."""
        for threshold in self.grid:
            net.load_state_dict(self.state)
            self.prune(net, threshold)
            yield threshold

    def nets(self, net: nn.Module) -> Iterator[tuple[float, nn.Module]]:
        """(threshold, the net pruned there), one copy of `net` for all of them."""
        net = copy.deepcopy(net)
        for threshold in self.at(net):
            yield threshold, net

    def one_by_one(self, net: nn.Module, split: Split) -> Iterator[tuple[float, float]]:
        """(threshold, accuracy), each as it is asked for."""
        for threshold in self.at(net):
            yield threshold, accuracy(net, split)

    @torch.no_grad()
    def behind(self, net: nn.Module, module: str, split: Split) -> list[tuple[float, float]]:
        """The same for all, where nothing that runs before `module` is pruned: that runs once."""
        right, whole = torch.zeros(len(self.grid), dtype=torch.long, device=split.x.device), nn.Sequential(net)
        with surgery.mode(net, False):
            for x, y in pieces(split.x, split.y):
                with surgery.shared_prefix(whole, f"0.{module}"):
                    right += torch.stack([(whole(pixels(x)).argmax(1) == y).sum() for _ in self.at(net)])
        return [(threshold, n / len(split)) for threshold, n in zip(self.grid, right.tolist(), strict=True)]


class Curve(nn.Module):
    """Accuracy on the reserved images at each threshold that was looked at, for the run to keep; `chosen` or None."""

    def __init__(self, thresholds: list[float], accuracies: list[float], chosen: float | None, replay: Replay | None = None):
        super().__init__()
        self.replay = replay
        self.register_buffer("thresholds", torch.tensor(thresholds))
        self.register_buffer("accuracies", torch.tensor(accuracies))
        self.chosen = chosen
        self.spec = {"_target_": f"{__name__}.Curve", "thresholds": thresholds, "accuracies": accuracies, "chosen": chosen}

    def report(self, defense) -> None:
        """Leave the curve, the threshold and how many BatchNorm channels are silent for the run to keep."""
        defense.replay = self.replay
        norms = affine(defense.net).values()
        defense.facts |= {"threshold": self.chosen, "silent_channels": sum(int((m.weight == 0).sum()) for m in norms)}
        if len(self.thresholds):
            defense.extras["curve"] = self
        if self.chosen is None:
            about = f"at its first threshold, {float(self.thresholds[0]):g}, the accuracy on the reserved images"
            cost = f"{float(self.accuracies[0]):.1%}, more than defense.max_drop below what it was"
            defense.notes.append(f"{type(defense).__name__} prunes nothing: {about} is {cost}")


def thresholds(step: float, last: float) -> list[float]:
    """0, step, … last."""
    if not 0 < step <= last <= 1:
        raise UserError(f"defense.step={step}, last={last}: expected 0 < step <= last <= 1")
    return [round(i * step, 6) for i in range(int(last / step + 1e-6) + 1)]


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Share of `split` that the net, in eval mode, puts into the class of its label."""
    with surgery.mode(net, False):
        return int(sum((net(pixels(x)).argmax(1) == y).sum() for x, y in pieces(split.x, split.y))) / len(split)
