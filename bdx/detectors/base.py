"""Detector: which images carry a trigger, by a score per image and a rule that says where suspicion begins; or, of the net
itself, which classes have one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor, nn

from bdx import places
from bdx.datasets.base import ImageData
from bdx.errors import UserError, one_of
from bdx.split import Split, pieces, pixels
from bdx.surgery import mode, watch_input
from bdx.training import at_least_one


class Detector:
    """A method says how it scores and, where it differs, when it flags. Neither ever sees which images are poisoned.

    judge   which images are judged: train (the poisoned training set) or test (inputs while the net is in use); or net: no
            image, but the net's classes
    limit   judge so many of them, drawn at random, and take so many clean ones for a threshold; null: all

    Class attributes declare: judges (what `judge` may be) and needs ("clean": reserved images).
    """

    judges: tuple[str, ...] = ("train",)
    needs: frozenset[str] = frozenset()

    def __init__(self, *, judge: str, limit: int | None):
        one_of("detector.judge", judge, self.judges)
        if limit is not None:
            at_least_one("detector", limit=limit)
        self.judge, self.limit = judge, limit
        self.threshold: Tensor | float | None = None  # set by `score` where it follows from clean images
        self.notes: list[str] = []  # what the user should know of how it went
        self.report: Callable | None = None  # (stage, part, parts, means, seconds each), as for a training

    def score(self, net: nn.Module, split: Split, data: ImageData, make_trainer: Callable) -> Tensor:
        """(N,) for the images of `split`, higher = more suspicious. split.y: the labels of the training set, or of test
        inputs what the net says; data: only the splits in `needs` can be touched; make_trainer(stage, epochs). judge=net:
        (K,) for its classes, and `split` is of no account."""
        raise NotImplementedError(f"{type(self).__name__} must say how it scores")

    def flag(self, scores: Tensor, y: Tensor) -> Tensor:
        """(N,) bool: the method's own decision on the images just scored, of labels y; judge=net: (K,), on the classes."""
        return scores > self.threshold

    def through(self, what: str, parts: Sequence) -> Iterator:
        """The parts, one by one; how far it has come is said."""
        began = time.monotonic()
        for done, part in enumerate(parts, 1):
            yield part
            if self.report:
                self.report(what, done, len(parts), {}, (time.monotonic() - began) / done)

    def some(self, split: Split, seed: int) -> Split:
        """`limit` images of the split, drawn at random, in their order."""
        return sample(split, self.limit, seed)


def sample(split: Split, limit: int | None, seed: int) -> Split:
    if limit is None or limit >= len(split):
        return split
    g = Generator().manual_seed(seed * 101 + 50)  # not the permutation by which an attack chose what to poison
    chosen = torch.randperm(len(split), generator=g)[:limit]
    return split[chosen.sort().values.to(split.x.device)]


def classes(y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(class, indices of its images) for every class that there is."""
    for c in y.unique().tolist():
        yield c, (y == c).nonzero().flatten()


@torch.no_grad()
def inputs(net: nn.Module, at: str, x: Tensor) -> Tensor:
    """What the module named `at` gets for x (N,C,H,W) uint8: (N, …) float, the net in eval mode."""
    found = []
    with watch_input(net, at, lambda z: found.append(z.float())), mode(net, False):
        for (part,) in pieces(x):
            net(pixels(part))
    return torch.cat(found)


def penultimate(net: nn.Module, x: Tensor) -> Tensor:
    """(N, D): what the last Linear layer gets."""
    last = places.linears(net, "classifier")[-1]
    return inputs(net, next(n for n, m in net.named_modules() if m is last), x).flatten(1)


def principal(z: Tensor, k: int) -> Tensor:
    """(N, D) -> (N, k'): coordinates along the k directions of largest variance, or fewer where there are no more."""
    z = z.double() - z.double().mean(0)
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    some = values.flip(0)[:k] > 1e-8 * values[-1]
    return z @ vectors.flip(1)[:, :k][:, some]


def quantile(scores: Tensor, q: float) -> float:
    """As numpy's; torch.quantile refuses more than 16 million."""
    if len(scores) == 0:
        raise UserError("there are no clean images to take a threshold from")
    return float(torch.quantile(scores.double(), q))
