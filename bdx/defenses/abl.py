"""ABL: what a net learns too fast is isolated while the loss is held up, then it is unlearned.

Source: Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571; sec. 3, eqs. 2 and 3.

From fresh weights on the poisoned set: 1. the batch's mean loss is held at γ, which a backdoor's images fall below all
the same; 2. the images of lowest loss are isolated; 3. training goes on with the others; 4. the isolated ones are
unlearned by gradient ascent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as changed

import torch.nn.functional as F
from torch import Tensor, nn

from bdx.datasets.base import ImageData
from bdx.defenses.base import Staged
from bdx.errors import UserError, one_of
from bdx.isolation import HOLDS, cross_entropy, losses, lowest, shares
from bdx.split import Split


class ABL(Staged):
    """hold     flooding, |L − γ| + γ, or lga, sign(L − γ) L
    gamma      the level γ
    isolate    share of the images that is isolated
    tuning, finetune, unlearn  epochs, batch, optimizer, schedule, augment of each loop; finetune: cutout, side in
               pixels; unlearn: drop_last, false keeps a last batch that is not full: half of 1 % of CIFAR-10 would go
    """

    trains = "all weights, from fresh ones"
    cost = "80 epochs on the poisoned set (20 of tuning, 60 of finetune), 20 on its isolated share; abl_code: 10, 60 and 4"
    needs = frozenset({"train"})

    def __init__(self, net: nn.Module, *, hold: str, gamma: float, isolate: float, tuning: dict, finetune: dict, unlearn: dict):
        one_of("defense.hold", hold, HOLDS)
        shares("defense", isolate=isolate)
        if gamma < 0:
            raise UserError(f"defense.gamma={gamma}: expected 0 or more")
        super().__init__(net, tuning=tuning, finetune=finetune, unlearn=unlearn)
        self.hold, self.gamma, self.isolate = HOLDS[hold], gamma, isolate

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        self.renew()
        self.loop("tuning", data, data.train, self.held, make_trainer)
        low = self.lowest(data.train)
        self.loop("finetune", data, data.train[~low], self.learn, make_trainer)
        self.loop("unlearn", data, data.train[low], lambda batch: -self.learn(batch), make_trainer)
        return self.net

    def loop(self, name: str, data: ImageData, split: Split, loss: Callable, make_trainer: Callable) -> None:
        how = self.stages[name]
        augment = changed(data.augment, cutout=how["cutout"]) if "cutout" in how else data.augment
        self.fit(name, self.batches(name, data, split, augment if how["augment"] else False), loss, make_trainer)

    def learn(self, batch) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)

    def held(self, batch) -> Tensor:
        return self.hold(self.learn(batch), self.gamma)

    def lowest(self, train: Split) -> Tensor:
        """(N,) bool: who is isolated. How many of them are poisoned is a fact for the reader, not for the defense."""
        low = lowest(losses(self.net, train, cross_entropy), self.isolate)
        self.facts = {"isolated": int(low.sum()), "isolation_precision": float(train.poisoned[low].float().mean())}
        return low
