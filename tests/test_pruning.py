"""Which convolution feeds which BatchNorm, masks over channels, and the rule that says how far to prune."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vgg import make_layers

from bdx import pruning
from bdx.archs.base import build
from bdx.configure import compose
from bdx.defenses.clp import before
from bdx.errors import UserError
from bdx.pruning import Masks, Rule, above, accuracy, affine, feeders, silence
from bdx.split import Split


def toy(*modules: nn.Module, shape=(3, 8, 8)) -> nn.Sequential:
    net = nn.Sequential(*modules)
    net.spec = {"shape": shape, "num_classes": 10}
    return net


@pytest.fixture(scope="module")
def preact():
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    cfg = OmegaConf.to_container(compose(TINY), resolve=True)
    net = build(cfg["arch"], num_classes=10, shape=(3, 32, 32), **cfg["dataset"]["normalize"])
    for m in affine(net).values():  # statistics and scales that are no identity
        nn.init.uniform_(m.weight, 0.5, 2)
        nn.init.normal_(m.bias)
        nn.init.uniform_(m.running_var, 0.5, 2)
    return net.eval()


def as_sets(found: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:
    return {norm.removeprefix("body."): {c.removeprefix("body.") for c in convs} for norm, convs in found.items()}


def test_pre_activation_blocks(preact):
    """bn2 follows conv1; bn1 gets what the stage has summed up: its blocks' last convolutions and where it began."""
    wanted = {f"layer{i}.{j}.bn2": {f"layer{i}.{j}.conv1"} for i in range(1, 5) for j in range(2)}
    start = {1: "conv1"} | {i: f"layer{i}.0.shortcut.0" for i in range(2, 5)}
    wanted |= {"layer1.0.bn1": {"conv1"}}
    wanted |= {f"layer{i}.1.bn1": {start[i], f"layer{i}.0.conv2"} for i in range(1, 5)}
    wanted |= {f"layer{i + 1}.0.bn1": {start[i], f"layer{i}.0.conv2", f"layer{i}.1.conv2"} for i in range(1, 4)}
    assert as_sets(feeders(preact)) == wanted


def test_a_frozen_net_has_a_graph_too(preact):
    assert feeders(copy.deepcopy(preact).requires_grad_(False)) == feeders(preact)


def test_the_order_of_modules_says_something_else(preact):
    """What the released CLP does: one convolution, and here it is a shortcut, for a norm that gets a sum."""
    assert before(preact)["body.layer2.1.bn1"] == ("body.layer2.0.shortcut.0",)
    assert before(preact)["body.layer1.1.bn1"] == ("body.layer1.0.conv2",)


def test_a_resnet_with_its_shortcuts():
    net = resnet18(num_classes=10)
    net.spec = {"shape": (3, 32, 32)}
    wanted = {"bn1": {"conv1"}}
    for i in range(1, 5):
        wanted |= {f"layer{i}.{j}.bn{k}": {f"layer{i}.{j}.conv{k}"} for j in range(2) for k in (1, 2)}
        wanted |= {f"layer{i}.0.downsample.1": {f"layer{i}.0.downsample.0"}} if i > 1 else {}
    assert as_sets(feeders(net)) == wanted
    assert net.training  # the mode is put back


def test_vgg_with_batchnorm():
    net = toy(*make_layers([8, "M", 16, 16], batch_norm=True))
    assert feeders(net) == {"1": ("0",), "5": ("4",), "8": ("7",)}


@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True)], ids=["relu", "in place"])
def test_what_an_activation_stands_between_feeds_nothing(between):
    assert feeders(toy(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4))) == {}
    assert feeders(toy(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4))) == {"2": ("0",)}


def test_a_linear_layer_feeds_too_and_a_shared_norm_is_left_out():
    assert feeders(toy(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))) == {"2": ("1",)}
    norm = nn.BatchNorm2d(3)
    assert feeders(toy(nn.Conv2d(3, 3, 3), norm, nn.Conv2d(3, 3, 3), norm)) == {}


def test_a_silent_channel_is_zero():
    norm = nn.BatchNorm2d(3)
    nn.init.constant_(norm.bias, 2.0)
    silence(norm, torch.tensor([True, False, False]), beta=True)
    silence(norm, torch.tensor([2]), beta=False)
    assert norm.weight.tolist() == [0, 1, 0]
    assert norm.bias.tolist() == [0, 2, 2]


def test_above_by_hand():
    score = torch.tensor([0.0] * 10 + [11.0])  # mean 1, std √(110 / 10) = 3.317: 11 is 3.015 above
    assert above(score, 3.0).tolist() == [False] * 10 + [True]
    assert not above(score, 3.1).any()
    assert not above(torch.tensor([5.0]), 0.0).any()  # a layer of one channel has no deviation


def test_masks_of_one_are_the_net_and_others_scale_gamma_and_beta(preact):
    masks, x = Masks(copy.deepcopy(preact)), torch.rand(4, 3, 32, 32)
    gamma, beta = torch.rand_like(masks.mask), torch.rand_like(masks.mask)
    by_hand = copy.deepcopy(preact)
    for m, g, b in zip(affine(by_hand).values(), gamma.split(masks.sizes), beta.split(masks.sizes), strict=True):
        m.weight.data *= g
        m.bias.data *= b
    with torch.no_grad():
        assert torch.equal(masks(x), preact(x))
        assert torch.allclose(masks(x, gamma, beta), by_hand(x), atol=1e-5)
        assert torch.equal(masks(x), preact(x))  # nothing stays behind
    assert [n for n, p in masks.named_parameters() if p.requires_grad] == ["mask"]


def test_pruning_by_mask_zeroes_gamma_up_to_the_threshold_and_nothing_else(preact):
    masks, net = Masks(copy.deepcopy(preact)), copy.deepcopy(preact)
    with torch.no_grad():
        masks.mask.uniform_(-0.5, 1.5)
        masks.clip()
        masks.mask[:3] = torch.tensor([0.2, 0.2001, 0.1])
    assert float(masks.mask.detach().min()) == 0
    assert float(masks.mask.detach().max()) == 1
    masks.prune(net, 0.2)
    after, parts = net.state_dict(), dict(zip(masks.norms, masks.mask.split(masks.sizes), strict=True))
    for key, value in preact.state_dict().items():
        name, _, kind = key.rpartition(".")
        if kind == "weight" and name in parts:
            value = torch.where(parts[name] <= 0.2, 0, value)
        assert torch.equal(after[key], value)
    assert affine(net)["body.layer1.0.bn1"].weight[:3].eq(0).tolist() == [True, False, True]


# the rule

STEPS = [0.1, 0.2, 0.3, 0.4]


def planted(correct: dict[float, int]):
    """(net, prune, data): ten images, of which the net pruned at t classifies correct[t], and unpruned all."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():  # class 0 where x · w < b, pixels 0, 25, … 225
        net[1].weight.copy_(torch.tensor([[-1.0], [0.0]]))
        net[1].bias.copy_(torch.tensor([0.0, -2.0]))
    x = (torch.arange(10) * 25).to(torch.uint8).view(10, 1, 1, 1)

    def prune(net, t):
        """Adding to the bias shows if a pruning is put on top of another."""
        with torch.no_grad():
            net[1].bias[1] += 2 - (correct[t] * 25 - 12) / 255

    return net, prune, SimpleNamespace(clean=Split.clean(x, torch.zeros(10, dtype=torch.long)))


def test_accuracy_counts_and_keeps_the_mode():
    net, _, data = planted({})
    net.train()
    assert accuracy(net, data.clean) == 1.0
    assert net.training
    assert accuracy(net, Split.clean(data.clean.x, torch.arange(10) % 2)) == 0.5


@pytest.mark.parametrize(
    ("max_drop", "chosen", "looked_at"), [(0.0, None, 1), (0.1, 0.1, 2), (0.3, 0.2, 3), (0.5, 0.3, 4), (1.0, 0.4, 4)]
)
def test_the_last_threshold_within_the_budget(max_drop, chosen, looked_at):
    correct = {0.1: 9, 0.2: 7, 0.3: 5, 0.4: 2}
    net, prune, data = planted(correct)
    before = net[1].bias.detach().clone()
    curve = Rule("accuracy", 0.9, max_drop).prune(net, prune, STEPS, data)
    assert curve.chosen == chosen
    assert curve.accuracies.tolist() == pytest.approx([correct[t] / 10 for t in STEPS[:looked_at]])
    if chosen is None:
        assert torch.equal(net[1].bias, before)
    else:  # pruned once, at the threshold chosen
        assert accuracy(net, data.clean) == correct[chosen] / 10


@pytest.mark.parametrize(("max_drop", "said"), [(0.1, []), (0.05, ["RNP prunes nothing: at its first threshold, 0.1, "])])
def test_that_nothing_may_be_pruned_is_said(max_drop, said):
    class RNP(SimpleNamespace):
        pass

    net, prune, data = planted({0.1: 9, 0.2: 3, 0.3: 10, 0.4: 10})
    defense = RNP(net=net, notes=[], facts={}, extras={})
    Rule("accuracy", 0.0, max_drop).prune(net, prune, STEPS, data).report(defense)
    assert [note[: len(said[0])] for note in defense.notes] == said
    assert all("90.0%" in note for note in defense.notes)


def test_it_stops_where_the_budget_is_spent_though_more_pruning_would_fit_again():
    net, prune, data = planted({0.1: 9, 0.2: 3, 0.3: 10, 0.4: 10})
    assert Rule("accuracy", 0.0, 0.2).prune(net, prune, STEPS, data).chosen == 0.1


def test_a_fixed_threshold_looks_at_no_image():
    net, prune, data = planted({0.3: 5})
    curve = Rule("fixed", 0.3, 0.1).prune(net, prune, STEPS, SimpleNamespace())
    assert (curve.chosen, len(curve.thresholds)) == (0.3, 0)
    assert accuracy(net, data.clean) == 0.5
    assert Rule("fixed", 0.3, 0.1).needs == set()
    assert Rule("accuracy", 0.3, 0.1).needs == {"clean"}


def test_the_curve_is_kept_as_a_module_that_its_spec_builds_again():
    from bdx.build import instantiate

    curve = pruning.Curve([0.1, 0.2], [0.9, 0.8], 0.1)
    again = instantiate(curve.spec)
    again.load_state_dict(curve.state_dict())
    assert again.chosen == 0.1
    assert again.accuracies.tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (("oracle", 0.1, 0.1), "defense.select=oracle: expected accuracy or fixed"),
        (("fixed", 0.1, 10), "max_drop=10: expected a fr"),
    ],
)
def test_mistakes(rule, text):
    with pytest.raises(UserError, match=text):
        Rule(*rule)


def test_no_function_of_the_net_is_left_wrapped(preact):
    """After all of the above, the net's modules have no hooks."""
    feeders(preact)
    pruning.watch_norms(preact, torch.rand(2, 3, 32, 32), lambda z, m: F.relu(z).mean())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in preact.modules())
