"""depth_curve: ACC and ASR over the place where the polarizer stands, from result rows.

Source: Zhu et al., Neural Polarizer, NeurIPS 2023, arXiv 2306.16697; Fig. 3.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from bdx import places, results
from bdx.archs.base import Classifier
from bdx.configure import compose, options
from bdx.errors import UserError
from bdx.figures.base import grid, keep


def depth_curve(rows: list[dict] | Path | str, path: Path | str, *, net: Classifier | None = None) -> pd.DataFrame:
    """A line for each backdoor and each defense with a polarizer: ACC and ASR (fractions) over `defense.layer`.

    rows: result rows, or the folder they lie in. Rows belong to one line where they share the backdoored net, the
    defense's name and every value given by hand but defense.layer. net: the architecture of the rows; the places are
    then modules in the order in which they run. Without it depths come first, and names in alphabetical order after them.
    Columns: line · backdoor · layer · position (0, 1, …) · acc, asr · acc_before, asr_before. Draws what rows there are;
    raises UserError where there are none.
    """
    where = rows if isinstance(rows, (str, Path)) else "what was given"
    rows = results.collect(rows).to_dict("records") if isinstance(rows, (str, Path)) else rows
    points = [point(row) for row in rows if layer_of(row["defense"]) and not pd.isna(row["asr"])]
    if not points:
        raise UserError(
            f"depth_curve: there is no row of a defense with a polarizer in {where}; make some, "
            "as by `bdx -m defense=npd defense.layer=shallow,middle,third_to_last,penultimate,last`"
        )
    table = pd.DataFrame(points)
    table["layer"], order = in_order(table["layer"], net)
    table["position"] = table["layer"].map(order)
    table = table.sort_values(["line", "backdoor", "position"]).reset_index(drop=True)
    return keep(table[["line", "backdoor", "layer", "position", *SCORES]], path, draw_depth)


SCORES = ("acc", "asr", "acc_before", "asr_before")


@cache
def layer_of(defense: str) -> str | None:
    """Where this defense's polarizer stands by default, or None if it has none."""
    found = compose([f"defense={defense}"]).defense if defense in options("defense") else {}
    return found.get("layer") if "structure" in found else None


def point(row: dict) -> dict:
    """What one row says."""
    asked = {k: v for k, v in row.items() if "." in k and v == v}  # a table writes NaN where a row has no such key
    layer = asked.pop("defense.layer", layer_of(row["defense"]))
    about = [row["attack"], row["dataset"], row["arch"], f"seed {row['seed']}", row["defense"]]
    line = ", ".join([*about, *(f"{k}={v}" for k, v in sorted(asked.items()))])
    return {"line": line, "backdoor": row["backdoor"], "layer": layer} | {k: row[k] for k in SCORES}


def in_order(layers: pd.Series, net: Classifier | None) -> tuple[pd.Series, dict[str, int]]:
    """(the layers as they are shown, layer -> position from the image to the logits)"""
    if net is None:
        rank = {d: i for i, d in enumerate(places.DEPTHS)}
        names = sorted(layers.unique(), key=lambda n: (rank.get(n, len(rank)), n))
        return layers, {n: i for i, n in enumerate(names)}

    sample, started = net.sample(), []
    places.trace(net, sample, lambda name, *_: started.append(name))
    full = {n: places.locate(net, n, sample) for n in layers.unique()}
    depths = {v: k for k, v in reversed(places.places(net, sample).items())}
    names = sorted(set(full.values()), key=started.index)
    shown = {n: f"{n.removeprefix('body.')}" + (f"\n({depths[n]})" if n in depths else "") for n in names}
    return layers.map(lambda n: shown[full[n]]), {shown[n]: i for i, n in enumerate(names)}


def draw_depth(frame: pd.DataFrame):
    """Left ACC, right ASR in percent; dotted: before the repair."""
    figure, axes = grid(1, 2, 5.2, 4.2)
    ticks = frame.drop_duplicates("position").sort_values("position")
    lines = list(frame.groupby(["line", "backdoor"], sort=False))
    texts = [line for (line, _), _ in lines]
    for ax, column, name in zip(axes[0], ("acc", "asr"), ("ACC", "ASR"), strict=True):
        for i, ((line, backdoor), part) in enumerate(lines):
            label = f"{line} [{backdoor[:6]}]" if texts.count(line) > 1 else line
            ax.plot(part["position"], 100 * part[column], "o-", ms=4, color=f"C{i % 10}", label=label)
            ax.axhline(100 * part[f"{column}_before"].iloc[0], color=f"C{i % 10}", lw=0.8, ls=":")
        ax.set_xticks(ticks["position"], ticks["layer"], rotation=30, ha="right", fontsize=8)
        ax.set_ylabel(f"{name} (%)")
        ax.set_ylim(-3, 103)
        ax.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    return figure
