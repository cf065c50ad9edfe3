"""ACC, ASR, RA and DER: one definition each, computed from predictions; fractions, never percent.

Source: Neural Polarizer (NeurIPS 2023) sec. 4.1 and D3 (ICCV 2025) sec. 4.1 for DER.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tables average DERs without loading torch
    from torch import Tensor


def share(hit: Tensor) -> float:
    """The exact share of True in a bool tensor: an integer count over n, not a mean of batch means."""
    if len(hit) == 0:
        raise ValueError("a share of no samples is undefined: the split is empty")
    return int(hit.sum()) / len(hit)


def acc(pred: Tensor, y_true: Tensor) -> float:
    """Accuracy on clean images. pred, y_true: (N,) int64."""
    return share(pred == y_true)


def asr(pred: Tensor, wanted: Tensor) -> float:
    """Attack success rate: share of triggered images classified as the attacker wants. pred, wanted: (N,) int64."""
    return share(pred == wanted)


def ra(pred: Tensor, y_true: Tensor) -> float:
    """Robust accuracy: share of the same triggered images classified as what they show. pred, y_true: (N,) int64."""
    return share(pred == y_true)


def der(acc_before: float, asr_before: float, acc: float, asr: float) -> float:
    """Defense effectiveness rating, in [0, 1]: the drop of ASR, less the drop of ACC; 0.5 means nothing happened."""
    return (max(0.0, asr_before - asr) - max(0.0, acc_before - acc) + 1) / 2


def mean_der(rows: Iterable[dict], rule: str) -> float:
    """DER of several rows, each with acc_before, asr_before, acc and asr.

    rule: "of_averages" (NPD prints the DER of the averaged ACC and ASR) or "of_rows" (D3 prints the mean of the DERs).
    """
    names = ("acc_before", "asr_before", "acc", "asr")
    table = [[row[name] for name in names] for row in rows]
    if rule == "of_rows":
        return sum(der(*values) for values in table) / len(table)
    if rule == "of_averages":
        return der(*(sum(column) / len(table) for column in zip(*table, strict=True)))
    raise ValueError(f"rule={rule!r}: expected 'of_averages' or 'of_rows'")
