"""declared: what a method's class and module say of it, read from source text. Imports no method and no torch."""

from __future__ import annotations

import ast
import re
from functools import cache

from bdx.configure import HERE

DECLARED = (
    "clean_label", "leaves_poison", "has_trigger", "sample_specific", "trigger_from", "trained_here", "needs",
    "needs_batchnorm", "trains", "cost", "judges",
)  # fmt: skip


@cache
def source(dotted: str | None) -> tuple[str, dict]:
    """(the paper named in the module's docstring, the constants that its class declares or inherits) for a target in bdx."""
    if not dotted or not dotted.startswith("bdx."):
        return "", {}
    *module, name = dotted.split(".")[1:]
    if not (path := HERE.joinpath(*module).with_suffix(".py")).is_file():
        return "", {}  # whoever builds it says so
    tree = ast.parse(path.read_text())
    paper = re.search(r"Source: (.+?)(?:;|\n\n|\.?$)", (ast.get_docstring(tree) or "") + "\n\n", re.DOTALL)
    if not (made := next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)):
        return "", {}
    homes = {a.name: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    inherited = {}
    for parent in (b.id for b in made.bases if isinstance(b, ast.Name)):
        inherited |= source(f"{homes.get(parent, dotted.rpartition('.')[0])}.{parent}")[1]
    own = {s.targets[0].id: constant(s.value) for s in made.body if isinstance(s, ast.Assign) and s.targets[0].id in DECLARED}
    return " ".join(paper.group(1).split()) if paper else "", inherited | own


@cache
def without_poison(attack: str, defense: str) -> bool:
    """Whether the defense's class works on the poisoned training set, and the attack's class leaves none; run.check says it
    to the user of one cell."""
    of, by = source(attack)[1], source(defense)[1]
    return "train" in by.get("needs", ()) and of.get("has_trigger", True) and not of.get("leaves_poison", True)


def constant(node: ast.expr):
    """A literal, or the literal inside frozenset(…)."""
    if isinstance(node, ast.Call):
        return ast.literal_eval(node.args[0]) if node.args else set()
    return ast.literal_eval(node)
