"""The corruptions of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261) at ImageNet's severities 1 to 5, as tensors.

Each is corruption(x, c, g) -> the same shape, not yet clamped: x (N,C,H,W) float in [0,1], c how much, g the generator.
Fourteen of the fifteen: frost lays photographs of frost over an image, which are not ours to ship. Fog's clouds are sums
of smooth noise, blur discs have hard edges, and in glass blur all pixels move at once. Elastic is that of the package
imagecorruptions, which scales with the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_noise(x, c, g):
    return x + c * torch.empty_like(x).normal_(generator=g)


def shot_noise(x, c, g):
    return torch.poisson(x * c, generator=g) / c


def impulse_noise(x, c, g):
    """A share c of all values becomes black or white."""
    u = torch.empty_like(x).uniform_(generator=g)
    return torch.where(u < c / 2, 0.0, torch.where(u > 1 - c / 2, 1.0, x))


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel with kernel (k,k), k odd, of sum 1; the image goes on beyond its border as its mirror."""
    k, channels = len(kernel), x.shape[1]
    r = min(k // 2, min(x.shape[2:]) - 1)
    kernel = kernel[k // 2 - r : k // 2 + r + 1, k // 2 - r : k // 2 + r + 1]
    kernel = (kernel / kernel.sum()).to(x).expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(x, (r, r, r, r), mode="reflect"), kernel, groups=channels)


def defocus_blur(x, radius, g):
    at = torch.arange(-radius, radius + 1)
    return filtered(x, (at[:, None].square() + at.square() <= radius**2).float())


def motion(x: Tensor, c: tuple, angle: float) -> Tensor:
    """c: length and σ of a one-sided Gaussian along a direction."""
    radius, sigma = c
    along = torch.arange(radius + 1)
    rows, columns = ((along * f).round().long() + radius for f in (math.sin(angle), math.cos(angle)))
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1)
    kernel.index_put_((rows, columns), torch.exp(-(along.float() ** 2) / (2 * sigma**2)), accumulate=True)
    return filtered(x, kernel)


def motion_blur(x, c, g):
    """Along one direction for all images, within 45° of the horizontal."""
    return motion(x, c, (torch.rand(1, generator=g, device=x.device).item() - 0.5) * math.pi / 2)


def gaussian_blur(x: Tensor, sigma: float, cut: float) -> Tensor:
    """cut: where the kernel ends, in σ."""
    r = int(cut * sigma + 0.5)
    row = torch.exp(-torch.arange(-r, r + 1).float().square() / (2 * sigma**2))
    return filtered(x, row[:, None] * row)


def glass_blur(x, c, g):
    """Blurred, each pixel takes the value of one at most c[1] away, c[2] times over, blurred again."""
    sigma, reach, rounds = c
    x, (n, channels, h, w) = gaussian_blur(x, sigma, 4), x.shape
    at = [torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)]
    for _ in range(rounds):
        moves = torch.randint(-reach, reach, (2, n, h, w), generator=g, device=x.device)
        row, column = ((a + m).clamp(0, side - 1) for a, m, side in zip(at, moves, (h, w), strict=True))
        source = (row * w + column).flatten(1)[:, None].expand(-1, channels, -1)
        x = x.flatten(2).gather(2, source).view(n, channels, h, w)
    return gaussian_blur(x, sigma, 4)


def enlarged(x: Tensor, factor: float, beyond: str) -> Tensor:
    """The middle of the image, at the image's size; beyond: grid_sample's padding."""
    how = {"align_corners": False}
    grid = F.affine_grid(torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]]), (1, 1, *x.shape[2:]), **how).to(x)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode=beyond, **how)


def snow(x, c, g):
    """Flakes of bright noise (mean, deviation, enlarged by zoom, from `least` on) fall along one direction, and once more
    upside down, over an image that turns pale."""
    mean, deviation, zoom, least, radius, sigma, keep = c
    layer = enlarged(mean + deviation * torch.empty_like(x[:, :1]).normal_(generator=g), zoom, "border")
    angle = -(torch.rand(1, generator=g, device=x.device).item() / 2 + 0.25) * math.pi
    layer = motion(torch.where(layer < least, 0.0, layer).clamp(0, 1), (radius, sigma), angle)
    grey = torch.einsum("c,nchw->nhw", YCBCR[0].to(x), x)[:, None] if x.shape[1] == 3 else x
    return keep * x + (1 - keep) * torch.maximum(x, 1.5 * grey + 0.5) + layer + layer.rot90(2, (2, 3))


def elastic_transform(x, alpha, g):
    """Each pixel comes from somewhere else, neighbours from places near each other."""
    n, _, h, w = x.shape
    noise = torch.empty(n, 2, h, w, device=x.device).uniform_(-1, 1, generator=g) * 0.005 * h
    moves = gaussian_blur(noise, 0.01 * h, 3) * alpha * 2 / torch.tensor([w, h]).to(x).view(1, 2, 1, 1)
    still = F.affine_grid(torch.eye(2, 3).to(x).expand(n, -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, still + moves.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def zoom_blur(x, c, g):
    """The mean of the image and of its enlargements up to c[0], in steps of c[1]."""
    factors = torch.arange(1, c[0], c[1]).tolist()
    total = x
    for f in factors:
        total = total + enlarged(x, f, "border")
    return total / (1 + len(factors))


def fog(x, c, g):
    """c: how much of it, and by what factor each finer octave of the clouds is fainter."""
    amount, decay = c
    clouds, side, weight = torch.zeros(len(x), 1, *x.shape[2:], device=x.device), 2, 1.0
    while side <= max(x.shape[2:]):
        noise = torch.rand(len(x), 1, side, side, generator=g, device=x.device)
        clouds += weight * F.interpolate(noise, x.shape[2:], mode="bilinear")
        side, weight = 2 * side, weight / decay
    clouds -= clouds.amin((1, 2, 3), keepdim=True)
    clouds /= clouds.amax((1, 2, 3), keepdim=True)
    top = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * clouds) * top / (top + amount)


def brightness(x, c, g):
    """Value of HSV + c; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    lighter = (value + c).clamp(0, 1)
    return torch.where(value > 0, x * lighter / value.clamp_min(1e-6), lighter)


def contrast(x, c, g):
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * c + mean


def pixelate(x, c, g):
    small = [max(1, int(side * c)) for side in x.shape[2:]]
    return F.interpolate(F.interpolate(x, small, mode="area"), x.shape[2:], mode="nearest")


LUMA = torch.tensor([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80,
    62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98,
    112, 100, 103, 99,
]).float().view(8, 8)  # fmt: skip
CHROMA = torch.full((8, 8), 99.0)
CHROMA[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def jpeg_compression(x, quality, g):
    """Each block of 8×8 through its cosine transform, rounded by the standard's tables; colour is not subsampled."""
    colour = x.shape[1] == 3
    y = torch.einsum("dc,nchw->ndhw", YCBCR.to(x), x) * 255 if colour else x * 255
    y[:, :1] -= 128
    n, channels, height, width = y.shape
    y = F.pad(y, (0, -width % 8, 0, -height % 8), mode="replicate")
    scale = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    tables = torch.stack([LUMA] + [CHROMA] * (channels - 1)).to(x)[None, :, None, None]
    step = (tables * scale).round().clamp(1, 255)
    at = torch.arange(8, device=x.device)
    cosine = torch.cos((2 * at + 1) * at[:, None] * math.pi / 16) * torch.where(at == 0, 0.5**0.5, 1.0)[:, None] / 2
    blocks = y.unfold(2, 8, 8).unfold(3, 8, 8)
    blocks = cosine.T @ ((cosine @ blocks @ cosine.T / step).round() * step) @ cosine
    y = blocks.transpose(3, 4).reshape(n, channels, y.shape[2], y.shape[3])[..., :height, :width].clone()
    y[:, :1] += 128
    return torch.einsum("cd,ndhw->nchw", YCBCR.inverse().to(x), y) / 255 if colour else y / 255


CORRUPTIONS = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, (3, 4, 6, 8, 10)),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        snow,
        (
            (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (fog, ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (elastic_transform, (12.5, 16.25, 21.25, 25.0, 30.0)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}
