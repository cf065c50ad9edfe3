"""FT-SAM: fine-tuning towards weights whose whole neighbourhood is good, which shrinks the neurons of a backdoor.

Source: Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023, arXiv 2304.11823.

Each step takes the gradient at w + e, e = ρ w²g/‖|w|g‖ (adaptive SAM, bdx.training), g the gradient at w.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from bdx.defenses.base import Tuning
from bdx.errors import UserError, one_of
from bdx.sharpness import sharpness_aware


class FTSAM(Tuning):
    """rho, adaptive   radius of the neighbourhood; adaptive: in units of each weight
    label_smoothing   share of the label that the other classes divide among them
    stepping    what the schedule counts: epoch, or batch (the released code, whose cosine of 100 then swings)
    """

    trains = "all weights"
    cost = "per clean image and epoch: two training steps"
    takes_scaled = False

    def __init__(self, net: nn.Module, *, rho: float, adaptive: bool, label_smoothing: float, stepping: str, **loop):
        one_of("defense.stepping", stepping, ("epoch", "batch"))
        classes = net.spec["num_classes"]
        if rho <= 0 or not 0 <= label_smoothing < (classes - 1) / classes:
            raise UserError(
                f"defense.rho={rho}, label_smoothing={label_smoothing}: expected rho above 0 and label_smoothing from 0 up "
                f"to, but not, {(classes - 1) / classes:.4g}"
            )
        super().__init__(net, **loop)
        self.rho, self.adaptive, self.stepping = rho, adaptive, stepping
        self.smoothing = label_smoothing * classes / (classes - 1)  # torch shares it among all classes

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch.x), batch.y, label_smoothing=self.smoothing)

    def configure_optimizers(self):
        made = super().configure_optimizers()
        if self.stepping == "batch" and isinstance(made, dict):
            made["lr_scheduler"]["interval"] = "step"
        return made

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=sharpness_aware(self.net, optimizer_closure, self.rho, self.adaptive))
