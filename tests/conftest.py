"""Shared by all tests: tiny configurations, and a store that the slow tests share within one session."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from bdx.configure import CONF, compose, options
from bdx.screen import Screen

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # each of them gets one thread, and what it starts as well
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
TINY = ["dataset=digits", "dataset.source.size=16", "arch.width=8", "train=fast", "train.batch=64"]
TINY += ["train.precision=32-true", "logger=none"]
ROW = {  # a run's, with all that every row has
    "id": "0123456789abcdef", **dict.fromkeys(("dataset", "arch", "attack", "defense", "train"), "toy"), "seed": 0,
    **{f"{score}{when}": 0.5 for score in ("acc", "asr", "ra") for when in ("_before", "")}, "der": 0.5, "n_reserved": 100,
    "n_poisoned": 10, "seconds_attack": 1.0, "seconds_defense": 1.0, "device": "toy", "torch": "0", "backdoor": "b" * 16,
    "data_sha256": "0" * 64, "finished": "2026-11-20T00:00:00+00:00",
}  # fmt: skip


LONGEST = ("test_device", "test_run", "test_defenses", "test_sweep", "test_cli", "test_cnpd", "test_attacks")


def pytest_collection_modifyitems(items) -> None:
    """The files that take longest are begun first, or else one worker would end on them alone (--no-loadscope-reorder)."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def names(group: str) -> list[str]:
    """Every choice of a group, for tests that hold over all of them."""
    return options(group)


def target(group: str, name: str) -> str:
    """The class of a choice: its YAML's, or else that of the choice it starts from."""
    from omegaconf import OmegaConf

    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    return node.get("_target_") or target(group, node.defaults[0])


def made() -> list[str]:
    """The attacks whose trigger is made before the victim is trained; from their YAML alone, as composing all takes seconds."""
    from hydra.utils import get_class

    from bdx.attacks.made import Made

    return [name for name in names("attack") if issubclass(get_class(target("attack", name)), Made)]


def paths(root: Path) -> list[str]:
    return [f"paths.data={root / 'data'}", f"paths.out={root / 'out'}"]


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder for the whole session: the image cache is made once, a backdoor is trained once."""
    return tmp_path_factory.mktemp("bdx")


@pytest.fixture(scope="session")
def cell(shared):
    """cell(*overrides) -> the row of a tiny run in the shared folder."""
    from bdx.run import run

    return lambda *overrides: run(compose([*TINY, *paths(shared), *overrides]), Screen(quiet=True))


@pytest.fixture(scope="session")
def digits(shared):
    """ImageData of digits, 32×32: what the triggers are drawn for."""
    return load_digits(shared)


@pytest.fixture(scope="session")
def small(shared):
    """The same at 16×16, which a net passes in a third of the time: where it is the training that is tested."""
    return load_digits(shared, *TINY[:2])


def load_digits(root: Path, *overrides: str):
    from omegaconf import OmegaConf

    from bdx.datasets.base import load

    cfg = OmegaConf.to_container(compose(["dataset=digits", *overrides]).dataset, resolve=True)
    return load(cfg, root / "data", device=torch.device("cpu"), seed=0)


BRIEF = {
    "trojan": ["steps=3"],
    "lba": ["steps=2", "batch=8", "images=32"],
    "lf": ["passes=2", "images=20", "iterations=2"],
    "lc": ["steps=2"],
    "narcissus": ["rounds=1", "batch=8", "lr=0.1"],
    "ssba": ["steps=3", "width=2", "batch=8"],
}  # how little of a trigger's making is enough where its strength does not matter


def build_attack(digits, *overrides: str):
    """An attack with an untrained thin net on digits, equipped with what such a net gives."""
    from bdx.attacks.made import Made
    from bdx.backdoor import build_attack

    name = next((o.partition("=")[2] for o in overrides if o.startswith("attack=")), "badnets")
    brief = [f"attack.{key}" for key in BRIEF.get(name, [])]
    attack = build_attack(compose([*TINY, *brief, *overrides]), digits)
    if isinstance(attack, Made) and attack.wanting:
        attack.check(digits.train)
        net = copy.deepcopy(attack.net).eval().requires_grad_(False) if attack.surrogate else None
        attack.take(attack.make(digits, net, lambda *_: None)[0])
    return attack


@pytest.fixture
def quick_trainer():
    """make_trainer for the CPU that reports to nobody."""
    from bdx.training import make_trainer

    return partial(make_trainer, device=torch.device("cpu"), precision="32-true", seed=0, report=lambda *_: None)


__all__ = ["CONF", "ROOT", "ROW", "TINY", "build_attack", "load_digits", "made", "names", "paths", "target"]


@pytest.fixture(scope="module")
def no_rows_but_these(tmp_path_factory):
    """The rows that travel with bdx are others every week."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdx.tables.PACKAGED", tmp_path_factory.mktemp("packaged"))
        yield
