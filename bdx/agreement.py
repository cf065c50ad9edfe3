"""Do two rankings agree, and does a difference hold? Small samples, no torch."""

from __future__ import annotations

import itertools
import math
from statistics import mean, stdev

LEVEL = 0.05
ENOUGH = 3  # differences


def tau(pairs: list[tuple[float, float]]) -> float | None:
    """Kendall's tau-b of (x, y): 1 the same ranking, -1 the opposite; None where one side is all ties."""
    signs = [((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in itertools.combinations(pairs, 2)]
    x, y = sum(s != 0 for s, _ in signs), sum(t != 0 for _, t in signs)
    return sum(s * t for s, t in signs) / math.sqrt(x * y) if x and y else None


def t_test(differences: list[float]) -> tuple[str, float | None]:
    """(holds | does not hold | not enough data, p) for the claim that these are positive on average: a one-sided t test. It
    does not hold where the opposite does, nor where all are 0; between the two, the data are not enough."""
    n = len(differences)
    if n < ENOUGH:
        return "not enough data", None
    if not (s := stdev(differences)):
        p = 0.0 if differences[0] > 0 else 1.0
    else:
        from scipy.special import stdtr

        p = float(1 - stdtr(n - 1, mean(differences) / (s / math.sqrt(n))))
    return ("holds" if p < LEVEL else "does not hold" if p > 1 - LEVEL else "not enough data"), p


def verdict(cells: list[dict[int, float]], wanted: int, every: bool) -> tuple[str, float | None]:
    """The same for a claim about `wanted` cells. cells: those measured, seed -> by how much the claim holds there.

    every: the claim is about each cell, which a single one refutes and only all of them prove. Else it is about their mean:
    the test's sample are the cells, each the mean of its seeds (seeds of one net are no further evidence on other attacks),
    or where there are too few cells for that, the seeds that all of them have.
    """
    means = [mean(of.values()) for of in cells]
    if every:
        broken = any(m <= 0 for m in means)
        return ("does not hold" if broken else "holds" if 0 < wanted <= len(means) else "not enough data"), None
    if len(means) < wanted:
        return "not enough data", None
    seeds = set.intersection(*(set(of) for of in cells)) if cells else set()
    return t_test(means if len(means) >= ENOUGH else [mean(of[s] for of in cells) for s in sorted(seeds)])
