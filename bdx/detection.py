"""detection: one detector on one backdoor; the backdoor is the one that `run` trains or loads."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bdx import files, imagefile, metrics, recipe, results, store
from bdx.attacks.base import Attack
from bdx.backdoor import backdoored, build_attack
from bdx.build import instantiate
from bdx.datasets import base as datasets
from bdx.detectors.base import Detector, sample
from bdx.errors import UserError
from bdx.run import device_name, peak_memory
from bdx.screen import Screen
from bdx.split import Split
from bdx.training import accelerate, make_trainer, predict


def detect(cfg: DictConfig, screen: Screen | None = None) -> dict:
    """Train the backdoor (or load it), score images, measure. Returns the row, written to paths.detections/<id>.json.

    Raises UserError for whatever cannot be done, before anything is trained.
    """
    screen = screen or Screen(quiet=True)
    plain = OmegaConf.to_container(cfg, resolve=True)
    folder = Path(cfg.paths.detections).expanduser()
    path = datasets.cache_path(plain["dataset"], cfg.paths.data)
    id = recipe.digest(recipe.of_detection(cfg, imagefile.header(path)["sha256"]))
    if row := results.find(folder, id):
        screen.say(results.DONE)
        return row
    device = accelerate(plain["trainer"]["accelerator"])
    data = datasets.load(plain["dataset"], cfg.paths.data, device=device, seed=cfg.seed)
    attack = build_attack(cfg, data)
    detector: Detector = instantiate(plain["detector"])
    check(detector, attack)
    attack.check(data.train)
    files.writable(folder, "paths.detections, paths.out or BDX_OUT")
    trainer = partial(make_trainer, device=device, precision=cfg.train.precision, seed=cfg.seed, report=screen.epoch)
    try:
        stored = store.Store(Path(cfg.paths.store).expanduser())
        data, backdoor = backdoored(cfg, attack, data, stored, trainer, screen)
        judged = judged_by(detector, attack, data)
        what = "the net, by reserved images" if detector.judge == "net" else f"{len(judged)} images ({detector.judge})"
        screen.say(f"{cfg.names.detector} looks at {what}")
        torch.manual_seed(cfg.seed)  # whether the backdoor was trained or loaded must not show in what follows
        detector.report, started = screen.epoch, time.monotonic()
        scores = detector.score(attack.net, blind := judged.blind(), data.allow(detector.needs), trainer)
        flagged = detector.flag(scores, blind.y)
        seconds = time.monotonic() - started
        for note in detector.notes:
            screen.say(note)
        if not torch.isfinite(scores).all():
            raise UserError(f"{cfg.names.detector}: {int((~scores.isfinite()).sum())} of {len(scores)} scores are not finite")
        found = verdict(scores, flagged, detector) if detector.judge == "net" else rates(scores, flagged, judged.poisoned)
        return results.write(folder, row_of(cfg, id, backdoor, data, found, seconds, device))
    finally:
        screen.close()


def check(detector: Detector, attack: Attack) -> None:
    """Refuse what cannot work, naming both sides."""
    if detector.judge != "net" and not attack.trained_here:
        raise UserError(
            f"{type(detector).__name__} is measured on images that are known to carry a trigger, and of a net from elsewhere "
            "nobody knows any; take detector=nc, which judges the net itself"
        )
    if detector.judge == "train" and attack.has_trigger and not attack.leaves_poison:
        what = " or detector.judge=test" if "test" in detector.judges else ", or a detector of test inputs"
        raise UserError(
            f"{type(detector).__name__} looks at the poisoned training set, and {type(attack).__name__} leaves none; take "
            f"an attack that poisons data (`bdx info attacks`){what}"
        )


def judged_by(detector: Detector, attack: Attack, data: datasets.ImageData) -> Split:
    """The poisoned training set; or all clean test images and all triggered ones, labelled by the backdoored net; of a
    detector that judges the net, no image."""
    if detector.judge == "net":
        return data.test[:0]
    if detector.judge == "train":
        return detector.some(data.train, data.seed)
    clean, parts = data.test, [data.test]
    if attack.has_trigger:
        parts.append(attack.triggered(clean))
    both = Split(*(torch.cat([getattr(p, f) for p in parts]) for f in ("x", "y", "y_true", "poisoned")))
    some = sample(both, detector.limit, data.seed)
    return replace(some, y=predict(attack.net, some.x))


def rates(scores: Tensor, flagged: Tensor, poisoned: Tensor) -> dict[str, float | int | None]:
    """auc: how often a poisoned image scores above a clean one · tpr, fpr: shares of the poisoned and of the clean images
    that are flagged · precision: share of the flagged images that are poisoned. None where there is nothing to share."""
    from sklearn.metrics import roc_auc_score

    some, all_ = bool(poisoned.any()), bool(poisoned.all())
    return {
        "auc": float(roc_auc_score(poisoned.cpu(), scores.cpu())) if some and not all_ else None,
        "tpr": metrics.share(flagged[poisoned]) if some else None,
        "fpr": metrics.share(flagged[~poisoned]) if not all_ else None,
        "precision": metrics.share(poisoned[flagged]) if flagged.any() else None,
        "n": len(scores), "n_poisoned": int(poisoned.sum()), "n_flagged": int(flagged.sum()),
    }  # fmt: skip


def verdict(scores: Tensor, flagged: Tensor, detector: Detector) -> dict[str, float | int | str | None]:
    """Of a detector that judges the net: the anomaly index of each class and which of them are flagged, in the order of the
    classes and in words, as rows are flat. Classes are counted, and there is no image to have a rate of."""
    return {
        "auc": None, "tpr": None, "fpr": None, "precision": None,
        "n": len(scores), "n_poisoned": 0, "n_flagged": int(flagged.sum()),
        "anomaly_index": float(scores.max()), "anomaly_threshold": float(detector.threshold),
        "anomaly_indices": " ".join(f"{score:.4f}" for score in scores.tolist()),
        "flagged_classes": " ".join(map(str, flagged.nonzero()[:, 0].tolist())),
    }  # fmt: skip


def row_of(cfg: DictConfig, id: str, backdoor: store.Artifact, data, found: dict, seconds: float, device) -> dict:
    """The flat row: fractions inside; memory in MiB, times in seconds."""
    of, names = store.provenance(), {k: v for k, v in cfg.names.items() if k != "defense"}
    return {
        "id": id, "kind": "detection", **names, **OmegaConf.to_container(cfg.asked), "seed": cfg.seed,
        "judged": cfg.detector.judge, **found, "seconds_attack": backdoor.meta["seconds"], "seconds": seconds,
        "peak_memory": peak_memory(device), "n_reserved": len(data.clean), "precision_trained": cfg.train.precision,
        "device": device_name(device), "torch": of["torch"], "commit": of["commit"], "backdoor": backdoor.id,
        "data_sha256": data.sha256, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
