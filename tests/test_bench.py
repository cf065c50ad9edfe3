"""The bench measures; here only what it measures on."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT

from bdx import imagefile
from bdx.attacks.base import Attack


@pytest.fixture
def header(tmp_path, monkeypatch):
    """header(quick) -> the first line of the defenses' part; data and store are in tmp_path, and trainings only noted."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setenv("BDX_DATA", str(tmp_path))
    monkeypatch.setenv("BDX_OUT", str(tmp_path / "out"))
    from common import Place
    from every import bench_defenses

    header = lambda quick=False: next(bench_defenses(Place("cpu", gpu=False, quick=quick))).row()
    header.fits = []
    monkeypatch.setattr(Attack, "fit", lambda *_: header.fits.append(1))
    return header


def test_without_a_cache_the_defenses_get_synthetic_images_and_the_bench_says_so(header, tmp_path):
    name, size, *_, note = header()
    assert (name, size) == ("defenses on synthetic", "2,500 images")
    assert note.endswith(f"{tmp_path / 'cifar10.safetensors'} is not there")


def test_with_a_cache_they_get_one_real_backdoor_trained_once(header, tmp_path, capsys):
    rng, n = np.random.default_rng(0), {"train": 400, "test": 20}
    images = {f"{s}_images": rng.integers(256, size=(k, 3, 32, 32), dtype=np.uint8) for s, k in n.items()}
    labels = {f"{s}_labels": np.arange(k) % 10 for s, k in n.items()}
    imagefile.write(tmp_path / "cifar10.safetensors", images | labels, dataset="cifar10", classes=[*"0123456789"], source="toy")
    assert "--quick" in header(quick=True)[-1]
    assert not header.fits
    trained, found = header(), header()
    assert trained[:2] == found[:2] == ("defenses on cifar10", "20.00 images")
    assert trained[-1].endswith("trained now")
    assert found[-1].endswith("from the store")
    assert len(header.fits) == 1
    assert capsys.readouterr().out.count("training it, once") == 1
