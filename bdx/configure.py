"""compose: overrides -> the configuration of one run, checked. No torch in here.

A mistyped key or choice is answered with the nearest that exists, a value of the wrong type with the type expected.
"""

from __future__ import annotations

from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bdx.errors import UserError, nearest

HERE = Path(__file__).resolve().parent
CONF = next(p for p in (HERE / "conf", HERE.parent / "conf") if (p / "config.yaml").is_file())
NAMED = ("dataset", "arch", "attack", "defense", "train")


def options(group: str) -> list[str]:
    """What may stand behind `group=`; base.yaml is what the others have in common and no choice of its own."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem != "base")


def groups() -> list[str]:
    return sorted(p.name for p in CONF.iterdir() if p.is_dir())


def summary(path: Path) -> str:
    """The first comment line of a YAML file says what it is."""
    lines = (line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")


def flat(node, prefix: str = "") -> dict:
    """Dotted key -> value, without interpolations resolved; a null, a list or an empty mapping is a leaf."""
    if isinstance(node, DictConfig) and not node._is_none() and len(node):
        found = {}
        for key in node:
            child = node._get_node(key)
            here = f"{prefix}{key}"
            found[here] = None
            found |= flat(child, f"{here}.") if isinstance(child, DictConfig) else {here: child}
        return found
    return {prefix.rstrip("."): node} if prefix else {}


def parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as e:
        raise UserError(f"{str(e).splitlines()[0]}; expected key=value, such as attack=badnets or attack.ratio=0.05") from None


def check_choice(o: Override) -> None:
    if o.value() is None or o.is_sweep_override():
        return
    name, have = str(o.value()), options(o.key_or_group)
    if name not in have:
        raise UserError(f"{o.key_or_group}={name}: no such {o.key_or_group}{nearest(name, have)}; there are {', '.join(have)}")


def check_key(o: Override, known: dict) -> None:
    """The key must be there, and the value of the kind that stands there by default."""
    if o.is_add() or o.is_force_add():
        return
    if o.key_or_group not in known:
        here = o.key_or_group.split(".")[0]
        where = "" if here in groups() or here in known else f"; groups are {', '.join(groups())}"
        raise UserError(
            f"{o.key_or_group}: no such key{nearest(o.key_or_group, [*known, *groups()])}{where}; `bdx … --cfg job` prints all"
        )
    node = known[o.key_or_group]
    default = None if node is None or node._is_interpolation() or node._is_none() else node._value()
    if o.is_delete() or o.is_sweep_override() or default is None:
        return
    value, kind = o.value(), type(default)
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool),
        str: value is None or not isinstance(value, (list, dict, bool)),
    }.get(kind, isinstance(value, list) or not isinstance(node, ListConfig))
    if not fits and value is not None:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        raise UserError(f"{o.key_or_group}={o.get_value_element_as_str()}: expected {words.get(kind, 'a list')}, as {default}")


def check(overrides: list[str]) -> None:
    """Raises UserError for whatever is wrong in `overrides`; call inside an initialised Hydra."""
    parsed = [o for o in parse(overrides) if not o.key_or_group.startswith("hydra")]
    chosen = [o for o in parsed if o.key_or_group.lstrip("/") in groups()]
    for o in chosen:
        check_choice(o)
    lines = [o.input_line for o in chosen if not o.is_sweep_override()]
    known = flat(hydra_compose("config", lines))
    for o in parsed:
        if o not in chosen:
            check_key(o, known)


def named(cfg: DictConfig, choices: dict, overrides: list[str]) -> DictConfig:
    """cfg with `names` (what was chosen in each group) and `asked` (the values given by hand), for the result row."""
    values = {o.key_or_group: o.value() for o in parse(overrides) if not o.is_sweep_override()}
    asked = {k: v for k, v in values.items() if k not in groups() and not k.startswith(("hydra", "paths", "trainer", "logger"))}
    with open_dict(cfg):
        cfg.names = {g: choices[g] for g in NAMED}
        cfg.asked = asked
    return cfg


def compose(overrides: list[str]) -> DictConfig:
    """The configuration of one run. Raises UserError for unknown keys, choices and types, naming the nearest."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check(overrides)
        try:
            cfg = hydra_compose("config", overrides, return_hydra_config=True)
            choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                del cfg["hydra"]
            named(cfg, choices, overrides)
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as e:
            raise UserError(str(e).splitlines()[0]) from None
    return cfg
