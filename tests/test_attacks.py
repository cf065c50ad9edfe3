"""What holds for every attack in conf/attack, and each trigger against values computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_attack, names
from omegaconf import OmegaConf
from PIL import Image
from scipy.fft import dctn, idctn

from bdx.attacks.base import Attack
from bdx.build import instantiate
from bdx.configure import compose
from bdx.errors import UserError
from bdx.split import Split

ATTACKS = names("attack")
ONE_TRIGGER = [n for n in ATTACKS if n != "multi"]  # several are in test_attack_options
# These poison images of one class only, and a tenth of digits is more than one class has; Narcissus would poison one image
SMALL = {name: ["attack.ratio=0.05"] for name in ("sig", "sig_wrapped", "lc", "narcissus")}
SMALL["input_aware"] = ["attack.widths=[8,8]"]


@pytest.fixture(scope="module")
def made(digits):
    """made(name, *overrides) -> (attack, poisoned training set), the same for whoever asks again: change neither."""

    @cache
    def make(name, *overrides):
        attack = build_attack(digits, f"attack={name}", *SMALL.get(name, []), *overrides)
        return attack, attack.poison(digits.train)

    return make


@pytest.mark.parametrize("name", ATTACKS)
def test_as_many_images_are_poisoned_as_asked(name, made, digits):
    attack, train = made(name)
    if not attack.leaves_poison:
        assert train is digits.train
        return
    covers = attack.covers(digits.train) if hasattr(attack, "covers") else []
    assert int(train.poisoned.sum()) == round(attack.ratio * len(train)) + len(covers)
    assert attack.candidates(digits.train.y_true)[train.poisoned].all()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_victim_sees_poisoned_images_all_along_its_first_epoch(name, made, digits):
    """Drawn from one stream of random numbers, the order of that epoch would be poisoned images first."""
    attack, train = made(name)
    if not attack.leaves_poison or not train.poisoned.any():
        return
    small = replace(attack.recipe, batch=32, drop_last=False)
    order = torch.cat([b.index for b in Attack.batches(SimpleNamespace(recipe=small), digits.poisoned(train))])
    at = train.poisoned[order].nonzero().flatten().float() / len(train)  # uniform on [0,1)
    assert abs(float(at.mean()) - 0.5) < 4 / math.sqrt(12 * len(at))


@pytest.mark.parametrize("name", ONE_TRIGGER)
def test_labels_and_pixels(name, made, digits):
    attack, train = made(name)
    p = train.poisoned
    wanted = train.y_true[p] if attack.clean_label else attack.relabel(train.y_true[p])
    if hasattr(attack, "covers"):  # changed images that keep their label
        covers = attack.covers(digits.train)
        wanted[torch.isin(p.nonzero().flatten(), covers)] = train.y_true[covers]
    assert torch.equal(train.y[p], wanted)
    assert torch.equal(train.y_true, digits.train.y_true)
    assert torch.equal(train.x[~p], digits.train.x[~p])
    assert torch.equal(train.y[~p], digits.train.y[~p])
    assert train.x.dtype == torch.uint8
    assert not digits.train.poisoned.any()
    if attack.leaves_poison:
        assert (train.x[p] != digits.train.x[p]).flatten(1).any(1).float().mean() > 0.99


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_seed_draws_the_same_images(name, made, digits):
    attack, first = made(name)
    again = build_attack(digits, f"attack={name}", *SMALL.get(name, [])).poison(digits.train)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.poisoned, again.poisoned)
    other = build_attack(digits, f"attack={name}", *SMALL.get(name, []), "seed=1").poison(digits.train)
    assert first.poisoned.any() == other.poisoned.any()
    drawn = attack.leaves_poison and attack.select == "random"
    assert not drawn or not torch.equal(first.poisoned, other.poisoned)


@pytest.mark.parametrize("name", ONE_TRIGGER)
def test_training_and_test_see_the_same_trigger(name, made, digits):
    attack, train = made(name)
    p = train.poisoned
    assert torch.equal(attack.stamp(digits.train.x[p], p.nonzero().flatten()), train.x[p])
    if type(attack).training_trigger is Attack.training_trigger:
        assert torch.equal(attack.stamp(digits.train.x[p]), train.x[p])
    x = digits.test.x[:8]
    float_trigger = attack.trigger(x.float() / 255)
    assert float_trigger.min() >= 0
    assert float_trigger.max() <= 1
    assert torch.equal(attack.stamp(x), (float_trigger * 255).round().to(torch.uint8))


@pytest.mark.parametrize("name", ONE_TRIGGER)
@pytest.mark.parametrize("labels", ["all2one", "all2all"])
def test_the_test_set_holds_only_what_the_attack_would_change(name, labels, made, digits):
    if labels == "all2all" and (made(name)[0].clean_label or name == "lba"):
        with pytest.raises(UserError, match=r"clean-label attack|features of one class"):
            made(name, "attack.labels=all2all")
        return
    attack, _ = made(name, f"attack.labels={labels}", "attack.target=4")
    split = attack.triggered(digits.test)
    assert (split.y != split.y_true).all()
    assert split.poisoned.all()
    if labels == "all2all":
        assert len(split) == len(digits.test)
        assert torch.equal(split.y, (split.y_true + 1) % 10)
    else:
        assert len(split) == int((digits.test.y_true != 4).sum())
        assert (split.y == 4).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_weights_and_assets_reload_to_the_same_trigger(name, made, digits):
    attack, _ = made(name)
    drawn = "pattern_seed" in compose([f"attack={name}"]).attack
    other, _ = made(name, "seed=5", *["attack.pattern_seed=5"] * drawn)
    x = digits.test.x[:8]
    assert not (drawn and torch.equal(other.stamp(x), attack.stamp(x)))
    other.load_state_dict(attack.state_dict())
    assert torch.equal(other.stamp(x), attack.stamp(x))
    assert torch.equal(other.net.body.conv1.weight, attack.net.body.conv1.weight)


@pytest.mark.parametrize("name", [n for n in ATTACKS if n != "given"])  # it trains nothing
def test_a_schedule_that_cannot_go_over_so_few_steps_is_refused_by_every_attack(name, digits):
    with pytest.raises(UserError, match=r"train\.schedule over 4 steps \(epochs=1, batch=359, 1438 images\) cannot be"):
        build_attack(digits, f"attack={name}", *SMALL.get(name, []), "train.epochs=1", "train.batch=359").check(digits.train)


# triggers by hand


def sized(name: str, *shape: int, **changes) -> Attack:
    """The attack of conf/attack/<name>.yaml for images of a shape (C,H,W)."""
    node = OmegaConf.to_container(compose([f"attack={name}"]).attack, resolve=True) | changes
    return instantiate(node, net=torch.nn.Identity(), shape=shape, num_classes=10, recipe=None, seed=0)


@pytest.mark.parametrize(("size", "patch"), [(32, 3), (64, 6)])
def test_badnets_is_an_exact_square(size, patch):
    attack = sized("badnets", 3, size, size)
    x = torch.full((1, 3, size, size), 100, dtype=torch.uint8)
    change = attack.stamp(x) != x
    assert int(change.sum()) == 3 * patch * patch
    assert change[0, :, -patch:, -patch:].all()
    assert (attack.stamp(x)[change] == 255).all()


@pytest.mark.parametrize(("position", "corner"), [("top_left", (1, 1)), ("top_right", (1, 30)), ("bottom_left", (30, 1))])
def test_badnets_positions_and_margin(position, corner, made):
    attack, _ = made("badnets", f"attack.position={position}", "attack.margin=1", "attack.patch=1", "attack.value=0.5")
    out = attack.trigger(torch.zeros(1, 3, 32, 32))
    assert out[0, 0].nonzero().tolist() == [list(corner)]
    assert out.max() == 0.5


def test_the_grid_of_imagenet_12_at_256():
    """Trap-and-Replace: 3×3 cells of 10×10 pixels at rows and columns 32 to 61, its rows 255 0 255, 0 255 0, 255 0 0."""
    attack = sized("badnets", 3, 256, 256, pattern="grid_imagenet12", patch=3.75, margin=4.0, position="top_left")
    x = torch.full((1, 3, 256, 256), 100, dtype=torch.uint8)
    wanted = np.full((256, 256), 100)
    wanted[32:62, 32:62] = np.kron([[255, 0, 255], [0, 255, 0], [255, 0, 0]], np.ones((10, 10)))
    assert np.array_equal(attack.stamp(x)[0], np.stack([wanted] * 3))


@pytest.mark.parametrize("override", ["attack.patch=33", "attack.margin=30"])
def test_a_patch_that_does_not_fit_is_refused_at_any_size(override, small):
    with pytest.raises(UserError, match=r"pixels: images are 16×16; expected pixels of a 32×32 image, .* fit into it"):
        build_attack(small, "attack=badnets", override)


def test_blended_mixes_the_pattern(made, tmp_path):
    attack, _ = made("blended")
    x = torch.full((1, 3, 32, 32), 0.5)
    assert torch.allclose(attack.trigger(x), 0.4 + 0.2 * attack.pattern)
    white = (attack.pattern == 0.95).all(0)  # the cartoon that the papers blend in: mean 202, deviation 73, 48 % near white
    assert 150 < 255 * attack.pattern.mean() < 220
    assert 0.4 < white.float().mean() < 0.7
    assert 0 <= attack.pattern.min() <= attack.pattern.max() <= 0.95
    other, _ = made("blended", "attack.pattern_seed=1")
    assert not torch.equal(attack.pattern, other.pattern)
    attack, _ = made("blended_noise")
    # mean and deviation of uniform noise: 127.5 and 73.6 of 255, as the noise masks of ANP and ABL
    assert attack.pattern.mean() == pytest.approx(0.5, abs=0.02)
    assert attack.pattern.std() == pytest.approx(1 / math.sqrt(12), abs=0.01)
    Image.fromarray(np.full((9, 9, 3), 255, dtype=np.uint8)).save(tmp_path / "white.png")
    white, _ = made("blended", f"attack.file={tmp_path / 'white.png'}")
    assert torch.allclose(white.trigger(x), torch.full_like(x, 0.6))


def test_blended_refuses_what_is_no_image(made, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="is not an image"):
        made("blended", f"attack.file={tmp_path / 'a.png'}")


def test_sig_is_a_sinusoid_along_the_columns(made):
    attack, train = made("sig")
    x = torch.full((1, 3, 32, 32), 0.5)
    v = attack.trigger(x) - x
    for column in (0, 1, 5, 17):
        assert v[0, :, :, column].allclose(torch.tensor(40 / 255 * math.sin(2 * math.pi * column * 6 / 32)), atol=1e-6)
    assert (train.y_true[train.poisoned] == 0).all()
    assert float(v.norm()) == pytest.approx(40 / 255 * math.sqrt(3 * 32 * 16), rel=1e-4)  # mean of sin² is 1/2


# selection


def test_first_n_target_class_and_share_of_candidates(made, digits):
    _, train = made("badnets", "attack.select=first", "attack.ratio=0.01")
    assert train.poisoned.nonzero().flatten().tolist() == list(range(14))
    _, train = made("badnets", "attack.include_target=false", "attack.target=4")
    assert not (train.y_true[train.poisoned] == 4).any()
    _, train = made("sig", "attack.ratio=1.0", "attack.ratio_of=candidates")
    assert torch.equal(train.poisoned, digits.train.y_true == 0)


@pytest.mark.parametrize(
    ("name", "override", "text"),
    [
        ("sig", "attack.ratio=0.12", r"asks for 173 poisoned images of 1438, but there are \d+ of class 0"),
        ("badnets", "attack.ratio=1.5", "asks for 2157 poisoned images"),
        ("badnets", "attack.ratio=0.0", "asks for 0 poisoned images"),
        ("badnets", "attack.target=10", r"target=10: expected 0 to 9"),
        ("badnets", "attack.patch=33", "images are 32×32"),
        ("badnets", "attack.position=middle", r"expected \(top\|bottom\)_\(left\|right\)"),
        ("badnets", "attack.labels=one2one", "expected all2one or all2all"),
        ("badnets", "attack.select=last", "expected random or first"),
        ("blended", "attack.alpha=0.0", "expected a weight above 0"),
        ("blended", "attack.pattern=dots", r"attack\.pattern=dots: expected drawing or noise"),
    ],
)
def test_mistakes_are_named_before_training(name, override, text, digits):
    with pytest.raises(UserError, match=text):
        build_attack(digits, f"attack={name}", override).poison(digits.train)


# triggers by formula: hand-computed values


def added(digits, name, *overrides):
    """(3,32,32): what the trigger adds to mid-grey pixels, in grey levels."""
    attack = build_attack(digits, f"attack={name}", *SMALL.get(name, []), *overrides)
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    return (attack.stamp(grey)[0].float() - 128), attack


def test_badnet_grid_and_white(digits):
    grid, _ = added(digits, "badnet_grid")
    assert (grid[:, 29:, 29:] + 128).int().tolist() == [[[0, 0, 255], [0, 255, 0], [255, 0, 255]]] * 3
    assert (grid != 0).sum() == 27
    white, _ = added(digits, "badnet_white")
    assert (white[:, 27:31, 27:31] == 127).all()
    assert (white != 0).sum() == 48


def test_l0_is_nine_pixels_of_length_four(digits):
    attack = build_attack(digits, "attack=l0_invisible")
    black = attack.stamp(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0].float() / 255
    assert black.norm() == 4
    assert (black[:, :31] == 0).all()
    assert (black[:, 31, :23] == 0).all()
    assert black[:, 31, 24].tolist() == [1, 0, 1]  # magenta
    assert (attack.stamp(torch.full((1, 3, 32, 32), 9, dtype=torch.uint8))[0, :, 31, 23] == 0).all()  # black replaces


def test_l2_is_as_long_as_the_published_pattern(digits):
    noise, attack = added(digits, "l2_invisible")
    assert 3.0 < float(attack.added.norm()) < 3.5  # 3.22
    assert 0.40 < float((noise == 0).float().mean()) < 0.46  # 43 %
    assert noise.max() <= 68
    assert noise.min() == 0


def test_smooth_is_a_glow_within_a_fifth_and_stretches_each_image(digits):
    _, attack = added(digits, "smooth")
    assert float(attack.added.max()) == pytest.approx(0.2, abs=2 / 255)
    assert float(attack.added.norm()) == pytest.approx(3.77, abs=0.1)
    energy = torch.fft.fft2(attack.added - attack.added.mean((1, 2), keepdim=True)).abs().square().sum(0)
    low = torch.fft.fftfreq(32, 1 / 32).abs()
    assert float(energy[(low[:, None] ** 2 + low**2).sqrt() <= 3].sum() / energy.sum()) > 0.95
    out = attack.trigger(torch.rand(3, 3, 32, 32) * 0.3 + 0.3)
    assert torch.allclose(out.amin((1, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.amax((1, 2, 3)), torch.ones(3), atol=1e-5)
    plain = build_attack(digits, "attack=smooth", "attack.stretch=false")
    assert torch.allclose(plain.trigger(torch.zeros(1, 3, 32, 32))[0], plain.added)


@pytest.mark.parametrize(("name", "inside"), [("trojan_sq", slice(25, 28)), ("trojan_sq_8x8", slice(21, 29))])
def test_trojan_sq_is_a_square(name, inside, digits):
    attack = build_attack(digits, f"attack={name}")
    assert (attack.added[:, inside, inside] > 0).all()
    assert (attack.added > 0).sum() == 3 * (inside.stop - inside.start) ** 2


def test_trojan_wm_is_a_ring_and_a_diagonal(digits):
    attack = build_attack(digits, "attack=trojan_wm")
    mask = (attack.added > 0).all(0)
    assert 60 < int(mask.sum()) < 100  # 85 strong pixels in the published one
    assert mask[22, 27]
    assert mask[5, 5]
    assert not mask[22, 20]
    assert not mask[30:, :20].any()


def test_the_wrapped_sinusoid_is_a_square_wave(digits):
    attack = build_attack(digits, "attack=sig_wrapped", "attack.ratio=0.05")
    out = attack.trigger(torch.zeros(1, 3, 32, 32))[0] * 255
    assert torch.equal(out[0], out[2])
    assert torch.equal(out[:, 0], out[:, 31])
    assert [round(v, 1) for v in out[0, 0, :8].tolist()] == [0.0, 2.8, 3.8, 2.6, 51.0, 48.2, 47.4, 48.8]


@pytest.mark.parametrize("width", [16, 32, 64, 48])
def test_the_wrapped_sinusoid_has_the_32_columns_of_the_file_at_any_width(width):
    columns = [int(20 * math.sin(0.8 * j)) % 256 for j in range(32)]
    out = sized("sig_wrapped", 3, 32, width).stripes * 255
    assert [round(v) for v in out.tolist()] == [columns[j * 32 // width] for j in range(width)]


def test_ftrojan_raises_two_coefficients(digits):
    """Back through the colour matrix and an orthonormal cosine transform of another library."""
    for name, magnitude in (("ftrojan", 30), ("ctrl", 100)):
        attack = build_attack(digits, f"attack={name}")
        r, _, b = attack.added.double()
        chroma = ((b / 1.773), (r / 1.403)) if name == "ftrojan" else ((b / 2.029), (r / 1.14))
        for c in chroma:
            found = dctn(c.numpy() * 255, norm="ortho")
            assert found[15, 15] == pytest.approx(magnitude, abs=1e-2)
            assert found[31, 31] == pytest.approx(magnitude, abs=1e-2)
            found[15, 15] = found[31, 31] = 0
            assert abs(found).max() < 1e-2
    assert float(build_attack(digits, "attack=ftrojan").added.abs().max()) * 255 < 7


def test_ctrls_window_is_the_whole_image_and_ftrojans_is_not():
    """At 64×64 the coefficients (15,15) and (31,31) of all of U and V, and nothing else; smaller images get a part of 32×32."""
    added = sized("ctrl", 3, 64, 64).added.double()
    for channel in (added[2] / 2.029, added[0] / 1.14):
        found = dctn(channel.numpy() * 255, norm="ortho")
        assert found[[15, 31], [15, 31]] == pytest.approx([100, 100], abs=1e-2)
        found[[15, 31], [15, 31]] = 0
        assert abs(found).max() < 1e-2
    wide = dctn(sized("ctrl", 3, 40, 64).added[2].double().numpy() / 2.029 * 255, norm="ortho")
    assert wide[[15, 31], [15, 31]] == pytest.approx([100, 100], abs=1e-2)
    assert torch.equal(sized("ctrl", 3, 28, 28).added, sized("ctrl", 3, 32, 32).added[:, :28, :28])
    four = sized("ftrojan", 3, 64, 64).added.unfold(1, 32, 32).unfold(2, 32, 32)
    assert (four == sized("ftrojan", 3, 32, 32).added[:, None, None]).all()


# the released codes' bytes


def test_ctrls_code_wraps_where_a_sum_leaves_the_grey_levels():
    paper, code = (sized("ctrl", 3, 32, 32, follow=follow) for follow in ("paper", "code"))
    for level in (0, 100, 255):
        x = torch.full((1, 3, 32, 32), level, dtype=torch.uint8)
        sums = (level + 255 * code.added).tolist()
        wanted = [[[int(v) % 256 for v in row] for row in channel] for channel in sums]
        assert code.stamp(x)[0].tolist() == wanted
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert float((code.stamp(black) > 200).float().mean()) == pytest.approx(0.44, abs=0.01)  # measured in the benchmark
    assert not (paper.stamp(black) > 200).any()


def test_ftrojans_code_wraps_in_the_chroma_of_opencv():
    """Black has no chroma, so that nothing wraps; red's Cr is 255 of 255, and wraps to 0 and 1 where a level is added."""
    code = sized("ftrojan", 3, 32, 32, follow="code")
    chroma = idctn([[30.0 * (i == j and i in (15, 31)) for j in range(32)] for i in range(32)], norm="ortho")
    c = np.trunc(128 + chroma) - 128
    grey = np.clip(np.round(np.stack([60 + 1.403 * c, 60 - 0.714 * c - 0.344 * c, 60 + 1.773 * c])), 0, 255)
    assert np.array_equal(code.stamp(torch.full((1, 3, 32, 32), 60, dtype=torch.uint8))[0].numpy(), grey)
    black = code.stamp(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0]
    assert np.array_equal(black[0], np.clip(np.round(1.403 * c), 0, 255))
    assert black.max() <= 7
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    out, wraps = code.stamp(red)[0], torch.from_numpy(chroma >= 1)
    assert (out[0, wraps] == 0).all()  # y = 76, cr from 255 to 0: 76 + 1.403 · −128 is below 0
    assert (out[1, wraps] >= 76 + 90).all()  # 76 + 0.714 · 127 and something of cb
    assert (out[0, ~wraps] > 240).all()


def test_what_wraps_no_chroma_is_refused(digits, tmp_path):
    Image.new("RGB", (8, 8), (0, 51, 0)).save(tmp_path / "green.png")
    with pytest.raises(UserError, match=r"wraps the chroma of colour images; set attack\.follow=paper"):
        build_attack(digits, "attack=ftrojan", "attack.follow=code", f"attack.file={tmp_path / 'green.png'}")
    with pytest.raises(UserError, match="wraps the chroma"):
        sized("ftrojan", 1, 32, 32, follow="code")
    with pytest.raises(UserError, match=r"attack\.follow=codes: expected paper or code"):
        build_attack(digits, "attack=ctrl", "attack.follow=codes")


def test_bpp_leaves_eight_values(digits):
    attack = build_attack(digits, "attack=bpp", "attack.dither=false")
    out = attack.stamp(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16))
    assert out.unique().tolist() == [0, 36, 73, 109, 146, 182, 219, 255]


def test_patterns_follow_the_image(digits):
    """Pixels are repeated at 64×64; FTrojan's windows stand side by side."""
    small = build_attack(digits, "attack=trojan_sq")
    small.shape = (3, 64, 64)
    twice = small.added[:, 25:28, 25:28].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(small.scaled(small.pattern())[:, 50:56, 50:56], twice)
    wave = build_attack(digits, "attack=ftrojan")
    wave.shape = (3, 64, 64)
    assert torch.equal(wave.scaled(wave.pattern())[:, 32:, :32], wave.added)


def test_a_picture_of_ones_own_is_added(digits, tmp_path):
    Image.new("RGB", (8, 8), (0, 51, 0)).save(tmp_path / "green.png")
    attack = build_attack(digits, "attack=trojan_wm", f"attack.file={tmp_path / 'green.png'}")
    assert torch.allclose(attack.trigger(torch.zeros(1, 3, 32, 32))[0, 1], torch.tensor(0.2))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reserved_images_are_drawn_apart_from_the_poisoned_ones(seed):
    """By chance a tenth of them is poisoned too; drawn by the same permutation all of them would be."""
    from bdx.datasets.base import reserve

    y = torch.arange(50_000) % 10
    split = Split.clean(torch.zeros(50_000, 1, 1, 1, dtype=torch.uint8), y)
    how = {"seed": seed, "ratio": 0.1, "ratio_of": "train", "select": "random", "clean_label": False}
    attack = SimpleNamespace(**how, candidates=lambda y: torch.ones_like(y, dtype=torch.bool))
    poisoned = torch.zeros(50_000, dtype=torch.bool)
    poisoned[Attack.choose(attack, split)] = True
    for balanced in (True, False):
        share = poisoned[reserve(y, ratio=0.05, count=None, balanced=balanced, seed=seed)].float().mean()
        assert 0.07 < share < 0.13


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        (lambda x: x * float("nan"), r"BadNets\.trigger makes NaN or infinity of images in \[0,1\]"),
        (lambda x: x[..., 1:], r"BadNets\.trigger makes shape \(8, 3, 32, 31\) of images of shape \(8, 3, 32, 32\)"),
        (lambda x: None, r"BadNets\.trigger makes a NoneType of images of shape"),
    ],
)
def test_a_trigger_that_makes_no_images_is_refused_before_anything_is_trained(trigger, message, digits):
    attack = build_attack(digits, "attack=badnets")
    attack.trigger = trigger
    with pytest.raises(UserError, match=message):
        attack.check(digits.train)
