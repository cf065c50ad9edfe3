"""The image cache: one safetensors file per data set (format bdx-images-1).

train_images uint8 (N,C,H,W) · train_labels int64 (N,) · test_images · test_labels [· further per-image tensors]
metadata, all strings: format, dataset, classes (JSON list), source, sha256 (of those four tensors' bytes, in this order)
The header is read without torch, so that a run's id is known before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from bdx import files
from bdx.errors import UserError

FORMAT = "bdx-images-1"
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


def header(path: Path) -> dict:
    """The file's metadata, with `shape` (C, H, W) and `sizes` (train, test) added. Raises UserError if it is no cache."""
    try:
        with open(path, "rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            if size > 1 << 24:
                raise ValueError("its header is absurdly long")
            head = json.loads(f.read(size))
        meta = dict(head.pop("__metadata__", {}))
        if meta.get("format") != FORMAT or not set(TENSORS) <= set(head):
            raise ValueError(f"format={meta.get('format')!r} instead of {FORMAT!r}")
        end = 8 + size + max(t["data_offsets"][1] for t in head.values())
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {end}: truncated?")
        meta |= {"classes": json.loads(meta["classes"]), "sha256": meta["sha256"]}
    except FileNotFoundError:
        raise UserError(f"{path} is not there; `bdx data prepare NAME` makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        raise UserError(f"{path} is not a bdx image cache ({e}); remove it and run `bdx data prepare NAME`") from None
    shape = tuple(head["train_images"]["shape"])
    return meta | {"shape": shape[1:], "sizes": (shape[0], head["test_images"]["shape"][0])}


def digest(arrays: dict) -> str:
    """SHA-256 of the four tensors' bytes, in the order of TENSORS. arrays: name -> numpy array."""
    import numpy as np

    sha = hashlib.sha256()
    for name in TENSORS:
        sha.update(np.ascontiguousarray(arrays[name]))
    return sha.hexdigest()


def write(path: Path, arrays: dict, *, dataset: str, classes: list[str], source: str, **extra: str) -> None:
    """Write the cache to a temporary name and rename it. arrays: name -> numpy array, at least those of TENSORS."""
    import numpy as np
    from safetensors.numpy import save_file

    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}  # safetensors writes memory order, not the array's
    meta = {"format": FORMAT, "dataset": dataset, "classes": json.dumps(classes), "source": source}
    meta |= {"sha256": digest(arrays), **extra}
    with files.whole(path) as tmp:
        save_file(arrays, tmp, metadata=meta)


def ensure(path: Path, make: Callable[[Path], None], fresh: Callable[[dict], bool] = lambda _: True) -> Path:
    """Return `path`, made by `make(path)` unless it is there and `fresh(header)`; a second process waits for the first."""
    if path.exists() and fresh(header(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if not (path.exists() and fresh(header(path))):
            make(path)
    return path
