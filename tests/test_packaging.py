"""What is installed from a wheel that was built from the sdist works from any folder, without the repository.

Needs hatchling (from here or from a package index) and uv or pip; the test says what was missing where it is skipped.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, names

import bdx
from bdx.configure import groups

pytestmark = pytest.mark.slow


def installer() -> list[str]:
    """The words of `install --target` for this interpreter."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return [sys.executable, "-m", "pip", "install", "--quiet"]
    pytest.skip("neither uv nor pip is here")


def importable(name: str, folder: Path | None = None) -> bool:
    env = os.environ | ({"PYTHONPATH": str(folder)} if folder else {})
    return subprocess.run([sys.executable, "-c", f"import {name}"], env=env, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> dict:
    """An environment in which hatchling can be imported."""
    if importable("hatchling.build"):
        return dict(os.environ)
    folder = tmp_path_factory.mktemp("hatchling")
    got = subprocess.run([*installer(), "--target", folder, "hatchling"], capture_output=True, text=True, timeout=300)
    if got.returncode or not importable("hatchling.build", folder):
        pytest.skip(f"hatchling is not here and could not be had: {got.stderr.strip()[-200:]}")
    return os.environ | {"PYTHONPATH": str(folder)}


def build(kind: str, source: Path, out: Path, env: dict) -> Path:
    """Call the build hook of pyproject.toml's back-end in `source`: what `python -m build` does, without a network."""
    code = f"import hatchling.build as b; print(b.build_{kind}({str(out)!r}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(backend, tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"), backend)


@pytest.fixture(scope="module")
def wheel(sdist, backend, tmp_path_factory) -> Path:
    """Built from the unpacked sdist, so that nothing of the repository can slip in."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    return build("wheel", next(folder.iterdir()), tmp_path_factory.mktemp("wheel"), backend)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel in a folder of its own; torch and the others are those of this environment."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([*installer(), "--no-deps", "--target", folder, wheel], check=True, timeout=300)
    return folder


def python(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("BDX_")}
    env |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def below(folder: Path) -> set[str]:
    """Paths of all files in `folder` that git would keep."""
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)) for p in files}


def test_the_sdist_holds_the_sources_and_no_outputs(sdist):
    with tarfile.open(sdist) as tar:
        inside = {name.split("/", 1)[1] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "PKG-INFO", "bdx/cli.py", "conf/config.yaml", "tests/conftest.py"} <= inside
    assert {f"conf/{f}" for f in below(ROOT / "conf")} <= inside
    assert {f"experiments/{f}" for f in below(ROOT / "experiments")} <= inside
    assert not [f for f in inside if f.startswith(("outputs", "data/", ".venv", "wandb"))]


def test_the_wheel_holds_package_configuration_and_experiments_and_nothing_else(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"bdx/{f}" for f in below(ROOT / "bdx")} <= inside
    assert {f"bdx/conf/{f}" for f in below(ROOT / "conf")} <= inside
    assert {f"bdx/experiments/{f}" for f in below(ROOT / "experiments")} <= inside
    assert "bdx/conf/config.yaml" in inside
    assert {f.split("/")[0] for f in inside} == {"bdx", f"bdx-{bdx.__version__}.dist-info"}
    assert not [f for f in inside if "test" in Path(f).name or "__pycache__" in f]


def test_the_wheel_declares_the_command_and_its_version(wheel):
    with zipfile.ZipFile(wheel) as z:
        entry = configparser.ConfigParser()
        entry.read_string(z.read(f"bdx-{bdx.__version__}.dist-info/entry_points.txt").decode())
        meta = z.read(f"bdx-{bdx.__version__}.dist-info/METADATA").decode()
    assert dict(entry["console_scripts"]) == {"bdx": "bdx.cli:main"}
    assert f"\nVersion: {bdx.__version__}\n" in meta
    assert "\nRequires-Dist: torch" in meta


def test_the_installed_package_reads_its_own_configuration(installed, tmp_path):
    ran = python(installed, tmp_path, "-c", "import bdx.configure as c; print(c.__file__); print(c.CONF)")
    assert ran.stdout.split() == [str(installed / "bdx" / "configure.py"), str(installed / "bdx" / "conf")], ran.stderr


def test_help_lists_the_same_choices_when_installed(installed, tmp_path):
    ran = python(installed, tmp_path, "-c", "from bdx.cli import main; main(['--help'])")
    assert ran.returncode == 0, ran.stderr
    lines = {words[0]: words[1:] for words in map(str.split, ran.stdout.splitlines()) if words}
    assert {g: lines[g] for g in groups()} == {g: names(g) for g in groups()}


def test_the_configuration_is_composed_when_installed(installed, tmp_path):
    ran = python(installed, tmp_path, "-m", "bdx.cli", "experiment=demo", "--cfg", "job")
    assert ran.returncode == 0, ran.stderr
    assert yaml.safe_load(ran.stdout)["dataset"]["name"] == "digits"


def test_the_installed_command_starts(installed, tmp_path):
    ran = python(installed, tmp_path, str(installed / "bin" / "bdx"), "attack=badnet")
    assert ran.returncode == 2
    assert ran.stderr.startswith("bdx: error: attack=badnet: no such attack (did you mean badnets")


def test_info_reads_the_installed_sources(installed, tmp_path):
    ran = python(installed, tmp_path, "-m", "bdx.cli", "info", "attacks")
    assert ran.returncode == 0, ran.stderr
    assert "Barni et al. 2019" in ran.stdout


def test_a_cell_runs_from_the_installed_package(installed, tmp_path):
    words = ["dataset=digits", "dataset.source.size=16", "arch.width=8", "train=fast", "train.epochs=1", "attack=badnets"]
    ran = python(installed, tmp_path, "-m", "bdx.cli", *words, "defense=none", "logger=none")
    assert ran.returncode == 0, ran.stderr
    assert len(list((tmp_path / "outputs" / "results").glob("*.json"))) == 1
