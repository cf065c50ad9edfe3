"""Where something can be done to a net: places by depth, layers by name, points where it can be cut in two.

Nothing here knows a particular architecture: depth is read off one forward pass, in the order the modules run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdx.errors import UserError, nearest
from bdx.surgery import Inserted, mode, watch_input

DEPTHS = ("shallow", "middle", "third_to_last", "penultimate", "last", "whole")
NORMS_AND_POOLS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip


def trace(net: nn.Module, sample: Tensor, visit: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Run `sample` (N, C, H, W) through the net; `visit(name, module, its input)` for every module as it starts."""
    handles = []
    for name, module in net.named_modules():

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


def on_main_path(name: str, module: nn.Module) -> bool:
    """Convolutions as NPD and Trap-and-Replace count them: a 1×1 convolution on a skip path is no layer of its own."""
    return isinstance(module, nn.Conv2d) and "shortcut" not in name and "downsample" not in name


def places(net: nn.Module, sample: Tensor) -> dict[str, str]:
    """Where a layer can be inserted by depth: NPD Table 15's five places among the convolutions, and `whole`.

    `whole` is the input of the last normalisation or pooling that still sees a feature map: all features pass there,
    no skip path leads around it (on thin nets the trigger takes that path; see README, "What NPD needs").
    In a transformer the places are inputs of its blocks (ours), which no skip path leads around either.
    Returns depth -> module name. Raises UserError for a net with neither three convolutions nor three blocks.
    """
    convs, blocks, maps = [], [], []
    kinds = Counter(type(m) for m in net.modules())
    added = tuple(f"{n}.layer" for n, m in net.named_modules() if isinstance(m, Inserted))  # no place of the net's own

    def visit(name, module, z):
        if name.startswith(added):
            return
        if on_main_path(name, module):
            convs.append(name)
        if kinds[type(module)] >= 3 and any(isinstance(m, nn.LayerNorm) for m in module.children()):
            blocks.append(name)
        if isinstance(module, NORMS_AND_POOLS) and z.ndim >= 3:
            maps.append(name)

    trace(net, sample, visit)
    rows = convs if len(convs) >= 3 else blocks
    if len(rows) < 3:
        raise UserError(f"this net has {len(convs)} convolutions; name the layer instead: {some(net)}")
    by_depth = {
        "shallow": rows[1], "middle": rows[len(rows) // 2],
        "third_to_last": rows[-3], "penultimate": rows[-2], "last": rows[-1],
    }  # fmt: skip
    return by_depth | ({"whole": maps[-1]} if maps else {})


def some(net: nn.Module) -> str:
    names = [n for n, _ in net.named_modules() if n]
    return ", ".join(names[:3]) + " … " + ", ".join(names[-6:])


def find(net: nn.Module, layer: str, key: str = "layer") -> str:
    """The full name of the module called `layer`, inside `net` or its `body`."""
    names = [n for n, _ in net.named_modules() if n]
    for name in (layer, f"body.{layer}"):
        if name in names:
            return name
    short = [n.removeprefix("body.") for n in names]
    raise UserError(
        f"{key}={layer}: no such layer{nearest(str(layer), short)}; by depth: {', '.join(DEPTHS)}; "
        "`bdx info layers arch=NAME` lists all"
    )


def locate(net: nn.Module, layer: str, sample: Tensor) -> str:
    """The full name of the module called `layer` or standing at that depth."""
    if layer in DEPTHS:
        found = places(net, sample)
        if layer not in found:
            raise UserError(f"layer={layer}: this net has no such place, only {', '.join(found)}")
        return found[layer]
    return find(net, layer)


def input_shape(net: nn.Module, at: str, sample: Tensor) -> tuple[int, ...]:
    """Shape, without N, of what the module named `at` gets when `sample` (N, C, H, W) runs through the net."""
    found = []
    with watch_input(net, at, lambda z: found.append(tuple(z.shape[1:]))), torch.no_grad(), mode(net, False):
        net(sample)
    return found[0]


def tokens_at(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether an input of `shape` (without N) is tokens (T, C) or, as a LayerNorm there tells, (H, W, C), and no map."""
    norms = (m for m in (module, *module.children()) if isinstance(m, nn.LayerNorm))
    return len(shape) == 2 or (len(shape) == 3 and any(tuple(m.normalized_shape) == shape[-1:] for m in norms))


def classifier(net: nn.Module) -> str:
    """The name of the net's classifier: the last child of the body that holds a Linear layer (D3's `linear`, `heads`)."""
    children = net.body.named_children()
    holding = [n for n, child in children if any(isinstance(m, nn.Linear) for m in child.modules())]
    if not holding:
        raise UserError(f"this net has no Linear layer; name the layer instead: {some(net)}")
    return f"body.{holding[-1]}"


def linears(net: nn.Module, layer: str) -> list[nn.Module]:
    """Every Linear and Conv2d inside the module called `layer`, or inside the classifier."""
    at = classifier(net) if layer == "classifier" else find(net, layer)
    found = [m for m in net.get_submodule(at).modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not found:
        raise UserError(f"layer={layer}: there is no Linear and no Conv2d inside {at}; take classifier, or another layer")
    return found


@dataclass(frozen=True)
class Cut:
    """A point where nothing leads around a module's output: the net is a stem up to it and a head behind it.

    layers: convolutions and Linear layers of the head, as Trap-and-Replace counts them · share: of all parameters ·
    shape: of the stem's output, without N · head: names of the outermost modules that start behind the cut
    """

    at: str
    layers: int
    share: float
    shape: tuple[int, ...]
    head: tuple[str, ...]


def cuts(net: nn.Module, sample: Tensor) -> list[Cut]:
    """Every point where the net can be cut, from the image to the logits. sample: (2, C, H, W), two different images.

    A module's output is such a point if the net's logits follow from it alone: with its output for the one image put in
    place of that for the other, the logits must become those of the one.
    """
    events, outputs, handles = [], {}, []
    for name, module in net.body.named_modules():

        def start(module, args, name=name):
            events.append(("start", name))

        def end(module, args, out, name=name):
            events.append(("end", name))
            outputs[name] = out.clone() if isinstance(out, Tensor) else None  # the next layer may work in place

        if name:
            handles += [module.register_forward_pre_hook(start), module.register_forward_hook(end)]
    with torch.no_grad(), mode(net, False):
        logits = net(sample[:1])
        for handle in handles:
            handle.remove()
        once = [n for kind, n in events if kind == "end" and events.count(("end", n)) == 1]
        through = [n for n in once if alone(net, n, outputs[n], sample[1:], logits)]
    return [cut_at(net, n, events, tuple(outputs[n].shape[1:])) for n in through]


def alone(net: nn.Module, name: str, output, other: Tensor, logits: Tensor) -> bool:
    """Whether `logits` follow from `output` of the module `name`, whatever image came in."""
    if output is None:
        return False
    handle = net.body.get_submodule(name).register_forward_hook(lambda *_: output.clone())
    try:
        return torch.equal(net(other), logits)
    finally:
        handle.remove()


def cut_at(net: nn.Module, name: str, events: list[tuple[str, str]], shape: tuple[int, ...]) -> Cut:
    done = events.index(("end", name))
    before = {n for _, n in events[: done + 1]}
    behind = list(dict.fromkeys(n for kind, n in events[done + 1 :] if kind == "start" and n not in before))
    outer = [n for n in behind if not any(n.startswith(f"{o}.") for o in behind)]
    modules = [(n, net.body.get_submodule(n)) for n in behind]
    layers = sum(on_main_path(n, m) or isinstance(m, nn.Linear) for n, m in modules)
    mine = sum(p.numel() for n in outer for p in net.body.get_submodule(n).parameters())
    share = mine / sum(p.numel() for p in net.parameters())
    return Cut(f"body.{name}", layers, share, shape, tuple(f"body.{n}" for n in outer))


def choose_cut(net: nn.Module, layers: int, at: str | None) -> Cut:
    """The cut behind the module called `at`, or else the first that leaves `layers` layers in the head."""
    sample = torch.rand(2, *net.spec["shape"], generator=torch.Generator().manual_seed(0))
    found = cuts(net, sample.to(net.normalize.mean.device))
    first = {c.layers: c for c in reversed(found) if c.layers and c.head}
    if at is None and layers in first:
        return first[layers]
    if at is not None:
        at = find(net, at, "defense.cut")
        if same := [c for c in found if c.at == at and c.layers]:
            return same[0]
    asked = f"defense.head={layers}" if at is None else f"defense.cut={at.removeprefix('body.')}"
    valid = ", ".join(
        f"{n} (behind {c.at.removeprefix('body.')}, {c.share:.1%} of the parameters)" for n, c in sorted(first.items())
    )
    raise UserError(f"{asked}: the net cannot be cut there, a skip path leads around it; heads that can be: {valid}")
