"""Composer: configurations that share most of their nodes, each node composed once. No torch in here.

Hydra takes 0.1 s for a configuration, and a tenth of that for a node. A grid of 8 attacks, 9 defenses and 3 seeds has 216
configurations, but 17 such nodes and one shell.
"""

from __future__ import annotations

import copy
import re
from functools import cache

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from bdx.configure import CONF, NAMED, compose, groups, named, parse
from bdx.errors import UserError, nearest

APART = ("attack", "defense", "detector")  # groups whose choice shapes their own node and nothing else
WHOLE = re.compile(r"\$\{([\w.]+)\}")


@cache
def override(word: str) -> Override:
    """Raises UserError, naming the word."""
    try:
        return parse([word])[0]
    except UserError as e:
        raise UserError(f"{word}: {e}") from None


@cache
def keys(of: str) -> frozenset[str]:
    """At the top of a YAML in conf/; none where there is no such file."""
    path = CONF / f"{of}.yaml"
    return frozenset(yaml.safe_load(path.read_text()) or {}) if path.is_file() else frozenset()


class Composer:
    """plain(words) is what configure.compose(words) composes, as a dict with `names`, without checks of type."""

    def __init__(self):
        self.seen: dict[tuple[str, ...], tuple[dict, dict]] = {}
        self.groups = groups()

    def node(self, words: tuple[str, ...]) -> tuple[dict, dict]:
        """(the configuration as a plain dict, what was chosen in each group) for words that choose."""
        if words not in self.seen:
            try:
                with initialize_config_dir(str(CONF), version_base="1.3"):
                    cfg = hydra_compose("config", list(words), return_hydra_config=True)
            except HydraException as e:
                raise UserError(str(e).splitlines()[0]) from None
            choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                del cfg["hydra"]
            self.seen[words] = OmegaConf.to_container(cfg), choices
        return self.seen[words]

    def apart(self, group: str, word: str, shell: tuple[str, ...]) -> tuple[dict, str]:
        """(the node of a group in APART, its choice): from its own YAML alone, unless a preset in `shell` has keys for it."""
        name = override(word).value()
        presets = [override(w).value() for w in shell if override(w).key_or_group == "experiment"]
        if word != f"{group}={name}" or any(group in keys(f"experiment/{p}") for p in presets):
            found, choices = self.node((*shell, word))
            return found[group], choices[group]
        if (word,) not in self.seen:
            try:
                with initialize_config_dir(str(CONF), version_base="1.3"):
                    self.seen[word,] = OmegaConf.to_container(hydra_compose(f"{group}/{name}")), {group: name}
            except HydraException as e:
                raise UserError(str(e).splitlines()[0]) from None
        found, choices = self.seen[word,]
        return found[group], choices[group]

    def plain(self, words: tuple[str, ...]) -> dict:
        """Interpolations are left as they are. Raises UserError for a key that is not there."""
        asked = [override(w) for w in words]
        chosen = {o.key_or_group: w for o, w in zip(asked, words, strict=True) if o.key_or_group in self.groups}
        shell = tuple(w for g, w in chosen.items() if g not in APART)
        found, choices = self.node(shell)
        found, choices = copy.deepcopy(found), dict(choices)
        for group in APART:
            if group in chosen:
                of, choices[group] = self.apart(group, chosen[group], shell)
                found[group] = copy.deepcopy(of)
        for o in asked:
            if o.key_or_group not in chosen:
                put(found, o)
        if "parts" in found["attack"]:  # each is a configuration of its own
            found = OmegaConf.to_container(compose(list(words)))
            del found["asked"]
            return found
        return found | {"names": {g: choices[g] for g in (*NAMED, "detector") if choices.get(g)}}

    def config(self, words: tuple[str, ...]) -> DictConfig:
        """The same as configure.compose(words), for words that are known to be right."""
        plain = self.plain(words)
        if "parts" in plain["attack"]:
            return compose(list(words))
        names = plain.pop("names")
        return named(OmegaConf.create(plain), names, list(words))


def put(found: dict, o: Override) -> None:
    """Set one value in a nested dict, as Hydra does: a mapping is merged key by key."""
    *above, last = o.key_or_group.split(".")
    node = found
    for key in above:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or not (last in node or o.is_add() or o.is_force_add()):
        near = nearest(last, node) if isinstance(node, dict) else ""
        raise UserError(f"{o.key_or_group}: no such key in {'.'.join(above) or 'the configuration'}{near}")
    if o.is_delete():
        del node[last]
    else:
        node[last] = merged(node.get(last), o.value())


def merged(old, new):
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{k: merged(old.get(k), v) for k, v in new.items()}}
    return new


def resolve(plain: dict) -> dict:
    """Interpolations that are a whole value, such as ${attack.target}, looked up here; any other is OmegaConf's."""

    def look(node):
        if isinstance(node, dict):
            return {k: look(v) for k, v in node.items()}
        if isinstance(node, list):
            return [look(v) for v in node]
        if isinstance(node, str) and "${" in node:
            key = WHOLE.fullmatch(node)
            if not key:
                raise KeyError(node)
            value = plain
            for part in key[1].split("."):
                value = value[part]
            return look(value)
        return node

    try:
        return look(plain)
    except (KeyError, TypeError):
        return OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
