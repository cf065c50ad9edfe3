"""Spectral Signatures: the training images that stand out in their class are removed, and a fresh net trained on the rest.

Source: Tran et al., Spectral Signatures in Backdoor Attacks, NeurIPS 2018, arXiv 1811.00636; Algorithm 1.
"""

from __future__ import annotations

from bdx.defenses.ac import AC


class Spectral(AC):
    needs = frozenset({"train"})
    trains = "all weights, from fresh ones"
    cost = "one pass over the training set, then a training on what is left of it"
