"""What holds for every defense in conf/defense, on a tiny real backdoor."""

from __future__ import annotations

import copy
import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import TINY, build_attack, load_digits, names, paths, target
from omegaconf import OmegaConf

import bdx.run
from bdx import declared
from bdx.archs.base import load, save
from bdx.build import instantiate
from bdx.configure import compose
from bdx.defenses.base import Defense
from bdx.errors import UserError
from bdx.run import build_defense, check
from bdx.split import pixels
from bdx.surgery import Inserted

# an optional dependency; `run` refuses in one line without it (test_intrain)
DEFENSES = [n for n in names("defense") if n != "dp" or find_spec("opacus")]
NEEDS = {n: declared.source(target("defense", n))[1].get("needs", ("clean",)) for n in DEFENSES}
TAKING = {split: [n for n in DEFENSES if split in NEEDS[n]] for split in ("clean", "train")}
LOOPS = ["trap", "replace", "search", "end", "tuning", "finetune", "unlearn", "recover"]
LOOPS += ["contrast", "head", "mixmatch", "training", "first", "intra", "repair"]
SHORT = {f"defense.{loop}.epochs": 1 for loop in LOOPS}
SHORT |= {"defense.epochs": 1, "defense.warmup_epochs": 1, "defense.teacher_epochs": 1}
SHORT |= {"defense.anomaly": 0.0, "defense.iterations": 2, "defense.steps": 1}
SHORT |= {"defense.u": 0.5, "defense.max_drop": 1.0, "defense.step": 0.3}  # something is pruned in layers of 8 channels, too
FAST = {name: ["defense.optimizer.lr=100"] for name in ("anp", "anp_own")}  # masks move in one step
FAST["rnp"] = ["defense.recover.optimizer.lr=100"]


def short(name: str) -> list[str]:
    """Overrides that cut a defense to one epoch."""
    node = compose([f"defense={name}"]).defense
    given = [f"{k}={v}" for k, v in SHORT.items() if OmegaConf.select(node, k.removeprefix("defense.")) is not None]
    return given + FAST.get(name, [])


def fewer(data):
    """The reserved images and 180 more to train on: what is said here of a defense holds after one short epoch, too."""
    others = torch.arange(len(data.train))[~torch.isin(torch.arange(len(data.train)), data.reserved)]
    train = data.train[torch.cat([data.reserved, others[:180]])]
    return dataclasses.replace(data, train=train, reserved=torch.arange(len(data.reserved)))


@pytest.fixture(scope="module")
def digits(small):
    return fewer(small)


@pytest.fixture(scope="module")
def victim(digits, quick_trainer_module):
    """A net that has been trained for some steps: enough for its BatchNorm statistics to mean something."""
    attack = build_attack(digits, "attack=badnets", "train.epochs=8")
    attack.fit(digits.poisoned(attack.poison(digits.train)), quick_trainer_module)
    return attack


@pytest.fixture(scope="module")
def quick_trainer_module():
    from functools import partial

    from bdx.training import make_trainer

    return partial(make_trainer, device=torch.device("cpu"), precision="32-true", seed=0, report=lambda *_: None)


@pytest.fixture(scope="module")
def poisoned(digits, victim):
    """The data as a run hands it to a defense: the training set is the attacker's."""
    return digits.poisoned(victim.poison(digits.train))


@pytest.fixture(scope="module")
def repair(victim, quick_trainer_module):
    """repair(name, data) -> the net after; the random numbers are the same in each."""

    def run(name, data):
        torch.manual_seed(0)
        defense = build_defense(compose([*TINY, f"defense={name}", *short(name)]), victim)
        return defense.run(data.allow(defense.needs), quick_trainer_module)

    return run


@pytest.fixture(scope="module")
def repaired(poisoned, victim, repair):
    """repaired(name) -> (the net before, the net after); every defense runs once for all tests here."""
    done = {}

    def run(name):
        if name not in done:
            done[name] = copy.deepcopy(victim.net.state_dict()), repair(name, poisoned)
        return done[name]

    return run


@pytest.mark.parametrize("name", DEFENSES)
def test_it_returns_a_net_of_the_same_interface(name, repaired, digits):
    _, net = repaired(name)
    with torch.no_grad():
        assert net.eval()(pixels(digits.test.x[:5])).shape == (5, 10)
    assert not any(torch.nn.utils.parametrize.is_parametrized(m) for m in net.modules())


@pytest.mark.parametrize("name", DEFENSES)
def test_the_attacked_net_is_left_alone(name, repaired, victim):
    before, _ = repaired(name)
    after = victim.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", DEFENSES)
def test_saved_and_loaded_it_gives_the_same_logits(name, repaired, digits, tmp_path):
    _, net = repaired(name)
    save(net, tmp_path / "net")
    x = pixels(digits.test.x[:50])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "net")(x), net.eval()(x))


@pytest.mark.parametrize("name", DEFENSES)
def test_it_touches_only_what_it_declares(name, victim, digits):
    """`allow` hides the rest; a defense that reached for it would have raised in every other test here."""
    defense = build_defense(compose([*TINY, f"defense={name}"]), victim)
    assert defense.needs <= {"clean", "train"}
    for hidden in {"train", "clean", "test"} - defense.needs:
        with pytest.raises(PermissionError, match=f"data.{hidden}"):
            len(getattr(digits.allow(defense.needs), hidden))


@pytest.mark.parametrize("name", [n for n in DEFENSES if n not in ("none",)])
def test_it_changes_something(name, repaired):
    before, net = repaired(name)
    after = net.state_dict()
    assert before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in before)


def modules(net) -> dict[str, type]:
    """name -> type of every module; of what was inserted, the module in whose place it stands."""
    inserted = {n: m for n, m in net.named_modules() if isinstance(m, Inserted)}
    found = {n: type(m) for n, m in net.named_modules() if not any(n.startswith(f"{i}.layer") for i in inserted)}
    for name in inserted:
        found = {n.replace(f"{name}.module", name): kind for n, kind in found.items() if n != name}
    return found


@pytest.mark.parametrize("name", DEFENSES)
def test_the_net_has_the_modules_that_it_came_with(name, repaired, victim):
    """But for what a defense is about: a polarizer, NAB's stamp, DP-SGD's GroupNorm in place of BatchNorm."""
    _, net = repaired(name)
    inserted = [type(m.layer).__module__ for m in net.modules() if isinstance(m, Inserted)]
    about = "bdx.archs.stamp" if name == "nab" else "bdx.conditioned" if name.startswith("cnpd") else "bdx.polarizers"
    assert inserted == [about] * name.startswith(("npd", "cnpd", "nab"))
    wanted = modules(victim.net)
    if name == "dp":
        wanted = {n: torch.nn.GroupNorm if kind is torch.nn.BatchNorm2d else kind for n, kind in wanted.items()}
    assert modules(net) == wanted


@pytest.mark.parametrize("name", TAKING["train"])
def test_which_images_are_poisoned_is_told_to_no_defense(name, repair, repaired, poisoned):
    """Both are in the split, for the facts of the row; with other ones the net is the same to the bit."""
    train = poisoned.train
    lied = dataclasses.replace(train, poisoned=~train.poisoned, y_true=train.y_true.flip(0))
    told, again = (net.state_dict() for net in (repaired(name)[1], repair(name, poisoned.poisoned(lied))))
    assert told.keys() == again.keys()
    assert all(torch.equal(told[k], again[k]) for k in told)


@pytest.mark.parametrize("name", [n for n in DEFENSES if n.startswith("npd")])
def test_a_polarizer_leaves_every_weight_of_the_net_as_it_was(name, repaired):
    before, net = repaired(name)
    (at,) = [n for n, m in net.named_modules() if isinstance(m, Inserted)]
    after = {k.replace(f"{at}.module.", f"{at}."): v for k, v in net.state_dict().items() if f"{at}.layer." not in k}
    assert after.keys() == before.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


class NeedsBatchNorm(Defense):
    needs_batchnorm = True


class NeedsTrain(Defense):
    needs = frozenset({"train"})


@pytest.fixture(scope="module")
def scarce(shared, victim):
    """The poisoned data with 10 or 4 reserved images."""
    asked = {10: ["count=10"], 4: ["count=4", "balanced=false"]}
    words = {n: [*TINY[:2], *(f"dataset.reserved.{word}" for word in of)] for n, of in asked.items()}
    few = {n: fewer(load_digits(shared, *of)) for n, of in words.items()}
    return {n: data.poisoned(victim.poison(data.train)) for n, data in few.items()}


@pytest.mark.parametrize("reserved", [10, 4], ids=["one of each class", "classes absent"])
@pytest.mark.parametrize("name", TAKING["clean"])
def test_few_reserved_images_are_enough(name, reserved, scarce, victim, quick_trainer):
    few = scarce[reserved]
    defense = build_defense(compose([*TINY, f"defense={name}", *short(name)]), victim)
    net = defense.run(few.allow(defense.needs), quick_trainer)
    with torch.no_grad():
        assert torch.isfinite(net.eval()(pixels(few.test.x[:5]))).all()
    said = [note for note in defense.notes if note.startswith("the 4 reserved images lack")]
    assert len(said) == (reserved == 4)


def test_what_is_declared_is_what_the_class_says(victim):
    for split, of in TAKING.items():
        assert of == [n for n in DEFENSES if split in build_defense(compose([*TINY, f"defense={n}"]), victim).needs]


def test_impossible_pairs_are_refused_by_name(digits, victim):
    controlled = build_attack(digits, "attack=badnets")
    controlled.leaves_poison = False
    with pytest.raises(UserError, match="NeedsTrain works on the poisoned training set, and BadNets leaves none"):
        check(NeedsTrain(victim.net), controlled)
    check(NeedsTrain(victim.net), build_attack(digits, "attack=none"))  # trained on the clean set
    check(NeedsTrain(victim.net), victim)
    net = copy.deepcopy(victim.net)
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, torch.nn.Identity())
    with pytest.raises(UserError, match="NeedsBatchNorm works on BatchNorm layers"):
        NeedsBatchNorm(net)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["defense=npd", "defense.layer=layer4.1.conv3"], r"no such layer \(did you mean layer4.1.conv"),
        (["defense=npd", "defense.structure=mlp"], "expected one of conv_bn"),
        (["defense=npd", "defense.recipe=mine"], "expected paper or code"),
        (["defense=npd", "defense.warmup_lr=-1"], "defense.warmup_lr=-1(.0)?: expected 0 or more"),
        (["defense=npd", "defense.layer=linear"], r"its input has shape \(64,\)"),
    ],
)
def test_npd_names_what_is_wrong(overrides, text, victim):
    with pytest.raises(UserError, match=text):
        build_defense(compose([*TINY, *overrides]), victim)


def test_a_class_that_the_reserved_set_lacks_and_one_image_per_class(digits, victim, quick_trainer_module):
    for keep in (digits.clean.y != 3, torch.arange(len(digits.clean)) < 1):
        few = dataclasses.replace(digits, clean=digits.clean[keep])
        defense = build_defense(compose([*TINY, "defense=npd", *short("npd")]), victim)
        net = defense.run(few.allow(defense.needs), quick_trainer_module)
        assert torch.isfinite(net(pixels(digits.test.x[:5]))).all()


def test_an_instantiated_target_must_be_allowed():
    with pytest.raises(UserError, match=r"_target_=os.system is not allowed"):
        instantiate({"_target_": "os.system", "command": "true"})


def test_the_row_of_a_defense_names_its_overrides(cell):
    row = cell("attack=badnets", "train.epochs=1", "defense=ft", "defense.epochs=1")
    assert row["defense"] == "ft"
    assert row["defense.epochs"] == 1
    assert row["train.epochs"] == 1


def test_a_run_leaves_a_net_that_rebuilds_itself(cell, shared, digits):
    """Two lines of Python give the repaired net, and it scores what the row says."""
    import bdx as package

    overrides = [*TINY, *paths(shared), "attack=badnets", "train.epochs=1", "defense=npd", *short("npd")]
    row = bdx.run.run(compose(overrides))
    net = package.load(shared / "out" / "nets" / row["id"])
    with torch.no_grad():
        pred = net(pixels(digits.test.x)).argmax(1)
    assert float((pred == digits.test.y).float().mean()) == pytest.approx(row["acc"], abs=1e-6)
    sheet = json.loads((Path(shared) / "out" / "nets" / row["id"] / "net.json").read_text())
    assert sheet["insertions"][0]["layer"]["_target_"] == "bdx.polarizers.ConvBN"
