"""`bdx info triggers`: what each attack's trigger does to real images, in numbers and in one picture."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bdx import grid, results
from bdx.archs import base as archs
from bdx.attacks.base import Attack
from bdx.build import instantiate
from bdx.configure import compose, options
from bdx.datasets import base as datasets
from bdx.errors import UserError
from bdx.overview import undefended
from bdx.recipe import canonical, differing
from bdx.screen import Screen
from bdx.store import Store
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
    """Print the table, write it as CSV, and the picture; digits unless the words say otherwise."""
    words = argv if any(w.startswith(("dataset=", "experiment=")) for w in argv) else ["dataset=digits", *argv]
    if chosen := [w for w in words if w.startswith("attack")]:
        raise UserError(f"{chosen[0]}: `bdx info triggers` shows every attack, as its YAML file or the store has it")
    cfg = compose(words)
    device = accelerate(cfg.trainer.accelerator)
    plain = OmegaConf.to_container(cfg, resolve=True)
    data = datasets.load(plain["dataset"], Path(cfg.paths.data).expanduser(), device=device, seed=cfg.seed)
    about, how = {"num_classes": data.num_classes, "shape": data.shape}, instantiate(plain["train"])
    net = archs.build(plain["arch"], **plain["dataset"]["normalize"], **about)  # one for all: none is trained
    yamls = {n: OmegaConf.to_container(compose([*words, f"attack={n}"]).attack, resolve=True) for n in options("attack")}
    store = Store(Path(cfg.paths.store).expanduser())
    scores = measured(Path(cfg.paths.results).expanduser())
    kept = stored(store, cfg, data.sha256, yamls, scores)
    lines, shown, later, refused = [], {}, [], []
    screen, began = Screen(), time.monotonic()
    for i, (name, yaml) in enumerate(yamls.items(), 1):
        screen.epoch("attacks", i, len(yamls), {}, (time.monotonic() - began) / i)
        found = kept.get(name)
        try:
            made = yaml | (found.recipe["attack"] if found else {})
            attack = instantiate(made, net=net, recipe=how, seed=cfg.seed, **about).to(device).eval()
        except UserError as e:
            refused.append(f"{name}: {e}")
            continue
        if attack.trigger_from != "formula" and not (found and restore(attack, store, found.id)):
            later.append(name)
        elif attack.has_trigger:
            x = data.test.x[:1000]
            shown[name] = picture_of(attack, x[:3])
            lines.append(line(name, attack, looks(x, attack.stamp(x)), found, scores.get(found and found.id, {})))
    screen.close()
    of = Path(cfg.paths.out).expanduser() / f"triggers_{cfg.names.dataset}"
    show(lines, refused, later, cfg.names.dataset)
    sheet(shown, of.with_suffix(".png"))
    write(lines, of.with_suffix(".csv"))
    print(f"picture  {of}.png (three images: clean, triggered, difference ×5)\ntable    {of}.csv")
    return 0


@dataclass(frozen=True)
class Kept:
    """A backdoor of the store. changed: keys in which its attack differs from the YAML file."""

    id: str
    recipe: dict
    changed: tuple[str, ...]
    written: float


def stored(store: Store, cfg: DictConfig, sha256: str, yamls: dict[str, dict], scores: dict) -> dict[str, Kept]:
    """The backdoor of each attack with this data set, net, training and seed: that with the fewest changed keys, then one
    that was measured, then the newest. A stored recipe does not name its attack: the nearest YAML file of its class with the
    same keys does."""
    arch, train = (OmegaConf.to_container(cfg[k], resolve=True) for k in ("arch", "train"))
    found: dict[str, list[Kept]] = {}
    for path in store.root.glob("*/meta.json"):
        try:
            of = json.loads(path.read_text())["recipe"]
        except (OSError, ValueError, KeyError):
            continue
        if "attack" not in of or of["dataset"]["sha256"] != sha256 or of["seed"] != cfg.seed:
            continue
        if canonical(arch) != of["arch"] or differing(train, of["train"]):
            continue
        same = {n: y for n, y in yamls.items() if y["_target_"] == of["attack"]["_target_"] and y.keys() == of["attack"].keys()}
        if alike := {n: differing(y, of["attack"]) for n, y in same.items()}:
            name = min(alike, key=lambda n: len(alike[n]))
            found.setdefault(name, []).append(Kept(path.parent.name, of, alike[name], path.stat().st_mtime))
    return {name: min(those, key=lambda k: (len(k.changed), k.id not in scores, -k.written)) for name, those in found.items()}


def restore(attack: Attack, store: Store, id: str) -> bool:
    """Give the attack the stored trigger; False where the artifact is damaged or of an older make."""
    artifact = store.find(id)
    tensors = {k: v for k, v in (artifact.tensors if artifact else {}).items() if not k.startswith("split.")}
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in attack.state_dict().items()}:
        return False
    attack.load_state_dict(tensors)
    return True


def measured(folder: Path) -> dict[str, dict]:
    """Backdoor -> the newest row in which it was measured before a repair; of `folder`, or of those that travel along."""
    rows = results.rows(folder, grid.EXPERIMENTS / "results")
    return {row["backdoor"]: row for row in sorted(rows, key=lambda r: r["finished"]) if "backdoor" in row}


def line(name: str, attack: Attack, of: Looks, found: Kept | None, row: dict) -> dict[str, str]:
    """One line of the table: head -> text. Scores stand there where a row was measured, in percent."""
    percent = lambda key: f"{100 * row[key]:.2f}" if row.get(key) is not None else ""
    l2, linf, changed, psnr, similar = astuple(of)
    return {
        "attack": name,
        "labels": f"{'clean' if attack.clean_label else 'dirty'} {attack.labels}",
        "controls": "data" if attack.leaves_poison else "training",
        "trigger": "sample-specific" if attack.sample_specific else "static",
        "looks": of.words(),
        "L2": f"{l2:.2f}",
        "L∞ of 255": f"{linf:.0f}",
        "pixels": f"{changed:.1%}",
        "PSNR dB": f"{psnr:.1f}",
        "SSIM": f"{similar:.3f}",
        "ACC": percent("acc_before"),
        "ASR": percent("asr_before"),
        "seconds": f"{row['seconds_attack']:.0f}" if row else "",
        "in print: ACC / ASR": undefended(name),
        "changed keys": " ".join(found.changed) if found else "",
        "backdoor": found.id if found else "",
    }


def show(lines: list[dict], refused: list[str], later: list[str], dataset: str) -> None:
    """What is in no line takes no column; the papers' numbers stand beside ours alone."""
    console, table = Console(highlight=False), Table(box=None, pad_edge=False)
    heads = [h for h in lines[0] if h != "backdoor" and any(of[h] for of in lines)]
    if "ACC" not in heads:
        heads = [h for h in heads if h != "in print: ACC / ASR"]
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=True, justify="left" if i < 5 or head == "changed keys" else "right")
    for of in lines:
        table.add_row(*(of[h] for h in heads))
    console.width = 1000  # as wide as it needs: half a number is none
    console.width = console.measure(table).maximum
    console.print(table)
    for text in refused:
        console.print(f"not on {dataset}: {text}", soft_wrap=True)
    if later:
        console.print(
            f"after training: {', '.join(later)} (none with this data set, net and recipe is in the store; a run of each "
            "leaves one, and trigger.png beside its net)", soft_wrap=True
        )  # fmt: skip


def write(lines: list[dict], path: Path) -> None:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, lines[0])
        table.writeheader()
        table.writerows(lines)


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
