"""ImageData: what a run may see of a data set, as tensors on the device; Batches: whole-batch augmentation there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor

from bdx import imagefile
from bdx.build import instantiate
from bdx.errors import UserError
from bdx.split import Split, pixels


class Batch(NamedTuple):
    """x (N,C,H,W) float in [0,1] · y (N,) int64, or (N,K) float after CutMix · index (N,) of the images in their split."""

    x: Tensor
    y: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to a training batch, drawn per sample. crop: zero padding in pixels; flip: horizontal, at p = 1/2;
    rotate: up to ± degrees; cutout: side of a square set to 0; cutmix: α of the Beta distribution, 0 is off."""

    crop: int
    flip: bool
    rotate: float
    cutout: int
    cutmix: float


def random_crop(x: Tensor, pad: int, g: Generator) -> Tensor:
    """Zero-pad by `pad` on each side, then cut each image's own window of the old size."""
    n, _, h, w = x.shape
    windows = F.pad(x, (pad,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # a view: (N, C, 2p+1, 2p+1, H, W)
    dy, dx = torch.randint(2 * pad + 1, (2, n), generator=g, device=x.device)
    return windows[torch.arange(n, device=x.device), :, dy, dx]


def random_flip(x: Tensor, g: Generator) -> Tensor:
    flip = torch.rand(len(x), 1, 1, 1, generator=g, device=x.device) < 0.5
    return torch.where(flip, x.flip(-1), x)


def random_rotate(x: Tensor, degrees: float, g: Generator) -> Tensor:
    """x float. Bilinear, zeros outside."""
    a = (torch.rand(len(x), generator=g, device=x.device) * 2 - 1) * degrees * torch.pi / 180
    zero = torch.zeros_like(a)
    ratio = x.shape[2] / x.shape[3]
    rows = [torch.stack([a.cos(), -a.sin() * ratio, zero], 1), torch.stack([a.sin() / ratio, a.cos(), zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def boxes(n: int, h: int, w: int, height: Tensor, width: Tensor, g: Generator, device) -> Tensor:
    """(N,1,H,W) bool: a box of the given sides (N,) around a uniform centre, cut off at the border."""
    cy = torch.randint(h, (n,), generator=g, device=device)
    cx = torch.randint(w, (n,), generator=g, device=device)
    top, left = cy - height // 2, cx - width // 2
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])
    cols = (x >= left[:, None]) & (x < (left + width)[:, None])
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def random_cutout(x: Tensor, side: int, g: Generator) -> Tensor:
    """DeVries and Taylor 2017: one square per image set to 0."""
    n, _, h, w = x.shape
    sides = torch.full((n,), side, device=x.device)
    return x.masked_fill(boxes(n, h, w, sides, sides, g, x.device), 0)


def random_cutmix(x: Tensor, y: Tensor, classes: int, alpha: float, g: Generator) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, with a box and a partner for each image; returns labels as probabilities (N, classes)."""
    n, _, h, w = x.shape
    # Beta(α, α) from two Gamma draws by way of the global generator would not be ours to seed: invert by sampling
    lam = beta(alpha, n, g, x.device)
    side = (1 - lam).sqrt()
    mask = boxes(n, h, w, (h * side).long(), (w * side).long(), g, x.device)
    partner = torch.randperm(n, generator=g, device=x.device)
    keep = 1 - mask.float().mean((1, 2, 3))[:, None]
    hot = F.one_hot(y, classes).float()
    return torch.where(mask, x[partner], x), keep * hot + (1 - keep) * hot[partner]


def beta(alpha: float, n: int, g: Generator, device) -> Tensor:
    """n draws of Beta(α, α) with a given generator: u/(u+v) of two Gamma(α) draws (torch.distributions takes none)."""
    gamma = torch._standard_gamma(torch.full((2, n), alpha, dtype=torch.float64, device=device), generator=g)
    return (gamma[0] / gamma.sum(0).clamp_min(1e-12)).float()


class Batches:
    """An iterable of batches, again and again: pass number e draws from a generator of its own, seeded by (seed, e),
    so that a resumed training sees in epoch e what an uninterrupted one would have seen."""

    def __init__(self, split: Split, *, size: int, shuffle: bool, augment: Augment | None, drop_last: bool, classes: int, seed: int):
        if len(split) == 0:
            raise UserError("there are no images to make batches of: is the reserved set empty?")
        self.split, self.size, self.shuffle, self.augment = split, size, shuffle, augment
        self.classes, self.seed, self.epoch = classes, seed, 0
        self.used = len(split) // size * size if drop_last and len(split) >= size else len(split)

    def __len__(self) -> int:
        return -(-self.used // self.size)

    def __iter__(self) -> Iterator[Batch]:
        device, n = self.split.x.device, len(self.split)
        g = Generator(device).manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(n, generator=g, device=device) if self.shuffle else torch.arange(n, device=device)
        for index in order[: self.used].split(self.size):
            yield self.batch(index, g)

    def batch(self, index: Tensor, g: Generator) -> Batch:
        x, y, a = self.split.x[index], self.split.y[index], self.augment
        if a is None:
            return Batch(pixels(x), y, index)
        if a.crop:
            x = random_crop(x, a.crop, g)
        if a.flip:
            x = random_flip(x, g)
        x = pixels(x)
        if a.rotate:
            x = random_rotate(x, a.rotate, g)
        if a.cutout:
            x = random_cutout(x, a.cutout, g)
        if a.cutmix:
            x, y = random_cutmix(x, y, self.classes, a.cutmix, g)
        return Batch(x, y, index)


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
    g = Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=g)
    if not balanced:
        return order[:k].sort().values
    classes = int(y.max()) + 1
    each = k // classes
    sizes = y.bincount(minlength=classes)
    if each == 0 or int(sizes.min()) < each:
        raise UserError(
            f"dataset.reserved asks for {k} images, {each} of each of {classes} classes, but the smallest class has "
            f"{int(sizes.min())}; raise dataset.reserved.count or set dataset.reserved.balanced=false"
        )
    shuffled = y[order]
    return torch.cat([order[shuffled == c][:each] for c in range(classes)]).sort().values


@dataclass(frozen=True)
class ImageData:
    """train: what the victim trains on · clean: what a defender may trust · test: for evaluation and nothing else.

    `reserved` (M,) are the indices of `clean` in the training set as it came; `sha256` names the pixels and labels.
    """

    train: Split
    clean: Split
    test: Split
    name: str
    classes: tuple[str, ...]
    reserved: Tensor
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
        self, split: Split, *, size: int, shuffle: bool, augment: bool | Augment, drop_last: bool = False, stage: int = 0
    ) -> Batches:
        """Batches of `split`. augment: False, True (the data set's own), or another. drop_last: leave out a last batch
        that is not full, unless it is the only one. stage: keeps the random numbers of two loops apart."""
        if isinstance(augment, bool):
            augment = self.augment if augment else None
        kind = {"size": size, "shuffle": shuffle, "augment": augment, "drop_last": drop_last}
        return Batches(split, **kind, classes=self.num_classes, seed=self.seed * 101 + stage)

    def poisoned(self, train: Split) -> ImageData:
        """The same data with the attacker's training set in place of the clean one."""
        return replace(self, train=train)

    def allow(self, needs: frozenset[str]) -> ImageData:
        """The same data with every split that is not in `needs` out of reach: what a method does not declare, it cannot
        use. Touching it raises PermissionError; `test` is never allowed."""
        hide = {f: Hidden(f) for f in ("train", "clean", "test") if f not in needs - {"test"}}
        return Allowed(**({f: getattr(self, f) for f in self.__dataclass_fields__} | hide), size=self.shape)


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
    maker = instantiate(cfg["source"])
    return maker(Path(folder).expanduser())


def load(cfg: dict, folder: Path | str, *, device, seed: int) -> ImageData:
    """cfg: a config of conf/dataset. The reserved set depends on the data, the sizes asked for and the seed alone."""
    path = cache_path(cfg, folder)
    head, tensors = imagefile.header(path), load_file(path, device=str(device))
    classes = tuple(str(c) for c in head["classes"])
    train, test = (Split.clean(tensors[f"{s}_images"], tensors[f"{s}_labels"].long()) for s in ("train", "test"))
    asked = cfg["reserved"]
    if asked["source"] not in ("train", "held_out"):
        raise UserError(f"dataset.reserved.source={asked['source']}: expected train or held_out")
    index = reserve(train.y, ratio=asked["ratio"], count=asked["count"], balanced=asked["balanced"], seed=seed)
    clean, here = train[index.to(train.x.device)], index.to(train.x.device)
    if asked["source"] == "held_out":
        kept = torch.ones(len(train), dtype=torch.bool, device=train.x.device)
        kept[here] = False
        train = train[kept]
    return ImageData(
        train, clean, test, name=cfg["name"], classes=classes, reserved=index,
        augment=Augment(**cfg["augment"]), sha256=head["sha256"], seed=seed,
    )  # fmt: skip
