"""SCAn: a feature is its class's identity plus variation that all classes share; a poisoned class has two identities.

Source: Tang et al., Demon in the Variant, USENIX Security 2021, arXiv 1908.00686; sec. 5.

    r = μ_y + ε,  μ_y ~ N(0, S_μ), ε ~ N(0, S_ε): both covariances by EM on clean images
    each class is split in two groups (of one S_ε, the split that is likeliest);
    J = Σ_r [(r − μ)ᵀS_ε⁻¹(r − μ) − (r − μ_g)ᵀS_ε⁻¹(r − μ_g)],  g: r's group, μ: mean of the class
        (per_image: divided by the class's size, as in the released code, without which a large class stands out by its size)
    anomaly of a class: |J − median| / (1.4826 · median |J − median|), over classes

    score = ½[(r − μ_in)ᵀS_ε⁻¹(r − μ_in) − (r − μ_out)ᵀS_ε⁻¹(r − μ_out)], the log-likelihood ratio of the groups: out is
the one whose mean is farther from the class's clean mean. The paper looks at classes; the score within them is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdx.detectors.base import Detector, classes, penultimate
from bdx.errors import UserError


class Scan(Detector):
    """anomaly   a class above it is poisoned, its group `out` flagged
    per_image    J as a mean over the class's images
    ridge        added to S_ε's diagonal, as a share of its mean: few clean images leave it singular
    """

    needs = frozenset({"clean"})

    def __init__(self, *, anomaly: float, per_image: bool, ridge: float, **common):
        super().__init__(**common)
        if anomaly <= 0 or ridge <= 0:
            raise UserError(f"detector.anomaly={anomaly}, ridge={ridge}: expected above 0")
        self.anomaly, self.per_image, self.ridge = anomaly, per_image, ridge
        self.statistic: dict[int, float] = {}

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        clean = penultimate(net, data.clean.x).double(), data.clean.y
        return self.untangle(penultimate(net, split.x).double(), split.y, *clean)

    def untangle(self, z: Tensor, y: Tensor, clean: Tensor, clean_y: Tensor) -> Tensor:
        """z (N, D), y (N,), clean (M, D), clean_y (M,) -> (N,); leaves J of each class. All double."""
        middle = clean.mean(0)
        means, inner = decompose(clean - middle, clean_y)
        inner = inner + self.ridge * inner.trace() / len(inner) * torch.eye(len(inner)).to(inner)
        white = torch.linalg.inv(torch.linalg.cholesky(inner)).T  # (r @ white) has covariance 1 where r has S_ε
        z, scores, self.statistic = (z - middle) @ white, z.new_zeros(len(z)), {}
        for c, of in classes(y):
            r = z[of]
            first = two_groups(r)
            if first is None:
                continue
            a, b = r[first].mean(0), r[~first].mean(0)
            near_a, near_b = (r - a).square().sum(1), (r - b).square().sum(1)
            gain = (r - r.mean(0)).square().sum() - torch.where(first, near_a, near_b).sum()
            self.statistic[c] = float(gain) / (len(r) if self.per_image else 1)
            home = means[c] @ white if c in means else r.mean(0)
            a_is_out = (a - home).norm() > (b - home).norm()
            scores[of] = (near_b - near_a if a_is_out else near_a - near_b) / 2
        return scores.float()

    def anomalies(self) -> dict[int, float]:
        """Class -> how far its J lies from the median of all, in robust deviations."""
        j = torch.tensor(list(self.statistic.values()), dtype=torch.double)
        away = (j - median(j)).abs()
        return dict(zip(self.statistic, (away / (1.4826 * median(away)).clamp_min(1e-12)).tolist(), strict=True))

    def flag(self, scores: Tensor, y: Tensor) -> Tensor:
        poisoned = [c for c, a in self.anomalies().items() if a > self.anomaly]
        return (scores > 0) & torch.isin(y, torch.tensor(poisoned, device=y.device, dtype=y.dtype))


def median(x: Tensor) -> Tensor:
    """The mean of the middle two where there are two; torch.median takes the lower."""
    return x.quantile(0.5)


def decompose(z: Tensor, y: Tensor, rounds: int = 100, near: float = 1e-5) -> tuple[dict[int, Tensor], Tensor]:
    """({class: μ_y}, S_ε) by EM. z (M, D), centred."""
    groups = {c: z[of] for c, of in classes(y)}
    means = {c: r.mean(0) for c, r in groups.items()}
    outer = torch.stack(list(means.values()))
    inner = torch.cat([r - means[c] for c, r in groups.items()])
    between, within = outer.T @ outer / len(outer), inner.T @ inner / len(inner)
    for _ in range(rounds):
        for c, r in groups.items():  # the mean of μ_y given the images of its class
            means[c] = between @ torch.linalg.pinv(between + within / len(r), hermitian=True) @ r.mean(0)
        outer = torch.stack(list(means.values()))
        inner = torch.cat([r - means[c] for c, r in groups.items()])
        new = outer.T @ outer / len(outer), inner.T @ inner / len(inner)
        moved = (new[0] - between).norm() + (new[1] - within).norm()
        done = moved < near * (between.norm() + within.norm())
        between, within = new
        if done:
            break
    return means, within


def two_groups(r: Tensor, rounds: int = 100) -> Tensor | None:
    """(n,) bool: the first of two groups of one covariance 1, started along the direction of largest variance."""
    if len(r) < 4:
        return None
    values = r - r.mean(0)
    first = values @ torch.linalg.eigh(values.T @ values).eigenvectors[:, -1] > 0
    for _ in range(rounds):
        if not first.any() or first.all():
            return None
        a, b = r[first].mean(0), r[~first].mean(0)
        new = (r - a).square().sum(1) < (r - b).square().sum(1)
        if torch.equal(new, first):
            break
        first = new
    return first if first.any() and not first.all() else None
