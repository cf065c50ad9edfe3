"""Figures as experiments: their files, what is drawn of their runs, and the claim about what a picture shows."""

from __future__ import annotations

import base64
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from safetensors.torch import load_file
from test_tables import COMPOSER, cells, row, write

from bdx import grid, plates, results, sweep
from bdx.cli import dispatch
from bdx.comparison import Entry
from bdx.configure import options as choices
from bdx.errors import UserError
from bdx.figures import costs, own
from bdx.figures import read as frame
from bdx.grid import Cell
from bdx.plates import difference, function, groups

D3 = "d32024/fig04"
pytestmark = pytest.mark.usefixtures("no_rows_but_these")


@pytest.fixture(scope="module")
def places(shared, tmp_path_factory) -> list[str]:
    return [f"paths.data={shared / 'data'}", f"paths.out={tmp_path_factory.mktemp('figures')}"]


@pytest.fixture(scope="module")
def repaired(places) -> list[dict]:
    """The rows of D3's Fig. 4 on a tiny net: BadNets, fine-tuned and detoxified."""
    from bdx.run import run

    return [run(COMPOSER.config(c.words)) for c in cells(D3, "smoke", "attack=badnets", *places)]


# the files


@pytest.mark.parametrize("name", grid.figures())
def test_a_figure_says_what_it_claims_and_can_be_drawn(name):
    text = (grid.EXPERIMENTS / f"{name}.yaml").read_text()
    for word in ("# Paper:", "Fig", "# Cost", "# Tolerance:", f"# Command: bdx sweep {name} scale=cpu, then bdx figure {name}"):
        assert word in text
    assert len(text.splitlines()) <= 30
    table, found = grid.load(name), cells(name, "paper")
    assert table.title
    assert table.figure
    assert [c.lacks for c in found if c.lacks] == []
    for drawing, given in table.figure.items():
        options, left = own(function(drawing), [f"{k}={v}" for k, v in given.items()])
        assert (options, left) == (given, [])
    sides = [table.claim.get(side) for side in ("of", "above", "below") if isinstance(table.claim.get(side), dict)]
    if not table.of_picture:
        assert all(any(all(c.at[k] == str(v) for k, v in where.items()) for c in found) for where in sides)


def test_every_figure_of_the_list_is_there():
    npd, d3, tnr = ([f"npd2023/fig0{i}" for i in range(3, 8)], [f"d32024/fig0{i}" for i in (2, 3, 4)], ["fig02", "fig04"])
    assert grid.figures() == [*d3, *npd, *(f"tnr2022/{n}" for n in tnr)]
    assert not set(grid.figures()) & set(grid.tables())


def test_the_list_of_experiments_counts_and_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(grid, "experiments", lambda *_: ["npd2023/fig04", "npd2023/table09", D3])
    monkeypatch.setattr(grid, "choices", lambda group: frozenset(choices(group)) - {"d3"})
    assert dispatch(["sweep"]) == 0
    first, _, third, last = capsys.readouterr().out.splitlines()
    assert re.search(r"d32024/fig04 +2 of +4 cells can run .*\(missing: defense=d3 \(2\)\)", third)
    assert re.search("npd2023/fig04 +3 of +3 cells can run  a targeted perturbation is nearer", first)
    assert last == "3 experiments at scale=cpu: 12 of 14 cells can run, 2 are missing"


# what is drawn


def test_nets_of_one_backdoor_share_a_picture(repaired, places, capsys):
    """A distance in the figure is that of the weights on disk."""
    assert dispatch(["figure", D3, "scale=smoke", "attack=badnets", *places, "count=40", "method=pca"]) == 0
    said = capsys.readouterr().out
    of = {p.function: p for p in plates.plates(plates.read([D3, "scale=smoke", "attack=badnets", *places], ""))}
    features, moved = frame(of["features"].path), frame(of["weight_differences"].path)
    assert list(features["net"].unique()) == ["badnets", "ft", "d3"]
    assert features["image"].nunique() == 40
    out = places[1].partition("=")[2]
    (backdoor,) = {r["backdoor"] for r in repaired}
    before = load_file(f"{out}/store/{backdoor}/weights.safetensors")
    far = {}
    for r in repaired:
        after = load_file(f"{out}/nets/{r['id']}/net.safetensors")
        (key,) = [k for k in after if k.endswith("linear.weight")]
        (same,) = [k for k in before if k.endswith(key)]
        far[r["defense"]] = (after[key] - before[same]).norm().item()
    shown = moved.groupby("net")["distance"].first().to_dict()
    assert shown == pytest.approx(far)
    assert far["d3"] > far["ft"]  # the head starts anew on a sphere around 0, one epoch of fine-tuning stays near
    assert difference(grid.load(D3).claim, moved) == pytest.approx(far["d3"] - far["ft"])
    assert re.search(r"claim: D3 moves .* fine-tuning does: .* \(1 of 1 pictures", said)


def test_rows_alone_make_a_curve_and_pages_show_it(tmp_path, capsys):
    """No net lies there. Deeper places come later, the claim is judged from the rows, the paper's other figures are named
    with their commands."""
    name, asr = "npd2023/fig03", {"shallow": 0.9, "middle": 0.7, "third_to_last": 0.5, "penultimate": 0.2, "last": 0.1}
    same = {"backdoor": "b" * 16, "acc_before": 0.9, "asr_before": 1.0}
    rows = [row(c, asr=asr[c.at["defense.layer"]], **same, **{"defense.layer": c.at["defense.layer"]})
            for c in cells(name, "cpu", "attack=badnets")]  # fmt: skip
    write(tmp_path / "results", *rows)
    folder = tmp_path / "figures" / "npd2023_fig03_cpu"
    words = ["scale=cpu", "attack=badnets", f"paths.out={tmp_path}"]
    assert dispatch(["figure", name, *words]) == 0
    said = capsys.readouterr().out
    curve = frame(folder / "depth_curve")
    assert list(curve["layer"]) == list(asr)
    assert list(curve["asr"]) == list(asr.values())
    assert "claim: at the penultimate place NPD leaves less ASR than at the shallow one: not enough data (1 of 1 cells" in said
    assert "mean +70.00 points" in said
    (folder / "depth_curve.png").unlink()
    assert dispatch(["report", "npd2023/table01", "defense=npd", *words, "--figures"]) == 0
    said = capsys.readouterr().out
    assert f"npd2023/fig03: depth_curve: {folder / 'depth_curve.png'}" in said
    assert "npd2023/fig06: npd2023/fig06: none of its runs is done at scale=cpu" in said
    drawn = base64.b64encode((folder / "depth_curve.png").read_bytes()).decode()
    part = section(tmp_path / "reports" / "npd2023_table01_cpu.html", "Figures of the paper")
    assert drawn in part
    assert "4 figures are not drawn yet" in part
    assert "bdx sweep npd2023/fig04 scale=cpu\nbdx figure npd2023/fig04 scale=cpu\nbdx sweep npd2023/fig05" in part
    assert dispatch(["report", name, *words]) == 0
    assert drawn in section(tmp_path / "reports" / "npd2023_fig03_cpu.html", "The figure")


def section(path, title: str) -> str:
    (found,) = re.findall(f"<h2>{title}</h2>(.*?)</section>", path.read_text(), re.DOTALL)
    return found


def test_a_picture_whose_net_is_not_here_says_why(tmp_path, capsys):
    (cell,) = cells("npd2023/fig05", "cpu")
    write(tmp_path / "results", row(cell, backdoor="b" * 16))
    assert dispatch(["figure", "npd2023/fig05", "scale=cpu", f"paths.out={tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"grad_cam: badnets: .*net.json.*|grad_cam: badnets: .*missing", said)
    assert "1 of 1 pictures are wanting; `bdx sweep npd2023/fig05 scale=cpu" in said
    assert dispatch(["report", "npd2023/fig05", "scale=cpu", f"paths.out={tmp_path}"]) == 0
    assert "grad_cam: badnets: " in (tmp_path / "reports" / "npd2023_fig05_cpu.html").read_text()


def test_runs_are_grouped_by_what_makes_the_backdoor():
    at = lambda attack, defense, **of: Cell({"attack": attack, "defense": defense, **of}, ())
    one = lambda id, defense, seed=0: {"id": id, "defense": defense, "seed": seed}
    retold = Entry(at("a", "none"), [one("2", "ft")])  # measured as ft, and known from there
    entries = [Entry(at("a", "ft"), [one("2", "ft")]), Entry(at("a", "d3"), [one("3", "d3")]),
               Entry(at("b", "ft", **{"train.epochs": "2"}), [one("4", "ft")]), retold]  # fmt: skip
    ids = lambda found: {k: [r["id"] for r in rows] for k, rows in found.items()}
    assert ids(groups(entries, whole=False)) == {"a": ["2", "3"], "b epochs=2": ["4"]}
    assert ids(groups(entries, whole=True)) == {"": ["2", "3", "4"]}
    seeds = [Entry(at("a", "ft"), [one("5", "ft", 0), one("6", "ft", 1)])]
    assert ids(groups(seeds, whole=False)) == {"a seed=0": ["5"], "a seed=1": ["6"]}


def test_a_claim_about_a_picture_by_hand():
    data = pd.DataFrame({"kind": ["x", "x", "y"], "t": [0.0, 1.0, 1.0], "far": [2.0, 4.0, 10.0]})
    claim = lambda **of: {"metric": "far", **of}
    assert difference(claim(of={"kind": "x"}, below={"kind": "y"}), data) == 7.0
    assert difference(claim(of={"kind": "x"}, above={"kind": "y"}), data) == -7.0
    assert difference(claim(of={"kind": "x", "t": 1}, above=1.5), data) == 2.5
    assert difference(claim(of={"kind": "z"}, above=1.5), data) is None
    assert difference({"metric": "near", "of": {"kind": "x"}, "above": 0.0}, data) is None


def test_seeds_of_a_picture_are_no_further_evidence(tmp_path, monkeypatch):
    """Four nets, one of which speaks against the claim: three seeds of each say no more than one."""
    gaps = {"a": 3.0, "b": 2.0, "c": 2.5, "d": -1.0}
    verdicts = []
    for seeds in ((0,), (0, 1, 2)):
        made = [plates.Plate("f", f"f: {net} seed={s}" if len(seeds) > 1 else f"f: {net}", ({"seed": s},), tmp_path / net)
                for net in gaps for s in seeds]  # fmt: skip
        monkeypatch.setattr("bdx.figures.read", lambda path: path.name)
        monkeypatch.setattr(plates, "difference", lambda claim, name: gaps[name])
        table = SimpleNamespace(of_picture=True, claim={"says": "s", "metric": "far", "of": {}, "below": {}}, name="n")
        verdicts.append(plates.judged(SimpleNamespace(table=table, entries=[]), made))
    assert "4 of 4 pictures" in verdicts[0]
    assert verdicts[1] == verdicts[0].replace("4 of 4", "12 of 12")


# times


def test_costs_are_multiples_of_fine_tuning_on_the_same_net_and_device(tmp_path):
    of = lambda defense, seconds, backdoor="a", device="cpu": {
        "defense": defense, "attack": "badnets", "backdoor": backdoor, "device": device, "seed": 0, "seconds_defense": seconds,
        "der": 0.5,
    }  # fmt: skip
    rows = [of("ft", 2.0), of("npd", 6.0), of("npd", 5.0, "b"), of("ft", 0.5, device="gpu"), of("npd", 2.0, device="gpu"),
            of("none", 0.0)]  # fmt: skip
    found = costs(rows, tmp_path / "costs")
    assert list(zip(found["defense"], found["device"], found["ratio"], strict=True)) == [
        ("ft", "cpu", 1.0), ("ft", "gpu", 1.0), ("npd", "cpu", 3.0), ("npd", "gpu", 4.0),
    ]  # fmt: skip
    longer = of("ft", 8.0) | {"id": "z", "defense.epochs": 9}
    again = rows[1] | {"id": "y", "defense.epochs": 9}
    for order in ([*rows, longer, again], [longer, again, *rows]):  # against the run of as many epochs, whatever comes first
        found = costs(order, tmp_path / "costs")
        assert sorted(found[(found["defense"] == "npd") & (found["device"] == "cpu")]["ratio"]) == [0.75, 3.0]
    with pytest.raises(UserError, match="repaired by reference=anp; there are defenses ft, npd"):
        costs(rows, tmp_path / "costs", reference="anp")


# mistakes


@pytest.mark.parametrize(("argv", "match"), [
    (["npd2023/fig9"], "npd2023/fig9: no such table .did you mean npd2023/fig0"),
    (["npd2023/table01"], "npd2023/table01 is a table: expected `bdx figure PAPER/FIG"),
    (["npd2023/fig05", "count=many"], "count=many: expected a number"),
    (["npd2023/fig05", "scale=smoke", "trian.epochs=1"], "trian.epochs: no such key .did you mean train.epochs"),
    (["npd2023/fig05", "scale=smoke"], "npd2023/fig05: none of its runs is done at scale=smoke"),
    (["d32024/fig03", "scale=cpu", "path=x"], "path=x: the pictures of d32024/fig03 lie below paths.out"),
    (["d32024/fig04", "scale=smoke", "seed=0,1"], "d32024/fig04: none of its runs is done at scale=smoke"),
    (["grad_can"], "expected `bdx figure NAME .* .did you mean grad_cam"),
])  # fmt: skip
def test_a_mistake_is_answered_in_one_line(argv, match, tmp_path):
    with pytest.raises(UserError, match=match) as e:
        plates.figure([*argv, f"paths.out={tmp_path}"])
    assert "\n" not in str(e.value)


def test_a_function_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"grad_can: no such function of bdx.figures .did you mean grad_cam"):
        function("grad_can")


def test_a_figure_is_swept_like_a_table(tmp_path, shared, capsys):
    words = ["scale=smoke", "attack=badnets", "--dry-run", f"paths.data={shared / 'data'}", f"paths.out={tmp_path}"]
    assert sweep.sweep(["npd2023/fig03", *words]) == 0
    assert "5 cells, 5 can run" in capsys.readouterr().out
    assert not results.rows(tmp_path / "results")


def test_the_latent_backdoors_of_a_table_lie_where_its_layers_begin(digits):
    """T&R Table 7: LBA-14, 12 and 10 lie in the inputs of the layers 14, 12 and 10 of WRN16-1; a number is no module's name."""
    from conftest import build_attack

    (of,) = [v for k, v in grid.load("tnr2022/table07").printed.items() if k == "lba_layer"]
    assert {k: v["attack.head"] for k, v in of.items()} == {14: 1, 12: 3, 10: 5}
    with pytest.raises(UserError, match="layer=14: no such layer"):
        build_attack(digits, "attack=lba", "attack.layer=14")
