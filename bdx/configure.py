"""compose: overrides -> the configuration of one run, checked. No torch in here.

A mistyped key or choice is answered with the nearest that exists, a value of the wrong type with the type expected.
"""

from __future__ import annotations

import math
from functools import lru_cache
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
PLUMBING = ("hydra", "paths", "trainer", "logger", "eval")  # keys that are no part of what is asked
OPTIONAL = ("schedule",)  # mappings in whose place null may stand


def options(group: str) -> list[str]:
    """What may stand behind `group=`; base.yaml is what the others have in common and no choice of its own."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml") if p.stem != "base")


def choice(group: str, name: str) -> DictConfig:
    """conf/<group>/<name>.yaml with what it starts from; without Hydra, which is busy in the middle of a multirun."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    parents = [choice(group, parent) for parent in node.pop("defaults", []) if parent != "_self_"]
    return OmegaConf.merge(*parents, node)


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
            found |= {here: None} | (flat(child, f"{here}.") if isinstance(child, DictConfig) else {here: child})
        return found
    return {prefix.rstrip("."): node} if prefix else {}


def parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as e:
        raise UserError(f"{str(e).splitlines()[0]}; expected key=value, such as attack=badnets or attack.ratio=0.05") from None


def values_of(o: Override) -> list:
    """The value, or all values of a sweep a,b,c; ranges and globs are Hydra's to expand."""
    return list(o.value().list) if o.is_choice_sweep() else [] if o.is_sweep_override() else [o.value()]


def check_choice(o: Override) -> None:
    group, have = o.key_or_group, options(o.key_or_group)
    if o.package is not None:
        raise UserError(f"{o.input_line}: a group has one place and takes no @; expected {group}=…, of {', '.join(have)}")
    if o.is_add() or o.is_force_add():
        raise UserError(f"{o.input_line}: every group is there already; expected {o.input_line.lstrip('+')}")
    if o.is_delete():
        raise UserError(f"~{group}: a run needs one; there are {', '.join(have)}")
    for value in values_of(o):
        if str(value) not in have and not (value is None and group == "experiment"):
            name = show(value)
            raise UserError(f"{group}={name}: no such {group}{nearest(name, have)}; there are {', '.join(have)}")


def foreign(key: str, cfg: DictConfig) -> bool:
    """Whether `key` stands among the arguments of something that is not ours, which may know more keys than the YAML."""
    parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else None
    return isinstance(parent, DictConfig) and not str(parent.get("_target_", "bdx.")).startswith("bdx.")


def check_key(o: Override, known: dict, cfg: DictConfig) -> None:
    """The key must be there, and the value of the kind that stands there by default."""
    key = o.key_or_group
    if not key or o.package is not None:
        raise UserError(f"{o.input_line}: expected key=value")
    for value in values_of(o):
        check_finite(key, value)
    adds = o.is_add() or o.is_force_add()
    if (adds or o.is_delete()) and foreign(key, cfg):
        return
    if key not in known:
        where = "" if key.split(".")[0] in {*groups(), *known} else f"; groups are {', '.join(groups())}"
        near = nearest(key, [*known, *groups()])
        raise UserError(f"{key}: no such key{near}{where}; `bdx … --cfg job` prints all")
    if o.is_delete():
        raise UserError(f"{o.input_line}: {key} is needed and cannot be taken away")
    for value in values_of(o):
        check_value(key, value, cfg, adds)


def check_finite(key: str, value) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: expected a finite number")
    for child in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        check_finite(key, child)


def check_value(key: str, value, cfg: DictConfig, adds: bool) -> None:
    """The value must be of the kind that stands there by default; of a mapping this holds key by key."""
    default = OmegaConf.select(cfg, key)
    if not (fits := kind(value, default))[1]:
        raise UserError(f"{key}={show(value)}: expected {fits[0]}, as {show(default)}")
    if key == "seed" and not 0 <= value < 2**31:
        raise UserError(f"seed={value}: expected 0 to {2**31 - 1}")
    if not isinstance(default, DictConfig) or (value is None and key.rpartition(".")[2] in OPTIONAL):
        return
    if not isinstance(value, dict):
        raise UserError(f"{key}={show(value)}: expected a mapping, with the keys {', '.join(default)}")
    for child, one in value.items():
        here = f"{key}.{child}"
        if child in default:
            check_value(here, one, cfg, adds)
        elif not (adds and foreign(here, cfg)):
            raise UserError(f"{here}: no such key{nearest(child, list(default))}; {key} has {', '.join(default)}")


def kind(value, default) -> tuple[str, bool]:
    """What is expected where `default` stands, and whether `value` is."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, ListConfig):
        if len({type(one) for one in default}) == 1:
            of = kind(None, default[0])[0]
            return f"a list, each {of}", isinstance(value, list) and all(kind(one, default[0])[1] for one in value)
        return "a list", isinstance(value, list)
    kinds = {
        bool: ("true or false", isinstance(value, bool)),
        int: ("a whole number", whole),
        float: ("a number", whole or isinstance(value, float)),
        str: ("a word", value is not None and not isinstance(value, (list, dict, bool))),
    }
    return kinds.get(type(default), ("a value", True))


def show(value) -> str:
    """As it is written in an override."""
    if isinstance(value, (list, ListConfig)):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, (dict, DictConfig)):
        return f"{{{','.join(f'{k}:{show(v)}' for k, v in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check(overrides: list[str]) -> None:
    """Raises UserError for whatever is wrong in `overrides`; call inside an initialised Hydra."""
    parsed = [o for o in parse(overrides) if not o.key_or_group.startswith("hydra")]
    chosen = [o for o in parsed if o.key_or_group.lstrip("/") in groups()]
    for o in chosen:
        check_choice(o)
    values = [o for o in parsed if o not in chosen]
    for lines in variants(chosen) if values else ():
        for o in values:
            check_key(o, *defaults(tuple(lines)))


@lru_cache(maxsize=256)
def defaults(choices: tuple[str, ...]) -> tuple[dict, DictConfig]:
    """(every key, the configuration) of a choice in each group; call inside an initialised Hydra, and change nothing."""
    cfg = hydra_compose("config", list(choices))
    return flat(cfg), cfg


def variants(chosen: list[Override]) -> list[list[str]]:
    """The choices to check keys against: the first of each group, and every other of one group at a time."""
    first = {o.key_or_group: values_of(o)[0] for o in chosen if values_of(o)[:1] not in ([], [None])}
    swept = [first | {o.key_or_group: v} for o in chosen for v in values_of(o)[1:]]
    return [[f"{k}={v}" for k, v in choice.items()] for choice in [first, *swept]]


def one_of(overrides: list[str]) -> list[str]:
    """The first cell of a grid, without Hydra's own keys."""
    cell = []
    for o in parse(overrides):
        if o.is_choice_sweep() or o.is_range_sweep():
            cell.append(f"{o.get_key_element()}={next(o.sweep_string_iterator())}")
        elif not o.is_sweep_override() and not o.key_or_group.startswith("hydra"):
            cell.append(o.input_line)
    return cell


def named(cfg: DictConfig, choices: dict, overrides: list[str]) -> DictConfig:
    """cfg with `names` (what was chosen in each group) and `asked` (the preset, and the values given by hand), for the row."""
    values = {o.key_or_group: o.value() for o in parse(overrides) if not o.is_sweep_override()}
    with open_dict(cfg):
        cfg.names = {g: choices[g] for g in (*NAMED, "detector") if choices.get(g)}
        kept = lambda k: k == "experiment" or (k not in groups() and not k.startswith(PLUMBING))
        cfg.asked = {k: v for k, v in values.items() if kept(k)}
        if "parts" in cfg.attack:
            cfg.attack.parts = [unfold(part, cfg.attack) for part in cfg.attack.parts]
    return cfg


def unfold(part: DictConfig, whole: DictConfig) -> dict:
    """One part of attack=multi, {attack: NAME, key: value, …}, as that attack's configuration, to be built later. What it does
    not say itself it takes from `whole`; of the ratio, its share. Call inside an initialised Hydra."""
    shown = f"attack.parts, {show(part)}"
    if not isinstance(part, DictConfig) or not isinstance(part.get("attack"), str):
        raise UserError(f"{shown}: expected {{attack: NAME, target: 0, …}}, with any keys of that attack")
    common = {k: v for k, v in whole.items() if k not in ("_target_", "parts")} | {"ratio": whole.ratio / len(whole.parts)}
    keys = common | {k: v for k, v in part.items() if k != "attack"}
    words = [f'attack.{k}="{v}"' if isinstance(v, str) else f"attack.{k}={show(v)}" for k, v in keys.items()]
    try:
        check(words := [f"attack={part.attack}", *words])
    except UserError as e:
        raise UserError(f"{shown}: {e}") from None
    made = hydra_compose("config", words).attack
    if "parts" in made:
        raise UserError(f"{shown}: several in several; expected attacks with one trigger each")
    return {**OmegaConf.to_container(made, resolve=True), "_partial_": True}


def compose(overrides: list[str]) -> DictConfig:
    """The configuration of one run. Raises UserError for unknown keys, choices and types, naming the nearest."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check(overrides)
        if swept := [o.input_line for o in parse(overrides) if o.is_sweep_override()]:
            raise UserError(f"{swept[0]}: several values make a grid, which is `bdx -m …`; a list is written [a,b]")
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
