"""CIFAR-10: 50,000 + 10,000 images of 32×32 in 10 classes (Krizhevsky 2009), downloaded through torchvision."""

from __future__ import annotations

from pathlib import Path

from bdx import imagefile
from bdx.errors import UserError


def make(path: Path) -> None:
    """Download (with progress and checksums, about 170 MB), then write the cache. Raises UserError without a network."""
    import numpy as np
    from torchvision.datasets import CIFAR10

    print(f"cifar10: downloading to {path.parent} (170 MB, once)", flush=True)
    try:
        train, test = (CIFAR10(path.parent, train=t, download=True) for t in (True, False))
    except (OSError, RuntimeError) as e:
        raise UserError(
            f"cifar10 could not be downloaded ({e}); without a network put cifar-10-python.tar.gz (from "
            f"www.cs.toronto.edu/~kriz/cifar.html) or a ready cache cifar10.safetensors into {path.parent}, "
            "or name the folder that has it by BDX_DATA or paths.data"
        ) from None
    parts = [a for s in (train, test) for a in (s.data.transpose(0, 3, 1, 2), np.asarray(s.targets, dtype=np.int64))]
    arrays = {k: np.ascontiguousarray(v) for k, v in zip(imagefile.TENSORS, parts, strict=True)}
    imagefile.write(path, arrays, dataset="cifar10", classes=train.classes, source="torchvision CIFAR10")


def cache(folder: Path) -> Path:
    """The cache in `folder`, downloaded on first use."""
    return imagefile.ensure(folder / "cifar10.safetensors", make)
