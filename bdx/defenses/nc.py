"""NC: for every class the smallest trigger that turns all images into it; the classes whose trigger is far too small are
backdoored, and the net unlearns those triggers.

Source: Wang et al., Neural Cleanse, IEEE S&P 2019; sec. VI, released code.

The triggers and what makes one too small are the detector's, bdx/detectors/nc.py; here they are unlearned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.detectors.nc import anomalies, check_search, few, smallest
from bdx.errors import UserError
from bdx.split import Split, pixels


class NC(Tuning):
    """search   epochs, batch, success (share of images), cost, patience, stop_after, optimizer; at_once: classes in one
                problem, null for one on a CPU and as many on a GPU as keep a pass within AT_ONCE images (16 in batches
                of 256): memory against speed, the same triggers
    anomaly     index above which a class counts as backdoored
    share       of the reserved images that carry a trigger, once for each such class, under their true labels
    """

    trains = "a trigger for each class, then all weights"
    cost = "per clean image, class and each of at most 80 epochs: one pass with gradients through frozen weights; then a tuning"

    def __init__(self, net: nn.Module, *, search: dict, anomaly: float, share: float, **loop):
        check_search("defense.search", search)
        if not 0 < share < 1 or anomaly < 0:
            raise UserError(f"defense.share={share}, anomaly={anomaly}: expected a share between 0 and 1, anomaly not below 0")
        super().__init__(net, **loop)
        self.search, self.anomaly, self.share = search, anomaly, share

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        masks, patterns = smallest(self.net, self.trusted(data), data, self.search, self.augment, make_trainer)
        index = anomalies(masks.flatten(1).sum(1))
        found = (index > self.anomaly).nonzero()[:, 0]
        self.facts = {"anomaly_index": float(index.max()), "flagged_classes": " ".join(map(str, found.tolist()))}
        self.pictures = {"triggers": torch.stack([patterns, masks.expand_as(patterns), masks * patterns])}
        self.net.requires_grad_(True)
        self.notes += few(data.num_classes)
        if not len(found):
            self.notes.append(f"NC flags no class (anomaly index at most {float(index.max()):.2f}): the net stays as it is")
            return self.net
        lesson = with_triggers(data.clean, masks[found], patterns[found], self.share, data.seed)
        batches = data.batches(lesson, size=self.batch, shuffle=True, augment=self.augment, stage=1)
        make_trainer("NC", self.epochs).fit(self.ready(), batches)
        return self.net


def with_triggers(clean: Split, masks: Tensor, patterns: Tensor, share: float, seed: int) -> Split:
    """The images but for a random share of them, and that share under each of the triggers (F,1,H,W), (F,C,H,W)."""
    order = torch.randperm(len(clean), generator=Generator().manual_seed(seed)).to(clean.x.device)
    some, rest = order.tensor_split([max(1, int(share * len(clean)))])
    x = pixels(clean.x[some])
    stamped = [((1 - m) * x + m * p).mul(255).round().to(torch.uint8) for m, p in zip(masks, patterns, strict=True)]
    mixed = clean[torch.cat([rest, *[some] * len(stamped)])]
    return replace(mixed, x=torch.cat([clean.x[rest], *stamped]))
