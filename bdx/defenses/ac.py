"""Filter and retrain: what a detector flags in the poisoned training set is removed, and a fresh net trained on the rest.

Source: Chen et al., Activation Clustering, 2018, arXiv 1811.03728; sec. 4 (repair), and BackdoorBench's training.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.detectors.base import Detector
from bdx.errors import UserError
from bdx.split import Split


class AC(Tuning):
    """detector   looks at the attacked net's features of the training set; which images are poisoned it is not told.
    The other arguments are of the training from fresh weights."""

    needs = frozenset({"train"})
    trains = "all weights, from fresh ones"
    cost = "one pass over the training set, then a training on what is left of it"

    def __init__(self, net: nn.Module, *, detector: Detector, **loop):
        super().__init__(net, **loop)
        if detector.judge != "train" or not detector.needs <= self.needs:
            raise UserError("defense.detector: expected one that judges the training set and needs no clean images")
        if detector.limit is not None:
            raise UserError(
                f"defense.detector.limit={detector.limit}: all images are judged before a net is trained; set it to null"
            )
        self.detector = detector

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        flagged = self.suspects(data, make_trainer)
        poisoned = data.train.poisoned  # for the reader, not for the defense
        self.facts = {"removed": float(flagged.double().mean())}
        if poisoned.any():
            self.facts["removed_of_poisoned"] = float(flagged[poisoned].double().mean())
        self.renew()
        batches = self.left(data, data.train[~flagged])
        make_trainer(type(self).__name__, self.epochs).fit(self.ready(), batches)
        return self.net

    def suspects(self, data: ImageData, make_trainer: Callable) -> Tensor:
        """(N,) bool, of the training images."""
        train = data.train.blind()
        return self.detector.flag(self.detector.score(self.net, train, data, make_trainer), train.y)

    def left(self, data: ImageData, kept: Split):
        return data.batches(kept, size=self.batch, shuffle=True, augment=self.augment, drop_last=True, stage=1)
