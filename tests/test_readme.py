"""The README's tables are made from the rows, and from nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, ROW, TINY, paths
from test_tables import cells, row

from bdx import chosen, grid, overview, readme, recipe, results
from bdx.composer import Composer
from bdx.configure import compose
from bdx.errors import UserError

COMPOSER = Composer()
EMPTY = (
    "a\n<!-- table:cpu_scale -->\nold\n<!-- /table -->\nb\n<!-- table:cpu_scale_attacks -->\n<!-- /table -->\n"
    "<!-- table:cpu_scale_detections -->\n<!-- /table -->\n<!-- table:cpu_scale_matrix -->\n<!-- /table -->\n"
    "<!-- table:other_images -->\n<!-- /table -->\nc\n"
)

NAME = "npd2023/table01"
COMMON = {
    "ra_before": 0.0, "ra": 0.75, "n_test": 10000, "n_reserved": 2500, "n_poisoned": 5000, "seconds_attack": 60.0,
    "device": "cpu, 1 threads", "finished": "2026-11-21T00:00:00+00:00", "backdoor": "b",
}  # fmt: skip


def measured(attack: str, defense: str, seed: int = 0, *words: str, **scores) -> dict:
    """A row of a cell of the table, or of its words with others in place of the scale's."""
    (cell,) = cells(NAME, "cpu", f"attack={attack}", f"defense={defense}")
    given = [w for w in (words or cell.words) if "." in w.partition("=")[0]]
    asked = compose(["experiment=cpu_scale", *given]).asked
    found = row(cell, seed) | COMMON | scores | dict(asked)
    return found | {"id": chosen.made(found, COMPOSER)}


def written(rows, text: str = EMPTY) -> str:
    return readme.written(text, rows, COMPOSER)


def table(text: str, name: str) -> list[list[str]]:
    """Fields of the rows between a table's markers."""
    part = text.partition(f"<!-- table:{name} -->")[2].partition("<!-- /table -->")[0]
    return [[f.strip() for f in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("file", readme.FILES, ids=str)
def test_readme_is_current(file):
    """`make readme` would change nothing."""
    text = (ROOT / file).read_text()
    assert written(results.rows(ROOT / "experiments" / "results"), text) == text


def test_every_row_of_the_preset_stands_beside_the_rows():
    rows = results.rows(ROOT / "experiments" / "results")
    repairs = [r for r in chosen.ours(rows, COMPOSER)[0] if r["defense"] != "none"]
    first, more = chosen.first(chosen.settings(repairs, set()), COMPOSER)
    shown = {r["id"] for s in (*first, *more) for r in s.rows}
    newest = {}  # of a setting and seed that was measured again after its recipe had changed
    for r in sorted((r for r in rows if r["dataset"] == "cifar10"), key=lambda r: r["finished"]):
        newest[r["attack"], r["defense"], chosen.words(r), r["seed"]] = r
    assert shown == {r["id"] for r in newest.values() if r["defense"] != "none"}
    text = (ROOT / "experiments" / "results" / "README.md").read_text()
    assert all(s.scores("acc", "asr", "ra") in text for s in (*first, *more))


def test_the_front_page_has_a_line_for_each_defense_and_a_column_for_each_attack():
    rows = [
        measured("badnets", "npd", acc=0.8, asr=0.02, der=0.9), measured("blended", "npd", acc_before=0.7, der=0.6),
        measured("badnets", "anp", acc=0.5) | {"id": "1" * 16}, measured("wanet", "npd"), measured("lf", "none"),
        measured("badnets", "npd", 0, "attack.ratio=0.05", acc_before=0.1),
    ]  # fmt: skip
    assert table(written(rows), "cpu_scale_matrix") == [
        ["defense", "`badnets`", "`blended`", "`sig`"], ["---"] * 4, ["`none`", "90.00 / 100.00", "70.00 / 100.00", "–"],
        ["`anp`", "50.00 / 10.00, 90.00 †", "–", "–"], ["`npd`", "80.00 / 2.00, 90.00", "80.00 / 10.00, 60.00", "–"],
    ]  # fmt: skip


def test_means_over_seeds_stand_beside_the_printed_number():
    """NPD Table 1 prints for BadNets 91.82 / 93.79 without defense, 88.93 / 1.26 and DER 94.82 with NPD."""
    rows = [measured("badnets", "npd", s, acc=a, asr=0.02, der=0.9) for s, a in ((0, 0.80), (1, 0.84))]
    head, _, line = table(written(rows), "cpu_scale")
    assert head[0] == "attack, ACC / ASR before"
    assert line == [
        "`badnets` 90.00 ± 0.00 / 100.00 ± 0.00", "`npd`", "`epochs=17`, `warmup_epochs=2`",
        "82.00 ± 2.83 / 2.00 ± 0.00 / 75.00 ± 0.00", "90.00 ± 0.00", "2", "NPD: 91.82 / 93.79 → 88.93 / 1.26, 94.82",
    ]  # fmt: skip


def test_backdoors_are_shown_as_the_newest_row_found_them(monkeypatch):
    monkeypatch.setattr(overview, "trigger_looks", dict)  # a table of them lies beside the rows or not
    late = COMMON | {"finished": "2026-11-22T00:00:00+00:00", "acc_before": 0.5, "seconds_attack": 90.0}
    rows = [measured("badnets", "npd"), measured("badnets", "none", acc_before=0.7), measured("badnets", "npd_tp", **late)]
    _, _, line = table(written(rows), "cpu_scale_attacks")
    printed = "NPD 91.82 / 93.79; D3 91.32 / 95.03"
    assert line == ["`badnets`", "", "50.00 / 100.00", "5,000", "90", "1", printed]


def test_the_scales_setting_stands_first_and_no_other_is_lost():
    other, plain = (measured("badnets", "npd", 0, w, acc=a) for w, a in (("defense.lambda_ce=0.5", 0.1), ("none=", 0.2)))
    text = written([other, plain, measured("badnets", "npd", acc=0.3)])
    assert [line[2:4] for line in table(text, "cpu_scale") if line[1] == "`npd`"] == [
        ["`epochs=17`, `warmup_epochs=2`", "30.00 / 10.00 / 75.00"],
        ["", "20.00 / 10.00 / 75.00"], ["`lambda_ce=0.5`", "10.00 / 10.00 / 75.00"],
    ]  # fmt: skip
    assert "2 other settings" in text
    text = written([other, plain])
    assert table(text, "cpu_scale")[2][2] == ""  # of what is measured the fewest changed keys


def test_a_backdoor_trained_twice_is_shown_with_both_scores():
    rows = measured("badnets", "npd", acc_before=0.91), measured("badnets", "npd_tp", acc_before=0.92)
    assert [line[0] for line in table(written(rows), "cpu_scale")[2:]] == [
        "`badnets` 91.00 / 100.00", "`badnets` 92.00 / 100.00",
    ]  # fmt: skip


def test_rows_of_another_preset_are_left_out_and_older_ones_are_counted():
    now = measured("badnets", "npd", acc=0.3)
    wide = measured("badnets", "npd", acc=0.9) | {"id": "0" * 16, "device": "NVIDIA H200"}  # the same words, another width
    old = measured("badnets", "npd", acc=0.8) | {"id": "1" * 16}
    digits = now | {"id": "2" * 16, "dataset": "digits"}
    text = written([now, wide, digits])
    assert "1 rows" in text
    assert "†" not in text.partition("<!-- table:other_images")[0]  # that is of the rows in git
    text = written([now, old])
    assert "1 of them, marked †, were measured before something in their recipe changed" in " ".join(text.split())
    assert table(text, "cpu_scale")[2][1] == "`npd`"
    assert table(text, "cpu_scale")[2][3] == "30.00 / 10.00 / 75.00"  # today's counts
    assert table(written([old]), "cpu_scale")[2][3] == "80.00 / 10.00 / 75.00"
    assert table(written([old]), "cpu_scale")[2][1] == "`npd` †"


def test_detections_stand_by_detector_and_attack_and_those_of_older_recipes_are_left_out(tmp_path, monkeypatch):
    def detection(attack: str, auc: float, *asked: str, **other) -> dict:
        cfg = compose(["experiment=cpu_scale", f"attack={attack}", "detector=ac", *asked])
        found = {"id": recipe.digest(recipe.of_detection(cfg, "0" * 64)), "detector": "ac", "attack": attack, "seed": 0}
        found |= {"auc": auc, "tpr": 0.5, "fpr": 0.25, "judged": "train", "n": 50000, "data_sha256": "0" * 64}
        found = ROW | {"kind": "detection", "seconds": 1, "n_flagged": 1} | found
        return found | dict(w.split("=") for w in asked) | other

    folder = tmp_path / "results" / "detections"
    monkeypatch.setattr(grid, "EXPERIMENTS", tmp_path)
    assert "No detection has been measured yet." in written([measured("badnets", "npd")])
    folder.mkdir(parents=True)
    for of in (
        detection("badnets", 0.9), detection("sig", 0.4), detection("sig", 0.7, "detector.reduce=pca"),
        detection("blended", 0.1, id="f" * 16),
    ):  # fmt: skip
        results.write(folder, of)
    head, _, *lines = table(written([measured("badnets", "npd")]), "cpu_scale_detections")
    assert head == ["detector", "changed keys", "judged", "`badnets`", "`sig`"]
    assert lines == [
        ["`ac`", "", "train, 50,000", "90.00 (50.00 / 25.00)", "40.00 (50.00 / 25.00)"],
        ["`ac`", "`detector.reduce=pca`", "train, 50,000", "–", "70.00 (50.00 / 25.00)"],
    ]


def test_rows_on_other_images_have_a_table_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "EXPERIMENTS", tmp_path)
    name = "other_images"
    assert "No row on other images has been measured yet." in written([measured("badnets", "npd")])
    for i, scores in enumerate(({"acc": 0.5, "seed": 0}, {"acc": 0.7, "seed": 1}, {"defense": "none"}, {"dataset": "cifar10"})):
        base = measured("badnets", "npd") | {"dataset": "gtsrb", "id": f"{i:016}", "n_test": 12630, "experiment": "cpu_scale"}
        results.write(tmp_path / "results", base | scores)
    nameless = {k: v for k, v in measured("badnets", "anp").items() if k != "experiment"}
    results.write(tmp_path / "results", nameless | {"dataset": "digits", "id": "f" * 16})  # of a command that nobody knows
    head, _, line = table(written([measured("badnets", "npd")]), name)
    assert head[:3] == ["images, net, recipe", "attack, ACC / ASR before", "defense"]
    assert line[0] == "`gtsrb`, `experiment=cpu_scale`, `arch=preact_resnet18`, `train=fast`"
    assert line[2:] == [
        "`npd` †",
        "`epochs=17`, `warmup_epochs=2`",
        "60.00 ± 14.14 / 10.00 ± 0.00 / 75.00 ± 0.00",
        "90.00 ± 0.00",
        "2",
    ]


def test_what_stands_outside_the_markers_is_kept_and_no_rows_say_so():
    text = written([])
    assert text.startswith("a\n<!-- table:cpu_scale -->\nNo row has been measured yet.\n<!-- /table -->\nb\n")
    assert text.endswith("c\n")
    assert written([], text) == text


def test_a_marker_that_is_wrong_or_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="table:cpu_scael -->: no such table; there are cpu_scale_matrix"):
        written([], EMPTY.replace("cpu_scale_attacks", "cpu_scael"))
    (path := tmp_path / "README.md").write_text("nothing")
    with pytest.raises(UserError, match=r"no file has a place for <!-- table:cpu_scale -->; looked in .*README\.md"):
        readme.main([str(path)])
    assert path.read_text() == "nothing"


def test_trap_and_replace_is_compared_with_its_own_triggers():
    known = overview.in_print()
    of = grid.load("tnr2022/table01").rows
    (asr,) = (float(r["value"]) for r in of if (r["attack"], r["defense"], r["metric"]) == ("badnet_white", "tnr", "ASR"))
    assert f" {asr:.2f}, " in overview.theirs("badnets", "tnr", known)
    assert overview.theirs("badnets", "anp", known).startswith("NPD: ")  # all three print it
    assert overview.theirs("badnets", "fst", known) == "–"


def test_the_file_is_written_whole_and_a_missing_one_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "rows", lambda folder: [measured("badnets", "npd")] * (folder.name == "results"))
    path = tmp_path / "README.md"
    path.write_text(EMPTY)
    readme.main([str(path)])
    readme.main([str(path)])
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == ["tables made anew", "as it was"]
    assert len(table(path.read_text(), "cpu_scale_attacks")) == 3
    with pytest.raises(UserError, match="no such file"):
        readme.main([str(tmp_path / "READTHAT.md")])
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.slow
def test_the_method_in_two_files_runs_as_it_stands(tmp_path):
    """Its files as a reader would copy them, in a copy of the package."""
    for part in ("bdx", "conf", "experiments"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("results", "__pycache__"))
    text = (ROOT / "README.md").read_text().partition("## Add a method in two files")[2]
    found = re.findall(r"`((?:bdx|conf)/\S+\.(?:py|yaml))`[^`]*?```(?:python|yaml)\n(.*?)```", text, re.S)
    assert [name for name, _ in found] == [
        "bdx/attacks/stripe.py", "conf/attack/stripe.yaml", "bdx/defenses/soft.py", "conf/defense/soft.yaml",
    ]  # fmt: skip
    for name, content in found:
        (tmp_path / name).write_text(content)
    words = [*TINY, "train.epochs=1", "attack=stripe", "defense=soft", "defense.epochs=1", *paths(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "bdx.cli", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    (made,) = results.rows(tmp_path / "out" / "results")
    assert (made["attack"], made["defense"]) == ("stripe", "soft")
