"""local: warm worker processes on this machine, some for each device."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import time
from collections import deque
from functools import cache
from itertools import takewhile
from pathlib import Path

from bdx.engines import base
from bdx.engines.base import Job, Outcome
from bdx.files import reason
from bdx.worker import Worker, died, end


def devices() -> list[str]:
    """UUIDs of the GPUs, as CUDA_VISIBLE_DEVICES allows them; [''] where there is none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        asked = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        return list(takewhile(lambda name: not name.strip().startswith("-"), asked)) or [""]  # as CUDA: -1 ends the list
    return (of_nvidia(smi) if (smi := shutil.which("nvidia-smi")) else []) or [""]


@cache
def of_nvidia(smi: str) -> list[str]:
    """UUIDs of the GPUs by nvidia-smi; a driver that fails has none, and that is said once."""
    try:
        asked = subprocess.run([smi, "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True)
        said, failed = f"{asked.stderr}{asked.stdout}", asked.returncode != 0
    except OSError as e:
        said, failed = reason(e), True
    if failed:
        print(f"bdx: {smi} fails, so no GPU is counted: {' '.join(said.split())[:200]}", file=sys.stderr)
        return []
    return [word for word in asked.stdout.split() if word.startswith(("GPU-", "MIG-"))]


class Engine(base.Engine):
    """slots: workers per device; null: 1 on a GPU, a core each on a CPU (at most 4). folder: for the workers' logs."""

    def __init__(self, *, slots: int | None, folder: Path):
        found = devices()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        slots = slots or (1 if found[0] else min(4, cores))
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.threads = folder, max(1, cores // (slots * len(found)))
        self.places = [d for d in found for _ in range(slots)]
        self.queue: deque[Job] = deque()
        self.answers: queue.Queue = queue.Queue()
        self.workers: list[Worker] = []

    def submit(self, job: Job) -> None:
        self.queue.append(job)
        self.fill()

    def running(self) -> list[Job]:
        return [w.job for w in self.workers if w.job]

    def fill(self) -> None:
        """Give what waits to who is free; a job that must be alone waits until all are, and holds the others back."""
        while self.queue:
            busy = self.running()
            ordinary = next((j for j in self.queue if not j.alone), None)
            job = ordinary or self.queue[0]
            if any(j.alone for j in busy) or (job.alone and busy):
                return
            worker = self.free()
            if worker is None:
                return
            self.queue.remove(job)
            worker.start(job)

    def free(self) -> Worker | None:
        """A worker without a job, started now if a place is empty."""
        idle = next((w for w in self.workers if w.job is None), None)
        if idle or len(self.workers) == len(self.places):
            return idle
        taken = [w.device for w in self.workers]
        device = next(d for d in self.places if taken.count(d) < self.places.count(d))
        self.workers.append(Worker(device, self.threads, self.folder / f"worker{len(self.workers)}.log", self.answers))
        return self.workers[-1]

    def wait(self, seconds: float) -> list[Outcome]:
        found, until = [], time.monotonic() + seconds
        while not found and (left := until - time.monotonic()) > 0:
            try:
                worker, said = self.answers.get(timeout=left)
            except queue.Empty:
                break
            if outcome := self.heard(worker, said):
                found.append(outcome)
        self.fill()
        return found

    def heard(self, worker: Worker, said: dict | None) -> Outcome | None:
        if said and "ready" in said:
            worker.started = time.monotonic()  # imports are paid once, and no cell's
            return None
        if said is None:
            self.workers.remove(worker)
        job, worker.job = worker.job, None
        if job is None:
            return None
        seconds = time.monotonic() - worker.started
        if said is None:
            return Outcome(job, "died", died(worker, self.folder), seconds)
        return Outcome(job, said["state"], said["reason"], seconds, said["busy"])

    def close(self) -> None:
        end(self.workers)
        self.workers, self.queue = [], deque()
