"""Activation Clustering: a poisoned class's penultimate activations fall into two clusters, one of them the poison.

Source: Chen et al., Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering, 2018, arXiv 1811.03728.

Per class: activations → `components` dimensions → 2-means. The smaller cluster S is under suspicion:
    score = s · (d(z, L) − d(z, S)) / ‖S − L‖,   d: distance to a cluster's centre, s: silhouette of the class
The paper gives clusters, not scores; the sign says which of the two (theirs), the size is ours, so that classes compare.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from bdx.detectors.base import Detector, classes, penultimate, principal
from bdx.errors import one_of
from bdx.training import at_least_one


class ActivationClustering(Detector):
    """components   dimensions that are left
    reduce          ica (paper) or pca
    rule            when S is flagged: silhouette (the class's is at least `silhouette`), size (S is at most `size` of the
                    class), both, or smaller (always, in every class)
    """

    def __init__(self, *, components: int, reduce: str, rule: str, silhouette: float, size: float, **common):
        super().__init__(**common)
        at_least_one("detector", components=components)
        one_of("detector.reduce", reduce, ("ica", "pca"))
        one_of("detector.rule", rule, ("silhouette", "size", "both", "smaller"))
        self.components, self.reduce, self.rule = components, reduce, rule
        self.silhouette, self.size = silhouette, size
        self.suspected: set[int] = set()

    def score(self, net: nn.Module, split, data, make_trainer) -> Tensor:
        return self.cluster(penultimate(net, split.x), split.y, data.seed)

    def cluster(self, z: Tensor, y: Tensor, seed: int) -> Tensor:
        """z (N, D), y (N,) -> (N,); leaves the classes that the rule suspects."""
        scores, self.suspected = z.new_zeros(len(z)), set()
        for c, of in classes(y):
            low = self.reduced(z[of], seed)
            if low is None:
                continue
            small, margin, silhouette = halves(low, seed)
            scores[of] = (max(silhouette, 0.0) + 1e-6) * margin.float().to(z.device)
            verdict = {"silhouette": silhouette >= self.silhouette, "size": small <= self.size, "smaller": True}
            verdict["both"] = verdict["silhouette"] and verdict["size"]
            if verdict[self.rule]:
                self.suspected.add(c)
        return scores

    def reduced(self, z: Tensor, seed: int) -> Tensor | None:
        """(n, D) -> (n, k) on the CPU, each dimension of variance 1 with ica; None where the class has no two clusters."""
        low = principal(z, self.components).cpu() if len(z) >= 4 else z[:0]
        if low.numel() == 0:
            return None
        if self.reduce == "ica":
            from sklearn.decomposition import FastICA

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where it has not converged, the rotation is only less sharp
                low = torch.from_numpy(FastICA(whiten="unit-variance", random_state=seed).fit_transform(low.numpy()))
        return low

    def flag(self, scores: Tensor, y: Tensor) -> Tensor:
        suspected = torch.tensor(sorted(self.suspected), device=y.device, dtype=y.dtype)
        return (scores > 0) & torch.isin(y, suspected)


def halves(low: Tensor, seed: int, most: int = 2000) -> tuple[float, Tensor, float]:
    """(share of the smaller cluster, (n,) margin in its favour, silhouette of `most` of the points) of 2-means."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    found = KMeans(2, n_init=10, random_state=seed).fit(low.numpy())
    centres, labels = torch.from_numpy(found.cluster_centers_).to(low.dtype), torch.from_numpy(found.labels_)
    sizes = labels.bincount(minlength=2)
    small = int(sizes.argmin())
    apart = torch.cdist(low, centres)
    margin = (apart[:, 1 - small] - apart[:, small]) / (centres[0] - centres[1]).norm().clamp_min(1e-12)
    if int(sizes.min()) == 0 or len(low) < 3:
        return 0.0, margin, 0.0
    size = most if len(low) > most else None
    try:
        silhouette = float(silhouette_score(low.numpy(), found.labels_, sample_size=size, random_state=seed))
    except ValueError:  # the sample holds one cluster alone
        silhouette = 0.0
    return float(sizes.min()) / len(low), margin, silhouette
