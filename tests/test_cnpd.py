"""CNPD: the invariants of its three forms, its switches, and the label that a repaired net takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import TINY, build_attack

from bdx import surgery
from bdx.archs.base import load, save
from bdx.conditioned import ClassNorm, Embedded, Replicated, TokenNorm, condition, label_of, pick
from bdx.configure import compose
from bdx.defenses.npd import IGNORE
from bdx.errors import UserError
from bdx.run import build_defense
from bdx.split import pixels
from bdx.training import make_trainer

FORMS = ["cnpd_r", "cnpd_e", "cnpd_a"]
QUICK = ["defense.epochs=2", "defense.warmup_epochs=1", "defense.batch=64"]


TRAINER = partial(make_trainer, device=torch.device("cpu"), precision="32-true", seed=0, report=lambda *_: None)


@pytest.fixture(scope="module")
def digits(small):
    return small


@pytest.fixture(scope="module")
def attack(digits):
    """A net that three epochs at a gentle rate have taught something, in eval mode."""
    gentle = ["train.epochs=3", "train.optimizer.lr=0.01", "train.schedule.max_lr=0.05"]
    attack = build_attack(digits, "attack=badnets", "attack.target=3", *gentle)
    attack.fit(digits.poisoned(attack.poison(digits.train)), TRAINER)
    attack.net.eval()
    return attack


def made(attack, name, *overrides):
    torch.manual_seed(0)
    return build_defense(compose([*TINY, "attack.target=3", f"defense={name}", *overrides]), attack)


@pytest.fixture(scope="module")
def repaired(attack, digits):
    """repaired(name, *overrides) -> the defense after a short run; each is run once."""
    done = {}

    def run(name, *overrides):
        if (name, overrides) not in done:
            defense = made(attack, name, *QUICK, *overrides)
            defense.run(digits.allow(defense.needs), TRAINER)
            done[name, overrides] = defense
        return done[name, overrides]

    return run


# what the papers promise


@pytest.mark.parametrize("name", FORMS)
def test_before_training_the_net_is_the_one_that_came_whatever_the_label(name, attack, digits):
    defense = made(attack, name).eval()
    x = pixels(digits.test.x[:12])
    with torch.no_grad():
        wanted = attack.net(x)
        assert torch.allclose(defense.net(x), wanted, atol=1e-4)
        for k in range(10):
            assert torch.allclose(defense.net(x, torch.full((12,), k)), wanted, atol=1e-4)


def test_r_is_npd_with_a_known_target_for_each_class(repaired):
    """The slice k = T of r-CNPD is what NPD-TP learns for target T from the same seed."""
    known, every = repaired("npd_tp").polarizer, repaired("cnpd_r").polarizer
    assert (known.conv.weight[:, :, 0, 0] - torch.eye(64)).abs().max() > 0.001  # it has learned something
    assert torch.allclose(every.weight[3], known.conv.weight[:, :, 0, 0], atol=1e-5)
    assert torch.allclose(every.norm.weight[3], known.bn.weight, atol=1e-5)
    assert torch.allclose(every.norm.running_mean[3], known.bn.running_mean, atol=1e-5)
    assert torch.allclose(every.norm.running_var[3], known.bn.running_var, rtol=1e-4)
    assert not torch.allclose(every.weight[3], every.weight[4], atol=1e-4)


def test_classes_in_turn_are_classes_at_once(repaired):
    at_once, in_turn = (repaired("cnpd_r", f"defense.at_once={n}").polarizer for n in (10, 4))
    usual = repaired("cnpd_r").polarizer.state_dict()
    assert all(torch.allclose(usual[k], v, atol=1e-5) for k, v in at_once.state_dict().items())
    assert in_turn.classes == 10
    for name, value in at_once.state_dict().items():
        assert torch.allclose(in_turn.state_dict()[name], value, atol=1e-5), name


@pytest.mark.parametrize("how", ["defense.adv_condition=predicted", "defense.budget.stop=0.6"])
def test_classes_that_hang_on_each_other_take_no_turns(how, repaired, attack):
    at_once, usual = (repaired("cnpd_r", how, *o).polarizer.state_dict() for o in (["defense.at_once=10"], []))
    assert all(torch.equal(usual[k], v) for k, v in at_once.items())
    with pytest.raises(UserError, match=r"at_once=4: with adv_condition=predicted or budget\.stop .* take null, or 10"):
        made(attack, "cnpd_r", how, "defense.at_once=4")


def test_in_turns_the_net_is_not_whole(attack):
    """What looks at it after each epoch (eval.oracle) would see one class's polarizer in the place of all."""
    defense = made(attack, "cnpd_r")
    assert defense.tunes("CNPD")
    defense.classes = torch.arange(4)
    assert not defense.tunes("CNPD")


@pytest.mark.parametrize("name", FORMS)
def test_training_never_sees_the_targets_label(name, repaired):
    """condition=oracle is for inference."""
    for source in ("oracle", "random"):
        how = f"defense.condition={source}", "defense.adv_condition=predicted"
        a, b = (repaired(name, *how, f"defense.target={k}").polarizer.state_dict() for k in (3, 7))
        usual = repaired(name, *how[1:]).polarizer.state_dict()
        assert all(torch.equal(b[k], v) and torch.equal(usual[k], v) for k, v in a.items())


def test_a_sample_is_touched_by_its_own_class_alone():
    polarizer = Replicated(4, classes=3, tokens=False, restore=True).eval()
    z, label = torch.randn(6, 4, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    before = polarizer(z, label)
    with torch.no_grad():
        polarizer.weight[1] = torch.randn(4, 4)
    changed = (polarizer(z, label) - before).flatten(1).abs().amax(1) > 0
    assert changed.tolist() == [False, True, False, False, True, False]


def test_r_by_hand():
    polarizer = Replicated(2, classes=2, tokens=False, restore=True).eval()
    with torch.no_grad():
        polarizer.weight[1] = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        polarizer.norm.bias[1] = torch.tensor([10.0, 20.0])
    z = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1).expand(2, 2, 1, 1)
    out = polarizer(z, torch.tensor([0, 1])).flatten(1)
    assert torch.allclose(out[0], torch.tensor([3.0, 5.0]), atol=1e-4)
    assert torch.allclose(out[1], torch.tensor([20.0, 23.0]), atol=1e-4)


def test_a_batch_stacked_per_class_is_the_same_as_a_label_per_image():
    for kind, more in ((Replicated, {}), (Embedded, {"code": "learned", "size": 8, "fusion": "film"})):
        polarizer = kind(4, classes=3, tokens=False, restore=True, **more).eval()
        for p in polarizer.parameters():
            p.data.normal_()
        z = torch.randn(3 * 5, 4, 2, 2)
        label = torch.arange(3)
        assert torch.allclose(polarizer(z, label), polarizer(z, label.repeat_interleave(5)), atol=1e-5)


@torch.no_grad()
def test_classes_that_take_turns_share_a_neutral_start():
    whole, label = Replicated(4, classes=3, tokens=False, restore=True).eval(), torch.arange(3)
    z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + 2
    with whole.neutral(torch.full((4,), 2.0), torch.full((4,), 0.01)):
        part = whole.part(torch.tensor([1]))
        assert torch.allclose(part(z[1:2], label[:1]), z[1:2], atol=1e-5)
        part.norm.weight.mul_(3.0)
        within = part(z[1:2], label[:1])
        whole.put(torch.tensor([1]), part)
    out = whole(z, label)
    assert torch.allclose(out[[0, 2]], z[[0, 2]], atol=1e-5)
    assert torch.allclose(out[1:2], within, atol=1e-5)
    assert torch.allclose(within, 3 * (z[1:2] - 2) + 2, atol=1e-3)  # three times as far from the mean
    assert not whole.norm._forward_hooks


def test_soft_labels_mix_the_classes():
    polarizer = Replicated(4, classes=3, tokens=False, restore=True).eval()
    for p in polarizer.parameters():
        p.data.normal_()
    z = torch.randn(2, 4, 2, 2)
    hard = torch.stack([polarizer(z, torch.full((2,), k)) for k in range(3)])
    one = polarizer(z, torch.eye(3)[[2, 2]])
    assert torch.allclose(one, hard[2], atol=1e-5)
    with torch.no_grad():
        polarizer.norm.weight.fill_(1.0)  # one norm for all: then outputs mix as the maps do
        polarizer.norm.bias.zero_()
    hard = torch.stack([polarizer(z, torch.full((2,), k)) for k in range(3)])
    half = polarizer(z, torch.tensor([[0.5, 0.5, 0.0]]).expand(2, 3))
    assert torch.allclose(half, (hard[0] + hard[1]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides", "size"),
    [
        ("cnpd_r", [], 2_631_680), ("cnpd_e", [], 296_576), ("cnpd_a", [], 297_088),
        ("cnpd_e", ["defense.code=onehot"], 263_168 + 10 * 512),
    ],
)  # fmt: skip
def test_sizes_at_512_channels(name, overrides, size, digits):
    """Hand-computed for the papers' net and 10 classes: the polarizer's parameters."""
    wide = build_attack(digits, "attack=badnets", "arch.width=64")
    assert sum(p.numel() for p in made(wide, name, *overrides).polarizer.parameters()) == size


# norms against torch's own


def test_class_norm_is_batchnorm_of_each_class():
    norm, label, z = ClassNorm(3, 4), torch.tensor([2, 0, 2, 0]), torch.randn(4, 7, 4)
    with torch.autocast("cpu", torch.bfloat16):  # statistics are in full precision all the same
        out = norm(z, label, z)
    for k in (0, 2):
        own = torch.nn.BatchNorm1d(4)
        wanted = own(z[label == k].reshape(-1, 4)).view(2, 7, 4)
        assert torch.allclose(out[label == k], wanted, atol=1e-5)
        assert torch.allclose(norm.running_mean[k], own.running_mean, atol=1e-6)
        assert torch.allclose(norm.running_var[k], own.running_var, atol=1e-5)
    assert torch.equal(norm.running_mean[1], torch.zeros(4))  # a class that did not come keeps its statistics
    assert torch.equal(norm.running_var[1], torch.ones(4))


def test_token_norm_is_layernorm_and_can_give_moments_back():
    z, label = torch.randn(3, 5, 8) * 3 + 1, torch.zeros(3, dtype=torch.long)
    plain, restoring = TokenNorm(1, 8, restore=False), TokenNorm(1, 8, restore=True)
    assert torch.allclose(plain(z, label, z), torch.nn.functional.layer_norm(z, (8,)), atol=1e-4)
    assert torch.allclose(restoring(z, label, z), z, atol=1e-4)


# where the label comes from


def test_conditions():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    how = {"soft": False, "target": 2, "classes": 3}
    assert label_of(condition("predicted", **how), logits).tolist() == [1, 0]
    assert label_of(condition("oracle", **how), logits).tolist() == [2, 2]
    assert label_of(condition("wrong", **how), logits).tolist() == [0, 0]
    assert label_of(condition("none", **how), logits).tolist() == [0, 0]
    drawn = label_of(condition("random", **how), torch.zeros(300, 3))
    assert drawn.bincount(minlength=3).min() > 70
    assert torch.equal(drawn, label_of(condition("random", **how), torch.zeros(300, 3)))
    soft = label_of(condition("predicted", **how | {"soft": True}), logits)
    assert torch.allclose(soft, logits.softmax(1))
    assert torch.allclose(pick(torch.eye(3), soft), soft)


def test_the_deployed_net_takes_the_raw_prediction(repaired, attack, digits):
    net, x = repaired("cnpd_r").net.eval(), pixels(digits.test.x[:40])
    with torch.no_grad():
        raw = attack.net(x).argmax(1)
        assert torch.equal(net.raw(x).argmax(1), raw)
        assert torch.equal(net(x), net(x, raw))
        assert not torch.allclose(net(x), net(x, (raw + 1) % 10), atol=1e-3)


def test_the_oracle_is_npd_with_a_known_target(repaired, digits):
    x = pixels(digits.test.x[:40])
    with torch.no_grad():
        oracle, known = repaired("cnpd_r", "defense.condition=oracle").net.eval()(x), repaired("npd_tp").net.eval()(x)
    assert torch.allclose(oracle, known, atol=1e-3)


@pytest.mark.parametrize("source", ["predicted", "oracle", "wrong", "random", "none"])
def test_each_condition_survives_saving(source, repaired, digits, tmp_path):
    net = repaired("cnpd_e", f"defense.condition={source}").net.eval()
    save(net, tmp_path / "net")
    x = pixels(digits.test.x[:20])
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "net")(x), net(x))


def test_none_is_one_polarizer_for_all_classes(repaired):
    assert repaired("cnpd_r", "defense.condition=none").polarizer.weight.shape[0] == 1


# what runs before the polarizer runs once


def test_the_prefix_runs_once_for_both_passes(repaired, digits):
    net, ran = repaired("cnpd_e").net.eval(), []
    hooks = [net.get_submodule(f"body.{n}").conv1.register_forward_hook(lambda *_, n=n: ran.append(n)) for n in BLOCKS]
    with torch.no_grad():
        net(pixels(digits.test.x[:4]))
    for hook in hooks:
        hook.remove()
    assert ran == [*BLOCKS, "layer4.1"]
    assert not any("forward" in vars(m) for m in net.modules())


BLOCKS = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]


def test_a_shared_prefix_changes_no_value_and_no_gradient(attack, digits):
    defense, x = made(attack, "cnpd_e").eval(), pixels(digits.test.x[:6]).requires_grad_()
    net, label = defense.net, torch.arange(6)
    torch.nn.init.normal_(defense.polarizer.shift)
    apart = [net.raw(x), net(x, label), net(x, label + 1)]
    with surgery.shared_prefix(net, defense.at):
        together = [net.raw(x), net(x, label), net(x, label + 1)]
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(*(torch.autograd.grad(v.square().sum(), x, retain_graph=True)[0] for v in (a, b)), atol=1e-5)


def test_a_shared_prefix_is_safe_before_a_module_that_works_in_place():
    net = torch.nn.Sequential()
    net.add_module("body", torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(inplace=True)))
    surgery.insert(net, "body.1", layer := torch.nn.Tanh(), {})
    gate, x = net.get_submodule("body.1"), torch.randn(5, 3)
    wanted = net.body[0](x).tanh().relu()
    with surgery.shared_prefix(net, "body.1"):
        with surgery.given(gate, None, active=False):
            net(x)
        assert torch.allclose(net(x), wanted)
    assert gate.layer is layer


def test_in_front_of_the_first_module_there_is_no_prefix(attack, digits):
    defense, x = made(attack, "cnpd_e", "defense.layer=normalize").eval(), pixels(digits.test.x[:4])
    with torch.no_grad():
        assert torch.allclose(defense.net(x), attack.net(x), atol=1e-4)


def test_a_conditioned_polarizer_wants_a_label():
    with pytest.raises(ValueError, match=r"purifies under a class: call it with labels \(N,\) or \(N, 3\)"):
        Replicated(4, classes=3, tokens=False, restore=True)(torch.randn(2, 4, 1, 1))


def test_a_module_used_on_both_sides_is_replayed_on_one():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.a, self.b = torch.nn.Tanh(), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    net = torch.nn.Sequential()
    net.add_module("body", Twice())
    x = torch.randn(3, 2)
    wanted = net(x)
    with surgery.shared_prefix(net, "body.b"):
        assert torch.equal(net(x), wanted)
        assert torch.equal(net(x), wanted)


# switches


@pytest.mark.parametrize(
    "overrides",
    [
        ["defense.fusion=film", "defense.code=onehot"], ["defense.soft=true"], ["defense.targets=runner_up"],
        ["defense.targets=every", "defense.clean_condition=home"], ["defense.adv_condition=predicted"],
        ["defense.targets=every", "defense.clean_condition=predicted"], ["defense.clean_condition=predicted"],
        ["defense.attacked=frozen"], ["defense.bn_mode=train"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("name", ["cnpd_e", "cnpd_a"])
def test_every_switch_trains(name, overrides, attack, digits):
    if name == "cnpd_a" and any("fusion" in o for o in overrides):
        overrides = ["defense.attention=spatial", *overrides[1:]]
    defense = made(attack, name, *overrides)
    batch = next(iter(digits.batches(digits.clean, size=16, shuffle=True, augment=False)))
    out = defense.training_step(batch, 0)
    defense.backward(out["loss"])
    assert all(torch.isfinite(v) for v in out.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in defense.polarizer.parameters())
    assert not any(p.requires_grad for n, p in defense.net.named_parameters() if ".layer." not in n)


def test_random_targets_are_never_the_true_class(attack, digits):
    defense = made(attack, "cnpd_e")
    batch = next(iter(digits.batches(digits.clean, size=140, shuffle=True, augment=False)))
    _, y, aim, label = defense.cases(batch)
    assert (aim != y).all()
    assert torch.equal(aim, label)
    assert len(aim.unique()) == 10


def test_every_class_leaves_out_images_of_that_class(attack, digits):
    defense = made(attack, "cnpd_r")
    batch = next(iter(digits.batches(digits.clean, size=16, shuffle=True, augment=False)))
    x, y, aim, label = defense.cases(batch)
    assert x.shape[0] == 160
    assert label.tolist() == list(range(10))
    assert torch.equal(aim == IGNORE, y == torch.arange(10).repeat_interleave(16))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["defense.form=x"], "defense.form=x: expected one of r, e, a"),
        (["defense.condition=guess"], "defense.condition=guess: expected one of predicted, oracle"),
        (["defense.soft=true", "defense.condition=oracle"], "there are probabilities with condition=predicted alone"),
        (["defense.clean_condition=half"], "clean_condition=half goes with targets=random or runner_up"),
        (["defense.soft=true", "defense.targets=random"], "r's BatchNorm takes statistics class by class"),
        (["defense.soft=true", "defense.adv_condition=predicted", "defense.bn_mode=train"], "r's BatchNorm takes statistics"),
        (["defense.at_once=0"], "at_once=0, code_size=64: expected at least 1"),
        (["defense.target=99"], "defense.target=99: expected 0 to 9, the class that oracle and wrong go by"),
        (["attack.labels=all2all", "defense.condition=oracle"], "an all2all attack sends each image to the class after"),
        (["defense.lambda_asr=-0.1"], "defense.lambda_asr=-0.1: expected 0 or more"),
        (["defense.universal=true"], "CNPD perturbs each image towards classes"),
    ],
)  # fmt: skip
def test_mistakes(overrides, message, attack):
    with pytest.raises(UserError, match=message):
        made(attack, "cnpd_r", *overrides)
