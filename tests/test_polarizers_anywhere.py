"""NPD and CNPD on every kind of net: convolutions, transformer blocks, anything that torchvision has."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY

from bdx import places
from bdx.backdoor import build_attack
from bdx.configure import compose
from bdx.errors import UserError
from bdx.run import build_defense
from bdx.split import pixels

VIT = ["arch=vit_b_16", "arch.image_size=16", "arch.patch=4", "arch.layers=4", "arch.heads=2", "arch.width=32", "arch.mlp=64"]
NETS = {
    "preact_resnet18": ["arch.width=8"],
    "wrn16_1": ["arch=wrn16_1"],
    "resnet18": ["arch=resnet18"],
    "vgg19_bn": ["arch=vgg19_bn"],
    "vit_b_16": VIT,
    "mobilenet": ["arch=torchvision", "arch.name=mobilenet_v3_small"],
    "swin": ["arch=torchvision", "arch.name=swin_t"],
    "convnext": ["arch=torchvision", "arch.name=convnext_tiny"],
    "inception": ["arch=inception_v3"],
    "densenet": ["arch=torchvision", "arch.name=densenet121"],
}
FAST = ("preact_resnet18", "wrn16_1", "vit_b_16")
BASE = [o for o in TINY if "width" not in o]


@pytest.fixture(scope="module")
def victim(digits):
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = build_attack(compose([*BASE, *NETS[name], "attack=badnets"]), digits)
            places.linears(made[name].net, "classifier")[-1].weight.data.normal_()  # a transformer's starts at 0
        return made[name]

    return get


METHODS = ("npd", "cnpd_r", "cnpd_e", "cnpd_a")
CASES = [(n, m, d) for n in FAST for m in METHODS for d in ("third_to_last", "penultimate", "last", "whole")]
LARGE = [(n, m, d) for n in NETS if n not in FAST for m, d in (("npd", "penultimate"), ("cnpd_a", "whole"))]


@pytest.mark.parametrize(("name", "method", "layer"), CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in LARGE])
def test_it_starts_as_the_identity_and_only_the_polarizer_learns(name, method, layer, victim, digits):
    attack = victim(name)
    defense = build_defense(compose([*BASE, *NETS[name], f"defense={method}", f"defense.layer={layer}"]), attack)
    batch = next(iter(digits.batches(digits.clean, size=4, shuffle=False, augment=False)))
    with torch.no_grad():
        wanted = attack.net.eval()(batch.x)
        assert torch.allclose(defense.eval().net(batch.x), wanted, atol=1e-3 * float(wanted.abs().max()))
    out = defense.training_step(batch, 0)
    defense.backward(out["loss"])
    assert torch.isfinite(out["loss"])
    learning = {n for n, p in defense.net.named_parameters() if p.grad is not None}
    assert learning
    assert all(".layer." in n for n in learning)


@pytest.mark.parametrize(("init", "restores"), [("identity", True), ("plain", False)])
def test_tokens_get_a_linear_map_and_layernorm(init, restores, victim, digits):
    defense = build_defense(compose([*BASE, *VIT, "defense=npd", f"defense.init={init}"]), victim("vit_b_16"))
    assert defense.at == "body.encoder.layers.encoder_layer_2"
    assert defense.polarizer.norm.restore == restores
    z = torch.randn(2, 5, 32)
    wanted = z if restores else torch.nn.functional.layer_norm(z, (32,))
    assert torch.allclose(defense.polarizer(z), wanted, atol=1e-4)


def test_a_polarizer_is_no_place_of_its_own(victim):
    attack = victim("preact_resnet18")
    sample = torch.zeros(2, 3, 32, 32)
    before = places.places(attack.net, sample)
    defense = build_defense(compose([*BASE, "arch.width=8", "defense=npd"]), attack)
    found = {d: n.removesuffix(".module") for d, n in places.places(defense.net, sample).items()}
    assert found == before


def test_tokens_take_no_other_structure(victim):
    with pytest.raises(UserError, match="structure=conv_bn_x2: on tokens there is conv_bn alone"):
        build_defense(compose([*BASE, *VIT, "defense=npd", "defense.structure=conv_bn_x2"]), victim("vit_b_16"))


def test_a_vector_is_no_place(victim):
    with pytest.raises(UserError, match=r"its input has shape \(64,\); a polarizer needs a map \(C, H, W\) or tokens"):
        build_defense(compose([*BASE, "arch.width=8", "defense=npd", "defense.layer=linear"]), victim("preact_resnet18"))


def test_a_transformer_resizes_its_images(victim, digits):
    net = victim("vit_b_16").net.eval()
    with torch.no_grad():
        assert net(pixels(digits.test.x[:2])).shape == (2, 10)
