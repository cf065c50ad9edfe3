"""Papers' tables: the grids in experiments/, the printed numbers beside them, and what is measured here."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from statistics import mean

import pytest
from conftest import ROOT, ROW, names, target

from bdx import declared, grid, layout, recipe, report, tables
from bdx.agreement import t_test, tau, verdict
from bdx.build import instantiate
from bdx.claims import agreement, judged
from bdx.comparison import Entry, averages, collect, fixed, marks, printed, printed_cells, retrained, same
from bdx.composer import Composer, resolve
from bdx.configure import compose
from bdx.errors import UserError
from bdx.grid import Cell

TABLES = grid.tables()
COMPOSER = Composer()
IMAGES = "0" * 64


def cells(name: str, scale: str, *words: str) -> list[Cell]:
    table = grid.load(name)
    found = grid.cells(table, grid.scale(scale), words, COMPOSER)
    return printed_cells(table, found) if table.only_printed and table.rows else found


def row(cell: Cell, seed: int = 0, **scores) -> dict:
    """A result row as a run of `cell` would write it."""
    id = grid.run_ids(cell.words, COMPOSER, IMAGES, [seed])[0]
    names = COMPOSER.plain(cell.words)["names"]
    scores = {"acc_before": 0.9, "asr_before": 1.0, "acc": 0.8, "asr": 0.1, "der": 0.9} | scores
    one = {"seed": seed, "backdoor": f"{names['attack']}{seed}", "data_sha256": IMAGES}
    return ROW | {"id": id, **names, **one, **scores}


def write(folder, *rows: dict):
    folder.mkdir(parents=True, exist_ok=True)
    for one in rows:
        (folder / f"{one['id']}.json").write_text(json.dumps(one))
    return folder


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_it_claims_and_reads_every_printed_number(name):
    text = (grid.EXPERIMENTS / f"{name}.yaml").read_text()
    for word in ("# Paper:", "# Cost", "# Tolerance:", f"# Command: bdx sweep {name}"):
        assert word in text
    assert len(text.splitlines()) <= 30
    table, found = grid.load(name), cells(name, "paper")
    assert table.title
    numbers = [n for n in printed(table) if n[0]["attack"] != "avg"]
    lost = [n for n in numbers if n[0]["defense"] != "none" and not any(same(n[0], fixed(table) | c.at) for c in found)]
    assert not lost
    assert [c for c in found if not any(c.at.get(k) for k in ("attack", "defense"))] == []
    for side in ("of", "above", "below"):  # the claim names cells that there are
        where = table.claim.get(side)
        assert not isinstance(where, dict) or any(all(c.at[k] == str(v) for k, v in where.items()) for c in found)


def test_the_printed_numbers_of_a_cell_are_its_own():
    """Read by hand from the papers' tables."""
    assert paper("npd2023/table01", attack="trojan", defense="npd") == {"acc": 92.37, "asr": 6.51, "der": 96.19}
    assert paper("npd2023/table03", **{"attack": "lf", "defense.lambda_ce": "0.0", "defense.lambda_asr": "0.4"})["asr"] == 0.80
    assert paper("npd2023/table06", **{"attack": "lf", "dataset.reserved.count": "50", "defense": "npd"})["acc"] == 88.18
    assert paper("d32024/table05", **{"attack": "wanet", "train.sam_rho": "2.0", "defense": "ft"})["asr"] == 18.47
    assert paper("tnr2022/table08", **{"defense.lambda_rec": "10.0", "defense.lambda_tv": "1.0"}) == {
        "asr": 0.28,
        "acc": 83.51,
        "reconstruction_mse": 0.0091,
    }
    assert paper("tnr2022/table04", **{"attack": "sig_wrapped", "defense.stages": "trap"}) == {"asr": 97.24, "acc": 81.10}
    assert paper("tnr2022/table12", attack="smooth_gtsrb", defense="tnr") == {"asr": 0.11, "acc": 96.12}
    assert paper("npd2023/table15", **{"arch": "densenet161", "attack": "ssba", "defense": "none"})["asr"] == 84.13


def test_a_backdoor_that_was_trained_twice_is_named_with_both_scores():
    row = {"attack": "badnets", "backdoor": "a", "acc_before": 0.9, "asr_before": 1.0}
    other_seed, clean = row | {"backdoor": "b", "acc_before": 0.8}, {"attack": "none", "acc_before": 0.95, "asr_before": None}
    assert retrained([row, dict(row), other_seed, clean, clean | {"backdoor": "c"}]) is None
    assert retrained([row | {"acc_before": 0.91}, other_seed, row]).endswith(": badnets 90.00 / 100.00, 91.00 / 100.00")


def paper(name: str, **at: str) -> dict:
    (found,) = (e for e in entries(name) if at.items() <= e.cell.at.items())
    return found.paper


def entries(name: str, *words: str, scale: str = "paper", folders=()) -> list[Entry]:
    return collect(grid.load(name), grid.scale(scale), list(words), COMPOSER, folders)


@pytest.mark.parametrize(("name", "defense"), [("npd2023/table01", "npd"), ("npd2023/table01", "nc"), ("d32024/table01", "d3")])
def test_the_average_follows_the_rule_of_the_paper(name, defense):
    """The printed averages are the oracle: NPD prints the DER of averages, D3 the average of DERs; the two differ for nc."""
    table = grid.load(name)
    wanted = {m: v for p, m, v in printed(table) if p["attack"] == "avg" and p["defense"] == defense}
    (found,) = (a for a in averages(table, entries(name)) if a.cell.at["defense"] == defense)
    assert found.paper == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(("name", "bare", "value"), [
    ("npd2023/table05", "attack.ratio", "0.05"), ("d32024/table05", "train.sam_rho", "1.0"),
])  # fmt: skip
def test_the_average_in_print_is_against_the_nets_that_were_repaired(name, bare, value):
    """Other ratios, and attackers of another kind, have undefended nets of their own."""
    table, found = grid.load(name), entries(name)
    rows = [e for e in found if e.cell.at[bare] == value]
    none = {e.cell.at["attack"]: e.paper for e in rows if e.cell.at["defense"] == "none"}
    for a in averages(table, found):
        if a.cell.at[bare] != value or a.cell.at["defense"] == "none":
            continue
        of = [e for e in rows if e.cell.at["defense"] == a.cell.at["defense"]]
        fall = lambda m, of=of: [max(0.0, none[e.cell.at["attack"]][m] - e.paper[m]) for e in of]
        by_row = mean((s - c + 100) / 2 for s, c in zip(fall("asr"), fall("acc"), strict=True))
        acc, asr = (mean(none[e.cell.at["attack"]][m] for e in of) - mean(e.paper[m] for e in of) for m in ("acc", "asr"))
        of_averages = (max(0.0, asr) - max(0.0, acc) + 100) / 2
        assert a.paper["der"] == pytest.approx(by_row if table.average == "of_rows" else of_averages, abs=0.01)


def test_seeds_that_the_user_names_are_one_entry(tmp_path):
    words = ("attack=badnets", "defense=npd,ft", "seed=0,1")
    some = {(c.at["defense"], int(c.at["seed"])): c for c in cells("npd2023/table01", "cpu", *words)}
    rows = [row(c, s, acc=0.8 + s / 10) for (_, s), c in some.items()]
    found = entries("npd2023/table01", *words, scale="cpu", folders=[write(tmp_path, *rows)])
    assert [(e.cell.at, sorted(e.values("acc"))) for e in found] == [
        ({"attack": "badnets", "defense": d}, [0.8, 0.9]) for d in ("npd", "ft")
    ]
    assert "seed=0,1" in found[0].cell.words
    assert report.command(found[0]).startswith("bdx -m ")


def test_the_users_word_wins_over_a_scales():
    (cell,) = cells("npd2023/table15", "cpu", "arch=vgg19", "attack=badnets", "defense.layer=last")
    assert (cell.at["arch"], "arch=vgg19" in cell.words) == ("vgg19", True)
    assert cells("npd2023/table15", "cpu")[0].at["arch"] == "(cpu)"


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
@pytest.mark.parametrize("name", ["npd2023/table01", "npd2023/table05", "tnr2022/table08", "cnpd2025/table02"])
def test_an_id_is_the_one_that_the_run_itself_has(name, scale):
    """The sweep puts configurations together faster than Hydra; the recipe must be the same to the last key."""
    agree([c for c in cells(name, scale) if not c.lacks][-1])


def test_an_id_is_the_one_that_a_run_with_several_triggers_has():
    """Each of them is a configuration of its own."""
    parts = "attack.parts=[{attack:badnets,target:0},{attack:sig,target:2,ratio:0.01}]"
    for words in ((), (parts, "attack.ratio=0.05")):
        (cell,) = cells("npd2023/table01", "smoke", "attack=multi", "defense=npd", *words)
        agree(cell)


def agree(cell) -> None:
    cfg = compose(list(cell.words))
    wanted = recipe.digest(recipe.of_run(cfg, IMAGES)), recipe.digest(recipe.of_backdoor(cfg, IMAGES))
    assert grid.ids(cell.words, COMPOSER, IMAGES) == wanted
    cfg = compose([*cell.words, "seed=7"])
    assert grid.run_ids(cell.words, COMPOSER, IMAGES, [7]) == [recipe.digest(recipe.of_run(cfg, IMAGES))]
    assert COMPOSER.config(cell.words).asked == compose(list(cell.words)).asked


@pytest.mark.parametrize("shell", [("experiment=cpu_scale",), ("experiment=repair",)])
def test_a_method_s_node_from_its_own_file_is_the_one_of_the_whole_configuration(shell):
    """A preset may have keys for it: those count as well."""
    slow = Composer()
    for group in ("attack", "defense", "detector"):
        for name in names(group)[:: 4 if "cpu_scale" in shell[0] else 16]:
            found, choices = slow.node((*shell, f"{group}={name}"))
            assert COMPOSER.apart(group, f"{group}={name}", shell) == (found[group], choices[group])


def test_a_scale_shortens_an_attack_and_a_defense_and_replaces_the_net():
    (cell,) = (c for c in cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd"))
    assert set(cell.words) >= {"experiment=cpu_scale", "defense.epochs=17", "defense.warmup_epochs=2"}
    assert not any(w.startswith(("dataset=", "arch=")) for w in cell.words)
    (cell,) = cells("npd2023/table01", "smoke", "attack=badnets", "defense=npd", "defense.epochs=9")
    assert "defense.epochs=9" in cell.words  # what the user says is not divided
    (cell,) = cells("tnr2022/table01", "cpu", "attack=blend", "defense=tnr")
    assert set(cell.words) >= {"defense.trap.epochs=16", "defense.replace.epochs=33"}
    for words, left in (((), "4"), (("attack.mask.epochs=2",), "2")):  # what comes with an attack gives way to the user's
        (cell,) = cells("npd2023/table01", "cpu", "attack=input_aware", "defense=none", *words)
        assert set(cell.words) >= {f"attack.mask.epochs={left}", "attack.mask.schedule.milestones=[2,3]"}
    (cell,) = cells("npd2023/table01", "smoke", "attack=trojan", "defense=none")
    assert "attack.steps=1" in cell.words
    found = {c.at["dataset.reserved.count"]: c.words for c in cells("tnr2022/table09", "smoke", "defense=tnr")}
    assert set(found["2500"]) == set(found["1250"]) >= {"dataset.reserved.count=1000"}  # digits has no 2,500 images
    (cell,) = cells("tnr2022/table09", "smoke", "defense=tnr", "dataset.reserved.count=many")
    assert "dataset.reserved.count=many" in cell.words  # a mistake is left to the command, which names it
    (cell,) = cells("npd2023/table12", "paper", "attack=badnets", "defense=npd")
    assert set(cell.words) >= {"arch=vgg19_bn", "dataset=cifar10"}


@pytest.mark.parametrize("name", grid.experiments())
def test_a_printed_table_lacks_nothing_but_poisoned_sets_and_generated_images(name):
    lacks = {c.lacks for c in cells(name, "paper") if c.lacks}
    assert all(text.startswith(("a poisoned training set of ", "dataset.reserved.generated=")) for text in lacks), lacks


@pytest.mark.parametrize("name", ["npd2023/table02", "npd2023/table09", "cnpd2025/table03"])
def test_npds_radius_on_tiny_imagenet_is_the_papers(name):
    """6, which is 3 in the units of 32×32 that bdx counts in."""
    found = [c for c in cells(name, "paper") if {"dataset=tiny_imagenet", "defense=npd"} <= set(c.words)]
    assert found
    for cell in found:
        assert instantiate(compose(list(cell.words)).defense.budget).radius_at((3, 64, 64)) == 6


def test_words_come_with_several_words_at_once():
    """BackdoorBench's u of EP on Tiny ImageNet is another than on CIFAR-10, which the other scales take in its place."""
    wide = "defense.u=4.0"
    for scale, defense, comes in (("paper", "ep", True), ("paper", "ibau", False), ("cpu", "ep", False)):
        (cell,) = cells("npd2023/table02", scale, "attack=badnets", f"defense={defense}")
        assert (wide in cell.words) == comes
    (cell,) = cells("npd2023/table02", "paper", "attack=badnets", "defense=ep", "defense.u=3.0")
    assert wide not in cell.words
    assert {"dataset=tiny_imagenet", "train=paper_tiny"} <= set(cell.words)


def test_what_else_a_paper_prints_has_its_place(capsys):
    """T&R Table 8's error of reconstruction, in units of its own, and Table 4's deviations."""
    assert tables.table(["tnr2022/table08", "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    found = {(x["defense.lambda_rec"], x["defense.lambda_tv"]): x["reconstruction_mse paper"] for x in lines}
    assert (found["1.0", "0.1"], found["10.0", "1.0"], found["0.0", "0.1"]) == ("0.0145", "0.0091", "–")
    assert tables.table(["tnr2022/table04", "attack=trojan_wm", "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    (both,) = (x for x in lines if x["defense.stages"] == "both")
    assert both["ASR paper"].endswith(" ± 1.16")
    assert both["ACC paper"].endswith(" ± 0.33")
    assert set(lines[0]) & {"asr_std", "acc_std"} == set()
    entry = Entry(Cell({"attack": "a", "defense": "d"}, ()), [{"reconstruction_mse": 0.01234}], {"reconstruction_mse": 0.01})
    assert [f.text for f in tables.fields(entry, ["reconstruction_mse"], {})] == ["0.0123", "0.0100", "+0.0023"]


def test_what_bdx_does_not_have_is_named():
    by = {c.at["attack"]: c.lacks for c in cells("npd2023/table01", "smoke", "attack=badnets,nobody", "defense=npd")}
    assert by == {"badnets": None, "nobody": "attack=nobody"}
    (cell,) = cells("npd2023/table01", "smoke", "attack=badnets", "defense=none", "defense.epochs=3")
    assert "no such key" in cell.lacks


def test_a_cell_that_needs_a_poisoned_set_which_its_attack_does_not_leave_is_missing():
    """As the command of that one cell refuses it; told from source text, without torch."""
    from hydra.utils import get_class

    by = {
        (c.at["attack"], c.at["defense"]): c.lacks
        for c in cells("npd2023/table01", "cpu", "attack=badnets,wanet", "defense=ep,npd")
    }
    assert by.pop(("wanet", "ep")) == "a poisoned training set of attack=wanet"
    assert len(by) == 3
    assert not any(by.values())
    attacks = {target("attack", name) for name in names("attack")}
    defenses = {target("defense", name) for name in names("defense")}
    for a, d in itertools.product(attacks, defenses):
        of, method = get_class(a), get_class(d)
        assert declared.without_poison(a, d) == ("train" in method.needs and of.has_trigger and not of.leaves_poison), (a, d)


def test_a_detection_has_the_id_that_the_command_itself_gives_it():
    words = ("experiment=cpu_scale", "detector=strip", "attack=blended", "seed=1", "detector.limit=500")
    plain = resolve({k: v for k, v in COMPOSER.plain(words).items() if k not in ("paths", "logger", "trainer")})
    assert recipe.of_detection(plain, IMAGES) == recipe.of_detection(compose(list(words)), IMAGES)


def test_rows_are_found_by_their_id_alone(tmp_path):
    """A row of another scale has the same names, and must not be taken for a measurement at this one."""
    (cpu,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    (smoke,) = cells("npd2023/table01", "smoke", "attack=badnets", "defense=npd")
    folder = write(tmp_path, row(cpu, 0, acc=0.7), row(cpu, 1, acc=0.9), row(smoke, acc=0.1))
    (found,) = entries("npd2023/table01", "attack=badnets", "defense=npd", scale="cpu", folders=[folder])
    assert sorted(found.values("acc")) == [0.7, 0.9]
    (found,) = entries("npd2023/table01", "attack=badnets", "defense=npd", "seed=1", scale="cpu", folders=[folder])
    assert found.values("acc") == [0.9]


def test_an_undefended_net_is_known_from_any_defense(tmp_path):
    (cell,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    folder = write(tmp_path, row(cell, acc_before=0.91, asr_before=0.97))
    none, npd = entries("npd2023/table01", "attack=badnets", "defense=none,npd", scale="cpu", folders=[folder])
    assert (none.values("acc"), none.values("asr"), none.values("der")) == ([0.91], [0.97], [])
    assert npd.values("acc") == [0.8]
    (bare,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=none")
    newer = row(bare, acc=0.92, acc_before=0.92, finished="2099-01-01T00:00:00+00:00")  # of one seed the newest row counts
    folder = write(tmp_path, newer, row(cell, 1, acc_before=0.93))
    none, _ = entries("npd2023/table01", "attack=badnets", "defense=none,npd", scale="cpu", folders=[folder])
    assert none.values("acc") == [0.92, 0.93]


def test_averages_are_over_what_is_measured_on_both_sides(tmp_path):
    words = ("attack=badnets,blended,badnets_all2all", "defense=none,npd")
    npd = {c.at["attack"]: c for c in cells("npd2023/table01", "cpu", *words) if c.at["defense"] == "npd"}
    rows = row(npd["badnets"], acc=0.8, asr=0.3, der=0.8), row(npd["blended"], acc=1.0, asr=0.1, der=0.95)
    found = entries("npd2023/table01", *words, scale="cpu", folders=[write(tmp_path, *rows)])
    table, _ = grid.asked(grid.load("npd2023/table01"), words)
    _, average = averages(table, found)
    assert average.cell.at["attack"] == "average of 2 of 3"
    assert average.ours == [pytest.approx({"acc": 0.9, "asr": 0.2, "der": (0.8 - 0 + 1) / 2})]  # before: 0.9 and 1.0
    assert average.paper["acc"] == pytest.approx((88.93 + 91.18) / 2)
    assert average.paper["asr"] == pytest.approx((1.26 + 0.41) / 2)
    again = [
        row(npd[a], s, acc=0.7 + s / 10, finished="2026-11-01T00:00:00+00:00") for a in ("badnets", "blended") for s in (1, 2)
    ]
    found = entries("npd2023/table01", *words, scale="cpu", folders=[write(tmp_path, *rows, *again)])
    _, average = averages(table, found)
    assert average.n == "3"  # one value for each seed that both attacks have
    assert average.values("acc") == [pytest.approx(v) for v in (0.9, 0.8, 0.9)]


def test_tau_and_verdict_against_scipy():
    import random

    from scipy.stats import kendalltau, ttest_1samp

    draw = random.Random(0)
    for _ in range(20):
        pairs = [(draw.randrange(5), draw.randrange(5)) for _ in range(8)]
        assert tau(pairs) == pytest.approx(kendalltau(*zip(*pairs, strict=True)).statistic)
        gaps = [draw.gauss(0.4, 1) for _ in range(6)]
        assert t_test(gaps)[1] == pytest.approx(ttest_1samp(gaps, 0, alternative="greater").pvalue)
    assert tau([(1, 1), (1, 2)]) is None


@pytest.mark.parametrize(("gaps", "word"), [
    ([0.2, 0.3, 0.25], "holds"), ([-0.2, -0.3, -0.25], "does not hold"), ([0.2, -0.3, 0.25], "not enough data"),
    ([0.2, 0.3], "not enough data"), ([0.1, 0.1, 0.1], "holds"), ([0.0] * 312, "does not hold"),
])  # fmt: skip
def test_a_claim_is_judged_by_paired_differences(gaps, word):
    assert t_test(gaps)[0] == word
    cells = [{0: gap, 1: gap} for gap in gaps]
    assert verdict(cells, len(cells), every=False)[0] == (word if len(gaps) > 2 else "not enough data")
    assert verdict(cells, len(cells) + 1, every=False) == ("not enough data", None)  # a cell of the claim is not measured


@pytest.mark.parametrize(("cells", "wanted", "word"), [
    ([0.05] * 17 + [-0.05], 18, "does not hold"),  # not at every ratio, whatever the mean
    ([0.05] * 18, 18, "holds"), ([0.05] * 17, 18, "not enough data"), ([-0.05], 18, "does not hold"),
    ([], 0, "not enough data"),
])  # fmt: skip
def test_a_claim_about_every_cell_is_refuted_by_one_and_proved_by_all(cells, wanted, word):
    assert verdict([{0: gap} for gap in cells], wanted, every=True) == (word, None)


def test_seeds_of_few_cells_are_the_sample_and_seeds_of_many_are_not():
    """Three seeds of one attack are no three attacks; where a claim is about one or two cells, seeds are all there is."""
    seeds = {0: 0.2, 1: 0.3, 2: 0.25}
    assert verdict([seeds], 1, every=False)[0] == "holds"
    assert verdict([seeds, {0: -0.2, 1: -0.31, 2: -0.25}], 2, every=False)[0] == "not enough data"  # on average nothing
    assert verdict([seeds, {5: 0.2}], 2, every=False) == ("not enough data", None)  # no seed is common to both
    assert verdict([seeds, {0: -0.2}, {0: 0.1}], 3, every=False)[0] == "not enough data"


def test_a_claim_pairs_the_same_attack_and_seed(tmp_path):
    """D3 below 5 % at every one of three ratios; and of two defenses, only what both have measured counts."""
    words = ("attack=badnets", "defense=d3", "attack.ratio=0.1,0.2,0.3")
    rows = [row(c, asr=a) for c, a in zip(cells("d32024/table02", "cpu", *words), (0.01, 0.02, 0.015), strict=True)]
    table, _ = grid.asked(grid.load("d32024/table02"), words)
    found = entries("d32024/table02", *words, scale="cpu", folders=[write(tmp_path, *rows)])
    assert ": holds (3 of 3 cells, mean +3.50 points, least +3.00)" in judged(table, found)
    assert ": not enough data (3 of 18 cells" in judged(grid.load("d32024/table02"), entries_of_all(tmp_path))
    words = ("attack=badnets,blended", "defense=npd,cnpd_r")
    one, two, three, _ = cells("cnpd2025/table01", "cpu", *words)
    rows = row(one, asr=0.2), row(two, asr=0.1), row(three, asr=0.1), row(two, 1, asr=0.5)
    found = entries("cnpd2025/table01", *words, scale="cpu", folders=[write(tmp_path / "b", *rows)])
    assert "not enough data (1 of 2 cells, mean +10.00 points, least +10.00)" in judged(grid.load("cnpd2025/table01"), found)


def entries_of_all(folder) -> list[Entry]:
    return entries("d32024/table02", scale="cpu", folders=[folder])


def test_the_ranking_is_the_paper_s_at_each_point_beside_the_defense():
    """Not over points together, where a third axis would make up for the opposite ranking at each of them."""

    def entry(count, defense, ours, paper):
        return Entry(Cell({"attack": "a", "reserved": count, "defense": defense}, ()), [{"der": ours}], {"der": paper})

    found = [
        entry(n, d, base + up, base + 3 - up)
        for n, base in (("50", 10), ("500", 50))
        for d, up in zip("xyz", range(3), strict=True)
    ]
    assert agreement(found) == {"a, reserved=50": -1, "a, reserved=500": -1}


def test_printed_numbers_of_another_data_set_are_shown_and_not_compared(tmp_path):
    (cell,) = cells("npd2023/table02", "cpu", "attack=badnets", "defense=npd")
    found = entries("npd2023/table02", "attack=badnets", "defense=npd", scale="cpu", folders=[write(tmp_path, row(cell))])
    of = next(e for e in found if e.cell.at["defense"] == "npd")
    assert "acc" in of.paper
    assert of.values("acc") == [0.8]
    assert not of.comparable
    table, _ = grid.asked(grid.load("npd2023/table02"), ("attack=badnets", "defense=npd"))
    lines = [[t.text for t in line] for line in tables.laid_out(table, found)[1]]
    assert next(line for line in lines if line[1] == "npd")[2:5] == ["80.00", f"{of.paper['acc']:.2f}", "–"]
    assert any("another data set" in note for note in tables.notes(table, found))


def test_other_settings_than_the_tables_are_not_compared(tmp_path):
    for words, same_as in (("attack.ratio=0.05", False), ("dataset=cifar10", True), ("paths.out=x", True)):
        asked = ("attack=badnets", "defense=npd", words)
        (cell,) = cells("npd2023/table01", "cpu", *asked)
        found = entries("npd2023/table01", *asked, scale="cpu", folders=[write(tmp_path, row(cell))])
        assert [e.comparable for e in found if e.cell.at["defense"] == "npd"] == [same_as]


def test_several_values_of_a_setting_are_other_settings_too(tmp_path):
    asked = ("attack=badnets", "defense=npd", "attack.ratio=0.05,0.1")
    folder = write(tmp_path, *(row(c) for c in cells("npd2023/table01", "cpu", *asked)))
    found = entries("npd2023/table01", *asked, scale="cpu", folders=[folder])
    assert len(found) == 2
    assert not any(e.comparable for e in found if e.ours)


def test_a_csv_names_the_runs_behind_each_number(tmp_path):
    (cell,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    folder = write(tmp_path, *(row(cell, seed) for seed in (0, 1)))
    table, _ = grid.asked(grid.load("npd2023/table01"), ("attack=badnets", "defense=npd"))
    found = entries("npd2023/table01", "attack=badnets", "defense=npd", scale="cpu", folders=[folder])
    head, lines = tables.laid_out(table, found, runs=True)
    assert head[-2:] == ["n", "runs"]
    (ids,) = [line[-1].text.split() for line in lines if line[1].text == "npd"]
    assert sorted(ids) == sorted(p.stem for p in folder.glob("*.json"))


def test_printed_numbers_of_another_net_are_shown_and_not_compared(tmp_path):
    """scale=cpu takes its thin net in place of any."""
    for scale, same_as in (("cpu", False), ("paper", True)):
        (cell,) = cells("npd2023/table12", scale, "attack=badnets", "defense=npd")
        folder = write(tmp_path / scale, row(cell))
        found = entries("npd2023/table12", "attack=badnets", "defense=npd", scale=scale, folders=[folder])
        assert [(e.comparable, "acc" in e.paper) for e in found if e.cell.at["defense"] == "npd"] == [(same_as, True)]


def test_an_average_that_is_printed_alone_is_shown():
    """Of NPD's Table 11 most rows are lost, and its text gives the average."""
    found = averages(grid.load("npd2023/table11"), entries("npd2023/table11", scale="paper", folders=[]))
    assert {e.cell.at["defense"]: e.paper["der"] for e in found if set(e.paper) == {"der"}} == {"npd": 96.76, "ibau": 90.5}


def test_where_the_paper_averages_ders_ours_are_averaged_too():
    """Attacks of two and of one seed: of two seeds' ACC and ASR one DER would be another."""
    two = [{"seed": 0, "acc": 0.9, "asr": 0.0, "der": 0.7}, {"seed": 1, "acc": 0.7, "asr": 0.4, "der": 1.0}]
    one = [{"seed": 7, "acc": 0.8, "asr": 0.1, "der": 0.9}]
    at = lambda attack: Cell({"attack": attack, "defense": "d3"}, ())
    before = {"acc_before": 0.8, "asr_before": 1.0}
    found = [Entry(at(attack), [r | before for r in ours], {}) for attack, ours in (("x", two), ("y", one))]
    (of,) = averages(grid.load("d32024/table01"), found)
    assert mean(of.values("der")) == pytest.approx((0.85 + 0.9) / 2)


def test_the_fastest_is_the_best():
    def entry(defense, seconds):
        return Entry(Cell({"attack": "a", "defense": defense}, ()), [{"seconds_defense": seconds}])

    group = [entry("nc", 1055.0), entry("npd", 380.0), entry("ep", 0.2)]
    assert [marks(group, "seconds_defense").get(id(e)) for e in group] == [None, "second", "best"]


def test_a_table_may_give_an_attack_words_of_its_own():
    """Trap-and-Replace's label-consistent attack has the same corner four times; no other attack has that key."""
    of = {c.at["attack"]: c.words for c in cells("tnr2022/table01", "cpu", "defense=tnr")}
    assert [a for a, words in of.items() if "attack.corners=unmirrored" in words] == ["lc"]
    assert all({"attack.select=first", "attack.include_target=false"} <= set(words) for words in of.values())


def test_best_and_second_are_marked_among_defenses():
    def entry(defense, asr):
        return Entry(Cell({"attack": "a", "defense": defense}, ()), [{"asr": asr}])

    group = [entry("none", 0.0), entry("x", 0.3), entry("y", 0.1), entry("z", 0.2), entry("w", 0.1)]
    marked = marks(group, "asr")
    assert [marked.get(id(e)) for e in group] == [None, None, "best", "second", "best"]


def test_four_formats():
    text = layout.Text
    rows = [[text("npd|x"), text("1.00", "best")], [text("a<b & 5 %"), text("2.00", "second")]]
    md = layout.markdown("t", ["defense", "ACC"], rows, ["n"])
    assert "| npd\\|x" in md
    assert "**1.00**" in md
    assert "_2.00_" in md
    assert list(csv.reader(io.StringIO(layout.comma("t", ["defense", "ACC"], rows, [])))) == [
        ["defense", "ACC"], ["npd|x", "1.00"], ["a<b & 5 %", "2.00"],
    ]  # fmt: skip
    assert "a<b \\& 5 \\% & \\underline{2.00} \\\\" in layout.latex("t", ["defense", "ACC"], rows, [])
    assert r"\textasciitilde{}/x \{a\} \textbackslash{}n \textasciicircum{}" in layout.latex(
        "t", ["d"], [[text("~/x {a} \\n ^")]], []
    )
    assert "<td>a&lt;b &amp; 5 %</td><td><u>2.00</u></td>" in layout.page("t", ["defense", "ACC"], rows, [])


def test_rows_in_the_package_are_shown_and_foreign_files_are_named(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "half.json").write_text('{"id": "ha')
    (tmp_path / "results" / "abc.json").write_text('{"id": "abc"}')
    assert tables.table(["npd2023/table01", "scale=cpu", "seed=1", f"paths.out={tmp_path}", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    (npd,) = (r for r in csv.DictReader(io.StringIO(out)) if (r["attack"], r["defense"]) == ("badnets", "npd"))
    measured = json.loads((ROOT / "experiments" / "results" / f"{npd_row()}.json").read_text())
    assert float(npd["ASR"]) == pytest.approx(100 * measured["asr"], abs=0.005)
    assert re.search(r"abc.json is no result row.*\n.*half.json is no result row", err)


def npd_row() -> str:
    (cell,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    images = {json.loads(p.read_text())["data_sha256"] for p in (ROOT / "experiments" / "results").glob("*.json")}
    ids = (grid.run_ids(cell.words, COMPOSER, data, [1])[0] for data in images)
    return next(i for i in ids if (ROOT / "experiments" / "results" / f"{i}.json").exists())


@pytest.mark.parametrize(("text", "match"), [
    ("- a", "is malformed"), ("claim: {says: x}", "claim needs says, metric, of, and above or below"),
    ("claim: {says: x, metric: asr, of: {}, below: 1}", "hydra is missing"),
    ("claim: {says: x, metric: asr, of: {}, below: 1}\naverage: median", "average=median: expected"),
    ("claim: {says: x, metric: asr, of: {}, below: 1}\ngird: {}", r"gird: no such key"), ("a: [", "is malformed"),
])  # fmt: skip
def test_a_malformed_table_ends_in_one_line(tmp_path, text, match):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=match) as e:
        grid.load("p/t", tmp_path)
    assert "\n" not in str(e.value)


WHOLE = """claim: {says: x, metric: asr, of: {defense: npd}, below: {defense: ibau}}
words: [dataset=cifar10]
hydra: {sweeper: {params: {attack: badnets, defense: "ibau,npd", attack.ratio: "0.1,0.20"}}}
printed: {poison_ratio: attack.ratio, loss: {a: {defense: npd}}}
"""
HEAD = "dataset,model,poison_ratio,clean_ratio,attack,defense,metric,value,variant\n"
LINE = "cifar10,vgg,0.1,0.05,badnets,npd,ASR,1.0,loss=a\n"


def experiment(root, text: str = WHOLE, csv: str | bytes = HEAD + LINE) -> str:
    """The name of an experiment in `root`, of these two files."""
    (root / "p").mkdir(exist_ok=True)
    (root / "p" / "t.yaml").write_text(text)
    (root / "p" / "t.csv").write_bytes(csv if isinstance(csv, bytes) else csv.encode())
    return "p/t"


@pytest.mark.parametrize(("old", "new", "match"), [
    ("of: {defense: npd}", "of: npd", r"claim.of: expected {axis: value}, found npd"),
    ("{defense: ibau}", "ten", r"claim.below: expected a number or {axis: value}, found ten"),
    ("{defense: ibau}", ".nan", r"claim.below: expected a number or {axis: value}, found nan"),
    ("{defense: ibau}", "1, above: 2", "claim needs says, metric, of, and above or below"),
    ("of: {defense: npd}", "of: {defence: npd}", r"claim.of.defence: no such axis .did you mean defense.*; there are attack"),
    ("of: {defense: npd}", "of: {defense: npf}", "claim.of.defense: expected one of ibau, npd, found npf"),
    ("asr", "asrr", r"claim.metric=asrr: no such metric .did you mean asr"),
    ("metric: asr", "metric: [asr]", "claim.metric: exp"),
    ("[dataset=cifar10]", "[dataset]", "words: expected key=value, found dataset$"),
    ("[dataset=cifar10]", "dataset=cifar10", "words: expected a list of key=value, found dataset=cifar10"),
    ("[dataset=cifar10]", '["seed=0,1"]', "words: expected one value; several are an axis, .*, found seed=0,1"),
    ("[dataset=cifar10]", '["seed=0,"]', "seed=0,: .*expected key=value"),
    ("{poison_ratio: attack.ratio, ", "[", ""), ("loss: {a: {defense: npd}}", "loss: 3", r"printed.loss: expected an axis"),
    ("{a: {defense: npd}}", "{a: npd}", r"printed.loss: expected an axis or {printed value: {axis: value}}, found {a:npd}"),
    ("loss:", "lss:", r"printed.lss: no such column .did you mean loss"),
    ("poison_ratio: attack.ratio", "poison_ratio: attack.rat", r"printed.poison_ratio: attack.rat: no such axis"),
    ("{params: {", "{param: {", "hydra.sweeper.params: expected the axes of the grid, key: a,b,c, found null"),
    ("attack: badnets", "attack: [badnets]", "hydra.sweeper.params: expected the axes"),
    ("words:", "only_printed: 1\nwords:", "only_printed: expected true or false, found 1"),
    ("words:", "figure: {costs: 3}\nwords:", "figure: expected a mapping"),
    ("words:", "defaults: [t]\nwords:", "its defaults lead back to it"),
    ("words:", "defaults: [t, u]\nwords:", "defaults: expected one file to start from"),
])  # fmt: skip
def test_what_a_table_says_wrong_is_named_with_its_file(tmp_path, old, new, match):
    table = grid.load(experiment(tmp_path), tmp_path)
    assert (table.axes["attack.ratio"], len(table.rows)) == (("0.1", "0.2"), 1)
    assert WHOLE.count(old) == 1
    with pytest.raises(UserError, match=rf"p/t.yaml is malformed: .*{match}") as e:
        grid.load(experiment(tmp_path, WHOLE.replace(old, new)), tmp_path)
    assert "\n" not in str(e.value)


def test_a_claim_names_values_as_they_are_and_a_figure_what_it_draws(tmp_path):
    assert grid.load(experiment(tmp_path, WHOLE.replace("of: {defense: npd}", "of: {attack.ratio: 0.2}")), tmp_path)
    drawn = WHOLE.replace("of: {defense: npd}", "of: {net: d3}").replace("asr", "distance") + "figure: {features: {}}\n"
    assert grid.load(experiment(tmp_path, drawn), tmp_path).of_picture


@pytest.mark.parametrize(("text", "match"), [
    ("", ": no column dataset; expected dataset, model, "), (HEAD, ": nothing stands below its head"),
    (HEAD.replace(",variant", ""), ": no column variant; "), (HEAD + LINE[:-9], ", line 2: 8 fields; expected 9"),
    (HEAD + LINE + "cifar10,vg", ", line 3: 2 fields; expected 9"),
    (HEAD + LINE[:-1] + ",3\n", ", line 2: 10 fields; expected 9"),
    (HEAD + LINE.replace("1.0", "n/a"), ", line 2: value=n/a: expected a number"),
    (HEAD + LINE.replace("1.0", "inf"), ", line 2: value=inf: expected a number"), (b"\x89PNG\xff\x00", " is no CSV: "),
])  # fmt: skip
def test_what_is_wrong_in_a_csv_is_named_with_its_line(tmp_path, text, match):
    with pytest.raises(UserError, match=f"p/t.csv{match}") as e:
        grid.load(experiment(tmp_path, csv=text), tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("text", "match"), [
    ("words: []", "replaces is missing"), ("words: [x]", "words: expected key=value, found x"),
    ("{words: [], replaces: [], divide: {epochs: 0}, at_most: {}, also: {}}", "divide: expected numbers above 0"),
    ("{words: [], replaces: [], divide: {}, at_most: 3, also: {}}", "at_most: expected a mapping, found 3"),
    ("{words: [], replaces: [], divide: {}, at_most: {}, also: {a=b: c=d}}", "also.a=b: expected a list of key=value"),
])  # fmt: skip
def test_a_malformed_scale_ends_in_one_line(tmp_path, text, match):
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=f"scale/s.yaml is malformed: {match}"):
        grid.scale("s", tmp_path)


@pytest.mark.parametrize(("argv", "match"), [
    (["npd2023/tabel01"], "no such table .did you mean npd2023/table01"), ([], "expected `bdx table"),
    (["npd2023/table01", "--format=pdf"], "--format=pdf: expected one of md, csv, tex, html"),
    (["npd2023/table01", "scale=gpu"], "scale=gpu: expected cpu, paper, smoke"),
    (["npd2023/table01", "atack=badnets"], "atack: no such key .did you mean attack"),
    (["npd2023/table01", "defense.epoch=3"], "defense.epoch: no such key"),
    (["npd2023/table01", "slots=2"], "slots: no such key"),
    (["npd2023/table01", "attack=badnetz"], "npd2023/table01: no cell can run, for want of attack=badnetz"),
    (["npd2023/table03", "attack=badnetz"], "npd2023/table03: no cell can run, for want of attack=badnetz"),
    (["npd2023/table01", "engine=local"], "engine: no such key"),
    (["npd2023/table01", "train.epochs=few"], "expected a whole number"),
    (["npd2023/table01", "attack=glob(b*)"], r"attack=glob.b\*.: expected values that can be counted"),
    (["npd2023/table01", "attack=badnets,"], "^attack=badnets,: "),
])  # fmt: skip
def test_a_mistake_is_answered_in_one_line(argv, match):
    with pytest.raises(UserError, match=match) as e:
        tables.table(argv)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("words", "line"), [
    (["d32024/table04"], "missing: 3 cells, for want of dataset.reserved.generated=data/part0.npz"),
    (["d32024/table04", "attack=badnets"], "missing: 1 cells, for want of dataset.reserved.generated=data/part0.npz"),
    (["npd2023/table01", "attack=wanet", "defense=ep"], "missing: a poisoned training set of attack=wanet"),
    (["npd2023/table01", "attack=badnets,nobody", "defense=npd"], "missing: attack=nobody"),
])  # fmt: skip
def test_what_bdx_lacks_is_no_mistake_and_shown_with_what_is_printed(words, line, capsys):
    assert tables.table(words) == 0
    assert line in capsys.readouterr().out


def test_mean_of_entries_is_over_seeds():
    entry = Entry(Cell({}, ()), [{"acc": 0.5}, {"acc": 0.7}, {"acc": None}])
    assert mean(entry.values("acc")) == 0.6
    assert tables.number(entry.values("acc"), "acc") == "60.00 ± 14.14"
