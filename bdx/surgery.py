"""Reach inside any net: insert a layer, condition it on a label, freeze, watch features. Where: bdx.places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Inserted(nn.Module):
    """`layer(z)`, or `layer(z, label)`, runs in front of `module`, in its place: it filters that input and nothing else.

    What a skip path carries around `module` does not pass through `layer`. `spec` says how `layer` is built again,
    `condition` where its label comes from (bdx.conditioned.condition), or is None where it takes none.
    `label` is what the pass at hand is conditioned on; `active` is off for a pass of the net as it was.
    """

    def __init__(self, layer: nn.Module, module: nn.Module, spec: dict, condition: dict | None):
        super().__init__()
        self.layer, self.module, self.spec, self.condition = layer, module, spec, condition
        self.label: Tensor | None = None
        self.active = True

    def forward(self, z: Tensor) -> Tensor:
        if not self.active and getattr(self.module, "inplace", False):
            z = z.clone()  # a pass that follows may get the same tensor (shared_prefix)
        if self.active:
            z = self.layer(z) if self.condition is None else self.layer(z, self.label)
        return self.module(z)


def insert(net: nn.Module, at: str, layer: nn.Module, spec: dict, condition: dict | None = None) -> None:
    """Put `layer` in front of the module named `at`, in place. spec: `_target_` and arguments of `layer`."""
    parent, _, child = at.rpartition(".")
    setattr(net.get_submodule(parent), child, Inserted(layer, net.get_submodule(at), spec, condition))


def insertions(net: nn.Module) -> list[dict]:
    """[{at, layer[, condition]}] of everything inserted, as needed to insert it again into a fresh net."""
    found = ((name, m) for name, m in net.named_modules() if isinstance(m, Inserted))
    return [{"at": n, "layer": m.spec} | ({"condition": m.condition} if m.condition else {}) for n, m in found]


@contextmanager
def given(inserted: Inserted, label: Tensor | None, active: bool = True) -> Iterator[None]:
    """Within, passes are conditioned on `label`, or (active=False) run as if nothing were inserted."""
    before = inserted.label, inserted.active
    inserted.label, inserted.active = label, active
    try:
        yield
    finally:
        inserted.label, inserted.active = before


class Prefix:
    """What runs before one module, to be run once for several passes on the same input; see `shared_prefix`."""

    def __init__(self, net: nn.Module, at: str):
        steps = at.split(".")
        path = [net.get_submodule(".".join(steps[:i])) for i in range(1, len(steps))]
        self.at, self.start = net.get_submodule(at), path[0]
        children = [m for p in path for m in p.children() if m is not self.at and m not in path]
        self.outputs: dict[nn.Module, list] = {m: [] for m in children}
        self.passes, self.running, self.left = 0, False, {}

    def begin(self, *_) -> None:
        self.passes, self.running = self.passes + 1, True
        self.left = {m: list(out) for m, out in self.outputs.items()}

    def end(self, *_) -> None:
        self.running = False

    def remember(self, module: nn.Module, args, output) -> None:
        if self.running and self.passes == 1:
            self.outputs[module].append(output)

    def replay(self, module: nn.Module) -> Callable:
        """The module's forward, or its output of the first pass where that pass had come by before `at`."""
        forward = module.forward
        return lambda *args, **kw: self.left[module].pop(0) if self.left.get(module) else forward(*args, **kw)


@contextmanager
def shared_prefix(net: nn.Module, at: str) -> Iterator[None]:
    """Within, every pass of `net` must get the same input: whatever module runs before the module `at` runs in the
    first pass alone, and later passes take its output, with its graph. What stands between modules is run again."""
    if "." not in at:  # the first module of all: nothing runs before it
        yield
        return
    prefix = Prefix(net, at)
    handles = [prefix.start.register_forward_pre_hook(prefix.begin), prefix.at.register_forward_pre_hook(prefix.end)]
    handles += [m.register_forward_hook(prefix.remember) for m in prefix.outputs]
    for module in prefix.outputs:
        module.forward = prefix.replay(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in prefix.outputs:
            del module.forward


@contextmanager
def mode(net: nn.Module, training: bool) -> Iterator[nn.Module]:
    """The net in train or eval mode; afterwards every sub-module is again in the mode it had."""
    before = {m: m.training for m in net.modules()}
    net.train(training)
    try:
        yield net
    finally:
        for module, was in before.items():
            module.training = was


def still_batchnorm(net: nn.Module) -> None:
    """BatchNorm keeps its running statistics and normalises with them, whatever mode the net is in otherwise."""
    for module in batchnorms(net):
        module.eval()


@contextmanager
def unmoved(norms: list[nn.Module]) -> Iterator[None]:
    """Within, BatchNorm layers in train mode keep their running statistics."""
    before = [(norm, norm.momentum) for norm in norms]
    for norm, _ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in before:
            norm.momentum = momentum


def batchnorms(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def freeze(net: nn.Module) -> nn.Module:
    """Eval mode and no weight gradients: an attack through a frozen net pays for the input's gradient only."""
    return net.eval().requires_grad_(False)


@contextmanager
def watch_input(net: nn.Module, at: str, visit: Callable[[Tensor], None]) -> Iterator[None]:
    """`visit(z)` for every input z of the module named `at`."""
    handle = net.get_submodule(at).register_forward_pre_hook(lambda _, args: visit(args[0]))
    try:
        yield
    finally:
        handle.remove()


def features(net: nn.Module, at: str, x: Tensor) -> Tensor:
    """The input of the module named `at`, flat (N,D), with its graph, when x (N,C,H,W) runs through the net."""
    seen = []
    with watch_input(net, at, seen.append):
        net(x)
    return seen[0].flatten(1)


@contextmanager
def watch_output(net: nn.Module, at: str) -> Iterator[list[Tensor]]:
    """A list that holds every output of the module named `at`, with its graph."""
    seen = []
    handle = net.get_submodule(at).register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def moments(net: nn.Module, at: str, batches) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased variance (C,) of the input of the module named `at`, over all images.

    batches yields (x, …) with x (N, C, H, W) float on the net's device. Channels are dimension 1 of the input.
    """
    sums = [0, 0, 0]

    def add(z: Tensor) -> None:
        z = z.double().transpose(0, 1).flatten(1)  # (C, everything else)
        for i, part in enumerate((z.shape[1], z.sum(1), z.square().sum(1))):
            sums[i] = sums[i] + part

    with watch_input(net, at, add), mode(net, False):
        for batch in batches:
            net(batch[0])
    count, total, square = sums
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp_min(0).float()
