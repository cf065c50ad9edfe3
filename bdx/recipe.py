"""Configuration -> canonical dict -> id. No torch in here: a sweep knows a cell without starting it.

Identity is by exclusion: every key shapes the result unless PLUMBING says otherwise, so a key that somebody adds
tomorrow can never be forgotten (a debug run that poisons the store is how the other rule fails).
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from bdx.declared import source
from bdx.errors import UserError

VERSION = 1  # raise it when the meaning of a recipe changes, so that older artifacts are not taken for newer ones
DRAW = 2  # how the reserved images are drawn; 1 was the attacks' own permutation, so that all of them had been poisoned
CHOICE = 2  # how a dirty-label attack draws whom to poison at seed 0; 1 was the order of its victim's first epoch
PLUMBING = ("paths", "trainer", "logger", "eval", "hydra", "asked")
# later keys, and the value with which all is as before: no part of an id then
SINCE = {
    "made": None, "latent": 0.0, "zoom": 1.0, "generated": None, "wants": "all2one", "cutout": None, "away_from": "label",
    "per_image": False, "projector_norm": False,
}  # fmt: skip
CONTENT = ("file", "made", "generated")  # a user's files
BACKDOOR = ("dataset", "arch", "attack", "train", "seed")


def canonical(node, key: str = ""):
    """A plain, sorted, resolved form: 1.0 and 1 are one number, a user's file is its content and not its path."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        some = (k for k in sorted(node) if not (k in SINCE and node[k] == SINCE[k]))
        return {k: canonical(node[k], f"{key}.{k}".lstrip(".")) for k in some}
    if isinstance(node, (list, tuple)):
        return [canonical(v) for v in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    if key.rpartition(".")[2] in CONTENT and isinstance(node, str):
        if not Path(node).is_file():
            raise UserError(f"{key}={node}: {'that is a folder' if Path(node).is_dir() else 'there is no such file'}")
        stat = Path(node).stat()
        return f"sha256:{content(node, stat.st_size, stat.st_mtime_ns)}"
    return node


@cache
def content(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, read once for all cells of a sweep as long as size and time stay the same."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(recipe: dict) -> str:
    """16 hex digits (64 bits) of the SHA-256 of the canonical JSON."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identified(dataset: dict, sha256: str) -> dict:
    """The data set by the hash of its pixels and labels: where it came from (`source`) does not matter any more."""
    known = {k: v for k, v in dataset.items() if k != "source"} | {"sha256": sha256}
    return known | {"reserved": dataset["reserved"] | {"draw": DRAW}} if "reserved" in dataset else known


def choice(plain: dict) -> dict:
    """How the attack draws whom to poison, where that is not what it was at first."""
    says = source(plain["attack"].get("_target_"))[1]
    draws = plain["attack"].get("select") == "random" and says.get("leaves_poison", True) and not says.get("clean_label")
    return {"choice": CHOICE} if draws and plain["seed"] == 0 else {}


def resolved(cfg: DictConfig | dict) -> dict:
    """A sweep resolves its cells itself and brings a plain dict."""
    return cfg if isinstance(cfg, dict) else OmegaConf.to_container(cfg, resolve=True)


def of_run(cfg: DictConfig | dict, data_sha256: str) -> dict:
    """The recipe of one cell: everything but plumbing."""
    plain = resolved(cfg)
    recipe = {k: v for k, v in plain.items() if k not in PLUMBING}
    return canonical(recipe | {"dataset": identified(plain["dataset"], data_sha256), "version": VERSION} | choice(plain))


def of_detection(cfg: DictConfig, data_sha256: str) -> dict:
    """The recipe of one detection: backdoor, reserved images and detector; the defense of the configuration has no part."""
    recipe = of_run(cfg, data_sha256)
    drop = lambda node: {k: v for k, v in node.items() if k != "defense"}
    return drop(recipe) | ({"names": drop(recipe["names"])} if "names" in recipe else {})


def of_backdoor(cfg: DictConfig | dict, data_sha256: str) -> dict:
    """The recipe of the backdoored weights, shared by every defense of a row.

    Which images a defender may trust is part of it only where they are taken away from the victim.
    """
    plain = resolved(cfg)
    recipe = {k: plain[k] for k in BACKDOOR} | {"dataset": identified(plain["dataset"], data_sha256)}
    if recipe["dataset"]["reserved"]["source"] == "train":
        recipe["dataset"] = {k: v for k, v in recipe["dataset"].items() if k != "reserved"}
    return canonical(recipe | {"version": VERSION} | choice(plain))


def of_asset(cfg: DictConfig, data_sha256: str, shapeless: frozenset[str], surrogate: dict | None) -> dict:
    """The recipe of what an attack is made of: the training images, the clean net `surrogate` (its recipe), the seed, and
    the attack's keys but the `shapeless` ones, so that attacks that differ in those alone share it."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    attack = {k: v for k, v in plain["attack"].items() if k not in shapeless}
    reserved = identified(plain["dataset"], data_sha256)["reserved"]
    images = {"sha256": data_sha256} | ({"reserved": reserved} if reserved["source"] != "train" else {})
    about = {"asset": attack, "images": images, "surrogate": surrogate and digest(surrogate)}
    return canonical(about | {"seed": plain["seed"], "version": VERSION})


def differing(a: dict, b: dict, of: str = "") -> tuple[str, ...]:
    """key=value of b where a has another value, inner keys with dots; keys that one of them lacks do not count."""
    found: list[str] = []
    for k in sorted(a.keys() & b.keys()):
        if isinstance(a[k], dict) and isinstance(b[k], dict):
            found += differing(a[k], b[k], f"{of}{k}.")
        elif canonical(a[k], k) != canonical(b[k], k):
            found.append(f"{of}{k}={b[k]}")
    return tuple(found)


def in_order(word: str) -> str:
    """The same values in another order are the same table."""
    key, _, values = word.partition("=")
    return word if "[" in values or "{" in values else f"{key}={','.join(sorted(values.split(',')))}" if values else word
