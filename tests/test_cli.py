"""The command line: one clear line for every mistake, honest exit codes, no torch before a run starts."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT, TINY, names, paths

from bdx.cli import main
from bdx.configure import groups, options
from bdx.errors import UserError
from bdx.screen import Screen

SMALL = [*TINY, "dataset.source.size=16", "train.epochs=1", "attack=none", "defense=none"]
SCRIPT = Path(sys.executable).parent / "bdx"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # children of a busy machine
FORK = multiprocessing.get_context("forkserver")  # children start from a process that has torch already: cheap
FORK.set_forkserver_preload(["bdx.run"])


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Nets as thin as these gain nothing from a second thread, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bdx(monkeypatch, capsys, tmp_path):
    """bdx(*argv) -> exit code, stdout and stderr of the command, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bdx"])
    for name in ("BDX_DATA", "BDX_OUT"):
        monkeypatch.delenv(name, raising=False)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    log = logging.root.handlers[:], logging.root.level  # Hydra's multirun logs to the stdout of this test

    def call(*argv: str) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(argv))
        return Said(stopped.value.code or 0, *capsys.readouterr())

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.root.handlers[:] = log[0]
    logging.root.setLevel(log[1])


def refused(said: Said, pattern: str) -> None:
    """Exit code 2 and one line on stderr, and what it says."""
    assert said.code == 2
    assert len(said.errors) == 1, said.err
    assert said.err.startswith("bdx: error: ")
    assert "Traceback" not in said.out + said.err
    assert re.search(pattern, said.err), said.err


def rows(root: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((root / "out" / "results").glob("*.json"))]


# help and what needs no torch


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_choice_of_every_group(bdx, argv):
    said = bdx(*argv)
    assert said.code == 0
    lines = {words[0]: words[1:] for words in map(str.split, said.out.splitlines()) if words}
    assert {g: lines[g] for g in groups()} == {g: options(g) for g in groups()}
    for word in ("bdx data prepare", "bdx info", "-m ", "--cfg job", "-sc install=bash"):
        assert word in said.out


@pytest.mark.parametrize("argv", [
    "table --help", "report -h", "dashboard --help", "figure --help", "figure npd2023/fig03 -h", "table npd2023/table01 --help",
])  # fmt: skip
def test_what_shows_a_table_says_what_it_takes(bdx, argv):
    said = bdx(*argv.split())
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"bdx {argv.split()[0]} ")
    assert "key=value" in said.out


def test_version(bdx):
    import bdx as package

    assert bdx("--version").out.split() == ["bdx", package.__version__]


LIGHT = [
    (["--help"], 0),
    (["--version"], 0),
    (["info"], 0),
    (["data", "list"], 0),
    (["--cfg", "job", "attack=blended"], 0),
    (["-sc", "install=bash"], 0),
    (["-sc", "query=bash"], 0),
    (["attack.rato=1"], 2),
    (["attack=badnet"], 2),
    (["seed=1.5"], 2),
]


def test_nothing_heavy_is_imported_before_a_run_starts(tmp_path):
    """Torch costs seconds, Lightning more; help, completion, info and refusals must not wait for them."""
    code = f"""
import os, sys
os.environ["COMP_LINE"] = "bdx attack=b"
from bdx.cli import main
for argv, wanted in {LIGHT!r}:
    try:
        main(argv)
    except SystemExit as e:
        assert (e.code or 0) == wanted, (argv, e.code)
    heavy = {{"torch", "torchvision", "pytorch_lightning", "pandas", "sklearn", "wandb", "matplotlib"}} & set(sys.modules)
    assert not heavy, (argv, heavy)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# refusals: nothing is composed from a mistake

MISTAKES = [
    ("attack.rato=0.1", r"attack\.rato: no such key \(did you mean attack\.ratio\b"),
    ("epochs=3", r"epochs: no such key \(did you mean .*train\.epochs"),
    ("defense.lr=3", r"defense\.lr: no such key \(did you mean defense\.optimizer\.lr, "),
    ("atack=badnets", r"atack: no such key \(did you mean attack"),
    ("train.optimizer.momentun=0.8", r"did you mean train\.optimizer\.momentum\b"),
    (
        "attack=badnet",
        r"attack=badnet: no such attack \(did you mean badnets\b.*there are .*badnet_grid, badnet_white, badnets, ",
    ),
    ("defense=zzzz", r"defense=zzzz: no such defense; there are .*\bnpd\b"),
    ("experiment=dmeo", r"no such experiment \(did you mean demo\?\)"),
    ("attack=base", r"attack=base: no such attack"),
    ("attack=", r"attack=: no such attack"),
    ("attack.ratio=abc", r"attack\.ratio=abc: expected a number, as 0\.1"),
    ("seed=1.5", r"seed=1\.5: expected a whole number, as 0"),
    ("seed=true", r"seed=[Tt]rue: expected a whole number"),
    ("train.epochs=ten", r"train\.epochs=ten: expected a whole number, as 100"),
    ("dataset.reserved.balanced=1", r"balanced=1: expected true or false"),
    ("dataset.normalize.mean=0.5", r"mean=0\.5: expected a list"),
    ("attack.labels=[all2all]", r"labels=\[all2all\]: expected a word"),
    ("attack.ratio=[", r"expected key=value"),
    ("hello", r"hello: neither a command .*nor key=value; `bdx --help`"),
    ("inof", r"inof: neither a command \(did you mean info\?\)"),
    ("--frobnicate", r"--frobnicate: neither a command nor key=value"),
    ("seed=0,1", r"seed=0,1: several values make a grid, which is `bdx -m …`"),
    ("seed=range(0,3)", r"several values make a grid"),
    ("attack.ratio=nan", r"attack\.ratio=nan: expected a finite number"),
    ("attack.ratio=-inf", r"attack\.ratio=-inf: expected a finite number"),
    ("+train.optimizer.eps=inf", r"train\.optimizer\.eps=inf: expected a finite number"),
    ("dataset.normalize.mean=[nan,0,0]", r"dataset\.normalize\.mean=nan: expected a finite number"),
    ("dataset.normalize.mean=[a,b,c]", r"mean=\[a,b,c\]: expected a list, each a number, as \[0\.4914,"),
    (
        "dataset.augment=null",
        r"dataset\.augment=null: expected a mapping, with the keys zoom, crop, flip, rotate, cutout, cutmix",
    ),
    ("dataset.augment=3", r"dataset\.augment=3: expected a mapping"),
    ("dataset.augment=[1]", r"dataset\.augment=\[1\]: expected a mapping"),
    ("dataset.augment={a:1}", r"dataset\.augment\.a: no such key; dataset\.augment has zoom, crop, flip"),
    ("++dataset.augment={corp:1}", r"dataset\.augment\.corp: no such key \(did you mean crop\?\)"),
    ("dataset.augment={crop:abc}", r"dataset\.augment\.crop=abc: expected a whole number, as 4"),
    ("train.augment=null", r"train\.augment=null: expected a mapping"),
    ("train.optimizer=null", r"train\.optimizer=null: expected a mapping, with the keys _target_"),
    ("train.schedule.T_max=abc", r"T_max=abc: expected a whole number, as 100"),
    ("paths=here", r"paths=here: expected a mapping"),
    ("+attack@foo=badnets", r"\+attack@foo=badnets: a group has one place and takes no @; expected attack=…"),
    ("attack@foo=badnets", r"attack@foo=badnets: a group has one place"),
    ("+experiment=demo", r"\+experiment=demo: every group is there already; expected experiment=demo"),
]


UNSEEN = [
    (["attack=null"], r"attack"),
    (["~attack"], r"attack"),
    (["=3"], r"expected key=value"),
    (["seed=null"], r"seed=null: expected a whole number"),
    (["+novel=1"], r"novel: no such key"),
    (["+attack.rato=1"], r"attack\.rato: no such key"),
    (["++attack.ratio=abc"], r"attack\.ratio=abc: expected a number"),
    (["~attack.ratio"], r"attack\.ratio"),
    (["train.batch=0"], r"batch=0"),
    (["train.precision=half"], r"precision=half"),
    (["train.label_smoothing=3"], r"label_smoothing=3"),
    (["defense=npd", "defense.target=99"], r"target=99"),
]


@pytest.mark.parametrize(("words", "answer"), UNSEEN, ids=[" ".join(w) for w, _ in UNSEEN])
def test_a_mistake_that_slips_through(bdx, shared, words, answer, tmp_path):
    chosen = [w for w in [*SMALL, "attack=badnets"] if w.split("=")[0] not in {w.strip("+~").split("=")[0] for w in words}]
    refused(bdx(*chosen, f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}", *words), answer)


@pytest.mark.parametrize(("word", "answer"), MISTAKES, ids=[w for w, _ in MISTAKES])
def test_a_mistake_is_refused_in_one_line(bdx, word, answer, tmp_path):
    refused(bdx(word), answer)
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_the_mistake_is_found_among_words_that_are_right(bdx):
    refused(bdx("attack=blended", "seed=3", "attack.alpa=0.5", "defense=ft"), r"attack\.alpa.*attack\.alpha")


def test_keys_are_those_of_the_choice_made(bdx):
    refused(bdx("attack=blended", "attack.patch=4"), r"attack\.patch: no such key")


IMPOSSIBLE = [
    (["attack=sig", "attack.labels=all2all"], r"SIG is a clean-label attack.*all2one"),
    (["attack=badnets", "attack.labels=both"], r"attack\.labels=both: expected all2one or all2all"),
    (["attack=badnets", "attack.ratio=2"], r"attack\.ratio=2 asks for 2876 poisoned images of 1438"),
    (
        ["attack=sig", "attack.ratio=0.5"],
        r"719 poisoned images of 1438, but there are \d+ of class 0.*ratio_of=candidates",
    ),
    (["attack=badnets", "attack.ratio=0"], r"attack\.ratio=0 asks for 0 poisoned images"),
    (["attack=badnets", "attack.target=10"], r"attack\.target=10: expected 0 to 9 for 10 classes"),
    (["attack=badnets", "attack.target=-1"], r"attack\.target=-1: expected 0 to 9"),
    (["attack=badnets", "attack.patch=40"], r"attack\.patch=40.*images are 16×16"),
    (["attack=badnets", "attack.position=middle"], r"position=middle: expected \(top\|bottom\)_\(left\|right\)"),
    (["attack=blended", "attack.file=/no/such.png"], r"file=/no/such\.png: there is no such file"),
    (["defense=npd", "defense.layer=layer9"], r"layer=layer9: no such layer.*bdx info layers"),
    (["dataset.reserved.ratio=2"], r"reserved\.ratio=2 asks for 2876 reserved images of 1438"),
    (["dataset.reserved.source=test"], r"reserved\.source=test: expected train or held_out"),
    (["train.optimizer._target_=os.system"], r"_target_=os\.system is not allowed"),
    (["train.epochs=0"], r"epochs=0: expected at least 1"),
    (["train.optimizer.lr=0.5"], r"train\.optimizer\.lr=0\.5: the schedule of train=fast sets the rate by its own max_lr"),
    (["dataset.source.size=0"], r"dataset\.source\.size=0: expected 1 to 4096"),
    (["seed=99999999999"], r"seed=99999999999: expected 0 to 2147483647"),
    (["dataset.normalize={mean:[125.0,123.0,114.0],std:[63.0,62.0,67.0]}"], r"pixels are in \[0,1\]; expected means from 0"),
    (["attack=blended", "attack.file=/"], r"attack\.file=/: that is a folder"),
    (["train.optimizer.lr=-1", "train.schedule=null"], r"train\.optimizer cannot be used: Invalid learning rate: -1"),
    (["+train.optimizer.betas=1"], r"train\.optimizer cannot be used: .*unexpected keyword argument 'betas'"),
    (["train.optimizer.momentum=0.5"], r"train\.optimizer\.momentum=0\.5: the schedule of train=fast moves the momentum"),
    (["train.schedule.max_lr=-1"], r"train\.schedule cannot be used: the learning rate is -0\.04 at some time"),
    (["train.schedule.pct_start=7"], r"train\.schedule cannot be used: Expected float between 0 and 1 pct_start"),
    (["defense=ft", "defense.optimizer.lr=-1"], r"defense\.optimizer cannot be used: Invalid learning rate: -1"),
    (["defense=ft", "defense.schedule.eta_min=-1"], r"eta_min"),
    (["defense=ft", "+defense.schedule.eta_min=-1"], r"defense\.schedule cannot be used: the learning rate is -"),
    (["defense=npd", "defense.optimizer._target_=torch.nn.Linear"], r"defense\.optimizer cannot be used: "),
    (["dataset.augment.crop=-2"], r"dataset\.augment\.crop=-2: expected 0 \(off\) or more"),
    (["dataset.augment.rotate=-1"], r"dataset\.augment\.rotate=-1: expected 0"),
    (["dataset.augment.cutout=-1"], r"dataset\.augment\.cutout=-1: expected 0"),
    (["dataset.augment.cutmix=-1"], r"dataset\.augment\.cutmix=-1: expected 0"),
    (["dataset.augment.zoom=0"], r"dataset\.augment\.zoom=0: expected more than 0, and at most 1 \(off\)"),
    (["train.augment={crop:1}"], r"train\.augment=.*expected all of zoom, crop, flip, rotate, cutout, cutmix and nothing else"),
]


@pytest.mark.parametrize(("words", "answer"), IMPOSSIBLE, ids=[" ".join(w) for w, _ in IMPOSSIBLE])
def test_what_cannot_work_is_refused_before_anything_is_trained(bdx, shared, words, answer, tmp_path):
    refused(bdx(*SMALL, f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}", *words), answer)
    assert not list(tmp_path.glob("out/store/[!.]*"))
    assert not list(tmp_path.glob("out/results/*"))


@pytest.mark.parametrize("sub", ["nets", "results"])
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_trained(bdx, shared, sub, tmp_path):
    (file := tmp_path / "file").write_text("")
    data = f"paths.data={shared / 'data'}"
    for words in ([f"paths.out={file}"], [f"paths.out={tmp_path / 'out'}", f"paths.{sub}={file / 'deep'}"]):
        said = bdx(*SMALL, data, *words)
        refused(
            said, rf"{file}.* cannot be written: a file stands where a folder is needed; name another folder by .*paths\.out"
        )
    assert not list(tmp_path.glob("out/store/[!.]*"))
    refused(bdx("-m", *SMALL, data, f"paths.out={file}", "seed=0,1"), rf"{file} cannot be written")
    refused(bdx(*SMALL, data, "paths.out=/proc/no"), "/proc/no/locks cannot be written: No such file or directory")


@pytest.mark.parametrize("argv", [SMALL, ["data", "prepare", "digits"]], ids=["run", "prepare"])
def test_a_file_given_as_the_folder_of_images_is_named(bdx, tmp_path, argv):
    (file := tmp_path / "file").write_text("")
    refused(bdx(*argv, f"paths.data={file}"), rf"{file}: a file stands where a folder is needed")


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1)])
def test_what_the_file_system_refuses_is_one_line_with_path_and_reason(bdx, monkeypatch, number, code):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "/some/path")

    monkeypatch.setattr("bdx.cli.dispatch", refuse)
    said = bdx("seed=0")
    assert said.code == code
    assert said.errors == [f"bdx: error: /some/path: {os.strerror(number)}"]


def test_an_error_that_names_no_path_keeps_its_traceback(monkeypatch):
    """Touching a split that a method did not declare is a PermissionError too, and nothing about files."""

    def touch(*_):
        raise PermissionError("this method does not declare that it needs data.test")

    monkeypatch.setattr("bdx.cli.dispatch", touch)
    with pytest.raises(PermissionError, match="does not declare"):
        main(["seed=0"])


def test_a_gpu_that_is_not_there_is_named(bdx, shared, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(bdx(*SMALL, *paths(tmp_path), "trainer=gpu"), "trainer=gpu, but torch sees no GPU here; take trainer=cpu")


# info and data


def test_info_lists_all_there_is(bdx):
    said = bdx("info")
    assert said.code == 0
    for group in ("attack", "defense", "dataset", "arch", "experiment"):
        for name in names(group):
            assert re.search(rf"^  {name} +\S", said.out, re.MULTILINE), (group, name)
    assert re.search(r"^  sig .*clean label.*Barni", said.out, re.MULTILINE)
    assert re.search(r"^  ft .*needs clean images", said.out, re.MULTILINE)


def test_info_of_one_kind(bdx):
    out = bdx("info", "defenses").out
    assert out.startswith("defenses\n")
    assert "blended" not in out


def test_info_of_an_unknown_topic(bdx):
    refused(bdx("info", "atacks"), r"bdx info atacks: expected one of attacks, .*layers \(did you mean attacks")


def test_info_layers_names_places_that_exist(bdx):
    said = bdx("info", "layers", "arch=preact_resnet18")
    assert said.code == 0
    found = {words[0]: words for words in map(str.split, said.out.splitlines())}
    assert found["layer4.1.conv1"][1:] == ["Conv2d", "penultimate"]
    assert {"shallow", "middle", "last", "whole"} <= {w.strip(",") for words in found.values() for w in words[2:]}


def test_info_layers_of_an_unknown_net(bdx):
    refused(bdx("info", "layers", "arch=resnet81"), r"arch=resnet81: no such arch \(did you mean resnet18")


def test_data_list_of_an_empty_folder(bdx, tmp_path):
    said = bdx("data", "list", f"paths.data={tmp_path / 'none'}")
    assert said.code == 0
    assert said.out == f"no image caches in {tmp_path / 'none'}; `bdx data prepare NAME` makes one\n"
    assert not (tmp_path / "none").exists()


def test_data_prepare_makes_a_cache_that_list_shows(bdx, tmp_path):
    where = f"paths.data={tmp_path / 'd'}"
    made = bdx("data", "prepare", "digits", "dataset.source.size=8", where)
    assert made.code == 0
    assert made.out.startswith(f"{tmp_path / 'd' / 'digits-8.safetensors'}: 1438 + 359 images of 3×8×8, 10 classes")
    assert bdx("data", "list", where).out == made.out


def test_a_damaged_cache_is_named(bdx, tmp_path):
    where = f"paths.data={tmp_path}"
    bdx("data", "prepare", "digits", "dataset.source.size=8", where)
    os.truncate(tmp_path / "digits-8.safetensors", 5000)
    refused(bdx("data", "list", where), r"digits-8\.safetensors is not a bdx image cache .*truncated")


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["data"], "expected `bdx data prepare NAME"),
        (["data", "remove"], "expected `bdx data prepare NAME"),
        (["data", "prepare"], "expected `bdx data prepare NAME"),
        (["data", "prepare", "digit"], r"no such dataset \(did you mean digits\?\)"),
        (["data", "prepare", "folder"], r"dataset=folder needs dataset\.source\.root=PATH"),
        (["data", "list", "hello"], "expected key=value"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_data_refuses(bdx, argv, answer):
    refused(bdx(*argv), answer)


# Hydra's own: configuration, completion


def test_cfg_job_prints_yaml_and_runs_nothing(bdx, tmp_path):
    said = bdx("attack=blended", "attack.alpha=0.3", "--cfg", "job")
    assert said.code == 0
    cfg = yaml.safe_load(said.out)
    assert cfg["attack"]["alpha"] == 0.3
    assert cfg["train"]["augment"] == "${dataset.augment}"
    assert set(cfg) == {*groups(), "eval", "seed", "paths"} - {"experiment", "detector"}
    assert not (tmp_path / "outputs").exists()


def test_cfg_job_resolves_on_demand(bdx):
    assert yaml.safe_load(bdx("--cfg", "job", "--resolve", "paths.out=/o").out)["paths"]["store"] == "/o/store"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("bdx attack=", {"attack=badnets", "attack=none"}),
        ("bdx train=", {"train=fast", "train=paper"}),
        ("bdx attack=b", {"attack=badnets", "attack=badnets_all2all", "attack=blended"}),
        ("bdx defense=f", {"defense=ft"}),
        ("bdx attack=badnets attack.pos", {"attack.position="}),
        ("bdx experiment=d", {"experiment=demo"}),
    ],
)
def test_tab_completion(bdx, monkeypatch, line, wanted):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    said = bdx("-sc", "query=bash")
    assert said.code == 0
    assert wanted <= set(said.out.split())
    assert not any(word.endswith("=base") for word in said.out.split()), "what all have in common is no choice"
    assert all(word.startswith(line.split()[-1]) for word in said.out.split())


def test_the_completion_script_asks_the_installed_command(bdx):
    said = bdx("-sc", "install=bash")
    assert said.code == 0
    assert said.out.rstrip().endswith("-F hydra_bash_completion bdx")


# from elsewhere


@pytest.mark.skipif(not SCRIPT.exists(), reason="bdx is not installed as a command here")
def test_the_console_script_works_from_any_folder(tmp_path):
    ran = subprocess.run([SCRIPT, "--cfg", "job", "attack=sig"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert yaml.safe_load(ran.stdout)["attack"]["_target_"] == "bdx.attacks.sig.SIG"


def test_the_module_works_from_any_folder_and_exits_with_its_code(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "bdx.cli", "attack=badnet"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    refused(Said(ran.returncode, ran.stdout, ran.stderr), "did you mean badnets")


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    command = f"{sys.executable} -m bdx.cli --cfg job | head -n 1"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.stdout == "dataset:\n"
    assert "Traceback" not in ran.stderr


# runs


def test_a_run_prints_a_table_and_the_places_of_its_files(bdx, shared):
    command = [*SMALL, "attack=badnets", *paths(shared), "seed=11"]
    said = bdx(*command)
    assert said.code == 0
    assert said.errors == []
    row = next(r for r in rows(shared) if r["seed"] == 11)
    assert f"{100 * row['acc']:.2f}" in said.out
    shown = dict(line.split(maxsplit=1) for line in said.out.splitlines() if line.startswith(("row ", "net ", "picture ")))
    for word, place in shown.items():
        assert Path(place.split("   (")[0]).exists(), word
    assert Path(shown["row"]).stem == row["id"]

    again = bdx(*command)
    assert again.code == 0
    assert "this run is done" in again.out
    assert "epoch" not in again.out
    assert next(r for r in rows(shared) if r["seed"] == 11) == row
    assert "eval.oracle" not in again.out
    assert (
        "eval.oracle=true: no curve of it was kept; logger=wandb: nothing is sent again"
        in bdx(*(w for w in command if not w.startswith("logger")), "eval.oracle=true", "logger=wandb").out
    )


def test_a_finished_run_is_shown_without_torch(bdx, shared):
    command = [*SMALL, *paths(shared)]
    table = bdx(*command).out
    code = f"""
import sys
from bdx.cli import main
try:
    main({command!r})
except SystemExit as e:
    assert not e.code, e.code
heavy = {{"torch", "torchvision", "pytorch_lightning", "pandas", "sklearn", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    env = ENV | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=shared, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "this run is done" in ran.stdout
    rows_of = [line for line in table.splitlines() if line.startswith(("│", "row ", "net "))]
    assert rows_of
    assert [line for line in ran.stdout.splitlines() if line.startswith(("│", "row ", "net "))] == rows_of


def test_everything_lies_below_the_folder_it_was_started_in(bdx, shared, tmp_path):
    assert bdx(*SMALL).code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"data", "outputs"}
    assert len(list((tmp_path / "outputs" / "results").glob("*.json"))) == 1


def test_the_environment_names_other_folders(bdx, monkeypatch, tmp_path):
    monkeypatch.setenv("BDX_DATA", str(tmp_path / "images"))
    monkeypatch.setenv("BDX_OUT", str(tmp_path / "made"))
    cfg = yaml.safe_load(bdx("--cfg", "job", "--resolve").out)
    assert cfg["paths"]["data"] == str(tmp_path / "images")
    assert cfg["paths"]["results"] == str(tmp_path / "made" / "results")


def test_the_places_named_exist_without_a_trigger_too(bdx, shared):
    said = bdx(*SMALL, *paths(shared))
    places = [line.split()[1] for line in said.out.splitlines() if line.startswith(("row ", "net ", "picture "))]
    assert [p for p in places if not Path(p).exists()] == []


def test_a_list_given_by_hand_does_not_break_the_row(bdx, shared):
    assert bdx(*SMALL, *paths(shared), "seed=12", "dataset.normalize.mean=[0.4,0.4,0.4]").code == 0
    assert [r["acc"] for r in rows(shared) if r["seed"] == 12]


# multirun


def test_multirun_makes_a_row_of_every_cell(bdx, shared, tmp_path):
    said = bdx("-m", *SMALL, f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}", "seed=0,1")
    assert said.code == 0, said.err
    found = rows(tmp_path)
    assert sorted(r["seed"] for r in found) == [0, 1]
    assert len({r["id"] for r in found}) == len({r["backdoor"] for r in found}) == 2
    assert sum(line.startswith("│ digits") for line in said.out.splitlines()) == 2


def test_a_cell_of_a_multirun_is_the_run_of_the_same_words(bdx, shared, tmp_path):
    """A row made by a sweep is found by the single command, and the other way round."""
    where = [f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}"]
    one = bdx(*SMALL, *where, "seed=3")
    many = bdx("-m", *SMALL, *where, "seed=3")
    assert (one.code, many.code) == (0, 0)
    assert "this run is done" in many.out
    assert len(rows(tmp_path)) == 1


def test_a_failing_cell_is_named_at_the_end_and_stops_no_other(bdx, shared, tmp_path):
    where = [f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}"]
    said = bdx("--multirun", *SMALL, *where, "attack.target=99,0")
    assert said.code == 1
    assert len(said.errors) == 1
    assert re.match(r"bdx: failed: .*attack\.target=99: attack\.target=99: expected 0 to 9", said.err)
    assert [r["attack.target"] for r in rows(tmp_path)] == [0]
    assert "│ digits" in said.out


@pytest.fixture
def pretended(monkeypatch):
    """`run` answers at once: 1 -> RuntimeError, 2 -> Ctrl-C, any other seed -> a row. Returns the seeds that were run."""
    seen = []
    scores = dict.fromkeys(("acc", "asr", "ra", "acc_before", "asr_before", "ra_before", "der"), 0.5)

    def run(cfg, screen=None):
        seen.append(cfg.seed)
        if cfg.seed == 1:
            raise RuntimeError("out of memory")
        if cfg.seed == 2:
            raise KeyboardInterrupt
        return {"id": f"{cfg.seed:016}", **cfg.names, "seed": cfg.seed, "seconds_attack": 1, "seconds_defense": 1, **scores}

    monkeypatch.setattr("bdx.run.run", run)
    return seen


def test_an_unforeseen_error_in_a_cell_stops_no_other(bdx, pretended, tmp_path):
    said = bdx("-m", *paths(tmp_path), "seed=0,1,3")
    assert pretended == [0, 1, 3]
    assert said.code == 1
    assert "seed=1" in said.errors[-1]
    assert "out of memory" in said.errors[-1]
    assert sum(line.startswith("│ cifar10") for line in said.out.splitlines()) == 2


def test_ctrl_c_ends_the_whole_multirun(bdx, pretended, tmp_path):
    said = bdx("-m", *paths(tmp_path), "seed=0,2,3")
    assert pretended == [0, 2]
    assert said.code == 130
    assert len(said.errors) == 1


MULTIRUN_MISTAKES = [
    ("attack.rato=1,2", r"attack\.rato: no such key \(did you mean attack\.ratio"),
    ("attack=badnets,blendet", r"attack=blendet: no such attack \(did you mean blended"),
    ("seed=0,abc", r"seed=abc: expected a whole number"),
    ("attack=blended,badnets attack.alpha=0.3", r"attack\.alpha: no such key"),
    ("seed=0,1 +experiment=demo", r"\+experiment=demo: every group is there already"),
    ("seed=0,1 dataset.augment={a:1}", r"dataset\.augment\.a: no such key"),
    ("seed=range(0,3) attack.ratio=0.1,nan", r"attack\.ratio=nan: expected a finite number"),
    ("seed=0,1 +train.optimizer.lr=1", r"Could not append to config"),
]


@pytest.mark.parametrize(("words", "answer"), MULTIRUN_MISTAKES)
def test_a_mistake_in_a_grid_is_refused_before_any_cell(bdx, pretended, words, answer, tmp_path):
    refused(bdx("-m", *paths(tmp_path), *words.split()), answer)
    assert pretended == []


@pytest.mark.parametrize("words", [
    "--cfg job", "-c job", "--dry-run", "--info", "--help", "--config-dir=x", "--resolve", "attack",
])  # fmt: skip
def test_a_table_by_multirun_takes_no_word_that_it_would_drop(bdx, pretended, words, tmp_path):
    said = bdx("-m", "+npd2023=table01", "scale=smoke", *paths(tmp_path), *words.split())
    refused(said, rf"{words.split()[0]}: expected key=value beside a table; `bdx sweep npd2023/table01 --dry-run` shows it")
    assert pretended == []


def test_a_table_by_multirun_is_one_group_in_wandb(bdx, monkeypatch, tmp_path):
    groups = []

    def run(cfg, screen=None):
        groups.append(cfg.logger.group)
        raise UserError("nothing is run here")

    monkeypatch.setattr("bdx.run.run", run)
    for more in ((), ("logger.group=mine",)):
        words = ("attack=badnets", "defense=npd", "logger=wandb", *more)
        bdx("-m", "+npd2023=table01", "scale=smoke", *paths(tmp_path), *words)
    assert groups == ["npd2023/table01", "mine"]


@pytest.mark.parametrize(("words", "answer"), [
    ("attack=badnetz", "no cell can run, for want of attack=badnetz"), ("atack=badnets", "atack: no such key"),
    ("+npd2023=table02", "npd2023: no such key"), ("attack=glob(b*)", "expected values that can be counted"),
])  # fmt: skip
def test_a_mistake_beside_a_table_is_refused_before_any_cell(bdx, pretended, words, answer, tmp_path):
    refused(bdx("-m", "+npd2023=table01", "scale=smoke", *paths(tmp_path), *words.split()), answer)
    assert pretended == []


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("attack.rato=1", r"attack\.rato: no such key \(did you mean attack\.ratio"),
        ("attack=badnets,blended", r"attack=badnets,blended: several values make a grid"),
        ("+experiment=demo", r"\+experiment=demo: every group is there already"),
        ("dataset.augment={a:1}", r"dataset\.augment\.a: no such key"),
        ("+attack@foo=badnets", r"takes no @"),
        ("+train.optimizer.lr=1", r"Could not append to config"),
        ("~attack", r"a run needs one"),
    ],
)
def test_cfg_job_refuses_like_a_run(bdx, word, answer):
    refused(bdx("--cfg", "job", word), answer)


def test_cfg_job_may_stand_between_the_words(bdx):
    said = bdx("attack=blended", "--cfg", "job", "seed=3")
    assert said.code == 0
    assert yaml.safe_load(said.out)["seed"] == 3


# interruption


def child(argv: list[str], folder: Path) -> None:
    """The command in a process of its own, its output in files."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    torch.set_num_threads(1)
    say = Screen.epoch

    def linger(screen, stage, epoch, *about):
        say(screen, stage, epoch, *about)
        if epoch == 2:
            (folder / "lingers").touch()
            time.sleep(300)  # in the middle of training until the signal comes

    Screen.epoch = linger
    main(argv)


def wait_for(text: str, file: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < end, f"{text!r} never came: {file.read_text() if file.exists() else ''}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_an_interrupted_run_says_so_leaves_no_row_and_goes_on_when_asked_again(bdx, shared, tmp_path, number):
    argv = [*SMALL, f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}", "train.epochs=3"]
    ran = FORK.Process(target=child, args=(argv, tmp_path))
    ran.start()
    wait_for("", tmp_path / "lingers")
    os.kill(ran.pid, number)
    ran.join(200)
    said = Said(ran.exitcode, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text())
    assert said.code == 130
    assert said.errors == ["bdx: interrupted; nothing half-written is left, the same command goes on"]
    assert "epoch 3/3" not in said.out
    assert rows(tmp_path) == []
    assert {p.suffix for p in (tmp_path / "out" / "store").iterdir()} == {".lock", ".ckpt"}
    (kept,) = (tmp_path / "out" / "store").glob(".*.ckpt")
    assert torch.load(kept, weights_only=True)["epoch"] == 0, "the last epoch that was finished"
    if number == signal.SIGINT:
        again = bdx(*argv)
        assert again.code == 0
        assert "going on from where an earlier run was stopped" in again.out
        assert "epoch 1/3" not in again.out
        assert len(rows(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.exists(), reason="bdx is not installed as a command here")
def test_ctrl_c_on_the_console_script(tmp_path, shared):
    argv = [*SMALL, f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}", "train.epochs=40"]
    with open(tmp_path / "stdout", "w") as out:
        ran = subprocess.Popen([SCRIPT, *argv], cwd=tmp_path, env=ENV, stdout=out, stderr=subprocess.PIPE, text=True)
    wait_for("backdoor: epoch 1/40", tmp_path / "stdout")
    ran.send_signal(signal.SIGINT)
    _, err = ran.communicate(timeout=300)
    assert ran.returncode == 130
    assert len(err.strip().splitlines()) == 1
    assert rows(tmp_path) == []
