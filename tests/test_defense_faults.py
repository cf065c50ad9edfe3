"""Faults that were found in use, each with what it did: tracebacks, refusals that came too late, seconds left out."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import TINY, build_attack, load_digits, paths

import bdx.run
from bdx import corruptions
from bdx.archs import base as archs
from bdx.backdoor import fit
from bdx.build import instantiate
from bdx.configure import compose
from bdx.defenses.base import Tuning
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


@pytest.mark.parametrize("name", ["ft_sam", "sau"])
def test_scaled_gradients_are_refused_before_training(name, untrained, tmp_path, shared):
    asked = [*TINY, *paths(shared), f"paths.out={tmp_path}", f"defense={name}", "train.precision=16-mixed"]
    with pytest.raises(UserError, match=r"(FTSAM|SAU) .* train\.precision=16-mixed scales apart; take bf16-mixed"):
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
            how = {"device": torch.device("cpu"), "precision": "32-true", "seed": 0, "report": report}
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


def test_classes_without_a_reserved_image_are_said_by_the_run(shared, tmp_path):
    screen, few = Said(), ["dataset.reserved.count=4", "dataset.reserved.balanced=false"]
    bdx.run.run(compose([*TINY, *paths(shared), "train.epochs=1", "defense=ft", "defense.epochs=1", *few]), screen)
    (line,) = (line for line in screen.lines if "reserved images lack" in line)
    assert line.startswith("the 4 reserved images lack ")
    assert line.endswith(
        "FT is told nothing of them; take more images, or as many of each class by dataset.reserved.balanced=true"
    )
    assert "\n" not in line


# TeCo and CD against the released loops, written out


def detector(name, *overrides):
    return instantiate(compose([f"detector={name}", *(f"detector.{o}" for o in overrides)]).detector)


class Bright(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot((x.mean((1, 2, 3)) > 0.5).long(), 2).float()


@pytest.mark.parametrize(("recipe", "severities"), [("paper", [3.0, 6.0]), ("code", [2.0, 1.0])])
def test_as_released_corruptions_pile_up(recipe, severities):
    """0.28 + 0.1 + 0.2 is bright at the second step, and what is left of it stays bright whatever the contrast."""
    teco, x = detector("teco", "corruptions=[brightness,contrast]", f"recipe={recipe}"), torch.full((1, 3, 8, 8), 71).byte()
    assert teco.gives_way(Bright(), x, torch.Generator())[:, 0].tolist() == severities


def test_tecos_score_is_that_of_a_loop_over_images():
    g, names = torch.Generator().manual_seed(0), ["brightness", "contrast", "pixelate", "jpeg_compression"]
    x = torch.randint(256, (12, 3, 16, 16), generator=g, dtype=torch.uint8)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4 * 12 * 12, 5))
    wanted = []
    for one in x[:, None]:
        severities = []
        for of, levels in (corruptions.CORRUPTIONS[n] for n in names):
            first = 6
            for level in reversed(range(5)):
                worse = (of(one / 255, levels[level], None).clamp(0, 1) * 255).byte() / 255
                first = level + 1 if net(worse).argmax() != net(one / 255).argmax() else first
            severities.append(first)
        wanted.append(np.std(severities))
    assert detector("teco", f"corruptions=[{','.join(names)}]").spread(net, x, 0).tolist() == pytest.approx(wanted)
    assert len(set(wanted)) > 2


def test_cds_masks_are_those_of_the_released_loop():
    """Its objective is a mean over images, ours a sum, and Adam cannot tell; the steps of Adam by hand."""
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 4)), torch.randint(256, (2, 3, 6, 6)).byte()
    w, m, v, g = torch.ones(2, 1, 6, 6), 0, 0, torch.Generator().manual_seed(7)
    image = x.float() / 255
    for step in range(1, 9):
        w = w.detach().requires_grad_()
        mask = (w.tanh() + 1) / 2
        loss = (net(image * mask + (1 - mask) * torch.rand(2, 3, 1, 1, generator=g)) - net(image)).abs().mean(1)
        rows, columns = mask[:, 0].diff(dim=1).square(), mask[:, 0].diff(dim=2).square()
        loss = loss + 0.01 * mask.sum((1, 2, 3)) + 10 * (rows.sum((1, 2)) + columns.sum((1, 2))) / 36
        (grad,) = torch.autograd.grad(loss.mean(), w)
        m, v = 0.1 * m + 0.9 * grad, 0.1 * v + 0.9 * grad**2
        w = w - 0.1 * m / (1 - 0.1**step) / ((v / (1 - 0.1**step)).sqrt() + 1e-8)
    wanted = ((w.tanh() + 1) / 2).sum((1, 2, 3)).tolist()
    assert detector("cd", "steps=8").norms(net, x, 7).tolist() == pytest.approx(wanted, rel=1e-3)


def test_corruptions_that_move_and_cover():
    g, ramp = torch.Generator().manual_seed(0), (torch.arange(16.0) / 16).expand(2, 3, 16, 16)
    glass = corruptions.glass_blur(ramp, (0.1, 2, 1), g)  # σ so small that it blurs nothing
    assert 1 / 16 < float((glass - ramp).abs().max()) <= 2 / 16
    assert torch.allclose(corruptions.elastic_transform(ramp, 0.0, g), ramp, atol=1e-5)
    away = corruptions.elastic_transform(ramp, 20.0, g) - ramp
    assert 0.1 < float(away.abs().max()) * 16 <= 20 * 0.005 * 16 + 1e-3  # pixels
    white, black = (corruptions.snow(torch.full((2, 3, 16, 16), v), (0.1, 0.3, 2.0, 0.5, 4, 2, 0.8), g) for v in (1.0, 0.0))
    assert torch.allclose(black, black.rot90(2, (2, 3)), atol=1e-6)
    assert float(black.min()) == pytest.approx(0.2 * 0.5)  # pale where no flake is
    assert float(black.max()) > 0.2
    assert float(white.min()) == pytest.approx(0.8 + 0.2 * 2.0)


def test_what_a_new_defense_gets_wrong_is_said_in_a_line(digits, tmp_path):
    class Wrong(Tuning):
        needs = "clean"

    net = build_attack(digits, "attack=badnets").net
    how = {"epochs": 1, "batch": 8, "augment": False, "optimizer": None, "schedule": None}
    with pytest.raises(UserError, match=r"Wrong\.needs='clean': expected a frozenset of clean, train, or of none"):
        Wrong(net, **how)
    for returned, name in ((None, "NoneType"), (torch.nn.Sequential(net), "Sequential")):
        with pytest.raises(UserError, match=rf"a {name} is no repaired net: a defense returns the one it was given"):
            archs.save(returned, tmp_path / "net")
