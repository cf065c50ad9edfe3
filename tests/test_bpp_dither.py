"""Bpp's dithering: many pixels at once, against a loop that goes from pixel to pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import build_attack

from bdx.attacks.bpp import dithered


def pixel_by_pixel(x: np.ndarray, steps: int) -> np.ndarray:
    """Floyd and Steinberg 1976 on (H,W), float32, in reading order."""
    x = x.copy()
    h, w = x.shape
    for i in range(h):
        for j in range(w):
            value = np.float32(min(max(np.rint(x[i, j] * np.float32(steps)), 0), steps)) / np.float32(steps)
            error = x[i, j] - value
            x[i, j] = value
            for a, b, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + a < h and 0 <= j + b < w:
                    x[i + a, j + b] += np.float32(share / 16) * error
    return x


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 5, 9), (2, 1, 9, 4), (1, 1, 1, 6), (1, 1, 6, 1), (1, 1, 3, 2)])
@pytest.mark.parametrize("steps", [1, 7])
def test_many_pixels_at_once_are_pixel_after_pixel(shape, steps):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    wanted = np.stack([[pixel_by_pixel(plane, steps) for plane in image] for image in x.numpy()])
    assert np.array_equal(dithered(x, steps).numpy(), wanted)
    assert torch.equal(x, before)


def test_a_real_image_by_the_loop(digits):
    x = digits.test.x[:2, :1].float() / 255
    wanted = np.stack([[pixel_by_pixel(plane, 7) for plane in image] for image in x.numpy()])
    assert np.array_equal(dithered(x, 7).numpy(), wanted)


def test_grey_by_hand():
    """Two levels, 0.4 everywhere: 0 passes 0.4 on, and 0.4 + 7/16 · 0.4 = 0.575 becomes 1."""
    out = dithered(torch.full((1, 1, 1, 4), 0.4), 1)[0, 0, 0]
    # then 0.4 − 7/16 · 0.425 = 0.214 -> 0, and 0.4 + 7/16 · 0.214 = 0.494 -> 0
    assert out.tolist() == [0, 1, 0, 0]


def test_dithering_keeps_the_mean_which_rounding_does_not(digits):
    plain, spread = (build_attack(digits, "attack=bpp", f"attack.dither={d}") for d in ("false", "true"))
    grey = torch.full((1, 3, 32, 32), 0.45)  # between 3/7 and 4/7
    assert float((plain.trigger(grey) * 7).mean()) == pytest.approx(3, abs=1e-5)
    assert float((spread.trigger(grey) * 7).mean()) == pytest.approx(0.45 * 7, abs=0.02)
    assert len(spread.stamp((grey * 255).byte()).unique()) == 2


def test_dithered_images_have_eight_levels_and_negatives_carry_the_dither(digits):
    attack = build_attack(digits, "attack=bpp_controlled", "attack.dither=true")
    x = digits.train.x[:4]
    out = attack.stamp(x)
    assert set(out.unique().tolist()) <= {0, 36, 73, 109, 146, 182, 219, 255}
    assert not torch.equal(out, build_attack(digits, "attack=bpp", "attack.dither=false").stamp(x))
    crossed = attack.cross(x, torch.arange(4), torch.Generator()).int()
    assert torch.equal(crossed, (x.int() + out.roll(-1, 0).int() - x.roll(-1, 0).int()).clamp(0, 255))
