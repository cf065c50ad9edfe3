"""Spectral Signatures: within a class, poisoned images stand out along the direction of largest variance of the features.

Source: Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018, arXiv 1811.00636; Algorithm 1.

    score = ((r(x) − mean of the class) · v)²,   v: top right singular vector of the class's centred features r

Flagged is the share `remove` of each class with the highest scores: 1.5 ε in the paper, ε an upper bound on the share
of poisoned images. BackdoorBench projects the features as they are (center=false) on the same v.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdx.detectors.base import Detector, classes, penultimate
from bdx.errors import UserError


class Spectral(Detector):
    """remove   share of each class that is flagged
    center      take the class's mean away before projecting
    """

    def __init__(self, *, remove: float, center: bool, **common):
        super().__init__(**common)
        if not 0 < remove < 1:
            raise UserError(f"detector.remove={remove}: expected between 0 and 1")
        self.remove, self.center = remove, center

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        return self.outlying(penultimate(net, split.x), split.y)

    def outlying(self, z: Tensor, y: Tensor) -> Tensor:
        """z (N, D), y (N,) -> (N,)"""
        scores = z.new_zeros(len(z))
        for _, of in classes(y):
            r = z[of].double()
            centred = r - r.mean(0)
            v = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
            scores[of] = ((centred if self.center else r) @ v).square().float()
        return scores

    def flag(self, scores: Tensor, y: Tensor) -> Tensor:
        flagged = torch.zeros_like(scores, dtype=torch.bool)
        for _, of in classes(y):
            flagged[of[scores[of].topk(round(self.remove * len(of))).indices]] = True
        return flagged
