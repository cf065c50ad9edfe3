"""The shape of the code base: floors, stems, signatures, budgets."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from conftest import CONF, ROOT, names
from omegaconf import OmegaConf

from bdx.configure import compose, summary

PACKAGE = ROOT / "bdx"
# floor 0 stands in one line: a file may use those before it
LINE = (
    "errors", "files", "split", "picture", "draws", "augment", "corruptions", "metrics", "polarizers", "conditioned", "decoder",
    "surgery", "sharpness", "pruning", "places", "isolation", "views", "contrastive", "sensitivity", "adversarial", "build",
    "configure", "declared", "recipe", "imagefile", "sources", "store", "results", "agreement", "layout", "page", "composer",
    "checked", "grid", "hardware",
)  # fmt: skip
FLOORS = (
    set(LINE),
    {"datasets", "archs", "training"},
    {"detectors"},
    {"attacks", "defenses"},
    {"evaluate", "tracking", "screen", "comparison"},
    {"backdoor", "oracle", "charts", "claims"},
    {"tables"},
    {"run", "info", "data", "forecast", "figures", "chosen"},
    {"worker", "overview"},
    {"shift", "readme"},
    {"engines", "triggers", "detection", "plates", "plan"},
    {"sweep", "multirun", "detect", "report"},
    {"dashboard"},
    {"cli"},
)  # fmt: skip
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [p for p in FILES if p.name != "__init__.py"]


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level: bool = False) -> list[str]:
    """Dotted names of everything imported; top_level: at import time only."""
    tree = ast.parse(path.read_text())
    found = []
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{a.name}" for a in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_below_or_its_own_base(path):
    own = place(path)
    for name in imports(path):
        if not name.startswith("bdx."):
            continue
        parts = name.split(".")
        other = parts[1]
        if other not in FLOOR:  # `from bdx import __version__`
            continue
        same_folder_base = other == own and len(parts) > 2 and (parts[2] == "base" or varies(path, parts[-1]))
        assert FLOOR[other] < FLOOR[own] or same_folder_base or floor_zero(own, other), f"{path.name} imports {name}"


def varies(path: Path, name: str) -> bool:
    """Whether a class of `path` inherits from a sibling's class, from whose file `name` may then come."""
    sibling = next(
        (n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
         and any(a.name == name for a in n.names)), "",
    )  # fmt: skip
    classes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
    parents = {ast.unparse(b) for c in classes for b in c.bases}
    return any(f"class {p}(" in import_module(sibling).__loader__.get_source(sibling) for p in parents)


def floor_zero(own: str, other: str) -> bool:
    """On floor 0 the files stand in one line."""
    return own in LINE and other in LINE and LINE.index(other) < LINE.index(own)


def test_lightning_is_imported_under_one_name():
    for path in FILES:
        assert not any(n == "lightning" or n.startswith("lightning.") for n in imports(path)), path


BEFORE_A_RUN = [
    "cli",
    "configure",
    "recipe",
    "results",
    "errors",
    "info",
    "detect",
    "grid",
    "tables",
    "sweep",
    "report",
    "plates",
    "dashboard",
    "readme",
    "data",
]


@pytest.mark.parametrize("module", BEFORE_A_RUN)
def test_what_runs_before_a_run_imports_no_torch(module):
    heavy = ("torch", "pytorch_lightning", "pandas", "wandb")
    code = f"import sys, bdx.{module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@cache
def node_of(group: str, name: str):
    return compose([f"{group}={name}"])[group]


def method_of(group: str, name: str):
    """The class that `group=name` builds."""
    target = node_of(group, name)._target_
    module, _, attribute = target.rpartition(".")
    return getattr(import_module(module), attribute)


def arguments(cls) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a constructor, followed up through **common to the bases."""
    found, mro = {}, [c for c in cls.__mro__ if "__init__" in vars(c)]
    for c in mro:
        parameters = inspect.signature(c.__init__).parameters
        found |= {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY and k not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return found
    return found


GIVEN_BY_RUN = {"attack": {"shape", "num_classes", "recipe", "seed"}, "defense": set(), "detector": set()}


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GIVEN_BY_RUN for n in names(g)])
def test_yaml_and_constructor_agree(group, name):
    cls, node = method_of(group, name), node_of(group, name)
    wanted = arguments(cls)
    assert set(wanted) - GIVEN_BY_RUN[group] == set(node) - {"_target_"}
    for key, parameter in wanted.items():
        assert parameter.default is parameter.empty, f"{key}: values live in the YAML, not in Python"
        if parameter.annotation == "float":
            assert isinstance(node[key], float), f"{key}: written as {node[key]!r}, a float needs a decimal point"


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GIVEN_BY_RUN for n in names(g)])
def test_same_stem_in_conf_and_package(group, name):
    target = node_of(group, name)._target_
    _, folder, stem, _ = target.split(".")
    assert folder == f"{group}s"
    if not (name == stem or name.startswith(f"{stem}_")):  # a variant that was published under a name of its own
        assert OmegaConf.load(CONF / group / f"{name}.yaml").defaults[0] == stem
    assert any(other == stem or other.startswith(f"{stem}_") for other in names(group))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_says_what_it_is_and_stays_short(path):
    assert summary(path), f"{path} has no comment line that says what it is"
    assert len(path.read_text().splitlines()) <= 30
    OmegaConf.load(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_budgets(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 250
    if place(path) in ("attacks", "defenses", "detectors"):
        assert len(lines) <= 200
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} is too long"
    assert ast.get_docstring(ast.parse("\n".join(lines))), "no module docstring"


def test_functions_are_short():
    lengths = sorted(
        n.end_lineno - n.lineno + 1
        for p in MODULES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)
    )  # fmt: skip
    assert lengths[int(0.9 * len(lengths))] <= 25


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_weights_are_read_safely(path):
    text = path.read_text()
    assert "pickle" not in text or "pickle" in (ast.get_docstring(ast.parse(text)) or "")
    for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        if name == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
        if name.endswith("load_state_dict"):
            assert not any(k.arg == "strict" for k in call.keywords)


def test_a_defense_never_imports_an_attack():
    for path in (PACKAGE / "defenses").glob("*.py"):
        assert not any(n.startswith("bdx.attacks") for n in imports(path)), path


@pytest.mark.parametrize("preset", names("experiment"))
def test_every_preset_composes(preset):
    assert compose([f"experiment={preset}"]).names.train
