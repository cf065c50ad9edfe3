"""Blind: the code that computes the loss is tampered with; every image is trained on a second time, triggered.

Source: Bagdasaryan and Shmatikov 2021, Blind backdoors in deep learning models, USENIX Security, arXiv 2005.03823; sec. 4.3.
Loss: α CE(clean) + β CE(triggered, wanted). balance=mgda (paper): α and β of each step from both gradients, multiple
gradient descent (Désidéri 2012; Sener and Koltun 2018), gradients divided by loss × length; fixed: 1 and 0.9 (BackdoorBench).
The second term waits until the victim has nearly learned its task: the mean clean loss of the last `history` steps is below
`threshold`, read at the start of each epoch. A small black-and-white pattern replaces pixels, in floats as in whole levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bdx.attacks.controlled import Twofold
from bdx.datasets.base import ImageData
from bdx.errors import UserError, one_of

KEEP = -1.0
PATTERN = ((1.0, 0.0, 1.0), (KEEP, 1.0, KEEP), (KEEP, KEEP, 0.0), (KEEP, 1.0, KEEP), (1.0, 0.0, 1.0))


class Blind(Twofold):
    """top, left: of the pattern, at 32×32. balance: mgda or fixed, with `weight` for the triggered images."""

    leaves_poison = False
    hardens = True

    def __init__(
        self, net, *, top: int, left: int, balance: str, weight: float, threshold: float, history: int, **common
    ):  # fmt: skip
        super().__init__(net, **common)
        one_of("attack.balance", balance, ("mgda", "fixed"))
        if balance == "mgda" and self.recipe.precision == "16-mixed":
            raise UserError(
                "train.precision=16-mixed: attack.balance=mgda compares gradients, too small for it; take bf16-mixed or 32-true"
            )
        if not (0 <= top <= 27 and 0 <= left <= 29):
            raise UserError(f"attack.top={top}, attack.left={left}: the 5×3 pattern must fit into 32×32, up to 27 and 29")
        if history < 1 or weight <= 0 or threshold <= 0:
            raise UserError(f"attack.history={history}, weight={weight}, threshold={threshold}: expected positive numbers")
        self.balance, self.weight, self.threshold, self.history = balance, weight, threshold, history
        picture = torch.full((3, 32, 32), KEEP)
        picture[:, top : top + 5, left : left + 3] = torch.tensor(PATTERN)
        self.register_buffer("pattern", self.scaled(picture))
        self.register_buffer("recent", torch.full((history,), math.inf))  # clean losses
        self.on = False

    def trigger(self, x: Tensor) -> Tensor:
        pattern = self.pattern.to(x.device)
        return torch.where(pattern == KEEP, x, pattern)

    def fit(self, data: ImageData, make_trainer: Callable, checkpoint=None) -> None:
        steps = self.recipe.epochs * len(self.batches(data))
        if steps <= self.history:
            raise UserError(
                f"attack.history={self.history}: the training has {steps} steps, and none would be left for the backdoor; "
                f"set attack.history below {steps}, to {max(steps // 10, 1)} say"
            )
        super().fit(data, make_trainer, checkpoint)

    def on_train_epoch_start(self) -> None:
        self.on = bool(self.recent.mean() < self.threshold)

    def training_step(self, batch, batch_idx):
        if self.on:
            clean, wanted = self.losses(batch, self.trigger(batch.x))
            loss = self.balanced(clean, wanted)
        else:
            loss = clean = self.loss(batch.x, batch.y)
            wanted = torch.zeros_like(clean)
        self.recent[self.trainer.global_step % self.history] = clean.detach()
        return {"loss": loss, "clean": clean.detach(), "triggered": wanted.detach()}

    def balanced(self, clean: Tensor, wanted: Tensor) -> Tensor:
        if self.balance == "fixed":
            return clean + self.weight * wanted
        params = list(self.net.parameters())
        grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in (clean, wanted)]
        share = least_norm(*(scaled(g, loss.detach()) for g, loss in zip(grads, (clean, wanted), strict=True)))
        return share * clean + (1 - share) * wanted


def scaled(grads: tuple[Tensor, ...], loss: Tensor) -> Tensor:
    """One vector, divided by loss × length."""
    flat = torch.cat([g.flatten() for g in grads])
    return flat / (loss * flat.norm()).clamp_min(1e-12)


def least_norm(a: Tensor, b: Tensor) -> Tensor:
    """The share s in [0,1] for which ‖s a + (1 − s) b‖ is least."""
    return ((b - a).dot(b) / (b - a).dot(b - a).clamp_min(1e-12)).clamp(0, 1)
