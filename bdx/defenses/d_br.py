"""D-BR: the attacked net unlearns the images whose features bear no turning, and relearns those that do.

Source: Chen et al., Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples, NeurIPS 2022; sec. 4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from bdx.datasets.base import Batch, Batches, ImageData
from bdx.defenses.d_st import Separation


class InTurn:
    """(sign, batch): in each pass all batches of the one set at −1, then all of the other at +1."""

    def __init__(self, down: Batches, up: Batches):
        self.down, self.up, self.epoch = down, up, 0

    def __len__(self) -> int:
        return len(self.down) + len(self.up)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for sign, batches in ((-1, self.down), (1, self.up)):
            batches.epoch = self.epoch
            for batch in batches:
                yield sign, batch
        self.epoch += 1


class DBR(Separation):
    """clean, poison, first, intra as for Separation · repair: epochs, batch, optimizer, schedule of unlearning in turn
    with relearning."""

    trains = "all weights of the attacked net"
    cost = "12 epochs on the poisoned set (2 of first, 10 of intra), then 20 on a quarter of it"
    needs = frozenset({"train"})

    def __init__(self, net: nn.Module, *, clean: float, poison: float, first: dict, intra: dict, repair: dict):
        super().__init__(net, clean=clean, poison=poison, first=first, intra=intra, repair=repair)

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        attacked = copy.deepcopy(self.net.state_dict())
        clean, poison = self.separate(data, make_trainer)
        self.net.load_state_dict(attacked)
        parts = (self.batches("repair", data, data.train[s], True) for s in (poison, clean))
        self.fit("repair", InTurn(*parts), self.turn, make_trainer)
        return self.net

    def turn(self, pair: tuple[int, Batch]) -> Tensor:
        sign, batch = pair
        return sign * F.cross_entropy(self.net(batch.x), batch.y)
