"""BppAttack with control of training: beside quantised images stand negatives, which carry another image's rounding.

Source: Wang et al. 2022, BppAttack, CVPR, arXiv 2205.13383; q = 8 levels, without dithering (released code, BackdoorBench;
the paper dithers). Negatives: x + (x'_j − x_j), of another image j of the same batch, with the right label: the
net must heed the quantisation, and not the noise that it leaves. Dithering leaves noise that looks much like it: after 1,500
steps a small CNN told images of CIFAR-10 from their negatives for 96 % without dithering, for 64 % with it. The originals'
constant learning rate is train.schedule=null; their other augmentation is dataset.augment.rotate=10.0.
"""

from __future__ import annotations

from torch import Generator, Tensor

from bdx.attacks.bpp import Bpp
from bdx.attacks.controlled import Controlled


class BppControlled(Controlled, Bpp):
    leaves_poison = False

    def cross(self, x: Tensor, rows: Tensor, g: Generator) -> Tensor:
        other = x[(rows + 1) % len(x)]  # batches are shuffled, the next image is any other
        return (x[rows].short() + self.stamp(other).short() - other.short()).clamp(0, 255).to(x.dtype)
