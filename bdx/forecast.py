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


def estimate(todo: list[Cell], folder: Path, stored: Callable[[str | None], bool], composer: Composer) -> float | None:
    """Seconds of one slot, from rows of the same data set, net and training, this folder's own if it has any, which this
    machine may have measured; None where no row tells."""
    attacks, defenses = defaultdict(list), defaultdict(list)
    for home in (folder, grid.EXPERIMENTS / "results"):
        known = set(attacks)
        for row in results.rows(home):
            where = (row["dataset"], row["arch"], row["train"], shape(row))
            if where in known:
                continue
            for of in (where, (*where, row["attack"])):
                attacks[of].append(row["seconds_attack"])
            for of in (where, (*where, row["defense"])):
                defenses[of].append(row["seconds_defense"])
    total, trained = 0.0, set()
    for cell in todo:
        names = composer.plain(cell.words)["names"]
        asked = dict(w.lstrip("+").split("=", 1) for w in cell.words if "=" in w)
        where = (names["dataset"], names["arch"], names["train"], shape(asked))
        if where not in attacks:
            return None
        total += median(defenses.get((*where, names["defense"]), defenses[where]))
        if cell.backdoor not in trained and not stored(cell.backdoor):
            total += median(attacks.get((*where, names["attack"]), attacks[where]))
        trained.add(cell.backdoor)
    return total


def spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
