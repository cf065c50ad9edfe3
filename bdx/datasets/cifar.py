"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 images of 32×32 (Krizhevsky 2009), downloaded through torchvision."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bdx import imagefile, sources
from bdx.errors import UserError

ARCHIVES = {10: "cifar-10-python.tar.gz", 100: "cifar-100-python.tar.gz"}


def make(path: Path, *, classes: int) -> None:
    """Download (with progress and checksums, about 170 MB), then write the cache. Raises UserError without a network."""
    import numpy as np
    from torchvision import datasets

    name = f"cifar{classes}"
    print(f"{name}: downloading to {path.parent} (170 MB, once)", flush=True)
    try:
        train, test = (getattr(datasets, name.upper())(path.parent, train=t, download=True) for t in (True, False))
    except (OSError, RuntimeError) as e:
        where = f"{ARCHIVES[classes]} (from www.cs.toronto.edu/~kriz/cifar.html)"
        raise sources.no_network(name, e, [where], path.parent) from None
    parts = [a for s in (train, test) for a in (s.data.transpose(0, 3, 1, 2), np.asarray(s.targets, dtype=np.int64))]
    arrays = {k: np.ascontiguousarray(v) for k, v in zip(imagefile.TENSORS, parts, strict=True)}
    imagefile.write(path, arrays, dataset=name, classes=train.classes, source=f"torchvision {name.upper()}")


def cache(folder: Path, *, classes: int) -> Path:
    """The cache in `folder`, downloaded on first use."""
    if classes not in ARCHIVES:
        raise UserError(f"dataset.source.classes={classes}: expected {' or '.join(map(str, ARCHIVES))}")
    return imagefile.ensure(folder / f"cifar{classes}.safetensors", partial(make, classes=classes))
