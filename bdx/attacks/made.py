"""Made: attacks whose trigger is optimised, learned or drawn from the training images before anything is poisoned.

No file is shipped or fetched: what the papers' code reads from pictures and checkpoints of its own is made here, once, and
kept in the store, where every attack finds it that differs only in how it uses it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bdx.attacks.base import Attack
from bdx.datasets.base import ImageData
from bdx.errors import UserError
from bdx.split import pixels


class Made(Attack):
    """A method says how it `make`s tensors; they become buffers or sub-modules, so that they travel with the weights.

    Class attributes declare: surrogate (whether a clean net is needed: that of `attack=none` with the same data set, arch,
    train and seed), aimed (whether the target shapes what is made), later (keys of the method that do not).
    """

    trigger_from = "made"
    surrogate = True
    aimed = True
    later: frozenset[str] = frozenset()

    @classmethod
    def shapeless(cls) -> frozenset[str]:
        """Keys that do not shape what is made: how many images are poisoned, which, and with what label."""
        common = frozenset(inspect.signature(Attack.__init__).parameters)
        return (common - ({"target"} if cls.aimed else set())) | cls.later

    @property
    def wanting(self) -> bool:
        """Whether anything has to be made; a user's own file spares it."""
        return True

    def make(self, data: ImageData, net: nn.Module | None, report: Callable) -> tuple[dict[str, Tensor], dict]:
        """(tensors by name, facts about them). data: the clean images; net: the surrogate, frozen, or None;
        report: as for a training, (stage, round, rounds, means, seconds)."""
        raise NotImplementedError(f"{type(self).__name__} must say how its trigger is made")

    def take(self, made: dict[str, Tensor]) -> None:
        """What was made becomes part of the attack."""
        self.load_state_dict(self.state_dict() | made)

    def images_of(self, data: ImageData, count: int) -> Tensor:
        """`count` training images, or all where there are fewer, drawn by the attack's seed; float in [0,1]."""
        g = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(data.train), generator=g)[:count].to(data.train.x.device)
        return pixels(data.train.x[chosen])

    def own_picture(self, file: str | None) -> Tensor:
        """(C,H,W): the user's picture, or zeros that what is made will replace. A black one would be no trigger at all."""
        if file is None:
            return torch.zeros(self.shape)
        picture = self.read(file)
        if not picture.any():
            raise UserError(f"attack.file={file} is black: what it adds would change no pixel; take another picture")
        return picture


class Progress:
    """Says now and then how far a loop has come: at most `lines` times, and at its end; the loss is read only then."""

    def __init__(self, report: Callable, stage: str, rounds: int, lines: int = 20):
        self.report, self.stage, self.rounds = report, stage, rounds
        self.every, self.began = max(1, rounds // lines), time.monotonic()

    def __call__(self, done: int, loss: Tensor | float, last: bool = False) -> None:
        if last or done == self.rounds or done % self.every == 0:
            each = (time.monotonic() - self.began) / done
            self.report(self.stage, done, self.rounds, {"loss": float(loss)}, each)
