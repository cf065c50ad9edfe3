"""folder: the user's own images, in class folders under ROOT/train and ROOT/test, of any size; resized once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bdx import imagefile
from bdx.errors import UserError
from bdx.sources import stack

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def listing(root: Path, test: str = "test", first: int | None = None) -> dict[str, dict[str, list[Path]]]:
    """split -> class -> image files, sorted. Raises UserError for missing splits, empty classes and class mismatches."""
    found = {}
    for split in ("train", test):
        if not (root / split).is_dir():
            raise UserError(f"{root} has no folder {split}/: expected {root}/train/CLASS/*.png and {root}/{test}/CLASS/*.png")
        classes = sorted(p for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith("."))[:first]
        found[split] = {c.name: sorted(p for p in c.rglob("[!.]*") if p.suffix.lower() in ENDINGS) for c in classes}
        if not found[split]:
            raise UserError(f"{root / split} has no class folders")
        if empty := [c for c, files in found[split].items() if not files]:
            raise UserError(f"{root / split}: no images in class {', '.join(empty)} (endings: {' '.join(sorted(ENDINGS))})")
    if odd := sorted(set(found["train"]) ^ set(found[test])):
        raise UserError(f"{root}: class {', '.join(odd)} is in only one of train/ and {test}/; both need the same classes")
    return found


def fingerprint(found: dict, size: int) -> str:
    """Changes when a file is added, removed, renamed or rewritten."""
    sha = hashlib.sha256(str(size).encode())
    for split, classes in found.items():
        for name, files in classes.items():
            for p in files:
                stat = p.stat()
                sha.update(f"{split}/{name}/{p}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def make(path: Path, found: dict, size: int, name: str) -> None:
    import numpy as np

    parts = []
    for classes in found.values():
        parts.append(stack([p for files in classes.values() for p in files], size, gap=3))
        parts.append(np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in classes.values()]))
    arrays = dict(zip(imagefile.TENSORS, parts, strict=True))
    imagefile.write(path, arrays, dataset=name, classes=list(found["train"]), source="folder", listing=fingerprint(found, size))


def cache(folder: Path, *, name: str, root: str | None, size: int, test: str, first: int | None) -> Path:
    """The cache in `folder`, made on first use and again whenever the images have changed. test: the folder of the test
    images; first: how many classes, in the order of their names, null for all."""
    if root is None:
        raise UserError(f"dataset={name} needs dataset.source.root=PATH with train/CLASS/*.png and {test}/CLASS/*.png below")
    if first is not None and first < 2:
        raise UserError(f"dataset.source.first={first}: expected 2 classes or more, or null for all")
    place = Path(root).expanduser().resolve()
    found = listing(place, test, first)
    wanted = fingerprint(found, size)
    about = "".join(f"-{part}" for part in (place.name, hashlib.sha256(str(place).encode()).hexdigest()[:8], size))
    return imagefile.ensure(
        folder / f"{name}{about}.safetensors",
        lambda path: make(path, found, size, name),
        fresh=lambda head: head.get("listing") == wanted,
    )
