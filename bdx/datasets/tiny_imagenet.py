"""Tiny ImageNet: 100,000 + 10,000 images of 64×64 in 200 classes (Stanford CS231n); its validation images are the test set."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from zipfile import ZipFile

from bdx import imagefile, sources
from bdx.errors import UserError

FILE = "tiny-imagenet-200.zip"
ARCHIVES = {FILE: (f"http://cs231n.stanford.edu/{FILE}", "90528d7ca1a48142e341f4ef8d21d0de")}


def listing(archive: ZipFile, every: int) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(training file -> class, test file -> class, the classes): those whose place among all, sorted, `every` divides."""
    root = "tiny-imagenet-200"
    files = sorted(n for n in archive.namelist() if n.endswith(".JPEG"))
    train = {n: n.split("/")[2] for n in files if n.startswith(f"{root}/train/")}
    lines = archive.read(f"{root}/val/val_annotations.txt").decode().splitlines()
    test = {f"{root}/val/images/{f}": c for f, c, *_ in map(str.split, lines)}
    kept = sorted(set(train.values()))[::every]
    train, test = ({n: c for n, c in of.items() if c in kept} for of in (train, test))
    return train, test, kept


def make(path: Path, *, every: int) -> None:
    """Download, then write the cache. Raises UserError without a network."""
    import numpy as np

    (file,) = sources.fetch(path.parent, path.stem, ARCHIVES, "248 MB")
    archive = ZipFile(file)
    train, test, classes = listing(archive, every)
    parts = []
    for of in (train, test):
        images = sources.stack(list(of), 64, open=lambda name: io.BytesIO(archive.read(name)))
        parts += [images, np.asarray([classes.index(c) for c in of.values()], dtype=np.int64)]
    lines = archive.read("tiny-imagenet-200/words.txt").decode().splitlines()
    words = {c: text.split(",")[0] for c, _, text in (line.partition("\t") for line in lines)}
    arrays = dict(zip(imagefile.TENSORS, parts, strict=True))
    imagefile.write(path, arrays, dataset=path.stem, classes=[words.get(c, c) for c in classes], source=FILE)


def cache(folder: Path, *, every: int) -> Path:
    """The cache in `folder`, downloaded on first use. every: 1 for all 200 classes, 5 for 40 of them."""
    if not 1 <= every <= 100:
        raise UserError(f"dataset.source.every={every}: expected 1 (all 200 classes) to 100 (two of them)")
    name = "tiny_imagenet" if every == 1 else f"tiny_imagenet_{-(-200 // every)}"
    return imagefile.ensure(folder / f"{name}.safetensors", partial(make, every=every))
