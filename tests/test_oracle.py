"""ORACLE curves: what stands in them, and that nothing is chosen by them."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, build_attack, paths
from test_defenses import short

import bdx.run
from bdx import recipe
from bdx.configure import compose
from bdx.oracle import FILE, HEAD, Oracle
from bdx.run import build_defense
from bdx.screen import Screen

TIMES = ("seconds_defense", "peak_memory", "finished")


def ran(shared, out, *overrides) -> tuple[dict, list[dict], dict]:
    """(row, ORACLE rows, weights) of a run that keeps what it leaves in `out`."""
    where = [f"paths.nets={out / 'nets'}", f"paths.results={out / 'results'}"]
    row = bdx.run.run(compose([*TINY, *paths(shared), "train.epochs=1", *where, *overrides]), Screen(quiet=True))
    file = out / "nets" / f"{row['id']}.log" / FILE
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    return row, rows, bdx.load(out / "nets" / row["id"]).state_dict()


@pytest.mark.parametrize(
    ("name", "choice", "values"),
    [
        (["clp", "select=accuracy", "max_drop=0.3"], "threshold", [f"{10 - i / 2}" for i in range(21)]),
        (["ft", "epochs=3", "optimizer.lr=0.1"], "epoch", ["1", "2", "3"]),
    ],
    ids=["clp", "ft"],
)
def test_the_row_and_the_net_are_the_same_with_and_without(name, choice, values, shared, tmp_path):
    asked = [f"defense={name[0]}", *(f"defense.{o}" for o in name[1:])]
    plain, none, net = ran(shared, tmp_path / "plain", *asked)
    row, rows, same = ran(shared, tmp_path / "oracle", *asked, "eval.oracle=true")
    assert not none
    assert {k: v for k, v in row.items() if k not in TIMES} == {k: v for k, v in plain.items() if k not in TIMES}
    assert all(torch.equal(v, same[k]) for k, v in net.items())
    assert tuple(rows[0]) == HEAD
    assert [(r["choice"], r["value"]) for r in rows] == [(choice, v) for v in values]
    (chosen,) = [r for r in rows if r["chosen_without_test_data"] == "True"]
    assert [float(chosen[f"ORACLE_{k}"]) for k in ("acc", "asr", "ra")] == [row[k] for k in ("acc", "asr", "ra")]
    assert choice == "epoch" or float(chosen["value"]) == row["threshold"]
    assert len({r["ORACLE_acc"] for r in rows}) > 1  # it does look at other nets, too


def test_the_key_is_no_part_of_a_run():
    plain, asked = (compose([*TINY, "defense=clp", f"eval.oracle={v}"]) for v in ("false", "true"))
    assert (
        recipe.of_run(plain, "pixels")
        == recipe.of_run(asked, "pixels")
        == recipe.of_run(compose([*TINY, "defense=clp"]), "pixels")
    )
    assert "eval" not in recipe.of_run(asked, "pixels")
    assert plain.asked == asked.asked
    assert "eval.oracle" not in asked.asked


@pytest.fixture(scope="module")
def digits(small):
    return small


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


def made(attack, name, *overrides):
    return build_defense(compose([*TINY, f"defense={name}", *short(name), *overrides]), attack)


@pytest.mark.parametrize("name", ["clp", "ep", "bnp", "anp", "rnp"])
def test_at_the_chosen_threshold_it_is_the_net_that_was_returned(name, attack, digits, quick_trainer):
    defense, poisoned = made(attack, name), digits.poisoned(attack.poison(digits.train))
    net = defense.run(poisoned.allow(defense.needs), quick_trainer).state_dict()
    seen = {t: {k: v.clone() for k, v in n.state_dict().items()} for t, n in defense.replay.nets(defense.net)}
    assert defense.facts["threshold"] == defense.replay.chosen
    assert {t for t, s in seen.items() if all(torch.equal(net[k], v) for k, v in s.items())} >= {defense.replay.chosen}
    cut = [sum(int((v == 0).sum()) for v in s.values()) for s in seen.values()]
    assert len(seen) > 1
    assert cut == sorted(cut, reverse=defense.rule.select == "fixed" and name in ("clp", "ep", "bnp"))  # grids rise there
    assert cut[0] != cut[-1]


def test_fp_shows_the_nets_before_its_tuning(attack, digits, quick_trainer):
    defense = made(attack, "fp", "defense.step=0.25", "defense.select=fixed", "defense.threshold=0.5")
    defense.run(digits.allow(defense.needs), quick_trainer)
    before = attack.net.body.linear.weight
    silent = {}
    for share, net in defense.replay.nets(defense.net):
        cut = (net.body.linear.weight == 0).all(0)
        assert torch.equal(net.body.linear.weight[:, ~cut], before[:, ~cut])
        silent[share] = int(cut.sum())
    assert silent == {0.25: 16, 0.5: 32, 0.75: 48}


def test_which_loop_could_have_ended_after_any_epoch(attack, digits):
    for name, stage, tunes in (
        ("nad", "NAD", True), ("nad", "teacher", False), ("npd", "NPD", True), ("nc", "NC", True), ("nc", "triggers", False),
        ("ft_sam", "FTSAM", True), ("clp", "CLP", False),
    ):  # fmt: skip
        assert made(attack, name).tunes(stage) == tunes, (name, stage)
    anp = made(attack, "anp").ready()
    assert not anp.tunes("ANP")  # it tunes masks, on a copy
    mcr = made(attack, "mcr")
    mcr.draw(mcr.net)
    assert not mcr.tunes("MCR")  # it tunes the bends of a curve


def test_looking_draws_no_random_number_and_counts_its_time(digits, attack, monkeypatch):
    drawing = SimpleNamespace(has_trigger=True, to=lambda _: drawing, by_trigger=lambda _: {})
    drawing.triggered = lambda split: (torch.rand(3), attack.triggered(split))[1]
    before, oracle = torch.get_rng_state(), Oracle(drawing, digits.test[:20])
    net = attack.net.train()
    oracle.look("epoch", 1, net, False)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert oracle.seconds > 0


def test_where_nothing_is_chosen_there_is_no_file(shared, tmp_path):
    assert ran(shared, tmp_path, "defense=none", "eval.oracle=true")[1] == []
    assert not list(tmp_path.rglob("ORACLE*"))
