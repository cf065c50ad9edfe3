"""PGD against closed forms: on a linear net the gradient is known, so every step is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bdx.adversarial import PROJECT, Budget, perturb, project_l1
from bdx.errors import UserError

SHAPE = (3, 4, 4)


def linear_net(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def budget(norm="linf", radius=0.1, step=0.05, steps=1, along="sign", stop=None) -> Budget:
    return Budget(norm=norm, radius=radius, step=step, steps=steps, along=along, stop=stop)


def data(n: int = 5):
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, *SHAPE, generator=g) * 0.4 + 0.3, torch.randint(3, (n,), generator=g)


@pytest.mark.parametrize("norm", PROJECT)
@pytest.mark.parametrize("universal", [False, True])
def test_the_budget_is_kept_and_pixels_stay_valid(norm, universal):
    x, y = data()
    b = budget(norm, radius=0.2 if universal else 0.9, step=0.3, steps=7)  # a small universal one is never clamped
    adv = perturb(linear_net(), x, y, b, targeted=True, universal=universal)
    order = {"l2": 2, "l1": 1, "linf": float("inf")}[norm]
    norms = (adv - x).flatten(1).norm(p=order, dim=1)
    assert (norms <= b.radius_at(SHAPE) * (1 + 1e-4) + 1e-5).all()
    assert adv.min() >= 0
    assert adv.max() <= 1
    if universal:
        assert torch.allclose(adv - x, (adv - x)[:1].expand_as(x), atol=1e-6)


def test_one_signed_step_by_hand():
    net, (x, y) = linear_net(), data()
    adv = perturb(net, x, y, budget(step=0.05, radius=1.0), targeted=True)
    z = x.clone().requires_grad_()
    nn.functional.cross_entropy(net(z), y, reduction="sum").backward()
    assert torch.allclose(adv, (x - 0.05 * z.grad.sign()).clamp(0, 1))


def test_one_step_along_the_gradient_by_hand():
    net, (x, y) = linear_net(), data()
    adv = perturb(net, x, y, budget("l2", step=0.8, radius=9.0, along="gradient"), targeted=False)
    z = x.clone().requires_grad_()
    nn.functional.cross_entropy(net(z), y, reduction="sum").backward()
    length = 0.8 * (48 / 3072) ** 0.5  # the step is scaled with the image as the radius is
    moved = (adv - x).flatten(1)
    assert torch.allclose(moved.norm(dim=1), torch.full((5,), length), rtol=1e-4)
    assert torch.allclose(nn.functional.cosine_similarity(moved, z.grad.flatten(1)), torch.ones(5), atol=1e-4)


def test_targeted_lowers_the_loss_and_untargeted_raises_it():
    net, (x, y) = linear_net(), data(32)
    loss = lambda at: float(nn.functional.cross_entropy(net(at), y))
    b = budget("l2", radius=20.0, step=0.1, steps=3)
    assert loss(perturb(net, x, y, b, targeted=True)) < loss(x) < loss(perturb(net, x, y, b, targeted=False))


def test_the_first_pass_is_reused_and_changes_nothing():
    net, (x, y) = linear_net(), data()
    b = budget("l2", radius=5.0, step=0.1, steps=3)
    calls = []
    counting = lambda at: calls.append(1) or net(at)
    plain = perturb(counting, x, y, b, targeted=True)
    assert len(calls) == 3
    z = x.clone().requires_grad_()
    logits = counting(z)
    calls.clear()
    assert torch.equal(perturb(counting, x, y, b, targeted=True, first=(z, logits)), plain)
    assert len(calls) == 2
    logits.sum().backward()  # the graph of the first pass is still there
    assert z.grad is not None


def test_weights_get_no_gradient():
    net, (x, y) = linear_net(), data()
    perturb(net, x, y, budget(steps=3), targeted=True)
    assert all(p.grad is None for p in net.parameters())


def test_it_stops_once_enough_are_fooled():
    calls = []
    net = lambda at: calls.append(1) or torch.tensor([[9.0, 0.0]]).expand(len(at), 2) + at.sum() * 0
    x, _ = data()
    perturb(net, x, torch.zeros(5, dtype=torch.long), budget(steps=9, stop=0.6), targeted=True)
    assert len(calls) == 1


def test_l1_projection_is_the_nearest_point():
    """Against bisection on the threshold, an independent way to the same point."""
    delta = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(3))
    found = project_l1(delta, 2.5).flatten(1)
    for row, got in zip(delta.flatten(1), found, strict=True):
        low, high = 0.0, float(row.abs().max())
        for _ in range(60):
            mid = (low + high) / 2
            low, high = (mid, high) if (row.abs() - mid).clamp_min(0).sum() > 2.5 else (low, mid)
        assert torch.allclose(got, row.sign() * (row.abs() - high).clamp_min(0), atol=1e-4)
    small = delta * 1e-3
    assert torch.allclose(project_l1(small, 2.5), small)


def test_the_radius_grows_with_the_image():
    assert budget("l2", radius=3.0).radius_at((3, 32, 32)) == 3.0
    assert budget("l2", radius=3.0).radius_at((3, 64, 64)) == 6.0  # the papers' value for Tiny ImageNet
    assert budget("linf", radius=0.2).radius_at((3, 64, 64)) == 0.2
    assert budget("l1", radius=10.0).radius_at((3, 64, 64)) == 40.0


@pytest.mark.parametrize(
    ("kw", "text"),
    [({"norm": "l3"}, "expected one of l2"), ({"steps": 0}, "positive numbers"), ({"along": "x"}, "sign or gradient")],
)
def test_a_senseless_budget_is_refused(kw, text):
    with pytest.raises(UserError, match=text):
        budget(**kw)
