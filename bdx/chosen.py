"""chosen: which rows count for a preset, and which of a method's settings stands for it. No torch in here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from bdx import grid, recipe
from bdx.composer import Composer, resolve
from bdx.configure import show
from bdx.errors import UserError
from bdx.grid import Cell
from bdx.tables import number

PRESET, SCALE = "cpu_scale", "cpu"


@dataclass(frozen=True)
class Setting:
    """A method as it was run: changed: the keys that differ from its YAML, as words; rows: one for each seed."""

    attack: str
    defense: str
    changed: tuple[str, ...]
    rows: tuple[dict, ...]

    def scores(self, *names: str) -> str:
        """Means over the seeds, in percent; of a net before its repair, one for each backdoor."""
        return " / ".join(number([r[k] for r in self.rows if r.get(k) is not None], k) for k in names)


def words(row: dict) -> tuple[str, ...]:
    """What was asked for by hand, in whatever order."""
    return tuple(sorted(f"{k}={show(v)}" for k, v in row.items() if "." in k))


def ours(rows: Iterable[dict], composer: Composer) -> tuple[list[dict], set[str]]:
    """(the preset's rows, ids of those that its configuration of today makes).

    Its id tells that a row is the preset's; older ones do not name it. One whose id no configuration makes any more, because
    a recipe has got new keys since, counts if its data set, net and training are the preset's and it was measured on a CPU.
    """
    names = composer.plain((f"experiment={PRESET}",))["names"]
    kept, current = [], set()
    for row in rows:
        if any(row[k] != names[k] for k in ("dataset", "arch", "train")) or row.get("experiment", PRESET) != PRESET:
            continue
        if made(row, composer) == row["id"]:
            current.add(row["id"])
        elif not row["device"].startswith("cpu"):
            continue
        kept.append(row)
    return kept, current


def made(row: dict, composer: Composer) -> str | None:
    """The id that a run of the preset with the names and words of `row` has today."""
    own = composer.plain((f"experiment={PRESET}",))["names"]
    other = (f"{k}={row[k]}" for k in ("dataset", "arch", "train") if row[k] != own[k])
    asked = (f"experiment={PRESET}", *other, *(f"{k}={row[k]}" for k in ("attack", "defense", "seed")), *words(row))
    try:
        return grid.ids(asked, composer, row["data_sha256"])[0]
    except UserError:  # a method or a key that is gone
        return None


def of_today(row: dict, composer: Composer) -> bool:
    """Whether the preset's configuration of today makes this detection's id."""
    asked = (f"{k}={row[k]}" for k in ("detector", "attack", "seed"))
    try:
        plain = composer.plain((f"experiment={PRESET}", *asked, *words(row)))
    except UserError:
        return False
    plain = resolve({k: v for k, v in plain.items() if k not in ("paths", "logger", "trainer")})
    return recipe.digest(recipe.of_detection(plain, row["data_sha256"])) == row["id"]


def settings(rows: list[dict], current: set[str], own=lambda word: True) -> list[Setting]:
    """Rows by attack, defense and those words that `own` picks; of two with one seed the row of today's recipe counts,
    then the newer."""
    groups: dict[tuple, dict[int, dict]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: (r["id"] in current, r["finished"])):
        groups[row["attack"], row["defense"], tuple(w for w in words(row) if own(w))][row["seed"]] = row
    return [Setting(*of, tuple(by.values())) for of, by in sorted(groups.items())]


def first(found: list[Setting], composer: Composer) -> tuple[list[Setting], list[Setting]]:
    """(one setting for each attack and defense, all others): that of `scale=cpu` where it is measured, else the one with
    the fewest changed keys."""
    groups: dict[tuple, list[Setting]] = defaultdict(list)
    for s in found:
        groups[s.attack, s.defense].append(s)
    chosen = []
    for (attack, defense), of in groups.items():
        cell = Cell({}, (f"experiment={PRESET}", f"attack={attack}", f"defense={defense}"))
        scaled = {w for w in grid.whole(cell, grid.scale(SCALE), composer).words if "." in w.partition("=")[0]}
        chosen.append(min(of, key=lambda s: (set(s.changed) != scaled, len(s.changed), s.changed)))
    return chosen, [s for s in found if s not in chosen]
