"""What a run leaves behind besides its row: curves per epoch, a picture of the trigger, and the same in W&B."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from bdx.attacks.base import Attack
from bdx.split import Split


class Silent:
    """logger=none: nothing is kept. The interface of every tracker."""

    def start(self, cfg: dict, id: str, folder: Path) -> None:
        """cfg: the resolved configuration; id: of the run; folder: where this run may write."""

    def epoch(self, stage: str, epoch: int, values: dict[str, float]) -> None:
        """Means over one epoch of one stage."""

    def picture(self, path: Path) -> None:
        """A PNG of clean and triggered images."""

    def finish(self, row: dict) -> None:
        """The result row, last of all."""

    def fail(self) -> None:
        """The run ends without a row."""


class CSV(Silent):
    """logger=csv: curves.csv beside the repaired net."""

    def start(self, cfg, id, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "curves.csv"
        with open(self.path, "w", newline="") as f:
            csv.writer(f).writerow(("stage", "epoch", "name", "value"))

    def epoch(self, stage, epoch, values):
        with open(self.path, "a", newline="") as f:
            csv.writer(f).writerows((stage, epoch, k, repr(v)) for k, v in values.items())


class WandB(Silent):
    """logger=wandb. mode: auto (online with a key, else offline), online or offline; an online run that cannot start goes
    on offline, with one line. The run's id is W&B's id, so starting a run again goes on in the same place.

    project, entity, group (null: attack), tags: W&B's own. timeout: seconds to wait for the server.
    """

    def __init__(self, *, project: str, entity: str | None, group: str | None, tags: list, mode: str, timeout: float):
        self.project, self.entity, self.group, self.tags = project, entity, group, list(tags)
        self.mode, self.timeout, self.run = mode, timeout, None

    def start(self, cfg, id, folder):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        names = cfg["names"]
        lean = {"silent": True, "console": "off", "x_disable_stats": True, "disable_git": True, "save_code": False}
        about = {
            "project": self.project, "entity": self.entity, "id": id, "resume": "allow", "dir": str(folder),
            "name": f"{names['attack']}-{names['defense']}-{cfg['seed']}", "group": self.group or names["attack"],
            "job_type": names["defense"], "tags": [names["dataset"], names["arch"], *self.tags], "config": cfg,
        }  # fmt: skip
        mode = self.wanted_mode(wandb)
        if mode == "online":
            try:
                self.run = wandb.init(mode=mode, settings=wandb.Settings(**lean, init_timeout=self.timeout), **about)
                return
            except (wandb.errors.UsageError, wandb.errors.CommError, OSError, TimeoutError) as e:
                print(f"wandb: not online ({str(e).splitlines()[0]}); going on offline", file=sys.stderr, flush=True)
                wandb.teardown()
        self.run = wandb.init(mode="offline", settings=wandb.Settings(**lean), **about)

    def wanted_mode(self, wandb) -> str:
        if self.mode != "auto":
            return self.mode
        asked = os.environ.get("WANDB_MODE")
        return asked or ("online" if wandb.Api.default_api_key() else "offline")

    def epoch(self, stage, epoch, values):
        self.run.log({f"{stage}/{k}": v for k, v in values.items()} | {f"{stage}/epoch": epoch})

    def picture(self, path):
        import wandb

        self.run.log({"trigger": wandb.Image(str(path))})

    def finish(self, row):
        self.run.summary.update({k: v for k, v in row.items() if not isinstance(v, dict)})
        self.run.finish()

    def fail(self):
        self.run.finish(exit_code=1)


def draw_trigger(attack: Attack, test: Split, path: Path, count: int = 8, gain: int = 5) -> None:
    """Write a PNG: `count` test images clean (top), triggered (middle) and their difference times `gain` around grey."""
    from PIL import Image
    from torchvision.utils import make_grid

    some = test[attack.relabel(test.y_true) != test.y_true][:count]
    stamped = attack.stamp(some.x)
    clean, dirty = some.x.float(), stamped.float()
    difference = (128 + gain * (dirty - clean)).clamp(0, 255)
    grid = make_grid(torch.cat([clean, dirty, difference]).cpu(), nrow=len(some), padding=2, pad_value=255)
    save_png(Image, grid, path, zoom=max(1, 96 // some.x.shape[-1]))


def save_png(Image, grid: Tensor, path: Path, zoom: int) -> None:
    """grid: (3, H, W) float of grey levels; each pixel becomes zoom × zoom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(grid.byte().permute(1, 2, 0).numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
