"""`bdx info triggers`: what each attack's trigger does to real images, in numbers and in one picture."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bdx.archs import base as archs
from bdx.attacks.base import Attack
from bdx.build import instantiate
from bdx.configure import CONF, compose, options
from bdx.datasets import base as datasets
from bdx.errors import UserError
from bdx.info import source, value
from bdx.training import accelerate

VISIBLE = 30.0  # dB of PSNR, a usual mark of what the eye can tell apart; ours
LOCAL = 0.25  # of the pixels; ours


@dataclass(frozen=True)
class Looks:
    """Means over images, but for linf. l2: norm of the change in [0,1] units; linf: its largest value, in grey levels;
    changed: share of pixels with any change; psnr: in dB; ssim: 1 where nothing changed."""

    l2: float
    linf: float
    changed: float
    psnr: float
    ssim: float

    def words(self) -> str:
        """Size and visibility, two columns of NPD Table 10."""
        return f"{'local' if self.changed < LOCAL else 'global'} {'visible' if self.psnr < VISIBLE else 'invisible'}"


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(N,): structural similarity (Wang et al. 2004) of images (N,C,H,W) in [0,1], with a Gaussian window of 11×11 and
    σ = 1.5 (smaller images: as large as fits), mirrored at the border, where patches lie; mean over channels and places."""
    size = min(11, *(s - 1 + s % 2 for s in x.shape[2:]))
    wave = torch.exp(-((torch.arange(size).to(x) - size // 2) ** 2) / 4.5)
    wave = (wave / wave.sum()).view(1, 1, size, 1)

    def blur(z: Tensor) -> Tensor:
        z = F.pad(z, [size // 2] * 4, mode="reflect").flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(z, wave), wave.mT).view_as(x)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    a, b = 0.01**2, 0.03**2
    return ((2 * mx * my + a) * (2 * cov + b) / ((mx * mx + my * my + a) * (vx + vy + b))).mean((1, 2, 3))


def looks(clean: Tensor, triggered: Tensor) -> Looks:
    """Both (N,C,H,W) uint8. An image that the trigger leaves as it is counts with 100 dB."""
    x, y = clean.float() / 255, triggered.float() / 255
    change = y - x
    mse = change.square().mean((1, 2, 3))
    psnr = (-10 * mse.log10()).clamp(max=100)
    values = change.flatten(1).norm(dim=1).mean(), 255 * change.abs().max(), (change != 0).any(1).float().mean()
    return Looks(*map(float, (*values, psnr.mean(), ssim(x, y).mean())))


def triggers(argv: list[str]) -> int:
    """Print the table and write the picture; digits unless the words say otherwise."""
    words = argv if any(w.startswith("dataset=") for w in argv) else ["dataset=digits", *argv]
    if chosen := [w for w in words if w.startswith("attack")]:
        raise UserError(f"{chosen[0]}: `bdx info triggers` shows every attack, as its YAML file has it")
    cfg = compose(words)
    device, _ = accelerate(cfg.trainer.accelerator)
    plain = OmegaConf.to_container(cfg, resolve=True)
    data = datasets.load(plain["dataset"], Path(cfg.paths.data).expanduser(), device=device, seed=cfg.seed)
    about, how = {"num_classes": data.num_classes, "shape": data.shape}, instantiate(plain["train"])
    net = archs.build(plain["arch"], **plain["dataset"]["normalize"], **about)  # one for all: none is trained
    shown, later, refused, table = {}, [], [], headed()
    for name in options("attack"):
        declared = source(value(CONF / "attack" / f"{name}.yaml", "_target_"))[1]
        if declared.get("trigger_from", "formula") != "formula":
            later.append(name)
            continue
        try:
            plain = OmegaConf.to_container(compose([*words, f"attack={name}"]).attack, resolve=True)
            attack = instantiate(plain, net=net, recipe=how, seed=cfg.seed, **about).to(device)
        except UserError as e:
            refused.append(f"{name}: {e}")
            continue
        if attack.has_trigger:
            x = data.test.x[:1000]
            shown[name] = picture_of(attack, x[:3])
            table.add_row(name, *cells(attack, looks(x, attack.stamp(x))))
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)
    for text in refused:
        console.print(f"not on {cfg.names.dataset}: {text}", soft_wrap=True)
    if later:
        console.print(f"after training: {', '.join(later)} (a run of each leaves trigger.png beside its net)", soft_wrap=True)
    sheet(shown, path := Path(cfg.paths.out).expanduser() / f"triggers_{cfg.names.dataset}.png")
    console.print(f"picture  {path} (three images: clean, triggered, difference ×5)", soft_wrap=True)
    return 0


def headed() -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("attack", "labels", "trigger", "looks"):
        table.add_column(head, no_wrap=True)
    for head in ("L2", "L∞ of 255", "pixels", "PSNR dB", "SSIM"):
        table.add_column(head, justify="right")
    return table


def cells(attack: Attack, of: Looks) -> tuple[str, ...]:
    labels = f"{'clean' if attack.clean_label else 'dirty'} {attack.labels}"
    kind = "sample-specific" if attack.sample_specific else "static"
    l2, linf, changed, psnr, similar = astuple(of)
    return labels, kind, of.words(), f"{l2:.2f}", f"{linf:.0f}", f"{changed:.1%}", f"{psnr:.1f}", f"{similar:.3f}"


def picture_of(attack: Attack, x: Tensor, gain: int = 5) -> Tensor:
    """(3·N,C,H,W) uint8: each image clean, triggered, and the difference times `gain` around grey."""
    stamped = attack.stamp(x)
    difference = (128 + gain * (stamped.float() - x.float())).clamp(0, 255).to(torch.uint8)
    return torch.stack([x, stamped, difference], 1).flatten(0, 1).cpu()


def sheet(shown: dict[str, Tensor], path: Path, gap: int = 4, margin: int = 130) -> None:
    """Write a PNG with a row of images for each name."""
    from PIL import Image, ImageDraw

    _, _, h, w = next(iter(shown.values())).shape
    zoom = max(1, 64 // h)
    high, wide = h * zoom + gap, w * zoom + gap
    page = Image.new("RGB", (margin + 9 * wide, high * len(shown)), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, images) in enumerate(shown.items()):
        pen.text((gap, row * high + high // 2 - 6), name, fill="black")
        for column, image in enumerate(images.expand(-1, 3, -1, -1)):
            small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((w * zoom, h * zoom), Image.Resampling.NEAREST)
            page.paste(small, (margin + column * wide, row * high))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
