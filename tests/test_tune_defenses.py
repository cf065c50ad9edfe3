"""NAD, NC, I-BAU, SAU and MCR against values worked out by hand and against problems whose answer is known."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_attack
from torch import nn

from bdx import backdoor, surgery
from bdx.archs.base import build
from bdx.configure import compose
from bdx.datasets.base import Batches
from bdx.defenses import ibau, nad, nc, sau
from bdx.detectors import nc as cleanse
from bdx.errors import UserError
from bdx.run import build_defense
from bdx.split import Split, pixels


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


@pytest.fixture(scope="module")
def few(digits):
    """The same with 20 reserved images."""
    return replace(digits, clean=digits.clean[:20])


def made(attack, name, *overrides):
    torch.manual_seed(0)
    return build_defense(compose([*TINY, f"defense={name}", *overrides]), attack)


def batch(digits, n=16):
    return next(iter(digits.batches(digits.clean, size=n, shuffle=True, augment=False)))


# NAD


def test_an_attention_map_by_hand():
    z = torch.tensor([[[[3.0, 0.0], [0.0, 1.0]], [[4.0, 0.0], [0.0, -1.0]]]])  # two channels of 2×2
    wanted = torch.tensor([[25.0, 0.0, 0.0, 2.0]]) / math.sqrt(25**2 + 2**2)
    assert torch.allclose(nad.attention(z, 2.0), wanted)
    assert torch.allclose(nad.attention(z, 1.0), torch.tensor([[7.0, 0.0, 0.0, 2.0]]) / math.sqrt(53))


def test_the_maps_are_those_of_the_last_three_resolutions(attack):
    assert nad.maps(attack.net, torch.zeros(2, 3, 32, 32)) == [f"body.layer{i}" for i in (2, 3, 4)]


@pytest.mark.parametrize("arch", ["wrn16_1", "vit_b_16"])
def test_other_nets_have_three_maps_too(arch):
    small = ["arch.image_size=32", "arch.patch=8", "arch.layers=4", "arch.heads=2", "arch.width=16", "arch.mlp=16"]
    cfg = compose([f"arch={arch}", *(small if arch == "vit_b_16" else [])]).arch
    net = build(dict(cfg), num_classes=10, mean=[0.5] * 3, std=[0.2] * 3, shape=(3, 32, 32))
    how = {"teacher_epochs": 1, "recipe": "paper", "epochs": 1, "batch": 2, "augment": False, "cutout": None}
    defense = nad.NAD(net, betas=[1.0] * 3, p=2.0, optimizer=torch.optim.SGD, schedule=None, **how)
    with torch.no_grad():
        _, maps = defense.look(net.eval(), torch.rand(2, 3, 32, 32))
    sizes = [m.shape[1] for m in maps]
    assert sizes == ([32 * 32, 16 * 16, 8 * 8] if arch == "wrn16_1" else [17] * 3)  # 16 patches and the class token


def test_a_net_without_three_maps_is_refused_by_what_nad_has():
    thin = ["arch.image_size=32", "arch.patch=8", "arch.layers=2", "arch.heads=2", "arch.width=16", "arch.mlp=16"]
    net = build(dict(compose(["arch=vit_b_16", *thin]).arch), num_classes=10, mean=[0.5] * 3, std=[0.2] * 3, shape=(3, 32, 32))
    with pytest.raises(UserError, match=r"NAD compares three maps, and this net has neither .* take a deeper arch") as refused:
        nad.maps(net, net.sample())
    assert "layer instead" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("recipe", ["paper", "code"])
def test_nads_loss_by_hand(recipe, attack, digits):
    defense, b = made(attack, "nad", f"defense.recipe={recipe}"), batch(digits)
    torch.manual_seed(1)
    defense.teacher = copy.deepcopy(defense.net)
    with torch.no_grad():
        for p in defense.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    defense.net.eval(), defense.teacher.eval()
    out = defense.training_step(b, 0)
    far, layers = 0, {"paper": ("layer2", "layer3", "layer4"), "code": ("layer3", "layer4")}[recipe]
    for beta, layer in zip((500, 1000, 1000), layers, strict=False):
        a = []
        for net in (defense.net, defense.teacher):
            with surgery.watch_output(net, f"body.{layer}") as seen, torch.no_grad():
                net(b.x)
            energy = (seen[0] ** 2).sum(1).flatten(1)
            a.append(energy / energy.norm(dim=1, keepdim=True))
        far = far + beta * (a[0] - a[1]).square().mean()
    assert far > 0.1
    assert torch.allclose(out["attention"], far, rtol=1e-3)  # in `code` the third map is 1 everywhere and adds nothing
    assert torch.allclose(out["loss"], far + F.cross_entropy(defense.net(b.x), b.y), rtol=1e-3)


def test_nads_authors_cut_a_hole_and_backdoorbench_does_not(attack, few):
    for name, hole in (("nad", 0), ("nad_own", 2)):
        assert made(attack, name).batches(few).augment.cutout == hole


def test_the_teacher_is_tuned_and_then_left_alone(attack, few, quick_trainer):
    defense = made(attack, "nad", "defense.epochs=1", "defense.teacher_epochs=1")
    defense.run(few.allow(defense.needs), quick_trainer)
    assert not any(p.requires_grad for p in defense.teacher.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(weights(defense.teacher), weights(attack.net), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(defense.teacher), weights(defense.net), strict=True))


def weights(net):
    return [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]


# NC


def test_the_anomaly_index_by_hand():
    """Median 10.5 (of an even number), deviations 9.5, 0.5, 0.5, 1.5: their median is 1."""
    index = cleanse.anomalies(torch.tensor([1.0, 10.0, 11.0, 12.0]))
    assert torch.allclose(index, torch.tensor([9.5, 0.5, 0.0, 0.0]) / 1.4826, atol=1e-5)
    assert torch.equal(cleanse.anomalies(torch.ones(5)), torch.zeros(5))


def one_by_one(success, norms, cost, patience, stop_after):
    """The released rule for a single class, in plain Python: (epoch that gave the best trigger, its end, last cost)."""
    best = before = math.inf
    at, up, down, stale, rose, fell = None, 0, 0, 0, False, False
    for epoch, (ok, norm) in enumerate(zip(success, norms, strict=True)):
        if ok and norm < best:
            best, at = norm, epoch
        if best < math.inf:
            stale = stale + 1 if best >= 0.99 * before else 0
        before = min(best, before)
        stop = rose and fell and stale >= stop_after
        up, down = (up + 1, 0) if ok else (0, down + 1)
        if up >= patience:
            up, cost, rose = 0, cost * 2, True
        elif down >= patience:
            down, cost, fell = 0, cost / 2**1.5, True
        if stop:
            return at, epoch, cost
    return at, None, cost


def test_all_classes_at_once_follow_the_rule_of_one():
    g = torch.Generator().manual_seed(0)
    success, norms = torch.rand(60, 7, generator=g) < torch.linspace(0, 1, 7), torch.rand(60, 7, generator=g)
    rule = {"cost": 0.001, "patience": 2, "stop_after": 6}
    state, best, end, cost = cleanse.Weights(7, "cpu", **rule), [None] * 7, [None] * 7, [None] * 7
    for epoch in range(60):
        better = state.update(success[epoch], norms[epoch])
        for k in range(7):
            best[k] = epoch if better[k] else best[k]
            if end[k] is None:
                cost[k] = float(state.cost[k])
                end[k] = epoch if state.done[k] else None
    wanted = [one_by_one(success[:, k].tolist(), norms[:, k].tolist(), **rule) for k in range(7)]
    assert (best, end) == ([w[0] for w in wanted], [w[1] for w in wanted])
    assert cost == pytest.approx([w[2] for w in wanted])
    assert any(e is not None for e in end)  # the sequences do end some


class Planted(nn.Module):
    """Five classes by the mean of five strips; a white pixel in the corner says class 3, whatever else is there."""

    def __init__(self):
        super().__init__()
        self.spec = {"shape": [1, 5, 10], "num_classes": 5}
        self.gain = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        corner = (x[:, 0, 0, 9] - 0.5).relu()
        return self.gain * (x[:, 0].mean(2) + corner[:, None] * F.one_hot(torch.tensor(3), 5))


@pytest.fixture(scope="module")
def planted():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 100, (40, 1, 5, 10), generator=g, dtype=torch.uint8)
    y = torch.arange(40) % 5
    x[torch.arange(40), 0, y] += 100
    return Batches(Split.clean(x, y), size=20, shuffle=True, augment=None, drop_last=False, classes=5, seed=0)


def searched(batches, trainer, classes, epochs=60):
    how = {"success": 0.95, "cost": 0.01, "patience": 3, "stop_after": 25}
    adam = lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.9))
    stage = cleanse.Search(Planted(), classes, how | {"optimizer": adam})
    batches.epoch = 0
    trainer("triggers", epochs).fit(stage, batches)
    return stage


def test_a_planted_trigger_is_found(planted, quick_trainer):
    stage = searched(planted, quick_trainer, torch.arange(5))
    norms = stage.masks.sum((1, 2, 3))
    assert norms.argmin() == 3
    assert (cleanse.anomalies(norms) > 2).nonzero()[:, 0].tolist() == [3]
    assert stage.masks[3].argmax() == 9  # the corner
    assert stage.patterns[3, 0, 0, 9] > 0.9
    x = pixels(planted.split.x)
    stamped = (1 - stage.masks[3]) * x + stage.masks[3] * stage.patterns[3]
    assert (stage.net(stamped).argmax(1) == 3).float().mean() > 0.9


def test_one_class_at_a_time_gives_the_same_triggers(planted, quick_trainer):
    whole = searched(planted, quick_trainer, torch.arange(5), epochs=8)
    for k in (0, 3):
        alone = searched(planted, quick_trainer, torch.tensor([k]), epochs=8)
        assert torch.allclose(alone.masks[0], whole.masks[k], atol=1e-5)


@pytest.mark.parametrize(
    ("how", "images", "wanted"),
    [
        ({"batch": 256, "at_once": None}, 5000, [10]),
        ({"batch": 1024, "at_once": None}, 5000, [4, 4, 2]),
        ({"batch": 9000, "at_once": None}, 9000, [1] * 10),
        ({"batch": 1024, "at_once": None}, 20, [10]),  # there are no more to a batch
        ({"batch": 1024, "at_once": 3}, 5000, [3, 3, 3, 1]),
    ],
)
def test_on_a_gpu_a_pass_stays_within_so_many_images(how, images, wanted, monkeypatch):
    asked, one = [], torch.zeros(1, 1, 1, 1)
    stage = lambda net, classes, how: asked.append(len(classes)) or SimpleNamespace(masks=one, patterns=one)
    monkeypatch.setattr(cleanse, "Search", stage)
    clean = type("Clean", (), {"x": SimpleNamespace(is_cuda=True), "__len__": lambda self: images})()
    data = SimpleNamespace(num_classes=10, batches=lambda *_, **how: None)
    cleanse.smallest(None, clean, data, how | {"epochs": 1}, True, lambda *_: SimpleNamespace(fit=lambda *_: None))
    assert asked == wanted


def test_the_lesson_keeps_true_labels_and_stamps_a_fifth_of_the_images():
    clean = Split.clean(torch.full((10, 1, 2, 2), 100, dtype=torch.uint8), torch.arange(10))
    mask, pattern = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    mask[0, 0, 0, 0], mask[1, 0, 1, 1] = 0.5, 1.0
    lesson = nc.with_triggers(clean, mask, pattern, 0.2, seed=0)
    assert len(lesson) == 8 + 2 + 2
    assert (lesson.x[:8] == 100).all()
    assert lesson.x[8, 0].tolist() == [[178, 100], [100, 100]]  # (100 + 255) / 2
    assert lesson.x[11, 0].tolist() == [[100, 100], [100, 255]]
    assert sorted(lesson.y[:10].tolist()) == list(range(10))
    assert torch.equal(lesson.y[8:10], lesson.y[10:])


def test_where_no_class_is_flagged_the_net_stays_as_it_is(attack, few, quick_trainer):
    defense = made(attack, "nc", "defense.search.epochs=1", "defense.anomaly=1000.0", "defense.search.at_once=5")
    net = defense.run(few.allow(defense.needs), quick_trainer)
    after = net.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in attack.net.state_dict().items())
    assert [note[:17] for note in defense.notes if "flags" in note] == ["NC flags no class"]
    assert defense.facts["flagged_classes"] == ""
    assert 0 < defense.facts["anomaly_index"] < 1000


# I-BAU


def test_the_hypergradient_of_a_quadratic_problem():
    """I(δ, θ) = ½ δᵀAδ − δᵀBθ has its minimum at δ* = A⁻¹Bθ; of L = ½‖δ − c‖² + ½‖θ‖² along it the gradient is
    θ + Bᵀ A⁻¹ (δ* − c); after few iterations the inverse is the Neumann series r Σ (I − rA)^k instead."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    root, B, c, theta = draw(4, 4), draw(4, 3), draw(4), draw(3).requires_grad_()
    A, r = root @ root.T / 4 + torch.eye(4, dtype=torch.float64), 0.3
    delta = torch.linalg.solve(A, B @ theta).detach().requires_grad_()

    def gradient(iterations):
        phi = delta - r * (A @ delta - B @ theta)
        outer = (delta - c).square().sum() / 2 + theta.square().sum() / 2
        loss = ibau.implicit(outer, phi, delta, iterations)
        assert torch.allclose(loss, outer)
        return torch.autograd.grad(loss, theta)[0]

    slope = (delta - c).detach()
    exact = theta + B.T @ torch.linalg.solve(A, slope)
    assert torch.allclose(gradient(300), exact, rtol=1e-8)
    for k in (1, 5):
        powers = (torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - r * A, i) for i in range(k))
        assert torch.allclose(gradient(k), theta + r * B.T @ (sum(powers) @ slope), rtol=1e-10)


def test_on_a_net_it_is_the_derivative_of_the_whole(attack, digits):
    """One iteration is the gradient through one step of the inner descent: checked against that, unrolled."""
    defense, b = made(attack, "ibau", "defense.iterations=1", "defense.share=1.0"), batch(digits)
    defense.ready().double()  # the part that goes through δ is small beside the other
    pixels_of, y = b.x.double(), b.y
    defense.delta = 0.1 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, grad = defense.net.body.linear.weight, torch.autograd.grad
    (got,) = grad(defense.training_step(b._replace(x=pixels_of), 0)["loss"], weight)
    delta = defense.delta.clone().requires_grad_()
    ce = lambda: F.cross_entropy(defense.net(pixels_of + delta), y)
    moved = delta - 0.1 * grad(0.001 * delta.square().sum() - ce(), delta, create_graph=True)[0]
    slope, direct = grad(ce(), delta)[0], grad(ce(), weight)[0]
    (through,) = grad((moved * slope).sum(), weight)
    assert through.abs().max() > 0
    assert torch.allclose(got - direct, through, rtol=1e-6, atol=1e-6 * float(through.abs().max()))


@pytest.mark.parametrize("n", [16, 200])
def test_some_images_always_carry_the_perturbation(n, attack, digits):
    """Below 100 images the released code perturbs none and fine-tunes."""
    defense, seen = made(attack, "ibau"), []
    defense.at = lambda x, delta: seen.append(delta) or torch.zeros(len(x), 10)
    x = pixels(digits.train.x[:n])
    defense.outer(torch.ones(1, 3, 32, 32), x, digits.train.y[:n])
    assert int(seen[0].flatten(1).any(1).sum()) == {16: 1, 200: 2}[n]


def test_the_search_raises_the_loss_and_stays_in_the_ball(attack, few):
    radius = 0.01
    for recipe, source in (("paper", "label"), ("paper", "prediction"), ("code", "label")):
        how = f"defense.recipe={recipe}", f"defense.away_from={source}", f"defense.radius={radius}", "defense.batch=20"
        defense = made(attack, "ibau", *how)
        defense.ready()
        defense.search = few.batches(few.clean, size=20, shuffle=False, augment=False)
        delta, b = defense.worst_case(), batch(few, 20)
        with torch.no_grad():
            y = b.y if (recipe, source) == ("paper", "label") else defense.net(b.x).argmax(1)
            assert F.cross_entropy(defense.at(b.x, delta), y) > F.cross_entropy(defense.net(b.x), y)
        assert (float(delta.norm()) <= radius + 1e-6) == (recipe == "paper")


def test_the_units_of_the_perturbation(attack, digits):
    """A pixel in the authors' code, whose images are in [0,1]; in BackdoorBench what the net gets behind its normalisation."""
    x, delta = pixels(digits.clean.x[:2]), torch.full((1, 3, 32, 32), 0.5)
    ours, theirs = made(attack, "ibau"), made(attack, "ibau_code")
    assert (ours.recipe, ours.unit, theirs.recipe, theirs.unit) == ("paper", "pixel", "code", "deviation")
    with torch.no_grad():
        assert torch.equal(ours.at(x, delta), ours.net(x + 0.5))
        assert torch.allclose(theirs.at(x, delta), theirs.net.body(theirs.net.normalize(x) + 0.5), atol=1e-5)


def test_attention_has_a_second_derivative(digits, few, quick_trainer):
    thin = {"image_size": 32, "patch": 8, "layers": 2, "heads": 2, "width": 16, "mlp": 16}
    words = ["dataset=digits", "arch=vit_b_16", *(f"arch.{k}={v}" for k, v in thin.items()), "defense=ibau", "defense.epochs=1"]
    cfg = compose([*words, "train=fast", "logger=none"])
    attacked = backdoor.build_attack(cfg, digits)
    defense = build_defense(cfg, attacked)
    net = defense.run(few.allow(defense.needs), quick_trainer)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert not torch.equal(net.body.heads.head.weight, attacked.net.body.heads.head.weight)


@pytest.mark.parametrize(("n", "batch", "said"), [(100, 256, []), (99, 256, [99]), (140, 50, [50])])
def test_it_is_said_where_the_share_is_less_than_one_image(n, batch, said, attack, digits, monkeypatch):
    defense = made(attack, "ibau", f"defense.batch={batch}")
    monkeypatch.setattr(ibau.Tuning, "run", lambda *_: None)
    defense.run(replace(digits, clean=digits.clean[:n]), None)
    assert [f"I-BAU: defense.share=0.01 of a batch of {k} is less than one image: one" for k in said] == [
        note[: note.index(" carries")] for note in defense.notes
    ]
    assert not any("\n" in note for note in defense.notes)


# SAU


def test_the_lower_loss_by_hand(attack):
    defense = made(attack, "sau")
    f, before = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    y = said = torch.tensor([0, 0, 0])
    ce, js = math.log(1 + math.exp(-1)), lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    kl = lambda p, q: p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))
    # the first is not flipped, of either net; the second is shared; of the third only f₀ is flipped
    wanted = (-0.01 * (ce + ce + ce) / 2 + js(p, q)) / 3
    assert float(defense.lower(f, before, y, said, said)) == pytest.approx(wanted, rel=1e-5)


def test_what_is_unlearned_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    s = math.exp(3) / (math.exp(3) + 2)
    loss = sau.unlearn(logits, torch.tensor([0, 1]), torch.tensor([False, True]))
    assert float(loss) == pytest.approx(-math.log(1 - s) / 2, rel=1e-5)


@pytest.mark.parametrize("clamp", ["true", "false"])
def test_shared_perturbations_fool_more_and_stay_in_the_box(clamp, attack, few):
    defense, b = made(attack, "sau", f"defense.clamp={clamp}"), batch(few, 20)
    with torch.no_grad():
        for p in defense.net.parameters():
            p.mul_(1 + 0.05 * torch.randn_like(p))
    defense.ready()
    said, before = defense.net(b.x).argmax(1), defense.attacked(b.x).argmax(1)
    worst = defense.shared(b.x, b.y, said, before)
    assert (worst - b.x).abs().max() <= 0.2 + 1e-6
    assert (worst.min() >= 0 and worst.max() <= 1) == (clamp == "true")
    with torch.no_grad():
        start = defense.moved(b.x, torch.full_like(b.x, 0.2))
        at = [defense.lower(defense.net(x), defense.attacked(x), b.y, said, before) for x in (start, worst)]
    assert at[1] < at[0]
    assert all(p.grad is None for p in defense.parameters())


def test_the_attacked_net_of_sau_stays_and_batchnorm_too(attack, few, quick_trainer):
    defense = made(attack, "sau", "defense.epochs=1", "defense.steps=1")
    net = defense.run(few.allow(defense.needs), quick_trainer)
    for a, b in zip(defense.attacked.parameters(), attack.net.parameters(), strict=True):
        assert torch.equal(a, b)
    for mine, old in zip(surgery.batchnorms(net), surgery.batchnorms(attack.net), strict=True):
        assert torch.equal(mine.running_mean, old.running_mean)
    assert not torch.equal(net.body.linear.weight, attack.net.body.linear.weight)


# MCR


def test_the_curve_by_hand(attack):
    defense = made(attack, "mcr")
    end = copy.deepcopy(defense.net)
    with torch.no_grad():
        for p in end.parameters():
            p.add_(1)
    defense.draw(end)
    start, last = (list(n.parameters()) for n in (attack.net, end))
    with torch.no_grad():
        for p in defense.control[1].parameters():
            p.add_(10)
        at = {t: defense.curve(t) for t in (0.0, 0.5, 1.0)}
        for i, (a, z) in enumerate(zip(start, last, strict=True)):
            assert torch.equal(at[0.0][i], a)
            assert torch.equal(at[1.0][i], z)
            bend = (a + z) / 2 + 10  # the straight line's middle, moved
            assert torch.allclose(at[0.5][i], a / 4 + bend / 2 + z / 4, atol=1e-5)


def test_five_points_start_on_a_straight_line(attack):
    defense = made(attack, "mcr", "defense.points=5")
    end = copy.deepcopy(defense.net)
    with torch.no_grad():
        for p in end.parameters():
            p.add_(1)
    defense.draw(end)
    assert len(list(defense.trained())) == 3 * len(list(attack.net.parameters()))
    with torch.no_grad():
        for p, old in zip(defense.curve(0.3), attack.net.parameters(), strict=True):
            assert torch.allclose(p, old + 0.3, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_at_its_ends_the_curve_gives_the_nets_with_fresh_statistics(t, attack, few, quick_trainer):
    defense = made(attack, "mcr", f"defense.t={t}", "defense.epochs=1", "defense.end.epochs=1", "defense.batch=20")
    net = defense.run(few.allow(defense.needs), quick_trainer)
    same = [torch.equal(a, b) for a, b in zip(weights(net), weights(attack.net), strict=True)]
    assert all(same) if t == 0 else not any(same)
    assert not torch.equal(defense.control[1][0], torch.lerp(defense.control[0][0], defense.control[2][0], 0.5))
    with surgery.watch_input(net, "body.layer1.0.bn1", (seen := []).append), torch.no_grad():
        net.eval()(pixels(few.clean.x))
    norm = net.body.layer1[0].bn1
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4)  # of all images, in one batch
    assert norm.momentum == 0.1


# mistakes


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["defense=nad", "defense.betas=[1.0,2.0]"], r"defense.betas=\[1.0, 2.0\], p=2.0: expected three weights"),
        (["defense=nad", "defense.recipe=mine"], "defense.recipe=mine: expected paper or code"),
        (["defense=nad", "defense.teacher_epochs=0"], "defense.teacher_epochs=0: expected at least 1"),
        (["defense=nc", "defense.share=1.0"], "expected a share between 0 and 1"),
        (["defense=nc", "defense.search.at_once=0"], "defense.search.at_once=0: expected at least 1"),
        (["defense=nc", "defense.search.optimizer.lr=-1.0"], "defense.search.optimizer cannot be used"),
        (["defense=ibau", "defense.unit=metre"], "defense.unit=metre: expected pixel or deviation"),
        (["defense=ibau", "defense.share=0.0"], "share above 0 and at most 1"),
        (["defense=ibau", "defense.iterations=0"], "defense.iterations=0: expected at least 1"),
        (["defense=sau", "defense.radius=0.0"], "expected the first two above 0"),
        (["defense=mcr", "defense.points=2"], "defense.points=2, t=0.1: expected 3 points or more"),
        (["defense=mcr", "defense.t=1.5"], "t from 0 to 1"),
        (["defense=mcr", "defense.end.epochs=0"], "epochs=0: expected at least 1"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_is_refused_in_one_line(overrides, text, attack):
    with pytest.raises(UserError, match=text) as refused:
        build_defense(compose([*TINY, *overrides]), attack)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nad", "nc", "ibau", "sau", "mcr"])
def test_they_run_in_mixed_precision_and_repeat_to_the_bit(name, attack, few, quick_trainer):
    short = {"nad": ["teacher_epochs=1"], "nc": ["search.epochs=1", "search.at_once=2", "anomaly=0.0"], "mcr": ["end.epochs=1"]}
    nets = []
    for _ in range(2):
        defense = made(attack, name, "defense.epochs=1", *(f"defense.{o}" for o in short.get(name, [])))
        nets.append(defense.run(few.allow(defense.needs), lambda *a: quick_trainer(*a, precision="bf16-mixed")))
    a, b = (n.state_dict() for n in nets)
    assert all(torch.equal(a[k], b[k]) and torch.isfinite(a[k].float()).all() for k in a)
    assert all(p.dtype == torch.float32 for p in nets[0].parameters())
