"""FT: all weights are tuned further on the reserved clean images, BatchNorm in train mode.

Source: the fine-tuning baseline of D3 (Wei et al. 2024, arXiv 2411.09585, sec. 4.1), BackdoorBench's setting.
"""

from __future__ import annotations

from bdx.defenses.base import Tuning


class FT(Tuning):
    trains = "all weights"
    cost = "per clean image and epoch: one training step"
