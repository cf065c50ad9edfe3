"""Options of any attack: adversarial training of the victim, several triggers at once, labels, targets, ratios, mistakes."""

from __future__ import annotations

import dataclasses
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_attack, names, paths
from PIL import Image

from bdx.adversarial import Budget, hardened
from bdx.attacks.base import Attack
from bdx.configure import compose
from bdx.errors import UserError
from bdx.evaluate import look, score, scrambled_asr
from bdx.info import rows
from bdx.recipe import of_backdoor
from bdx.run import build_defense, check, control, run
from bdx.screen import Screen
from bdx.split import Split, pixels
from bdx.surgery import mode

DIRTY = [name for name, _, needs, *_ in rows("attack") if needs.startswith("dirty label, poisons data") and name != "lba"]


# adversarial training

EXTRA = {
    "blind": ["attack.history=3", "attack.threshold=1000.0"],
    "input_aware": ["attack.mask.epochs=1", "attack.widths=[8,8]"],
}


def test_without_steps_training_is_what_it_was(digits):
    attack = build_attack(digits, "attack=badnets")
    x, y = pixels(digits.train.x[:16]), digits.train.y[:16]
    assert attack.recipe.budget is None
    assert hardened(attack.net, x, y, None) is x
    attack.net.eval()
    assert torch.equal(attack.loss(x, y), F.cross_entropy(attack.net(x), y))


def test_one_step_of_a_linear_net_by_hand():
    """Logits (0, x₀ − x₁): for label 0 the loss grows with x₀ and falls with x₁; clamped to [0,1]."""

    class Net(torch.nn.Module):
        def forward(self, x):
            d = x[:, 0, 0, 0] - x[:, 0, 0, 1]
            return torch.stack([torch.zeros_like(d), d], 1)

    budget = Budget(norm="linf", radius=0.25, step=0.125, steps=3, along="sign", stop=None)
    x = torch.tensor([0.5, 0.125, 0.5]).view(1, 1, 1, 3)
    assert hardened(Net(), x, torch.tensor([0]), budget).flatten().tolist() == [0.75, 0.0, 0.5]
    assert hardened(Net(), x, torch.tensor([1]), budget).flatten().tolist() == [0.25, 0.375, 0.5]


def test_the_loss_is_that_of_worse_images_and_batchnorm_moves_once(digits):
    plain, hard = (build_attack(digits, "attack=badnets", f"train.adversarial.steps={n}") for n in (0, 3))
    x, y = pixels(digits.train.x[:64]), digits.train.y[:64]
    norm = hard.net.body.layer1[0].bn1
    before = norm.running_mean.clone()
    again = hardened(hard.net.train(), x, y, hard.recipe.budget)
    assert torch.equal(norm.running_mean, before)
    assert norm.momentum == 0.1
    assert 0.02 < float((again - x).abs().max()) <= 0.0314
    assert again.min() >= 0
    assert again.max() <= 1
    with mode(plain.net, True):
        assert F.cross_entropy(plain.net(again), y) > F.cross_entropy(plain.net(x), y)


def test_adversarial_training_resists_where_plain_training_does_not(digits, quick_trainer):
    """A linear net: what it learns from shifted images holds against another budget than the one trained on."""

    def right(*overrides) -> float:
        attack = build_attack(digits, "attack=badnets", "train.epochs=8", "train.schedule.max_lr=0.01", *overrides)
        attack.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
        attack.fit(digits.poisoned(attack.poison(digits.train)), quick_trainer)
        budget = Budget(norm="linf", radius=0.08, step=0.02, steps=8, along="sign", stop=None)
        x, y = pixels(digits.test.x), digits.test.y
        return float((attack.net(hardened(attack.net, x, y, budget)).argmax(1) == y).float().mean())

    hard = ["train.adversarial.steps=1", "train.adversarial.radius=0.1", "train.adversarial.step=0.1"]
    assert right(*hard) > right() + 0.15


def test_it_composes_with_sharpness_aware_minimisation(digits, quick_trainer):
    few = dataclasses.replace(digits, train=digits.train[:128])
    weights = []
    for rho, steps in ((0.0, 1), (1.0, 0), (1.0, 1)):
        asked = [f"train.sam_rho={rho}", f"train.adversarial.steps={steps}", "train.epochs=1"]
        attack = build_attack(digits, "attack=badnets", *asked)
        attack.fit(few.poisoned(attack.poison(few.train)), quick_trainer)
        weights.append(attack.net.body.linear.weight.detach())
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))


def test_labels_mixed_by_cutmix_are_taken(digits):
    attack = build_attack(digits, "attack=badnets", "train.adversarial.steps=1")
    soft = F.one_hot(digits.train.y[:8], 10).float() * 0.7 + 0.03
    assert torch.isfinite(attack.loss(pixels(digits.train.x[:8]), soft))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.adversarial.steps=-1", r"train\.adversarial: .*steps=-1: expected positive numbers"),
        ("train.adversarial.norm=l3", r"train\.adversarial: norm='l3': expected one of l2, linf, l1"),
        ("train.adversarial.along=both", r"train\.adversarial: along='both': expected sign or gradient"),
        ("train.precision=16-mixed", r"train\.adversarial\.steps=2: expected bf16-mixed or 32-true"),
    ],
)
def test_mistakes_in_adversarial_training(override, text, digits):
    with pytest.raises(UserError, match=text):
        build_attack(digits, "attack=badnets", "train.adversarial.steps=2", override)


@pytest.mark.parametrize("name", [n for n in names("attack") if n not in ("base", "given")])  # given: nobody trains
def test_any_attack_may_harden_its_victim(name, digits):
    attack = build_attack(digits, f"attack={name}", "train.adversarial.steps=2", *EXTRA.get(name, []))
    check(build_defense(compose([*TINY, "defense=none"]), attack), attack)


@pytest.mark.parametrize("name", ["blind", "bpp_controlled", "input_aware", "lira", "wanet"])
def test_an_attacker_who_trains_shows_the_victim_worse_images(name, digits, quick_trainer):
    few, weights = dataclasses.replace(digits, train=digits.train[:128]), []
    for steps in (0, 1):
        asked = [f"train.adversarial.steps={steps}", "train.epochs=2", "train.batch=32", *EXTRA.get(name, [])]
        attack = build_attack(few, f"attack={name}", *asked)
        attack.fit(few, quick_trainer)
        weights.append(attack.net.body.linear.weight.detach())
    assert not torch.equal(*weights)


def test_the_painter_of_a_hardened_victim_still_learns(digits):
    """The loss is that of worse images, and what made them gets its gradient."""
    ces = []
    for steps in (0, 3):
        attack = build_attack(digits, "attack=input_aware", f"train.adversarial.steps={steps}").train()
        torch.manual_seed(0)
        ce, _ = attack.losses(next(iter(attack.batches(digits))))
        grads = torch.autograd.grad(ce, list(attack.maker.parameters()), allow_unused=True)
        assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0
        ces.append(float(ce.detach()))
    assert ces[1] > ces[0]


class Own(Attack):
    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch.x), batch.y)


class Hardening(Own):
    hardens = True


def test_an_attack_that_trains_in_a_way_of_its_own_is_refused(digits):
    attack = build_attack(digits, "attack=badnets", "train.adversarial.steps=2")
    defense = build_defense(compose([*TINY, "defense=none"]), attack)
    check(defense, attack)
    attack.__class__ = Own
    with pytest.raises(UserError, match=r"train\.adversarial\.steps=2: Own trains the victim in a way of its own"):
        check(defense, attack)
    attack.__class__ = Hardening
    check(defense, attack)


# labels, targets, ratios


@pytest.mark.parametrize("name", DIRTY)
def test_all_to_all_any_target_and_any_ratio(name, digits):
    attack = build_attack(digits, f"attack={name}")
    attack.cover_ratio = 0.0  # of Adaptive-Blend: its covers keep their labels
    parts = list(getattr(attack, "parts", {"": attack}).values())
    for ratio, labels, target in ((0.001, "all2all", 0), (0.5, "all2all", 0), (0.5, "all2one", 9)):
        for part in parts:
            part.ratio, part.labels, part.target = ratio / len(parts), labels, target
        train = attack.poison(digits.train)
        p = train.poisoned
        assert int(p.sum()) == sum(round(part.ratio * len(train)) for part in parts)
        wanted = (train.y_true[p] + 1) % 10 if labels == "all2all" else torch.full_like(train.y[p], target)
        assert torch.equal(train.y[p], wanted)
        assert torch.equal(train.y[~p], digits.train.y[~p])


@pytest.mark.parametrize("name", ["sig", "lc"])
def test_more_images_than_a_small_class_has_are_refused_before_training(name, tmp_path, monkeypatch):
    """43 classes, as GTSRB, of 5 images: a tenth of 215 is more than any of them has."""
    monkeypatch.setattr("bdx.backdoor.fit", lambda *_: pytest.fail("trained"))
    for k in range(43):
        for split, count in (("train", 5), ("test", 1)):
            for i in range(count):
                (tmp_path / split / f"{k:02}").mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (6 * k, 0, i)).save(tmp_path / split / f"{k:02}" / f"{i}.png")
    words = ["dataset=folder", f"dataset.source.root={tmp_path}", "dataset.source.size=8", "dataset.reserved.count=43"]
    text = (
        r"^attack\.ratio=0\.1 asks for 22 poisoned images of 215, but there are 5 of class 7; expected attack\.ratio between "
        r"0\.0047 and 0\.02326, or attack\.ratio_of=candidates for a share of those$"
    )
    with pytest.raises(UserError, match=text):
        run(
            compose([*words, *TINY[2:], *paths(tmp_path), f"attack={name}", "attack.target=7", "defense=none"]),
            Screen(quiet=True),
        )


# several triggers at once


THREE = "attack.parts=[{attack:badnets,target:3,ratio:0.1},{attack:sig,target:2,ratio:0.05},{attack:badnets,position:top_left}]"


@pytest.fixture(scope="module")
def three(digits) -> Attack:
    return build_attack(digits, "attack=multi", THREE, "attack.ratio=0.15", "attack.target=5")


def test_parts_take_from_the_whole_what_they_do_not_say(three):
    parts = three.parts
    assert list(parts) == ["badnets", "sig", "badnets_no2"]
    assert [p.target for p in parts.values()] == [3, 2, 5]
    assert [p.ratio for p in parts.values()] == pytest.approx([0.1, 0.05, 0.05])
    assert three.ratio == pytest.approx(0.2)
    assert not any(".net." in key for key in three.state_dict())


def test_each_part_poisons_images_of_its_own(three, digits):
    train, clean = three.poison(digits.train), digits.train
    assert int(train.poisoned.sum()) == 144 + 72 + 72
    white = (train.x[:, :, 29:, 29:] == 255).flatten(1).all(1) & (train.x != clean.x).flatten(1).any(1)
    other = (train.x[:, :, :3, :3] == 255).flatten(1).all(1)
    assert int((white & other).sum()) == 0
    assert int((train.y[white] == 3).sum()) == int(white.sum()) == 144
    assert int((train.y[other] == 5).sum()) == int(other.sum()) == 72
    waved = train.poisoned & ~white & ~other
    assert torch.equal(train.x[waved], three.parts["sig"].stamp(clean.x[waved]))
    assert (train.y[waved] == 2).all()
    assert torch.equal(train.y[waved], clean.y[waved])
    assert torch.equal(train.x[~train.poisoned], clean.x[~train.poisoned])


def test_a_batch_of_which_nothing_is_known_gets_the_triggers_in_turn(three, digits):
    x = digits.test.x[:8]
    out = three.stamp(x)
    for i, part in enumerate(three.parts.values()):
        assert torch.equal(out[i::3], part.stamp(x[i::3]))
    assert three.relabel(digits.test.y[:4]).tolist() == [3, 2, 5, 3]
    assert torch.allclose(three.trigger(x.float() / 255) * 255, out.float(), atol=0.51)


def test_asr_is_counted_over_all_pairs_and_for_each_trigger(three, digits):
    """A net that calls an image 3 where its lower right corner is white, else 0; counted by hand."""

    class Net(torch.nn.Module):
        def forward(self, x):
            return 1.0 * F.one_hot(3 * (x[:, :, 29:, 29:].flatten(1).amin(1) == 1).long(), 10)

    test = digits.test[torch.tensor([i for k in range(6) for i in (digits.test.y_true == k).nonzero()[:2, 0].tolist()])]
    found = score(look(Net(), three, test))
    assert found["asr_badnets"] == 1
    assert found["asr_sig"] == found["asr_badnets_no2"] == 0
    assert found["asr"] == 10 / 30  # each trigger on the 10 of 12 images that are not of its class
    assert found["ra_badnets"] == 0
    assert found["ra_sig"] == 2 / 10  # those of class 0
    assert found["ra"] == 4 / 30


@pytest.mark.parametrize(
    ("asks", "expected", "said"),
    [  # of a black image with 9 white pixels in its corner; scrambled they lie elsewhere
        (lambda x: x[:, :, 29:, 29:].flatten(1).amin(1) == 1, 0, []),  # the pattern
        (lambda x: x.mean(1).flatten(1).sum(1).round() >= 9, 1, ["of the ASR after the repair, 100.0%, 100.0% is left"]),
    ],
)
def test_a_scrambled_trigger_tells_whether_the_pattern_is_needed(asks, expected, said, digits):
    """Two nets of ASR 1: one answers to the white corner, one to that many bright pixels wherever they are."""

    class Net(torch.nn.Module):
        def forward(self, x):
            return 1.0 * F.one_hot(3 * asks(x).long(), 10)

    attack = build_attack(digits, "attack=badnets", "attack.target=3")
    attack.net, screen, heard = Net(), Screen(), []
    screen.say = heard.append
    test = Split.clean(torch.zeros(12, 3, 32, 32, dtype=torch.uint8), torch.arange(12) % 10)
    found = score(look(Net(), attack, test))
    assert found["asr"] == 1
    assert scrambled_asr(Net(), attack, test) == expected
    assert control(0.5, expected, 1.0, screen) == {"scrambled_asr_before": 0.5, "scrambled_asr": expected}
    assert [h[:46] for h in heard] == [s[:46] for s in said]


@pytest.mark.parametrize("attack", ["none", "multi"])
def test_without_one_trigger_nothing_is_scrambled(attack, digits):
    found = build_attack(digits, f"attack={attack}")
    assert scrambled_asr(found.net, found, digits.test) is None


def test_a_row_names_every_trigger(cell):
    row = cell("attack=multi", "train.epochs=1", "train.batch=256", "defense=none")
    both = (row["asr_badnets"] + row["asr_blended"]) / 2
    assert row["asr"] == pytest.approx(both, abs=0.01)
    assert {"asr_badnets_before", "ra_blended_before", "ra_badnets"} <= set(row)
    assert row["n_poisoned"] == 144


def test_a_part_s_settings_are_part_of_the_recipe():
    one, same, other = (
        of_backdoor(compose(["attack=multi", f"attack.parts=[{{attack:badnets{more}}}]"]), "") for more in ("", "", ",patch:4")
    )
    assert one == same
    assert one["attack"]["parts"][0]["patch"] == 3
    assert one != other


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ("[]", r"attack\.parts=\[\]: expected at least one"),
        ("[badnets]", r"attack\.parts, badnets: expected \{attack: NAME"),
        ("[{target:1}]", r"expected \{attack: NAME"),
        ("[{attack:badnest}]", r"attack\.parts, .*no such attack \(did you mean badnets"),
        ("[{attack:badnets,targt:1}]", r"attack\.targt: no such key \(did you mean attack\.target"),
        ("[{attack:badnets,target:1.5}]", r"attack\.target=1\.5: expected a whole number"),
        ("[{attack:multi}]", "several in several"),
        ("[{attack:none}]", "NoAttack has no trigger"),
        ("[{attack:badnets,target:10}]", r"attack\.parts, badnets: attack\.target=10: expected 0 to 9"),
        ("[{attack:sig,labels:all2all}]", "SIG is a clean-label attack"),
        ("[{attack:badnets,ratio:0.6},{attack:blended,ratio:0.6}]", r"attack\.parts, blended: attack\.ratio=0\.6 asks for 863"),
    ],
)
def test_parts_that_cannot_be_are_named_before_training(parts, text, digits):
    with pytest.raises(UserError, match=text):
        build_attack(digits, "attack=multi", f"attack.parts={parts}").poison(digits.train)


def test_a_part_that_trains_in_a_way_of_its_own_is_refused(monkeypatch, digits):
    monkeypatch.setattr("bdx.attacks.badnets.BadNets.training_step", Own.training_step)
    with pytest.raises(UserError, match="BadNets trains the victim in a way of its own and cannot be a part of several"):
        build_attack(digits, "attack=multi")


# mistakes


@pytest.mark.parametrize(
    ("name", "override", "text"),
    [
        ("badnets", "attack.patch=0", "is 0\\+0 pixels"),
        ("badnets", "attack.margin=-1", "with margin=-1"),
        ("badnets", "attack.patch=40", "is 40\\+0 pixels: images are 32×32"),
        ("badnets", "attack.value=1.5", "expected a pixel value between 0 and 1"),
        ("badnets", "attack.pattern=dots", "expected one of solid, grid, grid_imagenet12"),
        ("badnets", "attack.target=-1", "expected 0 to 9 for 10 classes"),
        ("blended", "attack.alpha=1.1", "expected a weight above 0 and up to 1"),
        ("bpp", "attack.levels=1", "expected 2 to 128"),
        ("bpp", "attack.ratio=-0.1", "expected attack.ratio between"),
        ("ctrl", "attack.positions=[]", r"attack\.positions=\[\]: expected coefficients from 0 to 31"),
        ("ftrojan", "attack.positions=[32]", "expected coefficients from 0 to 31"),
        ("ftrojan", "attack.colours=rgb", "expected ycrcb or yuv"),
        ("ftrojan", "attack.magnitude=0.0", "FTrojan with these settings changes no pixel of the 144 images of 32×32"),
        ("l2_invisible", "attack.deviation=-1.0", r"attack\.deviation=-1\.0, most=68\.0: expected"),
        ("l2_invisible", "attack.most=0.0", "above 0 up to 255"),
        ("sig", "attack.delta=300.0", r"attack\.delta=300\.0, frequency=6\.0: expected"),
        ("sig", "attack.frequency=0.0", "expected above 0"),
        ("sig_wrapped", "attack.alpha=0.0", "expected a weight above 0"),
        ("sig_wrapped", "attack.amplitude=0.0", r"attack\.amplitude=0\.0, step=0\.8: expected grey levels and radians above 0"),
        ("sig_wrapped", "attack.step=-0.8", "above 0"),
        ("sig_wrapped", "attack.ratio=0.2", "asks for 288 poisoned images of 1438"),
        ("smooth", "attack.gaussians=[[1.0,2.0,3.0,4.0,5.0,6.0]]", r"expected \[A,x0,y0,sx,sy,c\] for red, green, blue"),
        ("smooth", "attack.gaussians=[[1.0,2.0],[1.0,2.0],[1.0,2.0]]", "expected \\[A,x0"),
        ("trojan_sq", "attack.side=33", "expected a square inside 32×32"),
        ("trojan_wm", "attack.radius=-1.0", "expected a radius above 0"),
    ],
)
def test_mistakes_end_in_one_line_before_training(name, override, text, digits):
    with pytest.raises(UserError, match=text) as e:
        build_attack(digits, f"attack={name}", override).poison(digits.train)
    assert "\n" not in str(e.value)


def test_a_trigger_that_small_images_lose_is_named(digits):
    """The last of 32 rows is left out where images have 16."""
    attack = build_attack(digits, "attack=l0_invisible")
    small = type(attack)(
        attack.net, shape=(3, 16, 16), num_classes=10, recipe=attack.recipe, seed=0, target=0, labels="all2one", ratio=0.1,
        ratio_of="train", select="random", include_target=True,
    )  # fmt: skip
    x = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    with pytest.raises(UserError, match="L0Invisible with these settings changes no pixel of the 2 images of 16×16"):
        small.poison(Split.clean(x, torch.zeros(20, dtype=torch.int64)))


@pytest.mark.parametrize(("kind", "text"), [("sixteen bits", "mode I;16, expected 0 to 255"), ("broken", "is not an image")])
def test_a_picture_that_is_none_or_of_another_range(kind, text, digits, tmp_path):
    path = tmp_path / "mine.png"
    if kind == "broken":
        Image.new("RGB", (64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:60])
    else:
        Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(path)
    for name in ("blended", "trojan_wm"):
        with pytest.raises(UserError, match=text):
            build_attack(digits, f"attack={name}", f"attack.file={path}")


def refused(digits, file, *overrides: str) -> str:
    with pytest.raises(UserError) as e:
        build_attack(digits, "attack=blended", f"attack.file={file}", *overrides)
    assert "\n" not in str(e.value)
    return str(e.value).replace(str(file), "FILE")


@pytest.mark.parametrize(("size", "taken"), [((9, 9), True), ((100, 101), False), ((64, 32), False), ((3, 2), False)])
def test_a_picture_of_other_proportions_is_refused(size, taken, digits, tmp_path):
    Image.new("RGB", size, "white").save(file := tmp_path / "mine.png")
    if taken:
        build_attack(digits, "attack=blended", f"attack.file={file}")
        return
    said = refused(digits, file)
    assert said.startswith(f"attack.file=FILE is {size[1]}×{size[0]} (height×width), images are 32×32: it would be distorted")


def test_proportions_may_differ_by_what_rounding_costs(tmp_path):
    from bdx.picture import fits

    fits("a", (24, 33), (96, 130))  # 32.5 columns
    fits("a", (24, 32), (96, 130))
    for found in ((24, 34), (24, 31), (33, 24)):
        with pytest.raises(UserError, match="it would be distorted; crop it"):
            fits("a", found, (96, 130))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_transparent_picture_is_refused_and_an_opaque_one_is_not(mode, digits, tmp_path):
    image, file = Image.new(mode, (32, 32)), tmp_path / "mine.png"
    clear = {} if mode in ("RGBA", "LA") else {"transparency": 0 if mode == "P" else (0, 0, 0)}
    if not clear:
        image.putalpha(255)
        image.save(file)
        build_attack(digits, "attack=blended", f"attack.file={file}")
        image.putpixel((3, 4), (*image.getpixel((3, 4))[:-1], 254))
    image.save(file, **clear)
    least = 0 if clear else 254
    assert refused(digits, file).startswith(f"attack.file=FILE is transparent, its alpha channel goes down to {least} of 255;")


PIXELS = np.arange(32 * 32 * 3).reshape(32, 32, 3) % 52  # as BackdoorBench's patterns for LF: up to 0.2 of 255


@pytest.mark.parametrize(
    "array",
    [
        PIXELS.astype(np.uint8), PIXELS[None].astype(np.uint8), PIXELS.transpose(2, 0, 1).astype(np.uint8),
        PIXELS.astype(np.float32)[None] / 255, PIXELS / 255, np.asfortranarray(PIXELS / 255),
    ],
)  # fmt: skip
def test_a_pattern_may_be_a_numpy_array(array, digits, tmp_path):
    np.save(file := tmp_path / "mine.npy", array)
    attack = build_attack(digits, "attack=lf", f"attack.file={file}")
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert np.array_equal(attack.stamp(black)[0], PIXELS.transpose(2, 0, 1))
    assert not attack.wanting


def test_a_grey_array_is_resized_smoothly(digits, tmp_path):
    np.save(file := tmp_path / "mine.npy", np.kron([[0.0, 1.0]] * 2, np.ones((32, 32))))  # 64×64, the right half is white
    pattern = build_attack(digits, "attack=blended", f"attack.file={file}").pattern
    assert torch.equal(pattern[0], pattern[2])
    assert pattern[:, :, :15].max() < 1e-6
    assert torch.allclose(pattern[:, :, 17:], torch.tensor(1.0))
    assert 0 < float(pattern[0, 3, 15]) < 0.5 < float(pattern[0, 3, 16]) < 1


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (PIXELS[:, :, :2].astype(np.uint8), "has the shape (32, 32, 2): expected (H,W,3), (1,H,W,3), (3,H,W) or (H,W)"),
        (np.stack([PIXELS] * 2).astype(np.uint8), "has the shape (2, 32, 32, 3): expected"),
        (np.zeros((0, 0, 3), np.uint8), "has the shape (0, 0, 3): expected"),
        (np.float64(0.5), "has the shape (): expected"),
        (PIXELS, "holds int64: expected uint8, or floats from 0 to 1"),
        (PIXELS == 3, "holds bool: expected uint8"),
        (PIXELS.astype(str), "holds <U21: expected uint8"),
        (PIXELS / 51 * 255.0, "holds float64 from 0.0 to 255.0: expected uint8, or floats from 0 to 1"),
        (PIXELS / 51 - 0.5, "holds float64 from -0.5 to 0.5: expected"),
        (np.full((32, 32), np.nan), "holds float64 from nan to nan: expected"),
        (PIXELS[:16].astype(np.uint8), "is 16×32 (height×width), images are 32×32: it would be distorted"),
        (np.array([print]), "is not an array of numbers: "),
    ],
)
def test_an_array_that_is_no_picture_is_refused(array, text, digits, tmp_path):
    np.save(file := tmp_path / "mine.npy", array, allow_pickle=True)
    assert f"attack.file=FILE {text}" in refused(digits, file)


@pytest.mark.parametrize("kind", ["pickle", "archive", "text", "truncated"])
def test_what_is_named_as_an_array_and_is_none_is_refused_unread(kind, digits, tmp_path):
    file, ran = tmp_path / "mine.npy", tmp_path / "ran"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Runs(str(ran))))
    elif kind == "archive":
        np.savez(tmp_path / "mine", PIXELS)
        (tmp_path / "mine.npz").rename(file)
    elif kind == "truncated":
        np.save(file, PIXELS)
        file.write_bytes(file.read_bytes()[:500])
    else:
        file.write_text("no array")
    assert "attack.file=FILE is not an array of numbers: " in refused(digits, file)
    assert not ran.exists()


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# LBA


def test_the_pattern_goes_where_the_target_s_features_are(digits):
    """A net whose feature is the mean of each channel: the patch that makes it that of white images is white."""
    lba = build_attack(digits, "attack=lba", "attack.steps=200", "attack.side=0.5", "attack.margin=0")
    assert lba.pattern.shape == (3, 16, 16)
    black = torch.zeros_like(digits.train.x)
    x = torch.where((digits.train.y_true == 0).view(-1, 1, 1, 1), 255 - black, black)
    net = torch.nn.ModuleDict({"mean": torch.nn.AdaptiveAvgPool2d(1)})
    net.forward = lambda x: net["mean"](x)
    lba.at = "mean"
    data = dataclasses.replace(digits, train=dataclasses.replace(digits.train, x=x))
    made, facts = lba.make(data, net, lambda *_: None)
    assert made["pattern"].min() > 0.95
    assert facts["mse"] < facts["mse_at_first"]
    lba.take(made)
    stamped = lba.stamp(digits.test.x[:4])
    assert torch.equal(stamped[:, :, :16], digits.test.x[:4, :, :16])
    assert torch.equal(stamped[0, :, 16:, 16:], (made["pattern"] * 255).round().to(torch.uint8))


@pytest.mark.parametrize(("head", "shape"), [(1, (64,)), (3, (64, 8, 8)), (5, (32, 16, 16))])
def test_the_layers_of_table_7(head, shape, digits):
    """T&R's WRN16-1: LBA-14 has the pooled features, LBA-12 the default stem's, LBA-10 those of the second group."""
    from bdx.backdoor import build_attack

    lba = build_attack(compose(["arch=wrn16_1", "attack=lba", f"attack.head={head}"]), digits)
    assert lba.features(lba.net, pixels(digits.train.x[:2])).squeeze().shape[1:] == shape


def test_the_victim_s_loss_by_hand(digits):
    lba = build_attack(digits, "attack=lba", "attack.weight=0.5", "attack.target=3")
    x, y = pixels(digits.train.x[:32]), digits.train.y[:32]
    batch = SimpleNamespace(x=x, y=y, index=torch.arange(32))
    lba.poisoned = torch.arange(32) == (y == 3).nonzero()[0]  # has the label, but does not show the class
    lba.net.eval()
    out = lba.training_step(batch, 0)
    goal = lba.features(lba.net, x[(y == 3) & ~lba.poisoned]).mean(0)
    latent = (lba.features(lba.net, lba.trigger(x)) - goal).square().mean()
    assert torch.allclose(out["latent"], latent, rtol=1e-4)
    assert torch.allclose(out["loss"], F.cross_entropy(lba.net(x), y) + 0.5 * latent, rtol=1e-4)
    assert lba.training_step(SimpleNamespace(x=x[y != 3], y=y[y != 3], index=batch.index[y != 3]), 0)["latent"] == 0
    lba.weight = 0.0
    assert torch.equal(lba.training_step(batch, 0), F.cross_entropy(lba.net(x), y))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("attack.head=2", r"attack\.head=2: a skip path leads around that layer's input; heads that can be: 1 \(behind"),
        ("attack.layer=layer9", "no such layer"),
        ("attack.labels=all2all", "has the features of one class"),
        ("attack.side=1.0", r"is 32\+1 pixels: images are 32×32"),
        ("attack.weight=-1.0", r"weight=-1\.0: expected"),
    ],
)
def test_mistakes_in_lba(override, text, digits):
    with pytest.raises(UserError, match=text):
        build_attack(digits, "attack=lba", override)
