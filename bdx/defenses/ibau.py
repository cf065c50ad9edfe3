"""I-BAU: unlearn the worst universal perturbation, with the gradient that knows how it moves as the weights move.

Source: Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022, arXiv 2110.03735; Algorithm 1.

    min over θ of L(θ, δ*(θ)),   δ*(θ) = argmin of I(δ, θ) = −CE(f_θ(x+δ), y) + c‖δ‖²   within ‖δ‖ ≤ C

A round is one pass over the clean images for δ, then one step of θ per batch. The hypergradient is
∂L/∂θ + (∂Φ/∂θ)ᵀ v,  v = (I − ∂Φ/∂δ)⁻ᵀ ∂L/∂δ  for the map Φ(δ, θ) = δ − r ∂I/∂δ, v by fixed-point iteration.

δ and all that is told of it are in pixel units, images being in [0,1], as in the authors' code; or in units of the data's
deviation, as in BackdoorBench, which adds δ behind the normalisation. x + δ is not clamped in either.

All is computed in full precision, whatever train.precision says, and with BatchNorm's running statistics. Each round
augments anew (the code augments once). In L a hundredth of the batch, but always at least one image, carries δ: the code
rounds that down, to none below 100 images, and tunes without a word.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdx.adversarial import project_l2
from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError, one_of
from bdx.training import at_least_one


class IBAU(Tuning):
    """unit        of δ, and so of radius, decay and both rates: pixel, or deviation (of the data's normalisation)
    search_lr      of plain descent on I, one step per batch from δ = 0
    decay          c
    radius         C for images of 3×32×32, scaled with the root of the pixel count
    map_lr         r, the step of Φ, which is always of the first batch
    iterations     of the fixed point
    share          of a batch that carries δ in L
    away_from      label, or prediction: what the search leads away from
    recipe         paper, or code: the search is away from the net's own predictions, and no ball bounds δ
    """

    trains = "all weights"
    cost = "per batch and round: one pass for the trigger, and a second-order pass for each of the iterations"

    def __init__(
        self, net: nn.Module, *, unit: str, search_lr: float, decay: float, radius: float, map_lr: float, iterations: int,
        share: float, away_from: str, recipe: str, **loop,
    ):  # fmt: skip
        one_of("defense.recipe", recipe, ("paper", "code"))
        one_of("defense.unit", unit, ("pixel", "deviation"))
        one_of("defense.away_from", away_from, ("label", "prediction"))
        at_least_one("defense", iterations=iterations)
        if min(search_lr, radius, map_lr) <= 0 or decay < 0 or not 0 < share <= 1:
            raise UserError(
                f"defense.search_lr={search_lr}, radius={radius}, map_lr={map_lr}, decay={decay}, share={share}: "
                "expected the first three above 0, decay not below 0, and share above 0 and at most 1"
            )
        super().__init__(net, **loop)
        self.search_lr, self.decay, self.radius, self.map_lr = search_lr, decay, radius, map_lr
        self.unit, self.iterations, self.share, self.recipe = unit, iterations, share, recipe
        self.predicted, self.first = away_from == "prediction" or recipe == "code", None

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        self.search = data.batches(data.clean, size=self.batch, shuffle=True, augment=self.augment, stage=2)
        if (most := min(self.batch, len(data.clean))) * self.share < 1:
            self.notes.append(
                f"I-BAU: defense.share={self.share:g} of a batch of {most} is less than one image: one carries the "
                "perturbation, where the released code perturbs none and only tunes"
            )
        return super().run(data, make_trainer)

    def ready(self) -> IBAU:
        return self.eval()

    def on_train_epoch_start(self):
        self.delta = self.worst_case()

    def training_step(self, batch, _):
        self.first = self.first or batch
        # attention's fast kernels have no second derivative
        with torch.autocast(batch.x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            delta = self.delta.clone().requires_grad_()
            outer = self.outer(delta, batch.x, batch.y)
            phi = self.descend(delta, self.first.x, self.first.y, self.map_lr, create_graph=True)
            loss = implicit(outer, phi, delta, self.iterations)
        return {"loss": loss, "delta": delta.norm()}

    def worst_case(self) -> Tensor:
        """δ (1,C,H,W) that the net at hand is worst at."""
        delta = torch.zeros(1, *self.net.spec["shape"], device=self.device)
        radius = self.radius * (delta.numel() / (3 * 32 * 32)) ** 0.5
        for x, y, _ in self.search:
            if self.predicted:
                with torch.no_grad():
                    y = self.net(x).argmax(1)
            delta = self.descend(delta.requires_grad_(), x, y, self.search_lr).detach()
            delta = project_l2(delta, radius) if self.recipe == "paper" else delta
        return delta

    def descend(self, delta: Tensor, x: Tensor, y: Tensor, lr: float, create_graph: bool = False) -> Tensor:
        """Φ: one step down I."""
        inner = self.decay * delta.square().sum() - F.cross_entropy(self.at(x, delta), y)
        return delta - lr * torch.autograd.grad(inner, delta, create_graph=create_graph)[0]

    def outer(self, delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """L: the mean loss of a batch in which a random share carries δ."""
        count = max(1, int(self.share * len(x)))
        carries = torch.randperm(len(x), device=x.device) < count
        return F.cross_entropy(self.at(x, delta * carries.view(-1, 1, 1, 1)), y)

    def at(self, x: Tensor, delta: Tensor) -> Tensor:
        return self.net(x + (delta if self.unit == "pixel" else delta * self.net.normalize.std))


def implicit(outer: Tensor, phi: Tensor, delta: Tensor, iterations: int) -> Tensor:
    """A loss with the value of `outer` and, by the weights, its hypergradient at the fixed point δ = Φ(δ).

    v ← (∂Φ/∂δ)ᵀ v + ∂outer/∂δ from v = 0; the first of the iterations gives ∂outer/∂δ itself.
    """
    (slope,) = torch.autograd.grad(outer, delta, retain_graph=True)
    v = slope
    for _ in range(iterations - 1):
        v = torch.autograd.grad(phi, delta, v, retain_graph=True)[0] + slope
    return outer + (v * (phi - phi.detach())).sum()
