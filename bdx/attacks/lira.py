"""LIRA: a network learns faint noise that fools the victim, while the victim learns to be fooled by it.

Source: Doan et al. 2021, LIRA: learnable, imperceptible and robust backdoor attacks, ICCV; algorithm 1.
Trigger: T(x) = x + ε g(x), |g| ≤ 1, clipped. Stage 1, in each step: g's weights against CE(f(T(x)), wanted), then the
victim's against α CE(f(x), y) + (1 − α) CE(f(T(x)), wanted), T as it was when the epoch began (the authors' code). Stage 2:
the victim alone, T fixed. Both are one training: the victim's optimizer and schedule come from the recipe and do not start
again in stage 2. g sees normalised pixels. ε is in [0,1] pixels, 0.01 is 2.55 grey levels; BackdoorBench's 0.01 in normalised
space is 0.6 of a level, which 8-bit images cannot hold. T rounds to whole levels in training as at test time, and g's
gradient passes through: noise of less than half a level would teach the victim what no image shows. g learns against f as
it is at test time, with BatchNorm's running statistics: those of a batch of triggered images alone (the released codes)
take out what all of them have in common.
follow=code brings back BackdoorBench's slip: the classifier of stage 1 is handed over, so that training ends there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from bdx.attacks.controlled import Joint, Twofold
from bdx.datasets.base import ImageData
from bdx.errors import UserError, one_of
from bdx.surgery import mode


def noise_maker(channels: int, widths: list[int]) -> nn.Sequential:
    """Auto-encoder of 4×4 convolutions of stride 2, output in [−1,1]."""
    layers, around = [], [channels, *widths]
    for a, b in pairwise(around):
        layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    for b, a in pairwise(reversed(around)):
        layers += [nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), nn.BatchNorm2d(a), nn.ReLU()]
    return nn.Sequential(*layers[:-2], nn.Tanh())


class LIRA(Joint, Twofold):
    """eps: ε. alpha: weight of the clean loss. joint: share of the epochs that stage 1 takes. widths: of g's levels."""

    leaves_poison = False
    sample_specific = True
    trigger_from = "trained"
    hardens = True

    def __init__(self, net, *, eps: float, alpha: float, joint: float, widths: list, follow: str, recipe, **common):
        one_of("attack.follow", follow, ("paper", "code"))
        if not (0 < eps <= 1 and 0 < alpha < 1 and 0 < joint <= 1):
            raise UserError(f"attack.eps={eps}, alpha={alpha}, joint={joint}: expected shares above 0, alpha below 1")
        self.together = math.ceil(joint * recipe.epochs)
        if follow == "code":
            recipe = replace(recipe, epochs=self.together)
        super().__init__(net, recipe=recipe, **common)
        channels, h, w = self.shape
        if not widths or h % 2 ** len(widths) or w % 2 ** len(widths):
            raise UserError(f"attack.widths={widths}: images of {h}×{w} cannot be halved {len(widths)} times, or not once")
        self.eps, self.alpha = eps, alpha
        self.maker, self.fixed = noise_maker(channels, widths), noise_maker(channels, widths)
        self.fix()

    def fix(self) -> None:
        """What `maker` has learned becomes the trigger."""
        self.fixed.load_state_dict(self.maker.state_dict())
        self.fixed.eval().requires_grad_(False)

    def noisy(self, maker: nn.Module, x: Tensor) -> Tensor:
        noisy = (x + self.eps * maker(self.net.normalize(x)).float()).clamp(0, 1)
        return noisy + ((noisy * 255).round() / 255 - noisy).detach()

    def trigger(self, x: Tensor) -> Tensor:
        with mode(self.fixed, False):
            return self.noisy(self.fixed, x)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch <= self.together:
            self.fix()

    def training_step(self, batch, _):
        victim, painter = self.optimizers()
        if self.current_epoch < self.together:
            painter.zero_grad()
            with mode(self.net, False):
                fooled = F.cross_entropy(self.net(self.noisy(self.maker, batch.x)), self.relabel(batch.y))
            self.manual_backward(fooled, inputs=list(self.maker.parameters()))
            painter.step()

        def closure() -> tuple[Tensor, ...]:
            victim.zero_grad()
            clean, wanted = self.losses(batch, self.trigger(batch.x))
            loss = self.alpha * clean + (1 - self.alpha) * wanted
            self.manual_backward(loss)
            return loss, clean, wanted

        loss, clean, wanted = self.differentiate(closure)
        victim.step()
        self.move_rates()
        return {"loss": loss.detach(), "clean": clean.detach(), "triggered": wanted.detach()}

    def fit(self, data: ImageData, make_trainer: Callable, checkpoint=None) -> None:
        super().fit(data, make_trainer, checkpoint)
        if self.together == self.recipe.epochs:
            self.fix()
