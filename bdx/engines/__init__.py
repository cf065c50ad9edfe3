"""engines: where the cells of a sweep run. One file per engine, each with a class Engine (see base.py).

Their options stand in experiments/engine/NAME.yaml, and on the command line as engine.KEY=VALUE.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from importlib import import_module
from typing import get_args, get_type_hints

import yaml

from bdx import grid
from bdx.engines.base import Engine
from bdx.errors import UserError, nearest, one_of

FOLDER = grid.EXPERIMENTS / "engine"
SPOKEN = {int: "a whole number", str: "a name", list: "[a, b]", dict: "{key: value}", types.NoneType: "null"}
FROM_0 = ("retries", "timeouts")  # all other numbers start at 1


def options(name: str, words: Iterable[str]) -> dict:
    """The options of an engine: its YAML under the user's engine.KEY=VALUE; slots=N is short for engine.slots=N.

    Raises UserError for what it cannot take.
    """
    one_of("engine", name, sorted(p.stem for p in FOLDER.glob("*.yaml")))
    found = grid.read(FOLDER / f"{name}.yaml")
    kinds = get_type_hints(import_module(f"bdx.engines.{name}").Engine.__init__)
    for key, _, text in (w.partition("=") for w in words):
        short = key.removeprefix("engine.")
        if short not in found:
            raise UserError(f"{key}: engine={name} has no such option{nearest(short, found)}; it has {', '.join(found)}")
        found[short] = value(key, text, kinds[short])
    return found


def value(key: str, text: str, kind):
    """The text as YAML reads it, if that is of this kind (a type, or several)."""
    kinds = get_args(kind) or (kind,)
    try:
        plain = str in kinds or (int in kinds and not text.isdecimal())  # 2:00 would be 120
        read = text if plain and text != "null" else yaml.safe_load(text)
    except yaml.YAMLError:
        read = text
    least = int(key.rpartition(".")[2] not in FROM_0)
    if type(read) not in kinds or (type(read) is int and read < least):
        spoken = " or ".join(SPOKEN[k] + (f" from {least}" if k is int else "") for k in kinds)
        raise UserError(f"{key}={text}: expected {spoken}")
    return read


def engine(name: str, **how) -> Engine:
    """The engine of this name. how: its options, and folder (where it may keep logs)."""
    return import_module(f"bdx.engines.{name}").Engine(**how)


def help() -> str:
    """Every engine with its options, as their YAML files say it."""
    texts = (p.read_text().removeprefix("# ").splitlines() for p in sorted(FOLDER.glob("*.yaml")))
    return "".join("\n    engine.".join([f"  engine={first}", *rest]) + "\n" for first, *rest in texts)
