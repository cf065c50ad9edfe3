"""Each augmentation against a slow loop or a value known by hand; all draw from their own generator."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

from bdx.augment import (
    Augment,
    beta,
    random_crop,
    random_cutmix,
    random_cutout,
    random_flip,
    random_resized_crop,
    random_rotate,
)
from bdx.split import pixels


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def images(n: int, h: int = 8, w: int = 8) -> torch.Tensor:
    """Every pixel of an image has its own value, none is 0."""
    return (torch.arange(1, h * w + 1, dtype=torch.uint8).view(1, 1, h, w)).expand(n, 3, h, w).contiguous()


def several() -> torch.Tensor:
    """16 images, no two alike."""
    return images(16) + torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1) * 9


MIX = partial(random_cutmix, y=torch.arange(16) % 4, classes=4, alpha=1.0)
ALL = {"zoom": 0.5, "crop": 2, "flip": True, "rotate": 10.0, "cutout": 2, "cutmix": 1.0}
EACH = {
    "crop": lambda x, g: random_crop(x, 2, g),
    "flip": random_flip,
    "zoom": lambda x, g: random_resized_crop(x.float() / 255, 0.3, g),
    "rotate": lambda x, g: random_rotate(x.float(), 30, g),
    "cutout": lambda x, g: random_cutout(x.float(), 4, g),
    "cutmix": lambda x, g: MIX(x.float(), g=g)[0],
    "all": lambda x, g: Augment(**ALL)(x, torch.arange(16) % 4, 4, g)[0],
}


@pytest.mark.parametrize("name", EACH)
def test_only_the_given_generator_is_used(name):
    x = several()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = EACH[name](x, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(EACH[name](x, seeded(5)), first)
    assert not torch.equal(EACH[name](x, seeded(6)), first)


@pytest.mark.parametrize("name", EACH)
def test_the_input_is_left_as_it_was(name):
    x = several()
    out = EACH[name](x, seeded())
    assert out.shape == x.shape
    assert torch.equal(x, several())


@pytest.mark.parametrize("name", EACH)
def test_the_generator_moves_on(name):
    g = seeded()
    assert not torch.equal(EACH[name](several(), g), EACH[name](several(), g))


# crop


@pytest.mark.parametrize(("h", "w", "pad"), [(8, 8, 2), (6, 9, 1), (5, 4, 3)])
def test_crop_against_a_loop(h, w, pad):
    n = 300
    x = images(n, h, w)
    out = random_crop(x, pad, seeded())
    padded = torch.zeros(3, h + 2 * pad, w + 2 * pad, dtype=torch.uint8)
    padded[:, pad : pad + h, pad : pad + w] = x[0]
    steps = range(2 * pad + 1)
    windows = {(i, j): padded[:, i : i + h, j : j + w] for i in steps for j in steps}
    found = [[at for at, window in windows.items() if torch.equal(image, window)] for image in out]
    assert {len(at) for at in found} == {1}  # each image is one of the (2p+1)² windows, in all three channels
    offsets = [at[0] for at in found]
    assert len(set(offsets)) == (2 * pad + 1) ** 2  # each image has its own, and every one occurs
    assert out.dtype == torch.uint8


def test_crop_keeps_images_apart():
    x = torch.arange(1, 21, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 3, 8, 8).contiguous()
    out = random_crop(x, 2, seeded())
    for i, image in enumerate(out):
        assert set(image.unique().tolist()) <= {0, i + 1}
        assert (image == i + 1).any()


def test_crop_rows_and_columns_are_drawn_apart():
    out = random_crop(torch.ones(200, 1, 8, 8, dtype=torch.uint8), 2, seeded())
    rows, cols = (out.amax(3) == 0).sum(2), (out.amax(2) == 0).sum(2)
    assert not torch.equal(rows, cols)
    assert rows.max() == cols.max() == 2


# flip


def test_each_image_is_itself_or_its_mirror():
    x = images(400, 4, 6)
    out = random_flip(x, seeded())
    mirrored = torch.tensor([torch.equal(a, torch.tensor(b.numpy()[:, :, ::-1].copy())) for a, b in zip(out, x, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(out, x, strict=True)])
    assert (mirrored ^ same).all()
    assert 140 < int(mirrored.sum()) < 260  # 6 deviations around one half
    assert out.dtype == torch.uint8


# rotate


def by(degrees: float, x: torch.Tensor) -> torch.Tensor:
    """x (1,C,H,W) turned by exactly `degrees`: the range is chosen after looking at what will be drawn."""
    u = torch.rand(1, generator=seeded()).item()
    return random_rotate(x, degrees / (2 * u - 1), seeded())


def test_rotation_by_nothing_is_the_identity():
    x = torch.rand(5, 3, 8, 10, generator=seeded())
    assert torch.allclose(random_rotate(x, 0.0, seeded()), x, atol=1e-6)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_by_quarters(turns):
    x = torch.rand(1, 3, 8, 8, generator=seeded(1))
    ways = [torch.rot90(x, sign * turns, (2, 3)) for sign in (1, -1)]
    assert any(torch.allclose(by(90 * turns, x), way, atol=1e-4) for way in ways)
    assert torch.allclose(by(-90, by(90, x)), x, atol=1e-4)


def test_rotation_of_an_oblong_keeps_angles():
    x = torch.rand(1, 1, 4, 10, generator=seeded(1))
    out = by(90, x)
    middle, turned = x[..., 3:7], out[..., 3:7]
    ways = [torch.rot90(middle, sign, (2, 3)) for sign in (1, -1)]
    assert any(torch.allclose(turned, way, atol=1e-4) for way in ways)
    assert (out[..., [0, 1, 8, 9]] == 0).all()  # zeros from outside
    assert torch.allclose(by(180, x), x.flip(2, 3), atol=1e-4)


def test_angles_fill_the_range_and_stay_in_it():
    n, size = 500, 41
    x = torch.zeros(n, 1, size, size)
    x[:, :, 19:22, 34:37] = 1  # a dot at 15 pixels to the right of the centre (20, 20)
    out = random_rotate(x, 20.0, seeded())
    at = torch.arange(size).float() - 20
    mass = out.sum((1, 2, 3))
    dy, dx = ((out.sum((1, k)) * at).sum(1) / mass for k in (3, 2))
    angle = torch.rad2deg(torch.atan2(dy, dx))
    assert torch.allclose((dy**2 + dx**2).sqrt(), torch.tensor(15.0), atol=0.2)
    assert angle.abs().max() < 20.5
    assert angle.min() < -18
    assert angle.max() > 18
    assert abs(angle.mean()) < 3


# cutout


@pytest.mark.parametrize("side", [1, 4, 5, 8])
def test_cutout_is_one_square(side):
    n, size = 200, 16
    out = random_cutout(torch.ones(n, 3, size, size), side, seeded())
    full = 0
    for image in out:
        hole = image[0] == 0
        assert torch.equal(image == 0, hole.expand(3, size, size))  # the same in each channel
        assert (image[:, ~hole] == 1).all()
        rows, cols = (hole.any(d).nonzero()[:, 0] for d in (1, 0))
        h, w = len(rows), len(cols)
        assert int(hole.sum()) == h * w == (rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1)  # a filled rectangle
        cut_off = (rows[0] == 0) | (rows[-1] == size - 1), (cols[0] == 0) | (cols[-1] == size - 1)
        for length, cut in zip((h, w), cut_off, strict=True):
            assert length == side or (cut and side // 2 <= length < side)
        full += int(hole.sum()) == side * side
    assert full >= n // 10


def test_cutout_lies_anywhere():
    out = random_cutout(torch.ones(4096, 1, 4, 4), 1, seeded())
    count = (out == 0).sum((0, 1))
    assert int(count.sum()) == 4096
    assert count.min() > 170  # 256 ± 5.5 deviations
    assert count.max() < 342


@pytest.mark.parametrize(("h", "w"), [(4, 12), (12, 4)])
def test_cutout_reaches_the_far_end_of_an_oblong(h, w):
    out = random_cutout(torch.ones(600, 1, h, w), 1, seeded())
    assert (out == 0).sum((1, 2, 3)).tolist() == [1] * 600
    assert (out == 0).any(0).all()


def test_a_large_cutout_leaves_nothing():
    assert (random_cutout(torch.ones(8, 3, 8, 8), 16, seeded()) == 0).all()


# zoom


@pytest.mark.parametrize("least", [0.2, 0.9])
def test_a_zoom_shows_a_window_of_the_image(least):
    n, h, w = 512, 24, 40
    down, right = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    out = random_resized_crop(torch.stack([down, right, right])[None].repeat(n, 1, 1, 1), least, seeded())
    inner = out[:, :, h // 4 : -h // 4, w // 4 : -w // 4]  # the border repeats where a window touches it
    high, wide = inner[:, 0].diff(dim=1)[:, 0, 0] * h, inner[:, 1].diff(dim=2)[:, 0, 0] * w  # shares of the sides
    assert torch.allclose(inner[:, 0], inner[:, 0, :, :1].expand_as(inner[:, 0]), atol=1e-5)  # upright
    assert torch.allclose(
        inner[:, 0].diff(dim=1), (high / h)[:, None, None].expand(n, inner.shape[2] - 1, inner.shape[3]), atol=1e-5
    )
    assert torch.equal(out[:, 1], out[:, 2])
    area, sides = high * wide, wide / high
    whole = (high < 0.999) & (wide < 0.999)  # not cut off
    assert area.max() <= 1 + 1e-4
    assert area[whole].min() >= least - 1e-4
    assert sides[whole].min() >= 3 / 4 - 1e-3
    assert sides[whole].max() <= 4 / 3 + 1e-3
    middle = out[:, :2].mean((2, 3))
    assert middle.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert middle.std(0).min() > 0.01


# cutmix


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize(("h", "w"), [(16, 16), (8, 20)])
def test_cutmix_labels_are_the_shares_of_the_pixels(alpha, h, w):
    n = 64
    value = torch.arange(n).float() / n
    x = value.view(n, 1, 1, 1).expand(n, 3, h, w).contiguous()
    out, y = random_cutmix(x, torch.arange(n), n, alpha, seeded())
    assert torch.allclose(y.sum(1), torch.ones(n))
    # image i is painted with value i/n, and i is its label: count who painted each pixel
    painter = (out * n).round().long()
    share = F.one_hot(painter[:, 0].flatten(1), n).float().mean(1)
    assert torch.allclose(y, share, atol=1e-6)
    assert torch.equal(painter[:, 0], painter[:, 2])
    assert ((y > 0).sum(1) <= 2).all()
    assert len(y.argsort(1)[:, -1].unique()) > n // 4
    assert (y.diag() < 1).sum() > n // 4  # many are mixed at all


def test_cutmix_pastes_the_same_place_of_the_partner():
    n, h = 32, 8
    place = torch.arange(h * h).view(1, 1, h, h).float()
    x = place + 1000 * torch.arange(n).view(n, 1, 1, 1)
    out, _ = random_cutmix(x, torch.arange(n), n, 1.0, seeded())
    assert torch.equal(out % 1000, place.expand(n, 1, h, h))
    for i, image in enumerate(out[:, 0] // 1000):
        box = image != i
        if box.any():
            rows, cols = (box.any(d).nonzero()[:, 0] for d in (1, 0))
            assert int(box.sum()) == (rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1)
            assert len(image[box].unique()) == 1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_has_its_moments(alpha):
    draws = beta(alpha, 20_000, seeded(), "cpu")
    assert draws.mean() == pytest.approx(0.5, abs=0.015)
    assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)  # αβ / ((α+β)² (α+β+1))
    assert draws.min() >= 0
    assert draws.max() <= 1


# together

OFF = {"zoom": 1.0, "crop": 0, "flip": False, "rotate": 0.0, "cutout": 0, "cutmix": 0.0}


def test_all_off_is_the_image():
    g, y = seeded(), torch.arange(16) % 4
    before = g.get_state()
    x, same = Augment(**OFF)(several(), y, 4, g)
    assert torch.equal(x, pixels(several()))
    assert same is y
    assert torch.equal(g.get_state(), before)  # what is off draws nothing


@pytest.mark.parametrize("on", [{"zoom": 0.5}, {"crop": 2}, {"flip": True}, {"rotate": 20.0}, {"cutout": 4}, {"cutmix": 1.0}])
def test_each_switch_does_its_own(on):
    y = torch.arange(16) % 4
    x, labels = Augment(**OFF | on)(several(), y, 4, seeded())
    assert not torch.equal(x, pixels(several()))
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1 + 1e-6
    assert labels.shape == ((16, 4) if "cutmix" in on else (16,))
    (name,) = on
    known = {"crop": lambda g: pixels(random_crop(several(), 2, g)), "flip": lambda g: pixels(random_flip(several(), g))}
    if name in known:
        assert torch.equal(x, known[name](seeded()))


def test_augment_names_every_argument():
    with pytest.raises(TypeError, match="cutmix"):
        Augment(zoom=1.0, crop=0, flip=False, rotate=0.0, cutout=0)
    with pytest.raises(TypeError, match="mixup"):
        Augment(**OFF, mixup=1.0)
