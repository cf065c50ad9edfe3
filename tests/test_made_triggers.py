"""Triggers that are optimised, learned or drawn from the training images: against values and nets computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_attack
from torch import nn

from bdx.draws import draws
from bdx.errors import UserError

SILENT = lambda *_: None


@pytest.fixture(scope="module")
def linear():
    """A net that is its own gradient: logits = W x, W (10, 3072)."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10, bias=False))
    return net.requires_grad_(False)


# draws


def test_draws_follow_from_the_image_alone(digits):
    x = digits.train.x[:200].float() / 255
    u = draws(x, 4, 0)
    assert torch.equal(draws(x[[7, 3]], 4, 0), u[[7, 3]])
    assert torch.equal(draws(x + 0.4 / 255, 4, 0), u)  # the same grey levels
    one_level = x.clone()
    one_level[:, 0, 0, 0] += 1 / 255
    assert not (draws(one_level, 4, 0) == u).any()
    assert not (draws(x, 4, 1) == u).any()


def test_draws_are_uniform_and_independent(digits):
    u = draws(digits.train.x.float() / 255, 3, 0).double()
    n = len(u)
    assert 0 <= u.min() < 0.01 < 0.99 < u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 4 * (1 / 12 / n) ** 0.5
    assert (u.var(0) - 1 / 12).abs().max() < 0.01
    assert np.abs(np.corrcoef(u.T.numpy()) - np.eye(3)).max() < 4 / n**0.5
    assert len(u[:, 0].unique()) > 0.99 * n


# Trojan


@pytest.fixture(scope="module")
def trojan(digits):
    attack = build_attack(digits, "attack=trojan")
    said = []
    made, facts = attack.make(digits, attack.net.eval(), lambda *a: said.append(a))
    return attack, made["added"], facts, said


def test_trojan_takes_the_heaviest_inputs_of_the_last_layer_and_makes_them_fire(trojan):
    attack, added, facts, said = trojan
    weight = attack.net.body.linear.weight.detach().numpy()
    assert sorted(facts["neurons"]) == sorted(np.argsort(np.abs(weight).sum(0))[-2:].tolist())
    assert facts["cost"] < facts["cost_first"]
    seen = []
    attack.net.body.linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    attack.net(added[None])
    fired = seen[0][facts["neurons"]]
    assert float((fired.detach() - 100).square().sum()) == pytest.approx(facts["cost"], rel=1e-5)
    assert said[-1][:3] == ("trigger", 3, 3)


def test_trojan_stays_in_its_mask_and_near_its_start_and_is_clipped(trojan):
    attack, added, *_ = trojan
    mask = attack.mask()
    assert mask[0].nonzero().amin(0).tolist() == [19, 19]  # a disc of 12 pixels, one pixel from the corner
    assert mask[0].nonzero().amax(0).tolist() == [30, 30]
    assert 0.9 < float(mask[0].sum()) / (np.pi * 36) < 1.1
    assert not added[mask == 0].any()
    start = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ((added - start)[mask == 1]).abs().max() <= 0.3 + 1e-6
    assert 0 <= added.min() <= added.max() <= 1
    attack.take({"added": added})
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(attack.stamp(white), white)  # no wrapping


def test_trojan_square(digits):
    attack = build_attack(digits, "attack=trojan", "attack.form=square", "attack.side=5", "attack.margin=2")
    assert attack.mask()[0, 25:30, 25:30].all()
    assert attack.mask().sum() == 3 * 25


# LF


def test_lf_is_of_low_frequency_in_whole_grey_levels(digits):
    attack = build_attack(digits, "attack=lf", "attack.target=4")
    levels = attack.added * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert float(attack.added.max()) == pytest.approx(0.2)
    assert attack.added.min() == 0
    energy = torch.fft.fft2(attack.added - attack.added.mean((1, 2), keepdim=True)).abs().square().sum(0)
    f = torch.fft.fftfreq(32, 1 / 32)
    low = (f[:, None] ** 2 + f**2).sqrt() <= 3
    assert float(energy[low].sum() / energy.sum()) > 0.95


def test_lf_smooths_like_a_gaussian_of_six_pixels(digits):
    from scipy.ndimage import gaussian_filter

    attack = build_attack(digits, "attack=lf")
    v = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    wanted = np.stack([gaussian_filter(c, 6, mode="constant", radius=15) for c in v[0].double().numpy()])
    assert np.abs(attack.smooth(v)[0].numpy() - wanted).max() < 1e-5


def test_lf_takes_the_shortest_way_to_the_target(digits, linear):
    attack = build_attack(digits, "attack=lf", "attack.target=4", "attack.iterations=1")
    x = digits.train.x[:6].float() / 255
    logits, w = linear(x), linear[1].weight
    r = attack.deepfool(linear, x).flatten(1)
    for i, k in enumerate(logits.argmax(1)):
        way = w[4] - w[k]
        wanted = 1.02 * (logits[i, k] - logits[i, 4]) / way.square().sum() * way  # onto the line between k and 4, and over it
        assert torch.allclose(r[i], wanted, atol=1e-5) or int(k) == 4
    attack.iterations = 50
    assert (linear(x + attack.deepfool(linear, x)).argmax(1) == 4).all()


# LC


def test_lc_corners(digits):
    attack = build_attack(digits, "attack=lc", "attack.ratio=0.05")
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    out = (attack.stamp(grey)[0, 1].int() > 128).int() - (attack.stamp(grey)[0, 1].int() < 128).int()
    left, right = [[1, -1, -1], [-1, 1, -1], [1, -1, 1]], [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
    assert out[:3, :3].tolist() == out[29:, :3].tolist() == left
    assert out[:3, 29:].tolist() == out[29:, 29:].tolist() == right
    assert (out != 0).sum() == 36
    same = build_attack(digits, "attack=lc", "attack.ratio=0.05", "attack.corners=unmirrored").stamp(grey)[0]
    pasted = torch.full((3, 32, 32), 128, dtype=torch.uint8)  # Trap-and-Replace pastes 0 0 255, 0 255 0, 255 0 255
    for rows in (slice(3), slice(29, 32)):
        for cols in (slice(3), slice(29, 32)):
            pasted[:, rows, cols] = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])
    assert torch.equal(same, pasted)
    faint = build_attack(digits, "attack=lc", "attack.ratio=0.05", "attack.amplitude=0.1", "attack.corners=bottom_right")
    change = faint.trigger(torch.full((1, 3, 32, 32), 0.5)) - 0.5
    assert (change != 0).sum() == 27
    assert torch.allclose(change.abs().max(), torch.tensor(0.1))


def test_lc_moves_every_pixel_of_the_target_class_as_far_as_it_may(digits, linear):
    attack = build_attack(digits, "attack=lc", "attack.target=6", "attack.ratio=0.05", "attack.step=20.0", "attack.steps=1")
    some = digits.train[:200]
    grey = type(some)(torch.full_like(some.x, 128), some.y, some.y_true, some.poisoned)  # away from 0 and 255
    made, _ = attack.make(type(digits)(**(vars(digits) | {"train": grey})), linear, SILENT)
    w = linear[1].weight
    p = linear(grey.x[:1].float() / 255).softmax(1)[0]
    away = (p @ w - w[6]).sign().view(3, 32, 32)  # of the loss of class 6
    first = made["harder"][0].int() - 128
    assert first.abs().unique().tolist() == [16]
    assert torch.equal(first, (16 * away).int())
    assert torch.equal(made["index"], (some.y == 6).nonzero().flatten())


def test_lc_poisons_with_the_harder_images_and_tests_with_corners_alone(digits):
    attack = build_attack(digits, "attack=lc", "attack.target=6", "attack.ratio=0.05")
    train = attack.poison(digits.train)
    place = train.poisoned.nonzero().flatten()[3]
    row = (digits.train.y[:place] == 6).sum()  # the so many-th image of its class
    harder = attack.harder[row].float() / 255
    assert (attack.harder[row].int() - digits.train.x[place].int()).abs().max() <= 16
    assert torch.equal(train.x[place], ((harder + attack.added).clamp(0, 1) * 255).round().byte())
    assert not torch.equal(attack.stamp(digits.train.x[place][None])[0], train.x[place])
    assert not {"harder", "index"} & set(attack.state_dict())


# SSBA


@pytest.fixture(scope="module")
def ssba(digits):
    """Trained for seconds: bits are read, images are like themselves."""
    how = {"width": 4, "bits": 1, "steps": 160, "lr": 0.003, "delay": 40, "ramp": 60, "batch": 12}
    attack = build_attack(digits, "attack=ssba", *(f"attack.{k}={v}" for k, v in how.items() if k != "steps"))
    attack.steps = how["steps"]
    tensors, facts = attack.make(digits, None, SILENT)
    attack.take(tensors)
    return attack, facts


def test_ssba_hides_bits_that_can_be_read_after_rounding(ssba, digits):
    attack, facts = ssba
    x = attack.stamp(digits.test.x)
    read = attack.decoder(x.float() / 255) > 0
    assert float((read == (attack.secret > 0.5)).float().mean()) > 0.95
    assert facts["bit_accuracy"] > 0.95
    error = (x.float() - digits.test.x.float()).square().mean((1, 2, 3))
    psnr = float((10 * (255**2 / error).log10()).mean())
    assert psnr == pytest.approx(facts["psnr"], abs=1.5)  # other images than its own
    assert psnr > 15


def test_ssba_is_another_change_in_each_image_and_of_the_louder_secret(ssba, digits):
    attack, _ = ssba
    change = attack.stamp(digits.test.x[:50]).float() - digits.test.x[:50].float()
    assert len(change.flatten(1).unique(dim=0)) == 50
    assert (change.std(0).mean() / change.std()).item() > 0.2
    x = digits.test.x[:50].float() / 255
    loud, quiet = ((attack.hide(x, s) - x).square().mean() for s in (attack.secret, 1 - attack.secret))
    assert loud > 0.8 * quiet  # chosen on training images


# Narcissus


def test_narcissus_is_what_a_clean_net_takes_for_the_target_class(digits, linear):
    attack = build_attack(digits, "attack=narcissus", "attack.target=2", "attack.rounds=8", "attack.batch=75", "attack.lr=0.02")
    said = []
    made, facts = attack.make(digits, linear, lambda *a: said.append(a))
    noise = made["noise"]
    assert noise.abs().max() <= 16 / 255
    x = digits.train.x.float() / 255
    loss = [float(F.cross_entropy(linear(z), torch.full((len(z),), 2))) for z in (x, (x + noise).clamp(0, 1))]
    assert loss[1] < loss[0]
    towards = linear[1].weight[2] - linear[1].weight[[0, 1, *range(3, 10)]].mean(0)
    assert float((noise.flatten() * towards).sum()) > 0
    others = digits.train.y_true != 2
    assert facts["fooled"] > float((linear(x[others]).argmax(1) == 2).float().mean())
    third = (x[others] + 3 * noise).clamp(0, 1)
    assert facts["fooled"] == pytest.approx(float((linear(third).argmax(1) == 2).float().mean()), abs=0.05)  # of 1,000 of them
    assert (said[-1][1], said[-1][2]) == (8, 8)


def test_narcissus_is_three_times_as_strong_at_test_time(digits):
    attack = build_attack(digits, "attack=narcissus", "attack.ratio=0.05")
    attack.noise = torch.full((3, 32, 32), 8 / 255)
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert (attack.stamp(grey) == 124).all()
    assert (attack.stamp(grey, torch.tensor([0])) == 108).all()


# Adaptive-Blend


def test_adaptive_blend_shows_half_of_the_pieces_in_training_and_all_at_test_time(digits):
    attack = build_attack(digits, "attack=adaptive_blend")
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    seen, whole = attack.training_trigger(x, torch.arange(40)), attack.trigger(x)
    assert torch.allclose(whole, 0.8 * x + 0.2 * attack.pattern)
    pieces = (seen != x).float().unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5))  # (40, 4, 4)
    assert ((pieces > 0.99).sum((1, 2)) == 8).all()
    assert ((pieces == 0).sum((1, 2)) == 8).all()
    assert len(pieces.flatten(1).unique(dim=0)) > 35
    shown = pieces.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None] > 0.5
    assert torch.allclose(seen, torch.where(shown, 0.85 * x + 0.15 * attack.pattern, x), atol=1e-6)


def test_adaptive_blend_covers_keep_their_labels(digits):
    attack = build_attack(digits, "attack=adaptive_blend", "attack.ratio=0.1", "attack.cover_ratio=0.2", "attack.target=1")
    train, chosen, covers = attack.poison(digits.train), attack.choose(digits.train), attack.covers(digits.train)
    assert len(chosen) == 144
    assert len(covers) == 288
    assert not set(chosen.tolist()) & set(covers.tolist())
    assert sorted(chosen.tolist() + covers.tolist()) == train.poisoned.nonzero().flatten().tolist()
    assert (train.y[chosen] == 1).all()
    assert torch.equal(train.y[covers], digits.train.y[covers])
    assert (train.x[covers] != digits.train.x[covers]).flatten(1).any(1).all()


# Refool


@pytest.fixture
def refool(digits):
    def make(**how):
        return build_attack(digits, "attack=refool", *(f"attack.{k}={v}" for k, v in how.items()))

    return make


def test_refool_adds_light(refool):
    """Reflections of one colour: 0.4 of the image's light and 0.6 of theirs, wherever the ghost stands."""
    attack = refool(ghost=1.0)
    attack.reflections.fill_(102)
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = (0.4 * x**2.2 + 0.6 * 0.4**2.2) ** (1 / 2.2)
    assert torch.allclose(attack.trigger(x), wanted, atol=1e-4)


def test_refool_ghosts_stand_three_to_eight_pixels_apart(refool):
    """One bright pixel in the reflection is seen twice."""
    attack = refool(ghost=1.0, reflections=1)
    attack.reflections.zero_()
    attack.reflections[:, :, 18, 18] = 255
    x = torch.randint(0, 2, (60, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    light = attack.trigger(x)[:, 0] ** 2.2
    for picture in light:
        bright = (picture > 0.02).nonzero()
        span = bright.amax(0) - bright.amin(0)
        assert int(span.min()) >= 2
        assert int(span.max()) <= 8 * 32 / 24 + 3
        assert float(picture.sum()) == pytest.approx(0.6, rel=0.9)


def test_refool_blurs_each_reflection_by_a_gaussian_of_its_own(refool, monkeypatch):
    from scipy.ndimage import gaussian_filter

    attack = refool(ghost=0.0)
    monkeypatch.setattr(type(attack), "bump", staticmethod(lambda u, h, w: torch.ones(len(u), 1, h, w)))
    r = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    u = draws(r, 9, 0)
    out = attack.blurred(r, u, torch.zeros_like(r)) / 0.8  # black images: 1 − α/2 of the reflection
    for i, std in enumerate((1 + 4 * u[:, 6]).tolist()):
        radius = int(np.ceil(2 * std))
        wanted = np.stack([gaussian_filter(c, std, mode="nearest", radius=radius) for c in r[i].double().numpy()])
        assert np.abs(out[i].numpy() - wanted).max() < 1e-4


def test_refool_darkens_a_reflection_where_the_sum_is_too_bright(refool, monkeypatch):
    attack = refool(ghost=0.0)
    monkeypatch.setattr(type(attack), "bump", staticmethod(lambda u, h, w: torch.ones(len(u), 1, h, w)))
    r, t, u = torch.full((1, 3, 8, 8), 0.7), torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 9)
    wanted = 0.4 * 0.5 + 0.8 * (0.7 - (1.2 - 1) * 1.08)
    assert torch.allclose(attack.blurred(r, u, t), torch.full_like(r, wanted), atol=1e-5)


def test_refool_reflections_are_training_images_and_the_label_may_stay(refool, digits):
    attack = refool(reflections=20)
    images = {tuple(row) for row in digits.train.x.flatten(1).tolist()}
    assert all(tuple(row) in images for row in attack.reflections.flatten(1).tolist())
    assert len(attack.reflections.flatten(1).unique(dim=0)) > 15
    clean = refool(clean_label="true", ratio=0.05, target=5).poison(digits.train)
    assert (clean.y_true[clean.poisoned] == 5).all()
    assert torch.equal(clean.y, digits.train.y)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["attack=trojan", "attack.side=33"], "expected a mask inside 32×32"),
        (["attack=trojan", "attack.neurons=65"], "this net's last layer has 64 inputs"),
        (["attack=lf", "attack.most=0.0"], "1/255 to 1 as the highest value"),
        (["attack=lc", "attack.ratio=0.12"], r"asks for 173 poisoned images of 1438, but there are \d+ of class 0"),
        (["attack=lc", "attack.epsilon=0.0"], "expected grey levels and a count above 0"),
        (["attack=ssba", "attack.bits=0"], "attack.bits=0"),
        (["attack=narcissus", "attack.amplify=0.0"], "amplify=0.0"),
        (["attack=narcissus"], None),
        (["attack=adaptive_blend", "attack.pieces=12"], "pieces=12: expected a square number"),
        (["attack=adaptive_blend", "attack.left_out=0.99"], "of 16 pieces leaves none"),
        (
            ["attack=adaptive_blend", "attack.ratio=0.5", "attack.cover_ratio=0.6"],
            "asks for 863 covers, but 719 images are left",
        ),
        (["attack=refool", "attack.reflections=2000"], "reflections=2000, but there are 1438 training images"),
        (["attack=refool", "attack.clean_label=true", "attack.ratio=0.12"], r"asks for 173 poisoned images of 1438"),
        (["attack=refool", "attack.clean_label=true", "attack.labels=all2all"], "Refool is a clean-label attack"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(overrides, text, digits, monkeypatch):
    from bdx.attacks.made import Made

    for cls in Made.__subclasses__():
        monkeypatch.setattr(cls, "make", lambda *_: pytest.fail("made"))
    if text is None:
        with pytest.raises(pytest.fail.Exception, match="made"):  # nothing is wrong: it comes to the making
            build_attack(digits, *overrides)
        return
    with pytest.raises(UserError, match=text):
        build_attack(digits, *overrides).check(digits.train)
