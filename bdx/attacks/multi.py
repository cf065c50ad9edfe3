"""Multi: several triggers at once, each with its own class, share and images.

Source: none of the papers' tables; ours, for defenses that look for one trigger or one class. Each part is an attack of
conf/attack and poisons images that no other part has poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from bdx.attacks.base import Attack
from bdx.errors import UserError
from bdx.split import Split


class Multi(Attack):
    """parts: attacks without a net. A batch of which nothing is known gets the triggers in turn: image i that of part i
    modulo their number. ASR is counted over all pairs of a trigger and an image that it would change, and for each trigger.
    """

    def __init__(self, net: nn.Module, *, parts: list[Callable], **common):
        super().__init__(net, **common)
        if not parts:
            raise UserError("attack.parts=[]: expected at least one {attack: NAME, target: 0, …}")
        about = {k: getattr(self, k) for k in ("shape", "num_classes", "recipe", "seed")}
        self.parts = nn.ModuleDict()
        for make in parts:
            stem = make.func.__module__.rpartition(".")[2]
            try:
                part = make(net, **about)
            except UserError as e:
                raise UserError(f"attack.parts, {stem}: {e}") from None
            refuse(part)
            del part.net  # the victim belongs to the whole
            number = sum(name.split("_no")[0] == stem for name in self.parts)
            self.parts[f"{stem}_no{number + 1}" if number else stem] = part
        self.ratio = sum(part.ratio for part in self.parts.values())

    def dealt(self, what: Callable, x: Tensor) -> Tensor:
        """what(part, x) of part i modulo their number at place i."""
        out = torch.empty_like(x)
        for i, part in enumerate(self.parts.values()):
            out[i :: len(self.parts)] = what(part, x[i :: len(self.parts)])
        return out

    def trigger(self, x: Tensor) -> Tensor:
        return self.dealt(lambda part, some: part.trigger(some), x)

    def stamp(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self.dealt(lambda part, some: part.stamp(some), x)

    def relabel(self, y: Tensor) -> Tensor:
        return self.dealt(lambda part, some: part.relabel(some), y)

    def candidates(self, y: Tensor) -> Tensor:
        return torch.stack([part.candidates(y) for part in self.parts.values()]).any(0)

    def each(self, step: Callable, split: Split) -> Split:
        """step(part, split) -> split, for one part after the other."""
        for name, part in self.parts.items():
            try:
                split = step(part, split)
            except UserError as e:
                raise UserError(f"attack.parts, {name}: {e}") from None
        return split

    def check(self, split: Split) -> None:
        def taken(part: Attack, split: Split) -> Split:
            part.check(split)
            poisoned = split.poisoned.clone()
            poisoned[part.choose(split)] = True
            return replace(split, poisoned=poisoned)

        self.each(taken, split)

    def poison(self, split: Split) -> Split:
        return self.each(lambda part, split: part.poison(split), split)

    def by_trigger(self, split: Split) -> dict[str, Split]:
        return {name: part.triggered(split) for name, part in self.parts.items()}

    def triggered(self, split: Split) -> Split:
        sets = list(self.by_trigger(split).values())
        return Split(*(torch.cat([getattr(s, f.name) for s in sets]) for f in fields(Split)))


def refuse(part: Attack) -> None:
    """What cannot be one of several: it has no trigger, or trains the victim in a way of its own."""
    name, own = type(part).__name__, (type(part).training_step, type(part).fit)
    if not part.has_trigger:
        raise UserError(f"attack.parts: {name} has no trigger; take attacks that have one")
    if not part.leaves_poison or own != (Attack.training_step, Attack.fit):
        raise UserError(
            f"attack.parts: {name} trains the victim in a way of its own and cannot be a part of several; take attacks that "
            "poison data (`bdx info attacks`)"
        )
