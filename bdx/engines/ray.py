"""ray: tasks of a Ray cluster. Without a GPU a task finds a warm process; with one each has a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import time
from functools import cache
from pathlib import Path

from bdx import worker
from bdx.composer import Composer
from bdx.engines import base
from bdx.engines.base import Job, Outcome
from bdx.errors import UserError

composer = cache(Composer)  # one in a process, which may run many cells


def cell(words: tuple[str, ...], cwd: str, env: dict[str, str]) -> dict:
    """What a task does. Ray has chosen its GPU and its threads."""
    os.chdir(cwd)
    os.environ.update(env)
    import bdx.run  # noqa: F401  not a part of the cell's own time

    started = time.monotonic()
    return worker.cell(words, composer()) | {"seconds": time.monotonic() - started}


class Engine(base.Engine):
    """The options are those of experiments/engine/ray.yaml."""

    def __init__(
        self, *, folder: Path, address: str | None, slots: int, cpus: int, memory_gb: int | None, retries: int
    ):  # fmt: skip
        self.ray = base.package("ray", "ray")
        before = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(
                address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if address is None else None
            )
        except (ConnectionError, RuntimeError, ValueError) as e:
            text = " ".join(str(e).split())[:300]
            raise UserError(f"engine.address={address}: no Ray can be reached there: {text}") from None
        signal.signal(signal.SIGTERM, before)  # Ray's own would end the sweep without closing it
        there = self.ray.cluster_resources()
        self.gpus = 1 / slots if there.get("GPU") else 0
        nodes = [node["Resources"] for node in self.ray.nodes()]
        self.most = int(max(node.get("CPU", 0) for node in nodes))  # of one machine
        memory = max(node.get("memory", 0) for node in nodes) / 2**30
        if cpus > self.most or (memory_gb or 0) > memory:
            raise UserError(
                f"engine.cpus={cpus}, memory_gb={memory_gb}: no machine of the cluster has as much; at most there are "
                f"{self.most} CPUs, and {memory:.0f} GB"
            )
        self.room = int(min([there["CPU"] // cpus] + ([there["GPU"] * slots] if self.gpus else [])))
        self.how = {"num_cpus": cpus, "max_retries": retries} | ({"memory": memory_gb * 2**30} if memory_gb else {})
        self.task = self.ray.remote(cell)
        self.env = {k: v for k, v in os.environ.items() if k.startswith("BDX_")}
        self.flying: dict = {}  # what Ray gave for a job -> job, in the order of submission

    def submit(self, job: Job) -> None:
        """Alone: a whole GPU, or all CPUs of a machine."""
        share = {"num_gpus": self.gpus} if not job.alone else {"num_gpus": 1} if self.gpus else {"num_cpus": self.most}
        self.flying[self.task.options(**self.how | share).remote(job.words, os.getcwd(), self.env)] = job

    def running(self) -> list[Job]:
        """As many of the first as there is room for: Ray starts them in this order."""
        return list(self.flying.values())[: self.room]

    def wait(self, seconds: float) -> list[Outcome]:
        if not self.flying:
            return []
        ready, _ = self.ray.wait(list(self.flying), num_returns=1, timeout=seconds)
        return [self.outcome(ref, self.flying.pop(ref)) for ref in ready]

    def outcome(self, ref, job: Job) -> Outcome:
        errors = self.ray.exceptions
        try:
            said = self.ray.get(ref)
        except errors.OutOfMemoryError as e:
            return Outcome(job, "memory", worker.one_line(e))
        except errors.RayTaskError as e:
            return Outcome(job, "failed", worker.one_line(e.cause))
        except errors.RayError as e:
            return Outcome(job, "died", worker.one_line(e))
        return Outcome(job, said["state"], said["reason"], said["seconds"], said["busy"])

    def close(self) -> None:
        """Interrupt what runs, so that it writes its checkpoint, and leave the cluster."""
        for ref in self.flying:
            self.ray.cancel(ref, force=False)
        if self.flying:
            self.ray.wait(list(self.flying), num_returns=len(self.flying), timeout=worker.GRACE)
        self.flying = {}
        self.ray.shutdown()
