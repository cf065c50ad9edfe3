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


def verdict(differences: list[float]) -> tuple[str, float | None]:
    """(holds | does not hold | not enough data, p) for the claim that these are positive: a one-sided t test of paired
    differences. It does not hold where the opposite does; between the two, the data are not enough."""
    n = len(differences)
    if n < ENOUGH:
        return "not enough data", None
    if not (s := stdev(differences)):
        p = 0.5 if not differences[0] else 0.0 if differences[0] > 0 else 1.0
    else:
        from scipy.special import stdtr

        p = float(1 - stdtr(n - 1, mean(differences) / (s / math.sqrt(n))))
    return ("holds" if p < LEVEL else "does not hold" if p > 1 - LEVEL else "not enough data"), p
