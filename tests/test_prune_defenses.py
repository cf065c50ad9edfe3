"""CLP, EP, BNP, ANP, RNP, FP and FT-SAM: their formulas by hand, and what they leave untouched."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_attack
from torch import nn

from bdx import backdoor, surgery
from bdx.configure import compose
from bdx.datasets.base import Batch
from bdx.defenses.bnp import divergence
from bdx.defenses.clp import largest_singular
from bdx.defenses.ep import entropy, standard
from bdx.errors import UserError
from bdx.pruning import Replay, accuracy, affine
from bdx.run import build_defense
from bdx.split import pieces, pixels
from bdx.training import make_trainer


@pytest.fixture(scope="module")
def digits(small):
    return small


@pytest.fixture(scope="module")
def attack(digits):
    """Two epochs: enough for BatchNorm's statistics to mean something."""
    made = build_attack(digits, "attack=badnets", "train.epochs=2")
    trainer = partial(make_trainer, device=torch.device("cpu"), precision="32-true", seed=0, report=lambda *_: None)
    made.fit(digits.poisoned(made.poison(digits.train)), trainer)
    return made


def made(attack, name: str, *overrides: str):
    return build_defense(compose([*TINY, f"defense={name}", *(f"defense.{o}" for o in overrides)]), attack)


def repair(defense, digits, trainer):
    return defense.run(digits.allow(defense.needs), trainer)


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """Names of the tensors that differ."""
    after = after.state_dict()
    return {k for k, v in before.state_dict().items() if not torch.equal(v, after[k])}


# CLP


def test_the_bound_is_the_largest_singular_value_times_batchnorms_scale(attack):
    for recipe, eps in (("paper", 1e-5), ("code", 0)):
        defense = made(attack, "clp", f"recipe={recipe}")
        bound = defense.bound("body.layer1.0.bn2", ("body.layer1.0.conv1",)).numpy()
        block = defense.net.body.layer1[0]
        for c, w in enumerate(block.conv1.weight.detach().numpy()):
            sigma = np.linalg.svd(w.reshape(w.shape[0], -1), compute_uv=False)[0]
            var, gamma = block.bn2.running_var[c].item(), block.bn2.weight[c].item()
            assert bound[c] == pytest.approx(sigma * abs(gamma) / math.sqrt(var + eps), rel=1e-4)


def test_the_bound_of_a_sum_is_the_root_of_the_summed_squares(attack):
    defense, norm = made(attack, "clp"), "body.layer2.1.bn1"
    conv, shortcut = "body.layer2.0.conv2", "body.layer2.0.shortcut.0"
    assert set(defense.pairs[norm]) == {conv, shortcut}
    one, other, both = (defense.bound(norm, convs) for convs in ((conv,), (shortcut,), (conv, shortcut)))
    assert torch.allclose(both, torch.hypot(one, other))


def test_no_change_of_a_patch_grows_more_than_the_singular_value():
    """For one kernel per position, the paper's argument: ‖Wᵀv‖ ≤ σ‖v‖, reached by the singular vector."""
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    sigma = largest_singular(weight)
    v = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    growth = torch.einsum("cik,ni->cnk", weight.flatten(2), v).norm(dim=2) / v.norm(dim=1)
    assert (growth <= sigma[:, None] * (1 + 1e-5)).all()
    best = torch.linalg.svd(weight.flatten(2))[0][:, :, 0]
    assert torch.allclose(torch.einsum("cik,ci->ck", weight.flatten(2), best).norm(dim=1), sigma, rtol=1e-4)
    assert torch.allclose(largest_singular(weight[:, :, 0, 0]), weight[:, :, 0, 0].norm(dim=1))  # a Linear layer


def test_a_channel_that_stands_out_is_cut_and_it_alone(attack, digits, quick_trainer):
    defense = made(attack, "clp", "u=5.5")  # only one of the 64 channels of layer4 can stand so far out
    defense.net.body.layer4[1].conv1.weight.data[5] *= 100
    before = copy.deepcopy(defense.net)
    net = repair(defense, digits, quick_trainer)
    assert changed(before, net) == {"body.layer4.1.bn2.weight", "body.layer4.1.bn2.bias"}
    bn = net.body.layer4[1].bn2
    assert (bn.weight == 0).nonzero().tolist() == [[5]]
    assert bn.bias[5] == 0
    assert defense.facts == {"threshold": 5.5, "silent_channels": 1}


def test_clp_by_accuracy_needs_images_and_leaves_its_curve(attack, digits, quick_trainer):
    defense = made(attack, "clp", "select=accuracy", "max_drop=0.5")
    assert defense.needs == {"clean"}
    assert made(attack, "clp").needs == set()
    repair(defense, digits, quick_trainer)
    curve = defense.extras["curve"]
    assert curve.thresholds.tolist() == [10 - i / 2 for i in range(len(curve.thresholds))]
    assert curve.chosen in curve.thresholds.tolist()


# EP and BNP


def test_entropy_by_hand():
    values = torch.tensor([[0.0, 0.01], [0.02, 0.55], [0.04, 0.62], [0.31, 0.93]])
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(values).tolist() == pytest.approx([quarter, math.log(4)], abs=1e-6)


def test_standard_takes_the_spatial_maximum():
    z = torch.tensor([[1.0, -5, 0], [3, 2, 1]]).view(2, 1, 3, 1)  # maxima 1 and 3
    assert standard(z).flatten().tolist() == [-1, 1]
    assert standard(torch.ones(4, 2, 3, 3)).abs().max() == 0  # a dead channel is no reason to divide by 0


def test_two_heaps_have_a_lower_entropy_than_one():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(256, 8, generator=g)
    z[:, 3] = torch.cat([0.01 * torch.randn(230, generator=g), 10 + 0.01 * torch.randn(26, generator=g)])
    assert int(entropy(standard(z)).argmin()) == 3


def test_ep_looks_at_poisoned_training_images_alone(attack, digits, quick_trainer):
    defense = made(attack, "ep", "images=64", "u=1.5")
    assert defense.needs == {"train"}
    assert made(attack, "ep", "select=accuracy").needs == {"train", "clean"}
    poisoned, before = digits.poisoned(attack.poison(digits.train)), copy.deepcopy(defense.net)
    net = repair(defense, poisoned, quick_trainer)
    assert {k.rpartition(".")[2] for k in changed(before, net)} == {"weight", "bias"}
    cut = {n: (m.weight == 0).nonzero().flatten().tolist() for n, m in affine(net).items()}
    assert sum(map(len, cut.values())) == defense.facts["silent_channels"] > 0


@pytest.mark.parametrize("half", [0.5, 1.0])
def test_divergence_by_hand(half):
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
    z = torch.stack([torch.tensor([[-1.0, 1], [1, -1]]), torch.tensor([[3.0, 3], [5, 5]])])[None]  # means 0, 4; var 1, 1
    second = half * math.log(4) + (1 + 9) / 8 - 0.5
    assert divergence(z, norm, half).tolist() == pytest.approx([0.0, second])


def test_divergence_is_that_of_two_normals():
    z, norm = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1, nn.BatchNorm2d(3)
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, var.sqrt()), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(divergence(z, norm, 0.5), kl, rtol=1e-4)


def test_bnp_cuts_the_channel_whose_recorded_statistics_are_off(attack, digits, quick_trainer):
    defense = made(attack, "bnp", "u=3.5")
    defense.net.body.layer2[1].bn2.running_mean[7] += 1000
    before = copy.deepcopy(defense.net)
    net = repair(defense, digits, quick_trainer)
    assert 7 in (net.body.layer2[1].bn2.weight == 0).nonzero()
    assert "body.layer2.1.bn2.running_mean" not in changed(before, net)
    code = made(attack, "bnp_code")
    assert code.needs == {"train"}
    assert (code.form, code.images, made(attack, "bnp").images) == ("code", 256, 1000)
    with pytest.raises(UserError, match="recipe=code: take defense=bnp_code"):
        made(attack, "bnp", "recipe=code")


# ANP and RNP


def test_the_loss_of_anp_by_hand(attack, digits):
    defense = made(attack, "anp", "alpha=0.3").ready()
    batch = Batch(pixels(digits.clean.x[:16]), digits.clean.y[:16], torch.arange(16))
    torch.manual_seed(1)
    gamma, beta = defense.noise(batch)
    torch.manual_seed(1)
    loss = defense.training_step(batch, 0)["loss"]
    net = copy.deepcopy(attack.net).train()
    clean = F.cross_entropy(net(batch.x), batch.y)
    for m, g, b in zip(affine(net).values(), gamma.split(defense.masks.sizes), beta.split(defense.masks.sizes), strict=True):
        m.weight.data *= 1 + g
        m.bias.data *= 1 + b
    noisy = F.cross_entropy(net(batch.x), batch.y)
    assert noisy > clean
    assert float(loss.detach()) == pytest.approx(float((0.3 * clean + 0.7 * noisy).detach()), rel=1e-4)


@pytest.mark.parametrize(("project", "reach"), [("true", 0.4), ("false", 0.8)])
def test_the_noise_of_anp_stays_in_its_box(project, reach, attack, digits):
    defense = made(attack, "anp", f"project={project}").ready()
    batch = Batch(pixels(digits.clean.x[:16]), digits.clean.y[:16], torch.arange(16))
    largest = max(float(n.abs().max()) for n in defense.noise(batch))
    assert largest <= reach + 1e-6
    assert largest > reach - 0.05


@pytest.mark.parametrize("name", ["anp", "rnp"])
def test_masks_cut_gammas_and_nothing_else(name, attack, digits, quick_trainer):
    fast = {"anp": ("epochs=2", "optimizer.lr=20"), "rnp": ("unlearn.epochs=2", "recover.epochs=2", "recover.optimizer.lr=20")}
    defense = made(attack, name, *fast[name], "batch=70", "select=fixed", "threshold=0.5")
    before = copy.deepcopy(defense.net)
    net = repair(defense, digits, quick_trainer)
    norms = affine(net)
    assert changed(before, net) <= {f"{n}.weight" for n in norms}
    was, now = (torch.cat([m.weight for m in affine(n).values()]) for n in (before, net))
    assert torch.equal(now[now != 0], was[now != 0])
    assert 0 < defense.facts["silent_channels"] < len(was)
    if name == "anp":
        mask = defense.masks.mask.detach()
        assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
        assert torch.equal(now == 0, mask <= 0.5)


def test_unlearning_ends_at_its_accuracy(attack, digits):
    heard = []
    how = {"device": torch.device("cpu"), "precision": "32-true", "seed": 0}
    trainer = partial(make_trainer, **how, report=lambda stage, epoch, *_: heard.append((stage, epoch)))
    overrides = ("unlearn.epochs=20", "unlearn.optimizer.lr=0.05", "recover.epochs=1", "batch=70")
    defense = made(attack, "rnp", *overrides, "stop=0.3")
    repair(defense, digits, trainer)
    assert defense.facts["unlearned_acc"] <= 0.3
    assert 1 <= max(e for s, e in heard if s == "unlearn") < 20
    heard.clear()
    repair(made(attack, "rnp", *overrides, "stop=0.99"), digits, trainer)
    assert heard == [("unlearn", 1), ("recover", 1)]


# FP


def cut_by_size(net: nn.Module, at: str, x) -> torch.Tensor:
    """The 16 of 64 channels that are smallest, at the output of `at`, or pooled at the classifier's input."""
    with torch.no_grad():
        if at == "classifier":
            with surgery.watch_input(net.eval(), "body.linear", (seen := []).append):
                net(x)
        else:
            with surgery.watch_output(net.eval(), at) as seen:
                net(x)
    return seen[0][..., None].flatten(2).abs().mean((0, 2)).argsort()[:16].sort().values


SIXTEEN = ("select=fixed", "threshold=0.25", "epochs=2", "batch=70", "augment=false")


def test_fp_cuts_the_sleeping_features_and_they_stay_cut(attack, digits, quick_trainer):
    defense = made(attack, "fp", *SIXTEEN)
    wanted = cut_by_size(attack.net, "classifier", pixels(digits.clean.x))
    net = repair(defense, digits, quick_trainer)
    assert torch.equal((net.body.linear.weight == 0).all(0).nonzero().flatten(), wanted)
    assert defense.facts["silent_channels"] == 16
    assert "body.layer1.0.conv1.weight" in changed(attack.net, net)  # the rest was tuned
    with torch.no_grad():
        z = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(net.body.linear(z), net.body.linear(z.index_fill(1, wanted, 5.0)))


def test_a_cut_convolution_leaves_its_channels_to_the_skip_path(attack, digits, quick_trainer):
    defense = made(attack, "fp", "layer=last", *SIXTEEN)
    wanted = cut_by_size(attack.net, "body.layer4.1.conv2", pixels(digits.clean.x))
    net = repair(defense, digits, quick_trainer)
    silent = (net.body.layer4[1].conv2.weight == 0).flatten(1).all(1).nonzero().flatten()
    assert torch.equal(silent, wanted)
    assert defense.facts["silent_channels"] == 16
    assert not torch.equal(net.body.linear.weight, attack.net.body.linear.weight)  # the rest was tuned
    with surgery.watch_input(net, "body.linear", (seen := []).append), torch.no_grad():
        net(pixels(digits.clean.x))
    assert bool((seen[0][:, wanted] != 0).any())


@pytest.mark.parametrize(("arch", "at"), [("vit_b_16", "heads.head"), ("wrn16_1", "fc"), ("resnet18", "fc")])
def test_fp_cuts_what_any_classifier_gets(arch, at, digits, quick_trainer):
    thin = {"image_size": 16, "patch": 4, "layers": 3, "heads": 2, "width": 16, "mlp": 16} if arch == "vit_b_16" else {}
    asked = [*(o for o in TINY if not o.startswith("arch")), f"arch={arch}", *(f"arch.{k}={v}" for k, v in thin.items())]
    cfg = compose([*asked, "defense=fp", "defense.epochs=1", "defense.max_drop=1.0", "defense.step=0.3"])
    defense = build_defense(cfg, backdoor.build_attack(cfg, digits))
    net = repair(defense, replace(digits, clean=digits.clean[:20]), quick_trainer)
    assert defense.at == f"body.{at}"
    cut = (net.get_submodule(defense.at).weight == 0).all(0)
    assert int(cut.sum()) == defense.facts["silent_channels"] == math.ceil(0.9 * len(cut) - 1e-9)


def test_where_a_batchnorm_follows_the_convolution_its_channels_go_too(attack, digits, quick_trainer):
    defense = made(attack, "fp", "layer=layer4.1.conv1", "select=fixed", "threshold=0.5", "epochs=1", "batch=70")
    assert defense.norm == "body.layer4.1.bn2"
    bn = repair(defense, digits, quick_trainer).body.layer4[1].bn2
    assert int((bn.weight == 0).sum()) == int((bn.bias == 0).sum()) == 32


def test_the_released_code_goes_one_step_too_far_less_one_column(attack, digits, quick_trainer):
    defense = made(attack, "fp", "recipe=code", "step=0.25", "max_drop=0.0", "epochs=1", "batch=70")
    net = repair(defense, digits, quick_trainer)
    curve = defense.extras["curve"]
    columns = (net.body.linear.weight == 0).all(0)
    assert defense.facts["threshold"] == curve.chosen == defense.replay.chosen == (last := curve.thresholds.tolist()[-1])
    assert defense.notes == []
    assert int(columns.sum()) == defense.facts["silent_channels"] == round(64 * last) - 1


@pytest.mark.parametrize("how", ["layer=classifier", "layer=last", "recipe=code"])
def test_thresholds_are_tried_behind_the_layer_that_is_cut(how, attack, digits, monkeypatch):
    """As each by a whole pass, but what runs before that layer runs once for all thresholds, piece by piece."""
    defense = made(attack, "fp", how, "step=0.25", "epochs=1", "batch=70")
    order = defense.activation(digits).argsort()
    wanted = {}
    for share in (0.25, 0.5, 0.75):
        net = copy.deepcopy(defense.net)
        defense.prune(net, order, share)
        wanted[share] = accuracy(net, digits.clean)
    first, passes, convolve = defense.net.body.conv1, [], nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda m, *a: passes.append(m is first) or convolve(m, *a))
    state = copy.deepcopy(defense.net.state_dict())
    replay = Replay(state, lambda net, share: defense.prune(net, order, share), list(wanted), None)
    assert dict(replay.behind(defense.net, defense.at, digits.clean)) == wanted
    assert sum(passes) == len(list(pieces(digits.clean.x)))
    defense.net.load_state_dict(state)


# FT-SAM


def test_label_smoothing_leaves_its_share_to_the_other_classes(attack, digits):
    defense = made(attack, "ft_sam", "label_smoothing=0.1")
    x, y = pixels(digits.clean.x[:8]), digits.clean.y[:8]
    wanted = torch.full((8, 10), 0.1 / 9).scatter(1, y[:, None], 0.9)
    log_p = defense.net.eval()(x).log_softmax(1)
    loss = defense.training_step(Batch(x, y, y), 0)
    assert float(loss.detach()) == pytest.approx(float(-(wanted * log_p).sum(1).mean().detach()), rel=1e-5)


@pytest.mark.parametrize(("stepping", "lr"), [("epoch", 0.005), ("batch", 0.01)])
def test_the_schedule_counts_epochs_or_batches(stepping, lr, attack, digits, quick_trainer):
    """140 images in batches of 70: over 2 epochs of a cosine of 2, its rate is halved after one epoch, and after 4 steps
    of such a cosine it is back where it began."""
    rates = []
    defense = made(attack, "ft_sam", "epochs=2", "batch=70", f"stepping={stepping}")
    defense.on_train_end = lambda: rates.append(defense.trainer.optimizers[0].param_groups[0]["lr"])
    defense.on_train_epoch_start = lambda: rates.append(defense.trainer.optimizers[0].param_groups[0]["lr"])
    repair(defense, digits, quick_trainer)
    assert rates[1] == pytest.approx(0.005 if stepping == "epoch" else 0.0, abs=1e-9)
    assert rates[2] == pytest.approx(0.0 if stepping == "epoch" else 0.01, abs=1e-9)


def test_it_takes_the_gradient_elsewhere(attack, digits, quick_trainer):
    nets = [
        repair(made(attack, "ft_sam", "epochs=1", "batch=140", "augment=false", f"rho={rho}"), digits, quick_trainer)
        for rho in (1e-9, 2.0)
    ]
    ft = made(attack, "ft", "epochs=1", "batch=140", "augment=false")
    ft.training_step = lambda batch, batch_idx: F.cross_entropy(ft.net(batch.x), batch.y, label_smoothing=1 / 9)
    plain = repair(ft, digits, quick_trainer)
    weights = [n.body.linear.weight for n in (plain, *nets)]
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)


# mistakes


@pytest.mark.parametrize("name", ["clp", "ep", "bnp", "anp", "rnp"])
def test_a_net_without_batchnorm_is_refused_in_one_line(name, digits):
    bare = build_attack(digits, "attack=badnets")
    for path, module in list(bare.net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = path.rpartition(".")
            setattr(bare.net.get_submodule(parent), child, nn.Identity())
    with pytest.raises(UserError, match=f"{name.upper()} works on BatchNorm layers, and .* has none; take another") as e:
        made(bare, name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "override", "text"),
    [
        ("clp", "recipe=mine", "expected paper or code"),
        ("clp", "select=asr", "defense.select=asr: expected accuracy or fixed"),
        ("ep", "images=0", "defense.images=0: expected at least 1"),
        ("bnp", "max_drop=-1.0", "expected a fraction from 0 to 1"),
        ("anp", "alpha=2.0", "alpha from 0 to 1"),
        ("anp", "step=0.0", "0 < step <= last <= 1"),
        ("rnp", "stop=1.0", "expected 0 <= stop < 1"),
        ("rnp", "recover.epochs=0", "defense.recover.epochs=0: expected at least 1"),
        ("rnp", "unlearn.optimizer.lr=-1", "defense.unlearn.optimizer cannot be used"),
        ("fp", "layer=linear", "is no convolution; name one, or take classifier"),
        ("fp", "step=1.0", "expected shares of the channels, below 1"),
        ("ft_sam", "rho=0.0", "expected rho above 0"),
        ("ft_sam", "label_smoothing=0.95", "label_smoothing from 0 up to, but not, 0.9"),
        ("ft_sam", "stepping=step", "expected epoch or batch"),
    ],
)
def test_mistakes(name, override, text, attack):
    with pytest.raises(UserError, match=text):
        made(attack, name, override)
