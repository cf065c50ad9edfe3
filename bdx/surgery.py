"""Reach inside any net: find a layer by name or depth, insert a layer in front of it, freeze, watch features.

Nothing here knows a particular architecture: depth is read off one forward pass, in the order the modules run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bdx.errors import UserError, nearest

DEPTHS = ("shallow", "middle", "third_to_last", "penultimate", "last", "whole")
NORMS_AND_POOLS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip


class Inserted(nn.Module):
    """`layer` runs in front of `module`, in its place: it filters the module's input and nothing else.

    What a skip path carries around `module` does not pass through `layer`. `spec` says how `layer` is built again.
    """

    def __init__(self, layer: nn.Module, module: nn.Module, spec: dict):
        super().__init__()
        self.layer, self.module, self.spec = layer, module, spec

    def forward(self, z: Tensor) -> Tensor:
        return self.module(self.layer(z))


def insert(net: nn.Module, at: str, layer: nn.Module, spec: dict) -> None:
    """Put `layer` in front of the module named `at`, in place. spec: `_target_` and arguments of `layer`."""
    parent, _, child = at.rpartition(".")
    setattr(net.get_submodule(parent), child, Inserted(layer, net.get_submodule(at), spec))


def insertions(net: nn.Module) -> list[dict]:
    """[{at, layer}] of everything inserted, as needed to insert it again into a fresh net."""
    return [{"at": name, "layer": m.spec} for name, m in net.named_modules() if isinstance(m, Inserted)]


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


def freeze(net: nn.Module) -> nn.Module:
    """Eval mode and no weight gradients: an attack through a frozen net pays for the input's gradient only."""
    return net.eval().requires_grad_(False)


def trace(net: nn.Module, sample: Tensor, visit: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Run `sample` (N, C, H, W) through the net; `visit(name, module, its input)` for every leaf in running order."""
    handles = []
    for name, module in net.named_modules():
        if next(module.children(), None) is None:

            def hook(module, args, name=name):
                if args and isinstance(args[0], Tensor):
                    visit(name, module, args[0])

            handles.append(module.register_forward_pre_hook(hook))
    try:
        with torch.no_grad(), mode(net, False):
            net(sample)
    finally:
        for handle in handles:
            handle.remove()


def places(net: nn.Module, sample: Tensor) -> dict[str, str]:
    """Where a layer can be inserted by depth: NPD Table 15's five places among the convolutions, and `whole`.

    `whole` is the input of the last normalisation or pooling that still sees a feature map: all features pass there,
    no skip path leads around it (on thin nets the trigger takes that path; see README, "What NPD needs").
    Returns depth -> module name. Raises UserError for a net with fewer than three convolutions, such as a transformer.
    """
    convs, maps = [], []

    def visit(name, module, z):
        # 1×1 convolutions on a skip path are no place of their own: NPD counts the convolutions of the main path
        if isinstance(module, nn.Conv2d) and "shortcut" not in name and "downsample" not in name:
            convs.append(name)
        if isinstance(module, NORMS_AND_POOLS) and z.ndim >= 3:
            maps.append(name)

    trace(net, sample, visit)
    if len(convs) < 3:
        raise UserError(f"this net has {len(convs)} convolutions; name the layer instead: {some(net)}")
    by_depth = {
        "shallow": convs[1], "middle": convs[len(convs) // 2],
        "third_to_last": convs[-3], "penultimate": convs[-2], "last": convs[-1],
    }  # fmt: skip
    return by_depth | ({"whole": maps[-1]} if maps else {})


def some(net: nn.Module) -> str:
    names = [n for n, _ in net.named_modules() if n]
    return ", ".join(names[:3]) + " … " + ", ".join(names[-6:])


def locate(net: nn.Module, layer: str, sample: Tensor) -> str:
    """The full name of the module called `layer` (inside `net` or its `body`) or standing at that depth."""
    if layer in DEPTHS:
        found = places(net, sample)
        if layer not in found:
            raise UserError(f"layer={layer}: this net has no such place, only {', '.join(found)}")
        return found[layer]
    names = [n for n, _ in net.named_modules() if n]
    for name in (layer, f"body.{layer}"):
        if name in names:
            return name
    short = [n.removeprefix("body.") for n in names]
    raise UserError(
        f"layer={layer}: no such layer{nearest(layer, short)}; by depth: {', '.join(DEPTHS)}; "
        "`bdx info layers arch=NAME` lists all"
    )


def input_shape(net: nn.Module, at: str, sample: Tensor) -> tuple[int, ...]:
    """Shape, without N, of what the module named `at` gets when `sample` (N, C, H, W) runs through the net."""
    found = []
    with watch_input(net, at, lambda z: found.append(tuple(z.shape[1:]))), torch.no_grad(), mode(net, False):
        net(sample)
    return found[0]


@contextmanager
def watch_input(net: nn.Module, at: str, visit: Callable[[Tensor], None]) -> Iterator[None]:
    """`visit(z)` for every input z of the module named `at`."""
    handle = net.get_submodule(at).register_forward_pre_hook(lambda _, args: visit(args[0]))
    try:
        yield
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
