"""The store under crashes, damage and parallel runs; result rows; ids by exclusion."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import CONF, ROOT, ROW, names
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from bdx import files, recipe, results, store
from bdx.configure import compose, flat
from bdx.errors import UserError
from bdx.store import Store, commit

SPEC = {"attack": {"ratio": 0.1}, "seed": 0}
ID = recipe.digest(SPEC)
WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "split.poisoned": torch.tensor([True, False])}
FORK = multiprocessing.get_context("forkserver")  # children start from a process that has torch already: cheap
FORK.set_forkserver_preload(["bdx.run"])


class Made:
    """make(checkpoint) that counts."""

    def __init__(self):
        self.times, self.checkpoints = 0, []

    def __call__(self, checkpoint: Path):
        self.times += 1
        self.checkpoints.append(checkpoint.exists())
        return dict(WEIGHTS), {"seconds": 1.5}


@pytest.fixture
def make():
    return Made()


@pytest.fixture
def made(tmp_path):
    """A store that holds the artifact already."""
    Store(tmp_path).get_or_make(SPEC, Made())
    return Store(tmp_path)


def left(root: Path) -> list[str]:
    """What lies in a folder but for the lock, which may stay."""
    return sorted(p.name for p in root.iterdir() if p.suffix != ".lock")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# the store: once, whole, found again


def test_an_artifact_is_made_once_and_loaded_after(tmp_path, make):
    first = Store(tmp_path).get_or_make(SPEC, make)
    again = Store(tmp_path).get_or_make(dict(SPEC), make)
    assert make.times == 1
    assert first.id == again.id == ID
    assert same(again.tensors, WEIGHTS)
    assert again.meta == first.meta


def test_another_recipe_is_another_artifact(tmp_path, make):
    a = Store(tmp_path).get_or_make(SPEC, make)
    b = Store(tmp_path).get_or_make(SPEC | {"seed": 1}, make)
    assert make.times == 2
    assert left(tmp_path) == sorted([a.id, b.id])


def test_the_files_hold_weights_recipe_versions_and_checksum(made):
    folder = made.root / ID
    assert left(made.root) == [ID]
    assert left(folder) == ["meta.json", "weights.safetensors"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["recipe"] == SPEC
    assert meta["sha256"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert meta["seconds"] == 1.5
    assert meta["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "bdx", "commit", "hydra-core", "pytorch-lightning"} <= set(meta["versions"])
    assert same(load_file(folder / "weights.safetensors"), WEIGHTS)


def test_views_and_tied_tensors_are_stored_by_value(tmp_path):
    w = torch.arange(6.0).view(2, 3)
    found = Store(tmp_path).get_or_make(SPEC, lambda _: ({"a": w.T, "b": w, "c": w[:, 1]}, {}))
    assert same(found.tensors, {"a": w.T, "b": w, "c": w[:, 1]})


def test_find_makes_nothing(tmp_path):
    assert Store(tmp_path / "none").find(ID) is None
    assert not (tmp_path / "none").exists()


# the store: damage is noticed and made good


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x80
    path.write_bytes(data)


DAMAGE = {
    "weights, truncated": lambda f: cut(f / "weights.safetensors"),
    "weights, empty": lambda f: empty(f / "weights.safetensors"),
    "weights, gone": lambda f: (f / "weights.safetensors").unlink(),
    "weights, a byte of the header": lambda f: flip(f / "weights.safetensors", 12),
    "weights, a byte of the data": lambda f: flip(f / "weights.safetensors", -1),
    "meta, truncated": lambda f: cut(f / "meta.json"),
    "meta, empty": lambda f: empty(f / "meta.json"),
    "meta, gone": lambda f: (f / "meta.json").unlink(),
    "meta, without a checksum": lambda f: (f / "meta.json").write_text('{"recipe": {}}'),
    "meta, of another kind": lambda f: (f / "meta.json").write_text("[1, 2]"),
    "meta, a byte": lambda f: flip(f / "meta.json", 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact_is_made_again_once(made, make, damage):
    DAMAGE[damage](made.root / ID)
    assert made.find(ID) is None
    for _ in range(2):
        assert same(made.get_or_make(SPEC, make).tensors, WEIGHTS)
    assert make.times == 1
    assert left(made.root) == [ID]


def each_byte_altered(sheet: Path):
    """Yields after every change of one bit of one byte; the file is as it was at the end."""
    raw = sheet.read_bytes()
    for at in range(len(raw)):
        sheet.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        yield at
    sheet.write_bytes(raw)


def test_no_byte_of_the_sheet_changes_unnoticed(made):
    sheet = made.root / ID / "meta.json"
    meta = made.find(ID).meta
    for at in each_byte_altered(sheet):
        found = made.find(ID)
        assert found is None or found.meta == meta, f"byte {at}"
    assert made.find(ID).meta == meta


def test_a_sheet_without_a_checksum_of_itself_is_an_older_one_and_counts(made, make):
    sheet = made.root / ID / "meta.json"
    meta = json.loads(sheet.read_text())
    sheet.write_text(json.dumps({k: v for k, v in meta.items() if k != store.SEAL}))
    assert same(made.get_or_make(SPEC, make).tensors, WEIGHTS)
    assert make.times == 0
    sheet.write_text(json.dumps(meta | {store.SEAL: "0" * 64}))
    assert made.find(ID) is None


def test_the_checksum_of_a_sheet_does_not_hang_on_how_it_is_written(tmp_path):
    store.save_folder(tmp_path / "a", WEIGHTS, {"n": 1e-7, "t": (1, 2), "k": {10: "é", 2: None}}, weights="w", sheet="s")
    meta = json.loads((tmp_path / "a" / "s").read_text())
    assert store.unaltered(meta)
    assert store.unaltered(dict(reversed(meta.items())))
    assert not store.unaltered(meta | {"n": 2e-7})


# the store: crashes


def test_the_checkpoint_is_offered_and_removed_at_the_end(tmp_path):
    seen = []

    def make(checkpoint):
        seen.append(checkpoint)
        checkpoint.write_text("epoch 3")
        return WEIGHTS, {}

    Store(tmp_path).get_or_make(SPEC, make)
    assert seen[0].parent == tmp_path
    assert left(tmp_path) == [ID]


def test_a_make_that_raises_leaves_its_checkpoint_for_the_next(tmp_path, make):
    def breaks(checkpoint):
        checkpoint.write_text("epoch 3")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Store(tmp_path).get_or_make(SPEC, breaks)
    assert Store(tmp_path).find(ID) is None
    Store(tmp_path).get_or_make(SPEC, make)
    assert make.checkpoints == [True]
    assert left(tmp_path) == [ID]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_making(root: Path) -> None:
    def make(checkpoint):
        checkpoint.write_text("epoch 3")
        (root / f".{ID}.{os.getpid()}.tmp").write_text("half of the next checkpoint, as training.Watch.keep writes it")
        die()

    Store(root).get_or_make(SPEC, make)


def killed_in_the_weights(root: Path) -> None:
    def half(tensors, path):
        Path(path).write_bytes(b"half")
        die()

    store.save_file = half
    Store(root).get_or_make(SPEC, Made())


def killed_before_the_sheet(root: Path) -> None:
    store.file_sha256 = lambda path: die()
    Store(root).get_or_make(SPEC, Made())


def killed_between_the_renames(root: Path) -> None:
    """The damaged folder is moved away, the whole one not yet in its place."""
    (root / ID).mkdir(parents=True)
    (root / ID / "meta.json").write_text("damaged")
    replace = os.replace

    def last(a, b):
        replace(a, b)
        die()

    os.replace = last
    Store(root).get_or_make(SPEC, Made())


def killed_before_the_checkpoint_is_removed(root: Path) -> None:
    def make(checkpoint):
        checkpoint.write_text("epoch 3")
        return WEIGHTS, {}

    Path.unlink = lambda *_, **__: die()
    Store(root).get_or_make(SPEC, make)


def killed(how, root: Path) -> int:
    root.mkdir(exist_ok=True)
    child = FORK.Process(target=how, args=(root,))
    child.start()
    child.join(300)
    return child.exitcode


def test_the_commit_is_that_of_the_checkout_that_bdx_lies_in(tmp_path, monkeypatch):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True)
    git("init", "-q")
    (tmp_path / "mine.py").write_text("")
    git("add", "mine.py")
    git("commit", "-q", "-m", "x")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "store.py").write_text("")
    assert len(commit(tmp_path / "mine.py")) == 12
    assert commit(tmp_path / "env" / "store.py") == ""  # of bdx that repository says nothing
    assert commit(tmp_path.parent / "store.py") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path / "mine.py") == ""  # there is no git


@pytest.mark.parametrize(
    ("how", "behind"),
    [
        (killed_while_making, 2),
        (killed_in_the_weights, 1),
        (killed_before_the_sheet, 1),
        (killed_between_the_renames, 2),
    ],
)
def test_after_a_kill_the_next_call_finishes_and_sweeps_up(tmp_path, make, how, behind):
    assert killed(how, tmp_path) == -signal.SIGKILL
    assert len(left(tmp_path)) == behind, "the kill did not come in the middle"
    assert Store(tmp_path).find(ID) is None
    assert same(Store(tmp_path).get_or_make(SPEC, make).tensors, WEIGHTS)
    assert make.times == 1
    assert make.checkpoints == [how is killed_while_making]
    assert left(tmp_path) == [ID]


def test_a_kill_after_the_rename_loses_nothing(tmp_path, make):
    assert killed(killed_before_the_checkpoint_is_removed, tmp_path) == -signal.SIGKILL
    assert same(Store(tmp_path).get_or_make(SPEC, make).tensors, WEIGHTS)
    assert make.times == 0
    assert left(tmp_path) == [ID]


# the store: parallel runs


def one_of_many(root: Path, i: int, start) -> None:
    def make(_):
        with open(root / "makes", "a") as f:
            f.write(f"{i}\n")
        time.sleep(0.5)
        return WEIGHTS, {"by": i}

    start.wait(300)
    found = Store(root / "store").get_or_make(SPEC, make)
    (root / f"saw{i}").write_text(json.dumps([found.meta["by"], found.meta["sha256"]]))


def test_of_four_processes_one_makes_and_three_wait(tmp_path):
    start = FORK.Barrier(4)
    children = [FORK.Process(target=one_of_many, args=(tmp_path, i, start)) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * 4
    by = (tmp_path / "makes").read_text().split()
    assert len(by) == 1
    saw = {(tmp_path / f"saw{i}").read_text() for i in range(4)}
    assert len(saw) == 1
    assert json.loads(saw.pop())[0] == int(by[0])
    assert left(tmp_path / "store") == [ID]


def test_different_recipes_do_not_wait_for_each_other(tmp_path, make):
    """A make that asks for another artifact would hang if there were one lock for all."""

    def outer(_):
        inner = Store(tmp_path).get_or_make(SPEC | {"seed": 1}, make)
        return inner.tensors, {}

    Store(tmp_path).get_or_make(SPEC, outer)
    assert make.times == 1


# result rows

DETECTION = {k: v for k, v in ROW.items() if k != "defense"} | {
    "kind": "detection", "detector": "ac", "judged": "train", "auc": 0.5, "tpr": None, "fpr": 0, "seconds": 1, "n": 9,
    "n_flagged": 3,
}  # fmt: skip


def test_a_row_is_found_as_it_was_written(tmp_path):
    assert results.find(tmp_path / "new", ROW["id"]) is None
    assert results.write(tmp_path / "new", ROW) == ROW
    assert results.find(tmp_path / "new", ROW["id"]) == ROW
    assert results.path(tmp_path / "new", ROW["id"]).name == "0123456789abcdef.json"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["0123456789abcdef.json"]


NO_ROW = {
    "truncated": json.dumps(ROW)[:-9].encode(),
    "empty": b"",
    "of another run": json.dumps(ROW | {"id": "fedcba9876543210"}).encode(),
    "without an id": b"{}",
    "a list": b"[1]",
    "a number": b"3",
    "not text": b"\xff\xfe\x00",
    "nested beyond measure": b"[" * 100_000,
    "of another program": b'{"id": "0123456789abcdef"}',
    "half a detection": json.dumps(ROW | {"kind": "detection"}).encode(),
}
WRONG = {"seed": "0", "acc": "0.9", "acc_before": True, "asr": 93.5, "finished": None, "seconds_attack": float("nan"),
         "backdoor": 7, "dataset": ["toy"], "tpr": "high", "fpr": 1.5}  # fmt: skip


NO_ROW |= {f"{k}={v}": json.dumps(ROW | {k: v}).encode() for k, v in WRONG.items()}
NO_ROW |= {f"without {k}": json.dumps({of: v for of, v in ROW.items() if of != k}).encode() for k in ("seed", "acc_before")}
CONTENTS = list(NO_ROW)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_no_whole_row_of_this_run_does_not_count(tmp_path, content):
    results.path(tmp_path, ROW["id"]).write_bytes(NO_ROW[content])
    assert results.find(tmp_path, ROW["id"]) is None
    results.write(tmp_path, ROW)
    assert results.find(tmp_path, ROW["id"]) == ROW


@pytest.mark.parametrize("row", [
    ROW, DETECTION, ROW | {"asr": None, "ra": None, "der": None, "tpr": None}, ROW | {"seconds_attack": 3, "note": ["any"]},
], ids=["a run", "a detection", "nobody knows the trigger", "more keys"])  # fmt: skip
def test_a_row_may_have_no_asr_and_keys_of_its_own(tmp_path, row):
    assert results.find(tmp_path, results.write(tmp_path, row)["id"]) == row
    assert results.foreign(tmp_path) == []


def test_rows_that_travel_with_bdx_are_rows():
    for folder in (ROOT / "experiments" / "results", ROOT / "experiments" / "results" / "detections"):
        assert results.foreign(folder) == []
        assert len(results.rows(folder)) == len(list(folder.glob("*.json"))) > 0


def test_a_detection_among_runs_is_none_and_a_foreign_file_hides_no_row(tmp_path):
    results.write(tmp_path / "packaged", ROW)
    results.write(tmp_path / "own", DETECTION | {"id": "a" * 16})
    results.path(tmp_path / "own", ROW["id"]).write_text("{")
    assert results.rows(tmp_path / "own", tmp_path / "packaged") == [ROW]
    results.write(tmp_path / "detections", DETECTION)
    assert results.rows(tmp_path / "detections") == [DETECTION]


@pytest.mark.parametrize("content", CONTENTS)
def test_collect_leaves_out_what_is_no_row(tmp_path, content):
    results.write(tmp_path, ROW)
    other = ROW | {"id": "aaaaaaaaaaaaaaaa", "acc": 0.75}
    results.write(tmp_path, other)
    (tmp_path / "bbbbbbbbbbbbbbbb.json").write_bytes(NO_ROW[content])
    (tmp_path / ".cccccccccccccccc.json.17.tmp").write_text(json.dumps(ROW))
    table = results.collect(tmp_path)
    assert dict(zip(table["id"], table["acc"], strict=True)) == {ROW["id"]: 0.5, "aaaaaaaaaaaaaaaa": 0.75}


def test_collect_of_nothing_is_an_empty_table(tmp_path):
    assert len(results.collect(tmp_path / "none")) == 0


def test_a_write_that_fails_keeps_the_old_row(tmp_path, monkeypatch):
    results.write(tmp_path, ROW)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        results.write(tmp_path, ROW | {"acc": 0.9})
    assert results.find(tmp_path, ROW["id"])["acc"] == 0.5
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), "SafetensorError"])
def test_a_full_disk_names_the_file(error, tmp_path):
    """Neither a write nor safetensors says which it was."""
    if error == "SafetensorError":
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError, match="No space left on device") as e, files.whole(tmp_path / "row.json"):
        raise error
    assert (e.value.errno, e.value.filename) == (28, str(tmp_path / "row.json"))
    with pytest.raises(RuntimeError, match="mine"), files.whole(tmp_path / "row.json"):
        raise RuntimeError("mine")


# leftovers of a kill, in nets/ and results/ too


def killed_in_a_net(root: Path) -> None:
    store.file_sha256 = lambda path: die()
    store.save_folder(root / ID, WEIGHTS, {}, weights="net.safetensors", sheet="net.json")


def killed_in_a_row(root: Path) -> None:
    os.replace = lambda a, b: die()
    results.write(root, ROW)


def test_what_a_kill_left_beside_a_net_is_swept_when_it_is_saved_again(tmp_path):
    assert killed(killed_in_a_net, tmp_path) == -signal.SIGKILL
    assert len(left(tmp_path)) == 1
    store.save_folder(tmp_path / ID, WEIGHTS, {}, weights="net.safetensors", sheet="net.json")
    assert left(tmp_path) == [ID]


def test_what_a_kill_left_beside_a_row_is_swept_when_it_is_written_again(tmp_path):
    assert killed(killed_in_a_row, tmp_path) == -signal.SIGKILL
    assert len(left(tmp_path)) == 1
    results.write(tmp_path, ROW)
    assert left(tmp_path) == [f"{ROW['id']}.json"]


def test_only_what_a_dead_process_of_this_machine_wrote_of_the_same_thing_is_swept(tmp_path):
    gone = FORK.Process(target=time.sleep, args=(0,))
    gone.start()
    gone.join(300)
    row, here = f".{ROW['id']}.json", files.platform.node()
    swept = [
        f"{row}.{gone.pid}.tmp",
        f"{row}.{gone.pid}@{here}.tmp",
        f"{row}.{gone.pid}@{here}.old",
        f"{row}.{os.getpid()}.tmp",
    ]
    kept = [f"{row}.{os.getppid()}@{here}.tmp", f"{row}.{gone.pid}@another.node.tmp", f".other.json.{gone.pid}@{here}.tmp"]
    for name in swept + kept:
        (tmp_path / name).write_text("{")
    results.write(tmp_path, ROW)
    assert left(tmp_path) == sorted([*kept, f"{ROW['id']}.json"])


# recipes: identity by exclusion

PLUMBING = ("paths.", "trainer.", "logger.", "eval.", "dataset.source.")
SAID = ("names.", "asked")  # how the run was asked for, put there by compose


@cache
def composed(*overrides: str) -> DictConfig:
    """Never to be changed: the tests share it."""
    return compose(list(overrides))


def run_id(cfg: DictConfig, data: str = "pixels") -> str:
    return recipe.digest(recipe.of_run(cfg, data))


def backdoor_id(cfg: DictConfig, data: str = "pixels") -> str:
    return recipe.digest(recipe.of_backdoor(cfg, data))


def leaves(cfg: DictConfig, plumbing: bool = False) -> list[str]:
    """Dotted keys whose value is no mapping; the plumbing ones or all others."""
    keys = [k for k, node in flat(cfg).items() if node is not None and not k.startswith(SAID)]
    return [k for k in keys if k.startswith(PLUMBING) == plumbing]


def perturbed(cfg: DictConfig, key: str, file: Path) -> DictConfig:
    """A copy of cfg with another value at `key`."""
    copy = cfg.copy()
    value = OmegaConf.select(cfg, key)
    if key.endswith(".file"):
        file.write_bytes(b"pattern")
        new = str(file)
    elif isinstance(value, bool):
        new = not value
    elif isinstance(value, (int, float)):
        new = value + 1
    elif isinstance(value, (ListConfig, list)):
        new = [*value, 1]
    elif isinstance(value, DictConfig):
        new = {**value, "more": 1}
    else:
        new = 1 if value is None else f"{value}x"
    with open_dict(copy):
        OmegaConf.update(copy, key, new, merge=False)
    return copy


CHOICES = [(group, name) for group in ("dataset", "arch", "attack", "defense", "train") for name in names(group)]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=["=".join(c) for c in CHOICES])
def test_every_key_that_is_not_plumbing_changes_the_run(group, name, tmp_path):
    cfg = composed(f"{group}={name}")
    keys = [k for k in leaves(cfg) if k.startswith((f"{group}.", "seed"))]
    assert len(keys) > 1
    ids = {k: run_id(perturbed(cfg, k, tmp_path / "file")) for k in keys}
    assert [k for k in keys if ids[k] == run_id(cfg)] == []


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=["=".join(c) for c in CHOICES])
def test_the_backdoor_is_changed_by_every_key_but_those_of_the_defense_and_the_reserved_set(group, name, tmp_path):
    cfg = composed(f"{group}={name}")
    keys = [k for k in leaves(cfg) if k.startswith((f"{group}.", "seed"))]
    keys = [k for k in keys if k != "dataset.reserved.source"]  # see below
    changing = [k for k in keys if backdoor_id(perturbed(cfg, k, tmp_path / "file")) != backdoor_id(cfg)]
    assert changing == [k for k in keys if not k.startswith(("defense.", "dataset.reserved."))]


@pytest.mark.parametrize("identity", [run_id, backdoor_id])
def test_plumbing_does_not_change_an_id(identity, tmp_path):
    cfg = composed("logger=wandb")
    keys = leaves(cfg, plumbing=True)
    assert {"paths.out", "trainer.accelerator", "logger.mode"} <= set(keys)
    for key in keys:
        assert identity(perturbed(cfg, key, tmp_path / "file")) == identity(cfg), key
    assert identity(compose(["logger=none", "trainer=cpu", f"paths.out={tmp_path}"])) == identity(cfg)


def test_a_key_that_somebody_adds_tomorrow_changes_the_run():
    cfg = composed()
    for key in ("novel", "attack.novel", "train.optimizer.novel"):
        copy = cfg.copy()
        with open_dict(copy):
            OmegaConf.update(copy, key, 0)
        assert run_id(copy) != run_id(cfg), key


def test_what_is_said_twice_is_the_same_run():
    """The defaults given by hand make no other cell: a row is found whoever asked, however."""
    cfg = composed()
    assert run_id(compose(["seed=0", "attack=badnets", "attack.ratio=0.1"])) == run_id(cfg)
    assert backdoor_id(compose(["seed=0", "attack.ratio=0.1"])) == backdoor_id(cfg)


def spelled_out(preset: str) -> list[str]:
    """The overrides that say what conf/experiment/<preset>.yaml says."""
    cfg = OmegaConf.load(CONF / "experiment" / f"{preset}.yaml")
    chosen = [d for d in cfg.pop("defaults") if isinstance(d, DictConfig)]
    words = [f"{key.removeprefix('override /')}={name}" for d in chosen for key, name in d.items()]
    for key, node in flat(cfg).items():
        if isinstance(part := OmegaConf.select(cfg, key, throw_on_resolution_failure=False), DictConfig) and "_target_" in part:
            plain = OmegaConf.to_container(part)  # stands in the place of a null, so it is given as a whole
            words.append(f"{key}={{{','.join(f'{k}:{v}' for k, v in plain.items())}}}")
        elif node is not None and not key.startswith("defense.schedule."):
            words.append(f"{key}={node._value()}")
    return words


@pytest.mark.parametrize("preset", names("experiment"))
def test_a_preset_is_the_run_that_it_spells_out(preset):
    assert run_id(compose([f"experiment={preset}"])) == run_id(compose(spelled_out(preset)))


@pytest.mark.parametrize("source", ["train", "held_out"])
def test_the_reserved_set_is_part_of_the_backdoor_only_where_it_is_held_out(source, tmp_path):
    cfg = composed("dataset=digits", f"dataset.reserved.source={source}")
    keys = [f"dataset.reserved.{k}" for k in ("ratio", "count", "balanced")]
    for key in keys:
        other = perturbed(cfg, key, tmp_path)
        assert (backdoor_id(other) != backdoor_id(cfg)) == (source == "held_out"), key
        assert run_id(other) != run_id(cfg), key


def test_held_out_is_another_backdoor_than_train():
    a, b = (composed(f"dataset.reserved.source={s}") for s in ("train", "held_out"))
    assert backdoor_id(a) != backdoor_id(b)


@pytest.mark.parametrize("name", names("defense"))
def test_no_defense_changes_the_backdoor(name):
    assert backdoor_id(composed(f"defense={name}")) == backdoor_id(composed())
    assert name == "npd" or run_id(composed(f"defense={name}")) != run_id(composed())


def test_other_pixels_are_another_run():
    cfg = composed()
    assert run_id(cfg, "a") != run_id(cfg, "b")
    assert backdoor_id(cfg, "a") != backdoor_id(cfg, "b")


def test_one_and_one_point_zero_are_one_number():
    assert recipe.canonical({"a": [1.0, {"b": -2.0}]}) == recipe.canonical({"a": [1, {"b": -2}]})
    assert isinstance(recipe.canonical(1.0), int)
    assert recipe.canonical(1.5) == 1.5
    a, b = composed().copy(), composed().copy()
    a.attack.value, b.attack.value = 1, 1.0
    assert run_id(a) == run_id(b)


def test_the_order_of_keys_does_not_matter():
    a, b = {"x": {"p": 1, "q": 2}, "y": 3}, {"y": 3, "x": {"q": 2, "p": 1}}
    assert recipe.digest(recipe.canonical(a)) == recipe.digest(recipe.canonical(b))


@pytest.mark.parametrize("identity", ["run_id", "backdoor_id"])
def test_a_file_counts_by_its_content_and_not_by_its_path(tmp_path, identity):
    (tmp_path / "deep").mkdir()
    files = {name: tmp_path / name for name in ("a.png", "deep/b.png", "c.png")}
    for name, path in files.items():
        path.write_bytes(b"another" if name == "c.png" else b"pattern")
    of = {"run_id": run_id, "backdoor_id": backdoor_id}[identity]
    a, b, c = (of(compose(["attack=blended", f"attack.file={path}"])) for path in files.values())
    assert a != c
    assert a != of(composed("attack=blended"))
    assert a == b


def test_a_file_that_is_not_there_is_named():
    cfg = compose(["attack=blended", "attack.file=/no/such.png"])
    with pytest.raises(UserError, match=r"file=/no/such\.png: there is no such file"):
        run_id(cfg)


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        recipe.digest({"ratio": float("nan")})


def test_ids_are_the_same_in_another_process_and_need_no_torch(tmp_path):
    code = (
        "import sys; from bdx import recipe; from bdx.configure import compose; cfg = compose(['seed=3']); "
        "print(recipe.digest(recipe.of_run(cfg, 'pixels')), recipe.digest(recipe.of_backdoor(cfg, 'pixels')), "
        "'torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    cfg = compose(["seed=3"])
    assert out.stdout.split() == [run_id(cfg), backdoor_id(cfg), "False"]
