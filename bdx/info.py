"""`bdx info`: what there is, in one line each. Reads YAML comments and source text; imports no method and no torch."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from omegaconf import OmegaConf

from bdx.configure import CONF, compose, options, summary
from bdx.declared import source
from bdx.errors import UserError, nearest
from bdx.grid import EXPERIMENTS

KINDS = {
    "attacks": "attack",
    "defenses": "defense",
    "detectors": "detector",
    "datasets": "dataset",
    "archs": "arch",
    "experiments": "experiment",
}


HELP = """bdx info: what there is, a line each

  bdx info [attacks|defenses|detectors|datasets|archs|experiments]   names, papers, what they need, train and cost
  bdx info layers [arch=NAME]                                        where a layer can be inserted in a net
  bdx info triggers [dataset=NAME]                                   norms, PSNR, SSIM of every trigger, and a picture"""


def value(path: Path, key: str):
    """`key` of a YAML file, or of the file that it starts from; None where it is in neither."""
    node = OmegaConf.load(path)
    if key in node:
        return node[key]
    first = next((d for d in node.get("defaults", []) if isinstance(d, str) and d != "_self_"), None)
    return value(path.parent / f"{first}.yaml", key) if first else None


def needs(kind: str, declared: dict) -> str:
    """What a user must have, in words."""
    if kind == "attack":
        if not declared.get("trained_here", True):
            return "needs a file of weights; no trigger is known"
        if not declared.get("has_trigger", True):
            return "clean training"
        label = "clean label" if declared.get("clean_label") else "dirty label"
        poison = "poisons data" if declared.get("leaves_poison", True) else "controls training, leaves no poisoned set"
        trigger = "sample-specific" if declared.get("sample_specific") else "static"
        origin = {"formula": "", "made": ", made before poisoning", "trained": ", trained with the victim"}
        return f"{label}, {poison}, {trigger} trigger{origin[declared.get('trigger_from', 'formula')]}"
    if kind == "defense":
        words = {"clean": "clean images", "train": "the poisoned training set"}
        asked = [words.get(n, str(n)) for n in sorted(declared.get("needs", {"clean"}))]
        return "needs " + (", ".join(asked + ["BatchNorm"] * bool(declared.get("needs_batchnorm"))) or "nothing")
    if kind == "detector":
        words = {"train": "the poisoned training set", "test": "test inputs", "net": "the net"}
        judges = " or ".join(words[j] for j in declared.get("judges", ("train",)))
        return f"judges {judges}" + (", needs clean images" if declared.get("needs") else "")
    return ""


def effort(path: Path, declared: dict) -> str:
    """What a defense trains, and what that costs, for how many epochs by default."""
    epochs = value(path, "epochs")
    known = {"trains ": declared.get("trains"), "costs ": declared.get("cost"), "epochs: ": epochs}
    return "; ".join(f"{word}{said}" for word, said in known.items() if said is not None)


def looks() -> dict[str, str]:
    """Attack -> size and visibility of its trigger, as the tables of `bdx info triggers` have it that travel with bdx."""
    found = {}
    for path in sorted((EXPERIMENTS / "results").glob("triggers_*.csv")):
        with open(path, newline="") as file:
            found |= {of["attack"]: f"{of['looks']} on {path.stem.partition('_')[2]}" for of in csv.DictReader(file)}
    return found


def rows(kind: str) -> list[tuple[str, str, str, str, str]]:
    """(name, what it is, what it needs, what it trains and costs, paper) for each choice of the group `kind`; an attack has
    what its trigger looks like in place of costs."""
    found, seen = [], looks() if kind == "attack" else {}
    for name in options(kind):
        path = CONF / kind / f"{name}.yaml"
        method = kind in ("attack", "defense", "detector")
        paper, declared = source(value(path, "_target_")) if method else ("", {})
        own = re.search(r"^# Source: (.+)$", path.read_text(), re.M)  # of a method that is a setting of another one
        paper = own.group(1) if own else paper
        said = needs(kind, declared), effort(path, declared) if kind == "defense" else seen.get(name, "")
        found.append((name, summary(path).removeprefix(f"{name}: "), *said, paper))
    return found


def layers(overrides: list[str]) -> int:
    """Every module of a net where a layer can be inserted, and the places by depth."""
    import torch

    from bdx.archs.base import build
    from bdx.places import places

    cfg = OmegaConf.to_container(compose(overrides), resolve=True)
    net = build(cfg["arch"], num_classes=10, shape=(3, 32, 32), **cfg["dataset"]["normalize"])
    found = places(net, torch.zeros(2, 3, 32, 32))
    by_name = {name: [d for d, n in found.items() if n == name] for name in found.values()}
    for name, module in net.body.named_modules():
        if name and next(module.children(), None) is None:
            print(f"{name:<39} {type(module).__name__:<20}{', '.join(by_name.get(f'body.{name}', []))}".rstrip())
    return 0


def info(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP)
        return 0
    if argv[:1] == ["layers"]:
        return layers(argv[1:])
    if argv and argv[0] not in KINDS:
        have = [*KINDS, "triggers", "layers"]
        raise UserError(f"bdx info {argv[0]}: expected one of {', '.join(have)}{nearest(argv[0], have)}")
    if argv[1:]:
        raise UserError(f"bdx info {argv[0]}: {argv[1]} means nothing to it; it lists all that there is")
    for title in argv[:1] or KINDS:
        found = rows(KINDS[title])
        wide = max(len(name) for name, *_ in found)
        print(f"{title}")
        for name, *rest in found:
            print(f"  {name:<{wide}}  {' · '.join(r for r in rest if r)}")
        if title == "attacks":
            print("L2, L∞, PSNR and SSIM, by which a trigger is called local or global, visible or not: `bdx info triggers`")
    return 0
