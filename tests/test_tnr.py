"""Trap-and-Replace: cuts in any net, the decoder, what each stage may touch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_attack
from torch import nn

import bdx.run
from bdx import places
from bdx.configure import compose
from bdx.decoder import Decoder, total_variation
from bdx.defenses.tnr import Replace, Trap
from bdx.errors import UserError
from bdx.run import build_defense

SHORT = ["defense.trap.epochs=1", "defense.replace.epochs=1", "defense.replace.batch=32"]


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


@pytest.fixture(scope="module")
def poisoned(attack, digits):
    return digits.poisoned(attack.poison(digits.train))


def made(attack, *overrides):
    torch.manual_seed(0)
    return build_defense(compose([*TINY, "defense=tnr", *SHORT, *overrides]), attack)


def net_of(digits, arch: str, *overrides: str):
    return bdx.run.build_attack(compose([*(o for o in TINY if "width" not in o), f"arch={arch}", *overrides]), digits).net


# cuts


@pytest.mark.parametrize(
    ("arch", "head", "at", "share", "shape"),
    [
        ("wrn16_1", 1, "block3.1", 778, (64, 8, 8)), ("wrn16_1", 3, "block3.0", 74_890, (64, 8, 8)),
        ("wrn16_1", 5, "block2.1", 132_618, (32, 16, 16)),
        ("resnet34", 3, "layer4.1", None, (512, 1, 1)), ("resnet34", 7, "layer3.5", None, (256, 2, 2)),
        ("vgg19_bn", 3, "features.49", None, (512, 2, 2)),
    ],
)  # fmt: skip
def test_cuts_of_the_papers(arch, head, at, share, shape, digits):
    """Table 5: head parameters as printed for WRN16-1 at 10 classes."""
    net = net_of(digits, arch)
    cut = places.choose_cut(net, head, None)
    assert (cut.at, cut.shape) == (f"body.{at}", shape)
    if share:
        assert round(cut.share * sum(p.numel() for p in net.parameters())) == share


def test_behind_a_cut_only_its_output_counts(attack):
    """Every cut found: with the head's modules in place and the stem's output fixed, the image no longer matters."""
    net = attack.net.eval()
    found = places.cuts(net, torch.rand(2, 3, 32, 32))
    assert {"body.layer4.0", "body.layer2.0.bn1", "body.avgpool"} <= {c.at for c in found}
    assert not any(".conv2" in c.at or ".bn2" in c.at for c in found)  # on a residual branch
    fixed = torch.randn(1, *next(c.shape for c in found if c.at == "body.layer4.0"))
    hook = net.get_submodule("body.layer4.0").register_forward_hook(lambda *_: fixed)
    with torch.no_grad():
        assert torch.equal(net(torch.rand(1, 3, 32, 32)), net(torch.rand(1, 3, 32, 32)))
    hook.remove()


def test_layers_that_work_in_place_are_no_obstacle(digits):
    found = places.cuts(net_of(digits, "resnet18"), torch.rand(2, 3, 32, 32))
    assert {"body.layer1.0", "body.layer4.1"} <= {c.at for c in found}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["defense.head=4"], r"defense.head=4: the net cannot be cut there.*3 \(behind layer4.0, 42.4% of the parameters\)"),
        (["defense.cut=layer4.1.conv1"], r"defense.cut=layer4.1.conv1: .*heads that can be: 1 \(behind layer4.1"),
        (["defense.cut=layer5"], r"defense\.cut=layer5: no such layer \(did you mean layer"),
        (["defense.decoder=[8,8,8]"], r"decoder=\[8, 8, 8\]: from \(64, 4, 4\) to .* there are 2 hidden layers"),
        (["defense.stages=first"], "defense.stages=first: expected one of both, trap, replace"),
        (["defense.replace.dropout=1.0"], "defense.replace.dropout=1.0, label_smoothing=0.1: expected 0 up to, but not, 1"),
        (["defense.lambda_rec=-1.0"], "lambda_rec=-1.0, lambda_tv=0.1, latent=0.0, replace.cutmix=1.0: expected none below 0"),
        (["defense.replace.cutmix=-1.0"], "replace.cutmix=-1.0: expected none below 0"),
        (["defense.trap.epochs=0"], "defense.trap.epochs=0: expected at least 1"),
        (["defense.trap.optimizer.lr=-1"], "defense.trap.optimizer cannot be used: Invalid learning rate"),
    ],
)
def test_mistakes(overrides, message, attack):
    with pytest.raises(UserError, match=message):
        build_defense(compose([*TINY, "defense=tnr", *overrides]), attack)


# the decoder


@pytest.mark.parametrize(
    ("shape", "image", "widths", "size"),
    [
        ((64, 8, 8), (3, 32, 32), None, 34_339), ((32, 16, 16), (3, 32, 32), None, 17_283),
        ((512, 7, 7), (3, 224, 224), None, 2_787_299),
    ],
)  # fmt: skip
def test_decoders_as_the_released_code_has_them(shape, image, widths, size):
    decoder = Decoder(shape, image, widths)
    assert sum(p.numel() for p in decoder.parameters()) == size
    with torch.no_grad():
        out = decoder(torch.randn(2, *shape))
    assert out.shape == (2, *image)
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize("shape", [(16, 4, 4), (8, 1, 1), (32,), (17, 24), (16, 24), (12, 5, 7), (6, 32, 32)])
@pytest.mark.parametrize("image", [(3, 32, 32), (1, 28, 28), (3, 48, 64)])
def test_any_stem_and_image_size(shape, image):
    out = Decoder(shape, image, None)(torch.randn(2, *shape))
    assert out.shape == (2, *image)


def test_total_variation_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [0.5, 1.0]]]])
    assert float(total_variation(x)) == pytest.approx((0.25 + 0 + 1 + 0.25) / 4)


# the stages


def test_the_bait_by_hand(attack, digits):
    defense = made(attack)
    stage = Trap(defense.net.eval(), defense.cut.at, defense.decoder, 10.0, 0.1, defense.trap)
    b = next(iter(digits.batches(digits.clean, size=8, shuffle=False, augment=False)))
    out, (logits, again) = stage.training_step(b, 0), stage(b.x)
    mse = (again - b.x).square().mean()
    assert torch.allclose(out["loss"], F.cross_entropy(logits, b.y) + 10 * mse + 1.0 * total_variation(again), atol=1e-5)


def test_stage_two_touches_the_head_alone(attack, digits, poisoned, quick_trainer):
    defense, at = made(attack), {}

    def noting(stage, epochs):
        at[stage] = {k: v.clone() for k, v in defense.net.state_dict().items()}
        return quick_trainer(stage, epochs)

    net = defense.run(poisoned.allow(defense.needs), noting)
    head = tuple(f"{n}." for n in defense.cut.head)
    assert head == ("body.layer4.1.", "body.avgpool.", "body.linear.")
    came, before, after = attack.net.state_dict(), at["replace"], net.state_dict()
    assert not torch.equal(at["trap"]["body.conv1.weight"], came["body.conv1.weight"])  # from fresh weights
    for name, value in after.items():
        if not name.startswith(head):
            assert torch.equal(value, before[name]), name  # BatchNorm's statistics too
    assert not torch.equal(after["body.layer4.1.bn1.running_mean"], before["body.layer4.1.bn1.running_mean"])
    assert not torch.equal(after["body.linear.weight"], before["body.linear.weight"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())  # no dropout is left behind
    assert net.body.linear.weight.requires_grad
    assert 0 < defense.facts["reconstruction_mse"] < 1
    assert defense.pictures["reconstructions"].shape == (2, 8, 3, 32, 32)


@pytest.mark.parametrize(("stages", "seen"), [("trap", ["trap"]), ("replace", ["replace"]), ("both", ["trap", "replace"])])
def test_either_stage_alone(stages, seen, attack, poisoned, quick_trainer):
    defense, ran = made(attack, f"defense.stages={stages}"), []
    net = defense.run(poisoned.allow(defense.needs), lambda s, e: (ran.append(s), quick_trainer(s, e))[1])
    assert ran == seen
    kept = torch.equal(net.body.conv1.weight, attack.net.body.conv1.weight)
    assert kept == (stages == "replace")


def test_the_head_starts_afresh(attack, digits, poisoned):
    defense, fresh = made(attack, "defense.stages=replace"), {}

    def stop(stage, epochs):
        fresh["linear"] = defense.net.body.linear.weight.clone()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        defense.run(poisoned.allow(defense.needs), stop)
    assert not torch.equal(fresh["linear"], attack.net.body.linear.weight)


@pytest.mark.parametrize(("recipe", "places_of_dropout"), [("code", 1), ("paper", 2)])
def test_dropout_inside_the_block_and_behind_it(recipe, places_of_dropout, attack, monkeypatch):
    defense, drawn = made(attack, f"defense.recipe={recipe}"), []
    original = F.dropout
    monkeypatch.setattr(F, "dropout", lambda z, p, training: (drawn.append((p, training)), original(z, p, training))[1])
    stage = Replace(defense.net, [defense.net.get_submodule(n) for n in defense.cut.head], defense.replace)
    with defense.dropout():
        stage.net(torch.rand(2, 3, 32, 32))
    assert drawn == [(0.5, True)] * places_of_dropout
    norms = {n: m for n, m in defense.net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert [n for n, m in norms.items() if m.training] == [n for n in norms if n.startswith(defense.cut.head)] != []


def test_the_reserved_images_are_not_baited(attack, digits, poisoned):
    left = poisoned.without_reserved()
    assert len(left) == len(digits.train) - len(digits.clean)
    assert len(replace(poisoned, held_out=True).without_reserved()) == len(digits.train)
    marked = replace(poisoned, train=replace(poisoned.train, poisoned=torch.zeros_like(poisoned.train.poisoned)))
    marked.train.poisoned[poisoned.reserved] = True
    assert not marked.without_reserved().poisoned.any()


def test_a_clean_training_set_is_no_obstacle(cell):
    """Table 10: trained and repaired without an attack; there is an ACC and nothing else."""
    row = cell("attack=none", "train.epochs=1", "defense=tnr", *SHORT)
    assert row["asr"] is row["der"] is row["tpr"] is None
    assert row["acc"] > 0
    assert row["reconstruction_mse"] > 0


# an attacker who has a hand in the trap


def test_the_latent_attacker_adds_her_term_to_the_traps_loss(digits):
    lba = build_attack(digits, "attack=lba", "attack.head=1", "attack.target=3")
    data = digits.poisoned(lba.poison(digits.train))
    defense, seen = made(lba, "defense.latent=0.5"), []
    defense.run(
        data.allow(defense.needs), lambda stage, epochs: SimpleNamespace(fit=lambda of, batches: seen.append((of, batches)))
    )
    (trap, batches), _ = seen
    batch = next(iter(batches))
    out = trap.eval().training_step(batch, 0)
    share = (batch.y == 3) & ~data.without_reserved().poisoned[batch.index]
    goal = lba.features(trap.net, batch.x[share]).mean(0)
    latent = (lba.features(trap.net, lba.trigger(batch.x)) - goal).square().mean()
    bare = out["ce"] + defense.lambda_rec * (out["mse"] + defense.lambda_tv * out["tv"])
    assert latent > 0
    assert torch.allclose(out["latent"], 0.5 * latent, rtol=1e-4)
    assert torch.allclose(out["loss"], bare + 0.5 * latent, rtol=1e-4)


@pytest.mark.parametrize(("other", "words"), [("badnets", []), ("lba", ["defense.stages=replace"])])
def test_no_other_attacker_has_one(other, words, digits):
    asked = build_attack(digits, f"attack={other}", *["attack.head=1"] * (other == "lba"))
    with pytest.raises(UserError, match=r"defense\.latent=0\.5, stages=\w+: only attack=lba has a say in the trap's training"):
        made(asked, "defense.latent=0.5", *words)
    assert made(asked, *words).attacker is None
