"""STRIP: a triggered image keeps its class under every other image laid over it, so the entropy of what is predicted is low.

Source: Gao et al., STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019, arXiv 1902.06531; sec. 4.

    H(x) = 1/N Σ_n −Σ_k p_k log2 p_k,   p = softmax f(x + c_n),   c_n: N random clean images;   score = −H(x)

Flagged is what lies below the entropy that a share `frr` of clean images falls below: of a normal distribution fitted to
theirs (the paper), or of theirs as they are.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Generator, Tensor, nn

from bdx.detectors.base import Detector, quantile
from bdx.errors import UserError, one_of
from bdx.split import pixels
from bdx.surgery import mode
from bdx.training import at_least_one


class Strip(Detector):
    """overlays   N
    blend         pixels (the sum is clipped to [0,1]) or normalised (summed behind the net's normalisation)
    frr           share of clean images that is flagged
    fit           normal or quantile
    """

    judges = ("test", "train")
    needs = frozenset({"clean"})

    def __init__(self, *, overlays: int, blend: str, frr: float, fit: str, **common):
        super().__init__(**common)
        at_least_one("detector", overlays=overlays)
        one_of("detector.blend", blend, ("pixels", "normalised"))
        one_of("detector.fit", fit, ("normal", "quantile"))
        if not 0 < frr < 1:
            raise UserError(f"detector.frr={frr}: expected between 0 and 1")
        self.overlays, self.blend, self.frr, self.fit = overlays, blend, frr, fit

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        g = Generator().manual_seed(data.seed)
        clean = -self.entropy(net, self.some(data.clean, data.seed).x, data.clean.x, g)
        if self.fit == "quantile" or len(clean) < 2 or float(clean.std()) == 0:
            self.threshold = quantile(clean, 1 - self.frr)
        else:
            self.threshold = NormalDist(float(clean.mean()), float(clean.std())).inv_cdf(1 - self.frr)
        return -self.entropy(net, split.x, data.clean.x, g)

    @torch.no_grad()
    def entropy(self, net: nn.Module, x: Tensor, clean: Tensor, g: Generator) -> Tensor:
        """(N,) bits, the mean over each image's own `overlays` clean images."""
        found = []
        with mode(net, False):
            for part in self.through("entropies", x.split(max(1, 1000 // self.overlays))):
                chosen = torch.randint(len(clean), (len(part) * self.overlays,), generator=g).to(clean.device)
                both = pixels(part).repeat_interleave(self.overlays, 0), pixels(clean[chosen])
                bits = entropy(self.logits(net, *both)).view(len(part), -1)
                found.append(bits.mean(1))
        return torch.cat(found)

    def logits(self, net: nn.Module, x: Tensor, over: Tensor) -> Tensor:
        if self.blend == "pixels":
            return net((x + over).clamp(0, 1))
        return net.body(net.normalize(x) + net.normalize(over))


def entropy(logits: Tensor) -> Tensor:
    """(N,K) -> (N,) bits"""
    logp = logits.float().log_softmax(1)
    return -(logp.exp() * logp).sum(1) / torch.log(torch.tensor(2.0))
