"""Speed as ratios within one run: both sides take turns on the same machine, so what disturbs one disturbs the other.

    python bench/bench.py [--quick] [--only NAME] [--json FILE]

On a CPU one thread is measured, in CPU seconds: waiting for other programs does not count. On a GPU it is wall time.
Images are synthetic, of CIFAR's shape. Nothing is saved unless --json says where.

data   augmented batches, each stamped with BadNets' trigger, in images/s
step   a training step of the full-width net, against an eager fp32 loop that is fed by PIL transforms
loop   Lightning with our callback, against a bare loop of the same steps
npd    NPD on a frozen net, against NPD that computes every weight's gradient, and against the passes it must make
stamp  seconds to stamp 50,000 images with each attack's trigger
card   training's share of the GPU's own matmul rate
"""

import argparse
import copy
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

from bdx.archs.preact_resnet import preact_resnet18
from bdx.attacks.base import Attack
from bdx.augment import Augment
from bdx.build import instantiate
from bdx.configure import compose, options
from bdx.datasets.base import ImageData
from bdx.defenses.npd import NPD
from bdx.errors import UserError
from bdx.run import build_attack
from bdx.split import Split
from bdx.training import make_trainer

CIFAR = 50_000
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Figure:
    """One line of the table. aim: what `measured` should reach, or where `less`, not exceed; None where none is set."""

    name: str
    measured: float
    unit: str
    aim: float | None = None
    less: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "ok" if (self.measured <= self.aim if self.less else self.measured >= self.aim) else "short"


@dataclass(frozen=True)
class Place:
    """Where to measure, and how thoroughly."""

    device: torch.device
    quick: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, quick: int, cpu: int, gpu: int) -> int:
        return quick if self.quick else gpu if self.gpu else cpu

    def seconds(self, work: Callable) -> float:
        timer, sync = (time.perf_counter, torch.cuda.synchronize) if self.gpu else (time.process_time, lambda: None)
        sync()
        start = timer()
        work()
        sync()
        return timer() - start

    def race(self, rounds: int, *sides: Callable) -> list[tuple[float, ...]]:
        """The seconds of each side: A, B, A, B, … after one round to warm up."""
        runs = [[self.seconds(side) for side in sides] for _ in range(rounds + 1)]
        return list(zip(*runs[1:], strict=True))

    def peak(self, work: Callable) -> float:
        """MiB during `work`, at most: of tensors on a GPU; on a CPU of the whole process, as Linux counts it."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated() / 2**20
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work has freed, then start the high-water mark again
        Path("/proc/self/clear_refs").write_text("5")
        work()
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10

    def images(self, n: int) -> ImageData:
        x = torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        split = Split.clean(x, torch.arange(n) % 10).to(self.device)
        augment = Augment(crop=4, flip=True, rotate=0, cutout=0, cutmix=0)
        about = {"name": "synthetic", "classes": tuple("0123456789"), "reserved": split.y[:0], "sha256": "", "seed": 0}
        return ImageData(split, split, split, augment=augment, **about)

    def attack(self, data: ImageData, *overrides: str) -> Attack:
        return build_attack(compose(list(overrides)), data).to(self.device)

    def trainer(self, stage: str, epochs: int, **more):
        how = {"accelerator": "gpu" if self.gpu else "cpu", "precision": "bf16-mixed", "seed": 0}
        return make_trainer(stage, epochs, report=lambda *_: None, **how, **more)


def ratio(slow: Iterable[float], fast: Iterable[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def ms(fast: Iterable[float], slow: Iterable[float], steps: int) -> str:
    return f"{min(fast) / steps * 1e3:,.1f} ms against {min(slow) / steps * 1e3:,.1f} ms a step"


def forever(loader: Iterable) -> Iterator:
    return chain.from_iterable(repeat(loader))


def train(net: nn.Module, batches: Iterable, optimizer: torch.optim.Optimizer) -> None:
    for x, y, _ in batches:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


class Pictures:
    """One PIL image at a time, as torchvision's data sets give them."""

    def __init__(self, split: Split):
        self.x, self.y = split.x.cpu().permute(0, 2, 3, 1).contiguous().numpy(), split.y.tolist()
        normalize = T.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
        self.change = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.x[i])), self.y[i]


def bench_data(place: Place) -> Iterator[Figure]:
    data = place.images(place.pick(5_000, CIFAR, CIFAR))
    attack, pictures = place.attack(data, "attack=badnets", "arch.width=16"), Pictures(data.train)
    batches = data.batches(data.train, size=128, shuffle=True, augment=True)
    sides = (lambda: [attack.trigger(b.x) for b in batches][:0], lambda: [pictures[i] for i in range(1_000)][:0])
    ours, theirs = place.race(place.pick(1, 5, 9), *sides)
    note = f"image by image with PIL, no trigger: {1_000 / min(theirs):,.0f}"
    yield Figure("data: batches and trigger", len(data.train) / min(ours), "images/s", 25_000, note=note)


def usual_steps(place: Place, split: Split, steps: int) -> None:
    """The usual loop, endlessly: fp32, contiguous, a DataLoader (four workers beside a GPU); `steps` steps for a next()."""
    net = preact_resnet18(num_classes=10, width=64, final_norm=False).to(place.device)
    how = {"num_workers": 4, "persistent_workers": True, "pin_memory": True} if place.gpu else {}
    loader = forever(DataLoader(Pictures(split), batch_size=128, shuffle=True, drop_last=True, **how))
    optimizer = SGD(net.parameters())
    while True:
        for x, y in islice(loader, steps):
            loss = F.cross_entropy(net(x.to(place.device)), y.to(place.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield


def bench_step(place: Place) -> Iterator[Figure]:
    data, steps = place.images(12_800), place.pick(1, 2, 60)
    net = place.attack(data, "attack=badnets").net.train()
    source, optimizer = forever(data.batches(data.train, size=128, shuffle=True, augment=True)), SGD(net.parameters())
    usual = usual_steps(place, data.train, steps)
    ours, theirs = place.race(place.pick(1, 3, 5), lambda: train(net, islice(source, steps), optimizer), lambda: next(usual))
    yield Figure("step: over fp32 and PIL", ratio(theirs, ours), "x", 3, note=ms(ours, theirs, steps))


def bench_loop(place: Place) -> Iterator[Figure]:
    epochs, steps = 2, place.pick(4, 30, 200)
    data = place.images(steps * 128)
    attack = place.attack(data, "attack=badnets", "arch.width=16", f"train.epochs={epochs}")
    net = copy.deepcopy(attack.net).train()

    def bare():
        optimizer = attack.recipe.optimizer(net.parameters())
        train(net, chain.from_iterable(repeat(attack.batches(data), epochs)), optimizer)

    ours, least = place.race(place.pick(1, 5, 5), lambda: attack.fit(data, place.trainer), bare)
    note = ms(ours, least, epochs * steps)
    yield Figure("loop: Lightning over bare, thin net", ratio(ours, least), "x", 1.05, less=True, note=note)


def npd_on(net: nn.Module, frozen: bool) -> NPD:
    npd = instantiate(compose(["defense=npd", "defense.epochs=1", "defense.warmup_epochs=0"]).defense, net=net)
    if not frozen:
        npd.net.requires_grad_(True)
        npd.backward = lambda loss: loss.backward()  # into all that wants a gradient, as a plain backward goes
    return npd


def passes(npd: NPD, batches: Iterable, device: torch.device) -> None:
    """What NPD cannot do without: three passes forward, two gradients of the pixels, one of the polarizer."""
    net, polarizer = npd.net.to(device), list(npd.polarizer.parameters())

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.cross_entropy(net(x), y)

    for x, y, _ in batches:
        clean = loss_of(x.requires_grad_(), y)
        first = (x + torch.autograd.grad(clean, x, retain_graph=True)[0]).detach().requires_grad_()
        second = (first + torch.autograd.grad(loss_of(first, y), first)[0]).detach()
        torch.autograd.grad(clean + loss_of(second, y), polarizer)


def bench_npd(place: Place) -> Iterator[Figure]:
    """An epoch of 2,560 images on a GPU (5 % of CIFAR-10), of fewer on a CPU; the full-width net unless quick."""
    steps = place.pick(2, 2, 20)
    data = place.images(steps * 128)
    net = place.attack(data, "attack=badnets", f"arch.width={16 if place.quick else 64}").net
    frozen, free = npd_on(copy.deepcopy(net), True), npd_on(copy.deepcopy(net), False)
    runs = [partial(npd.run, data, place.trainer) for npd in (frozen, free)]
    least = partial(passes, frozen, frozen.batches(data), place.device)
    ours, theirs, bare = place.race(place.pick(1, 3, 5), *runs, least)
    yield Figure("npd: frozen over unfrozen", ratio(theirs, ours), "x", 1.4, note=ms(ours, theirs, steps))
    yield Figure("npd: over its bare passes", ratio(ours, bare), "x", note=ms(ours, bare, steps))
    memory = [place.peak(run) for run in runs]
    yield Figure("npd: peak memory", memory[0], "MiB", note=f"unfrozen: {memory[1]:,.0f} MiB")


def bench_stamp(place: Place) -> Iterator[Figure]:
    data = place.images(place.pick(1_000, CIFAR, CIFAR))
    for name in options("attack"):
        try:
            attack = place.attack(data, f"attack={name}", "arch.width=16").eval()
        except UserError as e:
            yield Figure(f"stamp: {name}", float("nan"), "s", note=f"not built: {e}")
            continue
        if attack.has_trigger:
            (seconds,) = place.race(place.pick(1, 2, 3), partial(attack.stamp, data.train.x))
            whole = min(seconds) * CIFAR / len(data.train)
            yield Figure(f"stamp: {name}", whole, "s", 1 if place.gpu else 10, less=True)


def bench_card(place: Place) -> Iterator[Figure]:
    """A step counts as three forward passes: one, and the two products of the backward pass."""
    side, steps = (8192, place.pick(3, 30, 30)) if place.gpu else (256, 1)
    a, b = torch.randn(2, side, side, device=place.device, dtype=torch.bfloat16)
    for size, how in ((128, "eager"), (128, "compiled"), (512, "eager"), (512, "compiled")) if place.gpu else ():
        data = place.images(size * steps)
        net = place.attack(data, "attack=badnets").net.train()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            net(torch.zeros(size, 3, 32, 32, device=place.device))
        if how == "compiled":
            torch.compiler.reset()  # else the second size would be compiled for all sizes
            net.compile()
        work = partial(train, net, data.batches(data.train, size=size, shuffle=True, augment=True), SGD(net.parameters()))
        products, seconds = place.race(place.pick(1, 5, 5), lambda: [a @ b for _ in range(20)], work)
        top, rate = 20 * 2 * side**3 / min(products), 3 * flops.get_total_flops() * steps / min(seconds)
        note = f"{size * steps / min(seconds):,.0f} images/s, {place.peak(work):,.0f} MiB, matmul {top / 1e12:,.0f} TFLOP/s"
        yield Figure(f"card: batch {size}, {how}", rate / top * 100, "% of matmul", note=note)


BENCHES = {"data": bench_data, "step": bench_step, "loop": bench_loop, "npd": bench_npd}
BENCHES |= {"stamp": bench_stamp, "card": bench_card}
