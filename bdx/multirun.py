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
    words = [a for a in argv if "=" in a and not a.startswith(("-", "hydra", f"+{name.partition('/')[0]}="))]
    size = next((w.partition("=")[2] for w in words if grid.key(w) == "scale"), "paper")
    table = grid.load(name)
    cells = grid.cells(table, grid.scale(size), [w for w in words if grid.key(w) != "scale"], Composer())
    cells = printed_cells(table, cells) if table.only_printed and table.rows else cells
    if lacks := sorted({c.lacks for c in cells if c.lacks}):
        print(f"bdx: missing: {sum(bool(c.lacks) for c in cells)} cells, for want of {'; '.join(lacks)}", file=sys.stderr)
    if not (runnable := list(dict.fromkeys(c.words for c in cells if not c.lacks))):
        raise UserError(f"{name}: no cell can run")
    home = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    home.bdx = sys.modules["hydra_plugins.bdx"] = sys.modules[__name__]
    Plugins.instance().register(Cells)
    Cells.cells = runnable
    return runnable, ["-m", *(a for a in argv if a.startswith("hydra")), "hydra.sweeper._target_=hydra_plugins.bdx.Cells"]
