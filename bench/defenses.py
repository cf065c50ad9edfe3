"""Each defense's epoch over the time of the bare passes that its algorithm cannot do without."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from common import SGD, Figure, Place, train, versus

from bdx import surgery
from bdx.build import instantiate
from bdx.configure import compose


def made(place: Place, data, width: int, *overrides: str):
    """A defense of one epoch on an untrained net."""
    net = place.attack(data, "attack=badnets", f"arch.width={width}").net
    return instantiate(compose([*overrides, "defense.epochs=1"]).defense, net=net)


def passes(npd, batches: Iterable, device: str) -> None:
    """What NPD cannot do without: three passes forward, two gradients of the pixels, one of the polarizer."""
    net, grad = npd.net.to(device), torch.autograd.grad
    for x, y, _ in batches:
        with torch.autocast(device, torch.bfloat16):
            clean = F.cross_entropy(net(x.requires_grad_()), y)
            first = (x + grad(clean, x, retain_graph=True)[0]).detach().requires_grad_()
            second = (first + grad(F.cross_entropy(net(first), y), first)[0]).detach()
            loss = clean + F.cross_entropy(net(second), y)
        grad(loss, list(npd.polarizer.parameters()))


def bench_npd(place: Place) -> Iterator[Figure]:
    """NPD on a frozen net against one that computes all weights' gradients, and against the passes that it must make."""
    data = place.images(128 * (steps := place.pick(2, 2, 20)))
    nets = [place.attack(data, "attack=badnets", f"arch.width={16 if place.quick else 64}").net for _ in range(2)]
    asked = ["defense=npd", "defense.init=plain", "defense.epochs=1", "defense.warmup_epochs=0"]
    frozen, free = (instantiate(compose(asked).defense, net=net) for net in nets)
    free.net.requires_grad_(True)
    free.backward = lambda loss: loss.backward()  # into all that wants a gradient, as a plain backward goes
    runs = [partial(npd.run, data, place.trainer) for npd in (frozen, free)]
    bare = partial(passes, frozen, frozen.batches(data), place.device)
    ours, theirs, least = place.race(place.pick(1, 3, 5), *runs, bare)
    yield versus("npd: unfrozen over frozen", theirs, ours, steps, aim=1.4)
    yield versus("npd: frozen over its bare passes", ours, least, steps, aim=1.3 if place.gpu else 1.15, less=True)
    yield Figure("npd: peak memory", place.peak(runs[0]), "MiB", note=f"unfrozen: {place.peak(runs[1]):,.0f} MiB")


def bench_d3(place: Place) -> Iterator[Figure]:
    """D3 against plain training on the same batches."""
    data = place.images(256 * (steps := place.pick(1, 2, 20)))
    d3 = made(place, data, 16 if place.quick else 64, "defense=d3")
    bare = d3.net.to(place.device).train()
    batches = data.batches(data.clean, size=256, shuffle=True, augment=True)
    ours, least = place.race(
        place.pick(1, 3, 5), partial(d3.run, data, place.trainer), lambda: train(bare, batches, SGD(bare.parameters()))
    )
    yield versus("d3: over plain training", ours, least, steps, aim=1.3 if place.gpu else 1.15, less=True)
    yield Figure("d3: peak memory", place.peak(partial(d3.run, data, place.trainer)), "MiB")


def conditioned_passes(cnpd, batches: Iterable, device: str) -> None:
    """What e- and a-CNPD cannot do without: on the image, the prefix once and the suffix raw, under the clean label and
    under the target's; one more pass for the second step, one at x+δ; two gradients of the pixels, one of the polarizer."""
    net, grad = cnpd.net.to(device), torch.autograd.grad
    for x, y, _ in batches:
        with torch.autocast(device, torch.bfloat16):
            x.requires_grad_()
            with surgery.shared_prefix(net, cnpd.at):
                label = net.raw(x).argmax(1)
                clean, first = F.cross_entropy(net(x, label), y), F.cross_entropy(net(x, y), y)
            second = (x + grad(first, x, retain_graph=True)[0]).detach().requires_grad_()
            third = (second + grad(F.cross_entropy(net(second, y), y), second)[0]).detach()
            loss = clean + F.cross_entropy(net(third, y), y)
        loss.backward(inputs=list(cnpd.polarizer.parameters()))


def bench_cnpd(place: Place) -> Iterator[Figure]:
    """e- and a-CNPD against their bare passes; r-CNPD against NPD with a known target, per class."""
    steps, width, aim = place.pick(1, 2, 20), 16 if place.quick else 64, 1.3 if place.gpu else 1.15
    data, plain = place.images(128 * steps), ["defense.init=plain", "defense.warmup_epochs=0"]
    for name in ("cnpd_e", "cnpd_a"):
        ours = made(place, data, width, f"defense={name}", *plain)
        bare = partial(conditioned_passes, ours, ours.batches(data), place.device)
        a, b = place.race(place.pick(1, 3, 5), partial(ours.run, data, place.trainer), bare)
        yield versus(f"{name}: over its bare passes", a, b, steps, aim=aim, less=True)
        yield Figure(f"{name}: peak memory", place.peak(partial(ours.run, data, place.trainer)), "MiB")
    data = place.images(128 * (steps := place.pick(1, 1, 20)))
    known = made(place, data, width, "defense=npd_tp", *plain)
    for at_once in place.pick([10], [1, 10], [1, 10]):
        every = made(place, data, width, "defense=cnpd_r", *plain, f"defense.at_once={at_once}")
        runs = partial(every.run, data, place.trainer), partial(known.run, data, place.trainer)
        a, b = place.race(place.pick(1, 1, 3), *runs)
        b = tuple(every.how["classes"] * s for s in b)
        yield versus(f"cnpd_r: over 10 × npd_tp, {at_once} at once", a, b, steps, aim=1.2, less=True)
        yield Figure(f"cnpd_r: peak memory, {at_once} at once", place.peak(runs[0]), "MiB")
