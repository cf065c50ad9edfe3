"""Nets, their files, surgery inside them, and the polarizers that surgery inserts."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, names
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from bdx import places, surgery
from bdx.archs import base as archs
from bdx.archs.preact_resnet import PreActBlock, Thinned, preact_resnet18
from bdx.archs.wide_resnet import WideBlock
from bdx.build import instantiate
from bdx.configure import compose
from bdx.errors import UserError
from bdx.polarizers import OSAD, OSDN, STRUCTURES, Conv, ConvBN, Denoiser
from bdx.store import SEAL, file_sha256, sheet_sha256

ARCHS = names("arch")
HEAVY = {"vgg19", "vgg19_bn", "vit_b_16", "torchvision", "densenet161", "inception_v3"}
NORMALIZE = {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.25, 1.0]}
WITH_BN = ("conv_bn", "conv_bn_x2")


@functools.cache
def config(*overrides: str) -> dict:
    return OmegaConf.to_container(compose(list(overrides)), resolve=True)["arch"]


def build(name: str, *overrides: str, num_classes: int = 10, shape=(3, 32, 32)) -> archs.Classifier:
    if name == "timm":
        pytest.importorskip("timm", reason="timm is an extra: pip install 'bdx[timm]'")
    torch.manual_seed(0)
    return archs.build(config(f"arch={name}", *overrides), num_classes=num_classes, shape=shape, **NORMALIZE)


def thin(**changes) -> archs.Classifier:
    """A small net in eval mode whose BatchNorms have seen something, so that train and eval differ."""
    net = build("preact_resnet18", "arch.width=8", **changes)
    with torch.no_grad():
        net.train()(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return net.eval()


@pytest.fixture
def net() -> archs.Classifier:
    return thin()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# every architecture


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else ()) for n in ARCHS])
def test_every_arch_classifies_small_images(name, x):
    net = build(name, num_classes=(classes := 43)).eval()
    with torch.no_grad():
        places.linears(net, "classifier")[-1].weight.normal_()  # a transformer's starts at 0
        out = net(x)
    assert out.shape == (4, classes)
    assert out.isfinite().all()
    assert not torch.equal(out[0], out[1])


COUNTS = [
    (["preact_resnet18"], 10, 11_171_146),
    (["preact_resnet18"], 43, 11_188_075),  # 33 more rows of 512 weights and a bias
    (["preact_resnet18", "arch.final_norm=true"], 10, 11_171_146 + 2 * 512),
    (["wrn16_1"], 10, 175_626),
    (["wrn16_1"], 43, 177_771),
    (["wrn16_1", "arch.discard_first=false"], 10, 175_626),
    (["resnet18"], 10, 11_689_512 - 513_000 + 5_130),  # torchvision's own count, another last layer
    (["resnet34"], 10, 21_797_672 - 513_000 + 5_130),
    (["vgg19_bn"], 10, 143_678_248 - 4_097_000 + 40_970),
    (["vgg19"], 10, 143_667_240 - 4_097_000 + 40_970),
    (["torchvision", "arch.name=densenet161"], 10, 28_681_000 - 2_209_000 + 22_090),
    (["densenet161"], 10, 28_681_000 - 2_209_000 + 22_090),
    (["inception_v3"], 10, 27_161_264 - 3_326_696 - 2_049_000 + 20_490),  # without the head at the side
    (["timm"], 43, 11_689_512 - 513_000 + 513 * 43),
]


@pytest.mark.parametrize(("arch", "classes", "count"), COUNTS, ids=lambda v: "-".join(v) if isinstance(v, list) else str(v))
def test_parameter_counts(arch, classes, count):
    with torch.device("meta"):  # shapes alone
        assert parameters(build(*arch, num_classes=classes)) == count


def test_a_thin_net():
    assert parameters(build("preact_resnet18", "arch.width=16")) == pytest.approx(0.70e6, abs=0.005e6)


def test_names_are_backdoorbenchs():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    wanted = {"conv1.weight", "linear.weight", "linear.bias"}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            here = f"layer{stage}.{block}"
            wanted |= {f"{here}.conv{i}.weight" for i in (1, 2)} | {f"{here}.bn{i}.{k}" for i in (1, 2) for k in norm}
        if stage > 1:
            wanted.add(f"layer{stage}.0.shortcut.0.weight")
    with torch.device("meta"):
        body = build("preact_resnet18").body
    state = body.state_dict()
    assert set(state) == wanted
    assert len(state) == 102
    assert state["layer2.0.shortcut.0.weight"].shape == (128, 64, 1, 1)
    assert state["layer4.0.bn1.weight"].shape == (256,)
    assert state["linear.weight"].shape == (10, 512)
    children = [name for name, _ in body.named_children()]
    assert children == ["conv1", "layer1", "layer2", "layer3", "layer4", "avgpool", "linear"]


def shaken(block: nn.Module) -> nn.Module:
    """Eval mode, with BatchNorms that do something."""
    for i, m in enumerate(block.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.fill_(2.0 + i)
            m.running_mean.fill_(0.3)
    return block.eval()


@torch.no_grad()
def test_the_skip_path_of_a_preact_block(x):
    plain, wide = shaken(PreActBlock(3, 3, 1)), shaken(PreActBlock(3, 6, 2))
    for block in (plain, wide):
        block.conv2.weight.zero_()  # the residual branch is silent: only the skip path is left
    assert torch.equal(plain(x), x)
    assert torch.equal(wide(x), wide.shortcut(wide.bn1(x).relu()))
    assert wide(x).shape == (4, 6, 16, 16)


def test_a_thinned_convolution_is_a_strided_one(x):
    conv = Thinned(3, 5, 2)
    assert torch.allclose(conv(x), F.conv2d(x, conv.weight, stride=2), atol=1e-6)


def test_the_thinnest_net_learns_from_an_odd_batch_with_two_threads():
    """In a process of its own: torch's strided 1×1 convolution writes out of bounds there, and that is a crash."""
    code = (
        "import torch; from bdx.archs.preact_resnet import preact_resnet18; torch.set_num_threads(2)\n"
        "net = preact_resnet18(num_classes=10, width=8, final_norm=False).to(memory_format=torch.channels_last)\n"
        "for _ in range(20): net(torch.rand(3, 3, 32, 32).to(memory_format=torch.channels_last)).sum().backward()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-500:]


@torch.no_grad()
def test_the_residual_branch_of_a_preact_block(x):
    block = shaken(PreActBlock(3, 3, 1))
    inner = F.conv2d(F.relu(block.bn1(x)), block.conv1.weight, padding=1)
    branch = F.conv2d(F.relu(block.bn2(inner)), block.conv2.weight, padding=1)
    assert torch.allclose(block(x), x + branch, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("discard", [True, False])
def test_wide_blocks_that_widen_discard_their_first_activation(discard, x):
    block = shaken(WideBlock(3, 6, 2, discard))
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()
    z = x if discard else F.leaky_relu(block.bn1(x), 0.1)
    assert torch.equal(block(x), block.shortcut(z))
    same = shaken(WideBlock(3, 3, 1, discard))
    same.conv2.weight.zero_()
    same.conv2.bias.zero_()
    assert torch.equal(same(x), x)
    same.conv1.weight.zero_()
    same.conv1.weight[:, :, 1, 1] = torch.eye(3)
    same.conv1.bias.zero_()
    seen = []
    with surgery.watch_input(same, "bn2", seen.append):
        same(x)
    assert torch.allclose(seen[0], F.leaky_relu(same.bn1(x), 0.1))  # a block that keeps its width discards nothing


def test_the_final_norm_is_a_choice():
    with torch.device("meta"):
        body = build("preact_resnet18", "arch.final_norm=true").body
    assert isinstance(body.bn, nn.BatchNorm2d)
    assert not hasattr(thin().body, "bn")


# normalisation


def test_normalisation_by_hand():
    layer = archs.Normalize(**NORMALIZE)
    x = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert layer(x)[0, :, 0, 0].tolist() == [1.0, 1.0, 0.25]
    assert layer(torch.zeros(1, 3, 1, 1)).flatten().tolist() == [-1.0, -1.0, 0.0]
    assert not list(layer.parameters())


def test_the_body_sees_normalised_pixels(net, x):
    seen = []
    with surgery.watch_input(net, "body", seen.append):
        out = net(x)
    assert torch.allclose(seen[0][:, 0], (x[:, 0] - 0.5) / 0.5)
    assert torch.equal(seen[0][:, 2], x[:, 2])
    assert torch.equal(net.body(seen[0]), out)


# building


def test_building_is_reproducible_and_draws_nothing_for_its_trial():
    first, again = build("preact_resnet18", "arch.width=8"), build("preact_resnet18", "arch.width=8")
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.body.layer1[0].bn1.num_batches_tracked == 0
    assert first.training
    torch.manual_seed(0)
    preact_resnet18(num_classes=10, width=8, final_norm=False)
    state = torch.get_rng_state()
    build("preact_resnet18", "arch.width=8")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_net_that_cannot_take_the_images_says_so():
    with pytest.raises(UserError, match=r"preact_resnet18 cannot classify images of \(4, 32, 32\)"):
        build("preact_resnet18", "arch.width=8", shape=(4, 32, 32))
    with torch.device("meta"), pytest.raises(UserError, match=r"cannot classify images of \(3, 32, 32\): Wrong image height"):
        build("torchvision", "arch.name=vit_b_16")


def test_what_is_no_classifier_is_refused():
    with pytest.raises(UserError, match=r"cannot build bdx\.polarizers\.Conv: .*num_classes"):
        archs.build({"_target_": "bdx.polarizers.Conv", "channels": 3}, num_classes=10, shape=(3, 8, 8), **NORMALIZE)
    arch = {"_target_": "torchvision.models.get_model", "name": "fcn_resnet50", "weights": None, "weights_backbone": None}
    with torch.device("meta"), pytest.raises(UserError, match="cannot classify images"):
        archs.build(arch, num_classes=10, shape=(3, 32, 32), **NORMALIZE)


@pytest.mark.parametrize(("arch", "key"), [("torchvision", "name"), ("timm", "model_name")])
def test_an_unknown_net_of_a_library_is_a_users_mistake(arch, key):
    with pytest.raises(UserError, match="resnt18"):
        build(arch, f"arch.{key}=resnt18")


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^_target_=timm\.create_model needs timm, .*: pip install 'bdx\[timm\]'$"):
        instantiate(config("arch=timm"))


def test_what_a_library_asserts_is_a_users_mistake():
    with pytest.raises(UserError, match=r"^cannot build bdx\.archs\.vit\.vit: embed_dim must be divisible by num_heads$"):
        build("vit_b_16", "arch.width=8")


def test_a_key_of_a_preset_that_another_net_does_not_take_is_named():
    for arch in ({"_target_": "torchvision.models.vgg19"}, {"_target_": "bdx.archs.preact_resnet.preact_resnet18"}):
        with pytest.raises(UserError, match=r"it takes no depth, which a preset may set for another net: add ~arch\.depth$"):
            archs.build(arch | {"depth": 3}, num_classes=10, mean=[0.5] * 3, std=[0.2] * 3, shape=(3, 32, 32))


def test_an_unknown_key_names_itself():
    arch = config("arch=preact_resnet18") | {"depth": 18}
    with pytest.raises(UserError, match=r"cannot build bdx\.archs\.preact_resnet\.preact_resnet18: .*depth"):
        archs.build(arch, num_classes=10, shape=(3, 32, 32), **NORMALIZE)


# files


@pytest.fixture
def saved(net, tmp_path) -> Path:
    archs.save(net, tmp_path / "net", classes=["a", "b"])
    return tmp_path / "net"


def edit(folder: Path, **changes) -> None:
    """As a forger does it, who makes the sheet's own checksum fit."""
    sheet = json.loads((folder / "net.json").read_text()) | changes
    (folder / "net.json").write_text(json.dumps(sheet | {SEAL: sheet_sha256(sheet)}))


@contextmanager
def rewritten(folder: Path):
    """Change the weights, with the checksum made to fit."""
    tensors = load_file(folder / "net.safetensors")
    yield tensors
    save_file(tensors, folder / "net.safetensors")
    edit(folder, sha256=file_sha256(folder / "net.safetensors"))


@torch.no_grad()
def test_a_loaded_net_gives_the_same_logits_bit_for_bit(net, saved, x):
    loaded = archs.load(saved)
    assert not loaded.training
    assert torch.equal(loaded(x), net(x))
    assert loaded.spec == net.spec
    assert json.loads((saved / "net.json").read_text())["classes"] == ["a", "b"]
    assert sorted(p.name for p in saved.iterdir()) == ["net.json", "net.safetensors"]
    archs.save(loaded, saved.parent / "again")
    assert torch.equal(archs.load(saved.parent / "again")(x), net(x))


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_loaded_net_has_its_polarizer(structure, net, tmp_path, x):
    before = net(x)
    polarize(net, "body.layer4.1.conv1", structure)
    assert not torch.equal(net(x), before)
    archs.save(net, tmp_path / "net")
    loaded = archs.load(tmp_path / "net")
    assert torch.equal(loaded(x), net(x))
    assert type(loaded.body.layer4[1].conv1.layer) is STRUCTURES[structure]
    assert surgery.insertions(loaded) == surgery.insertions(net)


@torch.no_grad()
def test_layers_inserted_inside_and_before_each_other_are_saved(net, tmp_path, x):
    polarize(net, "body.layer4.1.conv1", "conv")
    polarize(net, "body.layer4.1.conv1", "linear")
    polarize(net, "body.layer4", "conv_bn")
    polarize(net, "body.avgpool", "osdn")
    archs.save(net, tmp_path / "net")
    loaded = archs.load(tmp_path / "net")
    assert torch.equal(loaded(x), net(x))
    assert len(surgery.insertions(loaded)) == 4


def test_saving_again_replaces_the_old_net(saved, x):
    other = thin(num_classes=43)
    archs.save(other, saved)
    assert archs.load(saved)(x).shape == (4, 43)
    assert [p.name for p in saved.parent.iterdir()] == ["net"]


@pytest.mark.parametrize("offset", [-1, 2000])
def test_altered_weights_are_refused(offset, saved):
    raw = bytearray((saved / "net.safetensors").read_bytes())
    raw[offset] ^= 1
    (saved / "net.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="does not match its checksum: truncated or altered"):
        archs.load(saved)


def test_truncated_weights_are_refused(saved):
    path = saved / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="does not match its checksum"):
        archs.load(saved)


def test_no_byte_of_the_sheet_changes_unnoticed(saved):
    """Short of building the net: what `sheet` lets pass must say what was written."""
    sheet, meta = saved / "net.json", archs.sheet(saved)
    raw = sheet.read_bytes()
    for at in range(len(raw)):
        sheet.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            found = archs.sheet(saved)
        except UserError:
            continue
        assert found == meta, f"byte {at}"


def test_an_altered_sheet_is_refused_and_an_older_one_without_a_checksum_of_itself_is_not(saved):
    meta = json.loads((saved / "net.json").read_text())
    (saved / "net.json").write_text(json.dumps(meta | {"mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(UserError, match=r"net\.json does not match its own checksum: altered, make it again"):
        archs.load(saved)
    del meta[SEAL]
    (saved / "net.json").write_text(json.dumps(meta))
    archs.load(saved)


def test_another_format_is_refused(saved):
    edit(saved, format="bdx-net-9")
    with pytest.raises(UserError, match=r"net\.json: format='bdx-net-9', expected 'bdx-net-1'"):
        archs.load(saved)


def test_a_folder_without_a_net_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no net\.json: expected a folder that a run has written"):
            archs.load(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: (p / "net.json").write_text("{"),
        lambda p: (p / "net.json").write_text("[]"),
        lambda p: (p / "net.json").write_text('{"format": "bdx-net-1"}'),
        lambda p: (p / "net.safetensors").unlink(),
    ],
    ids=["no JSON", "a list", "keys are missing", "weights are missing"],
)
def test_a_half_folder_is_a_users_mistake(spoil, saved):
    spoil(saved)
    with pytest.raises(UserError, match=r"net\.(json|safetensors)"):
        archs.load(saved)


def test_keys_must_match_exactly(saved):
    with rewritten(saved) as tensors:
        tensors["body.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*body\.extra"):
        archs.load(saved)
    with rewritten(saved) as tensors:
        del tensors["body.extra"], tensors["body.linear.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*body\.linear\.bias"):
        archs.load(saved)


def command(place: Path) -> dict:
    return {"_target_": "os.system", "command": f"touch {place}"}


def test_a_foreign_target_is_refused_and_never_run(saved, tmp_path):
    sheet, trap = json.loads((saved / "net.json").read_text()), tmp_path / "trap"
    evil = [
        {"arch": command(trap)},
        {"arch": sheet["arch"] | {"width": command(trap)}},
        {"insertions": [{"at": "body.conv1", "layer": command(trap)}]},
        {"insertions": [{"at": "body.conv1", "layer": {"_target_": "bdx.polarizers.Conv", "channels": [command(trap)]}}]},
    ]
    for changes in evil:
        edit(saved, **sheet | changes)
        with pytest.raises(UserError, match=r"_target_=os\.system is not allowed here; allowed are bdx\.archs\.\*"):
            archs.load(saved)
    assert not trap.exists()


ELSEWHERE = ["torch.load", "builtins.eval", "bdx.run.run", "bdx.store.shutil.rmtree", "torch.nn.Linear", "bdx"]
IMPORTED = [
    "bdx.archs.base.instantiate",
    "bdx.archs.base.save_folder",
    "bdx.polarizers.torch.load",
    "timm.models.load_state_dict",
]


@pytest.mark.parametrize("target", ELSEWHERE + IMPORTED)
def test_a_net_is_built_from_nets_alone(target, saved):
    edit(saved, insertions=[{"at": "body.conv1", "layer": {"_target_": target}}])
    with pytest.raises(UserError, match="is not allowed here"):
        archs.load(saved)


@pytest.mark.parametrize(
    "target", ["bdx.polarizers.torch.os.makedirs", "bdx.archs.base.Path.mkdir", "torchvision.models.resnet.torch.os.makedirs"]
)
def test_no_way_leads_through_an_allowed_module_to_what_it_imports(target, saved, tmp_path):
    trap = tmp_path / "trap"
    layer = {"_target_": target, "name": str(trap)}
    if target.endswith("mkdir"):
        layer = {"_target_": target, "_args_": [{"_target_": "bdx.archs.base.Path", "_args_": [str(trap)]}]}
    edit(saved, insertions=[{"at": "body.conv1", "layer": layer}])
    with pytest.raises(UserError, match="is not allowed here"):
        archs.load(saved)
    assert not trap.exists()


def test_a_partial_is_completed_later():
    partial = instantiate({"_target_": "bdx.polarizers.Conv", "_partial_": True}, allowed=("bdx.polarizers.",))
    assert partial(channels=3).conv.weight.shape == (3, 3, 1, 1)


# places

PLACES = {  # shallow, middle, third to last, penultimate, last, whole: counted by hand along the main path
    ("preact_resnet18",): (
        "layer1.0.conv1", "layer2.1.conv2", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "avgpool",
    ),
    ("preact_resnet18", "arch.final_norm=true"): (
        "layer1.0.conv1", "layer2.1.conv2", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "avgpool",
    ),
    ("resnet18",): (
        "layer1.0.conv1", "layer2.1.conv2", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "avgpool",
    ),
    ("wrn16_1",): (
        "block1.0.conv1", "block2.0.conv2", "block3.0.conv2", "block3.1.conv1", "block3.1.conv2", "avgpool",
    ),
    ("vgg19_bn",): (
        "features.3", "features.27", "features.43", "features.46", "features.49", "avgpool",
    ),
    ("vgg19",): (
        "features.2", "features.19", "features.30", "features.32", "features.34", "avgpool",
    ),
    ("inception_v3",): (
        "Conv2d_2a_3x3.conv", "Mixed_6c.branch7x7dbl_4.conv", "Mixed_7c.branch3x3dbl_3a.conv",
        "Mixed_7c.branch3x3dbl_3b.conv", "Mixed_7c.branch_pool.conv", "avgpool",
    ),
    ("densenet161",): (
        "features.denseblock1.denselayer1.conv1", "features.denseblock3.denselayer21.conv2",
        "features.denseblock4.denselayer23.conv2", "features.denseblock4.denselayer24.conv1",
        "features.denseblock4.denselayer24.conv2", "features.norm5",
    ),
    ("timm",): (
        "layer1.0.conv1", "layer2.1.conv2", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "global_pool.pool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", PLACES, ids="-".join)
def test_places_by_depth(arch):
    with torch.device("meta"):
        net = build(*arch)
        found = places.places(net, torch.zeros(2, 3, 32, 32))
    assert tuple(found) == places.DEPTHS
    assert tuple(n.removeprefix("body.") for n in found.values()) == PLACES[arch]


def test_looking_for_places_changes_nothing(x):
    net = thin().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    places.places(net, x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_nothing_leads_around_the_whole_place(net, x):
    """What a layer that answers 0 makes of the logits: the bias at `whole`, more than that at `penultimate`."""
    around = thin()
    surgery.insert(net, places.locate(net, "whole", x), Silence(), {})
    surgery.insert(around, places.locate(around, "penultimate", x), Silence(), {})
    with torch.no_grad():
        assert torch.equal(net(x), net.body.linear.bias.expand(4, 10))
        assert not torch.allclose(around(x)[0], around(x)[1], atol=1e-3)


class Silence(nn.Module):
    def forward(self, z):
        return z * 0


def test_few_convolutions_have_no_places():
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match="this net has 1 convolutions; name the layer instead: 0, 1, 2"):
        places.places(tiny, torch.zeros(2, 3, 3, 3))


def test_a_net_without_norm_or_pooling_has_no_whole_place():
    plain = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)), nn.Flatten())
    assert set(places.places(plain, torch.zeros(2, 3, 2, 2))) == set(places.DEPTHS) - {"whole"}
    with pytest.raises(UserError, match="layer=whole: this net has no such place, only shallow, middle"):
        places.locate(plain, "whole", torch.zeros(2, 3, 2, 2))


def test_a_norm_behind_the_pooling_sees_no_map():
    convs = [nn.Conv2d(3, 3, 1) for _ in range(3)]
    net = nn.Sequential(*convs, nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert places.places(net, torch.zeros(2, 3, 2, 2))["whole"] == "4"


def test_a_layer_is_found_by_name_or_depth(net, x):
    for layer in ("layer4.1.conv1", "body.layer4.1.conv1", "penultimate"):
        assert places.locate(net, layer, x) == "body.layer4.1.conv1"
    assert places.locate(net, "normalize", x) == "normalize"


def test_a_mistyped_layer_gets_the_nearest(net, x):
    with pytest.raises(
        UserError, match=r"layer=layer4\.1\.cnv1: no such layer \(did you mean layer4\.1\.conv1,.*by depth: shallow"
    ):
        places.locate(net, "layer4.1.cnv1", x)
    with pytest.raises(UserError, match=r"did you mean penultimate|by depth: shallow, middle, third_to_last, penultimate"):
        places.locate(net, "penultimat", x)


def test_the_shape_of_an_input(net, x):
    assert places.input_shape(net, "body.layer4.1.conv1", x) == (64, 4, 4)
    assert places.input_shape(net, "body.layer1.0.conv1", x) == (8, 32, 32)
    assert places.input_shape(net, "body.linear", x) == (64,)
    assert not any(m._forward_pre_hooks for m in net.modules())


# inserting and watching


def polarize(net: nn.Module, at: str, structure: str) -> nn.Module:
    """Insert a polarizer with random weights."""
    channels = places.input_shape(net, at, torch.zeros(2, 3, 32, 32))[0]
    layer = STRUCTURES[structure](channels).eval()
    for tensor in [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]:
        tensor.data.uniform_(0.5, 1.5)
    surgery.insert(net, at, layer, {"_target_": f"bdx.polarizers.{type(layer).__name__}", "channels": channels})
    return layer


class Twice(nn.Module):
    def forward(self, z):
        return z * 2


@torch.no_grad()
def test_an_inserted_layer_filters_one_input(net, x):
    linear = net.body.linear
    before = net(x)
    surgery.insert(net, "body.linear", Twice(), {"_target_": "t"})
    assert torch.allclose(net(x) - linear.bias, (before - linear.bias) * 2, atol=1e-6)
    assert surgery.insertions(net) == [{"at": "body.linear", "layer": {"_target_": "t"}}]


@torch.no_grad()
def test_the_order_inside_a_sequential_is_kept():
    net = nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(2, 1))
    z = torch.tensor([[1.0, 3.0]])
    first = net[1](net[0](z))
    surgery.insert(net, "2", Twice(), {})
    assert [n for n, _ in net.named_children()] == ["0", "1", "2"]
    assert torch.allclose(net(z), net[2].module(first * 2))


def test_a_place_that_is_not_there(net):
    with pytest.raises(AttributeError, match="layer9"):
        surgery.insert(net, "body.layer9.conv1", Twice(), {})


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_module_by_module(training, net):
    net.body.layer1.train()
    before = {n: m.training for n, m in net.named_modules()}
    assert len(set(before.values())) == 2
    with surgery.mode(net, training) as inside:
        assert inside is net
        assert {m.training for m in net.modules()} == {training}
    assert {n: m.training for n, m in net.named_modules()} == before
    with pytest.raises(RuntimeError, match="in between"), surgery.mode(net, training):
        raise RuntimeError("in between")
    assert {n: m.training for n, m in net.named_modules()} == before


def test_a_frozen_net_has_gradients_for_pixels_alone(x):
    net = surgery.freeze(thin().train())
    assert not any(m.training for m in net.modules())
    pixels = x.requires_grad_()
    net(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def test_watching_ends(net, x):
    seen = []

    def visit(z):
        seen.append(tuple(z.shape))
        raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"), surgery.watch_input(net, "body.layer2", visit):
        net(x)
    net(x)
    assert seen == [(4, 8, 32, 32)]


@pytest.mark.parametrize("at", ["body.layer4.1.conv1", "body.linear", "normalize"])
def test_moments_against_torch(at, net):
    data = torch.rand(11, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    seen = []
    with surgery.watch_input(net, at, seen.append), torch.no_grad():
        net(data)
    z = seen[0].transpose(0, 1).flatten(1)
    net.train()
    batches = [(data[:4], None), (data[4:8], None), (data[8:], None)]  # batches of unequal size count by image
    mean, var = surgery.moments(net, at, batches)
    assert torch.allclose(mean, z.mean(1), atol=1e-5)
    assert torch.allclose(var, z.var(1, unbiased=False), atol=1e-5)
    assert mean.dtype == var.dtype == torch.float32
    assert net.training
    assert not net.get_submodule(at)._forward_pre_hooks


def test_moments_by_hand():
    net = nn.Sequential(nn.Identity())
    z = torch.tensor([[1.0, 10.0], [3.0, 10.0]]).view(2, 2, 1, 1)
    mean, var = surgery.moments(net, "0", [(z,)])
    assert mean.tolist() == [2.0, 10.0]
    assert var.tolist() == [1.0, 0.0]


def test_moments_far_from_zero_are_exact():
    net = nn.Sequential(nn.Identity())
    z = 1000 + torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    _, var = surgery.moments(net, "0", [(z,)])
    assert var.item() == pytest.approx(z.double().var(unbiased=False).item(), rel=1e-3)


# polarizers


@pytest.fixture
def z() -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    return torch.randn(8, 6, 5, 5, generator=g) * torch.arange(1, 7).view(1, 6, 1, 1) + 3


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_polarizer_starts_as_the_identity(structure, z):
    layer = STRUCTURES[structure](6).eval()
    scale = (1 + 1e-5) ** (-0.5 * len(layer.norms()))  # BatchNorm's ε
    assert torch.allclose(layer(z), z * scale, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("training", [True, False])
def test_a_calibrated_polarizer_is_the_identity_in_both_modes(structure, training, z):
    z[:, 0] = 2.5  # a dead channel has no variance
    layer = STRUCTURES[structure](6)
    layer.calibrate(z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False))
    assert torch.allclose(layer.train(training)(z), z, atol=2e-5)


def test_calibration_is_what_the_running_statistics_say(z):
    layer = ConvBN(6)
    layer.calibrate(torch.arange(6.0), torch.arange(1.0, 7.0))
    assert layer.bn.running_mean.tolist() == layer.bn.bias.tolist() == [0, 1, 2, 3, 4, 5]
    assert layer.bn.running_var.tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.allclose(layer.bn.weight.square(), torch.arange(1.0, 7.0) + 1e-5)
    assert layer.bn.weight.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("structure", WITH_BN)
def test_an_inserted_and_calibrated_polarizer_leaves_the_logits(structure, net, x):
    before = net(x)
    at = "body.layer4.1.conv1"
    layer = STRUCTURES[structure](64)
    surgery.insert(net, at, layer, {})
    layer.calibrate(*surgery.moments(net, f"{at}.layer", [(x,)]))
    assert torch.allclose(net.eval()(x), before, atol=1e-4)
    fresh = thin()
    surgery.insert(fresh, at, STRUCTURES[structure](64).train(), {})
    assert not torch.allclose(fresh(x), before, atol=1e-2)  # with the batch's statistics a plain start is no identity


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_parameter_of_a_polarizer_learns(structure, z):
    layer = STRUCTURES[structure](6).eval()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (layer(z) * weight).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.abs().sum() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
def test_npds_polarizers_are_called_as_cnpds_and_ignore_the_label(structure, z):
    layer = STRUCTURES[structure](6).eval()
    assert torch.equal(layer(z, torch.arange(len(z))), layer(z))


@pytest.mark.parametrize(
    ("structure", "count"), [("conv", 36), ("conv_bn", 48), ("conv_bn_x2", 96), ("linear", 12), ("osad", 36), ("osdn", 36)]
)
def test_sizes_of_polarizers(structure, count):
    assert parameters(STRUCTURES[structure](6)) == count
    assert len(STRUCTURES[structure](6).norms()) == {"conv_bn": 1, "conv_bn_x2": 2}.get(structure, 0)


def test_the_papers_polarizer_of_512_channels():
    assert parameters(ConvBN(512)) == 263_168  # 2.36 % of PreAct-ResNet18
    assert Conv(3).conv.bias is None


@torch.no_grad()
def test_the_conv_mixes_channels():
    layer = Conv(2)
    layer.conv.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]).view(2, 2, 1, 1))
    assert layer(torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)).flatten().tolist() == [13.0, -5.0]


@torch.no_grad()
def test_denoising_by_the_local_mean():
    z = torch.arange(9.0).view(1, 1, 3, 3)
    layer = OSDN(1)
    wanted = [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5], [5.0, 5.5, 6.0]]  # the corners have 4 neighbours, with themselves
    assert layer.denoise(z)[0, 0].tolist() == wanted
    layer.mix.weight.fill_(0.5)
    assert torch.allclose(layer(z)[0, 0], (z[0, 0] + torch.tensor(wanted)) / 2)


@torch.no_grad()
def test_denoising_by_attention_against_a_loop(z):
    z = z[:2, :, :2, :2] / 4
    flat = z.flatten(2)
    wanted = torch.zeros_like(flat)
    for n in range(2):
        for i in range(4):
            score = torch.tensor([float(flat[n, :, i] @ flat[n, :, j]) for j in range(4)]) / 6**0.5
            share = score.exp() / score.exp().sum()
            wanted[n, :, i] = sum(share[j] * flat[n, :, j] for j in range(4))
    assert torch.allclose(OSAD(6).denoise(z), wanted.view_as(z), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [OSAD, OSDN])
def test_denoising_leaves_what_is_even(kind):
    even = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 4, 4)
    assert torch.allclose(kind(6).denoise(even), even, atol=1e-5)


def test_a_denoiser_must_say_how(z):
    with pytest.raises(NotImplementedError, match="Denoiser must say how it denoises"):
        Denoiser(6)(z)


@pytest.mark.parametrize(
    "asks", [{"pretrained": True}, {"checkpoint_path": "x.pt"}, {"weights": "DEFAULT"}, {"model_name": "hf-hub:a/b"}]
)
def test_a_saved_net_fetches_nothing(asks, saved):
    edit(saved, arch={"_target_": "timm.create_model", "model_name": "resnet18"} | asks)
    with pytest.raises(UserError, match="asks a library to fetch weights"):
        archs.load(saved)
