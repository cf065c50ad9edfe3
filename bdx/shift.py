"""shift: what one SLURM job does. submitit carries it there, and asks it for a checkpoint before it queues the job again."""

from __future__ import annotations

import json
import os
import queue
import time
from pathlib import Path

from bdx import files
from bdx.worker import GRACE, INTERRUPTED, STATES, Worker, died, end


def read(path: Path) -> dict:
    """What a cell's job has said, or nothing yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Shift:
    """What one SLURM job does: its cells, one after another in a warm worker. This process answers SLURM's signals: at the
    time limit the worker writes its checkpoint, and the job is queued again."""

    def __init__(self, folder: Path):
        self.folder, self.cwd = folder, os.getcwd()
        self.env = {k: v for k, v in os.environ.items() if k.startswith("BDX_")}

    def __call__(self, jobs: tuple) -> None:
        os.chdir(self.cwd)
        os.environ.update(self.env)
        self.answers, self.workers = queue.Queue(), []
        from submitit.core.utils import UncompletedJobError

        try:
            for job in jobs:
                if read(self.folder / f"{job.id}.json").get("state") not in STATES:  # it may be queued again
                    self.note(job, {"state": "running"})
                    self.note(job, self.run(job))
        except UncompletedJobError as e:  # the last of its timeouts
            self.note(job, {"state": "died", "reason": " ".join(str(e).split())})
            raise
        finally:
            end(self.workers)

    def checkpoint(self, jobs: tuple):
        """submitit asks before it queues the job again."""
        from submitit.helpers import DelayedSubmission

        end(self.workers)
        return DelayedSubmission(Shift(self.folder), jobs)

    def run(self, job) -> dict:
        """How the cell ended. A worker that was told to stop says nothing: SLURM is about to end this process as well."""
        log = self.folder / f"worker-{os.environ.get('SLURM_JOB_ID', os.getpid())}.log"
        for _ in range(3):
            if not self.workers:
                self.workers.append(Worker("", len(os.sched_getaffinity(0)), log, self.answers))
            (worker,) = self.workers
            worker.start(job)
            while (said := self.answers.get()[1]) and "ready" in said:
                worker.started = time.monotonic()
            seconds = time.monotonic() - worker.started
            if said:
                return said | {"seconds": seconds}
            self.workers.clear()
            if worker.process.returncode not in INTERRUPTED:
                break
            time.sleep(2 * GRACE)
        return {"state": "died", "reason": died(worker, log), "seconds": seconds}

    def note(self, job, said: dict) -> None:
        with files.whole(self.folder / f"{job.id}.json") as tmp:
            tmp.write_text(json.dumps(said))
