"""One cell from end to end: reproducible bit for bit, resumable, and showing the paper's effect."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, ROW, TINY, build_attack, paths
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

import bdx.run
from bdx import hardware, recipe, results
from bdx.configure import compose
from bdx.errors import UserError
from bdx.screen import Screen
from bdx.split import Split
from bdx.store import Store, provenance
from bdx.training import Watch, make_trainer

SCORES = ("acc_before", "asr_before", "ra_before", "acc", "asr", "ra", "der")
CELL = [*TINY, "attack=badnets", "train.epochs=2", "defense=npd_whole", "defense.epochs=2", "defense.batch=32"]


def scores(row: dict) -> list:
    return [row[k] for k in SCORES]


def weights(root: Path, row: dict) -> dict:
    return load_file(root / "out" / "nets" / row["id"] / "net.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, row) of a cell whose backdoor was trained in that run."""
    root = tmp_path_factory.mktemp("trained")
    return root, bdx.run.run(compose([*CELL, *paths(root)]))


def test_the_row_says_what_it_is(trained):
    root, row = trained
    assert json.loads((root / "out" / "results" / f"{row['id']}.json").read_text()) == row
    assert (row["dataset"], row["arch"], row["attack"], row["defense"]) == ("digits", "preact_resnet18", "badnets", "npd_whole")
    assert row["n_test"] == 359
    assert row["n_poisoned"] == 144
    assert row["train.epochs"] == 2
    assert all(0 <= v <= 1 for v in scores(row))
    assert row["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert 0 <= row["acc_reserved"] <= 1
    assert row["scrambled_asr"] < 0.5  # digits and a white corner: noise is no trigger
    assert {"seconds_attack", "seconds_defense", "peak_memory", "commit", "device", "data_sha256", "backdoor"} <= set(row)


def test_a_loaded_backdoor_gives_the_same_row_as_a_trained_one_with_any_logger(trained, tmp_path):
    root, row = trained
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy" / "out" / "results" / f"{row['id']}.json").unlink()
    again = bdx.run.run(compose([*CELL, *paths(tmp_path / "copy"), "logger=csv"]))
    assert again["id"] == row["id"]
    assert scores(again) == scores(row)
    assert equal(weights(tmp_path / "copy", again), weights(root, row))
    curves = (tmp_path / "copy" / "out" / "nets" / f"{row['id']}.log" / "curves.csv").read_text()
    assert "NPD,2,loss" in curves
    assert "backdoor" not in curves


def test_trained_again_from_nothing_it_is_the_same_row(trained, tmp_path):
    root, row = trained
    again = bdx.run.run(compose([*CELL, *paths(tmp_path)]))
    assert scores(again) == scores(row)
    assert equal(weights(tmp_path, again), weights(root, row))


def test_another_seed_is_another_row(trained, tmp_path):
    _, row = trained
    other = bdx.run.run(compose([*CELL, *paths(tmp_path), "seed=1"]))
    assert other["id"] != row["id"]
    assert other["backdoor"] != row["backdoor"]
    assert scores(other) != scores(row)


class Always(torch.nn.Module):
    """Says class k of everything."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x):
        return torch.eye(10)[[self.k] * len(x)]


@pytest.mark.parametrize(
    ("needs", "k", "said"),
    [
        ({"clean"}, 1, ["the accuracy on the reserved images fell from 75.0% to 25.0%: the repair has hurt the net"]),
        ({"clean"}, 0, []), ({"clean", "train"}, 1, []),
    ],
)  # fmt: skip
def test_a_net_that_lost_the_reserved_images_is_reported(needs, k, said):
    clean, screen, heard = Split.clean(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 0])), Screen(), []
    screen.say = heard.append
    attack = SimpleNamespace(net=Always(0), trained_here=True, num_classes=10)
    found = bdx.run.reserved_acc(attack, Always(k), SimpleNamespace(needs=needs), clean, screen)
    assert found == {"acc_reserved_before": 0.75, "acc_reserved": 0.25 if k else 0.75}
    assert heard == said


def test_a_finished_run_is_not_run_again(trained, monkeypatch):
    root, row = trained
    monkeypatch.setattr(bdx.run, "build_attack", lambda *_: pytest.fail("built again"))
    assert bdx.run.run(compose([*CELL, *paths(root)])) == row


def test_without_an_attack_asr_is_unknown_and_not_zero(cell):
    row = cell("attack=none", "train.epochs=1", "defense=none")
    assert row["asr"] is row["ra"] is row["asr_before"] is row["der"] is None
    assert 0 <= row["acc"] <= 1


def test_every_defense_gets_the_same_backdoor(cell):
    rows = [
        cell("attack=badnets", "train.epochs=1", f"defense={d}", *more)
        for d, more in (("none", []), ("ft", ["defense.epochs=1"]))
    ]
    assert rows[0]["backdoor"] == rows[1]["backdoor"]
    assert [r["asr_before"] for r in rows] == [rows[0]["asr"]] * 2


def test_the_attacked_net_is_looked_at_once_for_all_its_repairs_and_another_one_again(cell, monkeypatch):
    nets = []
    monkeypatch.setattr("bdx.run.look", lambda net, *of, look=bdx.run.look: nets.append(net) or look(net, *of))
    asked = ["train.epochs=1", "defense=ft", "defense.epochs=1"]
    last = ["train.epochs=1", "defense=none", "seed=8"]
    rows = [*(cell(*asked, *more) for more in (["seed=8"], ["seed=8", "defense.batch=64"], ["seed=9"])), cell(*last)]
    assert len(nets) == 2 + 1 + 2 + 2
    assert scores(rows[0])[:3] == scores(rows[1])[:3] == scores(rows[3])[:3]
    assert rows[0]["backdoor_sha256"] == rows[1]["backdoor_sha256"] == rows[3]["backdoor_sha256"] != rows[2]["backdoor_sha256"]
    assert rows[0]["scrambled_asr_before"] == rows[3]["scrambled_asr_before"] == rows[3]["scrambled_asr"]


def test_a_backdoor_on_other_poisoned_images_is_refused(trained, tmp_path):
    """A store that was filled by other code must not pass for this one's."""
    root, row = trained
    shutil.copytree(root, tmp_path / "copy")
    cfg = compose([*CELL, *paths(tmp_path / "copy")])
    (tmp_path / "copy" / "out" / "results" / f"{row['id']}.json").unlink()
    found = Store(tmp_path / "copy" / "out" / "store").find(row["backdoor"])
    moved = found.tensors | {"split.poisoned": found.tensors["split.poisoned"].roll(1)}
    shutil.rmtree(found.path)
    Store(found.path.parent).get_or_make(found.meta["recipe"], lambda _: (moved, {"seconds": 1.0, "poisoned_images": 144}))
    assert recipe.digest(found.meta["recipe"]) == row["backdoor"]
    with pytest.raises(UserError, match="was trained on other poisoned images"):
        bdx.run.run(cfg)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"backdoor: the loss is not finite in epoch 1 of 2; try a smaller learning rate"):
        bdx.run.run(compose([*CELL, *paths(tmp_path), "train.schedule.max_lr=1e30"]))
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize(
    ("precision", "cpuinfo", "said"),
    [
        ("bf16-mixed", "model name\t: any\nflags\t\t: fpu avx2 avx512f\n", True),
        ("32-true", "flags\t\t: fpu avx2\n", False),
        ("bf16-mixed", "flags\t\t: avx512f avx512_bf16\n", False),
        ("bf16-mixed", "flags\t\t: amx_bf16\n", False),
        ("bf16-mixed", "Features\t: asimd bf16\n", False),  # ARM
        ("bf16-mixed", "nothing of the kind\n", False),
        ("bf16-mixed", None, False),
    ],
)
def test_whether_a_cpu_must_emulate_bf16(precision, cpuinfo, said, tmp_path):
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert bool(hardware.bf16_emulated(precision, tmp_path / "cpuinfo")) == said


def test_a_run_on_a_cpu_that_must_emulate_bf16_says_so_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "bf16_emulated", lambda precision: f"{precision} is slow here")
    with pytest.raises(UserError, match="not finite"):
        bdx.run.run(compose([*CELL, *paths(tmp_path), "train.schedule.max_lr=1e30"]), Screen())
    assert capsys.readouterr().out.startswith("32-true is slow here")


def test_evaluation_leaves_the_mode_of_the_net_alone(digits):
    from bdx.training import predict

    net = build_attack(digits, "attack=badnets").net
    net.train()
    net.body.layer1.eval()
    predict(net, digits.test.x[:10])
    assert net.training
    assert not net.body.layer1[0].bn1.training


# resume


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """Weights of the training that nobody interrupted."""
    return fitted(small, None, tmp_path_factory.mktemp("whole") / "a.ckpt")


def fitted(digits, epochs_alive: int | None, checkpoint: Path) -> dict:
    """Weights after 4 epochs; killed after `epochs_alive` if that is a number."""
    attack = build_attack(digits, "attack=badnets", "train.epochs=4", "dataset.augment.crop=2")
    data = digits.poisoned(attack.poison(digits.train))

    class Killed(Exception):
        pass

    def report(stage, epoch, *_):
        if epoch - 1 == epochs_alive:
            raise Killed

    def trainer(stage, epochs, checkpoint=None):
        how = {"device": torch.device("cpu"), "precision": "32-true", "seed": 0}
        made = make_trainer(stage, epochs, report=report, checkpoint=checkpoint, **how)
        made.callbacks[0].pause = 0  # every epoch is worth a checkpoint
        return made

    try:
        attack.fit(data, trainer, checkpoint)
    except Killed:
        assert checkpoint.exists()
    return attack.net.state_dict()


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(small, whole, tmp_path):
    fitted(small, 2, tmp_path / "b.ckpt")
    assert equal(fitted(small, None, tmp_path / "b.ckpt"), whole)


@pytest.mark.parametrize("epoch", [0, 2])
def test_an_interruption_keeps_the_last_finished_epoch_and_what_is_resumed_is_the_same(small, whole, tmp_path, epoch):
    """Ctrl-C (and SIGTERM, SIGUSR2, which become one) in the middle of an epoch, seconds after the training began."""
    attack = build_attack(small, "attack=badnets", "train.epochs=4", "dataset.augment.crop=2")
    data = small.poisoned(attack.poison(small.train))
    step, before = attack.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(batch, batch_idx):
        if (attack.trainer.current_epoch, batch_idx) == (epoch, 3):
            raise KeyboardInterrupt
        return step(batch, batch_idx)

    attack.training_step = interrupted
    how = {"device": torch.device("cpu"), "precision": "32-true", "seed": 0, "report": lambda *_: None}
    with pytest.raises(SystemExit):  # Lightning's answer
        attack.fit(data, partial(make_trainer, **how), tmp_path / "b.ckpt")
    signal.signal(signal.SIGINT, before)
    assert (tmp_path / "b.ckpt").exists() == (epoch > 0)
    if epoch:
        assert torch.load(tmp_path / "b.ckpt", weights_only=True)["epoch"] == epoch - 1
        assert equal(fitted(small, None, tmp_path / "b.ckpt"), whole)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_killed_in_training_is_finished_by_the_same_command(sent, tmp_path):
    command = [Path(sys.executable).parent / "bdx", *CELL, *paths(tmp_path), "train.epochs=6", "trainer=cpu"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert any("backdoor: epoch" in line for line in child.stdout)
        time.sleep(0.3)
        child.send_signal(sent)
        child.stdout.read()
    assert child.returncode == (-9 if sent == signal.SIGKILL else 130)
    out = tmp_path / "out"
    assert not list(out.glob("results/*.json"))
    assert not [p for p in out.glob("store/*") if not p.name.startswith(".")]
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    assert len(list(out.glob("results/*.json"))) == 1
    assert not [p for p in out.rglob("*") if p.name.endswith((".tmp", ".old"))]


# the effect


def of_make_demo() -> dict | None:
    """The row that `make demo` has left in this checkout, if it is of this very commit."""
    if not (ROOT / "outputs" / "results").exists():
        return None
    row = results.finished(compose(["experiment=demo", f"paths.data={ROOT / 'data'}", f"paths.out={ROOT / 'outputs'}"]))
    commit = provenance()["commit"]
    return row if row and row["commit"] == commit and commit != "unknown" and not commit.endswith("-dirty") else None


@pytest.mark.slow
def test_the_demo_shows_the_effect(tmp_path):
    """BadNets reaches its target, and NPD takes it away: the figures that the README promises."""
    row = of_make_demo() or bdx.run.run(compose(["experiment=demo", "logger=none", *paths(tmp_path)]))
    assert row["experiment"] == "demo"  # a row names its preset, or it would read as one of the published net
    assert row["asr_before"] >= 0.95
    assert row["asr"] <= 0.10
    assert row["acc"] >= row["acc_before"] - 0.05


def test_the_rate_of_an_epoch_is_the_one_that_it_ran_at(small):
    heard = []
    attack = build_attack(small, "train=paper", "train.epochs=3", "train.optimizer.lr=0.04")
    trainer = make_trainer(
        "backdoor", 3, device=torch.device("cpu"), precision="32-true", seed=0, report=lambda *said: heard.append(said[3]["lr"])
    )
    used = []
    attack.on_train_epoch_start = lambda: used.append(attack.trainer.optimizers[0].param_groups[0]["lr"])
    trainer.fit(attack, small.batches(small.clean, size=70, shuffle=True, augment=False))
    assert heard == used
    assert heard[0] == 0.04 > heard[1] > heard[2] > 0


def test_of_two_processes_at_one_run_one_waits_for_the_others_row(tmp_path):
    """By hand beside a sweep, say; both would write the net."""
    cfg = compose([*CELL, *paths(tmp_path)])
    first = bdx.run.run(cfg)
    (tmp_path / "out" / "results" / f"{first['id']}.json").rename(tmp_path / "row")
    lock = FileLock(tmp_path / "out" / "locks" / f"{first['id']}.lock")
    heard, found = [], []
    screen = Screen(quiet=True)
    screen.say = heard.append
    with lock:
        thread = threading.Thread(target=lambda: found.append(bdx.run.run(cfg, screen)))
        thread.start()
        while not heard:
            time.sleep(0.05)
        (tmp_path / "row").rename(tmp_path / "out" / "results" / f"{first['id']}.json")
    thread.join(60)
    assert heard == ["another process is at this run; waiting for its row"]
    assert found == [first]


def test_where_der_says_nothing_of_the_repair_a_line_does(capsys):
    rows = ({"asr_before": 0.0, "asr": 0.9}, {"asr_before": 0.95, "asr": 0.1}, {"asr_before": None, "asr": None})
    for row in rows:
        bdx.run.doubt(row, Screen())
    assert capsys.readouterr().out.splitlines() == [
        "the attack did not take, or hardly: its ASR before any repair is 0.0%; DER says little of it",
        "the ASR rose in the repair, from 0.0% to 90.0%, which DER does not count",
    ]


def test_on_a_narrow_terminal_no_number_is_cut_off():
    screen = Screen()
    screen.console = Console(width=80, force_terminal=True, file=io.StringIO(), color_system=None)
    screen.table([ROW | {"defense": "ft_sam", "dataset": "cifar10", "arch": "preact_resnet18", "der": 0.98765}])
    out = screen.console.file.getvalue()
    assert all(len(line) < 80 for line in out.splitlines())
    assert "ACC 50.00 → 50.00, ASR 50.00 → 50.00, RA 50.00 → 50.00; DER 98.77" in out


def test_a_net_takes_no_bytes_for_pixels(small):
    net = build_attack(small, "attack=badnets").net
    with pytest.raises(TypeError, match=r"pixels are floats in \[0,1\], and not torch\.uint8: x\.float\(\) / 255"):
        net(small.test.x[:2])


def test_a_cpu_is_not_asked_for_16_bits_that_it_lacks(small):
    with pytest.raises(UserError, match=r"train\.precision=16-mixed: a CPU has no such arithmetic; take bf16-mixed or 32-true"):
        make_trainer("backdoor", 1, device=torch.device("cpu"), precision="16-mixed", seed=0, report=None)


def test_the_mean_of_an_epochs_losses_is_not_taken_in_bf16():
    """390 losses of −0.1, summed in bf16, stop at −32."""
    heard = []
    watch = Watch("intra", seed=0, report=lambda *said: heard.append(said[3]["loss"]), checkpoint=None, since=None)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    trainer = SimpleNamespace(current_epoch=0, max_epochs=1, train_dataloader=SimpleNamespace(), optimizers=[optimizer])
    watch.on_train_epoch_start(trainer, None)
    for i in range(390):
        watch.on_train_batch_end(trainer, None, {"loss": torch.tensor(-0.1, dtype=torch.bfloat16)}, None, i)
    watch.on_train_epoch_end(trainer, None)
    assert heard == [pytest.approx(-0.1, rel=0.005)]
