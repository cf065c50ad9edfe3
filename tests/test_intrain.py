"""Defenses that train on the poisoned set: their losses by hand, whom they isolate, what each loop gets to see."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import TINY, build_attack
from torch import Generator, nn

from bdx.archs.base import fetches
from bdx.archs.stamp import Stamp
from bdx.configure import compose
from bdx.contrastive import Projector, contrast, nt_xent, trusting
from bdx.datasets.base import Batch
from bdx.defenses import dp
from bdx.defenses.dbd import Halves, mixed, sharpen
from bdx.defenses.nab import nearest_centre
from bdx.errors import UserError
from bdx.isolation import cross_entropy, flooding, local_gradient_ascent, losses, lowest, symmetric
from bdx.run import build_defense, check
from bdx.sensitivity import likeness_of_centres, sensitivity, turned
from bdx.split import pixels
from bdx.views import GREY, Twice, View, grey, jittered, random_blur, random_resized_crop, turn_hue

TRAINED = ["abl", "dbd", "nab", "d_st", "d_br"]
VIEW = {"scale": 0.2, "jitter": 0.4, "hue": 0.1, "jitter_p": 0.8, "grey": 0.2, "blur": 0.5, "sigma": [0.1, 2.0]}


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


@pytest.fixture(scope="module")
def poisoned(attack, digits):
    return digits.poisoned(attack.poison(digits.train))


def made(attack, name: str, *overrides: str):
    torch.manual_seed(0)
    return build_defense(compose([*TINY, f"defense={name}", *overrides]), attack)


class Untrained:
    """Stands where a trainer is made: trains nothing, remembers what each loop would have gone over."""

    def __init__(self):
        self.loops = {}

    def __call__(self, stage, epochs):
        fit = lambda module, batches: self.loops.__setitem__(stage, (module, batches))
        return SimpleNamespace(fit=fit, strategy=SimpleNamespace(root_device=torch.device("cpu")))


def g(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# losses


def test_a_held_loss_by_hand():
    for value, sign in ((0.2, -1.0), (0.9, 1.0)):
        gradients = []
        for hold, wanted in ((flooding, abs(value - 0.5) + 0.5), (local_gradient_ascent, sign * value)):
            loss = torch.tensor(value, requires_grad=True)
            held = hold(loss, 0.5)
            held.backward()
            assert held.item() == pytest.approx(wanted)
            gradients.append(float(loss.grad))
        assert gradients == [sign, sign]  # the two names of one step


def test_symmetric_cross_entropy_by_hand():
    logits, y = torch.tensor([[0.0, math.log(3.0)], [2.0, -1.0]]), torch.tensor([0, 0])
    p = 1 / (1 + math.exp(-3))
    wanted = [0.1 * math.log(4) + 2.0 * 0.75 * -math.log(1e-4), -0.1 * math.log(p) + 2.0 * (1 - p) * -math.log(1e-4)]
    assert symmetric(logits, y, alpha=0.1, beta=2.0).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("trusted", [None, [True, False, True, True]], ids=["nt_xent", "semi-supervised"])
def test_contrastive_losses_against_a_double_loop(trusted):
    z, y = torch.randn(8, 5, generator=g()), torch.tensor([1, 1, 1, 2])
    at = lambda i: z[i] / z[i].norm()
    total = 0.0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        near = [j for j in others if j % 4 == i % 4 or (trusted and trusted[i % 4] and y[j % 4] == y[i % 4])]
        norm = sum(math.exp(float(at(i) @ at(j)) / 0.5) for j in others)
        total -= sum(float(at(i) @ at(j)) / 0.5 - math.log(norm) for j in near) / len(near)
    with torch.autocast("cpu", torch.bfloat16):  # they are in full precision all the same
        found = nt_xent(z, 0.5) if trusted is None else contrast(z, trusting(y, torch.tensor(trusted)), 0.5)
    assert float(found) == pytest.approx(total / 8, rel=1e-5)


@pytest.mark.parametrize(("name", "norm"), [("dbd", True), ("nab", True), ("d_st", False)])
def test_whose_projection_has_batchnorm(name, norm):
    """DBD's released head has, and BackdoorBench's of NAB is that; SupContrast's, which D-ST takes, has none."""
    assert compose([f"defense={name}"]).defense.contrast.projector_norm == norm
    assert any(isinstance(m, torch.nn.BatchNorm1d) for m in Projector(8, 4, norm)) == norm


def test_centres_that_spread_by_hand():
    z, y = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([0, 0, 3, 1])
    half = 2 * (0.5**0.5 + 0.5**0.5 + 0)  # both orders of: (0,1), (1,3), (0,3); class 2 is absent
    assert float(likeness_of_centres(z, y, 4)) == pytest.approx(half / 9, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # which would leave two digits of it
        assert float(likeness_of_centres(z, y, 4)) == pytest.approx(half / 9, rel=1e-6)


def test_mixmatch_by_hand():
    assert sharpen(torch.tensor([[0.2, 0.8]]), 0.5)[0].tolist() == pytest.approx([0.04 / 0.68, 0.64 / 0.68])
    x, y = torch.tensor([[[[1.0]]], [[[0.0]]]]), torch.eye(2)
    for share in (0.3, 0.7):  # an image keeps the larger part
        x2, y2 = mixed(x, y, torch.tensor(share), torch.tensor([1, 0]))
        assert x2.flatten().tolist() == pytest.approx([0.7, 0.3])
        assert y2.flatten().tolist() == pytest.approx([0.7, 0.3, 0.3, 0.7])


def test_a_step_of_mixmatch(attack, poisoned, monkeypatch):
    """The weight grows with the steps; without mixing, CE and squared error are those of each half."""
    defense = made(attack, "dbd", "defense.iterations=2", "defense.ramp=2.0")
    net = defense.net.eval()
    x = pixels(poisoned.train.x[:9])
    pair = Batch(x[:3], poisoned.train.y[:3], torch.arange(3)), Batch(x[3:], poisoned.train.y[3:6], torch.arange(3))
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))  # each its own partner
    found = [defense.semi(pair) for _ in range(3)]
    with torch.no_grad():
        guess = net(x[3:]).softmax(1)
        mean = sharpen((guess[:3] + guess[3:]) / 2, 0.5)
        ce, mse = F.cross_entropy(net(x[:3]), pair[0].y), (guess - torch.cat([mean, mean])).square().mean()
    for step, out in enumerate(found):
        assert float(out["loss"]) == pytest.approx(float(ce + 15.0 * step / 4 * mse), rel=1e-4)


# who is isolated


class Reads(nn.Module):
    """Logits from one pixel: certain of class 0 where it is white, uncertain elsewhere."""

    def forward(self, x):
        return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10) * 8.0 * x[:, :1, -1, -1]


def test_the_lowest():
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.5).tolist() == [False, True, False, True]
    assert lowest(torch.tensor([3.0, 1.0, 2.0, 1.0]), 0.01).tolist() == [False, True, False, False]


def test_abl_isolates_what_was_planted(attack, poisoned):
    """A net that knows the trigger and nothing else: the isolated images are poisoned ones, all of them."""
    defense, train = made(attack, "abl", "defense.isolate=0.05"), poisoned.train
    defense.net = Reads()
    low = defense.lowest(train)
    assert defense.facts == {"isolated": round(0.05 * len(train)), "isolation_precision": 1.0}
    assert bool(train.poisoned[low].all())
    assert torch.allclose(
        losses(defense.net, train, cross_entropy)[low], torch.tensor(math.log(1 + 9 * math.exp(-8.0))), rtol=1e-3
    )


def test_abl_learns_to_isolate(digits, quick_trainer):
    """A large patch in small batches: whichever way a CPU rounds, five short epochs are enough for it."""
    attack = build_attack(digits, "attack=badnets", "attack.patch=8")
    poisoned = digits.poisoned(attack.poison(digits.train))
    short = ["defense.tuning.epochs=5", "defense.tuning.optimizer.lr=0.03", "defense.tuning.batch=32"]
    defense = made(attack, "abl", *short, "defense.finetune.epochs=1", "defense.unlearn.epochs=1", "defense.isolate=0.03")
    defense.run(poisoned.allow(defense.needs), quick_trainer)
    assert defense.facts["isolation_precision"] > 0.5  # one in ten is poisoned


def test_what_each_loop_of_abl_sees(attack, poisoned):
    defense, trainer = made(attack, "abl"), Untrained()
    defense.run(poisoned.allow(defense.needs), trainer)
    n, k = len(poisoned.train), round(0.01 * len(poisoned.train))
    assert {name: len(batches.split) for name, (_, batches) in trainer.loops.items()} == {
        "tuning": n, "finetune": n - k, "unlearn": k
    }  # fmt: skip
    batch = next(iter(trainer.loops["unlearn"][1]))
    with torch.no_grad():
        learn, unlearn = (trainer.loops[name][0].training_step(batch, 0) for name in ("finetune", "unlearn"))
    assert float(learn) == -float(unlearn) != 0


@pytest.mark.parametrize("name", ["abl", "abl_code"])
def test_abl_unlearns_every_isolated_image(name, attack, poisoned):
    """14 of them in batches of 8; the loops over many images leave out a last batch that is not full."""
    how = [f"defense.{loop}.batch={size}" for loop, size in (("tuning", 500), ("finetune", 500), ("unlearn", 8))]
    defense, trainer = made(attack, name, *how), Untrained()
    defense.run(poisoned.allow(defense.needs), trainer)
    sizes = {loop: [len(b.index) for b in batches] for loop, (_, batches) in trainer.loops.items()}
    assert sizes == {"tuning": [500, 500], "finetune": [500, 500], "unlearn": [8, 6]}


@pytest.mark.parametrize("name", TRAINED)
def test_no_loop_is_left_without_images(name, attack, poisoned):
    """Batches of 256 and more of what few images a share is."""
    few = replace(poisoned, train=poisoned.train[:60])
    defense, trainer = made(attack, name), Untrained()
    defense.run(few.allow(defense.needs), trainer)
    assert all(len(batches) > 0 for _, batches in trainer.loops.values())


def test_sensitivity_by_hand(poisoned):
    """Features that are the pixels: the score is their mean squared change under the same draw."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    found = sensitivity(net, "1", poisoned.train[:6], seed=5, size=4)
    draw = g(5)
    for i in (slice(0, 4), slice(4, 6)):
        x = pixels(poisoned.train.x[i])
        assert torch.allclose(found[i], (turned(x, draw) - x).square().mean((1, 2, 3)))
    assert float(turned(torch.zeros(2, 3, 8, 8), g()).abs().max()) == 0
    assert float(turned(torch.ones(8, 3, 32, 32), g()).amin()) == 0  # black comes in from outside


@pytest.mark.parametrize("name", ["d_st", "d_br"])
def test_separation_sizes(name, attack, poisoned):
    defense, n = made(attack, name), len(poisoned.train)
    clean, poison = defense.separate(poisoned, Untrained())
    assert (int(clean.sum()), int(poison.sum())) == (round(0.2 * n), round(0.05 * n))
    assert not (clean & poison).any()
    assert defense.facts["isolation_precision"] == pytest.approx(float(poisoned.train.poisoned[poison].float().mean()))


def test_br_repairs_the_attacked_net_in_turns(attack, poisoned):
    defense, trainer = made(attack, "d_br"), Untrained()
    net = defense.run(poisoned.allow(defense.needs), trainer)
    assert all(torch.equal(v, attack.net.state_dict()[k]) for k, v in net.state_dict().items())
    _, turns = trainer.loops["repair"]
    signs = [sign for sign, _ in turns]
    assert signs == sorted(signs)
    assert len(signs) == len(turns)
    assert set(signs) == {-1, 1}


def test_st_trains_the_head_alone(attack, poisoned):
    defense, trainer = made(attack, "d_st"), Untrained()
    defense.run(poisoned.allow(defense.needs), trainer)
    module, batches = trainer.loops["head"]
    assert sum(p.numel() for p in module.tuned) == 64 * 10 + 10
    assert len(batches.split) == round(0.2 * len(poisoned.train)) + round(0.05 * len(poisoned.train))
    assert sum(p.numel() for p in trainer.loops["contrast"][0].tuned) > 60_000


# DBD and NAB


def test_whom_mixmatch_trusts(attack, poisoned):
    """Half of the images, those of lowest loss, asked anew in each pass; the others come twice."""
    defense, asked = made(attack, "dbd"), []
    defense.net = Reads()
    halves = Halves(3, lambda: (asked.append(1), defense.halves(poisoned))[1])
    passes = [list(halves), list(halves)]
    assert len(asked) == 2
    for batches in passes:
        assert len(batches) == len(halves) == 3
        assert all(u.x.shape[0] == 2 * k.x.shape[0] == 128 for k, u in batches)
    assert not torch.equal(passes[0][0][0].x, passes[1][0][0].x)
    known, unknown = defense.halves(poisoned)
    assert known.seed != unknown.seed  # or the two would be shuffled and augmented alike
    assert bool((poisoned.train.poisoned[lowest(losses(defense.net, poisoned.train, defense.loss), 0.5)]).any())
    assert defense.facts["trusted_poison"] == pytest.approx(0.2, abs=0.01)  # all the poison, which is low, in one half


def test_nearest_centre_by_hand():
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.2, 5.0], [9.0, 9.0]])
    y, trusted = torch.tensor([0, 1, 1, 0, 2]), torch.tensor([True, True, False, False, False])
    assert nearest_centre(z, y, trusted, 3).tolist()[:4] == [0, 1, 0, 1]  # class 2 has no centre
    assert nearest_centre(z, y, trusted, 3)[4] < 2


def test_nab_stamps_whom_it_relabels_and_every_test_image(attack, poisoned):
    defense, trainer = made(attack, "nab"), Untrained()
    net = defense.run(poisoned.allow(defense.needs), trainer)
    x = pixels(poisoned.train.x[:4])
    stamped = x.clone()
    stamped[:, :, :2, :2] = 0
    assert torch.equal(Stamp(2, 0.0)(x), stamped)
    with torch.no_grad():
        assert torch.equal(net.eval()(x + 0), net(stamped))
        plain = net.normalize.module  # what stands behind the stamp
        assert not torch.equal(net.body(plain(torch.ones_like(x))), net(torch.ones_like(x)))
        net.normalize.active = False  # as while it was trained
        y, mark = torch.tensor([1, 2, 3, 4]), torch.tensor([True, False, False, True])
        half = torch.where(mark.view(-1, 1, 1, 1), stamped, x)[[3, 0]]
        found = defense.relabelled(Batch(x[[3, 0]], torch.zeros(2), torch.tensor([3, 0])), y, mark)
        assert torch.equal(found, F.cross_entropy(net(half), y[[3, 0]]))
    assert defense.facts["isolated"] == round(0.05 * len(poisoned.train))


# views


def test_colours_against_torchvision():
    x = torch.rand(3, 3, 6, 6, generator=g())
    turns = torch.tensor([-0.1, 0.0, 0.3]).view(-1, 1, 1, 1)
    wanted = torch.stack([TF.adjust_hue(image, float(t)) for image, t in zip(x, turns.flatten(), strict=True)])
    assert torch.allclose(turn_hue(x, turns), wanted, atol=1e-4)
    assert torch.allclose(grey(x), TF.rgb_to_grayscale(x, 3), atol=1e-6)
    assert sum(GREY) == pytest.approx(1, abs=2e-4)
    flat = torch.full((4, 3, 5, 5), 0.5)  # of one grey there is nothing but brightness to change, at most by 0.4
    out = jittered(flat, 0.4, 0.1, g())
    assert 0.29 < float(out.min()) < float(out.max()) < 0.71
    assert torch.equal(jittered(x, 0.0, 0.0, g()).round(decimals=4), x.round(decimals=4))


def test_blur_against_torchvision():
    x = torch.rand(2, 3, 32, 32, generator=g())
    wanted = TF.gaussian_blur(x, [13, 13], [1.5, 1.5])
    assert torch.allclose(random_blur(x, [1.5, 1.5], g())[..., 7:-7, 7:-7], wanted[..., 7:-7, 7:-7], atol=1e-3)


def test_a_crop_of_a_ramp_is_a_ramp():
    """Within one image the step between pixels is the crop's width; across images widths differ, within 0.2 to 1 of area."""
    ramp = ((torch.arange(32) + 0.5) / 32).expand(64, 3, 32, 32)
    across, down = (random_resized_crop(x, 0.2, g())[:, 0] for x in (ramp, ramp.transpose(2, 3)))
    width, height = (z[:, 15, 16] - z[:, 15, 15] for z in (across, down.transpose(1, 2)))
    area = width * height * 32**2
    assert float(area.min()) > 0.15
    assert float(area.max()) <= 1.001
    assert len(area.round(decimals=3).unique()) > 40
    assert float(across.min()) >= 0
    assert float(across.max()) <= 1


def test_views_draw_per_image_and_repeat_with_the_seed():
    x = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8, generator=g()).expand(8, 3, 16, 16).contiguous()
    y, twice = torch.arange(8), Twice(View(**VIEW))
    (a, same), (b, _) = twice(x, y, 10, g(1)), twice(x, y, 10, g(1))
    assert torch.equal(a, b)
    assert same is y
    assert a.shape == (16, 3, 16, 16)
    assert len({tuple(v.flatten().tolist()) for v in a}) == 16
    one = View(**VIEW)(x[:, :1], y, 10, g())[0]
    assert one.shape == (8, 1, 16, 16)


# DP


def test_without_opacus_it_says_how_to_get_it(attack, monkeypatch):
    monkeypatch.setattr(dp, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"DPSGD needs Opacus.*pip install 'bdx\[dp\]'"):
        made(attack, "dp")


def test_group_norm_in_place_of_batchnorm(attack):
    net = dp.with_group_norm(attack.net, groups=6)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_groups for m in norms] == [math.gcd(6, m.num_channels) for m in norms] != []
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in attack.net.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    x, other = torch.rand(1, 3, 32, 32, generator=g()), torch.rand(1, 3, 32, 32, generator=g(1))
    alone, beside = net.train()(x), net(torch.cat([x, other]))[:1]
    assert torch.allclose(alone, beside, atol=1e-5)  # images do not see each other


def test_a_wrapped_architecture_may_not_fetch_either():
    assert fetches({"_target_": "timm.create_model", "pretrained": True})
    assert fetches({"model_name": "hf-hub:x"})
    assert not fetches({"_target_": "x", "pretrained": False})


def test_lots_are_drawn_anew(poisoned):
    lots = dp.ByLot(poisoned.train, size=100, shuffle=True, augment=None, drop_last=True, classes=10, seed=0)
    sizes = [len(b.index) for b in lots]
    assert len(sizes) == len(lots) == len(poisoned.train) // 100
    assert len(set(sizes)) > 3
    assert 80 < sum(sizes) / len(sizes) < 120


def test_dp_learns_and_says_epsilon(attack, poisoned, quick_trainer):
    pytest.importorskip("opacus", reason="needs bdx[dp]")
    defense = made(attack, "dp", "defense.epochs=1", "defense.batch=64")
    small = replace(poisoned, train=poisoned.train[:256])
    fresh = defense.net.body.linear.weight.clone()
    net = defense.run(small.allow(defense.needs), quick_trainer)
    assert not torch.equal(net.body.linear.weight, fresh)
    assert 0 < defense.facts["epsilon"] < 10
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_a_step_of_dp_by_hand(attack, poisoned):
    """Almost no noise: the sum of the images' gradients, each cut to norm C, over the batch expected. x is channels-last."""
    opacus = pytest.importorskip("opacus", reason="needs bdx[dp]")
    how = ["defense.noise=1e-9", "defense.clip=0.5", "defense.batch=32", "defense.optimizer.lr=1.0"]
    defense = made(attack, "dp", *how)
    x, y = pixels(poisoned.train.x[:6]), poisoned.train.y[:6]
    params, total = defense.trained(), 0
    for i in range(6):
        loss = F.cross_entropy(defense.net.train()(x[i : i + 1]), y[i : i + 1])
        gradient = torch.cat([p.flatten() for p in torch.autograd.grad(loss, params)])
        total = total + gradient * (0.5 / gradient.norm()).clamp(max=1)
    before = torch.cat([p.detach().clone().flatten() for p in params])
    defense.sampled = opacus.GradSampleModule(defense.net)
    optimizer = defense.configure_optimizers()["optimizer"]
    defense.training_step(Batch(x, y, torch.arange(6)), 0).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in params])
    assert torch.allclose(before - after, total / 32, atol=1e-5)


# what is refused


def test_nab_gives_one_label_and_takes_no_cutmix(attack):
    with pytest.raises(UserError, match=r"cutmix=1\.0: NAB needs one label for each image"):
        check(made(attack, "nab"), attack, cutmix=1.0)


@pytest.mark.parametrize("name", TRAINED)
def test_an_attack_without_a_poisoned_set_is_refused(name, digits):
    controlled = build_attack(digits, "attack=badnets")
    controlled.leaves_poison = False
    defense = made(controlled, name)
    with pytest.raises(
        UserError, match=f"{type(defense).__name__} works on the poisoned training set, and BadNets leaves none"
    ):
        check(defense, controlled)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("abl", "hold=ascent", "defense.hold=ascent: expected flooding or lga"),
        ("abl", "isolate=1.0", "defense.isolate=1.0: expected a share above 0 and below 1"),
        ("abl", "tuning.epochs=0", "defense.tuning.epochs=0: expected at least 1"),
        ("abl", "unlearn.optimizer.lr=-1", "defense.unlearn.optimizer cannot be used: Invalid learning rate"),
        ("dbd", "trust=0.0", "defense.trust=0.0: expected a share above 0"),
        ("dbd", "alpha=0.0", "alpha=0.0.*expected the first three above 0"),
        ("dbd", "view.scale=2.0", "defense.view.scale=2.0.*expected 0 to 1"),
        ("dbd", "view.sigma=[2.0,1.0]", "the smaller one first"),
        ("nab", "patch.size=40", "a size of 1 to 32"),
        ("d_st", "clean=0.99", "clean=0.99, poison=0.05: expected at most 1 together"),
        ("d_br", "poison=-0.1", "defense.poison=-0.1: expected a share"),
    ],
)  # fmt: skip
def test_mistakes(name, override, message, attack):
    with pytest.raises(UserError, match=message):
        made(attack, name, f"defense.{override}")
