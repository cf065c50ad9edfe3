"""Figures: their numbers against scikit-learn, `evaluate` and hand-made cases; each is drawn again from its CSV alone."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_attack, paths
from pandas.testing import assert_frame_equal
from sklearn.decomposition import PCA
from torch import nn

from bdx import surgery
from bdx.adversarial import Budget, perturb
from bdx.archs.base import Classifier, Normalize
from bdx.cli import main
from bdx.conditioned import Replicated, condition
from bdx.errors import UserError
from bdx.evaluate import evaluate
from bdx.figures import (
    Stored,
    along_the_line,
    depth_curve,
    features,
    grad_cam,
    perturbations,
    read,
    reconstructions,
    redraw,
    weight_differences,
)  # fmt: skip
from bdx.figures import line as line_figure
from bdx.figures.base import named, pictured, watched, written
from bdx.figures.depth import draw_depth
from bdx.figures.embedding import draw_features, embed, last_linear
from bdx.figures.heat import heat_map
from bdx.polarizers import ConvBN
from bdx.split import pixels

BUDGET = Budget(norm="l2", radius=3.0, step=0.1, steps=2, along="sign", stop=None)
SPEC = {"arch": {}, "num_classes": 3, "shape": [1, 4, 4]}


@pytest.fixture(scope="module")
def some(digits):
    return digits.test[:60]


@pytest.fixture(scope="module")
def attack(digits):
    return build_attack(digits, "attack=badnets")


@pytest.fixture(scope="module")
def before(attack, digits):
    """An untrained net whose BatchNorm has seen images, so that it does not call them all one class."""
    line_figure.estimate_statistics(attack.net, digits.train.x[:200])
    return attack.net.eval()


@pytest.fixture(scope="module")
def after(before):
    """Another net of the same architecture: every weight and statistic a little off."""
    net, g = copy.deepcopy(before), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for k, v in net.state_dict().items():
            if v.is_floating_point() and "normalize" not in k:
                v.mul_(1 + 0.4 * torch.rand(v.shape, generator=g))
    return net


class Small(nn.Module):
    """Two channels, the image and its mirror image; pooling and a Linear: Grad-CAM by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.linear.weight.copy_(torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 4.0]]))

    def forward(self, x):
        return self.linear(self.pool(self.conv(x)).flatten(1))


def small() -> Classifier:
    return Classifier(Normalize([0.0], [1.0]), Small(), SPEC).eval()


def check_files(frame: pd.DataFrame, path, draw=None) -> None:
    """The CSV reads back as what was returned, and the picture is drawn from it alone, the same again."""
    assert_frame_equal(read(path), frame, check_exact=True)
    png = path.parent / f"{path.name}.png"
    first = png.read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    if draw:
        png.unlink()
        redraw(path, draw)
        assert png.read_bytes() == first


# along the line


def test_both_ends_of_the_line_are_the_nets_themselves(before, after, attack, some, tmp_path):
    frame = along_the_line(before, after, attack, some, tmp_path / "a.line", points=5)
    assert frame["t"].tolist() == [0, 0.5, 1, 1.5, 2]
    for t, net in ((0, before), (1, after)):
        row, scores = frame[frame["t"] == t].iloc[0], evaluate(net, attack, some)
        assert (row["acc"], row["asr"]) == (scores["acc"], scores["asr"])
        with torch.no_grad():
            loss = nn.functional.cross_entropy(net(pixels(some.x)), some.y_true)
        assert row["clean_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert frame["backdoor_loss"].nunique() == 5
    check_files(frame, tmp_path / "a.line", line_figure.draw_line)


def test_the_nets_stay_as_they_were(before, after, attack, some, tmp_path):
    kept = [copy.deepcopy(n.state_dict()) for n in (before, after)]
    along_the_line(before, after, attack, some[:10], tmp_path / "line", points=2, statistics="clean", clean=some)
    for old, net in zip(kept, (before, after), strict=True):
        assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())


def test_weights_between_and_beyond_are_on_the_line_and_variances_stay_at_0():
    a = {"w": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([1.0, 4.0]), "n": torch.tensor(3)}
    b = {"w": torch.tensor([3.0, 2.0]), "bn.running_var": torch.tensor([2.0, 1.0]), "n": torch.tensor(9)}
    state, below = line_figure.between(a, b, 1.5)
    assert state["w"].tolist() == [4, 2]
    assert state["bn.running_var"].tolist() == [2.5, 0]  # 4 − 4.5 is below 0
    assert (below, int(state["n"])) == (1, 3)


def test_variances_below_0_are_counted_and_an_estimate_has_none(before, attack, some, tmp_path):
    narrow = copy.deepcopy(before)
    narrow.body.layer1[0].bn1.running_var.mul_(0.1)
    frame = along_the_line(before, narrow, attack, some[:10], tmp_path / "line", points=3)
    assert frame["variances_below_0"].tolist() == [0, 0, 8]
    again = along_the_line(before, narrow, attack, some[:10], tmp_path / "line", points=3, statistics="clean", clean=some)
    assert again["variances_below_0"].tolist() == [0, 0, 0]
    assert again["clean_loss"].nunique() == 1  # the statistics alone differed
    with pytest.raises(UserError, match="statistics=clean needs images"):
        along_the_line(before, narrow, attack, some, tmp_path / "line", statistics="clean")


def test_statistics_are_those_of_the_images(some):
    net = Classifier(Normalize([0.5] * 3, [1.0] * 3), nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5)), SPEC)
    line_figure.estimate_statistics(net, some.x, size=30)
    x = (some.x.float() / 255 - 0.5).view(2, 30, 3, -1)
    bn = net.body[0]
    torch.testing.assert_close(bn.running_mean, x.mean((0, 1, 3)))
    torch.testing.assert_close(bn.running_var, x.transpose(1, 2).flatten(2).var(-1).mean(0))
    assert bn.momentum == 0.1


def test_nets_that_do_not_fit_are_refused_by_key(before, attack, some, tmp_path):
    other = copy.deepcopy(before)
    other.insert("body.linear", nn.Identity(), {})
    with pytest.raises(UserError, match=r"only the first has body.linear.weight, body.linear.bias; nets with an inserted"):
        along_the_line(before, other, attack, some, tmp_path / "line")
    other = copy.deepcopy(before)
    other.body.linear = nn.Linear(64, 3)
    with pytest.raises(UserError, match=r"weight_differences: .* of another shape are body.linear.weight, body.linear.bias"):
        weight_differences(before, {"x": other}, tmp_path / "line")


def test_without_a_trigger_there_is_nothing_to_show(before, some, digits, tmp_path):
    none = build_attack(digits, "attack=none")
    for draw in (
        lambda: along_the_line(before, before, none, some, tmp_path / "a"),
        lambda: features({"a": before}, none, some, tmp_path / "a"),
        lambda: perturbations(before, none, some, BUDGET, tmp_path / "a"),
        lambda: grad_cam({"a": before}, none, some, tmp_path / "a"),
    ):
        with pytest.raises(UserError, match="has no trigger to show"):
            draw()


# weights


def test_differences_are_counted_in_their_bins(tmp_path):
    before, after = small(), small()
    with torch.no_grad():
        after.body.linear.weight[0, 0] += 3.0
        after.body.linear.weight[1, 0] -= 1.5
    frame = weight_differences(before, {"d3": after, "none": before}, tmp_path / "w", bins=3)
    assert frame["layer"].unique().tolist() == ["linear"]
    d3 = frame[frame["net"] == "d3"]
    assert d3[["left", "right"]].to_numpy().tolist() == [[-3, -1], [-1, 1], [1, 3]]
    assert d3["share"].tolist() == [1 / 6, 4 / 6, 1 / 6]
    assert d3["distance"].tolist() == pytest.approx([11.25**0.5] * 3)
    assert d3["norm"].tolist() == pytest.approx([28**0.5] * 3)
    assert frame[frame["net"] == "none"]["share"].tolist() == [0, 1, 0]
    check_files(frame, tmp_path / "w")


def test_every_layer_has_a_panel(before, after, tmp_path):
    frame = weight_differences(before, {"after": after}, tmp_path / "w", layers="all", bins=5)
    assert frame["layer"].iloc[0] == "conv1"
    assert frame["layer"].nunique() == 21  # 1 + 16 convolutions, 3 shortcuts, 1 Linear
    assert np.allclose(frame.groupby("layer")["share"].sum(), 1)
    with pytest.raises(UserError, match=r"layer=linea: no such layer \(did you mean linear"):
        weight_differences(before, {"after": after}, tmp_path / "w", layers="linea")


# features


def test_pca_is_scikit_learns_and_triggered_images_are_those_the_attack_relabels(before, attack, some, tmp_path):
    nets = {"before": before}
    frame = features(nets, attack, some, tmp_path / "f", method="pca", count=40, seed=3, classes=tuple("0123456789"))
    assert frame["triggered"].tolist() == [False] * 40 + [True] * int((~frame["triggered"] & (frame["label"] != "0: 0")).sum())
    clean = torch.tensor(frame["image"][~frame["triggered"]].to_numpy())
    dirty = torch.tensor(frame["image"][frame["triggered"]].to_numpy())
    assert (some.y_true[dirty] != attack.target).all()
    seen = []
    with torch.no_grad(), surgery.watch_input(before, "body.linear", seen.append):
        before(pixels(torch.cat([some.x[clean], attack.stamp(some.x[dirty])])))
    oracle = PCA(2, svd_solver="full").fit_transform(seen[0].double().numpy())
    assert np.allclose(np.abs(frame[["x", "y"]]), np.abs(oracle), atol=1e-4)
    assert frame["label"].tolist() == named(some.y_true[torch.cat([clean, dirty])], tuple("0123456789"))
    assert (frame["wanted"][frame["triggered"]] == attack.target).all()
    check_files(frame, tmp_path / "f", draw_features)


def test_tsne_is_the_same_again_for_a_seed(before, attack, some, tmp_path):
    first, again = (features({"a": before}, attack, some, tmp_path / n, count=12, seed=1) for n in "ab")
    assert_frame_equal(first, again)
    other = features({"a": before}, attack, some, tmp_path / "c", count=12, seed=2)
    assert other["image"].tolist() != first["image"].tolist()
    check_files(first, tmp_path / "a")
    with pytest.raises(UserError, match="method=umap: expected tsne or pca"):
        features({"a": before}, attack, some, tmp_path / "a", method="umap")
    with pytest.raises(UserError, match="features: count=61: expected 2 to 60"):
        features({"a": before}, attack, some, tmp_path / "a", count=61)


def test_the_last_linear_of_a_longer_head_is_watched():
    net = small()
    net.body.linear = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
    assert last_linear(net) == "body.linear.2"
    assert embed(torch.randn(9, 5), "tsne", 0).shape == (9, 2)


# depth


def rows(*cells) -> list[dict]:
    base = {"dataset": "cifar10", "arch": "preact_resnet18", "attack": "badnets", "train": "fast", "seed": 0}
    scores = {"acc_before": 0.8, "asr_before": 0.9, "acc": 0.7, "asr": 0.1, "backdoor": "1234567890123456"}
    return [base | scores | cell for cell in cells]


def test_rows_that_differ_in_the_layer_alone_are_one_line(before, tmp_path):
    table = rows(
        {"defense": "npd", "defense.layer": "last", "asr": 0.2},
        {"defense": "npd"},  # penultimate by default
        {"defense": "npd", "defense.layer": "shallow", "asr": 0.3},
        {"defense": "npd", "defense.layer": "last", "defense.optimizer.lr": 0.002, "asr": 0.4},
        {"defense": "npd", "defense.layer": "layer4.0.bn1", "backdoor": "0000000000000001", "attack": "sig"},
        {"defense": "ft"},
        {"defense": "d3", "defense.layer": "layer4"},  # no polarizer
        {"defense": "npd", "attack": "none", "asr": None},
    )
    frame = depth_curve(table, tmp_path / "d")
    own = frame[frame["line"] == "badnets, cifar10, preact_resnet18, seed 0, npd"]
    assert own["layer"].tolist() == ["shallow", "penultimate", "last"]
    assert own["asr"].tolist() == [0.3, 0.1, 0.2]
    assert frame["line"].nunique() == 3
    assert len(frame) == 5
    assert frame["backdoor"].iloc[0] == "1234567890123456"
    check_files(frame, tmp_path / "d", draw_depth)
    by_net = depth_curve(table, tmp_path / "d", net=before)
    order = by_net.drop_duplicates("layer").sort_values("position")["layer"].tolist()
    assert [n.split("\n")[0] for n in order] == ["layer1.0.conv1", "layer4.0.bn1", "layer4.1.conv1", "layer4.1.conv2"]
    assert order[0] == "layer1.0.conv1\n(shallow)"


def test_without_rows_the_error_says_how_to_make_some(tmp_path):
    with pytest.raises(UserError, match=r"no row of a defense with a polarizer in .*; make some, as by `bdx -m defense=npd"):
        depth_curve(tmp_path, tmp_path / "d")


# perturbations


def test_distances_are_between_features_of_the_layer(before, attack, some, tmp_path):
    frame = perturbations(before, attack, some, BUDGET, tmp_path / "p", count=3, layer="linear")
    assert frame["kind"].tolist() == [k for k in ("clean", "trigger", "targeted", "untargeted") for _ in range(3)]
    index = (some.y_true != attack.target).nonzero().flatten()[:3]
    assert frame["image"].tolist() == index.tolist() * 4
    x = pixels(some.x[index])
    dirty = pixels(attack.stamp(some.x[index]))
    towards = perturb(before, x, torch.full((3,), attack.target), BUDGET, targeted=True)
    pooled = nn.Sequential(before.normalize, *list(before.body.children())[:-1], nn.Flatten())
    with torch.no_grad():
        wanted = {"clean": x, "trigger": dirty, "targeted": towards}
        wanted = {k: (pooled(v) - pooled(dirty)).norm(dim=1).tolist() for k, v in wanted.items()}
    for kind, distances in wanted.items():
        assert frame["distance"][frame["kind"] == kind].tolist() == pytest.approx(distances, rel=1e-4, abs=1e-6)
    assert np.allclose(pictured(*frame.iloc[3][["pixels", "size"]]), dirty[0].permute(1, 2, 0))
    check_files(frame, tmp_path / "p")
    with pytest.raises(UserError, match=r"count=100: expected 1 to \d+, as many as the attack would relabel"):
        perturbations(before, attack, some, BUDGET, tmp_path / "p", count=100)


def test_a_net_that_runs_twice_is_watched_the_last_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            self.inner(x)
            return self.inner(2 * x)

    z, predicted = watched(Twice(), "inner", torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
    assert z.tolist() == [[2, 6], [4, 0]]
    assert predicted.tolist() == [1, 0]


# Grad-CAM


def test_grad_cam_by_hand():
    """Channels are A₀ = x and A₁ = −x, logits the mean of x times w₀ − w₁ = (2, 0, −4): class 0 wins. α = (3, 1)/16, so the
    heat is ReLU(3x − x)/16: proportional to x."""
    x = torch.zeros(2, 1, 4, 4)
    x[0, 0, 1, 2], x[0, 0, 3, 3] = 1.0, 0.5
    net = surgery.freeze(small())
    heat, predicted = heat_map(net, "body.pool", x)
    assert predicted.tolist()[0] == 0
    assert torch.equal(heat[0], x[0, 0])
    assert not heat[1].any()  # a map without anything in it stays 0
    assert all(p.grad is None for p in net.parameters())


def test_a_negative_sum_is_no_heat():
    """With the first row swapped, class 0's score falls with x: no place speaks for it."""
    net = small()
    with torch.no_grad():
        net.body.linear.weight.copy_(torch.tensor([[-1.0, 0.0], [-9.0, 0.0], [-9.0, 0.0]]))
    heat, predicted = heat_map(net, "body.pool", torch.rand(3, 1, 4, 4))
    assert predicted.tolist() == [0, 0, 0]
    assert not heat.any()


def test_heat_before_and_after_a_polarizer(before, attack, some, tmp_path):
    polarized = surgery.freeze(copy.deepcopy(before))
    polarized.insert("body.avgpool", ConvBN(64), {"_target_": "bdx.polarizers.ConvBN", "channels": 64})
    frame = grad_cam({"badnets": before, "npd": polarized.eval()}, attack, some, tmp_path / "g", count=2)
    assert frame["net"].tolist() == ["badnets"] * 4 + ["npd"] * 4
    assert frame["triggered"].tolist() == [False, False, True, True] * 2
    assert frame["map"].unique().tolist() == ["4x4"]
    x = pixels(torch.cat([some.x[frame["image"][:2]], attack.stamp(some.x[frame["image"][:2]])]))
    heat, _ = heat_map(polarized, "body.avgpool.module", x)
    for text, wanted in zip(frame["heat"][4:], heat, strict=True):
        assert np.allclose(pictured(text, "4x4"), wanted, atol=1 / 500)
    check_files(frame, tmp_path / "g")
    with pytest.raises(UserError, match=r"its input has shape \(64,\); Grad-CAM needs a feature map"):
        grad_cam({"a": before}, attack, some, tmp_path / "g", layer="linear")


def test_a_net_that_asks_itself_for_a_label_is_seen_in_its_last_pass(before, some):
    """CNPD: the heat is that of the pass with the label, whose gradient does not run through the first pass."""
    net, at = copy.deepcopy(before), "body.layer4.1.conv1"
    layer = Replicated(64, classes=10, tokens=False, restore=False)
    with torch.no_grad():
        layer.weight += 0.2 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    net.insert(at, layer, {}, condition("predicted", soft=False, target=0, classes=10))
    surgery.freeze(net)
    x = pixels(some.x[:6])

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return net(x, label)

    with torch.no_grad():
        label = net.raw(x).argmax(1)
    heat, predicted = heat_map(net, "body.avgpool", x)
    told, also = heat_map(Told(), "net.body.avgpool", x)
    torch.testing.assert_close(heat, told)
    assert torch.equal(predicted, also)
    raw, _ = heat_map(before, "body.avgpool", x)
    assert not torch.allclose(heat, raw, atol=1e-3)


# cells of the CSV, and the command


def test_pictures_survive_the_csv():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    assert written(x) == written(x.float() / 255)
    assert np.array_equal(pictured(written(x)[1], "3x4x5") * 255, x[1].permute(1, 2, 0).numpy())
    assert written(torch.zeros(1, 2, 2)) == ["#00000000"]  # and not a number


def test_the_command_draws_a_run_that_is_done(cell, shared, tmp_path, capsys):
    row = cell(
        "attack=blended", "attack.alpha=0.3", "train.epochs=1", "defense=ft", "defense.epochs=1", "dataset.reserved.count=50"
    )

    def figure(*argv) -> tuple[int, str]:
        with pytest.raises(SystemExit) as e:
            main(["figure", *argv, *paths(shared)])
        said = capsys.readouterr()
        return e.value.code, said.out + said.err

    assert figure("along_the_line", row["id"], "points=2", "end=1")[0] == 0
    frame = read(shared / "out" / "nets" / f"{row['id']}.log" / "along_the_line")
    assert frame["acc"].tolist() == [row["acc_before"], row["acc"]]
    assert frame["asr"].tolist() == [row["asr_before"], row["asr"]]
    for name, *more in (
        ["weight_differences", "layers=all"],
        ["perturbations", "count=2", "defense.budget.steps=1"],
        ["grad_cam"],
        ["features", "count=9"],
    ):
        code, said = figure(name, row["id"], *more, f"path={tmp_path / name}")
        assert (code, (tmp_path / f"{name}.png").exists()) == (0, True), said
    for argv, said in (
        (["gradcam"], "(did you mean grad_cam?)"),
        (["features", "abc"], "abc: no such run in"),
        (["features"], "no RUN_ID: no such run in"),
        (["features", row["id"], "count=many"], "count=many: expected a number, as 500"),
        (["features", row["id"], "cuont=9"], "cuont: no such key"),
        (["features", row["id"], "dataset.source.size=32"], f"{row['id']} was run on other images"),
        (["features", row["id"], "++dataset.source.size=32"], f"{row['id']} was run on other images"),
        (["depth_curve", row["id"]], "no row of a defense with a polarizer"),
    ):
        code, text = figure(*argv)
        assert code == 2
        assert said in text
        assert len(text.strip().splitlines()) == 1


# the bait


@pytest.fixture(scope="module")
def trapped(cell):
    """The row of a short run of Trap-and-Replace."""
    short = ["defense.trap.epochs=1", "defense.replace.epochs=1", "defense.replace.batch=32"]
    return cell("attack=badnets", "train.epochs=1", "defense=tnr", *short)


def test_reconstructions_are_the_decoders(trapped, shared, tmp_path):
    run = Stored(trapped["id"], paths(shared))
    frame = reconstructions(run.after, run.extra("decoder"), run.attack, run.data.test, tmp_path / "bait", count=3)
    assert len(frame) == 12
    again, original = (frame[(frame["drawn"] == d) & (frame["kind"] == "clean")] for d in ("again", "original"))
    pictures = [np.stack([pictured(p, s) for p, s in zip(f["pixels"], f["size"], strict=True)]) for f in (again, original)]
    assert np.allclose(((pictures[0] - pictures[1]) ** 2).mean((1, 2, 3)), again["mse"], atol=1e-3)
    assert (original["mse"] == 0).all()
    stem = surgery.watch_output(run.after, run.extra("decoder").spec["at"])
    x = pixels(run.data.test.x[torch.tensor(list(again["image"]))])
    with torch.no_grad(), stem as seen:
        run.after(x)
        drawn = run.extra("decoder")(seen[0])
    assert np.allclose(pictures[0], drawn.permute(0, 2, 3, 1).numpy(), atol=1 / 255)
    assert_frame_equal(read(tmp_path / "bait"), frame)
    assert (tmp_path / "bait.png").stat().st_size > 5000


def test_a_run_without_a_decoder_or_with_an_altered_one(trapped, cell, shared):
    other = cell("attack=badnets", "train.epochs=1", "defense=none")
    with pytest.raises(UserError, match="none has left no decoder there; take a run of tnr"):
        Stored(other["id"], paths(shared)).extra("decoder")
    run = Stored(trapped["id"], paths(shared))
    weights = run.paths["nets"] / f"{trapped['id']}.log" / "decoder" / "weights.safetensors"
    was = weights.read_bytes()
    weights.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its checksums"):
        run.extra("decoder")
    weights.write_bytes(was)
