"""SPECTRE: spectral signatures after whitening by a robust covariance, which lets a weak poison stand out.

Source: Hayase et al., SPECTRE, ICML 2021, arXiv 2104.11315; Algorithms 1 to 3 and the authors' code.

Per class: k principal directions of the features → Σ̂ of the images that a filter for outlying second moments leaves
(Diakonikolas et al. 2017) → x̃ = Σ̂^(−1/2) x →
    score (QUE) = x̃ᵀQx̃ / tr Q,   Q = exp(α (Σ̃ − 1) / (‖Σ̃‖₂ − 1)),   Σ̃: covariance of all x̃
k is the one that leaves the largest mean QUE score once its suspects are removed, and the class in which that is largest
is the target. Flagged are the 1.5 ε n images of the target class with the highest scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bdx.detectors.base import Detector, classes, penultimate, principal
from bdx.errors import UserError


class Spectre(Detector):
    """epsilon   upper bound on the share of poisoned images in the target class
    alpha        of QUE
    tau          the filter's probability of failure
    most         largest k; tried are eight values from 1 to it, evenly spaced in √k
    """

    def __init__(self, *, epsilon: float, alpha: float, tau: float, most: int, **common):
        super().__init__(**common)
        if not 0 < epsilon < 0.5 or not 0 < tau < 1 or alpha <= 0 or most < 1:
            raise UserError(
                f"detector.epsilon={epsilon}, tau={tau}, alpha={alpha}, most={most}: expected epsilon between 0 and 0.5, "
                "tau between 0 and 1, alpha above 0 and most of at least 1"
            )
        self.epsilon, self.alpha, self.tau, self.most = epsilon, alpha, tau, most
        self.target: int | None = None

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        return self.filter(penultimate(net, split.x), split.y)

    def filter(self, z: Tensor, y: Tensor) -> Tensor:
        """z (N, D), y (N,) -> (N,); leaves the target class."""
        scores, strength = z.new_zeros(len(z)), {}
        for c, of in classes(y):
            x = principal(z[of], min(self.most, len(of) // 4))
            if x.numel():
                strength[c], best = self.best(x)
                scores[of] = best.float()
        self.target = max(strength, key=strength.get, default=None)
        return scores

    def flag(self, scores: Tensor, y: Tensor) -> Tensor:
        of = (y == self.target).nonzero().flatten() if self.target is not None else y[:0]
        top = scores[of].topk(round(1.5 * self.epsilon * len(of))).indices
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, of[top], True)

    def best(self, x: Tensor) -> tuple[float, Tensor]:
        """(mean QUE score, (n,) scores) at the k that makes the first largest. x (n, K), centred."""
        root = torch.linspace(1, math.sqrt(x.shape[1]), 8)
        found = []
        for k in sorted(set(root.square().round().int().tolist())):
            scores = self.que(x[:, :k])
            kept = scores <= scores.topk(max(1, round(1.5 * self.epsilon * len(x)))).values[-1]
            kept &= scores < scores.max()  # where all are alike
            kept = kept if int(kept.sum()) > x.shape[1] else torch.ones_like(kept)
            covariance, q = self.weights(whiten(x, kept))
            found.append((float((covariance * q).sum() / q.trace()), scores))
        return max(found, key=lambda f: f[0])

    def que(self, x: Tensor) -> Tensor:
        """(n, k) -> (n,)"""
        white = whiten(x, self.trusted(x)) if x.shape[1] > 1 else x
        q = self.weights(white)[1]
        return ((white @ q) * white).sum(1) / q.trace()

    def weights(self, white: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ̃, Q)"""
        covariance, one = white.T.cov().reshape(white.shape[1], -1), torch.eye(white.shape[1]).to(white)
        top = torch.linalg.eigvalsh(covariance)[-1]
        excess = (covariance - one) / (top - 1) if float(top) > 1 + 1e-6 else torch.zeros_like(one)
        return covariance, torch.linalg.matrix_exp(self.alpha * excess)

    def trusted(self, x: Tensor) -> Tensor:
        """(n,) bool: what the filter leaves, at least a share 1 − 2ε."""
        index, left = torch.arange(len(x), device=x.device), round(2 * self.epsilon * len(x))
        while left > 0 and len(index) > 2 * x.shape[1]:
            keep = self.unsuspicious(x[index], left)
            if keep is None or bool(keep.all()):
                break
            left -= int((~keep).sum())
            index = index[keep]
        return torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, index, True)

    def unsuspicious(self, x: Tensor, left: int) -> Tensor | None:
        """One round of the filter: (n,) bool, at most `left` of them False; None where nothing is out of the ordinary."""
        n, k = x.shape
        e, root = self.epsilon, torch.linalg.eigh(x.T @ x / n + 1e-8 * torch.eye(k).to(x))
        y = x @ root.eigenvectors * root.eigenvalues.rsqrt()
        length = y.square().sum(1)
        if bool((far := length >= 10 * k * math.log(n / self.tau)).any()):
            return ~(far & largest(length, left))
        value, v = fourth_moment(y)
        if value <= 1 + 10 * e * math.log(1 / e) ** 2:
            return None
        along = (((y @ v) * y).sum(1) - v.trace()) / math.sqrt(2)
        away = (along - along.quantile(0.5)).abs()
        t = away.sort().values - 3
        share = torch.arange(1, n + 1).to(t) / n  # so in the released code: the farthest are taken where none is very far
        tail = torch.where(t > 10 * math.log(1 / e), 3 * e / (t * t.clamp_min(2).log()).square(), torch.ones_like(t))
        beyond = ((t > 0) & (share >= tail)).nonzero()
        return ~((away > t[beyond[0]]) & largest(away, left)) if len(beyond) else None


def whiten(x: Tensor, trusted: Tensor) -> Tensor:
    """x (n, k) in coordinates in which the trusted images have covariance 1."""
    values, vectors = torch.linalg.eigh(x[trusted].T.cov(correction=0).reshape(x.shape[1], -1))
    return x @ vectors * values.clamp_min(1e-12 * float(values[-1])).rsqrt() @ vectors.T


def largest(values: Tensor, k: int) -> Tensor:
    """(n,) bool, True for the k largest."""
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, values.topk(min(k, len(values))).indices, True)


def fourth_moment(y: Tensor, steps: int = 50) -> tuple[float, Tensor]:
    """Largest eigenvalue and its eigenvector, as a symmetric (k, k), of V -> mean (yᵀVy) yyᵀ − tr(V) 1. y (n, k)."""
    one = torch.eye(y.shape[1]).to(y)
    v = torch.full_like(one, 1 / len(one))
    for _ in range(steps):
        new = y.T @ (y * ((y @ v) * y).sum(1, keepdim=True)) / len(y) - v.trace() * one
        value, v = float((new * v).sum()), new / new.norm().clamp_min(1e-12)
    return value, v
