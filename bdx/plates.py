"""`bdx figure PAPER/FIG`: a paper's figure as an experiment. Its runs are a sweep's, what is drawn of them is bdx.figures'.

No torch until something is drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bdx import charts, grid, page
from bdx.claims import worded
from bdx.comparison import Entry, norm
from bdx.errors import UserError, nearest
from bdx.tables import Measured, helped, read

USAGE = "bdx figure PAPER/FIG [scale=…] [key=value …]"
OF_ONE = "bdx figure NAME [RUN_ID] [key=value …]    `bdx figure` lists these NAMEs; a key is the picture's own or a run's"


@dataclass(frozen=True)
class Plate:
    """One picture: what bdx.figures.`function` draws of the runs `rows` into path.png, from path.csv. lacks: why it is not
    there."""

    function: str
    about: str
    rows: tuple[dict, ...]
    path: Path
    lacks: str = ""

    @property
    def net(self) -> str:
        """What it is of, whatever the seed."""
        return re.sub(r" seed=\d+$", "", self.about)

    @property
    def picture(self) -> Path:
        return self.path.parent / f"{self.path.name}.png"


def figure(argv: list[str]) -> int:
    """`bdx figure PAPER/FIG [scale=…] [key=value …]`; a name without a paper is one of bdx.figures, of a single run."""
    if helped(argv, f"{USAGE}\n{OF_ONE}", "a paper's figure, of its runs, or one kind of picture, of a single run"):
        return 0
    if not argv or "/" not in argv[0]:
        from bdx import figures

        return figures.figure(argv)
    found, given = asked(argv)
    made = draw(found, given)
    for plate in made:
        print(f"{plate.about}: {plate.lacks}" if plate.lacks else f"{plate.picture}, drawn from {plate.path}.csv")
    print(f"claim: {judged(found, made)}")
    if lacks := [p for p in made if p.lacks]:
        print(f"{len(lacks)} of {len(made)} pictures are wanting; `bdx sweep {' '.join(argv)}` makes the runs")
    return 1 if lacks else 0


def asked(argv: list[str]) -> tuple[Measured, list[str]]:
    """(the figure with its runs, words that set what its functions take themselves)."""
    table = grid.load(argv[0])
    if not table.figure:
        raise UserError(f"{argv[0]} is a table: expected `{USAGE}`; figures are {', '.join(grid.figures())}")
    from bdx import figures

    of_runs, left = ([w for w in argv[1:] if w.startswith("seed=") == x] for x in (True, False))
    if path := next((w for w in left if w.startswith("path=")), None):
        raise UserError(f"{path}: the pictures of {argv[0]} lie below paths.out, which paths.out=… sets")
    given = left
    for name in table.figure:
        _, left = figures.own(function(name), left)
    return read([argv[0], *of_runs, *left], USAGE), [w for w in given if w not in left]


def function(name: str):
    from bdx.figures import OF_RUN

    known = {f.__name__: f for f in OF_RUN}
    if name not in known:
        raise UserError(f"figure: {name}: no such function of bdx.figures{nearest(name, known)}")
    return known[name]


def plates(found: Measured) -> list[Plate]:
    """What there is to draw: one picture of all rows, or one for each backdoored net; none where nothing is measured."""
    from bdx.figures import OF_ROWS

    folder = found.paths["out"] / "figures" / f"{found.table.name.replace('/', '_')}_{found.scale.name}"
    made = []
    for name in found.table.figure:
        for about, rows in groups(found.entries, whole := function(name) in OF_ROWS).items():
            if not whole:  # a cell may have rows that travelled here without their nets
                rows = [r for r in rows if (found.paths["nets"] / r["id"]).exists()] or rows
            path = folder / re.sub(r"[^\w.=-]+", "_", f"{name} {about}".strip())
            made.append(Plate(name, f"{name}: {about}" if about else name, tuple(rows), path))
    return made


def groups(entries: list[Entry], whole: bool) -> dict[str, list[dict]]:
    """What a picture is of -> its rows, those of undefended nets first."""
    found: dict[str, list[dict]] = {}
    seeds = {r["seed"] for e in entries for r in e.ours}
    for e in sorted(entries, key=lambda e: e.cell.at.get("defense") != "none"):
        for row in e.ours:
            if e.cell.at.get("defense") == "none" and row["defense"] != "none":
                continue  # another cell's row, retold: it stands there itself
            about = "" if whole else charts.label(e) + (f" seed={row['seed']}" if len(seeds) > 1 else "")
            found.setdefault(about, []).append(row)
    return found


def draw(found: Measured, given: list[str] = ()) -> list[Plate]:
    """Draw all that there is to draw. given: words for the functions, before those of the figure's file. A picture whose
    nets are not here, or do not fit it, says why."""
    from bdx.figures import own

    made = []
    for plate in plates(found):
        drawing = function(plate.function)
        set_here = [f"{k}={v}" for k, v in found.table.figure[plate.function].items()]
        options, _ = own(drawing, [*set_here, *given])
        try:
            of(drawing, plate, found.paths, options)
            made.append(plate)
        except UserError as e:
            made.append(Plate(plate.function, plate.about, plate.rows, plate.path, str(e)))
    if not made:
        lacks = sorted({e.cell.lacks for e in found.entries if e.cell.lacks})
        why = f"no cell can run, for want of {'; '.join(lacks)}" if lacks else "none of its runs is done"
        raise UserError(f"{found.table.name}: {why} at scale={found.scale.name}; `bdx sweep` makes them")
    return made


def of(drawing, plate: Plate, paths: dict[str, Path], options: dict) -> None:
    from bdx.figures import OF_ROWS, OF_RUN, Several

    if drawing in OF_ROWS:
        drawing(list(plate.rows), path=plate.path, **options)
        return
    run = Several([row["id"] for row in plate.rows], [f"paths.{k}={v}" for k, v in paths.items()])
    what, about = OF_RUN[drawing](run)
    drawing(*what, path=plate.path, **about, **options)


# the claim, where it is about what the pictures show


def judged(found: Measured, made: list[Plate]) -> str:
    """From the figures' own data, one number for each picture; or from the rows, as a table's claim."""
    from bdx.claims import judged as by_rows
    from bdx.figures import read as frame

    if not found.table.of_picture:
        return by_rows(found.table, found.entries)
    cells: dict[str, dict[int, float]] = {}  # seeds of one net are no further evidence on other nets
    for plate in (p for p in made if not p.lacks):
        if (value := difference(found.table.claim, frame(plate.path))) is not None:
            cells.setdefault(plate.net, {})[plate.rows[0]["seed"]] = value
    lacks = [p for p in made if p.lacks]
    drawn = sum(map(len, cells.values()))
    wanted = len({*cells, *(p.net for p in lacks)})
    return worded(found.table.claim, list(cells.values()), wanted, f"{drawn} of {drawn + len(lacks)} pictures")


def difference(claim: dict, frame) -> float | None:
    """By how much the claim holds in one figure's data, from means over the lines that it names; None: not its subject."""
    other, sign = (claim["above"], 1) if "above" in claim else (claim["below"], -1)
    sides = [mean(frame, claim["metric"], side) if isinstance(side, dict) else side for side in (claim["of"], other)]
    return None if None in sides else sign * (sides[0] - sides[1])


def mean(frame, metric: str, where: dict) -> float | None:
    if not {metric, *where} <= set(frame.columns):
        return None
    for key, value in where.items():
        frame = frame[frame[key].map(norm) == norm(value)]
    return float(frame[metric].mean()) if len(frame) else None


# on the page of a report


def draw_paper(name: str, words: list[str], say) -> None:
    """Draw all figures of the paper that table `name` stands in, of what runs there are. words: scale and paths count."""
    for of in paper(name):
        try:
            found = read([of, *(w for w in words if w.startswith(("scale=", "paths.")))], USAGE)
            for plate in draw(found):
                say(f"{of}: {plate.about}: {plate.lacks or plate.picture}")
        except UserError as e:
            say(f"{of}: {e}")


def paper(name: str) -> list[str]:
    """The figures of the paper that experiment `name` stands in."""
    return [other for other in grid.figures() if other.startswith(f"{name.partition('/')[0]}/")]


def section(found: Measured, drawn: list[Plate]) -> str:
    """The figures of the paper: a figure's own, or, on a table's page, those that have been drawn and how to draw the
    others."""
    if found.table.figure:
        named = [page.text(f"{p.about}: {p.lacks}", "soft") for p in drawn if p.lacks]
        claim = [page.text(f"claim: {judged(found, drawn)}")] if found.table.of_picture else []
        return page.section("The figure", *claim, sheet(shown(found, drawn)), *named)
    if not (have := paper(found.table.name)):
        return ""
    rest = [name for name in have if not pictures(name, found)]
    how = [f"bdx {verb} {name} scale={found.scale.name}" for name in rest for verb in ("sweep", "figure")]
    parts = [sheet(made)] if (made := shown(found, [])) else []
    parts += [page.folded(f"{len(rest)} figures are not drawn yet; their commands", page.code(how))] if rest else []
    return page.section("Figures of the paper", *parts)


def sheet(made: dict[str, Path]) -> str:
    return page.panels([page.picture(path, about) for about, path in made.items()], wide=True)


def shown(found: Measured, drawn: list[Plate]) -> dict[str, Path]:
    """Caption -> picture: a figure's own, or what has been drawn of the paper of a table."""
    if found.table.figure:
        return {p.about: p.picture for p in drawn if not p.lacks}
    return {k: v for name in paper(found.table.name) for k, v in pictures(name, found).items()}


def pictures(name: str, found: Measured) -> dict[str, Path]:
    """What `bdx figure` has drawn of `name` at this scale: caption -> picture."""
    folder = found.paths["out"] / "figures" / f"{name.replace('/', '_')}_{found.scale.name}"
    return {f"{name} {p.stem.replace('_', ' ')}": p for p in sorted(folder.glob("*.png"))}
