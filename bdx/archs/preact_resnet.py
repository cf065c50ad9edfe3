"""PreAct-ResNet18 with the 32×32 stem and without a final norm, as the field's benchmarks train it (He et al. 2016).

Names (conv1, layer1 … layer4, linear; 11.17 M parameters at 10 classes) are BackdoorBench's, so that its weights load.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Thinned(nn.Conv2d):
    """A 1×1 convolution with stride, as one without on the pixels that the stride leaves: the same numbers.

    For fewer than 16 channels in, since torch's own then writes out of bounds: on a CPU, backward, channels last, with an
    odd batch and several threads (torch 2.14.1 crashes in most runs).
    """

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__(inside, out, 1, bias=False)
        self.every = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., :: self.every, :: self.every])


class PreActBlock(nn.Module):
    """BN, ReLU, conv, BN, ReLU, conv; the shortcut starts behind the first ReLU."""

    def __init__(self, inside: int, out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        if stride != 1 or inside != out:
            thin = Thinned(inside, out, stride) if inside < 16 else nn.Conv2d(inside, out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(thin)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(x))
        skip = self.shortcut(z) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(z)))) + skip


class PreActResNet(nn.Module):
    """blocks: per stage. width: channels of the first stage (64; fewer make a thin net). final_norm: BN and ReLU before
    the pooling, as He et al. drew it; the benchmarks' nets have none."""

    def __init__(self, blocks: list[int], *, num_classes: int, width: int, final_norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        inside = width
        for i, count in enumerate(blocks):
            out = width * 2**i
            strides = [1 if i == 0 else 2] + [1] * (count - 1)
            stage = [PreActBlock(inside if j == 0 else out, out, s) for j, s in enumerate(strides)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            inside = out
        if final_norm:
            self.bn = nn.BatchNorm2d(inside)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inside, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if hasattr(self, "bn"):
            z = F.relu(self.bn(z))
        return self.linear(self.avgpool(z).flatten(1))


def preact_resnet18(*, num_classes: int, width: int, final_norm: bool) -> PreActResNet:
    return PreActResNet([2, 2, 2, 2], num_classes=num_classes, width=width, final_norm=final_norm)
