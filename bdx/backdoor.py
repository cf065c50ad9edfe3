"""backdoor: an attack gets what its trigger is made of, a poisoned training set, and a trained victim."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from bdx import hardware, recipe, store, surgery
from bdx.archs import base as archs
from bdx.attacks.base import Attack
from bdx.attacks.made import Made
from bdx.build import instantiate
from bdx.configure import choice
from bdx.datasets import base as datasets
from bdx.errors import UserError
from bdx.screen import Screen
from bdx.training import Recipe


def build_attack(cfg: DictConfig, data: datasets.ImageData) -> Attack:
    plain = OmegaConf.to_container(cfg, resolve=True)
    torch.manual_seed(cfg.seed)
    about = {"num_classes": data.num_classes, "shape": data.shape}
    net = archs.build(plain["arch"], **plain["dataset"]["normalize"], **about)
    no_effect(plain)
    how: Recipe = instantiate(plain["train"])
    return instantiate(plain["attack"], net=net, recipe=how, seed=cfg.seed, **about)


def no_effect(plain: dict) -> None:
    """Refuse a rate, or a momentum, that a schedule would put its own in the place of."""
    asked, schedule = plain["asked"], plain["train"]["schedule"] or {}
    if "train.optimizer.lr" in asked and "max_lr" in schedule and "train.schedule.max_lr" not in asked:
        raise UserError(
            f"train.optimizer.lr={plain['train']['optimizer']['lr']}: the schedule of train={plain['names']['train']} sets the "
            "rate by its own max_lr; set train.schedule.max_lr, or train.schedule=null for a constant rate"
        )
    if "train.optimizer.momentum" in asked and "max_lr" in schedule and schedule.get("cycle_momentum", True):
        raise UserError(
            f"train.optimizer.momentum={plain['train']['optimizer']['momentum']}: the schedule of "
            f"train={plain['names']['train']} moves the momentum between 0.95 and 0.85; add "
            "+train.schedule.cycle_momentum=false for a constant one"
        )


def backdoored(
    cfg: DictConfig, attack: Attack, data: datasets.ImageData, stored: store.Store, trainer, screen: Screen
) -> tuple[datasets.ImageData, store.Artifact]:
    """Train `attack`, or load it from the store. Returns the data with the poisoned training set, and the artifact, whose
    seconds count what the attack is made of (but no clean net for it, which is attack=none's) and what killed runs did."""
    if data.train.x.device.type == "cpu" and (slow := hardware.bf16_emulated(cfg.train.precision)):
        screen.say(slow)
    wanting = [(one, part) for one, part in parts(cfg, attack) if isinstance(part, Made) and part.wanting]
    made = {a.id: a.meta["seconds"] for a in (equip(one, part, data, stored, trainer, screen) for one, part in wanting)}
    for part in (part for _, part in parts(cfg, attack) if isinstance(part, Made) and part.made):
        part.take(part.brought(data))
    data = data.poisoned(attack.poison(data.train))
    of = recipe.of_backdoor(cfg, data.sha256)
    backdoor = stored.get_or_make(of, lambda checkpoint: fit(attack, data, trainer, checkpoint, screen))
    recover(attack, data, backdoor)
    return data, replace(backdoor, meta=backdoor.meta | {"seconds": backdoor.meta["seconds"] + sum(made.values())})


def parts(cfg: DictConfig, attack: Attack) -> list[tuple[DictConfig, Attack]]:
    """(configuration, attack) of each of several in one, as if it were alone; else of the one."""
    if "parts" not in cfg.attack:
        return [(cfg, attack)]
    alone = [OmegaConf.merge(cfg, {}) for _ in cfg.attack.parts]
    for one, part in zip(alone, cfg.attack.parts, strict=True):
        one.attack = {k: v for k, v in part.items() if k != "_partial_"}
    return list(zip(alone, attack.parts.values(), strict=True))


def equip(
    cfg: DictConfig, attack: Made, data: datasets.ImageData, stored: store.Store, trainer, screen: Screen
) -> store.Artifact:
    """Give the attack what it is made of: from the store, or made now, with a clean net where it asks for one."""
    clean = copy.deepcopy(cfg)
    with open_dict(clean):
        clean.attack = choice("attack", "none")
    net_recipe = recipe.of_backdoor(clean, data.sha256) if attack.surrogate else None

    def make(_) -> tuple[dict, dict]:
        net = surrogate(clean, net_recipe, data, stored, trainer, screen) if net_recipe else None
        torch.manual_seed(cfg.seed)  # whether the surrogate was trained or loaded must not show
        screen.say(f"making what {type(attack).__name__} is made of")
        started = time.monotonic()
        tensors, facts = attack.to(data.train.x.device).make(data, net, screen.epoch)
        return tensors, facts | {"seconds": time.monotonic() - started}

    asset = stored.get_or_make(recipe.of_asset(cfg, data.sha256, attack.shapeless(), net_recipe), make)
    attack.take(asset.tensors)
    return asset


def surrogate(clean: DictConfig, of: dict, data: datasets.ImageData, stored: store.Store, trainer, screen: Screen) -> nn.Module:
    """The net of `attack=none`, frozen: the very artifact, trained now or found."""
    screen.say("the attack is made with a clean net: that of attack=none")
    none = build_attack(clean, data)
    recover(none, data, stored.get_or_make(of, lambda checkpoint: fit(none, data, trainer, checkpoint, screen)))
    return surgery.freeze(none.net)


def fit(attack: Attack, data: datasets.ImageData, trainer, checkpoint: Path, screen: Screen) -> tuple[dict, dict]:
    """Train the backdoor: (tensors to store, facts about them)."""
    if checkpoint.exists():
        screen.say("going on from where an earlier run was stopped")
    started = time.monotonic() - seconds_spent(checkpoint)
    attack.fit(data, partial(trainer, since=started), checkpoint)
    facts = {"seconds": time.monotonic() - started, "poisoned_images": int(data.train.poisoned.sum())}
    indices = {"split.poisoned": data.train.poisoned, "split.reserved": data.reserved}
    return attack.state_dict() | indices, facts


def seconds_spent(checkpoint: Path) -> float:
    """On what killed runs have left at `checkpoint`, or beside it where a training has stages."""
    left = checkpoint.parent.glob(f"{checkpoint.stem}*{checkpoint.suffix}")
    return max((torch.load(p, mmap=True, map_location="cpu", weights_only=True).get("seconds", 0.0) for p in left), default=0.0)


def recover(attack: Attack, data: datasets.ImageData, backdoor: store.Artifact) -> None:
    """Load the stored backdoor into `attack`; its poisoned images must be the ones that this run would draw."""
    tensors = dict(backdoor.tensors)
    poisoned, _ = tensors.pop("split.poisoned"), tensors.pop("split.reserved")
    if not torch.equal(poisoned, data.train.poisoned.cpu()):
        raise UserError(f"{backdoor.path} was trained on other poisoned images than this run draws; remove it")
    attack.load_state_dict(tensors)
    attack.to(data.test.x.device).eval()
