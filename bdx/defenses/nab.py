"""NAB: a second, harmless backdoor. Suspects get a patch and the label their content suggests; every test image, the patch.

Source: Liu et al., Beating Backdoor Attack at Its Own Game, ICCV 2023, arXiv 2307.15539; sec. 4.

1. SimCLR on all images; 2. as in ABL, fresh weights under a held loss tell suspects by their low loss; 3. a suspect's new
label is the class whose centre, among the images of high loss, is nearest to its features; 4. fresh weights on the set with
new labels, the patch on suspects whose label changed. The returned net puts the patch on whatever it is given.
Here a centre is nearest by the cosine of the features before the classifier (BackdoorBench: by the distance of projections).
No test image is turned away because the patch changes its label, as one of the authors' scripts does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import surgery
from bdx.archs.stamp import Stamp
from bdx.datasets.base import ImageData
from bdx.defenses.base import Staged
from bdx.errors import UserError, one_of
from bdx.isolation import HOLDS, cross_entropy, losses, lowest, shares
from bdx.split import Split, pieces, pixels
from bdx.views import View


def nearest_centre(z: Tensor, y: Tensor, trusted: Tensor, classes: int) -> Tensor:
    """(N,): the class whose centre over trusted images is nearest to each of z (N,D), both at length 1.

    A class without a trusted image is nobody's.
    """
    hot = F.one_hot(y, classes).float() * trusted[:, None]
    z = F.normalize(z.float(), dim=1)
    likeness = z @ F.normalize(hot.T @ z, dim=1).T
    return likeness.masked_fill(hot.sum(0) == 0, -torch.inf).argmax(1)


class NAB(Staged):
    """hold, gamma   as ABL's: flooding or lga, and its level
    isolate         share of the images that are suspects
    trust           share, of highest loss, that the classes' centres are made of
    patch           size and value of the patch in the upper left corner
    view            of the contrastive stage · contrast, tuning, training: epochs, batch, optimizer, schedule of each
    """

    trains = "all weights, from fresh ones"
    cost = "220 epochs on the poisoned set: 100 contrastive ones of twice the images, 20 of tuning, 100 of training"
    needs = frozenset({"train"})
    takes_mixed = False

    def __init__(
        self, net: nn.Module, *, hold: str, gamma: float, isolate: float, trust: float, patch: dict, view: View,
        contrast: dict, tuning: dict, training: dict,
    ):  # fmt: skip
        one_of("defense.hold", hold, HOLDS)
        shares("defense", isolate=isolate, trust=trust)
        side = min(net.spec["shape"][1:])
        if gamma < 0 or not 0 < patch["size"] <= side or not 0 <= patch["value"] <= 1:
            raise UserError(
                f"defense.gamma={gamma}, patch={patch}: expected gamma of 0 or more, a size of 1 to {side}, a value of 0 to 1"
            )
        super().__init__(net, contrast=contrast, tuning=tuning, training=training)
        self.hold, self.gamma, self.isolate, self.trust = HOLDS[hold], gamma, isolate, trust
        self.patch, self.view, self.stamp = patch, view, Stamp(**patch)

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        train = data.train
        self.renew()
        z = self.encode(self.learn_views("contrast", data, self.view, make_trainer, None), train)
        self.renew()
        self.fit("tuning", self.batches("tuning", data, train, False), self.held, make_trainer)
        loss = losses(self.net, train, cross_entropy)
        suspect, trusted = lowest(loss, self.isolate), lowest(-loss, self.trust)
        guess = nearest_centre(z, train.y, trusted, data.num_classes)
        self.tell(train, suspect, guess)
        y = torch.where(suspect, guess, train.y)
        self.renew()
        batches = self.batches("training", data, train, True)
        self.fit("training", batches, lambda batch: self.relabelled(batch, y, y != train.y), make_trainer)
        spec = {"_target_": f"{Stamp.__module__}.Stamp", **self.patch}
        self.net.insert("normalize", self.stamp, spec)
        return self.net

    @torch.no_grad()
    def encode(self, at: str, train: Split) -> Tensor:
        with surgery.mode(self.net, False):
            return torch.cat([surgery.features(self.net, at, pixels(x)) for (x,) in pieces(train.x)])

    def held(self, batch) -> Tensor:
        return self.hold(F.cross_entropy(self.net(batch.x), batch.y), self.gamma)

    def relabelled(self, batch, y: Tensor, stamped: Tensor) -> Tensor:
        """y, stamped (N,): of all training images. The patch comes after the augmentation, where test images have it."""
        x = torch.where(stamped[batch.index].view(-1, 1, 1, 1), self.stamp(batch.x), batch.x)
        return F.cross_entropy(self.net(x), y[batch.index])

    def tell(self, train: Split, suspect: Tensor, guess: Tensor) -> None:
        """Facts for the reader, not for the defense."""
        right = (guess == train.y_true)[suspect]
        self.facts = {
            "isolated": int(suspect.sum()),
            "isolation_precision": float(train.poisoned[suspect].float().mean()),
            "relabel_accuracy": float(right.float().mean()),
        }
