"""What a run shows in the terminal: progress while it works, a table at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

HEAD = ("ACC", "ASR", "RA")
NARROW = 130  # columns of a terminal below which a table would cut its numbers off


class Screen:
    """Epochs as a bar on a terminal; elsewhere as a line now and then, so that a log file stays readable."""

    def __init__(self, quiet: bool = False):
        self.console, self.quiet = Console(highlight=False), quiet
        if not self.console.is_terminal:
            self.console.width = 180  # a log file wraps nothing
        self.bar: Progress | None = None
        self.stage, self.said = "", 0.0

    def say(self, text: str) -> None:
        if not self.quiet:
            (self.bar.console if self.bar else self.console).print(text, soft_wrap=True)

    def epoch(self, stage: str, epoch: int, epochs: int, means: dict, seconds: float) -> None:
        if self.quiet:
            return
        if self.console.is_terminal:
            self.advance(stage, epoch, epochs, means)
            return
        if epoch in (1, epochs) or time.monotonic() - self.said > 5:
            left = (epochs - epoch) * seconds
            tail = f", about {left:.0f} s left" if epoch < epochs else ""
            loss = f", loss {means['loss']:.4f}" if means else ""
            self.say(f"{stage}: {'epoch' if means else 'part'} {epoch}/{epochs}{loss}, {seconds:.1f} s{tail}")
            self.said = time.monotonic()

    def advance(self, stage: str, epoch: int, epochs: int, means: dict) -> None:
        if self.bar is None or stage != self.stage:
            self.close()
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[loss]}"), console=self.console)
            self.task = self.bar.add_task(stage, total=epochs, loss="")
            self.stage = stage
            self.bar.start()
        self.bar.update(self.task, completed=epoch, loss=f"loss {means['loss']:.4f}" if means else "")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def table(self, rows: list[dict]) -> None:
        """Before and after, in percent, with everything that makes the number checkable; on a narrow terminal in lines."""
        self.close()
        if self.narrow:
            for row in rows:
                self.say(in_words(row))
            return
        table = Table(title=None)
        for name in ("data set", "arch", "attack", "defense", "seed"):
            table.add_column(name)
        for when in ("before", "after"):
            for name in HEAD:
                table.add_column(f"{name}\n{when}", justify="right")
        for name in ("DER", "attack s", "defense s"):
            table.add_column(name, justify="right")
        for row in rows:
            before = (percent(row[f"{n.lower()}_before"]) for n in HEAD)
            after = (percent(row[n.lower()]) for n in HEAD)
            names = (str(row[k]) for k in ("dataset", "arch", "attack", "defense", "seed"))
            times = (f"{row['seconds_attack']:.1f}", f"{row['seconds_defense']:.1f}")
            table.add_row(*names, *before, *after, percent(row["der"]), *times)
        self.console.print(table)

    @property
    def narrow(self) -> bool:
        return self.console.is_terminal and self.console.width < NARROW

    def places(self, **paths: Path) -> None:
        """Where things lie; what was not made is not named."""
        for name, path in paths.items():
            if path.exists():
                self.say(f"{name:<9}{path}")


def in_words(row: dict) -> str:
    """A row as two or three lines of less than 80 columns."""
    scores = (f"{n} {percent(row[f'{n.lower()}_before'])} → {percent(row[n.lower()])}" for n in HEAD)
    return (
        f"{row['attack']} on {row['dataset']}, {row['arch']}, {row['defense']}, seed {row['seed']}\n"
        f"  {', '.join(scores)}; DER {percent(row['der'])}\n"
        f"  attack {row['seconds_attack']:.1f} s, defense {row['seconds_defense']:.1f} s"
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
