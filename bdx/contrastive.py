"""Contrastive learning: features in which the views of one image are near each other, and far from all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """SimCLR's head: features (N,D) -> (N,out). norm: BatchNorm before its ReLU, as in DBD's released code."""

    def __init__(self, width: int, out: int, norm: bool):
        between = [nn.BatchNorm1d(width)] if norm else []
        super().__init__(nn.Linear(width, width), *between, nn.ReLU(), nn.Linear(width, out))


def contrast(z: Tensor, near: Tensor, temperature: float) -> Tensor:
    """Mean over all views of −log softmax of the similarities, meaned over a view's positives (Khosla et al. 2020, eq. 2).

    z (2N,D): first views, then second ones. near (N,N) bool: row i marks the images whose views are positives of i's,
    i itself among them. In full precision, as the temperature spreads similarities by 10.
    """
    z = F.normalize(z.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = near.repeat(2, 2) & ~itself
    with torch.autocast(z.device.type, enabled=False):
        log_p = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, eq. 1): the other view of the same image is the one positive."""
    return contrast(z, torch.eye(len(z) // 2, dtype=torch.bool, device=z.device), temperature)


def trusting(y: Tensor, trusted: Tensor) -> Tensor:
    """near (N,N) for `contrast`: a trusted image's positives are all of its label, any other's its own views alone."""
    return ((y[:, None] == y) & trusted[:, None]) | torch.eye(len(y), dtype=torch.bool, device=y.device)
