"""none: clean training, the reference for ACC; ASR and RA have no meaning.

Source: the "clean" rows of the papers (Trap-and-Replace Table 10).
"""

from __future__ import annotations

from torch import Tensor

from bdx.attacks.base import Attack


class NoAttack(Attack):
    leaves_poison = False
    has_trigger = False

    def trigger(self, x: Tensor) -> Tensor:
        return x
