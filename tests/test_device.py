"""Every attack, defense and detector runs on a device whose tensors, as a GPU's, cannot be mixed with those of the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BRIEF, CONF, TINY, names
from test_attacks import SMALL
from test_controlled import QUICK
from test_defenses import DEFENSES, short
from test_detectors import SHORT as SHORT_DETECTORS
from torch.utils import backend_registration

from bdx import info

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch knows no devices that are written in Python",
    ),
]
SCRIPT = Path(__file__).with_name("elsewhere.py")
FEW = [*TINY, "train.epochs=1", "dataset.reserved.count=50"]
ONCE = [*FEW, "attack=badnets", "attack.target=3", "attack.ratio=0.1"]
OF_ATTACKS = {name: [f"attack.{key}" for key in BRIEF[name]] for name in BRIEF} | QUICK
OF_ATTACKS |= {
    "adaptive_blend": ["attack.ratio=0.1", "attack.cover_ratio=0.1"],
    "badnets": ["attack.ratio=0.1"],
    "blind": ["attack.history=1"],
    "narcissus": ["attack.rounds=1", "attack.batch=8", "attack.lr=1.0"],
    "given": ["attack.file=NET"],
    "l0_invisible": ["dataset.source.size=32"],  # its nine pixels are placed by hand
    "refool": ["attack.reflections=8"],
    "multi": ["attack.parts=[{attack:badnets,target:0},{attack:blended,target:1}]"],
}


def attack(name: str) -> list[str]:
    own = [*OF_ATTACKS.get(name, []), *SMALL.get(name, [])]
    return [*FEW, f"attack={name}", *own, "defense=ft", "defense.epochs=1"]


def defense(name: str) -> list[str]:
    return [*ONCE, f"defense={name}", *short(name), *["defense.batch=64"] * (name == "dp")]


def detector(name: str) -> list[str]:
    file = CONF / "detector" / f"{name}.yaml"
    own = [f"detector.{k}={v}" for k, v in SHORT_DETECTORS.items() if info.value(file, k) is not None]
    return [*ONCE, f"detector={name}", "detector.limit=40", *own]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """said(kind, words, names)[name] -> (what went wrong, "" for nothing; where its training steps waited for the device)"""
    folder, heard = tmp_path_factory.mktemp("elsewhere"), {}

    def ask(kind: str, words, of: list[str]) -> dict[str, tuple]:
        if words not in heard:
            runs = json.dumps([[name, words(name)] for name in of])
            command = [sys.executable, str(SCRIPT), kind, str(folder), runs]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-2000:]
            lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
            heard[words] = {name: tuple(rest) for name, *rest in lines}
        return heard[words]

    return ask


@pytest.mark.parametrize("name", names("attack"))
def test_attack(name, said):
    assert said("run", attack, sorted(names("attack"), key=lambda n: n == "given"))[name] == ("", [])


@pytest.mark.parametrize("name", DEFENSES)
def test_defense(name, said):
    wrong, waits = said("run", defense, DEFENSES)[name]
    assert wrong == ""
    assert not waits or (name == "npd_code" and all("adversarial.py" in w for w in waits))  # whose PGD stops early


@pytest.mark.parametrize("name", names("detector"))
def test_detector(name, said):
    assert said("detect", detector, names("detector"))[name] == ("", [])
