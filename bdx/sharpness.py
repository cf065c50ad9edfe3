"""Sharpness-aware steps: of an attacker who trains by SAM or ASAM (train.sam_rho), and of FT-SAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bdx.surgery import batchnorms, unmoved


def sharpness_aware(net: nn.Module, closure: Callable, rho: float, adaptive: bool, beside: nn.Module | None = None):
    """A closure that leaves the gradients of the worst nearby weights (SAM, Foret et al. 2021; adaptive: ASAM, Kwon et
    al. 2021): those at w + e, e = ρ g/‖g‖, or e = ρ w²g/‖|w|g‖. BatchNorm's statistics move in the first pass alone,
    those of `beside` too, where more than the net runs in it."""

    def twice():
        closure()
        with torch.no_grad():
            params = [p for p in net.parameters() if p.grad is not None]
            scaled = [p.grad * p.abs() if adaptive else p.grad for p in params]
            length = rho / torch.stack([s.norm() for s in scaled]).norm().clamp_min(1e-12)
            moves = [length * s * p.abs() if adaptive else length * s for s, p in zip(scaled, params, strict=True)]
            before = [p.clone() for p in params]
            torch._foreach_add_(params, moves)
        with unmoved(batchnorms(beside or net)):
            result = closure()
        with torch.no_grad():
            torch._foreach_copy_(params, before)  # to the bit, which subtracting would not give
        return result

    return twice
