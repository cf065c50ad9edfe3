"""What `bdx info` says of triggers: declared types against what triggers do, norms by hand, SSIM against another library."""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import build_attack, names, paths
from PIL import Image

from bdx.attacks.base import Attack
from bdx.configure import CONF, compose
from bdx.declared import source
from bdx.errors import UserError
from bdx.grid import EXPERIMENTS
from bdx.info import info, rows, value
from bdx.info import looks as looks_of
from bdx.recipe import differing
from bdx.triggers import Looks, looks, ssim, triggers

ATTACKS = names("attack")


def cls(name: str) -> type:
    module, _, last = compose([f"attack={name}"]).attack._target_.rpartition(".")
    return getattr(import_module(module), last)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_read_from_the_source_is_what_the_class_declares(name):
    declared, made = source(value(CONF / "attack" / f"{name}.yaml", "_target_"))[1], cls(name)
    for key in ("clean_label", "leaves_poison", "has_trigger", "sample_specific", "trigger_from"):
        assert declared.get(key, getattr(Attack, key)) == getattr(made, key), key
    assert made.trigger_from in ("formula", "made", "trained")


def pixelwise_and_linear(attack) -> bool:
    """Whether the trigger does the same to all images: T(x)[p] = a[p] x[p] + b[p] wherever nothing is clipped."""
    g = torch.Generator().manual_seed(1)
    one, two = torch.rand(2, 6, *attack.shape, generator=g)
    mask = torch.rand(6, 1, *attack.shape[1:], generator=g) < 0.5
    out = [attack.trigger(x) for x in (one, two, (one + two) / 2, torch.where(mask, one, two))]
    inside = torch.stack([(o > 1e-4) & (o < 1 - 1e-4) for o in out]).all(0)
    assert inside.float().mean() > 0.2
    half, mixed = (out[0] + out[1]) / 2, torch.where(mask, out[0], out[1])
    return all(bool(((a - b).abs() < 1e-5)[inside].all()) for a, b in ((out[2], half), (out[3], mixed)))


@pytest.mark.parametrize("name", [n for n in ATTACKS if n != "none"])
def test_a_static_trigger_does_the_same_to_all_images_and_no_other_does(name, digits):
    attack = build_attack(digits, f"attack={name}").eval()
    with torch.no_grad():
        for name, p in attack.named_parameters():
            if name.startswith(("maker.", "fixed.")):  # fresh weights paint nearly the same on everything
                p.mul_(4)
        assert pixelwise_and_linear(attack) == (not attack.sample_specific)


def test_info_shows_the_type_without_torch(monkeypatch, tmp_path, capsys):
    """Dirty or clean label, data or training control, static or sample-specific: NPD Table 10."""
    found = {name: needs for name, _, needs, *_ in rows("attack")}
    assert found["badnets"] == "dirty label, poisons data, static trigger"
    assert found["ctrl"] == "clean label, poisons data, static trigger"
    assert found["bpp"] == "dirty label, poisons data, sample-specific trigger"
    assert found["wanet"] == "dirty label, controls training, leaves no poisoned set, sample-specific trigger"
    assert found["none"] == "clean training"
    assert found["given"] == "needs a file of weights; no trigger is known"
    code = "import sys; from bdx.cli import dispatch; dispatch(['info', 'attacks']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "triggers_gtsrb.csv").write_text("attack,looks\nsig,global visible\n")
    monkeypatch.setattr("bdx.info.EXPERIMENTS", tmp_path)
    assert info(["attacks"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert " · clean label, poisons data, static trigger · global visible on gtsrb · Barni" in next(
        s for s in said if " sig " in s
    )
    assert " · dirty label, poisons data, static trigger · Gu et al." in next(s for s in said if " badnets " in s)
    assert said[-1].endswith("`bdx info triggers`")


def test_what_travels_along_is_what_the_numbers_say():
    """Size and visibility of the packaged table follow from its own columns."""
    for path in (EXPERIMENTS / "results").glob("triggers_*.csv"):
        with open(path, newline="") as file:
            for of in csv.DictReader(file):
                share, psnr = float(of["pixels"].rstrip("%")) / 100, float(of["PSNR dB"])
                assert of["looks"] == Looks(0, 0, share, psnr, 0).words(), of["attack"]
                assert looks_of()[of["attack"]] == f"{of['looks']} on {path.stem.partition('_')[2]}"


def test_an_inner_key_is_named_with_dots_and_a_later_one_does_not_count():
    yaml = {"lr": 0.1, "mask": {"epochs": 25, "lr": 1.0}, "later": 1}
    assert differing(yaml, {"lr": 0.1, "mask": {"epochs": 4, "lr": 1}}) == ("mask.epochs=4",)


# numbers


def test_norms_and_psnr_by_hand():
    """Half of four pixels of one channel change by 51 of 255: L2 = 0.2 √2, MSE = 0.02, PSNR = 16.99 dB."""
    clean = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    dirty = clean.clone()
    dirty[:, :, 0] = 51
    found = looks(clean, dirty)
    assert (found.l2, found.linf, found.changed) == pytest.approx((0.2 * 2**0.5, 51, 0.5))
    assert found.psnr == pytest.approx(16.9897, abs=1e-3)
    assert looks(clean, clean) == Looks(0, 0, 0, 100, 1)


def test_ssim_of_flat_images_is_that_of_their_means():
    """Without variance (2 m₁ m₂ + a) / (m₁² + m₂² + a) is left."""
    x, y = torch.full((1, 3, 16, 16), 0.25).double(), torch.full((1, 3, 16, 16), 0.75).double()
    assert float(ssim(x, y)) == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), abs=1e-5)


def test_ssim_is_that_of_another_library_s_filter(digits):
    from scipy.ndimage import gaussian_filter

    clean = digits.test.x[:4]
    x, y = clean.double() / 255, build_attack(digits, "attack=sig").stamp(clean).double() / 255
    wanted = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        blur = lambda z: gaussian_filter(z, (0, 1.5, 1.5), truncate=3.5, mode="mirror")
        va, vb, cov = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2, blur(a * b) - blur(a) * blur(b)
        top = (2 * blur(a) * blur(b) + 1e-4) * (2 * cov + 9e-4)
        wanted.append(np.mean(top / ((blur(a) ** 2 + blur(b) ** 2 + 1e-4) * (va + vb + 9e-4))))
    assert ssim(x, y).tolist() == pytest.approx(wanted, abs=1e-6)


def test_small_images_have_a_ssim():
    x = torch.rand(2, 1, 4, 6)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])


# the command


def test_the_table_and_the_picture_hold_every_formula_trigger(shared, capsys, digits, monkeypatch):
    formula, rest = ["badnets", "ftrojan"], ["lba", "none"]  # all of them would take long
    monkeypatch.setattr("bdx.triggers.options", lambda group: [*formula, *rest])
    assert triggers([*paths(shared), "arch.width=8"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(lines) & {*formula, *rest} == set(formula)
    assert "after training: lba (" in out
    attack = build_attack(digits, "attack=ftrojan")
    found = looks(digits.test.x[:1000], attack.stamp(digits.test.x[:1000]))
    assert f"{found.psnr:.1f}" in lines["ftrojan"]
    assert "global invisible" in lines["ftrojan"]
    assert "local visible" in lines["badnets"]
    assert lines["badnets"].split()[:5] == ["badnets", "dirty", "all2one", "data", "static"]
    page = np.array(Image.open(shared / "out" / "triggers_digits.png"))
    assert page.shape[0] == 68 * len(formula)
    row = formula.index("badnets") * 68
    assert (
        page[row + 58 : row + 64, 130 + 68 + 58 : 130 + 68 + 64] == 255
    ).all()  # the patch of the first image, twice as large
    clean = np.array(digits.test.x[0].permute(1, 2, 0)).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(page[row : row + 64, 130 : 130 + 64], clean)


@pytest.mark.parametrize(("word", "text"), [("attack=sig", "shows every attack"), ("dataset=digts", "no such dataset")])
def test_mistakes(word, text, shared):
    with pytest.raises(UserError, match=text):
        triggers([*paths(shared), word])


def test_a_setting_of_another_methods_class_names_its_own_paper():
    papers = {name: paper for name, *_, paper in rows("defense")}
    assert papers["fst"].startswith("Min et al.")
    assert papers["d3"].startswith("Wei et al.")
