"""What an attack is made of: made once, kept in the store, shared between attacks and with clean training."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import hydra
import hydra.utils
import numpy as np
import pytest
import torch
from conftest import CONF, TINY, build_attack, made, paths, target
from omegaconf import OmegaConf
from PIL import Image

import bdx.backdoor
import bdx.run
from bdx import recipe
from bdx.configure import choice, compose
from bdx.errors import UserError
from bdx.figures.stored import Stored
from bdx.store import Store

CELL = [*TINY, "train.epochs=1", "train.batch=128", "defense=none"]
TROJAN = ["attack=trojan", "attack.steps=3"]
SCORES = ("acc", "asr", "ra")


def run(root: Path, *overrides: str) -> dict:
    return bdx.run.run(compose([*CELL, *paths(root), *overrides]))


def kept(root: Path) -> set[str]:
    return {p.name for p in (root / "out" / "store").glob("*") if not p.name.startswith(".")}


def find(root: Path, id: str):
    return Store(root / "out" / "store").find(id)


@pytest.fixture(scope="module")
def trojan(tmp_path_factory):
    """(folder, row) of a cell that trained its surrogate, made its trigger and trained its backdoor."""
    root = tmp_path_factory.mktemp("made")
    return root, run(root, *TROJAN)


def asset(root: Path):
    (found,) = (a for a in (find(root, id) for id in kept(root)) if "asset" in a.meta["recipe"])
    return found


def test_three_things_are_kept_and_the_trigger_travels_with_the_weights(trojan):
    root, row = trojan
    assert len(kept(root)) == 3
    made = asset(root)
    assert made.meta["cost"] <= made.meta["cost_first"]
    assert torch.equal(find(root, row["backdoor"]).tensors["added"], made.tensors["added"])
    attack = Stored(row["id"], paths(root)).attack  # built from the recipe, with nothing made again
    black = torch.zeros(1, *made.tensors["added"].shape)
    assert torch.equal(attack.trigger(black)[0], made.tensors["added"])
    assert made.tensors["added"].any()


def test_the_surrogate_is_the_net_of_clean_training(trojan, tmp_path, monkeypatch):
    root = shutil.copytree(trojan[0], tmp_path / "copy")
    monkeypatch.setattr(bdx.backdoor, "fit", lambda *_: pytest.fail("trained again"))
    row = run(root, "attack=none")
    assert kept(root) == kept(trojan[0])
    assert asset(root).meta["recipe"]["surrogate"] == row["backdoor"]


@pytest.mark.parametrize("name", ["none", "smooth_gtsrb"])
def test_a_choice_is_read_as_hydra_reads_it_even_while_hydra_is_busy(name):
    wanted = composed(name).attack
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):  # as in the middle of a multirun
        assert choice("attack", name) == wanted


def test_other_ratios_and_targets_reuse_it(trojan, tmp_path):
    root = shutil.copytree(trojan[0], tmp_path / "copy")
    row = run(root, *TROJAN, "attack.ratio=0.05", "attack.target=3", "attack.labels=all2all")
    assert kept(root) - kept(trojan[0]) == {row["backdoor"]}


def test_made_from_nothing_or_with_a_surrogate_at_hand_it_is_the_same_cell(trojan, tmp_path):
    root, row = trojan
    run(tmp_path, "attack=none")
    again = run(tmp_path, *TROJAN)
    assert again["backdoor"] == row["backdoor"]
    assert [again[k] for k in SCORES] == [row[k] for k in SCORES]
    assert torch.equal(asset(tmp_path).tensors["added"], asset(root).tensors["added"])
    ours, theirs = (find(r, row["backdoor"]).tensors for r in (tmp_path, root))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_picture_of_ones_own_needs_no_surrogate(tmp_path, monkeypatch):
    monkeypatch.setattr(bdx.backdoor, "equip", lambda *_: pytest.fail("made"))
    Image.fromarray(np.full((32, 32, 3), 51, dtype=np.uint8)).save(tmp_path / "grey.png")
    row = run(tmp_path, *TROJAN, f"attack.file={tmp_path / 'grey.png'}")
    assert kept(tmp_path) == {row["backdoor"]}
    assert torch.allclose(find(tmp_path, row["backdoor"]).tensors["added"], torch.tensor(0.2))


@pytest.mark.parametrize("name", ["trojan", "lf"])
def test_a_picture_that_is_none_or_black_is_refused(name, digits, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="is not an image"):
        build_attack(digits, f"attack={name}", f"attack.file={tmp_path / 'text.png'}")
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="is black: what it adds would change no pixel"):
        build_attack(digits, f"attack={name}", f"attack.file={tmp_path / 'black.png'}")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["attack=lc", "attack.ratio=0.12"], "asks for 173 poisoned images of 1438"),
        (["attack=trojan", "attack.ratio=2.0"], "asks for 2876 poisoned images"),
        (["attack=refool", "attack.reflections=2000"], "there are 1438 training images"),
    ],
)
def test_the_impossible_is_refused_before_the_surrogate_is_trained(overrides, text, tmp_path, monkeypatch):
    monkeypatch.setattr(bdx.backdoor, "fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=text):
        run(tmp_path, *overrides)
    assert kept(tmp_path) == set()


# ids


@cache
def composed(name: str):
    return compose([f"attack={name}"])


def id_of(name: str, surrogate: dict | None = None, **changes) -> str:
    """changes: keys of the attack, or dotted ones of the whole."""
    cfg, cls = composed(name).copy(), type_of(name)
    for key, value in changes.items():
        OmegaConf.update(cfg, key if "." in key or key == "seed" else f"attack.{key}", value)
    return recipe.digest(recipe.of_asset(cfg, "pixels", cls.shapeless(), surrogate if cls.surrogate else None))


def type_of(name: str) -> type:
    return hydra.utils.get_object(target("attack", name))


MADE = made()


@pytest.mark.parametrize("name", MADE)
def test_how_many_are_poisoned_does_not_shape_it_and_everything_else_does(name):
    of = lambda **changes: id_of(name, {"a": 1}, **changes)
    assert of(ratio=0.01, ratio_of="candidates", select="first", include_target=False) == of()
    cls, node = type_of(name), composed(name).attack
    assert (of(target=4) != of()) == cls.aimed
    assert (id_of(name, {"a": 2}) != of()) == cls.surrogate
    assert of(seed=1) != of()
    own = [k for k, v in node.items() if k not in cls.shapeless() | {"target"} and isinstance(v, int | float)]
    assert own
    for key in own:
        assert of(**{key: node[key] * 2}) != of(), key


@pytest.mark.parametrize(
    ("name", "change"), [("lc", {"amplitude": 0.1}), ("narcissus", {"amplify": 1.0}), ("refool", {"alpha": 0.5})]
)
def test_what_acts_later_does_not_shape_it(name, change):
    assert id_of(name, **change) == id_of(name)


def test_images_taken_from_the_victim_are_part_of_it():
    of = lambda source, ratio: id_of("ssba", **{"dataset.reserved.source": source, "dataset.reserved.ratio": ratio})
    assert len({of("held_out", 0.05), of("held_out", 0.1), of("train", 0.05)}) == 3
    assert of("train", 0.1) == of("train", 0.05) == id_of("ssba")
