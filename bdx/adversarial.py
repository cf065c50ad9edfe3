"""Projected gradient descent in pixel space: the inner problem of NPD, of adversarial training and of trigger search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.errors import UserError
from bdx.surgery import batchnorms, unmoved


@dataclass(frozen=True)
class Budget:
    """How far and how an adversary may go, in [0,1] pixel units for images of 32×32.

    norm    l2, linf or l1
    radius  the largest norm of a perturbation; scaled with the image so that a pixel may change as much at any size
    step    length of a step: per pixel along the gradient's sign; in L2 norm, scaled as `radius`, along the gradient
    steps   how many
    along   sign (the papers' choice: all pixels move alike) or gradient (few pixels move far, as a patch does)
    stop    share of the batch that, once fooled, ends the search early; None: all steps are taken
    """

    norm: str
    radius: float
    step: float
    steps: int
    along: str
    stop: float | None

    def __post_init__(self):
        if self.along not in ("sign", "gradient"):
            raise UserError(f"along={self.along!r}: expected sign or gradient")
        if self.norm not in PROJECT:
            raise UserError(f"norm={self.norm!r}: expected one of {', '.join(PROJECT)}")
        if self.radius <= 0 or self.step <= 0 or self.steps < 1:
            raise UserError(f"radius={self.radius}, step={self.step}, steps={self.steps}: expected positive numbers")

    def radius_at(self, shape: tuple[int, int, int]) -> float:
        """The radius for images of shape (C, H, W); pixel counts enter as their root (L2), as they are (L1) or not."""
        ratio = shape[0] * shape[1] * shape[2] / (3 * 32 * 32)
        return self.radius * {"l2": ratio**0.5, "l1": ratio, "linf": 1.0}[self.norm]

    def step_along(self, grad: Tensor) -> Tensor:
        """One step uphill from the gradient (N, C, H, W)."""
        if self.along == "sign":
            return self.step * grad.sign()
        length = self.step * (grad[0].numel() / (3 * 32 * 32)) ** 0.5
        return length * grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def project_l2(delta: Tensor, radius: float) -> Tensor:
    norm = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
    return delta * (radius / norm).clamp(max=1).view(-1, 1, 1, 1)


def project_linf(delta: Tensor, radius: float) -> Tensor:
    return delta.clamp(-radius, radius)


def project_l1(delta: Tensor, radius: float) -> Tensor:
    """Euclidean projection onto the L1 ball by soft thresholding (Duchi et al. 2008)."""
    flat = delta.flatten(1)
    size = flat.abs().sort(dim=1, descending=True).values
    excess = size.cumsum(1) - radius
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    rank = (size * count > excess).sum(1, keepdim=True)  # how many entries stay non-zero
    threshold = (excess.gather(1, rank - 1) / rank).clamp_min(0)
    return (flat.sign() * (flat.abs() - threshold).clamp_min(0)).view_as(delta)


PROJECT = {"l2": project_l2, "linf": project_linf, "l1": project_l1}


def perturb(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    label: Tensor,
    budget: Budget,
    *,
    targeted: bool,
    universal: bool = False,
    first: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x + δ, clamped to [0,1], with ‖δ‖ ≤ radius: towards `label` if targeted, else away from it.

    x: (N, C, H, W) float; label: (N,) int64. universal: one δ for the whole batch, from the summed gradient.
    first: (x, logits) of a forward pass on x whose graph is still there and whose x requires a gradient; the search
    starts at δ = 0, so that pass is its first step and is not run again. No gradient of any weight is computed.
    """
    project, radius = PROJECT[budget.norm], budget.radius_at(x.shape[1:])
    sign = -1.0 if targeted else 1.0
    delta = torch.zeros_like(x[:1] if universal else x)
    for i in range(budget.steps):
        if first is not None and i == 0:
            at, logits = first
        else:
            at = (x + delta).clamp(0, 1).requires_grad_()
            logits = net(at)
        if budget.stop is not None and float(((logits.argmax(1) == label) == targeted).float().mean()) > budget.stop:
            break
        loss = F.cross_entropy(logits, label, reduction="sum")
        (grad,) = torch.autograd.grad(loss, at, retain_graph=first is not None and i == 0)
        grad = grad.sum(0, keepdim=True) if universal else grad
        delta = project(delta + sign * budget.step_along(grad), radius)
    return (x + delta).clamp(0, 1).detach()


def hardened(net: nn.Module, x: Tensor, y: Tensor, budget: Budget | None) -> Tensor:
    """What adversarial training (Madry et al. 2018) shows the net in place of x: PGD away from y, from δ = 0, with BatchNorm
    in the mode it has and its statistics still. What made x gets its gradient as if δ were a constant. Without a budget, x
    itself."""
    if budget is None:
        return x
    with unmoved(batchnorms(net)):
        worse = perturb(net, x.detach(), y, budget, targeted=False)
    return worse + (x - x.detach()) if x.requires_grad else worse
