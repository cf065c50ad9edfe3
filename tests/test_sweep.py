"""`bdx sweep`: what is done is not done again, what dies is tried again, what fails is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from conftest import ROOT, ROW, paths

from bdx import grid, plan, results, sweep
from bdx.composer import Composer
from bdx.configure import compose
from bdx.engines import engine, local
from bdx.engines.base import Engine, Job, Outcome
from bdx.errors import UserError
from bdx.grid import Cell
from bdx.sweep import Drive, Plan

NAME = "npd2023/table01"


class Toy(Engine):
    """Runs nothing: answer(job) says how a job ends, one per wait; a done job leaves its row and its backdoor."""

    def __init__(self, answer, plan: Plan, backdoors: dict[str, str]):
        self.answer, self.plan, self.backdoors = answer, plan, backdoors
        self.queue, self.order = deque(), []

    def submit(self, job):
        self.queue.append(job)
        self.order.append((job.id, job.alone))

    def wait(self, seconds):
        job = self.queue.popleft()
        state = self.answer(job)
        if state == "done":
            (store := self.plan.paths["store"] / self.backdoors[job.id]).mkdir(parents=True, exist_ok=True)
            (store / "meta.json").write_text("{}")
            results.write(self.plan.paths["results"], ROW | {"id": job.id})
        return [Outcome(job, state.removesuffix(", no row"), f"{state}!")]

    def running(self):
        return list(self.queue)

    def close(self):
        self.queue.clear()


def drive(tmp_path: Path, answer, cells: list[tuple[str, str, str]]) -> tuple[Drive, Toy]:
    """cells: (run, backdoor, defense). Returns when nothing is left."""
    (tmp_path / "results").mkdir(exist_ok=True)
    found = [Cell({"defense": d}, (f"run={r}",), None, r, b) for r, b, d in cells]
    plan = Plan(found, {"results": tmp_path / "results", "store": tmp_path / "store"})
    toy = Toy(answer, plan, {r: b for r, b, _ in cells})
    driven = Drive(plan, plan.todo, toy)
    while driven.left:
        driven.step(1.0)
    return driven, toy


def test_backdoors_come_first_and_their_defenses_after(tmp_path):
    cells = [("1", "a", "ft"), ("2", "a", "none"), ("3", "a", "npd"), ("4", "b", "ft"), ("5", "b", "npd")]
    driven, toy = drive(tmp_path, lambda job: "done", cells)
    assert [id for id, _ in toy.order[:2]] == ["2", "4"]  # one that trains each backdoor, an undefended one if there is
    assert sorted(id for id, _ in toy.order) == ["1", "2", "3", "4", "5"]
    assert not driven.failed
    again, toy = drive(tmp_path, lambda job: pytest.fail("it was done"), cells)
    assert not again.cells


def test_a_stored_backdoor_holds_nothing_back(tmp_path):
    (tmp_path / "store" / "a").mkdir(parents=True)
    (tmp_path / "store" / "a" / "meta.json").write_text("{}")
    cells = [Cell({}, ("x",), None, r, "a") for r in "123"]
    (tmp_path / "results").mkdir()
    plan = Plan(cells, {"results": tmp_path / "results", "store": tmp_path / "store"})
    toy = Toy(None, plan, dict.fromkeys("123", "a"))
    Drive(plan, plan.todo, toy)
    assert [id for id, _ in toy.order] == ["1", "2", "3"]  # all submitted at once


@pytest.mark.parametrize("state", ["died", "memory"])
def test_what_dies_is_tried_once_more_alone(tmp_path, state):
    answers = iter([state, "done"])
    driven, toy = drive(tmp_path, lambda job: next(answers), [("1", "a", "ft")])
    assert toy.order == [("1", False), ("1", True)]
    assert not driven.failed
    driven, toy = drive(tmp_path, lambda job: state, [("2", "b", "ft")])
    assert toy.order == [("2", False), ("2", True)]
    assert driven.failed["2"].state == state


def test_one_failure_stops_no_other_and_a_backdoor_may_fail_twice(tmp_path):
    cells = [("1", "a", "x"), ("2", "b", "x"), ("3", "b", "y"), ("4", "b", "z"), ("5", "b", "w")]
    driven, toy = drive(tmp_path, lambda job: "done" if job.id == "1" else "failed", cells)
    assert [o.job.id for o in driven.finished] == ["1"]
    assert [id for id, _ in toy.order] == ["1", "2", "3"]
    assert {k: v.reason for k, v in driven.failed.items()} == {
        "2": "failed!", "3": "failed!", "4": "its backdoor failed twice", "5": "its backdoor failed twice",
    }  # fmt: skip


def test_a_refusal_says_nothing_of_the_backdoor(tmp_path):
    """As of a method that wants BatchNorm, in a net without: those that come after it still train the net."""
    cells = [("1", "a", "x"), ("2", "a", "y"), ("3", "a", "z"), ("4", "a", "w")]
    driven, _ = drive(tmp_path, lambda job: "refused" if job.id in "123" else "done", cells)
    assert [o.job.id for o in driven.finished] == ["4"]
    assert {k: v.state for k, v in driven.failed.items()} == dict.fromkeys("123", "refused")


def test_done_means_that_there_is_a_row(tmp_path):
    driven, _ = drive(tmp_path, lambda job: "done, no row", [("1", "a", "x")])
    assert driven.failed["1"].reason == "it ended well but left no row"


def test_images_that_cannot_be_had_stop_no_other(tmp_path, capsys, monkeypatch):
    """Those of one data set; the others' cells run."""
    real = grid.sha256

    def had(plain):
        if plain["dataset"]["name"] == "cifar10":
            raise UserError("cifar10 could not be downloaded: no network")
        return real(plain)

    monkeypatch.setattr(grid, "sha256", had)
    words = ["scale=paper", "attack=badnets", "defense=none", "dataset=digits,cifar10", *paths(tmp_path)]
    found = plan.plan(grid.load(NAME), grid.scale("paper"), words[1:], Composer(), fetch=True)
    assert [c.lacks for c in found.cells] == [None, "the images of cifar10"]
    plan.show(NAME, found, found.todo, Composer(), lambda text, **_: print(text))
    out = capsys.readouterr().out
    assert "missing: 1 cells, for want of the images of cifar10 (1)" in out
    assert "images: cifar10 could not be downloaded: no network" in out
    with pytest.raises(UserError, match="cifar10 could not be downloaded: no network"):
        plan.plan(grid.load(NAME), grid.scale("paper"), [*words[1:], "dataset=cifar10"], Composer(), fetch=True)


def test_where_images_cannot_be_had_the_exit_code_says_that_cells_are_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "plan", lambda *_, **__: Plan([], {"results": tmp_path}, {"cifar10": "cifar10: no network"}))
    assert sweep.sweep([NAME, "scale=smoke"]) == 1
    assert "images: cifar10: no network" in capsys.readouterr().out


def test_a_plan_takes_no_other_data_set_for_the_one_it_wants(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar100.safetensors").write_bytes(b"")
    assert sweep.sweep([NAME, "attack=badnets", "defense=none", *paths(tmp_path), "--dry-run"]) == 0
    assert "images: not there yet for these" in capsys.readouterr().out


def test_the_plan_counts_and_the_users_words_narrow_it(tmp_path, capsys):
    words = ["scale=smoke", "attack=badnets,blended,nobody", "defense=none,ft", "seed=0,1", *paths(tmp_path), "--dry-run"]
    assert sweep.sweep([NAME, *words]) == 0
    out = capsys.readouterr().out
    assert "12 cells, 8 can run, 0 done, 8 to do" in out
    assert "missing: 4 cells, for want of attack=nobody (4)" in out
    assert "images: not there yet" in out
    assert "backdoors:" not in out  # how many there are is told by the images
    assert "  to do: attack=badnets, defense=ft, seed=0,1\n" in out
    assert "attack=nobody, " not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("gpus", "said"), [([""], 1), (["GPU-1"], 0)])
def test_the_plan_of_a_sweep_that_must_emulate_bf16_here_says_so_once(tmp_path, capsys, monkeypatch, gpus, said):
    monkeypatch.setattr(sweep, "devices", lambda: gpus)
    monkeypatch.setattr(sweep.hardware, "bf16_emulated", lambda precision: f"{precision} is slow here")
    words = ["scale=cpu", "attack=badnets,blended", "defense=none", *paths(tmp_path), "--dry-run"]
    assert sweep.sweep([NAME, *words]) == 0
    assert capsys.readouterr().out.count("bf16-mixed is slow here\n") == said


def test_a_thousand_finished_cells_are_known_in_no_time(tmp_path, shared):
    """Process time, since other work may share the cores; the goal is 5 s."""
    table, scale = grid.load(NAME), grid.scale("smoke")
    places = [f"paths.data={shared / 'data'}", f"paths.out={tmp_path}"]
    at_one_seed = len(sweep.plan(table, scale, places, Composer(), fetch=True).runnable)
    words = [f"seed={','.join(map(str, range(-(-1000 // at_one_seed))))}", *places]
    first = sweep.plan(table, scale, words, Composer(), fetch=True)
    for cell in first.runnable:
        results.write(tmp_path / "results", ROW | {"id": cell.run})
    started = time.process_time()
    again = sweep.plan(table, scale, words, Composer(), fetch=True)
    assert (len(again.runnable) >= 1000, again.todo) == (True, [])
    assert time.process_time() - started < 5


@pytest.mark.parametrize(("argv", "match"), [
    (["npd2023/tabel01"], "did you mean npd2023/table01"), ([NAME, "again"], "expected one table"),
    ([NAME, "slots=0"], "slots=0: expected a whole number from 1"), ([NAME, "--dry"], "did you mean --dry-run"),
    ([NAME, "scale=smoke", "trian.epochs=1"], "trian.epochs: no such key .did you mean train.epochs"),
    ([NAME, "scale=smoke", "attack=badnet"], "no cell can run, for want of attack=badnet"),
    ([NAME, "scale=smoke", "train.epochs=few"], "train.epochs=few: expected a whole number"),
    ([NAME, "scale=smoke", "engine=cloud", "paths.out=%"], "engine=cloud: expected"),
    ([NAME, "scale=smoke", "attack=glob(b*)"], r"attack=glob.b\*.: expected values that can be counted, a,b,c or range"),
    ([NAME, "scale=smoke", "seed=interval(0,3)"], "seed=interval.0,3.: expected values that can be counted"),
    ([NAME, "scale=smoke", "attack=badnets,"], "^attack=badnets,: .*expected key=value"),
    (["npd2023/table03", "scale=smoke", "defense.lambda_ce=0.7"], "for want of printed numbers of such a cell"),
    ([NAME, "scale=smoke", "paths.out=/dev/null/x"], "/dev/null/x/store cannot be written"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line_before_anything_runs(argv, match, shared, tmp_path):
    argv = [a.replace("%", str(tmp_path)) for a in argv]
    with pytest.raises(UserError, match=match) as e:
        sweep.sweep([*argv, f"paths.data={shared / 'data'}"])
    assert "\n" not in str(e.value)


def test_the_plan_names_rows_that_came_with_bdx(tmp_path, monkeypatch):
    """A table shows them; a sweep measures its own."""
    words = ["attack=badnets", "defense=none,ft", *paths(tmp_path)]
    found, said = plan.plan(grid.load(NAME), grid.scale("smoke"), words, Composer(), fetch=True), []
    monkeypatch.setattr(plan, "CAME", tmp_path / "came")
    plan.show(NAME, found, found.todo, Composer(), lambda line, **_: said.append(line))
    assert not any(line.startswith("rows:") for line in said)
    (tmp_path / "came").mkdir()
    (tmp_path / "came" / f"{found.todo[0].run}.json").write_text(json.dumps(ROW | {"id": found.todo[0].run}))
    plan.show(NAME, found, found.todo, Composer(), lambda line, **_: said.append(line))
    assert "rows: of 1 of these one came with bdx, which `bdx table` shows; they are measured here all the same" in said


@pytest.mark.parametrize("word", ["engine=foo", "slots=2", "foo=bar", "--dry-run"])
def test_without_a_table_there_is_nothing_to_say_more_of(word):
    with pytest.raises(UserError, match=f"^{word}: expected a table with it, such as npd2023/table01; `bdx sweep` alone lists"):
        sweep.sweep([word])


@pytest.mark.parametrize(("value", "found"), [("-1", [""]), ("0,1", ["0", "1"]), ("1,-1,0", ["1"]), ("", [""])])
def test_a_negative_device_ends_the_list_as_it_does_for_cuda(value, found, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert local.devices() == found


@pytest.mark.parametrize(("says", "found", "told"), [
    ("echo GPU-1; echo GPU-2", ["GPU-1", "GPU-2"], ""), ("echo No devices were found", [""], ""),
    ("echo NVIDIA-SMI has failed; exit 9", [""], "nvidia-smi fails, so no GPU is counted: NVIDIA-SMI has failed\n"),
])  # fmt: skip
def test_a_broken_nvidia_smi_counts_no_gpu_and_is_named_once(tmp_path, monkeypatch, capsys, says, found, told):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.devices() == local.devices() == found
    err = capsys.readouterr().err
    assert (err == "") == (told == "")
    assert err.endswith(told)
    assert err.count("\n") <= 1


def test_every_table_is_listed(capsys):
    assert sweep.sweep(["scale=smoke"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in grid.tables())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def cell_words(shared: Path, out: Path, *more: str) -> tuple[str, ...]:
    words = [f"paths.data={shared / 'data'}", f"paths.out={out}", *more]
    (cell,) = grid.cells(grid.load(NAME), grid.scale("smoke"), words, Composer())
    return cell.words


def ended(runner, n: int, seconds: float = 120) -> list[Outcome]:
    found, until = [], time.monotonic() + seconds
    while len(found) < n and time.monotonic() < until:
        found += runner.wait(1.0)
    return found


@pytest.mark.slow
def test_local_workers_run_report_die_and_leave_nothing_behind(tmp_path, shared, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runner = engine("local", slots=1, folder=tmp_path / "log")
    out = tmp_path / "out"
    try:
        good = Job("good", cell_words(shared, out, "attack=badnets", "defense=none"))
        runner.submit(good)
        (outcome,) = ended(runner, 1)
        assert (outcome.state, outcome.job) == ("done", good)
        (row,) = results.rows(out / "results")
        assert row["id"] == results.finished(compose(list(good.words)))["id"]
        pid = runner.workers[0].process.pid
        runner.submit(Job("again", good.words))  # the row is there: what is left is what the sweep adds
        runner.submit(Job("bad", (*good.words, "attack.ratio=7.0")))
        again, refused = ended(runner, 2)
        assert runner.workers[0].process.pid == pid  # one process, warm
        assert again.seconds - again.busy < 2
        assert (refused.state, "ratio" in refused.reason) == ("refused", True)
        runner.submit(Job("long", cell_words(shared, out, "attack=blended", "defense=none", "train.epochs=500")))
        time.sleep(0.5)
        assert [j.id for j in runner.running()] == ["long"]
        runner.workers[0].process.kill()
        (died,) = ended(runner, 1)
        assert (died.state, "code -9" in died.reason) == ("died", True)
        assert len(results.rows(out / "results")) == 1
    finally:
        runner.close()
    assert runner.running() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_goes_on_and_two_at_once_agree(tmp_path, shared):
    """SIGKILL after the first row: the workers end by themselves, nothing half-written is left, and two sweeps that are
    started at once finish the rest without doing anything twice."""
    out = tmp_path / "out"
    words = [
        "scale=smoke",
        "attack=badnets",
        "defense=none,ft,npd",
        f"paths.data={shared / 'data'}",
        f"paths.out={out}",
        "slots=1",
    ]
    command = [sys.executable, "-m", "bdx.cli", "sweep", NAME, *words]
    first = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((out / "results").glob("*.json")) and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {p: p.stat().st_mtime_ns for p in (out / "results").glob("*.json")}
    assert len(before) >= 1
    both = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    rows = results.rows(out / "results")
    assert sorted(r["defense"] for r in rows) == ["ft", "none", "npd"]
    assert {p: p.stat().st_mtime_ns for p in before} == before  # what was done was not done again
    assert len({r["backdoor"] for r in rows}) == 1
    assert not [p for p in (out / "results").iterdir() if p.suffix != ".json"]
    by_hydra = [sys.executable, "-m", "bdx.cli", "-m", f"+{NAME.replace('/', '=')}", *words[:-1]]
    ran = subprocess.run(by_hydra, env=environment(), capture_output=True, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stdout.count(results.DONE)) == (0, 3), ran.stderr  # an ordinary multirun has the same cells
