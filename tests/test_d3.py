"""D3 and FST against values worked out by hand, and on the sphere that they may not leave."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_attack

import bdx.run
from bdx import places
from bdx.configure import compose
from bdx.errors import UserError
from bdx.run import build_defense
from bdx.surgery import batchnorms

ONE = ["defense.epochs=1", "defense.batch=32"]


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


def made(attack, name="d3", *overrides):
    torch.manual_seed(0)
    return build_defense(compose([*TINY, f"defense={name}", *overrides]), attack)


def batch(digits, n=16):
    return next(iter(digits.batches(digits.clean, size=n, shuffle=True, augment=False)))


def weight(defense):
    return defense.selected[0].weight


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], lambda ce, d: (10 * (ce - 0.1).clamp_min(0).mean() - d) / 11),
        (["defense.hinge=batch"], lambda ce, d: (10 * (ce.mean() - 0.1).clamp_min(0) - d) / 11),
        (["defense.normalise=false"], lambda ce, d: 10 * (ce - 0.1).clamp_min(0).mean() - d),
        (["defense.lambda_clean=0.5"], lambda ce, d: 0.5 * (ce - 0.1).clamp_min(0).mean() - d),
        (["defense.epsilon=0.0", "defense.alpha=3.0"], lambda ce, d: (10 * ce.mean() - 3 * d) / 11),
    ],
    ids=["default", "batch", "not normalised", "small lambda", "far"],
)  # fmt: skip
def test_the_loss_by_hand(overrides, wanted, attack, digits):
    defense, old = made(attack, "d3", *overrides), attack.net.body.linear.weight.detach()
    defense.ready()
    defense.net.eval()
    b = batch(digits)
    out = defense.training_step(b, 0)
    ce = F.cross_entropy(defense.net(b.x), b.y, reduction="none")
    far = (weight(defense) - old).square().sum().sqrt()
    assert torch.allclose(out["loss"], wanted(ce, far), atol=1e-5)
    assert torch.allclose(out["distance"], far)


def test_fst_is_cross_entropy_and_the_inner_product(attack, digits):
    defense, old = made(attack, "fst"), attack.net.body.linear.weight.detach()
    defense.ready()
    defense.net.eval()
    b = batch(digits)
    loss = defense.training_step(b, 0)["loss"]
    wanted = F.cross_entropy(defense.net(b.x), b.y) + 0.2 * (weight(defense) * old).sum()
    assert torch.allclose(loss, wanted, atol=1e-5)


def test_on_the_sphere_both_distances_are_one():
    """‖W − W₀‖² = 2r² − 2⟨W, W₀⟩ (spec of both papers)."""
    old, new = torch.randn(10, 64), torch.randn(10, 64)
    new = new * old.norm() / new.norm()
    assert torch.allclose((new - old).norm() ** 2, 2 * old.norm() ** 2 - 2 * (new * old).sum(), rtol=1e-5)


@pytest.mark.parametrize("start", ["random", "reset", "far", "middle", "noise", "near"])
def test_where_the_warm_start_puts_the_weights(start, attack):
    defense, old = made(attack, "d3", f"defense.warm_start={start}"), attack.net.body.linear.weight.detach()
    bias = defense.selected[0].bias.detach().clone()
    defense.ready()
    new = weight(defense).detach()
    assert torch.equal(new, -old) == (start == "far")
    assert torch.equal(new, old) == (start == "near")
    assert (new == 0).all() == (start == "middle")
    if start == "random":
        assert torch.allclose(new.norm(), old.norm())
        assert abs(float(F.cosine_similarity(new.flatten(), old.flatten(), 0))) < 0.2
    if start == "noise":
        assert 0.08 < float((new - old).std()) < 0.12
    assert torch.equal(defense.selected[0].bias, bias) == (start != "reset")
    assert all(torch.equal(a, b) for a, b in zip(defense.old, [old], strict=True))


@pytest.mark.parametrize("name", ["d3", "fst", "d3_paper"])
def test_weights_end_on_the_sphere_away_from_where_they_were(name, attack, digits, quick_trainer):
    defense, old = made(attack, name, *ONE), attack.net.body.linear.weight.detach()
    net = defense.run(digits.allow(defense.needs), quick_trainer)
    assert torch.allclose(net.body.linear.weight.norm(), old.norm(), rtol=1e-5)
    if name != "d3_paper":  # which starts where the distance has no gradient
        assert (net.body.linear.weight - old).norm() > old.norm()
    assert not torch.equal(net.body.linear.bias, attack.net.body.linear.bias)
    assert not torch.equal(net.body.conv1.weight, attack.net.body.conv1.weight)  # all others are free


def test_from_the_old_weights_the_distance_gives_no_push(attack, digits):
    defense = made(attack, "d3_paper", "defense.lambda_clean=0.0").ready()
    defense.training_step(batch(digits), 0)["loss"].backward()
    assert (weight(defense).grad == 0).all()


@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_bn_mode(mode, attack, digits, quick_trainer):
    defense = made(attack, "d3", f"defense.bn_mode={mode}", *ONE)
    before = [m.running_mean.clone() for m in batchnorms(attack.net)]
    net = defense.run(digits.allow(defense.needs), quick_trainer)
    same = all(torch.equal(a, b.running_mean) for a, b in zip(before, batchnorms(net), strict=True))
    assert same == (mode == "frozen")


@pytest.mark.parametrize(
    ("arch", "count"), [("preact_resnet18", 1), ("vgg19_bn", 3), ("vit_b_16", 1), ("resnet18", 1), ("wrn16_1", 1)]
)
def test_the_classifier_of_every_net(arch, count, digits):
    """A14: linear, the stack of three, heads."""
    thin = {"vit_b_16": ["arch.layers=3", "arch.width=32", "arch.heads=2", "arch.mlp=32", "arch.image_size=32"]}
    overrides = [o for o in TINY if "width" not in o]
    net = bdx.run.build_attack(compose([*overrides, f"arch={arch}", *thin.get(arch, [])]), digits).net
    assert len(places.linears(net, "classifier")) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["defense.layer=linea"], r"layer=linea: no such layer \(did you mean linear"),
        (["defense.layer=layer4.1.bn1"], "there is no Linear and no Conv2d inside body.layer4.1.bn1"),
        (["defense.hinge=x"], "defense.hinge=x: expected sample or batch"),
        (["defense.warm_start=close"], "defense.warm_start=close: expected one of random, reset"),
        (["defense.epsilon=-1.0"], "epsilon=-1.0, noise=0.1: expected p of at least 1 and the others not below 0"),
    ],
)
def test_mistakes(overrides, message, attack):
    with pytest.raises(UserError, match=message):
        made(attack, "d3", *overrides)


def test_layers_by_name(attack):
    assert len(made(attack, "d3", "defense.layer=layer4").selected) == 5  # four convolutions and a shortcut
