"""checked: an experiment's files, read and held against what they must say: of the YAML its keys, its axes, and what the claim
and `printed` name of these; of the CSV beside it its columns and numbers. No torch in here."""

from __future__ import annotations

import csv
import math
from contextlib import contextmanager
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bdx.composer import override
from bdx.configure import show
from bdx.errors import UserError, nearest
from bdx.results import METRICS

KEYS = {"defaults", "claim", "average", "words", "hydra", "printed", "only_printed", "figure", "also"}
CLAIM = {"says", "metric", "of", "above", "below"}
SCALE = ("words", "replaces", "divide", "at_most", "also")
AVERAGES = ("of_averages", "of_rows")
COLUMNS = ("dataset", "model", "poison_ratio", "clean_ratio", "attack", "defense", "metric", "value", "variant")
PAIRS = "{axis: value}"


def read(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """A YAML file with what it starts from. above: the files that start from it."""
    try:
        node = yaml.safe_load(path.read_text())
        if not isinstance(node, dict):
            raise ValueError("it is no mapping")
        first = [d for d in node.pop("defaults", []) if d != "_self_"]
        if len(first) > 1 or path in above:
            raise ValueError("its defaults lead back to it" if path in above else "defaults: expected one file to start from")
        base = read(path.parent / f"{first[0]}.yaml", (*above, path)) if first else {}
        return OmegaConf.to_container(OmegaConf.merge(base, node))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{path} is malformed: {' '.join(str(e).split())}") from None


@contextmanager
def naming(path: Path):
    """What is wrong in a file, with its name."""
    try:
        yield
    except (KeyError, ValueError) as e:
        text = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e)
        raise UserError(f"{path} is malformed: {text}") from None


def expect(fits: bool, key: str, value, wanted: str) -> None:
    """Raises ValueError; what was found is shown in one line, and cut."""
    if not fits:
        raise ValueError(f"{key}: expected {wanted}, found {' '.join(show(value).split())[:60]}")


def single(value) -> bool:
    return isinstance(value, (str, int, float))


def number(value) -> float | None:
    """Also as text; None where it is none, or no finite one."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def pairs(value) -> bool:
    return isinstance(value, dict) and all(map(single, value.values()))


def known(key: str, names, what: str, where: str) -> None:
    if key not in names:
        raise ValueError(
            f"{where}{key}: no such {what}{nearest(str(key), map(str, names))}; there are {', '.join(map(str, names))}"
        )


def sheet(node: dict) -> None:
    """The YAML's keys, and that each has a value of its kind."""
    claim = node["claim"]
    expect(isinstance(claim, dict), "claim", claim, "a mapping with says, metric, of, and above or below")
    for known_, found in ((KEYS, node), (CLAIM, claim)):
        if unknown := [k for k in found if k not in known_]:
            raise ValueError(f"{unknown[0]}: no such key{nearest(str(unknown[0]), known_)}")
    if len({"above", "below"} & set(claim)) != 1 or not {"says", "metric", "of"} <= set(claim):
        raise ValueError("claim needs says, metric, of, and above or below")
    if node.get("average", AVERAGES[0]) not in AVERAGES:
        raise ValueError(f"average={node['average']}: expected {' or '.join(AVERAGES)}")
    words("words", node.get("words", []))
    also(node.get("also", {}))
    expect(isinstance(node.get("only_printed", False), bool), "only_printed", node.get("only_printed"), "true or false")
    drawn = node.get("figure", {})
    fits = isinstance(drawn, dict) and all(v is None or isinstance(v, dict) for v in drawn.values())
    expect(fits, "figure", drawn, "a mapping, {function of bdx.figures: {option: value}}")
    axes = node["hydra"]
    for key in ("sweeper", "params"):
        axes = axes.get(key) if isinstance(axes, dict) else None
    fits = isinstance(axes, dict) and axes and all(isinstance(k, str) and single(v) for k, v in axes.items())
    expect(fits, "hydra.sweeper.params", axes, "the axes of the grid, key: a,b,c")


def words(key: str, found) -> None:
    """A list of key=value, each with one value."""
    expect(isinstance(found, list), key, found, "a list of key=value")
    for word in found:
        expect(isinstance(word, str) and "=" in word, key, word, "key=value")
        expect(not override(word).is_sweep_override(), key, word, "one value; several are an axis, in hydra.sweeper.params")


def claim(node: dict, axes: dict[str, tuple[str, ...]]) -> None:
    """Of rows it names axes, their values and a metric that there are; what a figure's own data hold is not known here."""
    told = node["claim"]
    of_rows = not node.get("figure") or (isinstance(told["of"], dict) and set(told["of"]) <= set(axes))
    expect(isinstance(told["says"], str), "claim.says", told["says"], "a sentence")
    expect(isinstance(told["metric"], str), "claim.metric", told["metric"], "a word")
    for side in (s for s in ("of", "above", "below") if s in told):
        where, bare = told[side], side != "of" and not isinstance(told[side], str) and number(told[side]) is not None
        expect(bare or pairs(where), f"claim.{side}", where, PAIRS if side == "of" else f"a number or {PAIRS}")
        for axis, value in () if bare or not of_rows else where.items():
            known(axis, axes, "axis", f"claim.{side}.")
            fits = any(str(value) == v or number(value) == number(v) is not None for v in axes[axis])
            expect(fits, f"claim.{side}.{axis}", value, f"one of {', '.join(axes[axis])}")
    if of_rows:
        known(told["metric"], METRICS, "metric", "claim.metric=")


def printed(node: dict, axes: dict, rows: list[dict]) -> None:
    """Column of the CSV -> axis, or printed value -> what it is on our axes."""
    columns = {"arch", *COLUMNS} | {p.partition("=")[0] for row in rows for p in row["variant"].split(";") if p}
    fixed = {w.partition("=")[0].lstrip("+~") for w in node.get("words", [])}
    found = node.get("printed", {})
    expect(isinstance(found, dict), "printed", found, f"a mapping, {{column: axis}} or {{column: {{printed value: {PAIRS}}}}}")
    for column, to in found.items():
        fits = isinstance(to, str) or (isinstance(to, dict) and all(map(pairs, to.values())))
        expect(fits, f"printed.{column}", to, f"an axis or {{printed value: {PAIRS}}}")
        if rows:
            known(column, sorted(columns), "column", "printed.")
        for axis in [to] if isinstance(to, str) else [axis for at in to.values() for axis in at]:
            known(axis, [*axes, *fixed], "axis", f"printed.{column}: ")


def also(found) -> None:
    """Word of a cell -> words that come with it."""
    expect(isinstance(found, dict), "also", found, "a mapping, {word of a cell: [key=value, …]}")
    for word, more in found.items():
        words(f"also.{word}", more)


def scale(node: dict) -> None:
    words("words", node["words"])
    for key, kind, wanted in zip(SCALE, (list, list, dict, dict, dict), ("list", "list", *["mapping"] * 3), strict=True):
        expect(isinstance(node[key], kind), key, node[key], f"a {wanted}")
    for key in ("divide", "at_most"):
        expect(all((number(v) or 0) > 0 for v in node[key].values()), key, node[key], "numbers above 0")
    also(node["also"])


def numbers(path: Path) -> list[dict]:
    """The lines of a CSV of printed numbers. Raises UserError, naming the line."""
    try:
        lines = csv.DictReader(path.read_text().splitlines(), strict=True)
        rows = [(lines.line_num, row) for row in lines]
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{path} is no CSV: {' '.join(str(e).split())}") from None
    if lost := [c for c in COLUMNS if c not in (lines.fieldnames or ())]:
        raise UserError(f"{path}: no column {lost[0]}; expected {', '.join(COLUMNS)}")
    if not rows:
        raise UserError(f"{path}: nothing stands below its head; expected a printed number on each line")
    for n, row in rows:
        if None in row or None in row.values():
            have = sum(v is not None for k, v in row.items() if k) + len(row.get(None, ()))
            raise UserError(f"{path}, line {n}: {have} fields; expected {len(lines.fieldnames)}, as its head has")
        if number(row["value"]) is None:
            raise UserError(f"{path}, line {n}: value={row['value']}: expected a number")
    return [row for _, row in rows]
