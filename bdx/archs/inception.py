"""Inception-v3, torchvision's, behind a resize: it takes no image below 75×75.

Source: Szegedy et al. 2016, arXiv 1512.00567; NPD Table 15 repairs one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchvision.models import Inception3

from bdx.errors import UserError


class ResizingInception(Inception3):
    """Images that are smaller than image_size are resized to it by bilinear interpolation; the rest is torchvision's."""

    def __init__(self, image_size: int, **about):
        super().__init__(aux_logits=False, init_weights=False, **about)  # torch's own initialisation, as all other nets
        self.image_size = image_size

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.image_size:
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return super().forward(x)


def inception_v3(*, num_classes: int, image_size: int, dropout: float) -> ResizingInception:
    if image_size < 75:
        raise UserError(f"arch.image_size={image_size}: expected 75 or more")
    return ResizingInception(image_size, num_classes=num_classes, dropout=dropout)
