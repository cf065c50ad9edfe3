"""Result rows: one small JSON file per measured cell, named by the run's id. The files are the truth; tables read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bdx import files, imagefile, recipe
from bdx.build import instantiate

DONE = "this run is done; its row is shown (remove the row to run it again)"


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one, never half of it."""
    with files.whole(path) as tmp:
        tmp.write_text(text)


def path(folder: Path | str, id: str) -> Path:
    return Path(folder) / f"{id}.json"


def find(folder: Path | str, id: str) -> dict | None:
    """The row of this run, or None; a file that is not whole does not count."""
    try:
        row = json.loads(path(folder, id).read_text())
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and row.get("id") == id else None


def finished(cfg: DictConfig) -> dict | None:
    """The row of this configuration, or None; needs no torch where the image cache exists."""
    return known(cfg, Path(cfg.paths.results).expanduser(), recipe.of_run)


def known(cfg: DictConfig, folder: Path, of: Callable) -> dict | None:
    """The row in `folder` of what `of(cfg, sha256 of the data)` is the recipe, or None."""
    if not any(folder.glob("*.json")):  # no cache is made or downloaded only to learn that
        return None
    source = instantiate(OmegaConf.to_container(cfg.dataset.source, resolve=True))
    sha256 = imagefile.header(source(Path(cfg.paths.data).expanduser()))["sha256"]
    return find(folder, recipe.digest(of(cfg, sha256)))


def rows(*folders: Path | str) -> list[dict]:
    """All rows of several folders, each id once; foreign files are left alone."""
    found = {p.stem: find(folder, p.stem) for folder in reversed(folders) for p in sorted(Path(folder).glob("*.json"))}
    return [row for row in found.values() if row]


def foreign(folder: Path | str) -> list[Path]:
    """JSON files that are no whole rows."""
    return [p for p in sorted(Path(folder).glob("*.json")) if find(folder, p.stem) is None]


def write(folder: Path | str, row: dict) -> dict:
    """Write the row last of all, by rename: a row that exists stands for a run that ended well."""
    write_atomically(path(folder, row["id"]), json.dumps(row, indent=1) + "\n")
    return row


def collect(folder: Path | str):
    """All rows as a pandas DataFrame; foreign files are left alone."""
    import pandas as pd

    rows = (find(folder, p.stem) for p in sorted(Path(folder).glob("*.json")))
    return pd.DataFrame([{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows if row])
