"""Which images of a training set the loss gives away: a net learns a backdoor first (Li et al. 2021, Huang et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.errors import UserError
from bdx.split import Split, pieces, pixels
from bdx.surgery import mode


def flooding(loss: Tensor, level: float) -> Tensor:
    """|L − b| + b of a batch's mean loss (Ishida et al. 2020): it stays near the level b."""
    return (loss - level).abs() + level


def local_gradient_ascent(loss: Tensor, level: float) -> Tensor:
    """sign(L − γ) L (ABL sec. 3.2); its gradient is flooding's, the value alone differs."""
    return (loss - level).sign().detach() * loss


HOLDS = {"flooding": flooding, "lga": local_gradient_ascent}


def symmetric(logits: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    """Symmetric cross-entropy (N,): α CE + β RCE, the reverse with log 0 taken as log 1e-4 (Wang et al., ICCV 2019)."""
    probability = logits.float().softmax(1).clamp(1e-7, 1.0)
    hot = (F.one_hot(y, logits.shape[1]).float() if y.ndim == 1 else y).clamp(1e-4, 1.0)  # CutMix gives probabilities
    return alpha * F.cross_entropy(logits.float(), y, reduction="none") - beta * (probability * hot.log()).sum(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(N,)"""
    return F.cross_entropy(logits.float(), y, reduction="none")


@torch.no_grad()
def losses(net: nn.Module, split: Split, loss: Callable) -> Tensor:
    """loss(logits, y) -> (n,), for every image as it is, net in eval mode: (N,)."""
    with mode(net, False):
        return torch.cat([loss(net(pixels(x)), y) for x, y in pieces(split.x, split.y)])


def lowest(score: Tensor, share: float) -> Tensor:
    """(N,) bool: the round(share·N) images with the lowest score, at least one."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.argsort(stable=True)[: max(1, round(share * len(score)))]] = True
    return chosen


def shares(key: str, **values: float) -> None:
    """Raise UserError unless each value lies between 0 and 1."""
    for name, value in values.items():
        if not 0 < value < 1:
            raise UserError(f"{key}.{name}={value}: expected a share above 0 and below 1")
