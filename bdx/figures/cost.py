"""costs: how long each defense takes, as a multiple of plain fine-tuning, from result rows.

Source: Wei et al., Distance-Driven Detoxification, ICCV 2025, arXiv 2411.09585, its figure of times relative to FT, which
prints no numbers.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bdx import results
from bdx.errors import UserError
from bdx.figures.base import grid, keep

EPOCHS = "defense.epochs"
COLUMNS = ["defense", "attack", "backdoor", "seed", "device", "seconds", "ratio", "der"]


def costs(rows: list[dict] | Path | str, path: Path | str, *, reference: str = "ft") -> pd.DataFrame:
    """A line for each run of a defense whose backdoored net was also repaired by `reference` on the same device.

    rows: result rows, or the folder they lie in. Columns: defense · attack · backdoor · seed · device · seconds (of the
    defense alone) · ratio (to the reference's seconds on that net and device; of several runs of it that of as many epochs,
    else the one with the fewest changed keys) · der. Raises UserError where no net was
    repaired by the reference.
    """
    where = rows if isinstance(rows, (str, Path)) else "what was given"
    rows = results.rows(rows) if isinstance(rows, (str, Path)) else rows
    runs = [row for row in rows if row["defense"] != "none"]
    of = lambda row: (row["backdoor"], row.get("device"))
    base: dict[tuple, list[dict]] = {}
    for row in sorted((r for r in runs if r["defense"] == reference and r["seconds_defense"]), key=changed):
        base.setdefault(of(row), []).append(row)
    lines = []
    for row in runs:
        if rivals := base.get(of(row)):
            against = next((r for r in rivals if r.get(EPOCHS) == row.get(EPOCHS)), rivals[0])["seconds_defense"]
            lines.append({**row, "seconds": row["seconds_defense"], "ratio": row["seconds_defense"] / against})
    if not lines:
        have = ", ".join(sorted({row["defense"] for row in runs})) or "none"
        raise UserError(f"costs: no net in {where} was repaired by reference={reference}; there are defenses {have}")
    frame = pd.DataFrame(lines).reindex(columns=COLUMNS).sort_values(["ratio", "defense"]).reset_index(drop=True)
    return keep(frame, path, draw_costs)


def changed(row: dict) -> tuple[int, str]:
    """Runs of one method, those with the fewest changed keys first, always in the same order."""
    return sum(k.startswith("defense.") for k in row), str(row.get("id"))


def draw_costs(frame: pd.DataFrame):
    """Left a dot for each run and a stroke at each defense's median; right DER over the same."""
    figure, axes = grid(1, 2, 4.8, 3.4)
    order = list(frame.groupby("defense")["ratio"].median().sort_values().index)
    for i, name in enumerate(order):
        part = frame[frame["defense"] == name]
        axes[0, 0].plot(part["ratio"].median(), i, "|", ms=18, mew=2, color=f"C{i % 10}")
        axes[0, 0].plot(part["ratio"], [i] * len(part), "o", ms=4, color=f"C{i % 10}")
        axes[0, 1].plot(part["ratio"], 100 * part["der"], "o", ms=4, color=f"C{i % 10}", label=name)
    axes[0, 0].set_yticks(range(len(order)), order)
    axes[0, 0].set_ylim(-0.6, len(order) - 0.4)
    axes[0, 1].set_ylabel("DER (%)")
    axes[0, 1].set_ylim(-3, 103)
    axes[0, 1].legend(fontsize=7)
    for ax in axes[0]:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:.2g}")
        ax.tick_params(axis="x", which="both", labelsize=7, labelrotation=45)
        ax.set_xlabel("seconds, as a multiple of the reference")
        ax.grid(alpha=0.3)
    return figure
