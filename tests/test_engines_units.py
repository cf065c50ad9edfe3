"""The slurm and ray engines without a SLURM or a Ray: options, what is asked of the cluster, what its answers mean."""

from __future__ import annotations

import inspect
import json
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import paths

import bdx.shift
import bdx.worker
from bdx import engines, grid, sweep
from bdx.composer import Composer
from bdx.engines.base import Job
from bdx.errors import UserError
from bdx.shift import Shift, read

NAMES = sorted(p.stem for p in engines.FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_engine_agree(name):
    """Every option stands in the YAML with its value; the file is short, says what it is, and --help repeats it."""
    path = engines.FOLDER / f"{name}.yaml"
    parameters = inspect.signature(__import__(f"bdx.engines.{name}", fromlist=["Engine"]).Engine).parameters
    assert set(grid.read(path)) == set(parameters) - {"folder"}
    assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters.values())
    first, *rest = path.read_text().splitlines()
    assert first.startswith(f"# {name}: ")
    assert len(rest) < 30
    assert all(line in engines.help() for line in rest)
    assert engines.options(name, []) == grid.read(path)


def test_the_users_options_are_read_as_what_they_are(capsys):
    told = engines.options("slurm", [
        "engine.partition=null", "engine.gres=shard:2", "engine.account=123", "engine.timeouts=0", "slots=3",
        "engine.setup=[module load cuda]", "engine.again={memory_gb: 64}",
    ])  # fmt: skip
    assert (told["partition"], told["gres"], told["account"], told["timeouts"], told["slots"]) == (None, "shard:2", "123", 0, 3)
    assert (told["setup"], told["again"]) == (["module load cuda"], {"memory_gb": 64})
    assert sweep.sweep(["--help"]) == 0
    assert "engine=slurm" in (out := capsys.readouterr().out)
    assert "engine.gres: gpu:1" in out


@pytest.mark.parametrize(("words", "match"), [
    (["engine=cluod"], "engine=cluod: expected one of local, ray, slurm"),
    (["engine=slurm", "engine.partitoin=x"], r"engine.partitoin: engine=slurm has no such option \(did you mean partition"),
    (["engine.gres=gpu:1"], "engine.gres: engine=local has no such option; it has slots"),
    (["engine=slurm", "engine.cpus=0"], "engine.cpus=0: expected a whole number from 1$"),
    (["engine=slurm", "engine.minutes=2:00"], "engine.minutes=2:00: expected a whole number from 1$"),
    (["engine=slurm", "engine.timeouts=-1"], "engine.timeouts=-1: expected a whole number from 0$"),
    (["engine=slurm", "engine.other=[a"], r"engine.other=\[a: expected {key: value}"),
    (["engine=ray", "slots=half"], "slots=half: expected a whole number from 1$"),
    (["engine=slurm", "engine.again={memory: 3}"], "engine.again: memory is no option .did you mean memory_gb"),
    (["engine=ray"], r"engine=ray needs the package ray, which cannot be imported .*pip install 'bdx\[ray\]'"),
    (["engine=slurm"], "engine=slurm: sbatch is not on PATH"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line_before_anything_runs(words, match, shared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    places = [f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=match) as e:
        sweep.sweep(["npd2023/table01", "scale=smoke", "attack=badnets", "defense=none", *places, *words])
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_without_submitit_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"engine=slurm needs the package submitit.*pip install 'bdx\[slurm\]'"):
        engines.engine("slurm", folder=tmp_path, **engines.options("slurm", []))


def test_a_plan_needs_no_cluster(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["scale=smoke", "attack=badnets", "defense=none", "engine=slurm", *paths(tmp_path), "--dry-run"]
    assert sweep.sweep(["npd2023/table01", *words]) == 0
    assert "1 cells, 1 can run" in capsys.readouterr().out


COMMANDS = {
    "sbatch": 'if [ -e refuses ]; then cat refuses >&2; exit 1; fi\nn=$(ls | grep -c ^sent)\ncp "$1" sent$n\n'
    'echo "Submitted batch job $((n + 7))"',
    "squeue": "if [ -e down ]; then cat down >&2; exit 1; fi\ncat queue 2>/dev/null || true",
    "scancel": 'echo "$@" >> cancelled',
    "sacct": "cat state",
    "srun": "true",
}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """cluster(option=…) -> a slurm engine over commands that only write down what they are told. Files beside them are
    their answers: queue, state, refuses, down."""
    pytest.importorskip("submitit")
    (home := tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (home / name).write_text(f"#!/bin/sh\ncd {home}\n{text}\n")
        (home / name).chmod(0o755)
    (home / "state").write_text("CANCELLED by 7\n")
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")

    def made(**options):
        how = engines.options("slurm", []) | {"poll": 0} | options
        return engines.engine("slurm", folder=tmp_path / "sweep", **how)

    made.home, made.folder = home, tmp_path / "sweep" / "slurm"
    return made


def flags(path: Path) -> dict[str, str]:
    """The options of a job as sbatch reads them."""
    lines = (line.removeprefix("#SBATCH --") for line in path.read_text().splitlines() if line.startswith("#SBATCH"))
    return {k: v.strip("'\"") for k, _, v in (line.partition("=") for line in lines)}


def jobs(n: int, **more) -> list[Job]:
    return [Job(f"r{i}", (f"seed={i}",), **more) for i in range(n)]


def test_what_is_asked_of_sbatch(cluster):
    runner = cluster(
        partition="short", gres="shard:1", minutes=30, cpus=2, memory_gb=3, cells=2, slots=7, notice=60,
        setup=["module load x"], other={"constraint": "a100"}, again={"memory_gb": 9, "partition": "big"},
    )  # fmt: skip
    for job in [*jobs(5), Job("again", ("x",), alone=True)]:
        runner.submit(job)
    (cluster.home / "queue").write_text("7_0\n7_1\n7_2\n8\n")
    assert runner.wait(0) == []
    first, second = flags(cluster.home / "sent0"), flags(cluster.home / "sent1")
    wanted = {
        "array": "0-2%3", "partition": "short", "gres": "shard:1", "time": "30", "cpus-per-task": "2", "mem": "3GB",
        "signal": "USR2@60", "constraint": "a100", "job-name": "bdx",
    }  # fmt: skip
    assert {k: first[k] for k in wanted} == wanted  # five cells, two to a job
    assert "module load x" in (cluster.home / "sent0").read_text()
    assert ("array" in second, second["mem"], second["partition"], second["time"]) == (False, "9GB", "big", "30")
    assert sorted(p.name for p in cluster.folder.glob("*.job")) == [
        f"{id}.job" for id in ("again", "r0", "r1", "r2", "r3", "r4")
    ]
    assert [read(cluster.folder / f"r{i}.job")["at"] for i in range(5)] == ["7_0", "7_0", "7_1", "7_1", "7_2"]
    runner.close()
    assert set((cluster.home / "cancelled").read_text().split()) == {"7_0", "7_1", "7_2", "8"}


def says(cluster, id: str, **said) -> None:
    (cluster.folder / f"{id}.json").write_text(json.dumps(said))


def test_what_a_job_says_is_its_outcome_and_one_that_leaves_without_a_word_is_dead(cluster):
    runner = cluster()
    for job in jobs(3):
        runner.submit(job)
    (cluster.home / "queue").write_text("7_0\n7_1\n7_2\n")
    assert (runner.wait(0), runner.running()) == ([], [])
    says(cluster, "r0", state="running")
    assert (runner.wait(0), [j.id for j in runner.running()]) == ([], ["r0"])
    says(cluster, "r0", state="done", reason="", seconds=3.0, busy=2.0)
    (outcome,) = runner.wait(0)
    assert (outcome.job.id, outcome.state, outcome.seconds, outcome.busy) == ("r0", "done", 3.0, 2.0)
    (cluster.home / "queue").write_text("7_1|launch failed requeued held\n7_2|Resources\n")
    assert [runner.wait(0) for _ in range(2)] == [[], []]  # two looks are not enough: it may be on its way to another state
    (dead,) = runner.wait(0)
    assert (dead.job.id, dead.state, "SLURM job 7_1 is CANCELLED by 7" in dead.reason) == ("r1", "died", True)


def test_a_cluster_without_accounting_has_no_state_to_tell(cluster, tmp_path, monkeypatch):
    runner = cluster()
    assert runner.called("7_1") == "CANCELLED by 7"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runner.called("7_1") == "gone"


def test_a_silent_controller_kills_nothing(cluster, capsys):
    runner = cluster()
    runner.submit(jobs(1)[0])
    runner.wait(0)
    (cluster.home / "down").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    runner.submit(jobs(2)[1])
    assert [runner.wait(0) for _ in range(4)] == [[]] * 4
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "SLURM does not answer (slurm_load_jobs error: Unable to contact slurm controller)" in told
    (cluster.home / "down").unlink()
    (cluster.home / "queue").write_text("7\n8\n")
    assert (runner.wait(0), set(runner.sent)) == ([], {"r0", "r1"})


def test_a_refusal_that_may_pass_is_waited_for_and_another_is_the_users(cluster, capsys):
    runner = cluster(partition="nowhere")
    runner.submit(jobs(1)[0])
    (cluster.home / "refuses").write_text("sbatch: error: Batch job submission failed: Socket timed out\n")
    assert (runner.wait(0), len(runner.queue)) == ([], 1)
    (cluster.home / "refuses").write_text("sbatch: error: invalid partition specified: nowhere\n")
    with pytest.raises(UserError, match=r"engine=slurm: sbatch refuses: invalid partition specified: nowhere$"):
        runner.wait(0)


def test_what_slurm_has_taken_it_will_take_again(cluster, capsys):
    """A controller that has just started knows of no shard until its nodes report, and refuses what it took before."""
    runner = cluster(gres="shard:1")
    first, second = jobs(2)
    runner.submit(first)
    runner.wait(0)
    no = "sbatch: error: Batch job submission failed: Requested node configuration is not available\n"
    (cluster.home / "refuses").write_text(no)
    (cluster.home / "queue").write_text("7\n")
    runner.submit(second)
    assert [runner.wait(0) for _ in range(3)] == [[]] * 3
    told = capsys.readouterr().err
    assert told.count("SLURM takes no jobs for now (Batch job submission failed: Requested node configuration") == 1
    (cluster.home / "refuses").unlink()
    (cluster.home / "queue").write_text("7\n8\n")
    assert (runner.wait(0), set(runner.sent), runner.queue) == ([], {"r0", "r1"}, [])


def test_a_worker_that_is_told_to_stop_before_it_listens_ends_as_one_that_was_told(tmp_path):
    early = "import os, signal; from bdx import worker; signal.signal(signal.SIGTERM, worker.interrupted); "
    ended = subprocess.run([sys.executable, "-c", early + "os.kill(os.getpid(), signal.SIGTERM)"], capture_output=True)
    assert ended.returncode in bdx.worker.INTERRUPTED


@pytest.mark.parametrize(("state", "started"), [("PENDING", False), ("RUNNING", True), ("", False)])
def test_a_job_that_the_controller_lost_is_queued_again_three_times(state, started, cluster, capsys):
    (cluster.home / "state").write_text(state)  # a controller that is killed forgets what it has just started
    runner = cluster()
    runner.submit(jobs(1)[0])
    if started:
        assert runner.wait(0) == []
        says(cluster, "r0", state="running")
    found = [o for _ in range(20) for o in runner.wait(0)]
    assert [o.state for o in found] == ["died"]
    assert len(list(cluster.home.glob("sent*"))) == 4
    assert capsys.readouterr().err.count("it is queued again") == 3


def one_after_the_other(cluster):
    """Two sweeps: the first has sent r0 as job 7, which the second wants too, and has sent r1 as job 8."""
    first, second = cluster(), cluster()
    first.submit(jobs(1)[0])
    first.wait(0)
    (cluster.home / "queue").write_text("7\n")
    for job in jobs(2):
        second.submit(job)
    second.wait(0)
    return first, second


def test_a_second_sweep_follows_the_jobs_of_the_first(cluster):
    first, second = one_after_the_other(cluster)
    assert {id: sent.at for id, sent in second.sent.items()} == {"r0": "7", "r1": "8"}
    (cluster.home / "queue").write_text("7\n8\n")
    says(cluster, "r0", state="done")
    assert [o.job.id for o in (*first.wait(0), *second.wait(0))] == ["r0", "r0"]


def test_a_sweep_that_is_interrupted_leaves_the_jobs_of_another(cluster, capsys):
    first, second = one_after_the_other(cluster)
    second.close()
    assert (cluster.home / "cancelled").read_text().split() == ["8"]
    assert "1 jobs that an earlier sweep has sent go on; `scancel 7` ends them" in capsys.readouterr().err
    first.close()
    assert (cluster.home / "cancelled").read_text().split() == ["8", "7"]


TOY = """
import json, os, sys
print(json.dumps({"ready": 1}), flush=True)
for line in sys.stdin:
    (word,) = json.loads(line)
    if word == "die":
        os._exit(9)
    if word == "stop" and not os.path.exists("stopped"):
        open("stopped", "w").close()
        sys.exit(130)
    print(json.dumps({"state": "done", "reason": str(os.getpid()), "busy": 0.0}), flush=True)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A worker that runs nothing, in a folder of its own."""
    monkeypatch.setattr(bdx.worker, "COMMAND", [sys.executable, "-c", TOY])
    monkeypatch.setattr(bdx.shift, "GRACE", 0.01)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shift_runs_its_cells_in_one_process_and_goes_on_after_one_died(toy):
    pytest.importorskip("submitit")
    words = {"a": "x", "b": "x", "c": "die", "d": "x", "e": "stop"}
    Shift(toy)(tuple(Job(id, (word,)) for id, word in words.items()))
    said = {id: read(toy / f"{id}.json") for id in words}
    assert {id: s["state"] for id, s in said.items()} == dict.fromkeys(words, "done") | {"c": "died"}
    assert "code 9" in said["c"]["reason"]
    pids = [said[id]["reason"] for id in "abde"]
    assert (pids[0] == pids[1], len(set(pids))) == (True, 3)  # one for a and b, one after the death, one after the interrupt
    Shift(toy)((Job("a", ("die",)),))  # queued again after it was done
    assert read(toy / "a.json") == said["a"]


def test_what_else_a_worker_prints_does_not_deafen_the_sweep(toy, monkeypatch):
    """A sitecustomize of the user's, or a module of theirs that prints."""
    monkeypatch.setattr(bdx.worker, "COMMAND", [sys.executable, "-c", "print('hello\\n3')\n" + TOY])
    answers: queue.Queue = queue.Queue()
    worker = bdx.worker.Worker("", 1, toy / "log", answers)
    assert answers.get(timeout=30)[1].keys() == {"ready"}
    worker.start(Job("a", ("x",)))
    assert answers.get(timeout=30)[1]["state"] == "done"
    bdx.worker.end([worker])
    assert answers.get(timeout=30) == (worker, None)


def test_a_worker_finds_its_own_modules_whatever_lies_where_it_starts(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    worker = bdx.worker.Worker("", 1, tmp_path / "log", answers := queue.Queue())
    said = answers.get(timeout=120)[1]
    bdx.worker.end([worker])
    assert "ready" in (said or ()), (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"), (MemoryError(), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "failed"), (ValueError("out of memory"), "failed"),
    ],
)  # fmt: skip
def test_what_counts_as_too_little_memory(error, state, monkeypatch, tmp_path):
    import bdx.run

    def refuse(cfg):
        raise error

    monkeypatch.setattr(bdx.run, "run", refuse)
    assert bdx.worker.cell((f"paths.out={tmp_path}",), Composer())["state"] == state


def test_a_shift_that_is_queued_again_ends_its_worker_and_keeps_its_cells(toy):
    pytest.importorskip("submitit")
    shift, cells = Shift(toy), (Job("a", ("x",)), Job("b", ("x",)))
    shift(cells[:1])
    again = shift.checkpoint(cells)
    assert again.args == (cells,)
    assert isinstance(again.function, Shift)
    assert shift.workers[0].process.returncode is not None


class Ray:
    """Stands for the package: keeps what it is asked, and answers from `says`, a job's words -> a dict or an error."""

    def __init__(self, cpus: float, gpus: float, says: dict):
        self.total, self.says, self.asked, self.ended = {"CPU": cpus} | ({"GPU": gpus} if gpus else {}), says, [], []
        made = {"RayError": type("RayError", (Exception,), {})}
        for name in ("OutOfMemoryError", "WorkerCrashedError"):
            made[name] = type(name, (made["RayError"],), {})
        made["RayTaskError"] = type("RayTaskError", (made["RayError"],), {"cause": property(lambda e: e.args[0])})
        self.exceptions = SimpleNamespace(**made)

    def init(self, address, **how):
        self.address = address

    def cluster_resources(self):
        return self.total

    def nodes(self):
        return [{"Resources": {"CPU": self.total.get("CPU", 0) / 2, "memory": 2**34}}] * 2

    def remote(self, function):
        def options(**how):
            return SimpleNamespace(remote=lambda words, cwd, env: self.asked.append((words, how)) or words)

        return SimpleNamespace(options=options)

    def wait(self, refs, num_returns, timeout):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        if isinstance(said := self.says[ref], Exception):
            raise said
        return said

    def cancel(self, ref, force):
        self.ended.append(ref)

    def shutdown(self):
        self.ended.append("all")


@pytest.mark.parametrize(("gpus", "slots", "share", "alone", "room"), [
    (0, 1, {"num_cpus": 2, "num_gpus": 0}, {"num_cpus": 4}, 4), (2, 4, {"num_cpus": 2, "num_gpus": 0.25}, {"num_gpus": 1}, 4),
    (1, 2, {"num_cpus": 2, "num_gpus": 0.5}, {"num_gpus": 1}, 2),
])  # fmt: skip
def test_what_is_asked_of_ray(gpus, slots, share, alone, room, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(8.0, gpus, {}))
    told = [f"slots={slots}", "engine.cpus=2", "engine.memory_gb=1", "engine.retries=5", "engine.address=auto"]
    runner = engines.engine("ray", folder=tmp_path, **engines.options("ray", told))
    assert ray.address == "auto"
    for job in [*jobs(5), Job("again", ("x",), alone=True)]:
        runner.submit(job)
    both = {"max_retries": 5, "memory": 2**30}
    assert ray.asked[0] == (("seed=0",), share | both)
    assert {k: ray.asked[-1][1][k] for k in alone} == alone
    assert [j.id for j in runner.running()] == [f"r{i}" for i in range(room)]
    runner.close()
    assert ray.ended == [*(j.words for j in jobs(5)), ("x",), "all"]


def test_what_rays_answers_mean(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", ray := Ray(8.0, 0, {}))
    errors = ray.exceptions
    ray.says = {
        ("seed=0",): {"state": "done", "reason": "", "busy": 1.0, "seconds": 2.0},
        ("seed=1",): errors.WorkerCrashedError("the worker died\nof a signal"),
        ("seed=2",): errors.OutOfMemoryError("too much"),
        ("seed=3",): errors.RayTaskError(ModuleNotFoundError("No module named 'bdx'")),
    }
    runner = engines.engine("ray", folder=tmp_path, **engines.options("ray", []))
    for job in jobs(4):
        runner.submit(job)
    found = [o for _ in range(4) for o in runner.wait(1.0)]
    assert [o.state for o in found] == ["done", "died", "memory", "failed"]
    assert (found[0].seconds, found[0].busy) == (2.0, 1.0)
    assert found[1].reason == "WorkerCrashedError: the worker died of a signal"
    assert "No module named 'bdx'" in found[3].reason
    assert (runner.running(), runner.wait(0)) == ([], [])


@pytest.mark.parametrize(("cpus", "asked", "least"), [(4.0, "engine.cpus=3", 2), (4.0, "engine.memory_gb=17", 2), (0.0, "", 0)])
def test_a_cell_that_no_machine_can_hold_is_refused(cpus, asked, least, monkeypatch, tmp_path):
    """Two machines of 2 CPUs and 16 GB each: Ray would wait for one of 3 for ever."""
    monkeypatch.setitem(sys.modules, "ray", Ray(cpus, 0, {}))
    message = rf"no machine of the cluster has as much; at most there are {least} CPUs, and 16 GB"
    with pytest.raises(UserError, match=message):
        engines.engine("ray", folder=tmp_path, **engines.options("ray", [asked] * bool(asked)))
