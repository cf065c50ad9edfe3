"""A worker of the local engine: imports everything once, then runs one cell after another.

stdin: one JSON list of words per line. stdout: one JSON object per line, first {"ready": …}, then an outcome per cell. All
that a run prints goes to stderr, which the engine points at a log file. A closed stdin (the sweep is gone) stops the run.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from filelock import FileLock

from bdx.composer import Composer
from bdx.errors import UserError
from bdx.files import of_a_file, reason


def one_line(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:400]


def interrupted(number, frame):
    raise KeyboardInterrupt


def listen(jobs: queue.Queue) -> None:
    """Pass on what arrives; when the sweep is gone, stop at the next safe place as SIGTERM does."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def cell(words: tuple[str, ...], composer: Composer) -> dict:
    """Run one cell: the outcome. busy: seconds inside the run, without what the sweep adds."""
    import torch

    from bdx.grid import ids
    from bdx.run import run

    started = time.monotonic()

    def outcome(state: str, why: str = "") -> dict:
        return {"state": state, "reason": why, "busy": time.monotonic() - started}

    try:
        cfg = composer.config(words)
        lock = Path(cfg.paths.out).expanduser() / "locks" / ids(words, composer)[0]
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{lock}.lock"):  # of two sweeps on one folder, one runs the cell and the other finds its row
            started = time.monotonic()
            run(cfg)
            return outcome("done")
    except UserError as e:
        return outcome("refused", str(e))
    except (MemoryError, torch.cuda.OutOfMemoryError) as e:
        return outcome("memory", one_line(e))
    except SystemExit:  # Lightning's answer to a signal
        raise KeyboardInterrupt from None
    except Exception as e:
        traceback.print_exc()
        return outcome("failed", f"{e.filename}: {reason(e)}" if of_a_file(e) else one_line(e))


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
            print("bdx", *words, flush=True)
            said = cell(tuple(words), composer)
            torch.cuda.empty_cache()
            print(json.dumps(said), file=answers)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
