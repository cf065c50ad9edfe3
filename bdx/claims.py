"""What a paper claims, judged by the rows, and whether our ranking of the defenses is the paper's. No torch in here."""

from __future__ import annotations

from statistics import mean

from bdx.agreement import tau, verdict
from bdx.comparison import SCORES, Entry, norm
from bdx.grid import Table


def agreement(entries: list[Entry]) -> dict[str, float]:
    """Attack, and whatever else stands beside the defense -> tau between our ranking of the defenses there and the paper's,
    by DER, or by ASR where it prints no DER."""
    groups: dict[str, list[Entry]] = {}
    for e in entries:
        if e.cell.at.get("defense") != "none" and e.comparable:
            others = {k: v for k, v in e.cell.at.items() if k != "seed" and k.split(".")[0] != "defense"}
            where = ", ".join(v if k == "attack" else f"{k}={v}" for k, v in others.items())
            groups.setdefault(where, []).append(e)
    found = {}
    for where, here in groups.items():
        metric = "der" if any("der" in e.paper for e in here) else "asr"
        pairs = [(mean(e.values(metric)), e.paper[metric]) for e in here if e.values(metric) and metric in e.paper]
        if len(pairs) > 2 and (value := tau(pairs)) is not None:
            found[where] = value
    return found


def pairs(table: Table, entries: list[Entry]) -> tuple[list[dict[int, float]], int]:
    """(for each measured point of the grid: seed -> by how much the claim holds there, how many points can be measured). A
    positive number speaks for the claim; a point is what the claim's own axes leave of a cell."""
    claim, metric = table.claim, table.claim["metric"]
    other, sign = (claim["above"], 1) if "above" in claim else (claim["below"], -1)
    found: dict[tuple, dict[int, float]] = {}
    rivals: dict[tuple, dict[int, dict]] = {}
    for e in entries if isinstance(other, dict) else ():
        if chosen(e, other) and not e.cell.lacks:
            rivals.setdefault(rest(e, claim["of"]), {}).update({r["seed"]: r for r in e.ours})
    for e in entries:
        point = rest(e, claim["of"])
        if not chosen(e, claim["of"]) or e.cell.lacks or (isinstance(other, dict) and point not in rivals):
            continue
        here = found.setdefault(point, {})
        for r in e.ours:
            against = rivals[point].get(r["seed"], {}).get(metric) if isinstance(other, dict) else other
            if None not in (r.get(metric), against):
                here[r["seed"]] = sign * (r[metric] - against)
    return [of for of in found.values() if of], len(found)


def chosen(entry: Entry, where: dict) -> bool:
    return all(norm(entry.cell.at.get(k)) == norm(v) for k, v in where.items())


def rest(entry: Entry, axes: dict) -> tuple:
    return tuple((k, v) for k, v in entry.cell.at.items() if k not in axes and k != "seed")


def judged(table: Table, entries: list[Entry]) -> str:
    if table.of_picture:
        return f"{table.claim['says']}: seen in what `bdx figure {table.name}` draws"
    found, wanted = pairs(table, entries)
    return worded(table.claim, found, wanted, f"{len(found)} of {wanted} cells")


def worded(claim: dict, found: list[dict[int, float]], wanted: int, counted: str) -> str:
    """found: as of `pairs`; counted: how many there are. A claim against a number is one about every cell."""
    word, p = verdict(found, wanted, every=not isinstance(claim.get("above", claim.get("below")), dict))
    each = [mean(of.values()) for of in found]
    scored = each and claim["metric"] in SCORES
    about = f"mean {100 * mean(each):+.2f} points, least {100 * min(each):+.2f}" if scored else ""
    p = f"p = {p:.3f}" if p is not None else ""
    return f"{claim['says']}: {word} ({', '.join(t for t in (counted, about, p) if t)})"
