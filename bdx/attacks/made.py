"""Made: attacks whose trigger is optimised, learned or drawn from the training images before anything is poisoned.

No file is shipped or fetched: what the papers' code reads from pictures and checkpoints of its own is made here, once, and
kept in the store, where every attack finds it that differs only in how it uses it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bdx.attacks.base import Attack
from bdx.datasets.base import ImageData
from bdx.errors import UserError
from bdx.split import pixels


class Made(Attack):
    """A method says how it `make`s tensors; they become buffers or sub-modules, so that they travel with the weights.
    made: a .safetensors of the user's that holds them already, such as weights.safetensors of an asset in a store.

    Class attributes declare: makes (the names of these tensors, or of modules that they belong to), surrogate (whether a
    clean net is needed: that of `attack=none` with the same data set, arch, train and seed), aimed (whether the target shapes
    what is made), later (keys of the method that do not).
    """

    trigger_from = "made"
    makes: tuple[str, ...] = ()
    surrogate = True
    aimed = True
    later: frozenset[str] = frozenset()

    def __init__(self, net: nn.Module, *, made: str | None, **common):
        super().__init__(net, **common)
        self.made = made

    @classmethod
    def shapeless(cls) -> frozenset[str]:
        """Keys that do not shape what is made: how many images are poisoned, which, and with what label."""
        common = frozenset(inspect.signature(Attack.__init__).parameters)
        return (common - ({"target"} if cls.aimed else set())) | cls.later

    @property
    def wanting(self) -> bool:
        """Whether anything has to be made; a user's own file spares it."""
        return self.made is None

    def make(self, data: ImageData, net: nn.Module | None, report: Callable) -> tuple[dict[str, Tensor], dict]:
        """(tensors by name, facts about them). data: the clean images; net: the surrogate, frozen, or None;
        report: as for a training, (stage, round, rounds, means, seconds)."""
        raise NotImplementedError(f"{type(self).__name__} must say how its trigger is made")

    def take(self, made: dict[str, Tensor]) -> None:
        """What was made becomes part of the attack."""
        self.load_state_dict(self.state_dict() | made)

    def brought(self, data: ImageData) -> dict[str, Tensor]:
        """What the user's file holds, in place of what `make` returns. Raises UserError where it does not fit: a tensor that
        is empty before it is made may be of any length."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        own = {k: v for k, v in own.items() if k.partition(".")[0] in self.makes}
        try:
            found = load_file(self.made)
        except (OSError, SafetensorError) as e:
            raise UserError(f"attack.made={self.made} is no .safetensors: {' '.join(str(e).split())}") from None
        if set(found) != set(own):
            odd = min(set(found) ^ set(own))
            raise UserError(
                f"attack.made={self.made} has {'no' if odd in own else 'a'} tensor {odd}: {type(self).__name__} is made of "
                f"{', '.join(self.makes)}, {len(own)} tensor{'s' * (len(own) > 1)}"
            )
        for name, given in found.items():
            at = 0 if own[name].numel() else 1
            if given.dtype != own[name].dtype or given.shape[at:] != own[name].shape[at:]:
                wanted = "×".join(["any", *map(str, own[name].shape[1:])] if at else map(str, own[name].shape))
                raise UserError(
                    f"attack.made={self.made}: {name} is {'×'.join(map(str, given.shape))} of {given.dtype}, expected "
                    f"{wanted} of {own[name].dtype}, with the settings that it was made by"
                )
        return found

    def images_of(self, data: ImageData, count: int) -> Tensor:
        """`count` training images, or all where there are fewer, drawn by the attack's seed; float in [0,1]."""
        g = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(data.train), generator=g)[:count].to(data.train.x.device)
        return pixels(data.train.x[chosen])

    def own_picture(self, file: str | None) -> Tensor:
        """(C,H,W): the user's picture, or zeros that what is made will replace. A black one would be no trigger at all."""
        if file is None:
            return torch.zeros(self.shape)
        if self.made:
            raise UserError(f"attack.file={file}, made={self.made}: either is the trigger; set one of them to null")
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
