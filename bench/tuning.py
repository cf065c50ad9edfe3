"""The defenses that tune on clean images: each one's epoch over the passes that it cannot do without."""

import copy
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from common import SGD, Figure, Place, train, versus
from defenses import made

from bdx import surgery
from bdx.detectors.nc import Search


def bench_nad(place: Place) -> Iterator[Figure]:
    """NAD, teacher and student, against plain training of both and the teacher's forward pass."""
    data = place.images(256 * (steps := place.pick(1, 2, 20)))
    nad = made(place, data, 16 if place.quick else 64, "defense=nad", "defense.teacher_epochs=1")
    net, teacher = nad.net.to(place.device).train(), surgery.freeze(copy.deepcopy(nad.net)).to(place.device)
    batches = data.batches(data.clean, size=256, shuffle=True, augment=True)

    def bare() -> None:
        for _ in range(2):
            train(net, batches, SGD(net.parameters()))
        with torch.no_grad(), torch.autocast(place.device, torch.bfloat16):
            for x, *_ in batches:
                teacher(x)

    ours, least = place.race(place.pick(1, 3, 5), partial(nad.run, data, place.trainer), bare)
    yield versus("nad: over its bare passes", ours, least, 2 * steps, aim=1.2, less=True)


def bench_nc(place: Place) -> Iterator[Figure]:
    """Neural Cleanse's search: ten classes in one problem against one class after the other.

    It pays where one class leaves the device idle. One CPU thread is full at 16 images: a pass with the pixels' gradient
    took 0.98, 0.74, 0.70, 0.94 ms an image in batches of 16, 64, 256, 1024 (width 16), 7.2, 6.1, 7.6 of 16, 64, 256 (width 64).
    """
    data, steps = place.images(place.pick(64, 256, 2560)), place.pick(1, 1, 10)
    nc = made(place, data, 16 if place.quick else 64, "defense=nc")

    def search(at_once: int) -> None:
        for classes in torch.arange(10).split(at_once):
            batches = data.batches(data.clean, size=256, shuffle=True, augment=True)
            place.trainer("triggers", 1).fit(Search(nc.net, classes, nc.search), batches)

    slow, fast = place.race(place.pick(1, 1, 5), partial(search, 1), partial(search, 10))
    yield versus("nc: class by class over all at once", slow, fast, steps, aim=4)
    for at_once in (1, 10):
        yield Figure(f"nc: peak memory, {at_once} at once", place.peak(partial(search, at_once)), "MiB")


def bench_ibau(place: Place) -> Iterator[Figure]:
    """I-BAU: one product with ∂Φ/∂δ, and a whole step, against a plain step; all in full precision."""
    data = place.images(place.pick(64, 256, 256))
    ours = made(place, data, 16 if place.quick else 64, "defense=ibau")
    ours.to(place.device).ready()
    batch = next(iter(data.batches(data.clean, size=256, shuffle=True, augment=False)))
    ours.delta = 0.1 * torch.randn(1, *data.shape, device=place.device)
    delta = ours.delta.clone().requires_grad_()
    phi = ours.descend(delta, batch.x, batch.y, ours.map_lr, create_graph=True)
    product = lambda: torch.autograd.grad(phi, delta, torch.ones_like(delta), retain_graph=True)
    plain = lambda: F.cross_entropy(ours.net(batch.x), batch.y).backward()
    whole = lambda: ours.training_step(batch, 0)["loss"].backward()
    one, all_, least = place.race(place.pick(1, 3, 20), product, whole, plain)
    yield versus("ibau: second-order pass over a plain step", one, least, 1, aim=4, less=True)
    yield versus("ibau: whole step over a plain step", all_, least, 1)
    yield Figure("ibau: peak memory", place.peak(whole), "MiB")


def shared_passes(sau, batches: Iterable, device: str) -> None:
    """What SAU cannot do without: on x and once on x+δ without gradients, five steps of both nets with the pixels'
    gradient, one step on x and x+δ with the weights'."""
    net, old, adam = sau.net.to(device), sau.attacked.to(device), sau.optimizer(sau.net.parameters())
    for x, y, _ in batches:
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                net(x), old(x), old(x)
            for _ in range(5):
                at = x.clone().requires_grad_()
                torch.autograd.grad(F.cross_entropy(net(at), y) + F.cross_entropy(old(at), y), at)
            loss = F.cross_entropy(net(torch.cat([x, x])), torch.cat([y, y]))
        adam.zero_grad()
        loss.backward()
        adam.step()


def bench_sau(place: Place) -> Iterator[Figure]:
    """SAU against its bare passes."""
    data = place.images(256 * (steps := place.pick(1, 1, 10)))
    sau = made(place, data, 16 if place.quick else 64, "defense=sau")
    bare = partial(shared_passes, sau, sau.batches(data), place.device)
    ours, least = place.race(place.pick(1, 2, 5), partial(sau.run, data, place.trainer), bare)
    yield versus("sau: over its bare passes", ours, least, steps, aim=1.2, less=True)
    yield Figure("sau: peak memory", place.peak(partial(sau.run, data, place.trainer)), "MiB")


def bench_mcr(place: Place) -> Iterator[Figure]:
    """MCR, the copy and the curve, against plain training of both and one pass for BatchNorm."""
    data = place.images(128 * (steps := place.pick(1, 2, 20)))
    mcr = made(place, data, 16 if place.quick else 64, "defense=mcr", "defense.end.epochs=1")
    net = copy.deepcopy(mcr.net).to(place.device).train()
    batches = data.batches(data.clean, size=128, shuffle=True, augment=True)

    def bare() -> None:
        for _ in range(2):
            train(net, batches, SGD(net.parameters()))
        with torch.no_grad():
            for x, *_ in batches:
                net(x)

    ours, least = place.race(place.pick(1, 2, 5), partial(mcr.run, data, place.trainer), bare)
    yield versus("mcr: over its bare passes", ours, least, 2 * steps, aim=1.2, less=True)
