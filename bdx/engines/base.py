"""What a sweep asks of an engine: take commands, give outcomes. A command is idempotent, so an engine may lose one.

An engine decides where and when a job runs, never what it is: the words are those of `bdx WORDS`, and the result is the
row that the command writes. Whether a cell is done is read from that file, not from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from bdx.errors import UserError


@dataclass(frozen=True)
class Job:
    """id: of the run. words: its command. alone: nothing else may run on the engine's devices meanwhile."""

    id: str
    words: tuple[str, ...]
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """state: done, refused (a user's mistake), failed (an error), memory (it ran out), died (its process is gone).
    reason: one line. seconds: from start to end; busy: of these, inside the run itself."""

    job: Job
    state: str
    reason: str = ""
    seconds: float = 0.0
    busy: float = 0.0


def package(name: str, engine: str) -> ModuleType:
    """Import what an engine is built on."""
    try:
        return import_module(name)
    except ImportError as e:
        hint = f"pip install 'bdx[{engine}]', in a checkout pip install -e '.[{engine}]'"
        raise UserError(f"engine={engine} needs the package {name}, which cannot be imported ({e}): {hint}") from None


class Engine(ABC):
    @abstractmethod
    def submit(self, job: Job) -> None:
        """Queue a job; returns at once."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Outcome]:
        """The outcomes that have arrived, each once; waits at most so long for the first."""

    @abstractmethod
    def running(self) -> list[Job]:
        """What has been started and not ended."""

    @abstractmethod
    def close(self) -> None:
        """Stop what runs, so that the same command goes on later, and leave no process behind."""
