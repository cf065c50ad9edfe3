"""ACC, ASR, RA and DER against values computed by hand and printed in the papers."""

from __future__ import annotations

import pytest
import torch

from bdx import metrics
from bdx.split import Split


def test_shares_are_exact_counts():
    pred, true = torch.tensor([0, 1, 2, 2, 0, 0, 0]), torch.tensor([0, 1, 1, 2, 3, 3, 3])
    assert metrics.acc(pred, true) == 3 / 7
    assert metrics.asr(pred, torch.zeros_like(pred)) == 4 / 7
    assert metrics.ra(pred, true) == 3 / 7


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="share of no samples is undefined"):
        metrics.acc(torch.tensor([]), torch.tensor([]))


@pytest.mark.parametrize(
    ("before", "after", "printed"),
    [  # NPD Table 1: (ACC, ASR) undefended, (ACC, ASR) defended, DER
        ((91.82, 93.79), (88.93, 1.26), 94.82),
        ((93.69, 99.76), (93.69, 99.76), 50.00),
        ((91.89, 74.42), (92.05, 1.31), 86.56),  # accuracy rose: no bonus
        # D3 Table 1
        ((91.32, 95.03), (90.77, 0.74), 96.87),
        ((90.67, 98.26), (92.96, 0.06), 99.10),
    ],
)
def test_der_recomputes_printed_cells(before, after, printed):
    fractions = [v / 100 for v in (*before, *after)]
    assert 100 * metrics.der(*fractions) == pytest.approx(printed, abs=0.015)


def test_both_rules_for_a_mean_der():
    rows = [
        {"acc_before": 0.9, "asr_before": 1.0, "acc": 0.8, "asr": 0.0},  # DER 0.95
        {"acc_before": 0.9, "asr_before": 0.5, "acc": 1.0, "asr": 0.7},  # DER 0.50
    ]
    assert metrics.mean_der(rows, "of_rows") == pytest.approx(0.725)
    assert metrics.mean_der(rows, "of_averages") == pytest.approx((0.75 - 0.35 + 1) / 2)
    with pytest.raises(ValueError, match="expected 'of_averages' or 'of_rows'"):
        metrics.mean_der(rows, "mean")


def test_a_split_keeps_its_four_tensors_together():
    split = Split.clean(torch.arange(12, dtype=torch.uint8).view(4, 3, 1, 1), torch.tensor([3, 1, 2, 0]))
    some = split[torch.tensor([True, False, True, False])]
    assert some.y.tolist() == [3, 2]
    assert some.x[:, 0, 0, 0].tolist() == [0, 6]
    assert not some.poisoned.any()
    with pytest.raises(ValueError, match="one length and one device"):
        Split(split.x, split.y[:3], split.y_true, split.poisoned)
    with pytest.raises(ValueError, match="uint8"):
        Split.clean(split.x.float(), split.y)
