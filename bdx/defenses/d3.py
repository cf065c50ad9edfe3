"""D3: fine-tuning that carries the classifier's weights as far from where they were as clean accuracy allows.

Source: Wei et al., Distance-Driven Detoxification, ICCV 2025, arXiv 2411.09585; sec. 3, Tables 1, 6, 7.

    min over θ  −α d(W, W₀) + λ max(0, CE(θ) − ε),   ‖W‖ = ‖W₀‖ for each selected layer W, all other weights free

On that sphere ‖W − W₀‖² = 2‖W₀‖² − 2⟨W, W₀⟩: the furthest point is also where FST (Min et al., Feature Shift Tuning,
NeurIPS 2023, arXiv 2310.01875) minimises CE + α⟨W, W₀⟩, so `fst` is this class with distance=inner.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.defenses.base import Tuning
from bdx.errors import UserError, one_of

WARM_STARTS = ("random", "reset", "far", "middle", "noise", "near")


class D3(Tuning):
    """layer      whose weights are selected: a module's name (every Linear and Conv2d inside it), or classifier
    distance      norm (the p-norm of W − W₀) or inner (−⟨W, W₀⟩, FST); summed over the selected layers
    hinge         sample (each image's loss, released code) or batch (the mean loss, the paper's formula)
    normalise     divide the loss by λ + 1 where λ > 1 (released code)
    warm_start    random (uniform, at the old norm), reset (the layer's own fresh weights and bias), far (−W₀),
                  middle (0), noise (W₀ + noise·N(0,1)) or near (W₀, where the distance has no gradient)
    bn_mode       train or frozen
    """

    trains = "all weights, the selected layers at their old norm"
    cost = "per clean image and epoch: one training step"

    def __init__(
        self, net: nn.Module, *, layer: str, distance: str, p: float, alpha: float, lambda_clean: float, epsilon: float,
        hinge: str, normalise: bool, warm_start: str, noise: float, bn_mode: str, **loop,
    ):  # fmt: skip
        one_of("defense.distance", distance, ("norm", "inner"))
        one_of("defense.hinge", hinge, ("sample", "batch"))
        one_of("defense.warm_start", warm_start, WARM_STARTS)
        one_of("defense.bn_mode", bn_mode, ("train", "frozen"))
        if p < 1 or min(alpha, lambda_clean, epsilon, noise) < 0:
            raise UserError(
                f"defense.p={p}, alpha={alpha}, lambda_clean={lambda_clean}, epsilon={epsilon}, noise={noise}: "
                "expected p of at least 1 and the others not below 0"
            )
        super().__init__(net, **loop)
        self.distance, self.p, self.alpha, self.lambda_clean, self.epsilon = distance, p, alpha, lambda_clean, epsilon
        self.hinge, self.normalise, self.warm_start, self.noise = hinge, normalise, warm_start, noise
        self.bn_mode = bn_mode
        self.selected = places.linears(net, layer)

    def ready(self) -> D3:
        """In train mode, with the old weights remembered and the selected layers where the warm start puts them."""
        self.old = [m.weight.detach().clone() for m in self.selected]
        for module, old in zip(self.selected, self.old, strict=True):
            self.start(module, old)
        self.train()
        if self.bn_mode == "frozen":
            surgery.still_batchnorm(self.net)
        return self

    @torch.no_grad()
    def start(self, module: nn.Module, old: Tensor) -> None:
        if self.warm_start == "reset":
            module.reset_parameters()
        elif self.warm_start == "random":
            fresh = torch.rand_like(old) - 0.5
            module.weight.copy_(fresh * old.norm() / fresh.norm())
        elif self.warm_start == "noise":
            module.weight.add_(self.noise * torch.randn_like(old))
        else:
            module.weight.mul_({"far": -1, "middle": 0, "near": 1}[self.warm_start])

    def training_step(self, batch, _):
        ce = F.cross_entropy(self.net(batch.x), batch.y, reduction="none")
        ce = ce if self.hinge == "sample" else ce.mean()
        clean, far = (ce - self.epsilon).clamp_min(0).mean(), sum(map(self.far, self.selected, self.old))
        loss = self.lambda_clean * clean - self.alpha * far
        if self.normalise and self.lambda_clean > 1:
            loss = loss / (self.lambda_clean + 1)
        return {"loss": loss, "clean": clean, "distance": far}

    def far(self, module: nn.Module, old: Tensor) -> Tensor:
        if self.distance == "inner":
            return -(module.weight * old).sum()
        return torch.linalg.vector_norm(module.weight - old, self.p)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        """Back onto the sphere after every step, never before one: with `middle` the weights start at 0."""
        for module, old in zip(self.selected, self.old, strict=True):
            module.weight.mul_(old.norm() / module.weight.norm())
