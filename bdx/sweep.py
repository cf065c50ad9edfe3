"""`bdx sweep`: a paper's table as commands. Expand the grid, skip what has a row, backdoors before defenses, collect.

The row files are the truth: starting a sweep again goes on where it was stopped, in whatever way it was.
"""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bdx import engines, files, grid, hardware, results
from bdx.composer import Composer
from bdx.engines.base import Engine, Job, Outcome
from bdx.engines.local import devices
from bdx.errors import UserError, nearest
from bdx.forecast import spoken
from bdx.grid import Cell
from bdx.plan import Plan, listed, overview, plan, show

OPTIONS = ("scale", "engine", "slots")
HELP = """bdx sweep: run what is missing of a paper's table

  bdx sweep                                      the tables, and how many of their cells can run
  bdx sweep PAPER/TABLE [scale=smoke|cpu|paper] [engine=local|slurm|ray] [engine.KEY=VALUE …] [key=value …] [--dry-run]

  --dry-run   show the plan and run nothing
  slots=N     is engine.slots=N
  key=value   goes to every cell; a list narrows or widens the grid: attack=badnets,blended seed=0,1,2

The row files are the truth: the same command again goes on where it was stopped. Engines, and their options with defaults:

"""
AGAIN = ("memory", "died")  # outcomes after which a cell is tried once more, alone


class Drive:
    """Submit each backdoor's first cell, the others when it is there; a cell whose process died is tried again, alone."""

    def __init__(self, plan: Plan, todo: list[Cell], engine: Engine):
        self.plan, self.engine = plan, engine
        self.cells = {c.run: c for c in todo}
        self.failed: dict[str, Outcome] = {}
        self.finished: list[Outcome] = []
        self.again: list[Outcome] = []
        self.leads: dict[str, int] = defaultdict(int)
        self.waiting: dict[str, list[Cell]] = defaultdict(list)
        for cell in sorted(todo, key=lambda c: c.at.get("defense") != "none"):  # an undefended cell is a backdoor, no more
            self.waiting[cell.backdoor].append(cell)
        for backdoor in list(self.waiting):
            self.release(backdoor, there=plan.stored(backdoor))

    def release(self, backdoor: str, there: bool) -> None:
        """Submit all that wait for a backdoor, or else the next cell that trains it; two may fail at that."""
        cells = self.waiting.pop(backdoor, [])
        if not there and self.leads[backdoor] < 2:
            cells, self.waiting[backdoor] = cells[:1], cells[1:]
            self.leads[backdoor] += 1
        elif not there:
            self.failed |= {c.run: Outcome(Job(c.run, c.words), "failed", "its backdoor failed twice") for c in cells}
            return
        for cell in cells:
            self.engine.submit(Job(cell.run, cell.words))

    @property
    def left(self) -> int:
        return len(self.cells) - len(self.finished) - len(self.failed)

    def step(self, seconds: float) -> list[Outcome]:
        """What has ended for good."""
        ended = []
        for outcome in self.engine.wait(seconds):
            job, cell = outcome.job, self.cells[outcome.job.id]
            if outcome.state == "done" and not results.find(self.plan.paths["results"], job.id):
                outcome = replace(outcome, state="failed", reason="it ended well but left no row")
            if outcome.state in AGAIN and not job.alone:
                self.engine.submit(replace(job, alone=True))
                self.again.append(outcome)
                continue
            if outcome.state == "done":
                self.finished.append(outcome)
            else:
                self.failed[job.id] = outcome
            ended.append(outcome)
            self.leads[cell.backdoor] -= outcome.state == "refused"  # it says nothing of the backdoor
            self.release(cell.backdoor, there=outcome.state == "done" or self.plan.stored(cell.backdoor))
        return ended


def follow(drive: Drive, console: Console) -> None:
    """Until nothing is left, with a bar on a terminal and a line per cell."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started, total = time.monotonic(), len(drive.cells)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        while drive.left:
            ended = drive.step(0.5)
            done = total - drive.left - len(ended)
            for o in (*drive.again, *ended):
                done += o in ended
                why = f"{': ' * bool(o.reason)}{o.reason}{'; it is tried again' * (o in drive.again)}"
                at = " ".join(f"{k}={v}" for k, v in drive.cells[o.job.id].at.items())
                bar.console.print(f"[{done}/{total}] {o.state} in {spoken(o.seconds)}  {at}{why}", soft_wrap=True, markup=False)
            drive.again.clear()
            eta = f", about {spoken((time.monotonic() - started) / done * drive.left)} left" if done else ""
            text = f"{len(drive.engine.running())} running, {len(drive.failed)} failed{eta}"
            bar.update(task, completed=done, description=text)


def sweep(argv: list[str]) -> int:
    """`bdx sweep NAME …`, as HELP says; without a name, what there is."""
    if {"-h", "--help"} & set(argv):
        print(HELP + engines.help(), end="")
        return 0
    name, options, words = words_of(argv, ("--dry-run",))
    say = (console := Console(highlight=False, soft_wrap=True)).print
    if name is None:
        if without := [a for a in argv if not a.startswith("scale=")]:
            raise UserError(f"{without[0]}: expected a table with it, such as npd2023/table01; `bdx sweep` alone lists them")
        return overview(options.get("scale", "cpu"), say)
    if "logger=wandb" in words and not any(w.startswith("logger.group=") for w in words):
        words = [*words, f"logger.group={name}"]  # W&B shows the cells of a table together
    kind = options.get("engine", "local")
    how = engines.options(kind, [w for w in argv if w.startswith(("engine.", "slots="))])
    composer, started = Composer(), time.monotonic()
    table, scale = grid.load(name), grid.scale(options.get("scale", "paper"))
    found = plan(table, scale, words, composer, fetch=not (dry := "--dry-run" in argv))
    todo = found.todo
    show(name, found, todo, composer, say)
    asked = {composer.plain(c.words)["train"]["precision"] for c in todo}
    if kind == "local" and devices() == [""] and (slow := max(map(hardware.bf16_emulated, asked), default="")):
        say(slow)
    if dry:
        listed(todo, say)
    if dry or not todo:
        say(f"planned in {time.monotonic() - started:.1f} s; its rows: bdx table {name} scale={scale.name}")
        return int(bool(found.without) and not dry)
    for place in (*["store"] * any(not found.stored(c.backdoor) for c in todo), "nets", "results"):
        files.writable(found.paths[place], f"paths.{place}, paths.out or BDX_OUT")
    runner = engines.engine(kind, **how, folder=found.paths["out"] / "sweep")
    try:
        follow(drive := Drive(found, todo, runner), console)
    finally:
        runner.close()
    return report(drive, argv, say) or int(bool(found.without))


def report(drive: Drive, argv: list[str], say) -> int:
    """What was done, and what failed, why, and how to try it again."""
    beside = [o.seconds - o.busy for o in drive.finished]
    tail = f"; {median(beside):.2f} s per cell beside the run itself" if beside else ""
    say(f"{len(drive.finished)} done, {len(drive.failed)} failed{tail}")
    for outcome in drive.failed.values():
        say(f"bdx: {outcome.state}: bdx {shlex.join(outcome.job.words)}\n  {outcome.reason}", markup=False)
    if drive.failed:
        say(f"to try them again: bdx sweep {shlex.join(argv)}", markup=False)
    return 1 if drive.failed else 0


def words_of(argv: Iterable[str], flags: tuple[str, ...]) -> tuple[str | None, dict[str, str], list[str]]:
    """(table, options, overrides)."""
    left = [a for a in argv if a not in flags]
    if unknown := [a for a in left if a.startswith("-")]:
        raise UserError(f"{unknown[0]}: no such flag{nearest(unknown[0], flags)}; there are {', '.join(flags)}")
    words = [a for a in left if "=" in a]
    names = [a for a in left if a not in words]
    if len(names) > 1:
        raise UserError(f"{names[1]}: expected one table, and {names[0]} is there already")
    options = {k: v for k, _, v in (w.partition("=") for w in words) if k in OPTIONS}
    left = [w for w in words if w.partition("=")[0] not in OPTIONS and not w.startswith("engine.")]
    return names[0] if names else None, options, left
