"""What goes wrong around a sweep: full disks, read-only folders, files of others. Nothing is lost, and a line says why."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from bdx import cli, grid, results, sweep, worker
from bdx.composer import Composer
from bdx.errors import UserError

pytestmark = pytest.mark.slow
NAME = "npd2023/table01"
ONE = ["scale=smoke", "attack=badnets", "defense=none"]


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A tmpfs there, where that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def one(monkeypatch, shared):
    """one(out) -> (exit code); a sweep of one cell in this process: its command runs here, in no worker."""
    from bdx.engines import local
    from bdx.engines.base import Outcome

    class Here(local.Engine):
        def submit(self, job):
            self.queue.append(job)

        def wait(self, seconds):
            job = self.queue.popleft()
            said = worker.cell(job.words, Composer())
            return [Outcome(job, said["state"], said["reason"], said["busy"], said["busy"])]

    monkeypatch.setattr(local, "Engine", Here)
    return lambda out, *words: sweep.sweep([NAME, *ONE, f"paths.data={shared / 'data'}", f"paths.out={out}", "slots=1", *words])


def ids(out: Path, shared: Path) -> tuple[str, str]:
    words = [f"paths.data={shared / 'data'}", f"paths.out={out}"]
    (cell,) = sweep.plan(grid.load(NAME), grid.scale("smoke"), [*ONE[1:], *words], Composer(), fetch=True).cells
    return cell.run, cell.backdoor


def test_a_truncated_row_is_measured_again_and_files_of_others_stay(one, tmp_path, shared, capsys):
    run, _ = ids(tmp_path, shared)
    (tmp_path / "results").mkdir()
    others = {"list.json": "[1]", "notes.json": '{"id": "another"}', "image.json": "\x00\xff", "README.md": "mine"}
    others["other.json"] = '{"id": "other"}'
    for name, text in others.items():
        (tmp_path / "results" / name).write_text(text)
    (tmp_path / "results" / f"{run}.json").write_text('{"id": "' + run + '", "acc": 0.9')
    assert one(tmp_path) == 0
    assert "0 done, 1 to do" in (out := capsys.readouterr().out)
    assert f"no rows: {run}.json, image.json, list.json, notes.json, other.json" in out
    assert [row["id"] for row in results.rows(tmp_path / "results")] == [run]
    assert {name: (tmp_path / "results" / name).read_text() for name in others} == others
    before = (tmp_path / "results" / f"{run}.json").stat().st_mtime_ns
    assert one(tmp_path) == 0
    assert (tmp_path / "results" / f"{run}.json").stat().st_mtime_ns == before


def test_a_full_disk_fails_the_cell_and_leaves_nothing_half_written(one, tmp_path, shared, capsys):
    out = tmp_path / "small"
    run, backdoor = ids(out, shared)
    with mounted(out, "size=200k"):
        assert one(out) == 1
        told = capsys.readouterr().out
        assert "0 done, 1 failed" in told
        assert "No space left on device" in told
        assert "to try them again: bdx sweep" in told
        left = [p.name for p in (out / "store").iterdir()]
        assert not [name for name in left if not name.endswith((".lock", ".ckpt"))], left
        assert results.rows(out / "results") == []
        subprocess.run(["mount", "-o", "remount,size=50m", str(out)], check=True)
        assert one(out) == 0
        assert [(row["id"], row["backdoor"]) for row in results.rows(out / "results")] == [(run, backdoor)]


def test_a_full_disk_is_a_line_for_whoever_writes(tmp_path, shared, capsys):
    small = tmp_path / "small"
    with mounted(small, "size=100k"):
        places = [f"paths.out={small}", f"paths.data={shared / 'data'}", "trainer=cpu"]
        for argv in (
            ["attack=badnets", "defense=none", *TINY, *places],
            ["report", "d32024/table01", "scale=cpu", f"paths.out={small}"],
        ):
            with pytest.raises(SystemExit) as e:
                cli.main(argv)
            assert e.value.code == 1
            assert re.search(r"bdx: error: \S*small\S*: No space left on device\n$", capsys.readouterr().err)


def test_what_is_read_only_is_refused_before_training_unless_nothing_must_be_written(one, tmp_path, shared, capsys):
    out, store = tmp_path / "out", tmp_path / "store"
    places = [f"paths.store={store}"]
    with mounted(store, "size=50m"):
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        with pytest.raises(UserError, match=f"{store} cannot be written: Read-only file system; name another folder by"):
            one(out, *places)
        subprocess.run(["mount", "-o", "remount,rw", str(store)], check=True)
        assert one(out, *places) == 0
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        assert one(out, *places, "defense=ft") == 0  # its backdoor is there, which is all it wants of the store
        assert sorted(row["defense"] for row in results.rows(out / "results")) == ["ft", "none"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_below_the_log_fails_the_cell_and_says_so(monkeypatch, stream):
    """The line that names the cell, or the traceback after it."""
    monkeypatch.setattr(Composer, "config", lambda *_: 1 / 0)
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, stream, full)
        said = worker.logged(("attack=badnets",), Composer())
    assert (said["state"], said["reason"]) == ("failed", "the worker's log cannot be written: No space left on device")
