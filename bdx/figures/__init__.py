"""The papers' figures, as functions of saved nets, of data and of result rows; `bdx figure` draws them for a run.

Each returns its data as a pandas DataFrame and writes it to PATH.csv, and the picture, drawn from that file, to PATH.png.
"""

from inspect import signature
from pathlib import Path

from bdx.build import instantiate
from bdx.configure import parse
from bdx.errors import UserError, nearest
from bdx.figures.bait import reconstructions
from bdx.figures.base import read, redraw
from bdx.figures.cost import costs
from bdx.figures.deltas import perturbations
from bdx.figures.depth import depth_curve
from bdx.figures.embedding import features
from bdx.figures.heat import grad_cam
from bdx.figures.line import along_the_line
from bdx.figures.stored import Several, Stored
from bdx.figures.weights import weight_differences

# what `bdx figure NAME` hands to each, besides what the user sets
OF_RUN = {
    along_the_line: lambda run: ((run.before, run.after, run.attack, run.data.test), {"clean": run.data.clean}),
    weight_differences: lambda run: ((run.before, run.repaired), {}),
    features: lambda run: ((run.nets, run.attack, run.data.test), {"classes": run.data.classes}),
    perturbations: lambda run: ((run.before, run.attack, run.data.test, instantiate(run.cfg["defense"]["budget"])), {}),
    grad_cam: lambda run: ((run.nets, run.attack, run.data.test), {"classes": run.data.classes}),
    reconstructions: lambda run: ((run.after, run.extra("decoder"), run.attack, run.data.test), {}),
    depth_curve: lambda run: ((run.siblings,), {"net": run.before}) if run.id else ((run.results,), {}),
    costs: lambda run: ((run.siblings,), {}) if run.id else ((run.results,), {}),
}
OF_ROWS = (depth_curve, costs)  # no net is opened for these; what they draw is of all rows together


def figure(argv: list[str]) -> int:
    """`bdx figure NAME [RUN_ID] [key=value …]`: a key is one of the figure's own, `path` (without suffix), or a run's."""
    figures = {f.__name__: f for f in OF_RUN}
    if not argv or argv[0] not in figures:
        near = nearest(argv[0], figures) if argv else ""
        raise UserError(f"expected `bdx figure NAME [RUN_ID] [key=value …]`{near}; figures are {', '.join(figures)}")
    draw, (words, given) = figures[argv[0]], ([a for a in argv[1:] if ("=" in a) == x] for x in (False, True))
    if len(words) > 1:
        raise UserError(f"{' '.join(words)}: expected one RUN_ID, that of a row in paths.results")
    options, others = own(draw, given)
    run = Stored(words[0] if words else None, others)
    what, about = OF_RUN[draw](run)
    path = Path(options.pop("path", (run.paths["nets"] / f"{run.id}.log" if words else run.paths["out"]) / argv[0]))
    draw(*what, path=path, **about, **options)
    print(f"{path}.png, drawn from {path}.csv")
    return 0


def own(draw, given: list[str]) -> tuple[dict, list[str]]:
    """(the values in `given` that `draw` takes itself, the others), from its keyword arguments' defaults."""
    defaults = {k: p.default for k, p in signature(draw).parameters.items() if isinstance(p.default, (int, float, str))}
    mine = [a for a in given if a.split("=")[0] in {*defaults, "path"}]
    options = {o.key_or_group: o.value() for o in parse(mine)}
    for key, value in options.items():
        kind = type(defaults.get(key, ""))
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise UserError(
                f"{key}={value}: expected {'a word' if kind is str else 'a number'}, as {defaults.get(key, 'a/path')}"
            )
    return options, [a for a in given if a not in mine]


__all__ = [
    "OF_ROWS", "OF_RUN", "Several", "Stored", "along_the_line", "costs", "depth_curve", "features", "figure", "grad_cam",
    "perturbations", "read", "reconstructions", "redraw", "weight_differences",
]  # fmt: skip
