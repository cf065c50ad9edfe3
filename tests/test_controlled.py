"""Attacks that control the training: roles, triggers by hand, both nets trained, a killed training resumed to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import build_attack

from bdx.attacks.base import Attack
from bdx.attacks.blind import least_norm
from bdx.attacks.input_aware import Painter, diversity
from bdx.errors import UserError
from bdx.store import Store
from bdx.training import make_trainer

QUICK = {
    "wanet": [],
    "bpp_controlled": [],
    "blind": ["attack.history=3"],
    "lira": ["attack.joint=0.5", "attack.widths=[8,8]"],
    "input_aware": ["attack.mask.epochs=2", "attack.widths=[8,8]"],
}
JOINT = ("lira", "input_aware")
PLAIN = ["train.augment={zoom: 1.0, crop: 0, flip: false, rotate: 0.0, cutout: 0, cutmix: 0.0}"]


def few(digits, n=64):
    return digits.poisoned(digits.train[:n])


def quick(digits, name, *overrides) -> Attack:
    return build_attack(digits, f"attack={name}", "train.batch=16", "train.epochs=2", *QUICK[name], *overrides)


# roles


@pytest.mark.parametrize("name", ["wanet", "bpp_controlled", "input_aware"])
@pytest.mark.parametrize("labels", ["all2one", "all2all"])
def test_every_image_of_every_step_has_one_role_and_the_label_of_its_role(name, labels, digits):
    attack = quick(digits, name, f"attack.labels={labels}", "attack.target=7", *PLAIN)
    data, done, counts = few(digits, 80), 0, torch.zeros(3, dtype=torch.int64)
    for batch in attack.batches(data):
        r = batch.roles
        assert torch.cat(r).sort().values.tolist() == list(range(16))
        y = data.train.y_true[batch.index]
        assert torch.equal(
            batch.y[r.backdoor], (y[r.backdoor] + 1) % 10 if labels == "all2all" else torch.full_like(r.backdoor, 7)
        )
        kept = torch.cat([r.cross, r.clean])
        assert torch.equal(batch.y[kept], y[kept])
        clean = data.train.x[batch.index].float() / 255
        assert torch.equal(batch.x[r.clean], clean[r.clean])
        counts += torch.tensor([len(rows) for rows in r])
        done += 16
        assert abs(int(counts[0]) - attack.ratio * done) <= 0.5
        assert abs(int(counts[1]) - attack.cross_ratio * done) <= 0.5
    assert done == 80


@pytest.mark.parametrize("name", ["wanet", "bpp_controlled"])
def test_backdoor_images_in_training_are_those_of_the_test(name, digits):
    attack = quick(digits, name, *PLAIN)
    data = few(digits)
    for batch in attack.batches(data):
        b, c = batch.roles.backdoor, batch.roles.cross
        x = data.train.x[batch.index]
        assert torch.equal((batch.x[b] * 255).round().to(torch.uint8), attack.stamp(x[b]))
        assert not torch.equal((batch.x[c] * 255).round().to(torch.uint8), x[c])


def test_roles_come_from_the_seed_and_the_pass_alone(digits):
    first, again = (quick(digits, "wanet").batches(few(digits)) for _ in range(2))
    torch.manual_seed(1)
    one, same = list(first), list(again)
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.roles.backdoor, b.roles.backdoor)
    resumed = quick(digits, "wanet").batches(few(digits))
    resumed.epoch = 1
    later = next(iter(first))
    assert torch.equal(next(iter(resumed)).x, later.x)
    assert not torch.equal(later.index, one[0].index)


def test_a_share_of_less_than_one_image_is_met_over_the_steps(digits):
    attack = quick(digits, "wanet", "attack.ratio=0.01", "attack.cross_ratio=0.0")
    counts = [len(b.roles.backdoor) for b in attack.batches(few(digits, 640))]
    assert sum(counts) == 6
    assert max(counts) == 1


# WaNet


def test_the_warp_is_grid_sample_of_a_smooth_field_by_hand(digits):
    """Bilinear interpolation written out, pixel by pixel, at the coordinates that the paper's formula gives."""
    attack = quick(digits, "wanet", "attack.pattern_seed=3")
    noise = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    noise = F.interpolate(noise / noise.abs().mean(), size=32, mode="bicubic", align_corners=True)
    x = torch.rand(1, 3, 32, 32)
    out = attack.trigger(x)
    for i, j in [(0, 0), (5, 20), (16, 16), (31, 7), (30, 31)]:
        at = [(2 * p / 31 - 1 + 0.5 * float(noise[0, c, i, j]) / 32) for c, p in ((1, i), (0, j))]
        row, col = ((min(max(v, -1.0), 1.0) + 1) / 2 * 31 for v in at)
        top, left = min(int(row), 30), min(int(col), 30)
        down, right = row - top, col - left
        four = x[0, :, top : top + 2, left : left + 2]
        wanted = (
            four[:, 0, 0] * (1 - down) * (1 - right) + four[:, 0, 1] * (1 - down) * right
            + four[:, 1, 0] * down * (1 - right) + four[:, 1, 1] * down * right
        )  # fmt: skip
        assert torch.allclose(out[0, :, i, j], wanted, atol=1e-4)
    assert torch.allclose(attack.trigger(torch.full((1, 3, 32, 32), 0.3)), torch.tensor(0.3), atol=1e-6)  # nothing from outside


def test_a_cross_warp_strays_by_a_pixel_pitch_at_most_and_each_image_on_its_own(digits):
    attack = quick(digits, "wanet")
    ramp = torch.arange(32).mul(8).to(torch.uint8).expand(4, 3, 32, 32).contiguous()  # 8 levels a pixel, along x
    out = attack.cross(ramp, torch.arange(4), torch.Generator().manual_seed(0)).float()
    away = (out - attack.stamp(ramp).float()).abs()
    assert float(away.mean()) > 1
    assert float(away.max()) <= 8 * 0.5 + 1  # U(−1, 1)/32 of a range of 2 is half a pixel
    assert not torch.equal(out[0], out[1])


# Bpp


def test_a_negative_carries_the_rounding_of_the_next_image(digits):
    attack = quick(digits, "bpp_controlled", "attack.dither=false")
    x = torch.tensor([100, 20, 250], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32).contiguous()
    # of 8 levels 20 becomes 36, 250 becomes 255, 100 becomes 109
    out = attack.cross(x, torch.tensor([0, 1, 2]), torch.Generator())
    assert out[:, 0, 0, 0].tolist() == [116, 25, 255]
    assert attack.stamp(x)[:, 0, 0, 0].tolist() == [109, 36, 255]


# Blind


def test_blinds_pattern(digits):
    attack = quick(digits, "blind")
    out = attack.trigger(torch.full((1, 3, 32, 32), 0.5))
    assert (out[0, 1, 3:8, 23:26] * 2).tolist() == [[2, 0, 2], [1, 2, 1], [1, 1, 0], [1, 2, 1], [2, 0, 2]]
    assert int((out != 0.5).sum()) == 3 * 9


@pytest.mark.parametrize(
    ("a", "b", "share"), [([1.0, 0.0], [0.0, 1.0], 0.5), ([2.0, 0.0], [0.0, 1.0], 0.2), ([1.0, 0.0], [3.0, 0.0], 1.0)]
)
def test_the_shortest_mean_of_two_gradients(a, b, share):
    a, b = torch.tensor(a), torch.tensor(b)
    assert float(least_norm(a, b)) == pytest.approx(share)
    around = torch.linspace(0, 1, 101)
    assert (
        float((around[:, None] * a + (1 - around[:, None]) * b).norm(dim=1).min())
        >= float((share * a + (1 - share) * b).norm()) - 1e-6
    )


def test_the_backdoor_waits_until_the_task_is_learned(digits, quick_trainer):
    attack = quick(digits, "blind", "attack.threshold=1000.0")
    terms = []
    report = lambda stage, epoch, epochs, means, seconds: terms.append(means["triggered"])
    attack.fit(few(digits), partial(make_trainer, device=torch.device("cpu"), precision="32-true", seed=0, report=report))
    assert terms[0] == 0  # no loss has been seen
    assert terms[1] > 0
    cold = quick(digits, "blind", "attack.threshold=0.001")
    cold.fit(few(digits), quick_trainer)
    assert not cold.on


# networks that make triggers


def test_the_painter_is_a_u_net_without_skips_and_tanh_twice_narrows_it():
    once, twice = (Painter(3, 3, [32, 64, 128], t).eval() for t in (False, True))
    convs = [(m.in_channels, m.out_channels) for m in once if isinstance(m, torch.nn.Conv2d)]
    assert convs == [
        (3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 128),
        (128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3),
    ]  # fmt: skip
    twice.load_state_dict(once.state_dict())
    with torch.no_grad():
        once[-1].weight.mul_(100)
        twice[-1].weight.mul_(100)
        x = torch.rand(2, 3, 32, 32)
        assert once(x).max() > 0.95
        assert torch.allclose(twice(x), ((2 * once(x) - 1).tanh() + 1) / 2, atol=1e-5)
        assert twice(x).max() <= 0.8809


def test_diversity_by_hand():
    a, b = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)
    of_b = torch.tensor([1.0, 6.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert float(diversity(a, b, a, of_b)) == pytest.approx((3 / 1 + 3 / 6) / 2)
    same = a.clone().requires_grad_()
    diversity(a, b, same, a).backward()
    assert torch.isfinite(same.grad).all()


def test_input_aware_paints_its_own_image_and_cross_images_get_anothers_trigger(digits):
    """What reaches the victim, against the formula; the networks in eval mode, so that a batch does not matter."""
    attack = quick(digits, "input_aware", *PLAIN).eval()
    (batch, *_) = attack.batches(few(digits))
    seen, victim = [], attack.net.forward
    attack.net.forward = lambda x: seen.append(x.detach()) or victim(x)
    attack.losses(batch)
    b, c, clean = batch.roles
    assert torch.allclose(seen[0][b], attack.trigger(batch.x[b]), atol=1e-5)
    pattern, mask = attack.painted(batch.x[(c + 1) % 16])
    assert torch.allclose(seen[0][c], (1 - mask) * batch.x[c] + mask * pattern, atol=1e-5)
    assert torch.equal(seen[0][clean], batch.x[clean])
    assert len(b) > 0 < len(c)


def test_liras_noise_is_within_epsilon_and_survives_rounding(digits):
    attack = quick(digits, "lira", "attack.widths=[16,32,64,128]")
    x = digits.test.x[:32]
    with torch.no_grad():
        attack.fixed[-2].weight.mul_(1000)  # saturated, as a trained one
    change = attack.stamp(x).int() - x.int()
    assert 1 <= int(change.abs().max()) <= 3  # 2.55 grey levels
    assert torch.equal(attack.trigger(x.float() / 255), attack.trigger(x.float() / 255))


@pytest.mark.parametrize("name", list(QUICK))
def test_what_is_trained_changes_and_what_is_not_stays(name, digits, quick_trainer):
    attack = quick(digits, name)
    before = {k: v.clone() for k, v in attack.state_dict().items()}
    attack.fit(few(digits), quick_trainer)
    after = attack.state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    trained = {"wanet": set(), "bpp_controlled": set(), "blind": {"recent"}, "lira": {"maker", "fixed"}}
    assert changed == {"net"} | trained.get(name, {"maker", "masker"})


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("every", ["epoch", "step"])
def test_both_rates_follow_their_schedules(name, every, digits, quick_trainer):
    attack = quick(digits, name)
    falling = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    if every == "epoch":
        attack.recipe = replace(attack.recipe, schedule=falling, every="epoch")
    attack.generator = attack.generator | {"schedule": falling}
    attack.fit(few(digits), quick_trainer)
    victim, painter = attack.trainer.lr_scheduler_configs
    assert victim.scheduler.last_epoch == (2 if every == "epoch" else 8)
    assert painter.scheduler.last_epoch == 2
    started = attack.generator["optimizer"].keywords["lr"]
    assert attack.trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(started / 4)


@pytest.mark.parametrize("follow", ["paper", "code"])
def test_the_painters_gradients_add_up_in_the_code_alone(follow, digits, quick_trainer):
    """At rates of 0, so that the gradient of a batch can be computed beside the step."""
    attack = quick(digits, "input_aware", f"attack.follow={follow}", "train.epochs=3")
    assert attack.recipe.epochs == {"paper": 3, "code": 1}[follow]
    attack.configure_optimizers = lambda: [torch.optim.SGD(m.parameters(), 0.0) for m in (attack.net, attack.maker)]
    step, weights, wanted = attack.training_step, list(attack.maker.parameters()), []

    def watched(batch):
        own = torch.autograd.grad(sum(attack.losses(batch)), weights)
        before = [p.grad.clone() for p in weights] if follow == "code" and wanted else [0] * len(own)
        out = step(batch, 0)
        wanted.append(all(torch.allclose(p.grad, a + b, atol=1e-5) for p, a, b in zip(weights, own, before, strict=True)))
        return out

    attack.training_step = watched
    attack.fit(few(digits), quick_trainer)
    assert len(wanted) == 4 * attack.recipe.epochs
    assert all(wanted)


def test_lira_hands_over_the_second_stages_classifier_and_the_first_ones_as_in_the_code(digits, quick_trainer):
    weights = {}
    for follow, joint in (("paper", 0.5), ("code", 0.5), ("paper", 1.0)):
        attack = quick(digits, "lira", f"attack.follow={follow}", f"attack.joint={joint}", "train.batch=8")
        attack.fit(few(digits), quick_trainer)
        weights[follow, joint] = attack
        assert attack.trainer.current_epoch == (1 if follow == "code" else 2)
    paper, code, always = weights.values()
    assert equal(paper.maker, paper.fixed)  # stage 2 leaves it alone
    assert equal(always.maker, always.fixed)  # the last epoch's noise is the trigger
    assert not equal(paper.net, code.net)


def equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("blind", ["true"], ["true", "next"]), ("lira", ["next", "true", "next"], ["true", "next"])],  # lira's generator first
)
def test_under_all2all_every_triggered_image_is_trained_on_as_the_next_class(
    name, first, second, digits, quick_trainer, monkeypatch
):
    attack = quick(digits, name, "attack.labels=all2all", *(["attack.threshold=1000.0"] * (name == "blind")))
    asked, said, loss, step = [], [], F.cross_entropy, attack.training_step

    def watched(batch, i=0):
        asked.clear()
        out = step(batch, i)
        labels = {tuple(batch.y.tolist()): "true", tuple(((batch.y + 1) % 10).tolist()): "next"}
        said.append([labels[tuple(y.tolist())] for y in asked])
        return out

    monkeypatch.setattr(F, "cross_entropy", lambda logits, y, **how: asked.append(y) or loss(logits, y, **how))
    attack.training_step = watched
    attack.fit(few(digits), quick_trainer)
    assert said == [first] * 4 + [second] * 4
    test = attack.triggered(digits.test)
    assert torch.equal(test.y, (digits.test.y_true + 1) % 10)
    assert torch.equal(test.x, attack.stamp(digits.test.x))


# a training that was killed


class Killed(Exception):
    pass


def fitted(digits, name, checkpoint, *overrides, dies=None) -> Attack:
    """Trained, or killed when `dies` = (stage, epoch) is reported."""
    attack = quick(digits, name, "train.epochs=4", "train.batch=32", *overrides)

    def report(stage, epoch, *_):
        if (stage, epoch) == dies:
            raise Killed

    def trainer(stage, epochs, checkpoint=None):
        how = {"device": torch.device("cpu"), "precision": "32-true", "seed": 0, "report": report, "checkpoint": checkpoint}
        made = make_trainer(stage, epochs, **how)
        made.callbacks[0].pause = 0  # every epoch is worth a checkpoint
        return made

    if dies:
        with pytest.raises(Killed):
            attack.fit(few(digits), trainer, checkpoint)
    else:
        attack.fit(few(digits), trainer, checkpoint)
    return attack


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """whole(name, *overrides) -> the attack after a training that nobody killed; once for all."""
    done = {}

    def train(*how):
        if how not in done:
            done[how] = fitted(digits, how[0], tmp_path_factory.mktemp("whole") / "a.ckpt", *how[1:])
        return done[how]

    return train


CODE = ("input_aware", "attack.follow=code", "train.epochs=6")


@pytest.mark.parametrize(
    ("how", "dies", "left"),
    [
        (("wanet",), ("backdoor", 3), {"b.ckpt"}),
        (("blind",), ("backdoor", 4), {"b.ckpt"}),
        (("lira",), ("backdoor", 4), {"b.ckpt"}),
        (("input_aware",), ("mask", 2), {"b-mask.ckpt"}),
        (("input_aware",), ("backdoor", 1), {"b-mask.ckpt"}),
        (("input_aware",), ("backdoor", 3), {"b-mask.ckpt", "b.ckpt"}),
        (CODE, ("backdoor", 3), {"b-mask.ckpt", "b.ckpt"}),
    ],
)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(how, dies, left, digits, whole, tmp_path):
    name, *overrides = how
    fitted(digits, name, tmp_path / "b.ckpt", *overrides, dies=dies)
    assert {p.name for p in tmp_path.iterdir()} == left
    assert equal(fitted(digits, name, tmp_path / "b.ckpt", *overrides), whole(*how))
    assert not list(tmp_path.glob("*mask*"))


@pytest.mark.parametrize("name", JOINT)
def test_a_trained_trigger_is_the_same_after_saving_and_loading(name, digits, quick_trainer, tmp_path):
    attack = quick(digits, name)
    attack.fit(few(digits), quick_trainer)
    artifact = Store(tmp_path).get_or_make({"name": name}, lambda _: (attack.state_dict(), {}))
    other = quick(digits, name, "seed=3")
    x = digits.test.x[:16]
    assert not torch.equal(other.stamp(x), attack.stamp(x))
    other.load_state_dict(artifact.tensors)
    assert torch.equal(other.stamp(x), attack.stamp(x))


# options of the victim's recipe


@pytest.mark.parametrize("name", ["wanet", "blind", "lira", "input_aware"])
def test_bf16(name, digits):
    attack = quick(digits, name)
    losses = []
    report = lambda stage, epoch, epochs, means, seconds: losses.append(means["loss"])
    attack.fit(few(digits), partial(make_trainer, device=torch.device("cpu"), precision="bf16-mixed", seed=0, report=report))
    assert torch.isfinite(torch.tensor(losses)).all()
    assert attack.stamp(digits.test.x[:4]).dtype == torch.uint8


@pytest.mark.parametrize("name", ["wanet", "blind"])
def test_sharpness_aware_training_sees_one_batch_twice(name, digits, quick_trainer):
    attack = quick(digits, name, "train.sam_rho=1.0")
    seen, step = [], attack.training_step
    attack.training_step = lambda batch, i=0: seen.append(batch.x.sum()) or step(batch, i)
    attack.fit(few(digits), quick_trainer)
    assert seen[::2] == seen[1::2]
    assert len(set(map(float, seen))) == len(seen) // 2


@pytest.mark.parametrize("name", ["lira", "input_aware"])
def test_beside_a_generator_the_victims_gradient_is_that_of_its_worst_weights(name, digits, quick_trainer):
    """ASAM's move e = ρ w²g / ‖|w|g‖: e / |w| has length ρ. The generator's weights stay, its statistics move once."""
    attack = quick(digits, name, "train.sam_rho=1.5")
    seen, losses = [], attack.losses

    def watched(*args):
        seen.append([copy.deepcopy(m.state_dict()) for m in (attack.net, attack.maker)])
        return losses(*args)

    attack.losses = watched
    attack.fit(few(digits), quick_trainer)
    assert len(seen) > 3
    weights, painters = dict(attack.net.named_parameters()), dict(attack.maker.named_parameters())
    for (first, maker), (second, still) in zip(seen[::2], seen[1::2], strict=True):
        moved = [((second[k] - first[k]) / first[k].abs()).nan_to_num(0.0).flatten() for k in weights]
        assert float(torch.cat(moved).norm()) == pytest.approx(1.5, rel=1e-2)
        assert all(torch.equal(maker[k], still[k]) for k in painters)
    if name == "input_aware":  # LIRA's generator has a pass of its own in between
        for (_, second), (_, after) in zip(seen[1::2], seen[2::2], strict=False):
            assert all(torch.equal(second[k], after[k]) for k in second if "running" in k)


@pytest.mark.parametrize(
    ("name", "override", "text"),
    [
        ("wanet", "attack.ratio=0.9", r"ratio=0.9, attack.cross_ratio=0.2: expected shares .* together at most 1"),
        ("wanet", "attack.ratio=0.0", "the first above 0"),
        ("wanet", "attack.k=1", "expected 2 to 32 points a side"),
        ("wanet", "attack.select=first", "WaNet poisons no training set, .* leave it at random"),
        ("bpp_controlled", "attack.include_target=false", "leave it at true"),
        ("lira", "attack.ratio_of=candidates", "leave it at train"),
        ("lira", "attack.ratio=0.1", "LIRA triggers every image of a step; leave it at 1.0"),
        ("lira", "attack.widths=[8,8,8,8,8,8]", "images of 32×32 cannot be halved 6 times"),
        ("lira", "attack.eps=0.0", "expected shares above 0"),
        ("input_aware", "train.precision=16-mixed", "InputAware has two optimizers"),
        ("blind", "train.precision=16-mixed", "mgda compares gradients"),
        ("input_aware", "dataset.augment.cutmix=1.0", "InputAware triggers images after augmentation"),
        ("input_aware", "attack.widths=[]", "or not once"),
        ("input_aware", "attack.mask.epochs=0", r"attack.mask.epochs=0: expected at least 1"),
        ("input_aware", "attack.mask.optimizer.lr=-1.0", r"attack.mask.optimizer cannot be used"),
        ("input_aware", "attack.generator.optimizer.lr=-1.0", r"attack.generator.optimizer cannot be used"),
        ("input_aware", "attack.follow=codes", r"follow=codes: expected paper or code"),
        ("blind", "attack.top=28", "must fit into 32×32"),
        ("blind", "attack.balance=fix", r"balance=fix: expected mgda or fixed \(did you mean fixed"),
        ("blind", "attack.history=0", "expected positive numbers"),
    ],
)
def test_mistakes_are_named_before_training(name, override, text, digits):
    with pytest.raises(UserError, match=text):
        quick(digits, name, override)


def test_gradients_that_add_up_are_refused_where_a_step_has_two_passes(digits):
    with pytest.raises(UserError, match=r"sam_rho=1.0: a sharpness-aware step has two passes.*take attack.follow=paper"):
        quick(digits, "input_aware", "attack.follow=code", "train.epochs=6", "train.sam_rho=1.0")


def test_a_training_too_short_for_it_is_refused(digits, quick_trainer):
    attack = quick(digits, "blind", "attack.history=1000")
    with pytest.raises(UserError, match=r"history=1000: the training has 178 steps, .*history below 178, to 17 say"):
        attack.fit(digits, quick_trainer)
    with pytest.raises(UserError, match=r"epochs=2: with attack.follow=code 2 of them train the mask"):
        quick(digits, "input_aware", "attack.follow=code")
