"""Store: id -> files, made once, whole or not at all; safe against crashes and parallel runs."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdx import files, recipe

SEAL = "sheet_sha256"


@dataclass(frozen=True)
class Artifact:
    """tensors: name -> Tensor on the CPU. meta: recipe, versions, commit, sha256 and what `make` reported."""

    id: str
    path: Path
    tensors: dict[str, Tensor]
    meta: dict


@cache
def provenance() -> dict:
    """Versions and commit of what is running."""
    found = {"python": platform.python_version()}
    for name in ("bdx", "torch", "torchvision", "pytorch-lightning", "hydra-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found | {"commit": commit(Path(__file__)) or "unknown"}


def commit(file: Path) -> str:
    """Of the checkout that `file` is tracked in; empty where it lies in none, or there is no git. A repository around an
    environment that bdx is installed in says nothing of bdx."""
    ask = lambda *words: subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, text=True, check=False)
    try:
        tracked = not ask("ls-files", "--error-unmatch", file.name).returncode
        return ask("describe", "--always", "--dirty", "--abbrev=12").stdout.strip() if tracked else ""
    except OSError:
        return ""


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_folder(path: Path, tensors: dict[str, Tensor], meta: dict, *, weights: str, sheet: str) -> None:
    """Write `weights` (safetensors) and `sheet` (JSON, with the checksums of both) into a new folder, then rename it."""
    with files.whole(path) as tmp:
        tmp.mkdir()
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, tmp / weights)
        meta = meta | {"sha256": file_sha256(tmp / weights)}
        (tmp / sheet).write_text(json.dumps(meta | {SEAL: sheet_sha256(meta)}, indent=1, sort_keys=True))


def sheet_sha256(meta: dict) -> str:
    """Of what a sheet says: its canonical JSON, without this checksum itself."""
    said = json.loads(json.dumps({k: v for k, v in meta.items() if k != SEAL}))
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unaltered(meta: dict) -> bool:
    """Whether a sheet says what was written. Older sheets carry the weights' checksum alone, and are believed; a second
    one under another name is this checksum, its name altered."""
    if SEAL in meta:
        return meta[SEAL] == sheet_sha256(meta)
    return not any(isinstance(v, str) and len(v) == 64 for k, v in meta.items() if k != "sha256")


class Store:
    """A folder of artifacts, each named by the id of its recipe."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def find(self, id: str) -> Artifact | None:
        """The artifact, or None if it is missing, truncated or altered (its checksums tell)."""
        path = self.root / id
        try:
            meta = json.loads((path / "meta.json").read_text())
            if not unaltered(meta) or meta["sha256"] != file_sha256(path / "weights.safetensors"):
                return None
            return Artifact(id, path, load_file(path / "weights.safetensors"), meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def get_or_make(self, spec: dict, make: Callable[[Path], tuple[dict[str, Tensor], dict]]) -> Artifact:
        """Return the artifact of recipe `spec`; if it is not there, `make(checkpoint)` -> (tensors, facts) makes it.

        Of N processes that ask at once, one makes it and the others wait. `checkpoint` is a path where `make` may
        keep what it needs to go on after being killed; it is removed once the artifact stands.
        """
        id = recipe.digest(spec)
        checkpoint = self.root / f".{id}.ckpt"
        found = self.find(id)
        if found is None:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{id}.lock"):
                found = self.find(id) or self.make(id, spec, make, checkpoint)
        if checkpoint.exists():  # a process was killed between the two
            checkpoint.unlink(missing_ok=True)
        return found

    def make(self, id: str, spec: dict, make: Callable, checkpoint: Path) -> Artifact:
        """Make the artifact and write it; called under its lock, so what lies about here was left by a killed process."""
        files.sweep(self.root / id, locked=True)
        tensors, facts = make(checkpoint)
        meta = {"recipe": spec, "versions": provenance(), **facts}
        save_folder(self.root / id, tensors, meta, weights="weights.safetensors", sheet="meta.json")
        return self.find(id)
