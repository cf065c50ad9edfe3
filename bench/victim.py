"""The backdoored net that every defense repairs, and the images: CIFAR-10's where its cache is at hand, else synthetic."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from common import Place
from omegaconf import OmegaConf

from bdx import recipe
from bdx.attacks.base import Attack
from bdx.backdoor import backdoored, build_attack
from bdx.configure import compose
from bdx.datasets import base as datasets
from bdx.hardware import bf16_emulated
from bdx.screen import Screen
from bdx.split import Split
from bdx.store import Store
from bdx.training import accelerate, make_trainer

IMAGES = 2500  # 5 % of CIFAR-10, what NPD's Table 9 was timed with


@dataclass(frozen=True)
class Victim:
    """attack: with its net · data: as many images to train on as to trust · about: where both are from, in words."""

    attack: Attack
    data: datasets.ImageData
    about: str


def victim(place: Place) -> Victim:
    words = asked(place)
    cache = Path(compose(words).paths.data).expanduser() / "cifar10.safetensors"
    if place.quick:
        return synthetic(place, "--quick trains none")
    return real(place, words) if cache.exists() else synthetic(place, f"{cache} is not there")


def asked(place: Place) -> list[str]:
    """The run whose backdoor it is."""
    if place.gpu:
        return ["attack=badnets", "train=fast"]
    precision = "32-true" if bf16_emulated("bf16-mixed") else "bf16-mixed"  # minutes instead of hours
    return ["experiment=cpu_scale", "attack=badnets", f"train.precision={precision}"]


def real(place: Place, words: list[str]) -> Victim:
    """The run's backdoor, from its store or trained into it. Of the poisoned training set a defense gets as many images as
    are reserved."""
    cfg, screen, device = compose(words), Screen(), accelerate("gpu" if place.gpu else "cpu")
    dataset, store = OmegaConf.to_container(cfg.dataset, resolve=True), Store(Path(cfg.paths.store).expanduser())
    data = datasets.load(dataset, cfg.paths.data, device=device, seed=cfg.seed)
    attack, id = build_attack(cfg, data), recipe.digest(recipe.of_backdoor(cfg, data.sha256))
    known = store.find(id) is not None
    if not known:
        screen.say(f"{store.root} has no backdoor of {' '.join(words)} yet: training it, once ({cfg.train.epochs} epochs)")
    how = {"device": device, "precision": cfg.train.precision, "seed": cfg.seed, "report": screen.epoch}
    data, _ = backdoored(cfg, attack, data, store, partial(make_trainer, **how), screen)
    screen.close()
    about = f"bdx {' '.join(words)}: backdoor {id}, {'from the store' if known else 'trained now'}"
    return Victim(attack, replace(data, train=first(data.train), test=first(data.test), reserved=data.reserved[:0]), about)


def first(split: Split) -> Split:
    """A copy of the first images: the others' memory would be counted as the defenses'."""
    return split[torch.arange(min(IMAGES, len(split)))]


def synthetic(place: Place, why: str) -> Victim:
    data = place.images(place.pick(64, IMAGES, IMAGES))
    attack = place.attack(data, "attack=badnets", f"arch.width={64 if place.gpu else 16}", "train.epochs=1")
    data = data.poisoned(attack.poison(data.train))
    if not place.quick:
        attack.fit(data, place.trainer)
    return Victim(attack.eval(), data, f"noise of CIFAR's shape and no real backdoor: {why}")
