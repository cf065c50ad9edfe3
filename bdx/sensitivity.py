"""Features that move when the image is turned and shifted: poisoned images' do (Chen et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from bdx.augment import random_crop, random_rotate
from bdx.split import Split, pixels
from bdx.surgery import features, mode


def turned(x: Tensor, g: Generator) -> Tensor:
    """x float (N,C,H,W), each turned by up to ±180° and shifted by up to a fifth, black outside (the released code)."""
    return random_crop(random_rotate(x, 180, g), round(0.2 * max(x.shape[2:])), g)


def likeness_of_centres(z: Tensor, y: Tensor, classes: int) -> Tensor:
    """Mean cosine between the centres of the batch's classes, their own left out as 0: what spreads the classes.

    z (N,D), y (N,). The released code's loss, which it calls the intra-class loss. In full precision: what is left of it
    near its minimum is less than bf16 tells apart.
    """
    hot = F.one_hot(y, classes).float()
    there = hot.sum(0) > 0
    pairs = there[:, None] & there & ~torch.eye(classes, dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        centres = F.normalize(hot.T @ z.float(), dim=1)
        return (centres @ centres.T).masked_fill(~pairs, 0).sum() / there.sum() ** 2


@torch.no_grad()
def sensitivity(net: nn.Module, at: str, split: Split, seed: int, size: int = 500) -> Tensor:
    """(N,): mean squared change of the features, the input of the module `at`, when the image is turned (sec. 4.1, FCT)."""
    g = Generator(split.x.device).manual_seed(seed)
    with mode(net, False):
        parts = map(pixels, split.x.split(size))
        return torch.cat([(features(net, at, turned(x, g)) - features(net, at, x)).square().mean(1) for x in parts])
