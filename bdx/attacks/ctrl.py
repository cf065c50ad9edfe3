"""CTRL: FTrojan's trigger in the YUV colours, on images of the target class whose labels stay right.

Source: Li et al. 2023, An embarrassingly simple backdoor attack on self-supervised learning (CTRL), arXiv 2210.07346, in
BackdoorBench's supervised setting; x' = x + M D⁻¹(100 at (15,15) and (31,31)), for formula and keys see ftrojan. The window of
the cosine transform is the whole image, not 32×32 as FTrojan's; a smaller image, which has no coefficient 31, gets the upper
left part of the pattern of 32×32. The released code wraps around 0 and 255, so that a black image turns bright in 44 % of
its values (follow=code); here pixels are clipped.
"""

from __future__ import annotations

from bdx.attacks.ftrojan import FTrojan


class CTRL(FTrojan):
    clean_label = True

    def window(self) -> tuple[int, int]:
        return self.shape[1:] if min(self.shape[1:]) >= 32 else super().window()
