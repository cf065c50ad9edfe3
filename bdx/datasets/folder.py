"""folder: the user's own images, in class folders under ROOT/train and ROOT/test, of any size; resized once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bdx import imagefile
from bdx.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def listing(root: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class -> image files, sorted. Raises UserError for missing splits, empty classes and class mismatches."""
    found = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise UserError(f"{root} has no folder {split}/: expected {root}/train/CLASS/*.png and {root}/test/CLASS/*.png")
        classes = sorted(p for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith("."))
        found[split] = {c.name: sorted(p for p in c.rglob("[!.]*") if p.suffix.lower() in ENDINGS) for c in classes}
        if not found[split]:
            raise UserError(f"{root / split} has no class folders")
        if empty := [c for c, files in found[split].items() if not files]:
            raise UserError(f"{root / split}: no images in class {', '.join(empty)} (endings: {' '.join(sorted(ENDINGS))})")
    if odd := sorted(set(found["train"]) ^ set(found["test"])):
        raise UserError(f"{root}: class {', '.join(odd)} is in only one of train/ and test/; both need the same classes")
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


def read(p: Path, size: int):
    """-> (3, size, size) uint8; the image is scaled as a whole, not cropped."""
    import numpy as np
    from PIL import Image

    with Image.open(p) as image:
        if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip instead of scaling
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3)
    return np.asarray(small).transpose(2, 0, 1)


def stack(classes: dict[str, list[Path]], size: int):
    import numpy as np
    from PIL.Image import DecompressionBombError
    from rich.progress import track

    images, labels, broken = [], [], []
    files = [(label, p) for label, name in enumerate(classes) for p in classes[name]]
    for label, p in track(files, f"reading {len(files)} images", transient=True):
        try:
            images.append(read(p, size))
            labels.append(label)
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as e:
            broken.append(f"{p} ({e})")
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(f"unreadable images: {'; '.join(broken[:5])}{more}; remove or replace them")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def make(path: Path, found: dict, size: int) -> None:
    parts = [a for split in ("train", "test") for a in stack(found[split], size)]
    arrays = dict(zip(imagefile.TENSORS, parts, strict=True))
    imagefile.write(
        path, arrays, dataset="folder", classes=list(found["train"]), source="folder", listing=fingerprint(found, size)
    )


def cache(folder: Path, *, root: str | None, size: int) -> Path:
    """The cache in `folder`, made on first use and again whenever the images have changed."""
    if root is None:
        raise UserError("dataset=folder needs dataset.source.root=PATH with train/CLASS/*.png and test/CLASS/*.png below")
    place = Path(root).expanduser().resolve()
    found = listing(place)
    wanted = fingerprint(found, size)
    name = f"folder-{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}-{size}.safetensors"
    return imagefile.ensure(
        folder / name, lambda path: make(path, found, size), fresh=lambda head: head.get("listing") == wanted
    )
