"""`bdx detect`: rows, resuming, grids, mistakes in one line, no torch before a detection starts."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TINY, build_attack, names, paths

import bdx.run
from bdx import recipe
from bdx.build import instantiate
from bdx.cli import main
from bdx.configure import compose
from bdx.detect import cells
from bdx.detection import check, detect
from bdx.errors import UserError
from bdx.screen import Screen

NET = [*TINY, "train.epochs=1", "attack=badnets"]
WORDS = [*NET, "detector=spectral", "trainer=cpu"]


@pytest.fixture
def command(monkeypatch, capsys, shared):
    """command(*words) -> exit code, stdout, stderr of `bdx detect words` in the shared folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR2)}
    monkeypatch.setattr(sys, "argv", ["bdx"])

    def call(*words: str):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["detect", *words])
        return stopped.value.code or 0, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


def rows(shared) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in (shared / "out" / "detections").glob("*.json")}


def test_a_row_is_written_shown_and_not_made_again(command, shared, monkeypatch):
    code, out, _ = command(*WORDS, *paths(shared))
    assert code == 0
    (row,) = (r for r in rows(shared).values() if r["detector"] == "spectral")
    assert row["kind"] == "detection"
    assert (row["attack"], row["n"], row["n_poisoned"], row["judged"]) == ("badnets", 1438, 144, "train")
    assert row["n_flagged"] == pytest.approx(0.15 * 1438, abs=5)
    assert row["n_flagged"] == round(row["tpr"] * 144) + round(row["fpr"] * (1438 - 144))
    assert 0 <= row["auc"] <= 1
    assert "defense" not in row
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"spectral on badnets: AUC {100 * row['auc']:.2f}, TPR {100 * row['tpr']:.2f}")
    assert last.endswith("(144 poisoned of 1438 images)")
    monkeypatch.setattr("bdx.detection.detect", lambda *_: pytest.fail("it was run again"))
    code, again, _ = command(*WORDS, *paths(shared))
    assert code == 0
    assert "this run is done" in again
    assert again.strip().splitlines()[-1] == last


def test_the_backdoor_is_the_one_that_runs_share(command, shared, cell):
    repair = cell("train.epochs=1", "attack=badnets", "defense=none")
    command(*WORDS, *paths(shared))
    (row,) = (r for r in rows(shared).values() if r["detector"] == "spectral")
    assert row["backdoor"] == repair["backdoor"]
    assert repair["id"] not in rows(shared)
    assert not {*rows(shared)} & {p.stem for p in (shared / "out" / "results").glob("*.json")}


def test_the_mask_never_reaches_a_detector(shared, monkeypatch):
    from bdx.detectors.spectral import Spectral

    seen = []
    score = Spectral.score
    monkeypatch.setattr(Spectral, "score", lambda self, net, split, *rest: seen.append(split) or score(self, net, split, *rest))
    row = detect(compose([*WORDS, "detector.limit=100", *paths(shared)]), Screen(quiet=True))
    assert row["n"] == 100
    assert row["n_poisoned"] > 0
    assert not seen[0].poisoned.any()
    assert torch.equal(seen[0].y, seen[0].y_true)


def test_a_grid_names_what_failed_and_goes_on(command, shared):
    grid = ["-m", *NET[:-1], "attack=badnets,sig", "attack.ratio=0.3", "detector=spectral", "trainer=cpu", "detector.limit=64"]
    code, out, err = command(*grid, *paths(shared))
    assert code == 1
    assert err == ""
    assert [r["attack"] for r in rows(shared).values() if r.get("attack.ratio") == 0.3] == ["badnets"]
    assert out.strip().splitlines()[-1].startswith("bdx: failed: ")
    assert "attack.ratio=0.3 asks for 431 poisoned images" in out


def test_a_detector_of_the_net_records_the_anomaly_index_of_each_class(command, shared):
    words = [*NET, "detector=nc", "detector.epochs=1", "detector.limit=20", "detector.anomaly=0.5", "trainer=cpu"]
    code, out, err = command(*words, *paths(shared))
    assert (code, err) == (0, "")
    (row,) = (r for r in rows(shared).values() if r["detector"] == "nc")
    assert (row["judged"], row["auc"], row["tpr"], row["fpr"], row["n"]) == ("net", None, None, None, 10)
    indices = list(map(float, row["anomaly_indices"].split()))
    assert len(indices) == 10
    assert max(indices) == pytest.approx(row["anomaly_index"], abs=1e-4)
    flagged = [k for k, index in enumerate(indices) if index > 0.5]
    assert row["flagged_classes"] == " ".join(map(str, flagged))
    assert row["n_flagged"] == len(flagged) > 0
    said = " ".join(out.split())
    assert f"nc on badnets: class{'es' * (len(flagged) > 1)} {', '.join(map(str, flagged))} flagged; anomaly index of" in said
    code, again, _ = command(*words, *paths(shared))
    assert "this run is done" in again
    assert " ".join(again.split()).endswith(said[said.index("nc on badnets: class") :])


@pytest.mark.parametrize("name", ["strip", "ac"])
def test_of_a_net_from_elsewhere_no_image_is_known_to_carry_a_trigger(name, digits):
    attack = build_attack(digits, "attack=given")
    with pytest.raises(UserError, match="of a net from elsewhere nobody knows any; take detector=nc"):
        check(instantiate(compose([f"detector={name}"]).detector), attack)
    check(instantiate(compose(["detector=nc"]).detector), attack)


def test_a_slow_detector_says_how_far_it_is(shared, capsys):
    words = [*NET[:-1], "attack=badnets", "detector=strip", "detector.overlays=2", "detector.limit=60", "trainer=cpu"]
    detect(compose([*words, "seed=5", *paths(shared)]), Screen())
    assert re.search(r"entropies: part 1/1, \d+\.\d s", capsys.readouterr().out)


def test_without_an_attack_there_is_no_auc(shared):
    words = [*NET[:-1], "attack=none", "detector=strip", "detector.overlays=2", "detector.limit=50", "trainer=cpu"]
    row = detect(compose([*words, *paths(shared)]), Screen(quiet=True))
    assert (row["auc"], row["tpr"], row["n_poisoned"]) == (None, None, 0)
    assert 0 <= row["fpr"] <= 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["attack=badnets"], "bdx detect takes a detector: detector=NAME, of abl_loss"),
        (["detector=stripe"], "detector=stripe: no such detector (did you mean strip"),
        (["detector=null"], "detector=null: no such detector"),
        (["detector=strip", "defense=npd"], "bdx detect defense=…: it looks at the backdoored net, before any defense"),
        (["detector=strip", "--cfg"], "bdx detect --cfg: expected key=value"),
        (["detector=strip", "detector.overlay=3"], "detector.overlay: no such key (did you mean detector.overlays"),
        (["detector=strip,ac"], "several values make a grid, which is"),
        (["detector=ac", "detector.judge=test", "dataset=digits"], "detector.judge=test: expected train"),
        (["-m", "detector=ac,nosuch", "experiment=demo"], "detector=nosuch: no such detector"),
    ],
)
def test_a_mistake_is_one_line(words, text, command, shared):
    code, _, err = command(*words, *paths(shared))
    assert code == 2
    assert err.startswith("bdx: error: ")
    assert len(err.strip().splitlines()) == 1
    assert text in err


def test_a_repair_takes_no_detector(shared):
    with pytest.raises(UserError, match="a repair takes none; `bdx detect detector=… attack=…`"):
        bdx.run.run(compose([*WORDS, *paths(shared)]))


def test_help_lists_the_detectors_and_imports_no_torch():
    code = "import sys; from bdx.detect import detect; detect(['--help']); sys.exit('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1].split() == ["detector", *names("detector")]


def test_an_id_depends_on_backdoor_reserved_images_and_detector_alone():
    def id(*words):
        return recipe.digest(recipe.of_detection(compose(["dataset=digits", "detector=strip", *words]), "0" * 64))

    assert id() == id("defense=ft") == id("trainer=cpu", "paths.out=elsewhere")
    assert (
        len({id(), id("seed=1"), id("detector.limit=9"), id("attack=sig"), id("dataset.reserved.ratio=0.2"), id("detector=ac")})
        == 6
    )


def test_the_cells_of_a_grid():
    assert cells(["a=1,2", "b=x", "c=[1,2]"]) == [["a=1", "b=x", "c=[1,2]"], ["a=2", "b=x", "c=[1,2]"]]
