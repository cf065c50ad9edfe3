"""Faults that were found in use, each with what it did: tracebacks, refusals that came too late, seconds left out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import TINY, build_attack, load_digits, paths

import bdx.run
from bdx.backdoor import fit
from bdx.configure import compose
from bdx.defenses.sau import wrong
from bdx.errors import UserError
from bdx.isolation import symmetric
from bdx.run import build_defense, check
from bdx.screen import Screen
from bdx.training import make_trainer

CUTMIX = "dataset.augment.cutmix=1.0"


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


@pytest.fixture
def untrained(monkeypatch):
    """A run must end before its backdoor is trained."""
    monkeypatch.setattr(bdx.run, "backdoored", lambda *_: pytest.fail("a backdoor was trained first"))


class Said(Screen):
    """What a run says."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


# CutMix, after which an image has two labels


@pytest.mark.parametrize("name", ["sau", "rnp"])
def test_two_labels_are_no_traceback(name, attack, shared, quick_trainer):
    data = load_digits(shared, CUTMIX)
    data = dataclasses.replace(data, clean=data.clean[:16])
    brief = {"sau": ["epochs=1", "steps=1", "augment=true"], "rnp": ["unlearn.epochs=1", "recover.epochs=1"]}[name]
    defense = build_defense(compose([*TINY, f"defense={name}", *(f"defense.{b}" for b in brief)]), attack)
    net = defense.run(data.allow(defense.needs), quick_trainer)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_what_is_said_is_wrong_if_it_is_no_part_of_the_label():
    assert wrong(torch.tensor([1, 2]), torch.tensor([1, 1])).tolist() == [False, True]
    mixed = torch.tensor([[0.3, 0.7, 0.0]] * 3)
    assert wrong(torch.tensor([0, 1, 2]), mixed).tolist() == [False, False, True]


def test_symmetric_cross_entropy_of_two_labels_is_their_mean():
    """Both of its terms are linear in the label, but for the 1e-4 in place of 0 inside the logarithm: α = 1, β = 0."""
    logits, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    hot = torch.nn.functional.one_hot(y, 3).float()
    assert torch.allclose(symmetric(logits, hot, 0.1, 1.0), symmetric(logits, y, 0.1, 1.0))
    both = symmetric(logits, (hot + hot.roll(1, 1)) / 2, 1.0, 0.0)
    assert torch.allclose(both, (symmetric(logits, y, 1.0, 0.0) + symmetric(logits, (y + 1) % 3, 1.0, 0.0)) / 2, atol=1e-3)


@pytest.mark.parametrize("name", ["npd", "cnpd_e", "cnpd_r"])
def test_a_defense_that_aims_at_labels_refuses_cutmix_before_training(name, untrained, tmp_path, shared):
    asked = [*TINY, *paths(shared), f"paths.out={tmp_path}", f"defense={name}", "defense.augment=true", CUTMIX]
    with pytest.raises(UserError, match=r"dataset\.augment\.cutmix=1\.0: C?NPD needs one label for each image; set it to 0 or"):
        bdx.run.run(compose(asked))


def test_without_augmentation_cutmix_does_not_reach_it(attack):
    check(build_defense(compose([*TINY, "defense=npd", "defense.augment=false"]), attack), attack, cutmix=1.0)


# refused too late


def test_scaled_gradients_are_refused_before_training(untrained, tmp_path, shared):
    asked = [*TINY, *paths(shared), f"paths.out={tmp_path}", "defense=ft_sam", "train.precision=16-mixed"]
    with pytest.raises(UserError, match=r"FTSAM .* train\.precision=16-mixed scales apart; take bf16-mixed"):
        bdx.run.run(compose(asked))


def test_a_schedule_that_cannot_go_over_so_few_steps_is_one_line(untrained, tmp_path, shared):
    """1438 images in batches of 359 are 4 steps, of which a quarter is one: OneCycle divides by 0."""
    asked = [*TINY, *paths(shared), f"paths.out={tmp_path}", "train.epochs=1", "train.batch=359"]
    with pytest.raises(UserError, match=r"train\.schedule over 4 steps \(epochs=1, batch=359, 1438 images\) cannot be") as e:
        bdx.run.run(compose(asked))
    assert str(e.value).endswith("; take more epochs, a smaller batch or train.schedule=null")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "how", [["train.epochs=1", "train.batch=287"], ["train.epochs=1", "train.batch=359", "train.schedule=null"]]
)
def test_other_schedules_go(how, digits):
    attack = build_attack(digits, "attack=badnets", *how)
    attack.check(digits.train)
    assert attack.recipe.epochs == 1


def test_the_steps_that_are_checked_are_those_that_are_taken(digits, quick_trainer):
    for how in (["train.batch=512"], ["train.batch=512", "train.drop_last=false"], ["train.batch=4000"]):
        attack, seen = build_attack(digits, "attack=badnets", "train.epochs=2", *how), []
        object.__setattr__(attack.recipe, "schedule", lambda opt, total_steps, seen=seen: seen.append(total_steps) or 1 / 0)
        steps = 2 * len(attack.batches(digits))
        with pytest.raises(UserError, match=f"over {steps} steps"):
            attack.check(digits.train)
        assert seen == [steps]


# seconds


def test_a_resumed_run_counts_what_came_before(digits, tmp_path):
    class Killed(Exception):
        pass

    def trained(alive: int) -> dict:
        attack = build_attack(digits, "attack=badnets", "train.epochs=2", "train.batch=256")
        data = digits.poisoned(attack.poison(digits.train))

        def report(stage, epoch, *_):
            if epoch > alive:
                raise Killed

        def trainer(stage, epochs, **more):
            how = {"accelerator": "cpu", "precision": "32-true", "seed": 0, "report": report}
            made = make_trainer(stage, epochs, **how, **more)
            made.callbacks[0].pause = 0
            return made

        return fit(attack, data, trainer, tmp_path / ".id.ckpt", Screen(quiet=True))[1]

    with pytest.raises(Killed):
        trained(1)
    left = torch.load(tmp_path / ".id.ckpt", weights_only=True)
    assert 0 < left["seconds"] < 60
    torch.save(left | {"seconds": 1000.0}, tmp_path / ".id.ckpt")
    assert 1000 < trained(2)["seconds"] < 1060


def test_what_an_attack_is_made_of_counts_once(cell, shared):
    row = cell("attack=ssba", "attack.steps=3", "attack.width=2", "attack.batch=8", "train.epochs=1", "defense=none")
    sheets = [json.loads(p.read_text()) for p in (shared / "out" / "store").glob("*/meta.json")]
    (asset,) = [s["seconds"] for s in sheets if s["recipe"].get("asset", {}).get("_target_", "").endswith("SSBA")]
    (victim,) = [s["seconds"] for s in sheets if s["recipe"].get("attack", {}).get("_target_", "").endswith("SSBA")]
    assert row["seconds_attack"] == asset + victim
    assert min(asset, victim) > 0


# lines of its own


def test_what_nc_has_to_say_is_said_by_the_run(shared, tmp_path, capsys):
    few = ["defense.search.epochs=1", "defense.search.at_once=10", "defense.anomaly=1000.0", "dataset.reserved.count=20"]
    screen = Said()
    row = bdx.run.run(compose([*TINY, *paths(shared), "train.epochs=1", "defense=nc", *few]), screen)
    assert [line for line in screen.lines if "NC" in line] == [
        f"NC flags no class (anomaly index at most {row['anomaly_index']:.2f}): the net stays as it is"
    ]
    assert "NC" not in capsys.readouterr().out
