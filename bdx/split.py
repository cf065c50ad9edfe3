"""Split: images with everything that is known about each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bdx.errors import UserError


@dataclass(frozen=True)
class Split:
    """A set of images; poisoning returns a new one, indexing gives a sub-split.

    x         (N, C, H, W) uint8, the pixels
    y         (N,) int64, the label that training sees
    y_true    (N,) int64, the label that nature gave
    poisoned  (N,) bool, whether an attacker changed the image or its label
    """

    x: Tensor
    y: Tensor
    y_true: Tensor
    poisoned: Tensor

    def __post_init__(self):
        n, device = len(self.x), self.x.device
        for f in fields(self):
            value = getattr(self, f.name)
            if len(value) != n or value.device != device:
                raise ValueError(
                    f"Split.{f.name} has length {len(value)} on {value.device}, x has length {n} on {device}: "
                    "all four tensors need one length and one device"
                )
        if self.x.dtype != torch.uint8 or self.x.ndim != 4:
            raise ValueError(f"Split.x is {tuple(self.x.shape)} {self.x.dtype}: expected (N, C, H, W) uint8")

    @classmethod
    def clean(cls, x: Tensor, y: Tensor) -> Split:
        """A split that nobody has touched."""
        return cls(x, y, y, torch.zeros(len(y), dtype=torch.bool, device=y.device))

    def blind(self) -> Split:
        """What a defender sees of it: which images are poisoned, and what they show, is gone."""
        return Split.clean(self.x, self.y)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index) -> Split:
        """index: a slice, a bool mask (N,) or an index tensor."""
        return Split(self.x[index], self.y[index], self.y_true[index], self.poisoned[index])

    def to(self, device) -> Split:
        return Split(*(getattr(self, f.name).to(device) for f in fields(self)))


def pieces(x: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Images x (N,C,H,W), and what else there is of each (N, …), in the pieces that go through a net fastest where nothing is
    kept for gradients: on a CPU as many as its cache holds (1.8 times as fast as a thousand), on a GPU enough to fill it."""
    size = max(1, (2000 if x.is_cuda else 100) * 1024 // (x.shape[2] * x.shape[3]))
    return zip(*(t.split(size) for t in (x, *more)), strict=True)


def pixels(x: Tensor) -> Tensor:
    """uint8 -> float in [0,1], channels last in memory: the layout in which convolutions are fastest."""
    return x.to(memory_format=torch.channels_last).float().div_(255)


def images_of(made, x: Tensor, what: str) -> None:
    """Raise UserError unless `made` is as many images of finite pixels as x. what: made it."""
    if not isinstance(made, Tensor) or made.shape != x.shape:
        found = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise UserError(f"{what} makes {found} of images of shape {tuple(x.shape)}: expected the same shape")
    if not made.isfinite().all():
        raise UserError(f"{what} makes NaN or infinity of images in [0,1]")
