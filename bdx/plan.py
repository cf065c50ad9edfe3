"""plan: what a table's cells are, which of them have a row, what the others lack, how long it will take. No torch in here."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from bdx import grid, results
from bdx.comparison import printed_cells
from bdx.composer import Composer
from bdx.errors import UserError
from bdx.forecast import estimate, spoken
from bdx.grid import Cell

CAME = grid.EXPERIMENTS / "results"  # the rows that travel with bdx


@dataclass(frozen=True)
class Plan:
    """cells: of the table, with ids. paths: where rows, weights and images lie. without: data sets that cannot be had, and
    why."""

    cells: list[Cell]
    paths: dict[str, Path]
    without: dict[str, str] = field(default_factory=dict)

    @property
    def runnable(self) -> list[Cell]:
        """Each run once, though it may stand in several cells."""
        return list({c.run or c.words: c for c in self.cells if not c.lacks}.values())

    @property
    def todo(self) -> list[Cell]:
        return [c for c in self.runnable if c.run is None or not results.find(self.paths["results"], c.run)]

    def stored(self, backdoor: str | None) -> bool:
        return backdoor is not None and (self.paths["store"] / backdoor / "meta.json").exists()


def plan(table: grid.Table, scale: grid.Scale, words: list[str], composer: Composer, *, fetch: bool) -> Plan:
    """fetch: make or download the images where they are not there; else such cells stay without ids."""
    found = grid.cells(table, scale, words, composer)
    cfg = grid.configured(table, found, words)
    if table.only_printed and table.rows:
        found = printed_cells(table, found)
    if all(c.lacks for c in found):
        raise grid.none_runs(table, found)
    paths = {k: Path(v).expanduser() for k, v in cfg.paths.items()}
    without: dict[str, UserError] = {}
    found = [identified(c, composer, paths["data"], fetch, without) for c in found]
    if without and all(c.lacks for c in found):
        raise next(iter(without.values()))
    return Plan(found, paths, {name: str(e) for name, e in without.items()})


def identified(cell: Cell, composer: Composer, data: Path, fetch: bool, without: dict[str, UserError]) -> Cell:
    """The cell with its ids. without: data sets that cannot be had, and why; what needs one of those lacks it."""
    if cell.lacks:
        return cell
    plain = composer.plain(cell.words)
    name = plain["dataset"]["name"]
    if not fetch and not any(any(data.glob(f"{name}{rest}.safetensors")) for rest in ("", "-*")):
        return cell
    try:
        images = None if name in without else grid.sha256(plain)
    except UserError as e:
        without[name] = e
    if name in without:
        return replace(cell, lacks=f"the images of {name}")
    run, backdoor = grid.ids(cell.words, composer, images)
    return replace(cell, run=run, backdoor=backdoor)


def show(name: str, plan: Plan, todo: list[Cell], composer: Composer, say) -> None:
    """The plan, in a few lines."""
    runnable, missing = plan.runnable, [c for c in plan.cells if c.lacks]
    say(f"{name}: {len(plan.cells)} cells, {len(runnable)} can run, {len(runnable) - len(todo)} done, {len(todo)} to do")
    wanted = {c.backdoor for c in runnable if c.run}
    new = {c.backdoor for c in todo if c.run and not plan.stored(c.backdoor)}
    if wanted:
        say(f"backdoors: {len(wanted)}, of which {len(new)} are still to be trained")
    if todo:
        seconds, unknown = estimate(todo, plan.paths["results"], plan.stored, composer)
        guess = f"; a guess for {', '.join(unknown)}, of which there is none" * bool(unknown)
        told = "no earlier row tells" if seconds is None else f"about {spoken(seconds)} of one slot, by earlier rows{guess}"
        say(f"time: {told}")
    if came := sum(bool(c.run and results.find(CAME, c.run)) for c in todo):
        say(f"rows: of {came} of these one came with bdx, which `bdx table` shows; they are measured here all the same")
    if later := sum(c.run is None for c in runnable):
        which = "these" if later == len(runnable) else f"{later} of these"
        say(f"images: not there yet for {which}, so that none of them can be done; the sweep itself makes or downloads them")
    for why in plan.without.values():
        say(f"images: {why}", markup=False)
    if missing:
        say(f"missing: {len(missing)} cells, for want of {wanting(missing)}")
    if others := [p.name for p in results.foreign(plan.paths["results"])]:
        say(f"results: {len(others)} files there are no rows: {', '.join(others[:5])}{' …' * (len(others) > 5)}", markup=False)


def listed(todo: list[Cell], say) -> None:
    """The cells to do, those of a line being alike but in the last axis."""
    lines = defaultdict(list)
    for cell in todo:
        *first, (last, value) = cell.at.items()
        lines[", ".join(f"{k}={v}" for k, v in first), last].append(value)
    for (first, last), values in lines.items():
        say(f"  to do: {first}{', ' * bool(first)}{last}={','.join(values)}", markup=False)


def wanting(missing: list[Cell]) -> str:
    """What bdx lacks, by name, and in how many cells."""
    lacking = defaultdict(int)
    for cell in missing:
        for lack in cell.lacks.split(", "):
            lacking[lack] += 1
    return ", ".join(f"{k} ({n})" for k, n in sorted(lacking.items()))


def overview(scale: str, say) -> int:
    """Every table and figure, with the cells that can run, and what the others lack."""
    composer, total = Composer(), [0, 0]
    for name in (have := grid.experiments()):
        table = grid.load(name)
        found = grid.cells(table, grid.scale(scale), [], composer)
        found = printed_cells(table, found) if table.only_printed and table.rows else found
        missing = [c for c in found if c.lacks]
        counted = len(found) - len(missing), len(found)
        total = [a + b for a, b in zip(total, counted, strict=True)]
        lacks = f"  (missing: {wanting(missing)})" if missing else ""
        say(f"{name:<18} {counted[0]:>3} of {counted[1]:>3} cells can run  {table.title}{lacks}", markup=False)
    say(f"{len(have)} experiments at scale={scale}: {total[0]} of {total[1]} cells can run, {total[1] - total[0]} are missing")
    return 0
