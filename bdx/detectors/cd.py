"""Cognitive Distillation: of a triggered image a few pixels suffice to give the same logits, of a clean one many are needed.

Source: Huang et al., Distilling Cognitive Backdoor Patterns within an Image, ICLR 2023, arXiv 2301.10908; sec. 3.

    min over m   mean |f(x) − f(x m + δ (1 − m))| + γ ‖m‖₁ + β TV(m),   m (1,H,W) = (tanh w + 1)/2,   δ ~ U[0,1]^C each step
    score = −‖m‖₁;   flagged: ‖m‖₁ < mean − `deviations` · std of the clean images' masks

TV(m): squared differences of neighbours, a mean over pixels. BackdoorBench takes its threshold from training images
that it knows to be clean, and flags the wrong side of it; here it comes from the reserved ones.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from bdx.detectors.base import Detector
from bdx.errors import UserError
from bdx.split import pixels
from bdx.surgery import mode
from bdx.training import at_least_one


class CognitiveDistillation(Detector):
    """steps, lr   of Adam, whose β are (0.1, 0.1)
    size           γ, of the mask's 1-norm
    smooth         β, of its total variation
    deviations     below the clean mean where suspicion begins
    batch          images at once
    """

    judges = ("train", "test")
    needs = frozenset({"clean"})

    def __init__(self, *, steps: int, lr: float, size: float, smooth: float, deviations: float, batch: int, **common):
        super().__init__(**common)
        at_least_one("detector", steps=steps, batch=batch)
        if lr <= 0 or min(size, smooth) < 0:
            raise UserError(f"detector.lr={lr}, size={size}, smooth={smooth}: expected lr above 0, the others not below 0")
        self.steps, self.lr, self.size, self.smooth = steps, lr, size, smooth
        self.deviations, self.batch = deviations, batch

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        clean = self.norms(net, self.some(data.clean, data.seed).x, data.seed)
        self.threshold = -(clean.mean() - self.deviations * clean.std(correction=0))
        return -self.norms(net, split.x, data.seed)

    def norms(self, net: nn.Module, x: Tensor, seed: int) -> Tensor:
        """x (N,C,H,W) uint8 -> (N,) ‖m‖₁. No weight gets a gradient."""
        g, before = Generator().manual_seed(seed), [(p, p.requires_grad) for p in net.parameters()]
        with mode(net, False):
            net.requires_grad_(False)
            try:
                parts = self.through("masks", x.split(self.batch))
                return torch.cat([self.mask(net, pixels(part), g).flatten(1).sum(1) for part in parts])
            finally:
                for p, was in before:
                    p.requires_grad_(was)

    def mask(self, net: nn.Module, x: Tensor, g: Generator) -> Tensor:
        """x (N,C,H,W) float -> m (N,1,H,W) in [0,1]; each image's own problem, so the sum of them is minimised."""
        w = torch.ones(len(x), 1, *x.shape[2:], device=x.device, requires_grad=True)
        adam = torch.optim.Adam([w], lr=self.lr, betas=(0.1, 0.1))
        with torch.no_grad():
            logits = net(x)
        for _ in range(self.steps):
            m = (w.tanh() + 1) / 2
            noise = torch.rand(len(x), x.shape[1], 1, 1, generator=g).to(x.device)
            apart = (net(x * m + noise * (1 - m)) - logits).abs().mean(1)
            loss = apart + self.size * m.flatten(1).sum(1) + self.smooth * variation(m)
            adam.zero_grad()
            loss.sum().backward()
            adam.step()
        return ((w.tanh() + 1) / 2).detach()


def variation(m: Tensor) -> Tensor:
    """(N,1,H,W) -> (N,)"""
    down, right = (m[:, :, 1:] - m[:, :, :-1]).square(), (m[..., 1:] - m[..., :-1]).square()
    return (down.flatten(1).sum(1) + right.flatten(1).sum(1)) / m[0].numel()
