"""NPD's parts against formulas worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_attack

from bdx.configure import compose
from bdx.defenses.npd import IGNORE, runner_up
from bdx.polarizers import ConvBN
from bdx.run import build_defense
from bdx.split import pixels


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets", "attack.target=2")


def npd(attack, *overrides):
    return build_defense(compose([*TINY, "attack.target=2", "defense=npd", *overrides]), attack)


def batch(digits, n=16):
    data = digits.batches(digits.clean, size=n, shuffle=True, augment=False)
    return next(iter(data))


def test_the_runner_up_is_the_likeliest_other_class():
    logits = torch.tensor([[5.0, 1.0, 3.0], [5.0, 1.0, 3.0], [0.0, 2.0, 1.0]])
    assert runner_up(logits, torch.tensor([0, 2, 1])).tolist() == [2, 0, 2]


def test_the_paper_place_is_layer4_1_conv1(attack):
    assert npd(attack).at == "body.layer4.1.conv1"
    assert npd(attack, "defense.layer=layer4.1.conv1").at == "body.layer4.1.conv1"
    assert npd(attack, "defense.layer=whole").at == "body.avgpool"


def test_size_of_the_polarizer(digits):
    wide = build_defense(compose(["dataset=digits", "defense=npd"]), build_attack(digits, "arch.width=64"))
    assert sum(p.numel() for p in wide.polarizer.parameters()) == 263_168  # 512² + 2·512, as printed for the paper's net


def test_only_the_polarizer_learns_and_the_pixels_get_no_gradient(attack, digits):
    defense = npd(attack)
    b = batch(digits)
    out = defense.training_step(b, 0)
    defense.backward(out["loss"])
    for name, p in defense.net.named_parameters():
        assert (p.grad is not None) == (".layer." in name), name
    assert b.x.grad is None


@pytest.mark.parametrize("recipe", ["paper", "code"])
def test_the_loss_terms_by_hand(attack, recipe):
    defense = npd(attack, f"defense.recipe={recipe}")
    adv = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    clean = torch.tensor([[0.0, 4.0, 1.0], [0.5, 3.0, 1.0]])  # it takes image 0 for class 1
    y = torch.tensor([0, 1])
    p = adv.softmax(1).double()
    k = torch.tensor([1, 2])  # the runner-up at x and the strongest other class at x+δ, for both images
    right = y if recipe == "paper" else torch.tensor([1, 1])
    extra = 0 if recipe == "paper" else 1e-4
    terms = defense.robust_terms(adv, y, clean)
    rows = torch.arange(2)
    assert float(terms["ce"]) == pytest.approx(float(-p[rows, right].log().mean()), rel=1e-5)
    assert float(terms["margin"]) == pytest.approx(float(-(1 + extra - p[rows, k]).log().mean()), rel=1e-4)
    assert float(terms["asr"]) == pytest.approx(float(-(1 + extra - p[rows, k]).log().mean()), rel=1e-4)


def test_a_known_target_leaves_out_images_of_that_class(attack):
    defense = npd(attack, "defense.target=2", "defense.universal=true")
    y = torch.tensor([2, 0, 2, 1])
    adv = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert defense.towards(y, adv).tolist() == [IGNORE, 2, IGNORE, 2]
    terms = defense.robust_terms(adv, y, adv)
    only = defense.robust_terms(adv[[1, 3]], y[[1, 3]], adv[[1, 3]])
    assert all(float(terms[k]) == pytest.approx(float(only[k]), rel=1e-5) for k in terms)


def test_a_batch_of_target_images_alone_has_no_robust_loss(attack):
    defense = npd(attack, "defense.target=2")
    adv, y = torch.randn(3, 3), torch.full((3,), 2)
    assert all(float(v) == 0 for v in defense.robust_terms(adv, y, adv).values())


@pytest.mark.parametrize("name", ["npd", "npd_tp", "npd_tu", "npd_up", "npd_uu"])
def test_each_variant_perturbs_as_its_name_says(name, attack, digits):
    defense = build_defense(compose([*TINY, "attack.target=2", f"defense={name}", "defense.budget.radius=0.5"]), attack)
    b = batch(digits)
    x = b.x.clamp(0.2, 0.8).requires_grad_()  # away from the borders, where the clamp would show
    logits = defense.net.eval()(x)
    delta = defense.worst_case(x, b.y, logits) - x.detach()
    kept = b.y != 2 if name in ("npd_tp", "npd_tu") else torch.ones_like(b.y, dtype=torch.bool)
    assert (delta[kept].flatten(1).norm(dim=1) > 0.49).all()
    if name in ("npd_tu", "npd_uu"):
        assert torch.allclose(delta, delta[:1].expand_as(delta), atol=1e-5)
    if name == "npd_tp":
        assert (delta[~kept] == 0).all()
    with torch.no_grad():
        moved = F.cross_entropy(defense.net(x + delta), b.y) - F.cross_entropy(logits, b.y)
    assert defense.targeted == (name not in ("npd_up", "npd_uu"))
    if not defense.targeted:
        assert moved > 0


def test_a_known_target_of_an_all2all_attack_is_each_images_next_class(attack, digits):
    defense = build_defense(compose([*TINY, "attack=badnets_all2all", "defense=npd_tp"]), attack)
    y = torch.tensor([0, 3, 9])
    assert defense.towards(y, torch.randn(3, 10)).tolist() == [1, 4, 0]


def test_linear_has_a_weight_for_each_position_and_its_light_form_one_for_each_channel(attack):
    full, light = (npd(attack, f"defense.structure={s}").polarizer.weight.shape for s in ("linear", "linear_light"))
    assert full[1] == light[1] > 1
    assert (full[2:], light[2:]) == ((4, 4), (1, 1))


@pytest.mark.parametrize("structure", ["conv_bn", "conv", "conv_bn_x2", "linear", "linear_light", "osad", "osdn"])
def test_every_structure_starts_as_the_identity_and_learns(structure, attack, digits, quick_trainer):
    defense = npd(
        attack, f"defense.structure={structure}", "defense.init=identity", "defense.warmup_epochs=0", "defense.epochs=1"
    )
    x = pixels(digits.test.x[:20])
    with torch.no_grad():
        before, at_start = attack.net.eval()(x), defense.net.eval()(x)
    assert torch.allclose(before, at_start, atol=1e-4)
    start = copy.deepcopy(defense.polarizer.state_dict())
    defense.run(digits.allow(defense.needs), quick_trainer)
    assert any(not torch.equal(v, start[k]) for k, v in defense.polarizer.state_dict().items())


@pytest.mark.parametrize("init", ["neutral", "identity"])
def test_identity_start_holds_with_the_features_own_statistics(init, attack, digits, quick_trainer):
    """After calibration BatchNorm carries the features' moments and is still the identity."""
    defense = npd(attack, f"defense.init={init}", "defense.warmup_epochs=0", "defense.epochs=1", "defense.optimizer.lr=0.0")
    x = pixels(digits.test.x[:20])
    net = defense.run(digits.allow(defense.needs), quick_trainer)
    assert defense.polarizer.bn.running_var.min() != 1
    assert not any(m._forward_hooks for m in net.modules())
    with torch.no_grad():
        assert torch.allclose(net.eval()(x), attack.net.eval()(x), atol=1e-3)


@pytest.mark.parametrize("init", ["neutral", "identity"])
def test_a_step_of_gamma_is_as_long_as_the_features_are_wide(init):
    """Features of deviation s: the loss Σ out has the gradient s·n in γ around the moments, n within γ; one step at 0.01."""
    s, layer = 0.1, ConvBN(1).eval()
    z = (s * torch.tensor([-1.0, 1.0, 3.0, 1.0]) + 5).view(4, 1, 1, 1)  # x̂ sums to 4
    mean, var = torch.tensor([5.0]), torch.tensor([s**2 - layer.bn.eps])

    def step():
        (layer(z) - z.detach()).sum().backward()
        with torch.no_grad():
            layer.bn.weight -= 0.01 * layer.bn.weight.grad

    if init == "neutral":
        with layer.neutral(mean, var):
            assert torch.allclose(layer(z), z)
            assert float(layer.bn.weight) == 1
            step()
            within = layer(z)
        assert torch.allclose(layer(z), within, atol=1e-6)
    else:
        layer.calibrate(mean, var)
        assert torch.allclose(layer(z), z)
        step()
    assert float(layer.bn.weight) == pytest.approx(s - 0.01 * 4 * (s**2 if init == "neutral" else 1), rel=1e-4)


def test_batchnorm_is_frozen_after_warm_up(attack, digits, quick_trainer):
    defense = npd(attack, "defense.warmup_epochs=1", "defense.epochs=2")
    at = {}

    def noting(stage, epochs):
        at[stage] = defense.polarizer.bn.running_mean.clone()
        return quick_trainer(stage, epochs)

    defense.run(digits.allow(defense.needs), noting)
    assert list(at) == ["warm-up", "NPD"]
    assert not torch.equal(at["warm-up"], at["NPD"])
    assert torch.equal(at["NPD"], defense.polarizer.bn.running_mean)


def test_batchnorm_in_train_mode_learns_from_clean_images_only(attack, digits):
    defense = npd(attack, "defense.bn_mode=train")
    defense.polarizer.train()
    b = batch(digits)
    alone = copy.deepcopy(defense)
    defense.training_step(b, 0)
    alone.warming = True  # the clean pass and nothing else
    alone.training_step(b._replace(x=b.x.detach()), 0)
    assert torch.allclose(defense.polarizer.bn.running_mean, alone.polarizer.bn.running_mean, atol=1e-6)


def test_weights_switch_terms_off(attack, digits):
    defense = npd(attack, "defense.lambda_ce=0.0", "defense.lambda_margin=0.0", "defense.lambda_asr=0.0")
    out = defense.training_step(batch(digits), 0)
    assert float(out["loss"].detach()) == pytest.approx(float(out["bn"].detach()))
