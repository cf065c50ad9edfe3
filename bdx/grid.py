"""grid: a paper's table in experiments/ -> its cells, and the id of each. No torch in here.

A table's YAML holds the grid as Hydra's sweeper takes it, and how the paper's printed names read here; the CSV beside it
holds the printed numbers. A scale says what stands in place of the paper's data set and net, and how much shorter it runs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig

from bdx import checked, imagefile, recipe
from bdx.build import instantiate
from bdx.checked import naming, read
from bdx.composer import Composer, override, resolve
from bdx.configure import HERE, compose, options, summary
from bdx.declared import without_poison
from bdx.errors import UserError, nearest

EXPERIMENTS = next(p for p in (HERE / "experiments", HERE.parent / "experiments") if p.is_dir())
BESIDE = ("scale", "engine")  # folders in there that hold no tables
CANDIDATE = ("attack", "defense", "dataset", "arch", "train")  # groups whose choices may not be there yet


@dataclass(frozen=True)
class Table:
    """axes: key or group -> its values as words; printed: column of the CSV -> axis, or value -> {axis: value}. also: word of
    a cell, or several -> words that come with it. figure: what is drawn of the runs, a function of bdx.figures -> its
    options; empty: it is a table."""

    name: str
    title: str
    claim: dict
    average: str
    words: tuple[str, ...]
    axes: dict[str, tuple[str, ...]]
    printed: dict
    only_printed: bool
    rows: list[dict] = field(repr=False)
    figure: dict[str, dict] = field(default_factory=dict)
    also: dict[str, list[str]] = field(default_factory=dict)

    @property
    def of_picture(self) -> bool:
        """Whether the claim is about what a figure shows, and not about rows."""
        return bool(self.figure) and not set(self.claim["of"]) <= set(self.axes)


@dataclass(frozen=True)
class Scale:
    """words: before all others. replaces: groups of which a table's choice does not count. divide: ending of a key ->
    what the whole numbers there are divided by, at least 1 being left. at_most: axis -> the largest value it takes. also:
    word of a cell -> words that come with it."""

    name: str
    words: tuple[str, ...]
    replaces: tuple[str, ...]
    divide: dict[str, float]
    at_most: dict[str, int]
    also: dict[str, list[str]]


@dataclass(frozen=True)
class Cell:
    """at: axis -> value. words: its command. lacks: what bdx does not have, by name."""

    at: dict[str, str]
    words: tuple[str, ...]
    lacks: str | None = None
    run: str | None = None
    backdoor: str | None = None


def experiments(root: Path = EXPERIMENTS) -> list[str]:
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml") if p.parent.name not in BESIDE)


def tables(root: Path = EXPERIMENTS) -> list[str]:
    return [name for name in experiments(root) if name not in figures(root)]


def figures(root: Path = EXPERIMENTS) -> list[str]:
    return [name for name in experiments(root) if name.partition("/")[2].startswith("fig")]


def load(name: str, root: Path = EXPERIMENTS) -> Table:
    """Raises UserError for an unknown name or a malformed file."""
    if name not in (have := experiments(root)):
        near = nearest(name, have) or f"; there are {', '.join(have)}"
        raise UserError(f"{name}: no such table{near}")
    path = root / f"{name}.yaml"
    node, printed = read(path), path.with_suffix(".csv")
    rows = checked.numbers(printed) if printed.exists() else []
    with naming(path):
        checked.sheet(node)
        axes = {k: values(k, v) for k, v in node["hydra"]["sweeper"]["params"].items()}
        checked.claim(node, axes)
        checked.printed(node, axes, rows)
        return Table(
            name, summary(path).partition(": ")[2], node["claim"], node.get("average", checked.AVERAGES[0]),
            tuple(node.get("words", ())), axes, node.get("printed", {}), node.get("only_printed", False), rows,
            {k: dict(v or {}) for k, v in node.get("figure", {}).items()}, node.get("also", {}),
        )  # fmt: skip


def values(key: str, text) -> tuple[str, ...]:
    """a,b -> its values, each as it is written."""
    found = override(f"{key}={text}")
    if not found.is_sweep_override():
        return (found.get_value_element_as_str(),)
    try:
        return tuple(found.sweep_string_iterator())
    except HydraException:  # glob and interval
        raise UserError(f"{key}={text}: expected values that can be counted, a,b,c or range(from,to)") from None


def scale(name: str, root: Path = EXPERIMENTS) -> Scale:
    have = sorted(p.stem for p in (root / "scale").glob("*.yaml"))
    if name not in have:
        raise UserError(f"scale={name}: expected {', '.join(have)}{nearest(name, have)}")
    node = read(path := root / "scale" / f"{name}.yaml")
    with naming(path):
        checked.scale(node)
    return Scale(name, tuple(node["words"]), tuple(node["replaces"]), *(node[k] for k in ("divide", "at_most", "also")))


def key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def asked(table: Table, words: Iterable[str]) -> tuple[Table, list[str]]:
    """The table with those axes that the user's words name, and the words that are left."""
    axes, left = dict(table.axes), []
    for word in words:
        o = override(word)
        if o.key_or_group in axes or o.is_sweep_override():
            axes[o.key_or_group] = values(o.key_or_group, word.partition("=")[2])
        else:
            left.append(word)
    return replace(table, axes=axes, words=tuple(w for w in table.words if key(w) not in {*axes, *map(key, left)})), left


def cells(table: Table, scale: Scale, words: Iterable[str], composer: Composer) -> list[Cell]:
    """Every point of the grid, without ids. words: the user's."""
    table, left = asked(table, words)
    scale = replace(scale, also={k: [*table.also.get(k, ()), *scale.also.get(k, ())] for k in {*table.also, *scale.also}})
    replaced = {*scale.replaces} - {key(w) for w in words}  # the user's word wins
    axes = {k: (f"({scale.name})",) if k in replaced else v for k, v in table.axes.items()}
    wanted = [w for w in table.words if key(w) not in scale.replaces]
    found = []
    for point in itertools.product(*axes.values()):
        at = dict(zip(axes, point, strict=True))
        at_most = {k: min(int(v), scale.at_most[k]) for k, v in at.items() if k in scale.at_most and v.isdigit()}
        own = [f"{k}={v}" for k, v in (at | at_most).items() if k not in replaced]
        last = {key(w): w for w in (*scale.words, *wanted, *own, *left)}  # of two values for a key the later counts
        found.append(whole(Cell(at, tuple(last.values())), scale, composer))
    return found


def configured(table: Table, found: list[Cell], words: Iterable[str]) -> DictConfig | None:
    """The configuration of the first cell that can run, in which all words are checked; None: there is no such cell. Raises
    UserError where that is the user's mistake."""
    if first := next((c for c in found if not c.lacks), None):
        return compose(list(first.words))
    for cell in (c for c in found if "no such key" in c.lacks):
        compose(list(cell.words))  # says it better
    keys = [override(w).key_or_group for w in words]
    own = {f"{k}={v}" for k, w in zip(keys, words, strict=True) for v in values(k, w.partition("=")[2])}
    if all(own & set(c.lacks.split(", ")) for c in found):
        raise none_runs(table, found)
    return None


def none_runs(table: Table, found: list[Cell]) -> UserError:
    want = "; ".join(sorted({c.lacks for c in found})[:8]) or "printed numbers of such a cell"
    return UserError(f"{table.name}: no cell can run, for want of {want}")


@cache
def choices(group: str) -> frozenset[str]:
    return frozenset(options(group))


def whole(cell: Cell, scale: Scale, composer: Composer) -> Cell:
    """The cell with the words of its scale, or with what it lacks."""
    if lacks := [w for w in cell.words if key(w) in CANDIDATE and w.partition("=")[2] not in choices(key(w))]:
        return replace(cell, lacks=", ".join(lacks))
    given = {key(w) for w in cell.words}
    with_it = [w for of, more in scale.also.items() if set(of.split()) <= set(cell.words) for w in more]
    words = (*cell.words, *(w for w in with_it if key(w) not in given))
    try:
        plain = composer.plain(words)
    except UserError as e:
        return replace(cell, lacks=str(e))
    if without_poison(plain["attack"]["_target_"], plain["defense"]["_target_"]):
        of = next((w for w in words if key(w) == "attack"), "its attack")
        return replace(cell, lacks=f"a poisoned training set of {of}")
    if (file := plain["dataset"]["reserved"]["generated"]) and not Path(file).is_file():
        return replace(cell, lacks=f"dataset.reserved.generated={file}")
    given = {key(w) for w in words}
    short = [s for group in ("attack", "defense") for s in shorter(plain[group], group, scale.divide)]
    return replace(cell, words=(*words, *(f"{k}={n}" for k, n in short if k not in given)))


def shorter(node: dict, at: str, divide: dict) -> list[tuple[str, int]]:
    """(key, what is left of it) for every whole number in `node` whose key ends as one in `divide`; the longest counts."""
    found = []
    for name, value in node.items():
        here = f"{at}.{name}"
        if isinstance(value, dict):
            found += shorter(value, here, divide)
        ends = [e for e in divide if here.endswith((f".{e}", f"_{e}"))]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and ends:
            found.append((here, max(1, round(value / divide[max(ends, key=len)]))))
    return found


@cache
def images(source: str, folder: str) -> str:
    """SHA-256 of a data set; its cache is made if that is not done yet. source: JSON of the node that makes it."""
    folder = Path(resolve({"folder": folder})["folder"]).expanduser()
    return imagefile.header(instantiate(json.loads(source))(folder))["sha256"]


def sha256(plain: dict) -> str:
    return images(json.dumps(plain["dataset"]["source"]), plain["paths"]["data"])


def ids(words: tuple[str, ...], composer: Composer, data: str | None = None) -> tuple[str, str]:
    """(run, backdoor) of a command. data: SHA-256 of its images, if known."""
    plain = composer.plain(words)
    data = data or sha256(plain)
    plain = resolve({k: v for k, v in plain.items() if k not in ("paths", "logger", "trainer")})
    return recipe.digest(recipe.of_run(plain, data)), recipe.digest(recipe.of_backdoor(plain, data))


def run_ids(words: tuple[str, ...], composer: Composer, data: str, seeds: list[int | None]) -> list[str]:
    """The run's id under each seed; the configuration is put together once. None: the seed that the words name."""
    plain = composer.plain(words)
    plain = resolve({k: v for k, v in plain.items() if k not in ("paths", "logger", "trainer")})
    base = {k: v for k, v in recipe.of_run(plain, data).items() if k != "choice"}
    given = ({} if s is None else {"seed": s} for s in seeds)
    return [recipe.digest(base | s | recipe.choice(plain | s)) for s in given]
