"""slurm: jobs of a SLURM cluster, through submitit.

A cell in the queue has two files in the folder, which the cluster shares: ID.job names its SLURM job, ID.json is what that
has said. A later sweep, or one beside this, that wants the same cell follows that job and queues no second one. A job that
is in the queue no longer and has not said how its cell ended is dead, whatever SLURM calls it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from bdx import files
from bdx.engines import base
from bdx.engines.base import Job, Outcome
from bdx.errors import UserError, nearest
from bdx.shift import Shift, read
from bdx.worker import STATES

SBATCH = {"minutes": "time", "cpus": "cpus_per_task", "slots": "array_parallelism", "notice": "signal_delay_s"}
AS_THEY_ARE = ("partition", "account", "qos", "gres", "setup")
BUSY = ("contact slurm controller", "timed out", "temporarily", "try again", "slow down", "communication")  # it may pass
LARGEST = 1000  # jobs of an array, by SLURM's default
UNENDED = ("PENDING", "RUNNING", "REQUEUED")  # what accounting says of jobs that a killed controller had not saved yet
TIMES = 3  # a cell's job may be lost


@dataclass
class Sent:
    """job, the id of its SLURM job, whether another sweep has sent that, and how often in a row the queue did not show it."""

    job: Job
    at: str
    found: bool = False
    started: bool = False
    missed: int = 0


class Engine(base.Engine):
    """The options are those of experiments/engine/slurm.yaml. folder: of the cluster's shared file system."""

    def __init__(
        self, *, folder: Path, partition: str | None, account: str | None, qos: str | None, gres: str | None, cpus: int,
        memory_gb: int, minutes: int, timeouts: int, notice: int, cells: int, slots: int, poll: int, setup: list, other: dict,
        again: dict,
    ):  # fmt: skip
        asked = {k: v for k, v in locals().items() if k not in ("self", "folder", "again", "__class__")}
        if unknown := [k for k in again if k not in asked]:
            raise UserError(f"engine.again: {unknown[0]} is no option{nearest(unknown[0], asked)}; it has {', '.join(asked)}")
        self.submitit = base.package("submitit", "slurm")
        for name in ("sbatch", "srun", "squeue", "scancel"):
            if not shutil.which(name):
                raise UserError(f"engine=slurm: {name} is not on PATH: start the sweep where SLURM is, or take engine=local")
        self.folder = folder.absolute() / "slurm"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cells, self.poll = cells, poll
        self.executors = {alone: self.executor(asked | (again if alone else {})) for alone in (False, True)}
        self.queue: list[Job] = []
        self.sent: dict[str, Sent] = {}
        self.lost: dict[str, int] = defaultdict(int)
        self.why, self.looked = "", time.monotonic()  # why SLURM does not answer, and when it was asked
        self.taken: set[bool] = set()  # of the executors, those whose jobs SLURM has taken
        self.refused = ""  # why it takes none for now
        if self.queued() is None:
            raise UserError(f"engine=slurm: {self.why}: start the sweep where SLURM is, or take engine=local")

    def executor(self, asked: dict):
        found = self.submitit.SlurmExecutor(self.folder, max_num_timeout=asked["timeouts"])
        words = {SBATCH.get(k, k): v for k, v in asked.items() if k in (*SBATCH, *AS_THEY_ARE) and v not in (None, [])}
        mem = f"{asked['memory_gb']}GB"
        found.update_parameters(**words, mem=mem, job_name="bdx", additional_parameters=asked["other"])
        return found

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def running(self) -> list[Job]:
        return [s.job for s in self.sent.values() if s.started]

    def wait(self, seconds: float) -> list[Outcome]:
        until = time.monotonic() + seconds
        while True:
            if self.queue:
                self.send()
            found = self.hear()
            if time.monotonic() - self.looked > self.poll:
                found += self.look()
            left = until - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(0.5, left))

    def send(self) -> None:
        """Queue what is not queued yet, as an array; while SLURM cannot take it, keep it and try again at the next look."""
        if (self.why and time.monotonic() - self.looked < self.poll) or (there := self.answer()) is None:
            return
        for job in list(self.queue):
            at = read(self.folder / f"{job.id}.job").get("at")
            if at in there and not job.alone:
                self.queue.remove(job)
                self.sent[job.id] = Sent(job, at, found=True)
        for alone, size in ((False, self.cells), (True, 1)):
            jobs = [j for j in self.queue if j.alone == alone][: LARGEST * size]
            shifts = [tuple(jobs[i : i + size]) for i in range(0, len(jobs), size)]
            if shifts and not self.array(shifts, alone):
                return

    def array(self, shifts: list[tuple[Job, ...]], alone: bool) -> bool:
        """Submit an array; False where SLURM may take it later. Raises UserError for what it never will.

        What it has taken once it will take again: a controller that has just started knows of no gres until its nodes report.
        """
        for job in (j for shift in shifts for j in shift):
            for ending in ("json", "job"):  # of an earlier time
                (self.folder / f"{job.id}.{ending}").unlink(missing_ok=True)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises as well
                sent = self.executors[alone].map_array(Shift(self.folder), shifts)
        except (self.submitit.core.utils.FailedJobError, self.submitit.core.utils.FailedSubmissionError) as e:
            why = (str(e).strip().splitlines() or ["it does not say why"])[-1].removeprefix("sbatch: error: ")
            if alone not in self.taken and not any(text in why.lower() for text in BUSY):
                raise UserError(f"engine=slurm: sbatch refuses: {why}") from None
            if why != self.refused:
                print(f"bdx: SLURM takes no jobs for now ({why}); the sweep waits for it", file=sys.stderr)
            self.why = self.refused = why
            return False
        self.refused = ""
        self.taken.add(alone)
        for shift, of in zip(shifts, sent, strict=True):
            for job in shift:
                with files.whole(self.folder / f"{job.id}.job") as tmp:
                    tmp.write_text(json.dumps({"at": of.job_id}))
                self.sent[job.id] = Sent(job, of.job_id)
                self.queue.remove(job)
        return True

    def hear(self) -> list[Outcome]:
        """The cells that have ended, by what their jobs have written."""
        found = []
        for id, sent in list(self.sent.items()):
            said = read(self.folder / f"{id}.json")
            sent.started = bool(said)
            if said.get("state") in STATES:
                del self.sent[id]
                times = (said.get(k, 0.0) for k in ("seconds", "busy"))
                found.append(Outcome(sent.job, said["state"], said.get("reason", ""), *times))
        return found

    def look(self) -> list[Outcome]:
        """The jobs that three looks in a row have not found in the queue, and that have not said how they ended."""
        if (there := self.answer()) is None:
            return []
        found = []
        for id, sent in list(self.sent.items()):
            sent.missed = 0 if sent.at in there else sent.missed + 1
            if sent.missed < 3 or read(self.folder / f"{id}.json").get("state") in STATES:
                continue
            del self.sent[id]
            state = self.called(sent.at)
            if (state in UNENDED or (state == "gone" and not sent.started)) and self.lost[id] < TIMES:
                self.lost[id] += 1
                print(f"bdx: SLURM has lost job {sent.at}, which it calls {state}; it is queued again", file=sys.stderr)
                subprocess.run(["scancel", sent.at], capture_output=True)
                self.queue.append(sent.job)
            else:
                found.append(Outcome(sent.job, "died", f"SLURM job {sent.at} is {state}; see {self.folder}"))
        return found

    def queued(self) -> set[str] | None:
        """The ids of the user's jobs in the queue; None, and why, where SLURM does not answer."""
        self.looked = time.monotonic()
        try:
            asked = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i|%r"], capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            self.why = "squeue took more than a minute"
            return None
        self.why = (asked.stderr.strip() or "squeue fails").splitlines()[-1] if asked.returncode else ""
        pairs = (line.partition("|") for line in asked.stdout.splitlines())
        return None if self.why else {id for id, _, why in pairs if "requeued held" not in why}  # such never start again

    def answer(self) -> set[str] | None:
        """The same; the user is told when SLURM falls silent."""
        before = self.why
        there = self.queued()
        if there is None and not before:
            print(f"bdx: SLURM does not answer ({self.why}); the sweep waits for it", file=sys.stderr)
        return there

    def called(self, at: str) -> str:
        """The state of a job by the cluster's accounting, if it has any that answers."""
        words = ["sacct", "-X", "-n", "-P", "-o", "State", "-j", at]
        try:
            said = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        return said.splitlines()[-1] if said else "gone"

    def close(self) -> None:
        """Cancel what is queued or runs; SLURM interrupts it, so that it writes its checkpoint. What another sweep has sent,
        which may wait for it still, goes on."""
        own = {s.at for s in self.sent.values() if not s.found}
        if others := {s.at for s in self.sent.values() if s.found}:
            print(
                f"bdx: {len(others)} jobs that an earlier sweep has sent go on; `scancel {' '.join(sorted(others))}` ends them",
                file=sys.stderr,
            )
        if own and subprocess.run(["scancel", *own], capture_output=True).returncode:
            print("bdx: scancel failed; `scancel --name=bdx` ends what is left in SLURM's queue", file=sys.stderr)
        self.sent, self.queue = {}, []
