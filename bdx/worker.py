"""A worker: a process that imports everything once, then runs one cell after another; and the handle an engine has on it.

stdin: one JSON list of words per line. stdout: one JSON object per line, first {"ready": …}, then an outcome per cell. All
that a run prints goes to stderr, which the engine points at a log file. A closed stdin (the sweep is gone) stops the run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from bdx.composer import Composer
from bdx.errors import UserError
from bdx.files import of_a_file, reason

COMMAND = [sys.executable, "-P", "-m", "bdx.worker"]  # the folder it is started in must shadow no module
CHECKOUT = Path(__file__).parents[1]
FULL = ("can't allocate memory", "out of memory", "alloc_failed")  # how others than torch's own allocator say it
STATES = ("done", "refused", "failed", "memory", "died")  # how a cell may end: see engines/base.py
GRACE = 20.0  # seconds in which an interrupted run may write its checkpoint
INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR2)  # how a process ends that was told to
told: list[int] = []


class Worker:
    """One process. It answers through `answers`, as (worker, message); a message of None: the process has ended."""

    def __init__(self, device: str, threads: int, log: Path, answers: queue.Queue):
        self.job = None  # of base.Job
        self.started = 0.0
        env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        env.setdefault("OMP_NUM_THREADS", str(threads))
        if (CHECKOUT / "pyproject.toml").exists():  # run from there, bdx may not be installed
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), env.get("PYTHONPATH"))))
        self.device = device
        with open(log, "ab") as f:
            self.process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=f,
                text=True, bufsize=1, env=env, start_new_session=True,  # Ctrl-C is the sweep's to pass on
            )  # fmt: skip
        threading.Thread(target=self.hear, args=(answers,), daemon=True).start()

    def hear(self, answers: queue.Queue) -> None:
        try:
            for line in self.process.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # somebody else prints as Python starts
                    if isinstance(said := json.loads(line), dict):
                        answers.put((self, said))
            self.process.wait()
        finally:
            answers.put((self, None))

    def start(self, job) -> None:
        self.job, self.started = job, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile; `hear` says so
            print(json.dumps(job.words), file=self.process.stdin)


def end(workers: list[Worker]) -> None:
    """Interrupt them all; kill those that take too long over it."""
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + GRACE
    for worker in workers:
        try:
            worker.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def died(worker: Worker, log: Path) -> str:
    """Why, in one line, of a worker whose process has ended."""
    code = worker.process.returncode
    return f"its process ended with code {code}{' (killed: out of memory?)' if code == -9 else ''}; see {log}"


def one_line(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:400]


def interrupted(number, frame):
    """Once: SLURM signals a whole job, and what starts here is told a second time by its own engine."""
    if not told:
        told.append(number)
        raise KeyboardInterrupt


def listen(jobs: queue.Queue) -> None:
    """Pass on what arrives; when the sweep is gone, stop at the next safe place as SIGTERM does."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def cell(words: tuple[str, ...], composer: Composer) -> dict:
    """Run one cell: the outcome. busy: seconds inside the run, without what the sweep adds."""
    from bdx.run import run

    started = time.monotonic()

    def outcome(state: str, why: str = "") -> dict:
        return {"state": state, "reason": why, "busy": time.monotonic() - started}

    try:
        cfg = composer.config(words)
        started = time.monotonic()
        run(cfg)
        return outcome("done")
    except UserError as e:
        return outcome("refused", str(e))
    except SystemExit:  # Lightning's answer to a signal
        raise KeyboardInterrupt from None
    except Exception as e:
        if lacks_memory(e):
            return outcome("memory", one_line(e))
        traceback.print_exc()
        return outcome("failed", f"{e.filename}: {reason(e)}" if of_a_file(e) else one_line(e))


def lacks_memory(e: Exception) -> bool:
    import torch

    if isinstance(e, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(e, RuntimeError) and any(text in str(e).lower() for text in FULL)


def logged(words: tuple[str, ...], composer: Composer) -> dict:
    """`cell`, named in the log first. Where that cannot be written, as on a full disk, the cell fails and says so."""
    try:
        print("bdx", *words, flush=True)
        return cell(words, composer)
    except OSError as e:
        return {"state": "failed", "reason": f"the worker's log cannot be written: {e.strerror}", "busy": 0.0}


def main() -> None:
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGUSR2, interrupted)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jobs: queue.Queue = queue.Queue()
    composer = Composer()
    import torch

    import bdx.run  # noqa: F401  seconds of imports, paid once

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    threading.Thread(target=listen, args=(jobs,), daemon=True).start()
    print(json.dumps({"ready": os.getpid()}), file=answers)
    try:
        while (words := jobs.get()) is not None:
            said = logged(tuple(words), composer)
            gc.collect()  # nets and optimizers refer to each other
            torch.cuda.empty_cache()
            print(json.dumps(said), file=answers)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
