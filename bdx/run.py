"""run: one cell of a table. Read this first."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bdx import files, imagefile, metrics, recipe, results, store
from bdx.archs import base as archs
from bdx.attacks.base import Attack
from bdx.backdoor import backdoored, build_attack
from bdx.build import instantiate
from bdx.datasets import base as datasets
from bdx.defenses.base import Defense
from bdx.errors import UserError
from bdx.evaluate import Seen, flagged, look, score, scrambled_asr
from bdx.oracle import Oracle
from bdx.screen import Screen
from bdx.split import Split
from bdx.tracking import draw_rows, draw_trigger
from bdx.training import accelerate, make_trainer, predict, try_out

LOOKED: dict[tuple, tuple[Seen, float | None]] = {}  # of `looked`, at most one


def run(cfg: DictConfig, screen: Screen | None = None) -> dict:
    """Train the backdoor (or load it), repair it, measure. Returns the result row, written to paths.results/<id>.json.

    Raises UserError for whatever cannot be done, before anything is trained.
    """
    screen = screen or Screen(quiet=True)
    plain = OmegaConf.to_container(cfg, resolve=True)
    paths = {k: Path(v).expanduser() for k, v in plain["paths"].items()}
    sha256 = imagefile.header(datasets.cache_path(plain["dataset"], paths["data"]))["sha256"]
    if "detector" in cfg:
        raise UserError("detector=…: a repair takes none; `bdx detect detector=… attack=…` looks for poisoned images")
    id = recipe.digest(recipe.of_run(cfg, sha256))
    if row := results.find(paths["results"], id):
        screen.say(results.DONE)
        return row
    with alone(id, paths, screen):
        return results.find(paths["results"], id) or made(cfg, plain, id, paths, screen)


@contextmanager
def alone(id: str, paths: dict[str, Path], screen: Screen) -> Iterator[None]:
    """Of two processes that are asked for one run, by hand or by sweeps, one runs it and the other finds its row."""
    files.writable(place := paths["out"] / "locks", "paths.out or BDX_OUT")
    lock = FileLock(place / f"{id}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        screen.say("another process is at this run; waiting for its row")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def made(cfg: DictConfig, plain: dict, id: str, paths: dict[str, Path], screen: Screen) -> dict:
    """The row of a run that has none yet."""
    device = accelerate(plain["trainer"]["accelerator"])
    data = datasets.load(plain["dataset"], paths["data"], device=device, seed=cfg.seed)
    attack = build_attack(cfg, data)
    attack.check(data.train)
    check(build_defense(cfg, attack), attack, data.augment.cutmix)
    for place in ("nets", "results"):  # the store is written to before a training starts, these after it
        files.writable(paths[place], f"paths.{place}, paths.out or BDX_OUT")
    tracker = instantiate(plain["logger"], allowed=("bdx.tracking.",))
    tracker.start(plain, id, folder := paths["nets"] / f"{id}.log")
    trainer = partial(make_trainer, device=device, precision=cfg.train.precision, seed=cfg.seed)
    report = partial(heard, screen, tracker)
    try:
        data, backdoor = backdoored(cfg, attack, data, store.Store(paths["store"]), partial(trainer, report=report), screen)
        before, scrambled_before = looked(backdoor, attack, data.test)
        torch.manual_seed(cfg.seed)  # whether the backdoor was trained or loaded must not show in what follows
        defense = build_defense(cfg, attack).to(device)
        oracle = Oracle(attack, data.test) if cfg.eval.oracle else None
        started = time.monotonic()
        net = defense.run(data.allow(defense.needs), partial(trainer, report=partial(report, watched=(oracle, defense))))
        seconds = time.monotonic() - started - (oracle.seconds if oracle else 0)
        facts = {"classes": list(data.classes), "run": id, "backdoor": backdoor.id, "reserved": data.reserved.tolist()}
        archs.save(net, paths["nets"] / id, **facts)
        for note in defense.notes:
            screen.say(note)
        keep(defense, tracker, folder)
        net = archs.load(paths["nets"] / id)  # what lies on disk is what the row describes
        after = look(net, attack, data.test)
        if attack.has_trigger:
            draw_trigger(attack, data.test, folder / "trigger.png")
            tracker.picture(folder / "trigger.png")
        row = row_of(cfg, id, backdoor, data, before, after, seconds, device) | defense.facts
        doubt(row, screen)
        row |= control(scrambled_before, scrambled_asr(net, attack, data.test), row["asr"], screen)
        results.write(paths["results"], row := row | reserved_acc(attack, net, defense, data.clean, screen))
        if oracle:
            oracle.thresholds(defense)
            screen.say(f"ORACLE   {oracle.write(folder) or 'no curve: this defense chooses neither threshold nor epoch'}")
        tracker.finish(row)  # the file is the truth, W&B its mirror
        return row
    except BaseException:
        tracker.fail()
        raise
    finally:
        screen.close()


def build_defense(cfg: DictConfig, attack: Attack) -> Defense:
    defense = instantiate(cfg.defense, net=copy.deepcopy(attack.net))
    defense.face(attack)
    return defense


def check(defense: Defense, attack: Attack, cutmix: float = 0.0) -> None:
    """Refuse what cannot work, naming both sides. cutmix: of the data set's augmentation."""
    if "train" in defense.needs and not attack.trained_here:
        raise UserError(
            f"{type(defense).__name__} works on the set that the net was trained on, and {type(attack).__name__} has none; "
            "take a defense that needs clean images alone (`bdx info defenses`)"
        )
    if "train" in defense.needs and attack.has_trigger and not attack.leaves_poison:  # attack=none leaves clean images
        raise UserError(
            f"{type(defense).__name__} works on the poisoned training set, and {type(attack).__name__} leaves none; take "
            "an attack that poisons data (`bdx info attacks`) or a defense that needs clean images alone"
        )
    if attack.recipe.budget and not (attack.hardens or type(attack).training_step is Attack.training_step):
        raise UserError(
            f"train.adversarial.steps={attack.recipe.budget.steps}: {type(attack).__name__} trains the victim in a way of its "
            "own, which adversarial training does not reach; set it to 0 or take an attack that poisons data"
        )
    if attack.recipe.precision == "16-mixed" and not defense.takes_scaled:
        raise UserError(
            f"{type(defense).__name__} takes two gradients a step, which train.precision=16-mixed scales apart; take bf16-mixed"
        )
    if cutmix and not defense.takes_mixed and getattr(defense, "augment", True):
        raise UserError(
            f"dataset.augment.cutmix={cutmix}: {type(defense).__name__} needs one label for each image; set it to 0 or "
            "defense.augment=false, and train.augment.cutmix for the victim alone"
        )
    if hasattr(defense, "optimizer") and hasattr(defense, "schedule"):
        try_out("defense", defense)


def heard(screen, tracker, stage: str, epoch: int, epochs: int, means: dict, seconds: float, watched=(None, None)) -> None:
    screen.epoch(stage, epoch, epochs, means, seconds)
    tracker.epoch(stage, epoch, means)
    oracle, defense = watched
    if oracle:
        oracle.epoch(defense, stage, epoch, epochs)


def keep(defense: Defense, tracker, folder: Path) -> None:
    """What the defense leaves besides the net: pictures, and modules from which figures are drawn later."""
    for name, rows in defense.pictures.items():
        draw_rows([row * 255 for row in rows], path := folder / f"{name}.png")
        tracker.picture(path)
    for name, module in defense.extras.items():
        store.save_folder(folder / name, module.state_dict(), module.spec, weights="weights.safetensors", sheet="spec.json")


def looked(backdoor: store.Artifact, attack: Attack, test: Split) -> tuple[Seen, float | None]:
    """What the attacked net makes of the test split, and its scrambled ASR. A sweep repairs one net many times in a row: the
    last one is not asked again."""
    key = backdoor.id, backdoor.meta["sha256"], str(test.x.device), torch.get_num_threads()
    if key not in LOOKED:
        LOOKED.clear()
        LOOKED[key] = look(attack.net, attack, test), scrambled_asr(attack.net, attack, test)
    return LOOKED[key]


def doubt(row: dict, screen: Screen) -> None:
    """Say where DER, which knows no gain, says nothing of the repair."""
    if (before := row["asr_before"]) is None:
        return
    if before < 0.5:
        screen.say(f"the attack did not take, or hardly: its ASR before any repair is {before:.1%}; DER says little of it")
    if row["asr"] > before + 0.05:
        screen.say(f"the ASR rose in the repair, from {before:.1%} to {row['asr']:.1%}, which DER does not count")


def control(before: float | None, now: float | None, asr: float | None, screen: Screen) -> dict:
    """scrambled_asr(_before), where one trigger is known; said where it is the larger part of what the repair has left."""
    if now is None:
        return {}
    if asr > 0.1 and now > asr / 2:
        screen.say(
            f"of the ASR after the repair, {asr:.1%}, {now:.1%} is left where the trigger's pixels are scrambled: much of it "
            "needs no pattern, grain of that size is enough"
        )
    return {"scrambled_asr_before": before, "scrambled_asr": now}


def reserved_acc(attack: Attack, repaired: nn.Module, defense: Defense, clean: Split, screen: Screen) -> dict:
    """ACC on the reserved images, which a defender can see without any test image. A great fall is said, unless the defense
    has trained anew, which costs the accuracy on images that the victim had learned by heart; and so is a net from
    elsewhere that knows next to nothing of them."""
    nets = {"acc_reserved_before": attack.net, "acc_reserved": repaired}
    found = {name: metrics.acc(predict(net.to(clean.x.device), clean.x), clean.y) for name, net in nets.items()}
    was, now = found.values()
    if not attack.trained_here and was < 2 / attack.num_classes:
        screen.say(
            f"the net as it came is right on {was:.1%} of the reserved images, little more than chance: see dataset.normalize, "
            "dataset.source.size, and whether its classes are the folders in the order of their names"
        )
    if "train" not in defense.needs and was - now > 0.1:
        hint = "; try a smaller learning rate, defense.optimizer.lr" if hasattr(defense, "optimizer") else ""
        screen.say(f"the accuracy on the reserved images fell from {was:.1%} to {now:.1%}: the repair has hurt the net{hint}")
    return found


def row_of(cfg, id, backdoor, data, before: Seen, after: Seen, seconds: float, device: torch.device) -> dict:
    """The flat result row. Scores are fractions, memory is in MiB, times in seconds."""
    of = store.provenance()
    scores = {f"{k}_before": v for k, v in score(before).items()} | score(after)
    known = None not in scores.values()
    return {
        "id": id, **cfg.names, **OmegaConf.to_container(cfg.asked), "seed": cfg.seed, **scores,
        "der": metrics.der(*(scores[k] for k in ("acc_before", "asr_before", "acc", "asr"))) if known else None,
        **flagged(before, after),
        "seconds_attack": backdoor.meta["seconds"], "seconds_defense": seconds, "peak_memory": peak_memory(device),
        "n_test": len(data.test), "n_reserved": len(data.clean), "n_poisoned": backdoor.meta["poisoned_images"],
        "precision": cfg.train.precision, "device": device_name(device), "torch": of["torch"], "commit": of["commit"],
        "lightning": of["pytorch-lightning"], "backdoor": backdoor.id, "backdoor_sha256": backdoor.meta["sha256"],
        "data_sha256": data.sha256, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
