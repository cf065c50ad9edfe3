"""What keeps an attack from its effect: gradients that end, triggers that no image can hold. The effect: test_effects.py."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from conftest import ROW, TINY, build_attack, paths

from bdx import overview, recipe
from bdx.configure import compose
from bdx.split import Split
from bdx.store import Store
from bdx.triggers import triggers

# LIRA


def test_liras_noise_is_in_whole_levels_in_training_and_its_gradient_passes(digits):
    attack = build_attack(digits, "attack=lira", "attack.widths=[8,8]")
    x = digits.train.x[:8].float() / 255
    noisy = attack.noisy(attack.maker, x)
    assert torch.allclose(noisy * 255, (noisy * 255).round(), atol=1e-3)
    noisy.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attack.maker[-2].parameters())
    attack.fix()
    assert torch.equal((attack.trigger(x) * 255).round().byte(), attack.stamp(digits.train.x[:8]))


def test_lira_learns_noise_against_running_statistics_and_the_victim_against_those_of_the_batch(digits, quick_trainer):
    attack = build_attack(digits, "attack=lira", "attack.widths=[8,8]", "attack.joint=1.0", "train.epochs=1", "train.batch=16")
    seen, victim = [], attack.net.forward
    attack.net.forward = lambda x: seen.append((attack.net.training, len(x))) or victim(x)
    attack.fit(digits.poisoned(digits.train[:48]), quick_trainer)
    assert seen == [(False, 16), (True, 32)] * 3


# Narcissus


class Turning(torch.nn.Module):
    """Two classes. For `after` steps class 0 wants bright pixels, then dark ones."""

    def __init__(self, after: int):
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, x):
        self.calls += 1
        z = (x.mean((1, 2, 3)) - 0.5) * (5 if self.calls <= self.after else -5)
        return torch.stack([z, -z], 1)


def test_narcissus_noise_comes_back_from_its_bound(digits):
    grey = digits.poisoned(Split.clean(torch.full_like(digits.train.x[:8], 128), torch.zeros(8, dtype=torch.long)))
    attack = build_attack(digits, "attack=narcissus", "attack.ratio=0.05", "attack.rounds=20", "attack.lr=0.3")
    made, _ = attack.make(grey, Turning(20), lambda *_: None)
    assert torch.allclose(made["noise"], torch.tensor(attack.radius))
    attack.rounds = 50
    made, _ = attack.make(grey, Turning(20), lambda *_: None)
    assert torch.allclose(made["noise"], torch.tensor(-attack.radius))


# what is in the store


@pytest.fixture
def kept(small, tmp_path):
    """A store with a LIRA whose noise is far from a fresh one's, and a row that measured it."""
    words = [*TINY, *paths(tmp_path), "attack=lira", "attack.eps=0.1"]
    attack = build_attack(small, "attack=lira", "attack.eps=0.1")
    with torch.no_grad():
        attack.fixed[-2].bias.fill_(9.0)
    of = recipe.of_backdoor(compose(words), small.sha256)
    tensors = attack.state_dict() | {"split.poisoned": small.train.poisoned, "split.reserved": small.reserved}
    artifact = Store(tmp_path / "out" / "store").get_or_make(of, lambda _: (tensors, {}))
    row = ROW | {"id": "0" * 16, "backdoor": artifact.id, "acc_before": 0.9123, "asr_before": 0.5, "seconds_attack": 77.4}
    (tmp_path / "out" / "results").mkdir()
    (tmp_path / "out" / "results" / f"{row['id']}.json").write_text(json.dumps(row | {"finished": "2026-01-01"}))
    return tmp_path, artifact


def test_learned_triggers_are_shown_from_the_store_with_what_was_measured(kept, capsys, monkeypatch):
    root, artifact = kept
    monkeypatch.setattr("bdx.triggers.options", lambda group: ["badnets", "lira", "input_aware"])
    assert triggers([*TINY, *paths(root)]) == 0
    out = capsys.readouterr().out
    assert "after training: input_aware (" in out
    with open(root / "out" / "triggers_digits.csv", newline="") as file:
        lines = {of["attack"]: of for of in csv.DictReader(file)}
    assert list(lines) == ["badnets", "lira"]
    lira = lines["lira"]
    assert [lines[name]["controls"] for name in ("badnets", "lira")] == ["data", "training"]
    assert (lira["L∞ of 255"], lira["changed keys"], lira["backdoor"]) == ("26", "eps=0.1", artifact.id)  # 0.1 of 255
    assert (lira["ACC"], lira["ASR"], lira["seconds"]) == ("91.23", "50.00", "77")
    assert (lines["badnets"]["ACC"], lines["badnets"]["backdoor"]) == ("", "")
    assert "NPD 91.82 / 93.79" in lines["badnets"]["in print: ACC / ASR"]


@pytest.mark.parametrize("word", ["seed=1", "arch.width=16", "train.epochs=3"])
def test_what_another_recipe_made_is_not_shown(word, kept, capsys, monkeypatch):
    root, _ = kept
    monkeypatch.setattr("bdx.triggers.options", lambda group: ["badnets", "lira"])
    assert triggers([*TINY, *paths(root), word]) == 0
    assert "after training: lira (" in capsys.readouterr().out


def test_a_damaged_artifact_is_not_shown(kept, capsys, monkeypatch):
    root, artifact = kept
    (artifact.path / "weights.safetensors").write_bytes(b"0")
    monkeypatch.setattr("bdx.triggers.options", lambda group: ["badnets", "lira"])
    assert triggers([*TINY, *paths(root)]) == 0
    assert "after training: lira (" in capsys.readouterr().out


def test_the_readme_takes_what_triggers_look_like_from_that_table(tmp_path, monkeypatch):
    row = {"attack": "badnets", "backdoor": "b", "acc_before": 0.9, "asr_before": 0.95, "n_poisoned": 5, "seconds_attack": 7}
    row |= {"id": "0", "finished": "2026", "seed": 0}
    monkeypatch.setattr(overview.grid, "EXPERIMENTS", tmp_path)
    monkeypatch.setattr(overview, "undefended", lambda attack: "NPD 91.82 / 93.79")
    assert "L2" not in overview.attacks([row], set(), None)
    (tmp_path / "results").mkdir()
    head = ["attack", "backdoor", *overview.LOOKS]
    (tmp_path / "results" / "triggers_cifar10.csv").write_text(f"{','.join(head)}\nbadnets,b,2.83,255,27.7,0.974\n")
    last = overview.attacks([row, row | {"attack": "sig", "backdoor": "c"}], set(), None).splitlines()[-2:]
    assert last[0] == "| `badnets` |  | 90.00 / 95.00 | 2.83 | 255 | 27.7 | 0.974 | 5 | 7 | 1 | NPD 91.82 / 93.79 |"
    again = overview.attacks([row | {"backdoor": "of another day"}], set(), None).splitlines()[-1]
    assert again == last[0]  # trained again, it looks the same
    assert last[1].startswith("| `sig` |  | 90.00 / 95.00 | – | – | – | – | 5")
