"""`make readme`: the tables of README.md and of experiments/results/README.md, made from the rows that lie beside the latter,
between their markers. No torch in here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bdx import grid, results
from bdx.chosen import ours
from bdx.composer import Composer
from bdx.errors import UserError
from bdx.overview import MAKERS

MARKED = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
FILES = (Path("README.md"), Path("experiments/results/README.md"))


def written(text: str, rows: list[dict], composer: Composer) -> str:
    """`text` with every marked table made anew from `rows`."""
    found = ours(rows, composer)
    if unknown := {name for _, name, _ in MARKED.findall(text)} - set(MAKERS):
        raise UserError(f"<!-- table:{min(unknown)} -->: no such table; there are {', '.join(MAKERS)}")
    make = lambda name: MAKERS[name](*found, composer) if found[0] else "No row has been measured yet."
    return MARKED.sub(lambda m: f"{m[1]}{make(m[2])}\n{m[3]}", text)


def main(argv: list[str]) -> None:
    texts = {}
    for path in map(Path, argv or FILES):
        if not path.is_file():
            raise UserError(f"{path}: no such file; run this where README.md lies, or name the files")
        texts[path] = path.read_text()
    marked = {name for text in texts.values() for _, name, _ in MARKED.findall(text)}
    if lost := set(MAKERS) - marked:
        raise UserError(f"no file has a place for <!-- table:{min(lost)} -->; looked in {', '.join(map(str, texts))}")
    rows, composer = results.rows(grid.EXPERIMENTS / "results"), Composer()
    made = {path: written(text, rows, composer) for path, text in texts.items()}  # none is written where one is wrong
    for path, new in made.items():
        results.write_atomically(path, new)
        print(f"{path}: {'as it was' if new == texts[path] else 'tables made anew'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"bdx: error: {e}")
