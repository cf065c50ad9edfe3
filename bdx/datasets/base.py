"""ImageData: what a run may see of a data set, as tensors on the device; Batches: whole-batch augmentation there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from bdx import imagefile, sources
from bdx.augment import Augment, augmentation
from bdx.build import instantiate
from bdx.errors import UserError
from bdx.split import Split, pixels


class Batch(NamedTuple):
    """x (N,C,H,W) float in [0,1] · y (N,) int64, or (N,K) float after CutMix · index (N,) of the images in their split."""

    x: Tensor
    y: Tensor
    index: Tensor


class Batches:
    """An iterable of batches, again and again: pass number e draws from a generator of its own, seeded by (seed, e),
    so that a resumed training sees in epoch e what an uninterrupted one would have seen."""

    def __init__(
        self,
        split: Split,
        *,
        size: int,
        shuffle: bool,
        augment: Augment | None,
        drop_last: bool,
        classes: int,
        seed: int,
    ):
        if len(split) == 0:
            raise UserError("there are no images to make batches of: is the reserved set empty, or was every image taken?")
        self.split, self.size, self.shuffle, self.augment = split, size, shuffle, augment
        self.classes, self.seed, self.epoch = classes, seed, 0
        self.used = len(split) // size * size if drop_last and len(split) >= size else len(split)

    def __len__(self) -> int:
        return -(-self.used // self.size) - self.lone

    @property
    def lone(self) -> bool:
        """Whether the last batch would be one image, of which BatchNorm may know no deviation: it joins the one before."""
        return self.used > self.size and self.used % self.size == 1

    def __iter__(self) -> Iterator[Batch]:
        device, n = self.split.x.device, len(self.split)
        g = Generator(device).manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(n, generator=g, device=device) if self.shuffle else torch.arange(n, device=device)
        parts = list(order[: self.used].split(self.size))
        if self.lone:
            parts[-2:] = [torch.cat(parts[-2:])]
        for index in parts:
            yield self.batch(index, g)

    def batch(self, index: Tensor, g: Generator) -> Batch:
        x, y = self.split.x[index], self.split.y[index]
        if self.augment is None:
            return Batch(pixels(x), y, index)
        return Batch(*self.augment(x, y, self.classes, g), index)


RESERVING = 7_368_787  # a stream of its own: an attack that draws by the same seed must not poison just these images


def reserve(y: Tensor, *, ratio: float, count: int | None, balanced: bool, seed: int) -> Tensor:
    """Indices, sorted, of the clean images that a defender may trust. y: (N,) labels of the clean training set.

    count has precedence over ratio; balanced: as many of each class (⌊k/K⌋, NPD's way), else uniformly at random.
    Raises UserError where there are not enough.
    """
    y = y.cpu()
    k = round(ratio * len(y)) if count is None else count
    if not 0 < k <= len(y):
        asked = f"ratio={ratio}" if count is None else f"count={count}"
        raise UserError(f"dataset.reserved.{asked} asks for {k} reserved images of {len(y)}: expected 1 to {len(y)}")
    order = torch.randperm(len(y), generator=Generator().manual_seed(seed + RESERVING))
    if not balanced:
        return order[:k].sort().values
    classes = int(y.max()) + 1
    each = k // classes
    sizes = y.bincount(minlength=classes)
    if each == 0 or int(sizes.min()) < each:
        more = f"dataset.reserved.count={classes} or more" if each == 0 else f"at most {int(sizes.min()) * classes} images"
        raise UserError(
            f"dataset.reserved asks for {k} images, {each} of each of {classes} classes, but the smallest class has "
            f"{int(sizes.min())}; ask for {more}, or set dataset.reserved.balanced=false"
        )
    shuffled = y[order]
    return torch.cat([order[shuffled == c][:each] for c in range(classes)]).sort().values


@dataclass(frozen=True)
class ImageData:
    """train: what the victim trains on · clean: what a defender may trust · test: for evaluation and nothing else.

    `reserved` (M,) are the indices of `clean` in the training set as it came; held_out: whether `train` lacks them;
    `sha256` names the pixels and labels.
    """

    train: Split
    clean: Split
    test: Split
    name: str
    classes: tuple[str, ...]
    reserved: Tensor
    held_out: bool
    augment: Augment
    sha256: str
    seed: int

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.test.x.shape[1:])

    def batches(
        self,
        split: Split,
        *,
        size: int,
        shuffle: bool,
        augment: bool | Augment,
        drop_last: bool = False,
        stage: int = 0,
    ) -> Batches:
        """Batches of `split`. augment: False, True (the data set's own), or another. drop_last: leave out a last batch
        that is not full, unless it is the only one. stage: keeps the random numbers of two loops apart."""
        if isinstance(augment, bool):
            augment = self.augment if augment else None
        kind = {"size": size, "shuffle": shuffle, "augment": augment, "drop_last": drop_last}
        return Batches(split, **kind, classes=self.num_classes, seed=self.seed * 101 + stage)

    def without_reserved(self) -> Split:
        """The training set without the images that the defender holds, whether the victim has seen them or not."""
        if self.held_out:
            return self.train
        kept = torch.ones(len(self.train), dtype=torch.bool, device=self.train.x.device)
        kept[self.reserved.to(kept.device)] = False
        return self.train[kept]

    def poisoned(self, train: Split) -> ImageData:
        """The same data with the attacker's training set in place of the clean one."""
        return replace(self, train=train)

    def allow(self, needs: frozenset[str]) -> ImageData:
        """The same data with every split that is not in `needs` out of reach: what a method does not declare, it cannot
        use. Touching it raises PermissionError; `test` is never allowed."""
        hide = {f: Hidden(f) for f in ("train", "clean", "test") if f not in needs - {"test"}}
        return Allowed(**({f: getattr(self, f) for f in ImageData.__dataclass_fields__} | hide), size=self.shape)


@dataclass(frozen=True)
class Allowed(ImageData):
    """ImageData without the splits that were not declared."""

    size: tuple[int, int, int] = (0, 0, 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size


class Hidden:
    """Stands where a split was."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, _):
        raise PermissionError(f"this method does not declare that it needs data.{self._name}")

    __len__ = __iter__ = __getitem__ = lambda self, *_: self.__getattr__("")


def cache_path(cfg: dict, folder: Path | str) -> Path:
    """Where the cache of this data set lies, made now if that needs nothing from outside; else a UserError says how."""
    if not 1 <= (size := cfg["source"].get("size", 32)) <= 4096:
        raise UserError(f"dataset.source.size={size}: expected 1 to 4096 pixels a side")
    maker = instantiate(cfg["source"])
    return maker(Path(folder).expanduser())


def verify(path: Path, head: dict, tensors: dict[str, Tensor], name: str) -> None:
    """The cache must be of this data set and hold the very pixels and labels that its header names (a run's id does)."""
    top = max(int(tensors[f"{s}_labels"].max()) for s in ("train", "test"))
    if head["dataset"] != name:
        raise UserError(
            f"dataset.name={name}, but {path} holds {head['dataset']}: dataset=NAME chooses another data set, and its name is "
            f"not set by hand; where the file is in the wrong place, remove it and run `bdx data prepare {name}`"
        )
    if top >= len(head["classes"]):
        raise UserError(
            f"{path} holds {len(head['classes'])} classes and labels up to {top}; remove it and run `bdx data prepare {name}`"
        )
    if imagefile.digest({k: tensors[k].numpy() for k in imagefile.TENSORS}) != head["sha256"]:
        raise UserError(f"{path} does not match its checksum: altered, remove it and run `bdx data prepare {name}`")


def synthetic(file: str, train: Split, classes: int, source: str) -> Split:
    """The images of `file`, that a defender trusts in place of the data set's own (D3 Table 4)."""
    if source != "train":
        raise UserError(
            f"dataset.reserved.generated={file} leaves the training set as it is: set dataset.reserved.source=train"
        )
    x, y = sources.generated(file, tuple(train.x.shape[1:]), classes)
    return Split.clean(torch.from_numpy(x).to(train.x.device), torch.from_numpy(y).to(train.x.device))


def load(cfg: dict, folder: Path | str, *, device, seed: int) -> ImageData:
    """cfg: a config of conf/dataset. The reserved set depends on the data, the sizes asked for and the seed alone."""
    path = cache_path(cfg, folder)
    head, tensors = imagefile.header(path), load_file(path)
    classes = tuple(str(c) for c in head["classes"])
    verify(path, head, tensors, cfg["name"])
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    train, test = (Split.clean(tensors[f"{s}_images"], tensors[f"{s}_labels"].long()) for s in ("train", "test"))
    asked = cfg["reserved"]
    if asked["source"] not in ("train", "held_out"):
        raise UserError(f"dataset.reserved.source={asked['source']}: expected train or held_out")
    pool = train if (file := asked["generated"]) is None else synthetic(file, train, len(classes), asked["source"])
    k = round(asked["ratio"] * len(train)) if asked["count"] is None else asked["count"]
    index = reserve(pool.y, ratio=asked["ratio"], count=k if file else asked["count"], balanced=asked["balanced"], seed=seed)
    clean, here = pool[index.to(train.x.device)], index.to(train.x.device)
    index = index if file is None else index[:0]  # none of the training images
    if held_out := asked["source"] == "held_out":
        kept = torch.ones(len(train), dtype=torch.bool, device=train.x.device)
        kept[here] = False
        train = train[kept]
    return ImageData(
        train, clean, test, name=cfg["name"], classes=classes, reserved=index, held_out=held_out,
        augment=augmentation("dataset.augment", cfg["augment"]), sha256=head["sha256"], seed=seed,
    )  # fmt: skip
