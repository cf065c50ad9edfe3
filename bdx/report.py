"""`bdx report`: a paper's table as one HTML page that needs nothing else; works from the rows alone."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path
from statistics import mean

from bdx import charts, grid, page, plates, recipe, results
from bdx.comparison import SCORES, Entry, averages
from bdx.errors import UserError, one_of
from bdx.layout import Text
from bdx.tables import Measured, helped, laid_out, notes, read, strangers

USAGE = "bdx report NAME [scale=…] [key=value …] [logger=wandb] [--figures]"
ABOUT = """a paper's table with plots, triggers, curves and commands as one HTML page, which lies under paths.out; logger=wandb
sends it, too, logger.project=… says where to; --figures draws the paper's figures first"""
FIRST = 12  # plots of curves that are not folded away
OWN = ("trigger",)  # pictures of a run that have a place of their own on the page


def report(argv: list[str]) -> int:
    """`bdx report NAME [scale=…] [key=value …] [logger=wandb] [--figures]`; the page lies under paths.out. A figure is
    drawn for its page; --figures: and all of the paper's for the page of a table."""
    if helped(argv, USAGE, ABOUT):
        return 0
    every, argv = "--figures" in argv, [w for w in argv if w != "--figures"]
    logger = [w for w in argv if w.startswith(("logger=", "logger."))]
    words = [w for w in argv if w not in logger]
    kind = next((w.partition("=")[2] for w in logger if w.startswith("logger=")), "none")
    one_of("logger", kind, ("none", "wandb"))
    if kind == "none" and (alone := [w for w in logger if w.startswith("logger.")]):
        raise UserError(f"{alone[0]}: nothing is sent anywhere; expected logger=wandb beside it, or neither")
    found = read(words, USAGE)
    path = found.paths["out"] / "reports" / f"{found.table.name.replace('/', '_')}_{found.scale.name}.html"
    drawn = plates.draw(found) if found.table.figure and measured(found) else []
    if every and not found.table.figure:
        plates.draw_paper(found.table.name, words, say=print)
    results.write_atomically(path, text := written(found, words, drawn))
    strangers(found.paths["results"])
    if kind == "wandb":
        send(found, words, logger, text, drawn)
    print(f"{len(rows_of(found))} rows, {len(measured(found))} of {len(found.entries)} cells measured")
    print(f"report   {path}")
    return 0


def measured(found: Measured) -> list[Entry]:
    """Those without defense first: their rows may be other cells' rows, retold, which must not stand in their place."""
    return sorted((e for e in found.entries if e.ours), key=lambda e: e.cell.at.get("defense") != "none")


def rows_of(found: Measured) -> list[dict]:
    """Each row once, the newest last."""
    rows = {r["id"]: r for e in measured(found) for r in e.ours}
    return sorted(rows.values(), key=lambda r: r.get("finished", ""))


def written(found: Measured, words: list[str], drawn: list[plates.Plate]) -> str:
    """The page. words: what the user asked for, to be told as a command; drawn: a figure's own pictures."""
    colour = charts.colours(charts.label(e) for e in found.entries)
    head, rows = laid_out(found.table, found.entries)
    axes = head.index(next(h for h in head if h in ("ACC", found.table.claim["metric"])))
    have = rows_of(found)
    said = [] if have else [page.text("Nothing of this table has been measured yet; the commands below measure it.")]
    legend = "The printed number stands beside ours, then the difference; in percent. Bold: best, underlined: second."
    parts = [
        page.items(notes(found.table, found.entries)), *said,
        page.section("The table", page.text(legend, "soft"), page.table(head, rows, axes)),
        plates.section(found, drawn), heat_map(found), scatter(found, colour), contact_sheet(found), curves(found, colour),
        others(found), missing(found), commands(found, words), hardware(have),
    ]  # fmt: skip
    return page.whole(found.title, [p for p in parts if p])


def heat_map(found: Measured) -> str:
    """DER of every attack under every defense, with the printed one below it."""
    axes = [a for a in found.table.axes if a != "seed"]
    across = "defense" if "defense" in axes else axes[-1]
    place: dict[str, dict[str, Entry]] = defaultdict(dict)
    for e in [*found.entries, *averages(found.table, found.entries)]:
        if e.cell.at.get("defense") != "none" and (e.values("der") or "der" in e.paper):
            place[row_label(e, across)][e.cell.at[across]] = e
    columns = list(dict.fromkeys(c for cells in place.values() for c in cells))
    if not any(e.values("der") for cells in place.values() for e in cells.values()):
        return ""
    rows = [(name, [cell(cells.get(c)) for c in columns]) for name, cells in place.items()]
    known = (
        "Large: ours; small: in print. " if any("der" in e.paper for cells in place.values() for e in cells.values()) else ""
    )
    about = f"{known}50 says that nothing happened, 100 that the backdoor is gone at no cost."
    return page.section("DER, in percent", page.text(about, "soft"), page.heat(["", *columns], rows))


def row_label(entry: Entry, across: str) -> str:
    name = " ".join(v for k, v in entry.cell.at.items() if k not in (across, "seed"))
    return re.sub(r"^average of \d+ of \d+", "average of what is measured", name)


def cell(entry: Entry | None) -> tuple[str, str, str, str] | None:
    if entry is None:
        return None
    theirs = f"{entry.paper['der']:.2f}" if "der" in entry.paper else " "
    if not entry.values("der"):
        return "–", theirs, "transparent", "inherit"
    value = 100 * mean(entry.values("der"))
    return (f"{value:.2f}", theirs, *charts.shade(value, 50, 100))


def scatter(found: Measured, colour: dict[str, str]) -> str:
    if not (plots := charts.trade_offs(found.entries, colour)):
        return ""
    drawn = [e for e in measured(found) if e.cell.at.get("defense") != "none"]
    used = {charts.label(e): colour[charts.label(e)] for e in drawn}
    about = "Ring: the backdoored net; dot: after the defense; cross: after it in print, for the paper's own net."
    return page.section("ACC against ASR", page.text(about, "soft"), page.keys(used), page.panels(plots))


def log(found: Measured, row: dict) -> Path:
    return found.paths["nets"] / f"{row['id']}.log"


def triggers(found: Measured) -> tuple[dict[str, Path], list[str]]:
    """Backdoor -> picture of its trigger, from the first run of it that has left one; and the backdoors without."""
    have, of = {}, {charts.label(e): None for e in measured(found)}
    for e in measured(found):
        for path in (log(found, r) / "trigger.png" for r in e.ours):
            if path.exists():
                have.setdefault(charts.label(e), path)
    return have, [name for name in of if name not in have]


def contact_sheet(found: Measured) -> str:
    have, lacks = triggers(found)
    said = [page.text(f"no picture at hand of {', '.join(lacks)}: a run leaves it beside its net", "soft")] if lacks else []
    if not have and not said:
        return ""
    about = [page.text("Clean, triggered, and their difference × 5 around grey.", "soft")] if have else []
    figures = [page.picture(path, name) for name, path in have.items()]
    return page.section("Triggers", *about, page.panels(figures, wide=True), *said)


def curves(found: Measured, colour: dict[str, str]) -> str:
    got = {r["id"]: charts.read(log(found, r) / "curves.csv", e) for e in measured(found) for r in e.ours}
    plots = charts.curves([c for of in got.values() for c in of], colour)
    if not got:
        return ""
    if not plots:
        return page.section("Curves", page.text("none of the runs has left its curves here (logger=csv keeps them)", "soft"))
    used = {c.label: colour[c.label] for of in got.values() for c in of}
    rest = [page.folded(f"{len(plots) - FIRST} more", page.panels(plots[FIRST:]))] if len(plots) > FIRST else []
    return page.section("Curves", page.keys(used), page.panels(plots[:FIRST]), *rest)


def others(found: Measured) -> str:
    """Figures of the papers that `bdx figure` has drawn for these runs, and what a defense has left."""
    at = {p: e for e in measured(found) for r in e.ours for p in sorted(log(found, r).glob("*.png")) if p.stem not in OWN}
    if not at:
        return ""
    made = [page.picture(p, f"{p.stem}: {charts.label(e)}, {e.cell.at.get('defense', '')}") for p, e in at.items()]
    return page.section("Figures of the runs", page.folded(f"{len(made)} pictures", page.panels(made, wide=True)))


def missing(found: Measured) -> str:
    lacks: dict[str, list[str]] = defaultdict(list)
    for e in found.entries:
        if e.cell.lacks:
            lacks[e.cell.lacks].append(" ".join(e.cell.at.values()))
    still = [e for e in found.entries if not e.ours and not e.cell.lacks and e.cell.words]
    parts = [page.text(f"{len(still)} cells can run and are not measured yet:")] if still else []
    parts += [page.folded("their commands", page.code([command(e) for e in still]))] if still else []
    named = [f"{why}: {', '.join(of)}" for why, of in lacks.items()]
    parts += [page.text("What bdx lacks:"), page.items(named)] if lacks else []
    return page.section("What is missing", *(parts or [page.text("Nothing: every cell is measured.")]))


def command(entry: Entry) -> str:
    several = any(grid.key(w) == "seed" and "," in w for w in entry.cell.words)
    return f"bdx {'-m ' * several}{shlex.join(entry.cell.words)}"


def commands(found: Measured, words: list[str]) -> str:
    whole = [f"bdx {verb} {shlex.join(words)}" for verb in ("sweep", "table", "report")]
    done = [command(e) for e in measured(found) if e.cell.words]
    cells = [page.folded(f"the commands of the {len(done)} measured cells", page.code(done))] if done else []
    return page.section("Commands", page.code(whole), *cells)


def hardware(rows: list[dict]) -> str:
    """What the rows were measured on, and which they are."""
    if not rows:
        return ""
    keys = ("device", "precision", "torch", "lightning", "commit", "dataset", "arch", "train")
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row.get(k, "?")) for k in keys)].append(row)
    lines = []
    for of, group in groups.items():
        days = sorted(r["finished"][:10] for r in group if r.get("finished")) or ["?"]
        seconds = sum(r.get("seconds_defense", 0) for r in group)
        lines.append([Text(t) for t in (*of, days[0], days[-1], f"{seconds:.0f}", str(len(group)))])
    head = [*keys, "from", "to", "seconds of defenses", "rows"]
    ids = page.folded("ids of the rows", page.code([f"{r['id']}  backdoor {r.get('backdoor', '?')}" for r in rows]))
    return page.section("Versions and hardware", page.table(head, lines, len(keys) + 2), ids)


# what W&B is sent


def send(found: Measured, words: list[str], logger: list[str], text: str, drawn: list[plates.Plate]) -> None:
    """The table as a W&B run in the group of its cells; the same table under the same words is the same run."""
    from omegaconf import OmegaConf

    from bdx.build import instantiate
    from bdx.configure import compose

    plain = OmegaConf.to_container(compose(logger).logger, resolve=True)
    tracker = instantiate(plain, allowed=("bdx.tracking.",))
    id = run_id(words)
    head, lines = laid_out(found.table, found.entries)
    facts = ["attack", "defense", "dataset", "arch", "seed", *SCORES, "seconds_defense", "device", "torch", "commit", "id"]
    rows = rows_of(found)
    frames = {
        "table": (head, [[t.text for t in line] for line in lines]),
        "cells": (facts, [[row.get(k) for k in facts] for row in rows]),
        "weights": (["run", "sha256", "backdoor", "sha256 of the backdoor"], [hashes(found, row) for row in rows]),
    }
    about = {"table": found.table.name, "scale": found.scale.name, "cells": len(found.entries)}
    about["measured"] = len(measured(found))
    shown = triggers(found)[0] | plates.shown(found, drawn)
    pages = {"report": text} | ({"der": page.whole(found.title, [heat])} if (heat := heat_map(found)) else {})
    tracker.table(found.table.name, id, found.paths["out"] / "reports", about, frames, pages, shown)


def run_id(words: list[str]) -> str:
    """Of the W&B run that carries the table."""
    kept = (w for w in words if not w.startswith("paths.") and w != "scale=paper")  # which is the default
    return recipe.digest({"report": sorted(recipe.in_order(w) for w in kept)})


def hashes(found: Measured, row: dict) -> list[str]:
    """(run, SHA-256 of its net, backdoor, SHA-256 of its weights); empty where the files are not at hand."""
    backdoor = row.get("backdoor", "")
    net, made = found.paths["nets"] / row["id"] / "net.json", found.paths["store"] / backdoor / "meta.json"
    return [row["id"], results.seal(net), backdoor, results.seal(made)]
