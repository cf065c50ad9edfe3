"""Detectors: formulas by hand or against another implementation, planted poison to be found, and what holds for all."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, build_attack, load_digits, names
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import roc_auc_score
from torch import nn

from bdx import corruptions, info
from bdx.build import instantiate
from bdx.configure import CONF, compose
from bdx.declared import source
from bdx.defenses.ac import AC
from bdx.detect import line
from bdx.detection import check, judged_by, rates, verdict
from bdx.detectors import beatrix, cd, scan, spectre, strip
from bdx.detectors.base import penultimate, principal, sample
from bdx.errors import UserError
from bdx.isolation import cross_entropy, losses
from bdx.run import build_defense
from bdx.split import Split

DETECTORS = names("detector")
SHORT = {"overlays": 3, "steps": 2, "epochs": 1, "orders": 2, "folds": 2, "corruptions": "[gaussian_noise,motion_blur,fog]"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(small):
    return small


@pytest.fixture(scope="module")
def victim(digits):
    """Untrained, but with an attack: a detector must work on any net."""
    return build_attack(digits, "attack=badnets")


@pytest.fixture(scope="module")
def data(digits, victim):
    return digits.poisoned(victim.poison(digits.train))


def made(name: str, *overrides: str):
    return instantiate(compose([f"detector={name}", *overrides]).detector)


def short(name: str, *overrides: str):
    file = CONF / "detector" / f"{name}.yaml"
    own = (f"detector.{k}={v}" for k, v in SHORT.items() if info.value(file, k) is not None)
    return made(name, "detector.limit=40", *own, *overrides)


def auc(scores, poisoned) -> float:
    return roc_auc_score(poisoned, scores)


def cloud(n: int, d: int, seed: int, at=0.0, spread=1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.as_tensor(spread) + torch.as_tensor(at)


def planted(poison: int, clean: int = 200, k: int = 6, d: int = 12) -> tuple:
    """k classes of `clean` images each, class 0 with `poison` more around another point: (z, y, poisoned)."""
    parts = [cloud(clean, d, c, at=5 * cloud(1, d, 100 + c)) for c in range(k)]
    parts.append(cloud(poison, d, 77, at=5 * cloud(1, d, 200)))
    y = torch.cat([torch.arange(k).repeat_interleave(clean), torch.zeros(poison, dtype=torch.long)])
    return torch.cat(parts), y, torch.arange(len(y)) >= k * clean


# what holds for all


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_are_finite_repeatable_and_leave_the_net_alone(name, data, victim, quick_trainer):
    net, before = victim.net, {k: v.clone() for k, v in victim.net.state_dict().items()}
    net.train()
    seen = []
    for _ in range(2):
        detector = short(name)
        split = judged_by(detector, victim, data).blind()
        torch.manual_seed(0)
        scores = detector.score(net, split, data.allow(detector.needs), quick_trainer)
        flagged = detector.flag(scores, split.y)
        assert scores.shape == flagged.shape == (10 if detector.judge == "net" else 40,)  # classes or images
        assert torch.isfinite(scores).all()
        assert flagged.dtype == torch.bool
        seen.append(scores)
    assert torch.equal(*seen)
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", [n for n in DETECTORS if not n.endswith("_code")])
def test_a_detector_touches_only_what_it_declares(name, data, victim, quick_trainer):
    detector = short(name)
    assert detector.needs <= {"clean"}
    if detector.needs:
        with pytest.raises(PermissionError, match=r"data\.clean"):
            detector.score(victim.net, data.train[:8].blind(), data.allow(frozenset()), quick_trainer)


def test_a_blind_split_tells_nothing(data):
    blind = data.train.blind()
    assert data.train.poisoned.any()
    assert not blind.poisoned.any()
    assert torch.equal(blind.y_true, data.train.y)


def test_a_sample_is_no_permutation_of_the_attackers(data):
    """The attack chooses by the same seed; a sample that followed it would hold poisoned images alone."""
    some = sample(data.train, 200, 0)
    assert len(some) == 200
    assert 5 <= int(some.poisoned.sum()) <= 45  # 20 expected
    assert sample(data.train, None, 0) is data.train


def test_penultimate_features_are_what_the_classifier_multiplies(victim, data):
    z = penultimate(victim.net, data.test.x[:6])
    with torch.no_grad():
        logits = victim.net.eval()(data.test.x[:6].float() / 255)
    assert torch.allclose(victim.net.body.linear(z), logits, atol=1e-5)


def test_principal_components_against_an_svd():
    z = cloud(50, 6, 0, spread=[5.0, 3.0, 1.0, 1.0, 1.0, 0.0])
    u, s, _ = np.linalg.svd(z.numpy() - z.numpy().mean(0), full_matrices=False)
    assert np.allclose(np.abs(principal(z, 2).numpy()), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    assert principal(z, 6).shape == (50, 5)  # the sixth has no variance


def test_the_rates_by_hand():
    scores, poisoned = torch.tensor([0.9, 0.2, 0.8, 0.1]), torch.tensor([True, True, False, False])
    found = rates(scores, scores > 0.5, poisoned)
    assert (found["auc"], found["tpr"], found["fpr"], found["precision"]) == (0.75, 0.5, 0.5, 0.5)
    assert (found["n"], found["n_poisoned"], found["n_flagged"]) == (4, 2, 2)
    nothing = rates(scores, scores > 2, torch.zeros(4, dtype=torch.bool))
    assert (nothing["auc"], nothing["tpr"], nothing["precision"], nothing["fpr"]) == (None, None, None, 0.0)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["detector=ac", "detector.judge=test"], "detector.judge=test: expected train"),
        (["detector=strip", "detector.limit=0"], "detector.limit=0: expected at least 1"),
        (["detector=strip", "detector.fit=gauss"], "detector.fit=gauss: expected normal or quantile"),
        (["detector=strip", "detector.frr=1.0"], "detector.frr=1.0: expected between 0 and 1"),
        (["detector=spectral", "detector.remove=0.0"], "detector.remove=0.0: expected between 0 and 1"),
        (["detector=ac", "detector.rule=big"], "detector.rule=big: expected one of silhouette"),
        (["detector=scan", "detector.ridge=0.0"], "ridge=0.0: expected above 0"),
        (["detector=spectre", "detector.epsilon=0.6"], "detector.epsilon=0.6"),
        (["detector=beatrix", "detector.folds=0"], "detector.folds=0: expected at least 1"),
        (["detector=abl_loss", "detector.ascent=up"], "detector.ascent=up: expected lga or flooding"),
        (["detector=abl_loss", "detector.optimizer.lr=-1"], "detector.optimizer cannot be used"),
        (["detector=cd", "detector.lr=0.0"], "detector.lr=0.0"),
        (["detector=nc", "detector.judge=train"], "detector.judge=train: expected net"),
        (["detector=nc", "detector.anomaly=-1.0"], "detector.anomaly=-1.0: expected 0 or more"),
        (["detector=nc", "detector.rule.success=0.0"], "detector.success=0.0, cost=0.001: expected success above 0"),
        (["detector=nc", "detector.optimizer.lr=-1.0"], "detector.optimizer cannot be used"),
        (
            ["detector=teco", "detector.corruptions=[fog,fogg]"],
            r"detector.corruptions=fogg: expected one of .*did you mean fog",
        ),
    ],
)
def test_a_mistake_is_named(overrides, text):
    with pytest.raises(UserError, match=text):
        instantiate(compose(overrides).detector)


def test_an_attack_without_a_poisoned_set_leaves_only_test_inputs(digits):
    controlled = build_attack(digits, "attack=badnets")
    controlled.leaves_poison = False
    with pytest.raises(UserError, match="Spectral looks at the poisoned training set, and BadNets leaves none"):
        check(made("spectral"), controlled)
    check(made("strip"), controlled)


def test_judged_test_inputs_carry_the_labels_the_net_gives(data, victim):
    split = judged_by(made("strip"), victim, data)
    triggered = int((data.test.y != 0).sum())
    assert (len(split), int(split.poisoned.sum())) == (len(data.test) + triggered, triggered)
    from bdx.training import predict

    assert torch.equal(split.y, predict(victim.net, split.x))


# STRIP


class Corner(nn.Module):
    """By hand: surely class 0 where the first pixel is white, else perhaps the quarter of the range the last one lies in."""

    def __init__(self):
        super().__init__()
        self.normalize, self.body = nn.Identity(), self.classify

    def classify(self, x):
        level = (x[:, 0, -1, -1] * 3.999).clamp(0, 3.999).long()
        sure = x[:, 0, 0, 0] > 0.99
        logits = nn.functional.one_hot(torch.where(sure, 0, level), 4).float()
        return torch.where(sure, 50.0, 1.0)[:, None] * logits

    def forward(self, x):
        return self.body(self.normalize(x))


def grey(levels) -> torch.Tensor:
    return (torch.as_tensor(levels) * 255).to(torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)


def test_entropy_by_hand():
    logits = torch.log(torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]).clamp_min(1e-30))
    assert torch.allclose(strip.entropy(logits), torch.tensor([2.0, 1.0, 0.0]), atol=1e-5)


def test_strip_knows_an_image_that_keeps_its_class(digits):
    clean = grey(torch.linspace(0, 0.98, 40))
    clean[:, :, 0, 0] = 0
    triggered = clean[:10].clone()
    triggered[:, :, 0, 0] = 255
    split, y = torch.cat([clean[:10], triggered]), torch.zeros(40, dtype=torch.long)
    for blend in ("pixels", "normalised"):
        detector = made("strip", "detector.overlays=20", f"detector.blend={blend}")
        known = replace(digits, clean=Split.clean(clean, y))
        scores = detector.score(Corner(), Split.clean(split, y[:20]), known, None)
        assert torch.allclose(scores[10:], torch.zeros(10), atol=1e-4)  # one class under every overlay: no entropy
        one_of_four = torch.tensor([math.e, 1, 1, 1]) / (math.e + 3)  # whichever class it is, the net says so
        assert torch.allclose(scores[:10], (one_of_four * one_of_four.log2()).sum().expand(10), atol=1e-4)
        assert auc(scores, torch.arange(20) >= 10) == 1


def test_strips_threshold_is_the_fitted_normals(digits, monkeypatch):
    bits = iter([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 3.0])] * 2)
    monkeypatch.setattr(strip.Strip, "entropy", lambda *_: next(bits))
    detector = made("strip")
    scores = detector.score(None, digits.test[:2], digits, None)
    assert detector.threshold == pytest.approx(-(2.0 - 2.3263 * 1.0), abs=1e-3)  # mean 2, std 1, 1 % below
    detector = made("strip_code")
    assert detector.flag(detector.score(None, digits.test[:2], digits, None), None).tolist() == [True, False]
    assert detector.threshold == pytest.approx(-1.2)  # the tenth quantile of 1, 2, 3
    assert torch.equal(scores, torch.tensor([-0.1, -3.0]))


# Spectral Signatures


def test_spectral_by_hand():
    z = torch.tensor([[-1.0, 5.0], [1.0, 5.0], [0.0, 5.1], [0.0, 4.9], [9.0, 9.0]])
    y = torch.tensor([2, 2, 2, 2, 7])
    assert torch.allclose(made("spectral").outlying(z, y), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), atol=1e-6)
    raw = made("spectral_code").outlying(z, y)
    assert np.allclose(raw[:4], [1.0, 1.0, 0.0, 0.0], atol=1e-4)  # along the first axis, where the mean is 0
    _, _, vt = np.linalg.svd((z[:4] - z[:4].mean(0)).numpy())
    moved = z + torch.tensor([3.0, 0.0])
    assert np.allclose(made("spectral_code").outlying(moved, y)[:4], (moved[:4].numpy() @ vt[0]) ** 2, atol=1e-4)


def test_spectral_finds_planted_poison_and_flags_its_share_of_each_class():
    z, y, poisoned = planted(poison=20)
    detector = made("spectral")
    scores = detector.outlying(z, y)
    assert auc(scores[y == 0], poisoned[y == 0]) > 0.99
    flagged = detector.flag(scores, y)
    assert [int(flagged[y == c].sum()) for c in range(6)] == [33, 30, 30, 30, 30, 30]  # 15 % of 220 and of 200
    assert flagged[poisoned].all()


# Activation Clustering


@pytest.mark.parametrize("name", ["ac", "ac_code"])
def test_ac_suspects_the_class_with_two_clusters_and_its_smaller_one(name):
    z, y, poisoned = planted(poison=60)
    detector = made(name, "detector.rule=silhouette")
    scores = detector.cluster(z, y, seed=0)
    flagged = detector.flag(scores, y)
    assert detector.suspected == {0}
    assert torch.equal(flagged, poisoned)
    assert auc(scores, poisoned) > 0.95


def test_acs_rules():
    z, y, _ = planted(poison=60)
    for rule, suspected in {"smaller": set(range(6)), "size": {0}, "both": {0}}.items():
        detector = made("ac_code", f"detector.rule={rule}", "detector.size=0.3")
        detector.cluster(z, y, seed=0)
        assert detector.suspected == suspected


def test_a_class_of_a_few_images_has_no_clusters():
    detector = made("ac", "detector.rule=smaller")
    scores = detector.cluster(torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 1]), seed=0)
    assert not scores.any()
    assert not detector.flag(scores, torch.tensor([0, 0, 1, 1, 1])).any()


# SCAn


@pytest.mark.parametrize("poison", [40, 300])
def test_scan_finds_the_class_with_two_identities_though_most_of_it_be_poison(poison):
    z, y, poisoned = planted(poison)
    clean, clean_y, _ = planted(poison=0, clean=50)
    clean = clean + 0.1 * cloud(len(clean), 12, 9)
    detector = made("scan")
    scores = detector.untangle(z.double(), y, clean.double(), clean_y)
    anomalies = detector.anomalies()
    assert [c for c, a in anomalies.items() if a > math.e**2] == [0]
    flagged = detector.flag(scores, y)
    assert flagged[poisoned].float().mean() > 0.99
    assert flagged[~poisoned].float().mean() < 0.01
    assert auc(scores[y == 0], poisoned[y == 0]) > 0.99


def test_scans_statistic_of_a_large_class_stands_out_by_its_size_unless_it_is_a_mean():
    """Nine classes of 450 and one of 950, nothing planted."""
    y = torch.cat([torch.full((950 if c == 0 else 450,), c) for c in range(10)])
    g = torch.Generator().manual_seed(0)
    z = torch.randn(len(y), 8, generator=g, dtype=torch.double) + 3 * torch.randn(10, 8, generator=g, dtype=torch.double)[y]
    found = {}
    for per_image in ("false", "true"):
        detector = made("scan", f"detector.per_image={per_image}")
        detector.untangle(z, y, z, y)
        found[per_image] = detector.anomalies()[0]
    assert found["false"] > 7.3891 > found["true"]


def test_scans_covariances_and_statistic():
    spread = torch.tensor([2.0, 1.0, 0.5], dtype=torch.double)
    g = torch.Generator().manual_seed(0)
    centre = 4 * torch.randn(40, 3, generator=g, dtype=torch.double)
    y = torch.arange(40).repeat_interleave(100)
    z = centre[y] + spread * torch.randn(4000, 3, generator=g, dtype=torch.double)
    means, within = scan.decompose(z - z.mean(0), y)
    assert torch.allclose(within, torch.diag(spread.square()), atol=0.15)
    plain = (z - z.mean(0))[y == 3].mean(0)
    assert means[3].norm() < plain.norm()  # shrunk towards the mean of all
    assert torch.allclose(means[3], plain, atol=0.1)
    # in coordinates of covariance 1 the gain of a split is n₁n₂/n · ‖difference of the means‖²
    detector, r = made("scan", "detector.ridge=0.000000001"), z[y == 3]
    white = torch.linalg.inv(torch.linalg.cholesky(within)).T
    detector.untangle(r, y[y == 3], z, y)
    first = scan.two_groups((r - z.mean(0)) @ white)
    a, b = r[first].mean(0), r[~first].mean(0)
    gain = first.sum() * (~first).sum() / len(r) * ((a - b) @ torch.linalg.inv(within) @ (a - b))
    assert detector.statistic[3] == pytest.approx(float(gain), rel=1e-5)


def test_anomaly_index_by_hand():
    detector = made("scan")
    detector.statistic = {0: 1.0, 1: 2.0, 2: 3.0, 5: 103.0}
    # median 2.5, deviations 1.5 0.5 0.5 100.5, their median 1
    assert detector.anomalies() == pytest.approx({0: 1.5 / 1.4826, 1: 0.5 / 1.4826, 2: 0.5 / 1.4826, 5: 100.5 / 1.4826})


# SPECTRE


def test_que_by_hand():
    white = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.double) * 0.75**0.5
    white[:, 0] *= 2**0.5  # covariance (correction 1) diag(2, 1)
    covariance, q = made("spectre").weights(white)
    assert torch.allclose(covariance, torch.diag(torch.tensor([2.0, 1.0], dtype=torch.double)))
    assert torch.allclose(q, torch.diag(torch.tensor([math.exp(4), 1.0], dtype=torch.double)))


def test_the_fourth_moment_against_a_dense_eigenvalue():
    y = cloud(300, 4, 1).double()
    y[:20, 1] *= 4
    z = torch.einsum("ni,nj->nij", y, y).flatten(1).numpy()
    one = np.eye(4).reshape(-1, 1)
    dense = np.linalg.eigvalsh(z.T @ z / 300 - one @ one.T)
    assert spectre.fourth_moment(y)[0] == pytest.approx(dense[-1], rel=1e-3)


def test_spectre_finds_weak_poison_that_spectral_signatures_miss():
    """Poison along a direction of little variance, whitened, stands out; along the largest it does not show."""
    spread = torch.tensor([10.0, 8, 6, 5, 4, 3, 2, 1, 0.3, 0.3])
    z = cloud(2200, 10, 0, spread=spread)
    poisoned = torch.arange(2200) >= 2100
    z[poisoned] = cloud(100, 10, 5, spread=0.5 * spread) + 3.0 * torch.eye(10)[8]
    y = torch.cat([torch.zeros(1000, dtype=torch.long), torch.ones(1200, dtype=torch.long)])
    detector = made("spectre", "detector.epsilon=0.1")
    scores = detector.filter(z, y)
    assert detector.target == 1
    assert auc(scores[y == 1], poisoned[y == 1]) > 0.97
    assert auc(made("spectral").outlying(z, y)[y == 1], poisoned[y == 1]) < 0.6
    flagged = detector.flag(scores, y)
    assert int(flagged.sum()) == 180  # 1.5 · 0.1 · 1200
    assert not flagged[y == 0].any()
    assert flagged[poisoned].float().mean() > 0.9


# Beatrix


def test_grams_and_ranges_by_hand():
    z = torch.tensor([[[1.0, 2.0], [3.0, -4.0]]])
    assert torch.allclose(beatrix.gram(z, 1), torch.tensor([[5.0, -5.0, 25.0]]))
    assert torch.allclose(beatrix.gram(z, 2), torch.tensor([[17.0, 73.0, 337.0]]).sqrt())
    assert torch.allclose(
        beatrix.gram(z, 3), torch.tensor([[65.0, -485.0, 27 * 27.0 + 64 * 64]]).abs().pow(1 / 3) * torch.tensor([1, -1, 1])
    )
    low, high = made("beatrix").range(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]))
    assert (float(low), float(high)) == (3 - 10, 3 + 10)
    g = torch.tensor([[26.0], [0.0], [-14.0]])
    assert torch.allclose(beatrix.outside(g, low, high), torch.tensor([1.0, 0.0, 1.0]), atol=1e-5)


def test_beatrix_notices_channels_that_go_together():
    def maps(n, seed, together):
        z = cloud(n * 6, 16, seed).abs().view(n, 6, 16)
        z[:, 0] = z[:, 1] * 8 if together else z[:, 0]
        return z

    scores, held_out = made("beatrix", "detector.width=3.0").deviations(
        maps(60, 0, False), torch.cat([maps(20, 1, False), maps(20, 2, True)])
    )
    assert auc(scores, torch.arange(40) >= 20) > 0.99
    assert held_out.shape == (60,)
    assert float(held_out.median()) <= float(scores[20:].min())


def test_beatrix_says_which_classes_it_cannot_know(data, victim, quick_trainer):
    some = data.clean.y < 3
    few = replace(data, clean=data.clean[torch.cat([(data.clean.y == c).nonzero().flatten()[:9] for c in range(10)])])
    detector = made("beatrix")
    with pytest.raises(
        UserError, match=r"10 of 10 classes have fewer than 10 reserved images .* so that it knows none; take more"
    ):
        detector.score(victim.net, data.train[:50].blind(), few, quick_trainer)
    left = replace(data, clean=data.clean[some])
    scores = detector.score(victim.net, data.train.blind(), left, quick_trainer)
    assert (scores[data.train.y >= 3] == 0).all()
    assert len(detector.notes) == 1
    assert detector.notes[0].startswith("Beatrix: 7 of 10 classes have fewer than 10 reserved images")


# ABL


@pytest.mark.parametrize(
    ("ascent", "mean", "expected"),
    [
        ("lga", "false", (2.0 - 0.2) / 2),
        ("lga", "true", 1.1),
        ("flooding", "false", (2.0 + 0.8) / 2),
        ("flooding", "true", 1.1),
    ],
)
def test_the_bent_loss_by_hand(ascent, mean, expected):
    ce = torch.tensor([2.0, 0.2], requires_grad=True)
    loss = made("abl_loss", f"detector.ascent={ascent}", f"detector.mean={mean}").loss(ce)
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert ce.grad[0] > 0
    assert (ce.grad[1] < 0) == (mean == "false")  # what has fallen below the floor is raised again


def test_abl_scores_are_losses_of_a_net_of_its_own(data, victim, quick_trainer):
    detector = made("abl_loss", "detector.epochs=1", "detector.isolate=0.1")
    split = sample(data.train, 100, 0).blind()
    scores = detector.score(victim.net, split, data, quick_trainer)
    assert (scores < 0).all()
    assert not torch.allclose(-scores, losses(victim.net, split, cross_entropy))
    flagged = detector.flag(scores, split.y)
    assert int(flagged.sum()) == 10
    assert scores[flagged].min() >= scores[~flagged].max()


# Cognitive Distillation


def test_total_variation_by_hand():
    m = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    assert cd.variation(m).tolist() == [0.5]  # two steps of 1, over four pixels


class Patch(nn.Module):
    """Logits of the upper left corner alone where it is white, else of every pixel."""

    def forward(self, x):
        whole = x.mean(1).flatten(1) * torch.linspace(-1, 1, x.shape[2] * x.shape[3])
        corner = x[:, :, :2, :2].mean((1, 2, 3))
        on = torch.sigmoid(60 * (corner - 0.95))[:, None]
        return 20 * (
            on * torch.stack([corner, -corner], 1) + (1 - on) * torch.stack([whole[:, ::2].sum(1), whole[:, 1::2].sum(1)], 1)
        )


def test_a_triggered_image_needs_a_smaller_mask(digits):
    x = (torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 220).to(torch.uint8)
    x[20:, :, :2, :2] = 255
    y = torch.zeros(40, dtype=torch.long)
    detector = made("cd", "detector.steps=60", "detector.size=0.05", "detector.smooth=1.0")
    known = replace(digits, clean=Split.clean(x[:20], y[:20]))
    scores = detector.score(Patch(), Split.clean(x, y), known, None)
    assert auc(scores, torch.arange(40) >= 20) > 0.9
    assert float(-scores.min()) <= 64
    masks = -scores[:20]  # the clean images of the threshold, with the noise of another batch
    assert float(-detector.threshold) == pytest.approx(float(masks.mean() - masks.std()), rel=0.2)


# TeCo


class Bright(nn.Module):
    """Class 1 where the mean is above a half; with `keeps`, class 1 always where the first pixel is white."""

    def forward(self, x):
        on = (x.mean((1, 2, 3)) > 0.5) | (x[:, 0, 0, 0] > 0.99)
        return nn.functional.one_hot(on.long(), 2).float()


def test_the_severity_at_which_a_label_changes():
    detector = made("teco", "detector.corruptions=[brightness,contrast]")
    x = grey(torch.tensor([0.3, 0.05]))
    t = detector.gives_way(Bright(), x, torch.Generator())
    assert t.tolist() == [[3.0, 5.0 if 0.05 + 0.5 > 0.5 and 0.05 + 0.4 <= 0.5 else 6.0], [6.0, 6.0]]
    assert detector.spread(Bright(), x, 0).tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize("name", list(corruptions.CORRUPTIONS))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 20, 12)], ids=str)
def test_a_corruption_keeps_the_shape_and_grows_with_severity(name, shape):
    of, severities = corruptions.CORRUPTIONS[name]
    assert len(severities) == 5
    coarse = torch.rand(2, shape[0], 5, 4, generator=torch.Generator().manual_seed(3))
    rows = nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)
    away = []
    for c in (severities[0], severities[-1]):
        worse = of(rows.clone(), c, torch.Generator().manual_seed(0))
        assert worse.shape == rows.shape
        assert torch.isfinite(worse).all()
        away.append(float((worse.clamp(0, 1) - rows).abs().mean()))
    assert 0 < away[0] < away[1]


def test_corruptions_by_hand():
    x = torch.tensor([0.2, 0.4, 0.4])[None, :, None, None].repeat(1, 1, 8, 8)
    assert torch.allclose(corruptions.brightness(x, 0.2, None)[0, :, 0, 0], torch.tensor([0.3, 0.6, 0.6]))
    assert torch.allclose(corruptions.defocus_blur(x, 3, None), x, atol=1e-6)
    assert torch.allclose(corruptions.contrast(x, 0.1, None), x, atol=1e-6)
    steps = torch.arange(16.0).view(1, 1, 4, 4)
    assert corruptions.pixelate(steps, 0.5, None)[0, 0, 0].tolist() == [2.5, 2.5, 4.5, 4.5]
    noisy = corruptions.impulse_noise(torch.full((1, 3, 100, 100), 0.5), 0.1, torch.Generator().manual_seed(0))
    assert float((noisy != 0.5).float().mean()) == pytest.approx(0.1, abs=0.01)


def test_jpeg_against_pillow():
    from PIL import Image

    x = torch.linspace(0, 1, 24)[:, None] * torch.linspace(0.2, 1, 24) * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    picture = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
    for quality in (10, 60):
        with io.BytesIO() as file:
            picture.save(file, "JPEG", quality=quality, subsampling=0)
            theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
        ours = corruptions.jpeg_compression((x * 255).round()[None] / 255, quality, None)[0] * 255
        assert float((ours - theirs).abs().mean()) < 1.5


# Neural Cleanse, which judges the net


def test_its_search_is_that_of_the_defense():
    plain = lambda node: OmegaConf.to_container(node, resolve=True)
    mine, theirs = plain(compose(["detector=nc"]).detector), plain(compose(["defense=nc"]).defense)
    flat = mine.pop("rule") | mine
    assert {k: flat[k] for k in theirs["search"]} == theirs["search"]
    assert (mine["anomaly"], mine["augment"]) == (theirs["anomaly"], theirs["augment"])


def test_the_scores_are_the_anomaly_indices_that_the_defense_finds(digits, victim, quick_trainer):
    few = replace(digits, clean=digits.clean[:20])
    torch.manual_seed(0)
    detector = short("nc")
    scores = detector.score(victim.net, None, few.allow(detector.needs), quick_trainer)
    torch.manual_seed(0)
    asked = compose([*TINY, "defense=nc", "defense.search.epochs=1", "defense.anomaly=1000.0"])
    defense = build_defense(asked, victim)
    defense.run(few.allow(defense.needs), quick_trainer)
    assert defense.facts["anomaly_index"] == float(scores.max()) > 0
    assert detector.flag(scores, None).tolist() == (scores > 2).tolist()


def test_its_verdict_in_words():
    found = verdict(torch.tensor([0.0, 3.25, 1.0]), torch.tensor([False, True, False]), made("nc"))
    assert (found["auc"], found["tpr"], found["fpr"], found["n_flagged"]) == (None, None, None, 1)
    assert (found["flagged_classes"], found["anomaly_indices"]) == ("1", "0.0000 3.2500 1.0000")
    row = {"judged": "net", "detector": "nc", "attack": "given"} | found
    threshold = "anomaly index of each class, threshold 2"
    assert line(row) == f"nc on given: class 1 flagged; {threshold}: 0: 0.00, 1: 3.25 (above), 2: 1.00"
    assert line(row | {"flagged_classes": ""}).startswith(f"nc on given: no class flagged; {threshold}: 0: 0.00, 1: 3.25, ")
    assert line(row | {"flagged_classes": "0 1"}).startswith("nc on given: classes 0, 1 flagged; ")


# filter and retrain


@pytest.mark.parametrize("name", ["ac", "spectral"])
def test_what_is_flagged_is_not_trained_on(name, data, victim, quick_trainer, monkeypatch):
    defense = build_defense(compose([*TINY, f"defense={name}", "defense.epochs=1"]), victim)
    data = data.poisoned(data.train[:256])
    flagged, kept = torch.arange(256) % 4 == 0, []
    monkeypatch.setattr(type(defense.detector), "flag", lambda self, scores, y: flagged)
    left = AC.left
    monkeypatch.setattr(AC, "left", lambda self, d, split: kept.append(split) or left(self, d, split))
    defense.run(data.allow(defense.needs), quick_trainer)
    assert torch.equal(kept[0].x, data.train.x[~flagged])
    of_poisoned = float(flagged[data.train.poisoned].float().mean())
    assert defense.facts == pytest.approx({"removed": float(flagged.float().mean()), "removed_of_poisoned": of_poisoned})


def test_the_filter_does_not_know_the_mask(data, victim, quick_trainer):
    data = data.poisoned(data.train[:512])
    defense = build_defense(compose([*TINY, "defense=spectral"]), victim)
    told = defense.suspects(data, quick_trainer)
    lied = replace(data.train, poisoned=~data.train.poisoned, y_true=data.train.y_true.flip(0))
    assert torch.equal(told, defense.suspects(data.poisoned(lied), quick_trainer))
    assert 0.1 < float(told.float().mean()) < 0.2


def test_retraining_starts_from_fresh_weights(data, victim, quick_trainer):
    data = data.poisoned(data.train[:256])
    defense = build_defense(compose([*TINY, "defense=spectral", "defense.epochs=1", "defense.optimizer.lr=0.0"]), victim)
    before = victim.net.body.conv1.weight.clone()
    net = defense.run(data.allow(defense.needs), quick_trainer)
    assert not torch.allclose(net.body.conv1.weight, before)


def test_a_filter_that_needs_clean_images_is_refused(victim):
    defense = compose([*TINY, "defense=ac"]).defense
    defense.detector = compose(["detector=scan"]).detector
    with pytest.raises(UserError, match="judges the training set and needs no clean images"):
        build_defense(type("cfg", (), {"defense": defense}), victim)


@pytest.mark.parametrize("name", ["ac", "spectral"])
def test_a_filter_judges_all_images(name, victim):
    with pytest.raises(UserError, match=r"defense\.detector\.limit=10: all images are judged"):
        build_defense(compose([*TINY, f"defense={name}", "defense.detector.limit=10"]), victim)


# what `bdx info defenses` says


@pytest.mark.parametrize("name", names("defense"))
def test_every_defense_says_what_it_trains_and_costs(name):
    _, said = source(info.value(CONF / "defense" / f"{name}.yaml", "_target_"))
    assert said["trains"]
    assert said["cost"]


@pytest.mark.parametrize("name", names("defense"))
def test_what_it_costs_names_the_epochs_of_every_loop(name):
    """Beside the key `epochs`, which `bdx info` shows itself: those of the stages of a file and of its variants."""
    node = compose([f"defense={name}"]).defense
    loops = [v["epochs"] for v in node.values() if isinstance(v, dict | DictConfig) and "epochs" in v]
    cost = source(node["_target_"])[1]["cost"]
    assert {*loops, node.get("teacher_epochs")} - {None} <= {int(n) for n in re.findall(r"\d+", cost)}


def test_info_tells_epochs_of_the_file_or_of_its_parent(capsys):
    info.info(["defenses"])
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "epochs: 10 " in said["fst"]
    assert "epochs: 50 " in said["npd_tp"]
    assert "trains all weights, from fresh ones" in said["ac"]
    info.info(["detectors"])
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(said) == set(DETECTORS)
    assert "judges test inputs or the poisoned training set, needs clean images" in said["strip_code"]


def test_few_clean_images_are_enough(shared, victim, quick_trainer):
    few = load_digits(shared, "dataset.source.size=16", "dataset.reserved.count=10")
    few = few.poisoned(victim.poison(few.train))
    for name in ("scan", "strip"):
        detector = short(name, "detector.limit=20")
        split = judged_by(detector, victim, few).blind()
        assert torch.isfinite(detector.score(victim.net, split, few.allow(detector.needs), quick_trainer)).all()
