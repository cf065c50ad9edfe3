"""How long a sweep will take, by the rows that there are. No torch in here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bdx import grid, results
from bdx.comparison import norm
from bdx.composer import Composer
from bdx.grid import Cell


def shape(asked: dict) -> tuple:
    """What makes trainings comparable, besides their names: the preset, and the keys of net and training."""
    kept = {k: v for k, v in asked.items() if k == "experiment" or k.startswith(("arch.", "train."))}
    return tuple(sorted((k, norm(v)) for k, v in kept.items()))


def measured(folder: Path) -> dict[tuple, float]:
    """Median seconds of each method, by (data set, net, training, its shape, "attack" or "defense", name)."""
    seconds = defaultdict(list)
    for row in results.rows(folder):
        where = (row["dataset"], row["arch"], row["train"], shape(row))
        for kind in ("attack", "defense"):
            seconds[*where, kind, row[kind]].append(row[f"seconds_{kind}"])
    return {k: median(v) for k, v in seconds.items()}


def known(folder: Path) -> dict[tuple, float]:
    """What this folder's rows say, which this machine may have measured; of methods that they lack what the rows in the
    package say, scaled by how fast this machine is at those that both have."""
    own, came = measured(folder), measured(grid.EXPERIMENTS / "results")
    ratios = [own[k] / came[k] for k in own.keys() & came.keys() if own[k] and came[k]]
    pace = median(ratios) if ratios else 1.0
    return {k: v * pace for k, v in came.items()} | own


def estimate(
    todo: list[Cell], folder: Path, stored: Callable[[str | None], bool], composer: Composer
) -> tuple[float | None, list[str]]:
    """Seconds of one slot, from rows of the same data set, net and training, None where there are none; and the methods
    that no row tells of, for each of which the median of the others stands."""
    seconds = known(folder)
    others = defaultdict(list)
    for (*where, kind, _), value in seconds.items():
        others[*where, kind].append(value)
    total, trained, unknown = 0.0, set(), set()
    for cell in todo:
        names = composer.plain(cell.words)["names"]
        asked = dict(w.lstrip("+").split("=", 1) for w in cell.words if "=" in w)
        where = (names["dataset"], names["arch"], names["train"], shape(asked))
        if not others[*where, "attack"]:
            return None, []
        kinds = ["defense"] if cell.backdoor in trained or stored(cell.backdoor) else ["defense", "attack"]
        trained.add(cell.backdoor)
        for kind in kinds:
            method = (*where, kind, names[kind])
            total += seconds.get(method, median(others[*where, kind]))
            if method not in seconds:
                unknown.add(names[kind])
    return total, sorted(unknown)


def spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
