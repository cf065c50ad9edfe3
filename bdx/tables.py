"""`bdx table`: a paper's table as it was measured here, laid out. No torch in here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from bdx import grid, results
from bdx.claims import agreement, judged
from bdx.comparison import SCORES, Entry, averages, collect, marks, retrained
from bdx.composer import Composer, resolve
from bdx.errors import UserError, one_of
from bdx.grid import Table
from bdx.layout import BESIDE, FORMATS, Text

PACKAGED = grid.EXPERIMENTS / "results"  # the rows that travel with bdx
USAGE = "bdx table NAME [scale=…] [key=value …] [--format md|csv|tex|html]"
WORDS = """
  NAME        PAPER/TABLE or PAPER/FIG; `bdx sweep` without a name lists them, with one it measures what is missing
  scale=…     smoke, cpu or paper, which it is if nothing is said
  key=value   as `bdx sweep` takes it: a list narrows or widens the grid, attack=badnets,blended; paths.out=… says where
              everything lies
"""


def unit(metric: str) -> tuple[int, int]:
    """What a measured value is multiplied by, and its digits: most are fractions, shown in percent."""
    if metric.startswith("seconds"):
        return 1, 2
    return (1, 4) if metric.endswith("_mse") else (100, 2)


def number(values: list[float], metric: str) -> str:
    """Mean ± sd over seeds, in the metric's unit."""
    if not values:
        return "–"
    factor, digits = unit(metric)
    tail = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{tail}"


def in_print(entry: Entry, metric: str) -> str:
    """The printed number, with its deviation where that is printed too."""
    if (theirs := entry.paper.get(metric)) is None:
        return "–"
    _, digits = unit(metric)
    spread = entry.paper.get(f"{metric}_std")
    return f"{theirs:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def fields(entry: Entry, metrics_: list[str], marked: dict[str, dict[int, str]]) -> list[Text]:
    found = []
    for metric in metrics_:
        values, theirs = entry.values(metric), entry.paper.get(metric)
        factor, digits = unit(metric)
        gap = f"{factor * mean(values) - theirs:+.{digits}f}" if values and theirs is not None and entry.comparable else "–"
        mark = marked.get(metric, {}).get(id(entry), "")
        found += [Text(number(values, metric), mark), Text(in_print(entry, metric)), Text(gap)]
    return found


def laid_out(table: Table, entries: list[Entry], runs: bool = False) -> tuple[list[str], list[list[Text]]]:
    """Head and rows, by attack, the averages last. runs: the ids of the runs behind each line as well."""
    axes = [a for a in table.axes if a != "seed"]
    prints = {m for e in entries for m in e.paper if not m.endswith("_std")} | (
        set() if table.of_picture else {table.claim["metric"]}
    )
    names = [*SCORES, *sorted(prints - set(SCORES))]
    head = [*axes, *(h for m in names for h in (m.upper() if m in SCORES else m, *BESIDE)), "n", *["runs"] * runs]
    rows = []
    for group in by_attack([*entries, *averages(table, entries)]):
        marked = {m: marks(group, m) for m in names}
        for e in group:
            n = f"missing: {e.cell.lacks}" if e.cell.lacks else e.n or str(len(e.ours))
            ids = [Text(" ".join(row["id"] for row in e.ours if "id" in row))] * runs  # an average has none of its own
            rows.append([*(Text(str(e.cell.at.get(a, ""))) for a in axes), *fields(e, names, marked), Text(n), *ids])
    return head, rows


def by_attack(entries: list[Entry]) -> list[list[Entry]]:
    """Entries that are ranked against each other stand together: one attack, and one value of all that makes it."""
    groups: dict[tuple, list[Entry]] = {}
    for e in entries:
        made = tuple((k, v) for k, v in e.cell.at.items() if k.split(".")[0] != "defense")
        attack = e.cell.at.get("attack", "")
        groups.setdefault((("average", e.over), *made[1:]) if attack.startswith("average") else made, []).append(e)
    return list(groups.values())


def notes(table: Table, entries: list[Entry]) -> list[str]:
    """The claim, the agreement, and what the rows were measured on."""
    rows = list({r["id"]: r for e in entries for r in e.ours}.values())
    found = [f"claim: {judged(table, entries)}"]
    if ranks := agreement(entries):
        found.append(
            "Kendall's tau of the defenses, ours against the paper's: " + ", ".join(f"{k} {v:.2f}" for k, v in ranks.items())
        )
    rule = {"of_averages": "the DER of the averaged ACC and ASR", "of_rows": "the mean of the rows' DERs"}[table.average]
    found.append(f"average DER: {rule}, as in the paper; of attacks that are measured, on both sides")
    if not all(e.comparable for e in entries):
        found.append(
            "measured on another data set or net than the printed numbers, or with other settings (the words of the command), "
            "so that no difference is taken and no ranking compared"
        )
    if rows:
        of = {
            k: sorted({str(r.get(k)) for r in rows})
            for k in ("experiment", "seed", "dataset", "arch", "train", "device", "torch")
        }
        days = sorted(r["finished"][:10] for r in rows if r.get("finished"))
        about = "; ".join(f"{k} {', '.join(v)}" for k, v in of.items())
        found.append(f"{len(rows)} rows; {about}; {days[0]} to {days[-1]}" if days else f"{len(rows)} rows; {about}")
    if twice := retrained(rows):
        found.append(twice)
    if lacks := sorted({e.cell.lacks for e in entries if e.cell.lacks}):
        found.append(f"missing: {len([e for e in entries if e.cell.lacks])} cells, for want of {'; '.join(lacks)}")
    return found


@dataclass(frozen=True)
class Measured:
    """A table as it was asked for, every cell of it with its rows, and where things lie."""

    table: Table
    scale: grid.Scale
    entries: list[Entry]
    paths: dict[str, Path]

    @property
    def title(self) -> str:
        return f"{self.table.name}, scale={self.scale.name}: {self.table.title}"


def read(argv: list[str], usage: str) -> Measured:
    """What NAME [scale=…] [key=value …] asks for. usage: what to answer a mistake with."""
    names, words = [a for a in argv if "=" not in a], [a for a in argv if "=" in a]
    if flag := next((n for n in names if n.startswith("-")), None):
        raise UserError(f"{flag}: no such flag; expected `{usage}`")
    if len(names) != 1:
        raise UserError(f"expected `{usage}`; there are {', '.join(grid.experiments())}")
    size = next((w.partition("=")[2] for w in words if w.startswith("scale=")), "paper")
    words = [w for w in words if not w.startswith("scale=")]
    asked, scale, composer = grid.load(names[0]), grid.scale(size), Composer()
    grid.configured(asked, grid.cells(asked, scale, words, composer), words)  # says what is wrong in them
    plain = resolve({"paths": composer.plain(tuple(w for w in words if w.startswith("paths.")))["paths"]})
    paths = {k: Path(v).expanduser() for k, v in plain["paths"].items()}
    found = collect(asked, scale, words, composer, (paths["results"], PACKAGED))
    return Measured(grid.asked(asked, words)[0], scale, found, paths)


def strangers(folder: Path) -> None:
    for path in results.foreign(folder):
        print(f"bdx: {path} is no result row, or not whole; it was left out", file=sys.stderr)


def helped(argv: list[str], usage: str, about: str) -> bool:
    """Whether the user asks for help, which is printed."""
    if asks := bool({"-h", "--help"} & set(argv)):
        print(f"{usage}\n\n{about}\n{WORDS}", end="")
    return asks


def table(argv: list[str]) -> int:
    """`bdx table NAME [scale=…] [key=value …] [--format md|csv|tex|html]`."""
    if helped(argv, USAGE, "a paper's table as it was measured here, beside the printed numbers, and whether the claim holds"):
        return 0
    form, argv = option(argv, "--format", "md")
    one_of("--format", form, FORMATS)
    found = read(argv, USAGE)
    lines = laid_out(found.table, found.entries, runs=form == "csv")
    print(FORMATS[form](found.title, *lines, notes(found.table, found.entries)), end="")
    strangers(found.paths["results"])
    return 0


def option(argv: list[str], name: str, default: str) -> tuple[str, list[str]]:
    """--name VALUE or --name=VALUE, and the words without it."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith(f"{name}="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
    return default, argv
