"""What the benches share: how a figure is shown, how two sides take turns, a bare training loop."""

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from bdx.augment import augmentation
from bdx.backdoor import build_attack
from bdx.configure import compose
from bdx.datasets.base import ImageData
from bdx.split import Split
from bdx.training import accelerate, make_trainer

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

    def row(self) -> tuple[str, ...]:
        value = f"{self.measured:,.0f}" if self.measured >= 100 else f"{self.measured:.2f}"
        aim = "" if self.aim is None else f"{'≤' if self.less else '≥'} {self.aim:,g}"
        ok = self.aim is not None and (self.measured <= self.aim) == self.less
        return self.name, f"{value} {self.unit}", aim, ("ok" if ok else "short") if aim else "", self.note


@dataclass(frozen=True)
class Place:
    """Where to measure, and how thoroughly."""

    device: str
    gpu: bool
    quick: bool
    full: bool = False
    threads: int = 1

    def pick(self, quick: int, cpu: int, gpu: int) -> int:
        return quick if self.quick else gpu if self.gpu else cpu

    def seconds(self, work: Callable) -> float:
        timer = time.perf_counter if self.gpu or self.threads > 1 else time.process_time
        start = timer()
        work()
        if self.gpu:
            torch.cuda.synchronize()
        return timer() - start

    def race(self, rounds: int, *sides: Callable) -> list[tuple[float, ...]]:
        """The seconds of each side: A, B, A, B, … after one round to warm up."""
        runs = [[self.seconds(side) for side in sides] for _ in range(rounds + 1)]
        return list(zip(*runs[1:], strict=True))

    def peak(self, work: Callable) -> float:
        """MiB during `work`, at most: of tensors on the GPU, or of the process (sampled; what ran before may count)."""
        if not self.gpu:
            return resident(work)
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20

    def images(self, n: int) -> ImageData:
        x = torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        split = Split.clean(x, torch.arange(n) % 10).to(self.device)
        cifar = OmegaConf.to_container(compose([]).dataset.augment, resolve=True)
        how = {"augment": augmentation("dataset.augment", cifar), "reserved": split.y[:0], "seed": 0}
        return ImageData(split, split, split, name="synthetic", classes=tuple("0123456789"), sha256="", held_out=False, **how)

    def attack(self, data: ImageData, *overrides: str):
        return build_attack(compose(list(overrides)), data).to(self.device)

    def trainer(self, stage: str, epochs: int, **more):
        how = {"device": accelerate("gpu" if self.gpu else "cpu"), "precision": "bf16-mixed", "seed": 0}
        return make_trainer(stage, epochs, report=lambda *_: None, **how, **more)


def resident(work: Callable) -> float:
    """The largest resident memory of this process while `work` runs, in MiB."""
    seen, done = [0], Event()

    def look() -> None:
        while not done.wait(0.005):
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    watcher = Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen) / 2**20


def versus(name: str, over: tuple, under: tuple, steps: int, **aim) -> Figure:
    """over / under: seconds of two sides that took turns; the median of the rounds' ratios."""
    ratio = (torch.tensor(over) / torch.tensor(under)).median().item()
    a, b = (f"{min(side) / steps * 1e3:,.1f} ms" for side in (over, under))
    return Figure(name, ratio, "x", note=f"{a} / {b} a step", **aim)


def train(net: nn.Module, batches: Iterable, optimizer: torch.optim.Optimizer, bf16: bool = True) -> None:
    device = next(net.parameters()).device
    for batch in batches:
        x, y = batch[0].to(device), batch[1].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
