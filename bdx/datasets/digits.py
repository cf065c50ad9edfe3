"""digits: 1,797 real handwritten digits that ship inside scikit-learn, 8×8 scaled to 32×32; for checks in seconds.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. Every fifth image is a test image.
"""

from __future__ import annotations

from pathlib import Path

from bdx import imagefile


def make(path: Path, *, size: int) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images / 16 * 255).round().astype(np.uint8)
    big = [np.asarray(Image.fromarray(g).resize((size, size), Image.Resampling.BILINEAR)) for g in grey]
    x = np.repeat(np.stack(big)[:, None], 3, axis=1)  # (N, 3, size, size)
    y = digits.target.astype(np.int64)
    test = np.arange(len(y)) % 5 == 4
    parts = (x[~test], y[~test], x[test], y[test])
    arrays = {k: np.ascontiguousarray(v) for k, v in zip(imagefile.TENSORS, parts, strict=True)}
    classes = [str(c) for c in range(10)]
    imagefile.write(path, arrays, dataset="digits", classes=classes, source="scikit-learn load_digits")


def cache(folder: Path, *, size: int) -> Path:
    """The cache in `folder`, made on first use: the images are on every machine that has scikit-learn."""
    name = "digits.safetensors" if size == 32 else f"digits-{size}.safetensors"
    return imagefile.ensure(folder / name, lambda path: make(path, size=size))
