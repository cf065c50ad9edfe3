"""Polarizers: the layers that NPD inserts into a frozen net (NPD sec. 3.2 and Table 13).

Each takes and returns features (N, C, H, W) and starts as the identity; `calibrate(mean, var)` tells it the moments of
the features (each (C,)), so that a polarizer with BatchNorm is the identity with running statistics of these features.
All are called `layer(z, label)`, as CNPD's are (bdx.conditioned); these here do not look at the label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def identity_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(conv.weight)
    return conv


class Polarizer(nn.Module):
    """channels: C of the features."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def norms(self) -> list[nn.BatchNorm2d]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    @torch.no_grad()
    def calibrate(self, mean: Tensor, var: Tensor) -> None:
        for bn in self.norms():
            self.know(bn, mean, var)
            self.absorb(bn, mean, (var + bn.eps).sqrt())

    @contextmanager
    def neutral(self, mean: Tensor, var: Tensor) -> Iterator[None]:
        """Within, each BatchNorm gives the features' moments back: s (γ x̂ + β) + m, the identity with γ = 1 and β = 0. A
        step of γ then moves the features as one of a convolution's weight does; where `calibrate` has put s into γ, it
        moves them 1/s² times as far. Afterwards γ and β have taken s and m in: the same function, an ordinary BatchNorm."""
        norms, handles = self.norms(), []
        for bn in norms:
            self.know(bn, mean, var)
            scale, shift = (self.per_channel(bn, v) for v in ((var + bn.eps).sqrt(), mean))
            handles.append(bn.register_forward_hook(lambda _, args, out, s=scale, m=shift: out * s.to(out) + m.to(out)))
        try:
            yield
        finally:
            for bn, handle in zip(norms, handles, strict=True):
                handle.remove()
                self.absorb(bn, mean, (var + bn.eps).sqrt())

    @staticmethod
    @torch.no_grad()
    def know(bn: nn.Module, mean: Tensor, var: Tensor) -> None:
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)

    @staticmethod
    def per_channel(bn: nn.Module, v: Tensor) -> Tensor:
        """v (C,), to meet what `bn` returns."""
        return v.view(-1, 1, 1) if isinstance(bn, nn.BatchNorm2d) else v

    @staticmethod
    @torch.no_grad()
    def absorb(bn: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        """γ and β become those of deviation · bn(x) + mean."""
        mean, deviation = mean.to(bn.weight), deviation.to(bn.weight)
        bn.weight.mul_(deviation)
        bn.bias.mul_(deviation).add_(mean)


class Conv(Polarizer):
    """A 1×1 convolution alone."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.conv = identity_conv(channels)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.conv(z)


class ConvBN(Conv):
    """The paper's polarizer: a 1×1 convolution without bias, then BatchNorm."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.bn(self.conv(z))


class ConvBNx2(Polarizer):
    """Table 13's (Conv-BN)×2."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.first, self.second = ConvBN(channels), ConvBN(channels)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return self.second(self.first(z))


class Linear(Polarizer):
    """A weight and a bias for each channel and position, w ⊙ z + b: BackdoorBench's `linear`, which we take for Table 13's.
    size: (H, W) of the map; (1, 1) is its `linear_light`, the same at every position."""

    def __init__(self, channels: int, size: Sequence[int] = (1, 1)):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(1, channels, *size))
        self.bias = nn.Parameter(torch.zeros(1, channels, *size))

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return z * self.weight + self.bias


class Denoiser(Polarizer):
    """A residual denoising block in the manner of Xie et al. 2019 (CVPR): z + W (denoise(z) − z), W a 1×1 convolution.

    Table 13 names OSAD and OSDN without saying what they are, and no released code has them: `denoise` is our
    assumption. W starts at 0, which makes the block the identity.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.mix.weight)

    def denoise(self, z: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it denoises")

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        return z + self.mix(self.denoise(z) - z)


class OSAD(Denoiser):
    """Denoising by attention: each position becomes a mean of all, weighted by the dot product of their features."""

    def denoise(self, z: Tensor) -> Tensor:
        flat = z.flatten(2)
        weight = (flat.transpose(1, 2) @ flat / self.channels**0.5).softmax(-1)  # (N, HW, HW)
        return (flat @ weight.transpose(1, 2)).view_as(z)


class OSDN(Denoiser):
    """Denoising by the 3×3 local mean."""

    def denoise(self, z: Tensor) -> Tensor:
        return F.avg_pool2d(z, 3, stride=1, padding=1, count_include_pad=False)


STRUCTURES = {
    "conv_bn": ConvBN, "conv": Conv, "conv_bn_x2": ConvBNx2, "linear": Linear, "linear_light": Linear, "osad": OSAD,
    "osdn": OSDN,
}  # fmt: skip
