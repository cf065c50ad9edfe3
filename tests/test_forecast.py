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
    assert estimate([thin], folder, lambda backdoor: False, COMPOSER) == pytest.approx(800)
    assert estimate([thin], folder, lambda backdoor: True, COMPOSER) == pytest.approx(200)
    assert estimate([wide], folder, lambda backdoor: False, COMPOSER) is None


def test_rows_of_this_folder_count_before_those_in_the_package(tmp_path):
    (cell,) = cells("npd2023/table01", "cpu", "attack=badnets", "defense=npd")
    far = estimate([cell], tmp_path, lambda backdoor: False, COMPOSER)
    own = write(tmp_path, row(cell, experiment="cpu_scale", seconds_attack=1.0, seconds_defense=2.0))
    assert far > 100  # measured on some CPU
    assert estimate([cell], own, lambda backdoor: False, COMPOSER) == pytest.approx(3)
