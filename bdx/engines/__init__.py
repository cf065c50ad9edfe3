"""engines: where the cells of a sweep run. One file per engine, each with a class Engine (see base.py)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from bdx.engines.base import Engine
from bdx.errors import one_of


def engine(name: str, **how) -> Engine:
    """The engine of this name. how: slots (cells at a time on one device, null: the engine's choice), folder (for logs)."""
    one_of("engine", name, sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py") if p.stem not in ("base", "worker")))
    return import_module(f"bdx.engines.{name}").Engine(**how)
