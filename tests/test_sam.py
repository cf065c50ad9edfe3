"""Sharpness-aware training of the victim against the formula written out, and detection by disagreement."""

from __future__ import annotations

import pytest
import torch
from conftest import build_attack

from bdx.attacks.base import Attack
from bdx.errors import UserError
from bdx.evaluate import Seen, flagged
from bdx.sharpness import sharpness_aware


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_gradient_is_that_of_the_worst_nearby_weights(adaptive):
    """f(w) = Σ w⁴ / 4 + Σ w, so that g = w³ + 1; w + e by hand."""
    net = torch.nn.Linear(3, 1, bias=False)
    w = torch.tensor([[1.0, -2.0, 0.5]])
    with torch.no_grad():
        net.weight.copy_(w)

    def closure():
        net.weight.grad = None
        loss = net.weight.pow(4).sum() / 4 + net.weight.sum()
        loss.backward()
        return loss

    sharpness_aware(net, closure, 0.3, adaptive)()
    g = w**3 + 1
    e = w**2 * g / (w.abs() * g).norm() if adaptive else g / g.norm()
    assert torch.allclose(net.weight.grad, (w + 0.3 * e) ** 3 + 1, atol=1e-5)
    assert torch.equal(net.weight, w)


def test_batchnorm_moves_once_a_step(digits, quick_trainer):
    """Two passes a step, one move of the statistics: as many as an ordinary training makes."""
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
    x = torch.randn(8, 2)

    def closure():
        net.zero_grad()
        net(x).square().mean().backward()

    sharpness_aware(net, closure, 0.5, True)()
    assert torch.allclose(net[0].running_mean, 0.1 * x.mean(0), atol=1e-6)
    assert net[0].momentum == 0.1


def test_it_is_an_option_of_any_attack(digits, quick_trainer):
    def trained(*overrides) -> Attack:
        attack = build_attack(digits, "attack=badnets", "train.epochs=1", "train.batch=256", *overrides)
        attack.fit(digits.poisoned(attack.poison(digits.train)), quick_trainer)
        return attack

    plain, off, on = trained(), trained("train.sam_rho=0.0"), trained("train.sam_rho=2.0")
    assert torch.equal(plain.net.body.linear.weight, off.net.body.linear.weight)
    assert not torch.allclose(plain.net.body.linear.weight, on.net.body.linear.weight)


@pytest.mark.parametrize("overrides", [["train.sam_rho=-1.0"], ["train.sam_rho=1.0", "train.precision=16-mixed"]])
def test_mistakes(overrides, digits):
    with pytest.raises(UserError, match=r"train\.sam_rho=.*expected 0 or more, and bf16-mixed or 32-true above 0"):
        build_attack(digits, "attack=badnets", *overrides)


def test_what_a_repair_flags():
    before = Seen(*map(torch.tensor, ([0, 1, 2, 3], [0, 1, 2, 2], [0, 0, 0], [0, 0, 0], [1, 2, 3])))
    after = Seen(*map(torch.tensor, ([0, 1, 2, 2], [0, 1, 2, 2], [1, 2, 0], [0, 0, 0], [1, 2, 3])))
    assert flagged(before, after) == {"tpr": pytest.approx(2 / 3), "fpr": 0.25}
    assert flagged(Seen(before.clean, before.y_true), Seen(after.clean, after.y_true)) == {"tpr": None, "fpr": 0.25}
