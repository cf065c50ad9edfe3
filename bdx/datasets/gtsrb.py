"""GTSRB: 39,209 + 12,630 photos of 43 German traffic signs (Stallkamp et al. 2012), whole frames scaled to 32×32.

These are the final training and test sets. torchvision's GTSRB trains on 26,640 others, of an earlier round.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from zipfile import ZipFile

from bdx import imagefile, sources

FROM = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
MD5 = {
    "GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",
    "GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
    "GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
}
CLASSES = [  # in the order of their numbers
    *(f"speed limit {v}" for v in (20, 30, 50, 60, 70, 80)), "end of speed limit 80", "speed limit 100", "speed limit 120",
    "no overtaking", "no overtaking by trucks", "priority at next crossing", "priority road", "give way", "stop",
    "no vehicles", "no trucks", "no entry", "danger", "bend left", "bend right", "double bend", "uneven road",
    "slippery road", "road narrows", "road works", "traffic lights", "pedestrians", "children", "bicycles", "ice or snow",
    "wild animals", "end of all restrictions", "turn right ahead", "turn left ahead", "ahead only", "ahead or right",
    "ahead or left", "keep right", "keep left", "roundabout", "end of no overtaking", "end of no overtaking by trucks",
]  # fmt: skip


def training(archive: ZipFile) -> dict[str, int]:
    """file -> class: …/Images/00017/00003_00029.ppm is frame 29 of the third sign of class 17."""
    return {n: int(n.split("/")[-2]) for n in sorted(archive.namelist()) if n.endswith(".ppm")}


def testing(archive: ZipFile, truth: ZipFile) -> dict[str, int]:
    """file -> class, which stands in a table of its own: Filename;…;ClassId."""
    table = next(n for n in truth.namelist() if n.endswith(".csv"))
    rows = csv.DictReader(io.StringIO(truth.read(table).decode()), delimiter=";")
    of = {row["Filename"]: int(row["ClassId"]) for row in rows}
    return {n: of[n.split("/")[-1]] for n in sorted(archive.namelist()) if n.endswith(".ppm")}


def make(path: Path) -> None:
    """Download, then write the cache. Raises UserError without a network."""
    import numpy as np

    archives = {file: (FROM + file, md5) for file, md5 in MD5.items()}
    train, test, truth = (ZipFile(p) for p in sources.fetch(path.parent, "gtsrb", archives, "365 MB"))
    parts = []
    for archive, of in ((train, training(train)), (test, testing(test, truth))):
        images = sources.stack(list(of), 32, open=lambda name, zip=archive: io.BytesIO(zip.read(name)))
        parts += [images, np.asarray(list(of.values()), dtype=np.int64)]
    arrays = dict(zip(imagefile.TENSORS, parts, strict=True))
    imagefile.write(path, arrays, dataset="gtsrb", classes=CLASSES, source="GTSRB final training and test sets")


def cache(folder: Path) -> Path:
    """The cache in `folder`, downloaded on first use."""
    return imagefile.ensure(folder / "gtsrb.safetensors", make)
