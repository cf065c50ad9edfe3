"""attack.made: what an attack is made of, from a file of the user's in place of making it."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from conftest import BRIEF, TINY, made, paths
from safetensors.torch import load_file, save_file

import bdx.backdoor
import bdx.run
from bdx import recipe, results
from bdx.attacks.made import Made
from bdx.configure import compose
from bdx.errors import UserError

MADE = made()
CELL = [*TINY, "train.epochs=1", "train.batch=128", "defense=none"]


@pytest.fixture(scope="module")
def own(small, tmp_path_factory):
    """own(name) -> (the attack that made it, the file that holds it)"""
    folder, done = tmp_path_factory.mktemp("own"), {}

    def make(name: str):
        if name not in done:
            part = bdx.backdoor.build_attack(compose([*TINY, *brief(name), f"attack={name}", "attack.target=3"]), small)
            net = copy.deepcopy(part.net).eval().requires_grad_(False) if part.surrogate else None
            kept = {k: v.detach().clone() for k, v in part.make(small, net, lambda *_: None)[0].items()}
            save_file(kept, path := folder / f"{name}.safetensors")
            part.take(kept)
            done[name] = part, path
        return done[name]

    return make


def brief(name: str) -> list[str]:
    return ["attack.ratio=0.05", *(f"attack.{key}" for key in BRIEF.get(name, []))]


def built(name: str, path, small):
    asked = [*TINY, *brief(name), f"attack={name}", "attack.target=3", f"attack.made={path}"]
    return bdx.backdoor.build_attack(compose(asked), small)


@pytest.mark.parametrize("name", MADE)
def test_a_file_is_what_would_have_been_made(name, own, small):
    maker, path = own(name)
    attack = built(name, path, small)
    assert isinstance(attack, Made)
    assert not attack.wanting
    attack.take(found := attack.brought(small))
    assert {k.partition(".")[0] for k in found} == set(attack.makes)
    chosen = attack.choose(small.train)
    assert torch.equal(attack.stamp(small.train.x[chosen], chosen), maker.stamp(small.train.x[chosen], chosen))
    assert torch.equal(attack.stamp(small.test.x), maker.stamp(small.test.x))


@pytest.mark.parametrize("name", MADE)
def test_what_does_not_fit_is_refused(name, own, small, tmp_path):
    tensors = load_file(own(name)[1])
    first = min(tensors)
    for wrong, match in (
        (
            {k: v for k, v in tensors.items() if k != first},
            f"has no tensor {first}" if len(tensors) > 1 else "has (a|no) tensor",
        ),
        (tensors | {"more": torch.zeros(1)}, "has a tensor more"),
        (tensors | {first: tensors[first][..., :-1].contiguous()}, f"{first} is .* expected|names .* images"),
        (tensors | {first: tensors[first].double()}, f"{first} is .* of torch.float64, expected"),
    ):
        save_file(wrong or {"other": torch.zeros(1)}, path := tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match=match) as e:
            built(name, path, small).brought(small)
        assert "\n" not in str(e.value)
    (path := tmp_path / "none.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match=r"is no \.safetensors"):
        built(name, path, small).brought(small)


def test_harder_images_must_be_those_of_the_target_class(own, small):
    _, path = own("lc")
    other = bdx.backdoor.build_attack(compose([*TINY, "attack=lc", "attack.target=4", f"attack.made={path}"]), small)
    with pytest.raises(UserError, match=r"expected the \d+ training images of class 4, in their order"):
        other.brought(small)


@pytest.mark.parametrize("name", ["lf", "trojan"])
def test_a_picture_and_a_file_at_once_are_refused(name, own, small, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(picture := tmp_path / "red.png")
    asked = [*TINY, f"attack={name}", f"attack.file={picture}", f"attack.made={own(name)[1]}"]
    with pytest.raises(UserError, match="either is the trigger"):
        bdx.backdoor.build_attack(compose(asked), small)


def test_ids_of_before_there_was_such_a_key_still_count(own):
    """null is no part of an id; a file is, by its content."""
    images = hashlib.sha256(b"").hexdigest()
    whole = recipe.of_run(compose(["attack=ssba"]), images)
    assert "made" not in whole["attack"]
    asked = recipe.of_run(compose(["attack=ssba", f"attack.made={own('ssba')[1]}"]), images)
    assert asked["attack"]["made"] == "sha256:" + hashlib.sha256(own("ssba")[1].read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"made=/none\.safetensors: there is no such file"):
        recipe.of_run(compose(["attack=ssba", "attack.made=/none.safetensors"]), images)


@pytest.mark.slow
def test_a_run_takes_it_and_trains_no_clean_net(own, tmp_path, monkeypatch):
    monkeypatch.setattr(bdx.backdoor, "surrogate", lambda *_: pytest.fail("a clean net was trained"))
    asked = [*CELL, *paths(tmp_path), "attack=trojan", "attack.target=3", *brief("trojan"), f"attack.made={own('trojan')[1]}"]
    row = bdx.run.run(compose(asked))
    assert row["attack.made"] == str(own("trojan")[1])
    assert results.find(tmp_path / "out" / "results", row["id"])
    (kept,) = (tmp_path / "out" / "store").glob("[0-9a-f]*")
    assert torch.equal(load_file(kept / "weights.safetensors")["added"], load_file(own("trojan")[1])["added"])
