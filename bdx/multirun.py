"""`bdx -m +PAPER=TABLE`: a table's cells as an ordinary Hydra multirun, with any launcher. No resume, no plan: see sweep.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from bdx import grid
from bdx.comparison import printed_cells
from bdx.composer import Composer
from bdx.errors import UserError


class Cells(Sweeper):
    """The jobs are the cells of a table, which need not be a product of axes. Hydra gives what stands in its sweeper node."""

    __module__ = "hydra_plugins.bdx"  # under no other name does Hydra take a plugin
    cells: Sequence[tuple[str, ...]] = ()

    def __init__(self, max_batch_size: int | None = None, params: dict | None = None):
        self.launcher = None

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list:
        return [self.launcher.launch([list(words) for words in self.cells], initial_job_idx=0)]


def table_of(argv: list[str]) -> str | None:
    """npd2023/table01 of the word +npd2023=table01."""
    papers = {name.partition("/")[0] for name in grid.tables()}
    words = (a[1:].split("=", 1) for a in argv if a.startswith("+") and "=" in a)
    return next((f"{k}/{v}" for k, v in words if k in papers), None)


def cells_of(name: str, argv: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """(the words of each cell, what is left of argv for Hydra); what cannot run is named on stderr."""
    given = [a for a in argv if a not in ("-m", "--multirun", f"+{name.replace('/', '=', 1)}")]
    hydras = [a for a in given if a.lstrip("+~").startswith(("hydra.", "hydra/"))]
    words = [a for a in given if a not in hydras and grid.key(a) != "scale"]
    if unknown := [a for a in words if "=" not in a or a.startswith("-")]:
        raise UserError(
            f"{unknown[0]}: expected key=value beside a table; `bdx sweep {name} --dry-run` shows it and runs nothing"
        )
    if "logger=wandb" in words and not any(w.startswith("logger.group=") for w in words):
        words.append(f"logger.group={name}")  # as `bdx sweep`
    table, size = grid.load(name), next((w.partition("=")[2] for w in given if grid.key(w) == "scale"), "paper")
    cells = grid.cells(table, grid.scale(size), words, Composer())
    grid.configured(table, cells, words)  # says what is wrong in them
    cells = printed_cells(table, cells) if table.only_printed and table.rows else cells
    if not (runnable := list(dict.fromkeys(c.words for c in cells if not c.lacks))):
        raise grid.none_runs(table, cells)
    if lacks := sorted({c.lacks for c in cells if c.lacks}):
        print(f"bdx: missing: {sum(bool(c.lacks) for c in cells)} cells, for want of {'; '.join(lacks)}", file=sys.stderr)
    home = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    home.bdx = sys.modules["hydra_plugins.bdx"] = sys.modules[__name__]
    Plugins.instance().register(Cells)
    Cells.cells = runnable
    return runnable, ["-m", *hydras, "hydra.sweeper._target_=hydra_plugins.bdx.Cells"]
