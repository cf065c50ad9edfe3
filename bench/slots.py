"""A sweep's workers: cells at once on one device against one after the other, and what a sweep adds to a cell."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from common import Figure, Place

from bdx.engines import engine
from bdx.engines.base import Job, Outcome


def bench_slots(place: Place) -> Iterator[Figure]:
    """Fine-tuning cells on one backdoor by 1, 2 and, on a GPU, 4 warm workers; aim: a cell's overhead of at most 0.3 s."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "dataset=digits", f"arch.width={place.pick(8, 8, 64)}", "train=fast", "train.epochs=1", "train.batch=64",
            "attack=badnets", f"paths.out={folder}", "logger=none",
        ]  # fmt: skip
        if not place.gpu:
            words += ["train.precision=32-true", "trainer=cpu"]
        cells = place.pick(2, 8, 16)
        how = [f"defense.epochs={place.pick(1, 4, 100)}", "defense.batch=32"]
        cell = lambda lr: (*words, "defense=ft", *how, f"defense.optimizer.lr={lr}")
        first = None
        for several in (1, 2, 4)[: place.pick(2, 2, 3)]:
            runner = engine("local", slots=several, folder=Path(folder) / "log")
            try:
                ended(runner, [cell(f"0.{several}{i + 1}") for i in range(several)])  # imports, data and the backdoor
                began = time.perf_counter()
                found = ended(runner, [cell(f"0.0{several}{i + 1:02}") for i in range(cells)])
                seconds = (time.perf_counter() - began) / cells
            finally:
                runner.close()
            first = first or seconds
            if several == 1:
                beside = median(o.seconds - o.busy for o in found)
                yield Figure("sweep: what it adds to a cell", beside, "s", 0.3, True, f"a cell: {seconds:.2f} s")
            else:
                yield Figure(
                    f"sweep: {several} slots over 1, cells at once", first / seconds, "x", note=f"a cell: {seconds:.2f} s"
                )


def ended(runner, cells: list[tuple[str, ...]]) -> list[Outcome]:
    """All of them done."""
    for i, words in enumerate(cells):
        runner.submit(Job(str(i), words))
    found = []
    while len(found) < len(cells):
        found += runner.wait(1.0)
    if wrong := [o for o in found if o.state != "done"]:
        raise RuntimeError(f"{wrong[0].state}: {wrong[0].reason}")
    return found
