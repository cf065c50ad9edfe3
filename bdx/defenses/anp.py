"""ANP: channels that a small change of their own scale turns against the net are masked, and cut.

Source: Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021, arXiv 2110.14430; sec. 4, Algorithm 1.

    min over m in [0,1]ᶜ   α CE(f_m(x), y) + (1 − α) max over |δ|,|ξ| ≤ ε of CE(f_{m,δ,ξ}(x), y)
    BatchNorm's scale γ(m + δ) and shift β(1 + ξ); a channel is cut (γ = 0) where its m ≤ a threshold

Masks are learned on a copy in train mode, and cut in the net as it came. The released code picks the threshold of the
lowest ASR on test images; that is not to be had here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError
from bdx.pruning import Masks, Rule, thresholds
from bdx.training import at_least_one


class ANP(Tuning):
    """eps, steps   the noise starts uniform in [−ε, ε] and takes steps of ε/steps along the gradient's sign
    project       keep it within ε (the paper); the released codes do not, so that it reaches 2ε
    alpha         weight of the loss without noise
    threshold     masks up to it are cut, for select=fixed
    select        accuracy: the last threshold of 0, step, … last up to which accuracy on the reserved images falls by
                  max_drop at most; or fixed
    """

    trains = "a mask for each BatchNorm channel"
    cost = "per clean image and epoch: three passes with gradients; then one pass for each threshold tried"
    needs_batchnorm = True

    def __init__(
        self, net: nn.Module, *, eps: float, steps: int, project: bool, alpha: float, threshold: float, select: str,
        max_drop: float, step: float, last: float, **loop,
    ):  # fmt: skip
        at_least_one("defense", steps=steps)
        if eps <= 0 or not 0 <= alpha <= 1:
            raise UserError(f"defense.eps={eps}, alpha={alpha}: expected eps above 0, alpha from 0 to 1")
        super().__init__(net, **loop)
        self.eps, self.steps, self.project, self.alpha = eps, steps, project, alpha
        self.rule, self.grid = Rule(select, threshold, max_drop), thresholds(step, last)

    def ready(self) -> ANP:
        self.masks = Masks(copy.deepcopy(self.net))
        return self.train()

    def trained(self):
        return [self.masks.mask]

    def training_step(self, batch, _):
        gamma, beta = self.noise(batch)
        mask = self.masks.mask
        clean = F.cross_entropy(self.masks(batch.x), batch.y)
        noisy = F.cross_entropy(self.masks(batch.x, mask + gamma, 1 + beta), batch.y)
        return {"loss": self.alpha * clean + (1 - self.alpha) * noisy, "clean": clean, "noisy": noisy}

    def noise(self, batch) -> tuple[Tensor, Tensor]:
        """(δ, ξ), each (C,) over the channels of all layers, at which the loss is high."""
        mask = self.masks.mask.detach()
        pair = [torch.empty_like(mask).uniform_(-self.eps, self.eps).requires_grad_() for _ in range(2)]
        for _ in range(self.steps):
            loss = F.cross_entropy(self.masks(batch.x, mask + pair[0], 1 + pair[1]), batch.y)
            grads = torch.autograd.grad(loss, pair)
            with torch.no_grad():
                for noise, grad in zip(pair, grads, strict=True):
                    noise += self.eps / self.steps * grad.sign()
                    if self.project:
                        noise.clamp_(-self.eps, self.eps)
        return pair[0].detach(), pair[1].detach()

    def on_train_batch_end(self, *_):
        self.masks.clip()

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        super().run(data, make_trainer)
        self.rule.prune(self.net, self.masks.prune, self.grid, data).report(self)
        return self.net
