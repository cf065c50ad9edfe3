"""Result rows: one small JSON file per measured cell, named by the run's id. The files are the truth; tables read them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bdx import files, imagefile, recipe
from bdx.build import instantiate

DONE = "this run is done; its row is shown (remove the row to run it again)"


def word(value) -> bool:
    return isinstance(value, str)


def whole(value) -> bool:
    return type(value) is int  # true is none


def amount(value) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def share(value) -> bool:
    """None: there is none to share, as of an ASR where nobody knows the trigger."""
    return value is None or (amount(value) and value <= 1)


# what every row has; other keys are the user's words, and what a method says of itself
NAMES = ("attack", "dataset", "arch", "train", "device", "torch", "backdoor", "data_sha256", "finished")
BOTH = dict.fromkeys(NAMES, word) | {"seed": whole, "n_reserved": whole, "seconds_attack": amount}
SCORES = ("acc_before", "asr_before", "ra_before", "acc", "asr", "ra", "der")
RUN = BOTH | {"defense": word, "n_poisoned": whole, "seconds_defense": amount} | dict.fromkeys(SCORES, share)
COUNTS = {"n": whole, "n_flagged": whole, "n_poisoned": whole}
DETECTION = BOTH | COUNTS | {"detector": word, "judged": word, "seconds": amount} | dict.fromkeys(("auc", "tpr", "fpr"), share)
SINCE = dict.fromkeys(("tpr", "fpr", "acc_reserved_before", "acc_reserved", "scrambled_asr_before", "scrambled_asr"), share)
METRICS = (*SCORES, *SINCE, "seconds_attack", "seconds_defense")  # of a run; SINCE: older rows lack these


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one, never half of it."""
    with files.whole(path) as tmp:
        tmp.write_text(text)


def path(folder: Path | str, id: str) -> Path:
    return Path(folder) / f"{id}.json"


def seal(sheet: Path) -> str:
    """The SHA-256 of the weights that `sheet` (net.json, meta.json) is of; empty where it is not at hand, or not whole."""
    try:
        return json.loads(sheet.read_text())["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def find(folder: Path | str, id: str) -> dict | None:
    """The row of this run or detection, or None; a file that is not whole, or holds something else, does not count."""
    try:
        row = json.loads(path(folder, id).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("id") != id:
        return None
    wanted = DETECTION if detects(row) else RUN | {k: fits for k, fits in SINCE.items() if k in row}
    return row if all(k in row and fits(row[k]) for k, fits in wanted.items()) else None


def detects(row: dict) -> bool:
    return row.get("kind") == "detection"


def finished(cfg: DictConfig) -> dict | None:
    """The row of this configuration, or None; needs no torch where the image cache exists."""
    return known(cfg, Path(cfg.paths.results).expanduser(), recipe.of_run)


def not_made(cfg: DictConfig, id: str) -> str:
    """What this command asks for besides the row, and only a run leaves; empty for nothing."""
    curve = Path(cfg.paths.nets).expanduser() / f"{id}.log" / "ORACLE_curve.csv"
    lacks = ["eval.oracle=true: no curve of it was kept"] if cfg.eval.oracle and not curve.exists() else []
    lacks += ["logger=wandb: nothing is sent again"] * ("wandb" in cfg.logger.get("_target_", "").lower())
    return "; ".join(lacks)


def known(cfg: DictConfig, folder: Path, of: Callable) -> dict | None:
    """The row in `folder` of what `of(cfg, sha256 of the data)` is the recipe, or None."""
    if not any(folder.glob("*.json")):  # no cache is made or downloaded only to learn that
        return None
    source = instantiate(OmegaConf.to_container(cfg.dataset.source, resolve=True))
    sha256 = imagefile.header(source(Path(cfg.paths.data).expanduser()))["sha256"]
    return find(folder, recipe.digest(of(cfg, sha256)))


def rows(*folders: Path | str) -> list[dict]:
    """All rows of several folders, each id once: of a folder named detections these, of any other its runs. Foreign files
    are left alone."""
    found = {}
    for folder in map(Path, reversed(folders)):
        here = (find(folder, p.stem) for p in sorted(folder.glob("*.json")))
        found |= {row["id"]: row for row in here if row and detects(row) == (folder.name == "detections")}
    return list(found.values())


def foreign(folder: Path | str) -> list[Path]:
    """JSON files that are no rows, or not whole."""
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
