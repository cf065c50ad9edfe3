"""Plots for a page, as SVG texts that take the colour of the text around them; drawn from entries and curves alone."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bdx.comparison import Entry

INK = "#012345"  # in a plot it stands for the colour of the page's text
LOOK = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK),
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path",
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What one run left of one value. label: the attack and what else makes the backdoor; stage: the defense and its
    stage; values: (epoch, value)."""

    label: str
    stage: str
    name: str
    values: list[tuple[int, float]]


def label(entry: Entry) -> str:
    """All of a cell's place but its defense: the name of its line in a heat map, of its colour in a plot."""
    named = {k: v for k, v in entry.cell.at.items() if k not in ("defense", "seed")}
    return " ".join(v if k in ("attack", "dataset", "arch") else f"{k.rpartition('.')[2]}={v}" for k, v in named.items())


def colours(labels) -> dict[str, str]:
    """Label -> colour; after ten they come again."""
    wheel = mpl.color_sequences["tab10"]
    return {name: mpl.colors.to_hex(wheel[i % 10]) for i, name in enumerate(dict.fromkeys(labels))}


def shade(value: float, low: float, high: float) -> tuple[str, str]:
    """(colour behind, colour of the text) for a value on viridis."""
    red, green, blue, _ = mpl.colormaps["viridis"](min(max((value - low) / (high - low), 0), 1))
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
    return mpl.colors.to_hex((red, green, blue)), "#fff" if dark else "#111"


def svg(draw, about: str, size: tuple[float, float]) -> str:
    """The plot that draw(axes) makes, `size` in inches, with `about` for those who hear the page."""
    out = io.StringIO()
    with mpl.rc_context(LOOK | {"svg.hashsalt": about}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text).replace(INK, "currentColor")  # ids would stand on the page many times
    return re.sub(r'<svg (.*?)width="\S+" height="\S+"', rf'<svg role="img" aria-label="{plain(about)}" \1', text, count=1)


def plain(text: str) -> str:
    return re.sub(r'[<>&"\\]', " ", text)


def trade_offs(entries: list[Entry], colour: dict[str, str]) -> list[str]:
    """One plot for each defense: ACC against ASR, before (ring), after (dot) and the paper's after (cross), in percent."""
    groups: dict[str, list[Entry]] = {}
    for e in entries:
        if e.cell.at.get("defense") != "none" and e.values("asr"):
            groups.setdefault(e.cell.at.get("defense", "all"), []).append(e)
    heights = [100 * v for of in groups.values() for e in of for k in ("acc", "acc_before") for v in e.values(k)]
    heights += [e.paper["acc"] for of in groups.values() for e in of if "acc" in e.paper]
    found = []
    for name, of in groups.items():

        def draw(axes, name=name, of=of):
            for e in of:
                after, before = ((100 * mean(e.values(f"asr{t}")), 100 * mean(e.values(f"acc{t}"))) for t in ("", "_before"))
                own = {"color": colour[label(e)]}
                axes.plot(*zip(before, after, strict=True), lw=0.8, alpha=0.5, **own)
                axes.plot(*before, "o", mfc="none", ms=5, **own)
                axes.plot(*after, "o", ms=6, **own)
                if {"acc", "asr"} <= set(e.paper):
                    axes.plot(e.paper["asr"], e.paper["acc"], "x", ms=6, mew=1.5, **own)
            axes.set(title=name, xlabel="ASR %", ylabel="ACC %", xlim=(-4, 104))
            axes.set_ylim(min(heights) - 3, max(heights) + 3)

        found.append(svg(draw, f"ACC against ASR of {name}", (3.0, 2.5)))
    return found


def read(path: Path, entry: Entry) -> list[Curve]:
    """What a run of `entry` wrote into curves.csv, without the learning rate and values of a single epoch."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    try:
        lines = list(csv.DictReader(path.read_text().splitlines()))
        for line in lines:
            found.setdefault((line["stage"], line["name"]), []).append((int(line["epoch"]), float(line["value"])))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut off where a run was killed
        pass
    name = entry.cell.at.get("defense", "")
    stages = {k: k[0] if k[0] == "attack" or not name else f"{name}, {k[0]}" for k in found}
    return [Curve(label(entry), stages[k], k[1], v) for k, v in found.items() if k[1] != "lr" and len(v) > 1]


def curves(found: list[Curve], colour: dict[str, str]) -> list[str]:
    """One plot for each value of each stage, with a line for each run."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in found:
        groups.setdefault((curve.stage, curve.name), []).append(curve)
    made = []
    for (stage, name), of in groups.items():

        def draw(axes, stage=stage, name=name, of=of):
            for curve in of:
                axes.plot(*zip(*curve.values, strict=True), lw=1.2, color=colour[curve.label])
            values = [v for c in of for _, v in c.values]
            if min(values) > 0 and max(values) > 100 * min(values):
                axes.set_yscale("log")
            axes.set(title=f"{stage}: {name}", xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

        made.append(svg(draw, f"{name} over the epochs of {stage}", (3.0, 2.2)))
    return made
