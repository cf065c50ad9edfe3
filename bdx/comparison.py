"""The rows that were measured, beside the numbers that a paper prints. No torch in here.

A cell's row is found by its id, so that no row of another scale, net or data set can stand in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from bdx import grid, metrics, results
from bdx.composer import Composer
from bdx.grid import Cell, Table

SCORES = ("acc", "asr", "der")
MAKES = ("attack", "defense", "dataset", "arch", "train", "experiment")  # groups of keys that make a cell what it is


@dataclass(frozen=True)
class Entry:
    """One cell: ours is one row per seed (an undefended one made from what others measured before), paper's in percent.
    comparable: whether both are of one data set and net. Of an average: over which attacks, and its n in
    words, where attacks differ in theirs from the least to the most."""

    cell: Cell
    ours: list[dict] = field(default_factory=list)
    paper: dict[str, float] = field(default_factory=dict)
    comparable: bool = True
    over: frozenset[str] = frozenset()
    n: str = ""

    def values(self, metric: str) -> list[float]:
        return [row[metric] for row in self.ours if row.get(metric) is not None]


def norm(value) -> str:
    """0.10 and 0.1 are one value, as 500 and 500.0."""
    try:
        return repr(float(value))
    except (TypeError, ValueError):
        return str(value)


def at(row: dict, table: Table, names: dict) -> dict[str, str]:
    """Axis -> value of a printed row. A variant such as eps=0.1;note brings columns of its own."""
    columns = {k: row[k] for k in ("attack", "defense", "dataset", "poison_ratio", "clean_ratio")} | {"arch": row["model"]}
    columns |= {"model": row["model"]} | {k: v for k, _, v in (p.partition("=") for p in row["variant"].split(";"))}
    found = {k: names.get(k, {}).get(columns[k], columns[k]) for k in ("attack", "defense", "dataset", "arch")}
    for column, to in table.printed.items():
        value = columns.get(column)
        if value is None:
            continue
        if isinstance(to, str):
            found[to] = names.get(to, {}).get(value, value)
        else:
            found |= {norm(k): v for k, v in to.items()}.get(norm(value), {})
    return {k: norm(v) for k, v in found.items()}


def printed(table: Table) -> list[tuple[dict[str, str], str, float]]:
    """(where, metric, number) of every number that the paper prints, averages included."""
    names = grid.read(grid.EXPERIMENTS / "names.yaml")
    found = []
    for row in table.rows:
        if row["metric"] in names["metric"]:
            found.append((at(row, table, names), names["metric"][row["metric"]], float(row["value"])))
    return found


def same(place: dict[str, str], where: dict) -> bool:
    """Whether a printed place is the one of `where`; what only one of them names does not matter."""
    return all(norm(v) == place[k] for k, v in where.items() if k in place)


def key_of(word: str) -> str:
    return grid.key(word).split(".")[0]


def fixed(table: Table) -> dict[str, str]:
    return {grid.key(w): w.partition("=")[2] for w in table.words}


def printed_cells(table: Table, cells: list[Cell]) -> list[Cell]:
    places = [place for place, *_ in printed(table)]
    return [c for c in cells if any(same(p, fixed(table) | c.at) and set(c.at) <= set(p) | {"seed"} for p in places)]


def collect(table: Table, scale: grid.Scale, words: list[str], composer: Composer, folders: Iterable[Path]) -> list[Entry]:
    """Every cell of the table with its rows, whatever their seed, and its printed numbers."""
    rows = {row["id"]: row for row in results.rows(*folders)}
    whole, (table, left) = table, grid.asked(table, words)
    other = [w for w in left if key_of(w) in MAKES and fixed(whole).get(grid.key(w)) != w.partition("=")[2]]
    other += [k for k in table.axes if k not in whole.axes and key_of(k) in MAKES]  # several values: an axis of the user's
    cells = grid.cells(table, scale, words, composer)
    cells = printed_cells(table, cells) if table.only_printed and table.rows else cells
    seeds = sorted({row["seed"] for row in rows.values()}) if not any(grid.key(w) == "seed" for w in words) else [None]
    images = {}
    for row in rows.values():
        images.setdefault(row["dataset"], set()).add(row["data_sha256"])
    found, numbers = [], printed(table)
    for cell in [*cells, *([] if "none" in whole.axes.get("defense", ()) else unlisted(table, cells))]:
        theirs = [of for of in numbers if same(of[0], fixed(table) | cell.at)]
        ours = [] if cell.lacks or not cell.words else measured(cell, seeds, images, rows, composer)
        one = all({row[k] for row in ours} <= {place[k] for place, *_ in theirs} for k in ("dataset", "arch"))
        found.append(Entry(cell, ours, {metric: n for _, metric, n in theirs}, (one and not other) or not theirs))
    found = pooled(found)
    return [undefended(e, found) for e in found]


def pooled(entries: list[Entry]) -> list[Entry]:
    """One entry for all seeds, where the user has named several."""
    found: dict[tuple, Entry] = {}
    for e in entries:
        place = {k: v for k, v in e.cell.at.items() if k != "seed"}
        if (key := tuple(place.items())) in found:
            words = tuple(f"{w},{e.cell.at['seed']}" if grid.key(w) == "seed" else w for w in found[key].cell.words)
            cell = replace(found[key].cell, words=words)
            found[key] = replace(found[key], cell=cell, ours=[*found[key].ours, *e.ours])
        else:
            found[key] = replace(e, cell=replace(e.cell, at=place))
    return list(found.values())


def unlisted(table: Table, cells: list[Cell]) -> list[Cell]:
    """Nets without defense that the paper prints and the grid need not hold: what each row says of before."""
    found = {}
    for place, *_ in printed(table):
        if place["defense"] == "none" and place["attack"] != "avg" and not any(same(place, fixed(table) | c.at) for c in cells):
            at = {k: place[k] for k in table.axes if k in place}
            if not all(norm(v) in map(norm, table.axes[k]) for k, v in at.items() if k != "defense"):
                continue  # the user asked for a part
            found[tuple(at.items())] = Cell(at, ())
    return list(found.values())


def measured(cell: Cell, seeds: list, images: dict, rows: dict, composer: Composer) -> list[dict]:
    """The rows of a cell, by id: for each seed and each version of the images that any row names."""
    name = composer.plain(cell.words)["names"]["dataset"]
    known = images.get(name, ())
    found = (rows.get(id) for data in known for id in grid.run_ids(cell.words, composer, data, seeds))
    return [row for row in found if row]


def undefended(entry: Entry, entries: list[Entry]) -> Entry:
    """Every row says what its net was before any repair: for each seed the newest of them counts, as in the README's tables."""
    if entry.cell.at.get("defense") != "none":
        return entry
    others = {k: v for k, v in entry.cell.at.items() if k != "defense"}
    near = [e for e in entries if all(norm(e.cell.at[k]) == norm(v) for k, v in others.items())]
    newest = sorted((row for e in near for row in e.ours), key=lambda row: row["finished"])
    by_seed = {row["seed"]: row | {"acc": row["acc_before"], "asr": row["asr_before"]} for row in newest}
    ours = [row | {"der": None} for row in by_seed.values()]  # 50 says nothing, and no paper prints it
    return replace(entry, ours=ours, comparable=all(e.comparable for e in near))


def averages(table: Table, entries: list[Entry]) -> list[Entry]:
    """Over the attacks, one entry for each other point of the grid: of ours over what is measured, of the paper's over the
    same attacks, both by the paper's own rule. At `attack` it says over how many. One value for each seed that all of these
    attacks have; of the seeds' means where they share no two."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple((k, v) for k, v in entry.cell.at.items() if k != "attack"), []).append(entry)
    found = []
    for key, of in groups.items():
        have = [e for e in of if e.ours]
        place = Cell({"attack": f"average of {len(have)} of {len(of)}"} | dict(key), ())
        by_seed = [{row["seed"]: row for row in e.ours} for e in have]
        shared = sorted(set.intersection(*map(set, by_seed))) if have else []
        counts = sorted({len(e.ours) for e in have})
        if len(shared) > 1:
            ours, n = [means([rows[s] for rows in by_seed], table.average) for s in shared], str(len(shared))
        else:
            ours = [means([mine(e) for e in have], table.average)] if have else []
            n = "–".join(map(str, dict.fromkeys((counts or [0])[:: max(1, len(counts) - 1)])))
        if dict(key).get("defense") == "none":
            ours = [{k: v for k, v in row.items() if k != "der"} for row in ours]
        over = frozenset(e.cell.at.get("attack") for e in have)
        one = all(e.comparable for e in have)
        paper = theirs(have or of, entries, table.average)
        if len(have) in (0, len(of)):  # of all attacks there may be a printed average where their numbers are lost
            paper = stated(table, dict(key)) | paper
        found.append(Entry(place, ours, paper, one, over, n))
    return found if "attack" in table.axes and len(table.axes["attack"]) > 1 else []


def stated(table: Table, at: dict[str, str]) -> dict[str, float]:
    """The averages that the paper itself prints, at this point of the other axes."""
    where = {k: v for k, v in (fixed(table) | at).items() if k != "attack"}
    return {metric: n for place, metric, n in printed(table) if place["attack"] == "avg" and same(place, where)}


def mine(entry: Entry) -> dict[str, float]:
    keys = ("acc", "asr", "der", "acc_before", "asr_before")
    return {k: mean(entry.values(k)) for k in keys if entry.values(k)}


def theirs(of: list[Entry], entries: list[Entry], rule: str) -> dict[str, float]:
    """The average of the printed numbers; its DER needs those without defense."""
    bare = [e for e in entries if e.cell.at.get("defense") == "none"]
    rows = []
    for entry in of:
        base = {} if entry in bare else next((e.paper for e in bare if alike(entry, e)), {})
        rows.append({k: v / 100 for k, v in (entry.paper | {f"{k}_before": v for k, v in base.items()}).items()})
    return {k: 100 * v for k, v in means(rows, rule).items()}


def alike(entry: Entry, bare: Entry) -> bool:
    """Whether the undefended net `bare` is the one that `entry` repairs: what stands beside the defense is the same."""
    return all(norm(entry.cell.at.get(k)) == norm(v) for k, v in bare.cell.at.items() if k.split(".")[0] != "defense")


def means(rows: list[dict], rule: str) -> dict[str, float]:
    """acc, asr and der averaged over rows, as far as all of them have it."""
    found = {k: mean(r[k] for r in rows) for k in ("acc", "asr") if all(r.get(k) is not None for r in rows)}
    if rule == "of_rows" and rows and all(r.get("der") is not None for r in rows):
        found["der"] = mean(r["der"] for r in rows)
    elif rows and all(r.get(k) is not None for r in rows for k in ("acc", "asr", "acc_before", "asr_before")):
        found["der"] = metrics.mean_der(rows, rule)
    return found


def less_is_better(metric: str) -> bool:
    return metric == "asr" or metric.startswith("seconds") or metric.endswith("_mse")


def marks(entries: list[Entry], metric: str) -> dict[int, str]:
    """id() of an entry -> best or second among the defenses of one attack; the undefended net is none."""
    rivals = [e for e in entries if e.values(metric) and e.cell.at.get("defense") != "none"]
    by = sorted({round(mean(e.values(metric)), 6) for e in rivals}, reverse=not less_is_better(metric))
    place = dict(zip(by, ("best", "second"), strict=False)) if len(by) > 1 else {}
    return {id(e): mark for e in rivals if (mark := place.get(round(mean(e.values(metric)), 6)))}


def retrained(rows: Iterable[dict]) -> str | None:
    """A sentence on recipes whose net was trained more than once, where rows of one attack are of different weights: on
    another machine or torch one seed gives other ones. Rows say which: by their net's scores before any repair."""
    nets: dict[tuple, set[tuple]] = {}
    for r in rows:
        if r.get("backdoor"):
            nets.setdefault((r["attack"], r["backdoor"]), set()).add((r["acc_before"], r["asr_before"]))
    twice = {attack: sorted(scores, key=str) for (attack, _), scores in nets.items() if len(scores) > 1}
    if not twice:
        return None
    pair = lambda scores: " / ".join("–" if s is None else f"{100 * s:.2f}" for s in scores)
    found = "; ".join(f"{attack} {', '.join(map(pair, scores))}" for attack, scores in sorted(twice.items()))
    return f"trained more than once by one recipe (ACC / ASR before; each DER is against its own net): {found}"
