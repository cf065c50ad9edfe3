"""attack=given: weights from elsewhere are read as tensors, fit key by key, and are repaired like any other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TINY, build_attack, paths
from safetensors.torch import load_file, save_file

from bdx.archs import base as archs
from bdx.configure import compose
from bdx.errors import UserError
from bdx.run import run
from bdx.screen import Screen


@pytest.fixture(scope="module")
def weights(shared, cell):
    """state_dict of a trained net, and the row of its run."""
    row = cell("attack=badnets", "train.epochs=3", "defense=none")
    return load_file(shared / "out" / "nets" / row["id"] / "net.safetensors"), row


def body(state: dict, prefix: str = "") -> dict:
    return {prefix + k.removeprefix("body."): v for k, v in state.items() if k.startswith("body.")}


def given(shared, tmp_path, *words: str) -> dict:
    places = [f"paths.data={shared / 'data'}", f"paths.out={tmp_path / 'out'}"]
    return run(compose([*TINY, *places, "attack=given", *words]), Screen(quiet=True))


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("whole.safetensors", save_file, []),
        ("body.safetensors", lambda s, p: save_file(body(s), p), []),
        ("body.pt", lambda s, p: torch.save(body(s), p), []),
        ("nested.pth", lambda s, p: torch.save({"model": body(s, "module."), "epoch": 9}, p),
         ["attack.entry=model", "attack.prefix=module."]),
    ],
)  # fmt: skip
def test_what_is_measured_is_the_net_in_the_file(name, write, words, weights, shared, tmp_path):
    state, trained = weights
    write(state, tmp_path / name)
    row = given(shared, tmp_path, f"attack.file={tmp_path / name}", "defense=none", *words)
    assert row["acc"] == row["acc_before"] == trained["acc"]
    assert (row["asr"], row["der"], row["n_poisoned"], row["fpr"]) == (None, None, 0, 0)


@pytest.mark.slow
def test_it_is_repaired_and_the_repair_can_be_loaded(weights, shared, tmp_path):
    """By the content of the file: elsewhere, it is the same run."""
    save_file(weights[0], tmp_path / "a.safetensors")
    words = ["defense=ft", "defense.epochs=2", "defense.batch=32"]
    row = given(shared, tmp_path, f"attack.file={tmp_path / 'a.safetensors'}", *words)
    net = archs.load(tmp_path / "out" / "nets" / row["id"])
    assert not torch.equal(net.state_dict()["body.conv1.weight"], weights[0]["body.conv1.weight"])
    assert row["acc"] > row["acc_before"] - 0.1
    shutil.move(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert given(shared, tmp_path, f"attack.file={tmp_path / 'b.safetensors'}", *words) == row


class Payload:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("change", "words", "match"),
    [
        (lambda s: s | {"extra": torch.zeros(1)}, [], r"not fit the PreActResNet: of its 1\d\d keys, 1 unknown \(extra for"),
        (lambda s: {k: v for k, v in s.items() if k != "linear.bias"}, [], r"1 missing \(linear.bias for one\)"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, [], r"its keys begin with module.; set attack.prefix=module."),
        (lambda s: s | {"linear.bias": torch.full_like(s["linear.bias"], torch.nan)}, [],
         r"1 of its 1\d\d tensors hold NaN or infinity, linear.bias for one"),
        (lambda s: {}, [], "holds nothing: expected a state_dict"),
        (lambda s: s, ["attack.prefix=module."], r"prefix=module.: 1\d\d keys of .* do not begin so, conv1.weight for one"),
        (lambda s: s | {"linear.weight": torch.zeros(43, 64)}, [], r"1 tensors have other shapes, linear.weight \(43, 64\)"),
        (lambda s: {"model": s, "epoch": 3}, [], "no state_dict: it holds model, epoch; name the one in it by attack.entry"),
        (lambda s: {"model": s}, ["attack.entry=net"], "entry=net: .* has no state_dict of that name: it holds model"),
        (lambda s: [1], [], "is no state_dict, but a list"),
        (lambda s: {"conv1.weight": Payload()}, [], "holds Python objects beside tensors, which could run code .*: refused"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_line(change, words, match, digits, tmp_path, capsys):
    file = tmp_path / "net.pt"
    torch.save(change(body(build_attack(digits).net.state_dict())), file)
    attack = build_attack(digits, "attack=given", f"attack.file={file}", *words)
    with pytest.raises(UserError, match=match) as e:
        attack.check(digits.train)
    assert "\n" not in str(e.value)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "content"), [("a.safetensors", b"12"), ("a.pt", b"no zip"), ("b.pt", b"\x80\x02K")])
def test_a_broken_file_is_refused_in_one_line(name, content, digits, tmp_path):
    (tmp_path / name).write_bytes(content)
    attack = build_attack(digits, "attack=given", f"attack.file={tmp_path / name}")
    with pytest.raises(UserError, match=f"attack.file={tmp_path / name} (cannot be read as weights|holds Python objects)") as e:
        attack.check(digits.train)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "words", "match"),
    [
        (lambda d: d | {"epoch": 3}, [], r"holds more than tensors: epoch \(a int\); take those out"),
        (lambda d: {"model": d, "args": 1, "lr": 2, "a": 3, "b": 4, "c": 5}, [], r"it holds model, args, lr, a, b and 1 more;"),
        (lambda d: {f"_orig_mod.module.{k}": v for k, v in d.items()}, [], r"set attack\.prefix=_orig_mod\.module\.$"),
        (lambda d: {f"module.{k}": v for k, v in d.items()}, ["attack.prefix=module"], r"set attack\.prefix=module\.$"),
    ],
)
def test_a_checkpoint_that_is_nearly_one_is_told_what_to_do(change, words, match, digits, tmp_path):
    torch.save(change(build_attack(digits).net.body.state_dict()), file := tmp_path / "net.pt")
    with pytest.raises(UserError, match=match):
        build_attack(digits, "attack=given", f"attack.file={file}", *words).check(digits.train)


def test_an_empty_file_is_called_so(digits, tmp_path):
    (tmp_path / "net.pt").touch()
    with pytest.raises(UserError, match=r"cannot be read as weights \(it is empty\): expected a whole state_dict"):
        build_attack(digits, "attack=given", f"attack.file={tmp_path / 'net.pt'}").check(digits.train)


def test_a_backdoor_of_bdxs_own_store_can_be_given(weights, shared, tmp_path):
    """So that a reviewer may rehearse a repair on a net whose trigger is known."""
    file = shared / "out" / "store" / weights[1]["backdoor"] / "weights.safetensors"
    assert any(k.startswith("split.") for k in load_file(file))
    row = given(shared, tmp_path, f"attack.file={file}", "defense=none")
    assert row["acc"] == weights[1]["acc_before"]


def test_a_net_that_knows_nothing_is_said(digits, shared, tmp_path, monkeypatch):
    """As where it wants another normalisation, or the classes stand in another order."""
    net = build_attack(digits).net
    state = {k: torch.zeros_like(v) if k == "body.linear.weight" else v for k, v in net.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "net.safetensors")
    told = []
    monkeypatch.setattr(Screen, "say", lambda self, text: told.append(text))
    given(shared, tmp_path, f"attack.file={tmp_path / 'net.safetensors'}", "defense=none")
    assert any("of the reserved images, little more than chance: see dataset.normalize" in t for t in told)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "attack=given needs attack.file=PATH"),
        (["attack.file=nowhere.pt"], "file=nowhere.pt: there is no such file"),
        (["attack.file=FILE", "defense=abl"], "ABL works on the set that the net was trained on, and Given has none"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(words, match, weights, shared, tmp_path):
    save_file(weights[0], tmp_path / "a.safetensors")
    words = [w.replace("FILE", str(tmp_path / "a.safetensors")) for w in words]
    with pytest.raises(UserError, match=match):
        given(shared, tmp_path, *words)


def test_the_preset_repairs_with_every_image_in_train(shared, digits, weights, tmp_path):
    """Class folders of very few images: all of train/ is the reserved data, one class has fewer than the others."""
    from PIL import Image

    save_file(weights[0], tmp_path / "suspect.safetensors")
    for split, part, each in (("train", digits.train, 3), ("test", digits.test, 2)):
        for k in range(10):
            (folder := tmp_path / "photos" / split / str(k)).mkdir(parents=True)
            for i, x in enumerate(part.x[part.y == k][: 1 if (split, k) == ("train", 7) else each]):
                Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    words = [f"attack.file={tmp_path / 'suspect.safetensors'}", f"dataset.source.root={tmp_path / 'photos'}"]
    same = ["arch.width=8", "train.precision=32-true", "dataset.normalize={mean: [0.5,0.5,0.5], std: [0.5,0.5,0.5]}"]
    brief = ["defense=ft", "defense.epochs=1", "defense.batch=8", "logger=none"]
    row = run(compose(["experiment=repair", *words, *same, *brief, *paths(tmp_path)]), Screen(quiet=True))
    assert (row["attack"], row["n_reserved"], row["n_test"]) == ("given", 28, 20)
    assert json.loads((tmp_path / "out" / "nets" / row["id"] / "net.json").read_text())["num_classes"] == 10
