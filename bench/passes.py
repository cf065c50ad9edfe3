"""Which passes a method makes through nets, counted by hooks, and what those passes cost bare: run again, one by one, with
nothing around them but the batches and the optimizer steps.

Counted are passes of whole nets. A pass that ends early or whose beginning is shared counts as a whole one, and a gradient
of a gradient as a gradient: for such methods there are benches of their own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from bdx.archs.base import Classifier
from bdx.datasets.base import Batches


@dataclass
class Pass:
    """One pass of `net`. grads: which parameters wanted one, wants: whether x did, graph: whether there was a graph at all;
    back: for each time that a gradient came back through it, whether it went on to the weights, and to the pixels."""

    net: nn.Module
    shape: tuple[int, ...]
    modes: tuple[bool, ...]
    grads: tuple[bool, ...]
    wants: bool
    graph: bool
    amp: bool
    modules: list[nn.Module]
    back: list[tuple[bool, bool]] = field(default_factory=list)

    def kind(self) -> tuple:
        return (id(self.net), self.shape, self.modes, self.grads, self.wants, self.graph, self.amp, tuple(self.back))


class Count:
    """What happened while `watching`: passes, steps (optimizer -> how many), batches ((Batches, size) -> how many)."""

    def __init__(self):
        self.passes: list[Pass] = []
        self.steps, self.batches, self.reached = Counter(), Counter(), {}
        self.weights, self.hooked = False, {}

    def came(self, made: Pass, pixels: bool) -> None:
        self.reached[id(made)] = pixels or self.reached.get(id(made), False)

    def weighed(self, _) -> None:
        self.weights = True

    @property
    def forward(self) -> int:
        return sum(p.shape[0] for p in self.passes)

    @property
    def backward(self) -> int:
        return sum(p.shape[0] * len(p.back) for p in self.passes)

    def enter(self, net: nn.Module, args: tuple) -> None:
        if not isinstance(net, Classifier):
            return
        x, params, device = args[0], list(net.parameters()), args[0].device.type
        made = Pass(
            net, tuple(x.shape), tuple(m.training for m in net.modules()), tuple(p.requires_grad for p in params),
            x.requires_grad, torch.is_grad_enabled(), torch.is_autocast_enabled(device), list(net.modules()),
        )  # fmt: skip
        self.passes.append(made)
        if made.graph and made.wants:
            x.register_hook(lambda _: self.came(made, True))
        if made.graph and any(made.grads):
            first = next(p for p in params if p.requires_grad)
            if id(first) not in self.hooked:
                first.register_hook(self.weighed)
                self.hooked[id(first)] = first

    def leave(self, module: nn.Module, args: tuple, out) -> None:
        if self.passes and isinstance(module, (Classifier, nn.Conv2d)) and isinstance(out, Tensor) and out.requires_grad:
            made = self.passes[-1]
            out.register_hook(lambda _: self.came(made, False))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around one call for gradients."""
        self.reached, self.weights = {}, False
        yield
        for p in self.passes[-64:]:  # a graph does not outlive more
            if id(p) in self.reached:
                p.back.append((self.weights, self.reached[id(p)]))

    @contextmanager
    def watching(self) -> Iterator["Count"]:
        grad, backward, batch = torch.autograd.grad, torch.autograd.backward, Batches.batch

        def within(call: Callable) -> Callable:
            def counted(*args, **kw):
                with self.session():
                    return call(*args, **kw)

            return counted

        def drawn(batches, index, g):
            self.batches[batches, len(index)] += 1
            return batch(batches, index, g)

        handles = [
            hooks.register_module_forward_pre_hook(self.enter), hooks.register_module_forward_hook(self.leave),
            register_optimizer_step_post_hook(lambda opt, *_: self.steps.update([opt])),
        ]  # fmt: skip
        torch.autograd.grad, torch.autograd.backward, Batches.batch = within(grad), within(backward), drawn
        try:
            yield self
        finally:
            torch.autograd.grad, torch.autograd.backward, Batches.batch = grad, backward, batch
            for handle in handles:
                handle.remove()

    def bare(self, seconds: Callable[[Callable], float], rounds: int) -> float:
        """What all of it takes when each kind is run alone: the median of `rounds` times their number."""
        kinds = {p.kind(): p for p in self.passes}
        many = Counter(p.kind() for p in self.passes)
        work = [(many[k], again(p)) for k, p in kinds.items()]
        work += [(n, lambda b=b, size=size: b.batch(torch.arange(size, device=b.split.x.device), torch.Generator(
            b.split.x.device))) for (b, size), n in self.batches.items()]  # fmt: skip
        work += [(n, stepping(opt)) for opt, n in self.steps.items()]
        return sum(n * median([seconds(do) for _ in range(rounds + 1)][1:]) for n, do in work)


def again(p: Pass) -> Callable:
    """The pass and its gradients, bare, on the net that made it."""

    def work():
        net, params = p.net, list(p.net.parameters())
        for module, training in zip(p.modules, p.modes, strict=True):
            module.training = training
        for param, wants in zip(params, p.grads, strict=True):
            param.requires_grad_(wants)
        x = image.clone().requires_grad_(p.wants)
        with torch.set_grad_enabled(p.graph), torch.autocast(x.device.type, torch.bfloat16, enabled=p.amp):
            out = net(x)
        for weights, pixels in p.back:
            wanted = [q for q in params if q.requires_grad] * weights + [x] * pixels
            torch.autograd.grad(out, wanted or [q for q in (*params, x) if q.requires_grad][:1], torch.ones_like(out),
                                retain_graph=True, allow_unused=True)  # fmt: skip

    image = torch.rand(p.shape, device=next(p.net.parameters()).device)
    return work


def stepping(opt: torch.optim.Optimizer) -> Callable:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    plain = getattr(type(opt), "step", opt.step)  # Lightning wraps the step of the one object
    return lambda: plain(opt)
