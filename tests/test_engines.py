"""The slurm and ray engines on a SLURM and a Ray of this machine's own: jobs are killed, and every row arrives once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import loop_slurm
import pytest
from conftest import ROOT
from loop_slurm import until

from bdx import results

pytestmark = [pytest.mark.engines, pytest.mark.slow]
TABLE = "npd2023/table01"
GRID = ["scale=smoke", "attack=badnets,blended", "defense=none,ft,fp"]


@contextlib.contextmanager
def started(env: dict, shared: Path, out: Path, *words: str, grid=GRID):
    """The sweep, of six cells, in a process of its own; what it says goes to a file. Interrupted if the block raises."""
    places = [f"paths.data={shared / 'data'}", f"paths.out={out}"]
    env = env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bdx.cli", "sweep", TABLE, *grid, *places, *words]
    with open(out.parent / f"{out.name}.log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def said(out: Path) -> str:
    return (out.parent / f"{out.name}.log").read_text()


def every_row_once(out: Path) -> None:
    text = said(out)
    assert [int(n) for n in re.findall(r"^\[(\d)/6\] done", text, re.M)] == [1, 2, 3, 4, 5, 6], text
    assert "6 done, 0 failed" in text
    rows = results.rows(out / "results")
    assert sorted((r["attack"], r["defense"]) for r in rows) == [
        (a, d) for a in ("badnets", "blended") for d in ("fp", "ft", "none")
    ]
    assert len({r["backdoor"] for r in rows}) == 2
    assert not [p for p in (out / "results").iterdir() if p.suffix != ".json"]


def running(slurm) -> list[str]:
    return slurm.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").stdout.split()


@pytest.mark.skipif(loop_slurm.lacking() is not None, reason=str(loop_slurm.lacking()))
@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_slurm_with_a_job_cancelled_one_requeued_and_its_controller_killed(shared, tmp_path):
    words = ["engine=slurm", "engine.gres=shard:1", "engine.cpus=1", "engine.memory_gb=2", "engine.poll=2"]
    with loop_slurm.Loop() as slurm, started(slurm.env, shared, out := tmp_path / "out", *words) as sweep:
        notes = out / "sweep" / "slurm"
        until(lambda: len(list(notes.glob("*.json"))) == 2 or sweep.poll() is not None, 120)  # both backdoors have started
        cancelled, requeued = running(slurm)
        slurm.run("scancel", cancelled)
        assert slurm.run("scontrol", "requeue", requeued).returncode == 0
        slurm.hurry(requeued)
        until(lambda: " again" in said(out), 120)
        time.sleep(8)  # a controller that dies right after it has started a job starts that twice, and drains the node
        slurm.processes["slurmctld"].kill()
        slurm.processes["slurmctld"].wait()
        until(lambda: "SLURM does not answer" in said(out), 120)
        slurm.control()
        assert sweep.wait(400) == 0, said(out)
        every_row_once(out)
        told = rf"SLURM job {cancelled} is (CANCELLED.*|gone); see .*; it is tried again|SLURM has lost job {cancelled}, "
        assert re.search(told, said(out)), said(out)
        states = slurm.run("sacct", "-D", "-X", "-n", "-P", "-o", "State", "-j", requeued).stdout.split()
        assert states == ["REQUEUED", "COMPLETED"]
        until(lambda: slurm.run("squeue", "-h").stdout == "")


@pytest.mark.skipif(loop_slurm.lacking() is not None, reason=str(loop_slurm.lacking()))
@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_slurm_takes_over_what_a_killed_sweep_left_and_is_preempted(shared, tmp_path):
    """Several cells to a job. The second sweep follows the first one's job and cancels what it leaves itself."""
    words = ["engine=slurm", "engine.gres=null", "engine.cpus=1", "engine.memory_gb=2", "engine.poll=2", "engine.cells=3"]
    with loop_slurm.Loop() as slurm:
        with started(slurm.env, shared, out := tmp_path / "out", *words) as first:
            until(lambda: running(slurm), 120)
            first.kill()
            first.wait()
        (job,) = running(slurm)
        with started(slurm.env, shared, out, *words) as second:
            slurm.run("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
            slurm.hurry(job)
            assert second.wait(400) == 0, said(out)
        every_row_once(out)
        until(lambda: slurm.run("squeue", "-h").stdout == "")
        jobs = ["sacct", "-X", "-n", "-P", "-o", "JobName,State"]  # two backdoors in one, then the defenses of each
        until(lambda: sorted(slurm.run(*jobs).stdout.split()) == ["bdx|COMPLETED"] * 3 + ["wrap|COMPLETED"])
        assert "PREEMPTED" in slurm.run("sacct", "-D", "-X", "-n", "-P", "-o", "State", "-j", job).stdout


@pytest.mark.skipif(loop_slurm.lacking() is not None, reason=str(loop_slurm.lacking()))
@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_slurm_tells_a_cell_of_its_time_limit_and_it_is_queued_again_and_ends(shared, tmp_path):
    """A minute is the least that SLURM knows; it tells the cell 20 seconds before or a little earlier. Then it gets more."""
    words = ["engine=slurm", "engine.gres=null", "engine.cpus=1", "engine.memory_gb=2", "engine.poll=2"]
    limit = ["engine.minutes=1", "engine.notice=20"]
    one = ["scale=smoke", "attack=badnets", "defense=none", "train.epochs=40"]
    with loop_slurm.Loop() as slurm, started(slurm.env, shared, out := tmp_path / "out", *words, *limit, grid=one) as sweep:
        until(lambda: running(slurm) or sweep.poll() is not None, 120)
        (job,) = running(slurm)
        slurm.hurry(job, seconds=90, TimeLimit="30")
        assert sweep.wait(400) == 0, said(out)
        assert "1 done, 0 failed" in said(out)
        assert not list((out / "store").glob(".*.ckpt"))
        (row,) = results.rows(out / "results")
        assert (row["attack"], row["defense"]) == ("badnets", "none")
        assert "this job is timed-out" in "".join(p.read_text() for p in (out / "sweep" / "slurm").glob(f"{job}_*_log.err"))
        states = ["sacct", "-D", "-X", "-n", "-P", "-o", "State", "-j", job]
        until(lambda: slurm.run(*states).stdout.split() == ["REQUEUED", "COMPLETED"])


def ray_workers() -> list[int]:
    """Processes in which a task of Ray runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::cell"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (pip install 'bdx[ray]')")
def test_ray_with_its_workers_killed_until_its_own_retries_are_used_up(shared, tmp_path):
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}  # no token in the user's home; no waiting
    with started(env, shared, out := tmp_path / "out", "engine=ray", "engine.retries=1") as sweep:
        gone: set[int] = set()
        for _ in range(2):  # Ray starts both backdoors again by itself, then the sweep does
            until(lambda: len(set(ray_workers()) - gone) == 2 or sweep.poll() is not None, 120)
            for pid in set(ray_workers()) - gone:
                gone.add(pid)
                os.kill(pid, signal.SIGKILL)
        assert sweep.wait(400) == 0, said(out)
    every_row_once(out)
    assert said(out).count("it is tried again") == 2
    until(lambda: ray_workers() == [])
