"""Speed as ratios within one run: both sides take turns on the same machine, so what disturbs one disturbs the other.

On a CPU one thread's CPU seconds count (not its waits); with more threads, and on a GPU, wall time. Images are synthetic,
of CIFAR's shape; `defenses` takes CIFAR-10 and a trained backdoor where the data's cache is at hand, and says which it took.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from attacks import bench_controlled  # noqa: F401
from common import SGD, Figure, Place, train, versus
from defenses import bench_cnpd, bench_d3, bench_npd  # noqa: F401
from every import bench_defenses  # noqa: F401
from rich.console import Console
from rich.table import Table
from slots import bench_slots  # noqa: F401
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from tuning import bench_ibau, bench_mcr, bench_nad, bench_nc, bench_sau  # noqa: F401

from bdx.archs.preact_resnet import preact_resnet18
from bdx.configure import options
from bdx.hardware import bf16_emulated

CIFAR = 50_000
CHANGE = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)])


def collate(items: list[tuple]) -> tuple[Tensor, Tensor]:
    return torch.stack([CHANGE(x) for x, _ in items]), torch.tensor([y for _, y in items])


def bench_data(place: Place) -> Iterator[Figure]:
    """Augmented batches, each stamped with BadNets' trigger, in images/s; beside it PIL transforms."""
    data, rounds = place.images(place.pick(5_000, CIFAR, CIFAR)), place.pick(1, 5, 9)
    attack = place.attack(data, "attack=badnets", "arch.width=16")
    some = [(T.functional.to_pil_image(x), 0) for x in data.train.x[:1_280].cpu()]
    batches = data.batches(data.train, size=128, shuffle=True, augment=True)
    fast, slow = place.race(rounds, lambda: sum(len(attack.trigger(b.x)) for b in batches), lambda: collate(some))
    note = f"one by one with PIL, without trigger: {len(some) / min(slow):,.0f}"
    yield Figure("data: batches and trigger", len(data.train) / min(fast), "images/s", 25_000, note=note)


def bench_step(place: Place) -> Iterator[Figure]:
    """Full-width training against the usual loop: fp32, contiguous, PIL and a DataLoader (on a GPU of four workers).

    Beside it how much faster the device multiplies matrices in bf16: of a step that is nearly all products, that is the most.
    """
    data, steps = place.images(12_800), place.pick(1, 2, 60)
    theirs = preact_resnet18(num_classes=10, width=64, final_norm=False).to(place.device)
    how = {"num_workers": 4, "persistent_workers": True, "pin_memory": True} if place.gpu else {}
    items = [(T.functional.to_pil_image(x), y % 10) for y, x in enumerate(data.train.x.cpu())]
    loader = DataLoader(items, 128, shuffle=True, drop_last=True, collate_fn=collate, **how)
    ours = place.attack(data, "attack=badnets").net.train()
    batches = data.batches(data.train, size=128, shuffle=True, augment=True)

    def some(net: nn.Module, loader: Iterable, bf16: bool) -> Callable:
        source, optimizer = chain.from_iterable(repeat(loader)), SGD(net.parameters())
        return lambda: train(net, islice(source, steps), optimizer, bf16)

    slow, fast = place.race(place.pick(1, 3, 5), some(theirs, loader, False), some(ours, batches, True))
    yield versus("step: fp32 and PIL over ours", slow, fast, steps, aim=3)
    a, b = torch.randn(2, 2048, 2048, device=place.device)
    c, d = a.bfloat16(), b.bfloat16()
    yield versus("step: a product, fp32 over bf16", *place.race(place.pick(1, 5, 9), lambda: a @ b, lambda: c @ d), 1)


def bench_loop(place: Place) -> Iterator[Figure]:
    """Lightning with our callback against a bare loop of the same steps."""
    data = place.images(128 * (steps := place.pick(4, 30, 200)))
    attack, same = (place.attack(data, "attack=badnets", "arch.width=16", "train.epochs=2") for _ in range(2))
    net, batches = same.net.train(), attack.batches(data)

    def bare():
        train(net, chain(batches, batches), attack.recipe.optimizer(net.parameters()))

    ours, least = place.race(place.pick(1, 5, 5), lambda: attack.fit(data, place.trainer), bare)
    yield versus("loop: Lightning over bare, thin net", ours, least, 2 * steps, aim=1.05, less=True)


def bench_stamp(place: Place) -> Iterator[Figure]:
    """Seconds to stamp 50,000 images with each attack's trigger (on a CPU counted from 5,000: SSBA's network takes minutes)."""
    data = place.images(place.pick(1_000, 5_000, CIFAR))
    for name in options("attack"):
        attack = place.attack(data, f"attack={name}", "arch.width=16").eval()
        if attack.has_trigger and not hasattr(attack, "maker"):
            (seconds,) = place.race(place.pick(1, 2, 3), partial(attack.stamp, data.train.x))
            aim = (1 if place.gpu else 10) if attack.trigger_from == "formula" else None
            yield Figure(f"stamp: {name}", min(seconds) * CIFAR / len(data.train), "s", aim, less=True)


def bench_adversarial(place: Place) -> Iterator[Figure]:
    """Adversarial training of the victim against plain training: a PGD step is a pass forward and the pixels' gradient."""
    data, pgd = place.images(128 * (steps := place.pick(1, 2, 20))), 2
    width = f"arch.width={16 if place.quick else 64}"
    asked = ["attack=badnets", width, "train.epochs=1", "train.batch=128"]
    plain, hard = (place.attack(data, *asked, f"train.adversarial.steps={n}") for n in (0, pgd))
    ours, least = place.race(place.pick(1, 3, 5), lambda: hard.fit(data, place.trainer), lambda: plain.fit(data, place.trainer))
    yield versus(f"adversarial: {pgd} PGD steps over none", ours, least, steps, aim=1 + pgd, less=True)


def bench_card(place: Place) -> Iterator[Figure]:
    """Training's share of the GPU's own matmul rate; a step counts as three forward passes."""
    side, steps = 8192, place.pick(3, 30, 30)
    a, b = torch.randn(2, side, side, device=place.device, dtype=torch.bfloat16)
    for size, how in (128, "eager"), (128, "compiled"), (512, "eager"), (512, "compiled"):
        data = place.images(size * steps)
        net = place.attack(data, "attack=badnets").net.train()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            net(torch.zeros(1, 3, 32, 32, device=place.device))
        if how == "compiled":
            torch.compiler.reset()  # else the second size would be compiled for all sizes
            net.compile()
        work = partial(train, net, data.batches(data.train, size=size, shuffle=True, augment=True), SGD(net.parameters()))
        products, seconds = place.race(place.pick(1, 5, 5), lambda: [a @ b for _ in range(20)], work)
        top, speed = 20 * 2 * side**3 / min(products), size * steps / min(seconds)
        memory = place.peak(work) - 2 * a.nbytes / 2**20
        note = f"{speed:,.0f} images/s, {memory:,.0f} MiB, matmul {top / 1e12:,.0f} TFLOP/s"
        yield Figure(f"card: batch {size}, {how}", 300 * flops.get_total_flops() * speed / top, "% of matmul", note=note)


BENCHES = {n.removeprefix("bench_"): f for n, f in list(globals().items()) if n.startswith("bench_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures little")
    parser.add_argument("--full", action="store_true", help="defenses: as many epochs as their papers say, for a GPU")
    parser.add_argument("--only", choices=BENCHES, help="; ".join(f"{n}: {f.__doc__}" for n, f in BENCHES.items()))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; with more than one, nothing else should run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, rows = Console(width=120), []
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    machine = ", ".join([*cpu[:1], f"{len(cpu)} cores, {args.threads} used", *gpu, f"torch {torch.__version__}"])
    place = lambda device: Place(device, device == "cuda", args.quick, args.full, args.threads)
    for device in ["cpu", "cuda"][: 1 + len(gpu)]:
        table = Table(device, "measured", "aim", "", "note")
        names = [n for n in BENCHES if args.only in (None, n) and (n != "card" or device == "cuda")]
        for figure in chain.from_iterable(BENCHES[n](place(device)) for n in names):
            rows.append({"device": device, **asdict(figure)})
            table.add_row(*figure.row())
            print("  ".join(filter(None, figure.row())), file=sys.stderr, flush=True)  # as they come: all of it takes long
        console.print(table)
    console.print(machine, soft_wrap=True)
    if slow := bf16_emulated("bf16-mixed"):
        console.print(slow, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "quick": args.quick, "figures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
