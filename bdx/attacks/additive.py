"""Additive: attacks that add one fixed picture to every image."""

from __future__ import annotations

from torch import Tensor, nn

from bdx.attacks.base import Attack


class Additive(Attack):
    """x + t, clipped to [0,1]; a method says what `pattern` is. file: a picture to add instead (black adds nothing)."""

    def __init__(self, net: nn.Module, *, file: str | None, **common):
        super().__init__(net, **common)
        self.register_buffer("added", self.scaled(self.pattern()) if file is None else self.read(file))

    def pattern(self) -> Tensor:
        """(3,h,w): what is added, in units of the whole range."""
        raise NotImplementedError(f"{type(self).__name__} must say what it adds")

    def trigger(self, x: Tensor) -> Tensor:
        return (x + self.added.to(x.device)).clamp(0, 1)
