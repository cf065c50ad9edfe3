"""The time that a sweep will take, by rows of the same net, training and preset alone."""

from __future__ import annotations

import pytest
from test_tables import COMPOSER, cells, row, write

from bdx.forecast import estimate


def test_a_thin_net_tells_nothing_of_a_wide_one(tmp_path):
    """Rows name their preset; without it that of cpu_scale looks as one of the published net."""
    (thin,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    (wide,) = cells("npd2023/table01", "paper", "attack=badnets", "defense=npd", "train=fast")
    folder = write(tmp_path, row(thin, experiment="cpu_scale", train="fast", seconds_attack=600.0, seconds_defense=200.0))
    assert estimate([thin], folder, lambda backdoor: False, COMPOSER) == (pytest.approx(800), [])
    assert estimate([thin], folder, lambda backdoor: True, COMPOSER) == (pytest.approx(200), [])
    assert estimate([wide], folder, lambda backdoor: False, COMPOSER) == (None, [])


def test_rows_of_this_folder_count_before_those_in_the_package(tmp_path):
    (cell,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    far, _ = estimate([cell], tmp_path, lambda backdoor: False, COMPOSER)
    own = write(tmp_path, row(cell, experiment="cpu_scale", seconds_attack=1.0, seconds_defense=2.0))
    assert far > 100  # measured on some CPU
    assert estimate([cell], own, lambda backdoor: False, COMPOSER) == (pytest.approx(3), [])


def test_what_this_machine_has_not_measured_is_scaled_by_what_it_has(tmp_path):
    npd, d3 = (cells("bdx/defenses", "cpu", "attack=badnets", f"defense={d}") for d in ("npd", "d3"))
    of = {"stored": lambda backdoor: True, "composer": COMPOSER}
    (far, _), (other, _) = estimate(npd, tmp_path / "none", **of), estimate(d3, tmp_path / "none", **of)
    own = write(tmp_path, row(npd[0], experiment="cpu_scale", seconds_attack=0.0, seconds_defense=far * 3))
    assert estimate(d3, own, **of) == (pytest.approx(other * 3, rel=1e-6), [])


def test_a_method_that_no_row_tells_of_is_named(tmp_path):
    npd, d3 = (cells("bdx/defenses", "paper", "attack=badnets", f"defense={d}") for d in ("npd", "d3"))
    own = write(tmp_path, row(npd[0], seconds_attack=500.0, seconds_defense=7.0))
    assert estimate(npd + d3, own, lambda backdoor: True, COMPOSER) == (pytest.approx(14), ["d3"])
