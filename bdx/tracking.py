"""What a run leaves behind besides its row: curves per epoch, a picture of the trigger, and the same in W&B."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bdx import files
from bdx.attacks.base import Attack
from bdx.errors import UserError, nearest
from bdx.split import Split


class Silent:
    """logger=none: nothing is kept. The interface of every tracker."""

    def start(self, cfg: dict, id: str, folder: Path) -> None:
        """cfg: the resolved configuration; id: of the run; folder: where this run may write."""

    def epoch(self, stage: str, epoch: int, values: dict[str, float]) -> None:
        """Means over one epoch of one stage."""

    def picture(self, path: Path) -> None:
        """A PNG of images, such as clean and triggered ones; its name says what it shows."""

    def finish(self, row: dict) -> None:
        """The result row, last of all."""

    def fail(self) -> None:
        """The run ends without a row."""


class CSV(Silent):
    """logger=csv: curves.csv beside the repaired net. A run that is started again goes on in it: what it measures again,
    the same stage from some epoch on, takes the place of what was there."""

    def start(self, cfg, id, folder):
        self.path, self.stages = folder / "curves.csv", set()
        self.keep(lambda stage, epoch: True)

    def keep(self, wanted: Callable[[str, int], bool]) -> None:
        """Write the file anew with those lines that are `wanted`."""
        text = self.path.read_text() if self.path.exists() else ""
        whole = text.rpartition("\n")[0].splitlines()[1:]  # a killed process may have left half a line
        rows = [row for row in csv.reader(whole) if len(row) == 4 and row[1].isdecimal()]
        with files.whole(self.path) as tmp, open(tmp, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(("stage", "epoch", "name", "value"))
            writer.writerows(row for row in rows if wanted(row[0], int(row[1])))

    def epoch(self, stage, epoch, values):
        if stage not in self.stages:
            self.stages.add(stage)
            self.keep(lambda s, e: s != stage or e < epoch)
        with open(self.path, "a", newline="") as f:
            csv.writer(f).writerows((stage, epoch, k, repr(v)) for k, v in values.items())


class WandB(Silent):
    """logger=wandb. mode: auto (online with a key, else offline; WANDB_MODE is heard), online or offline; an online run
    that cannot start goes on offline, with one line. The run's id is W&B's id, so starting a run again goes on in the
    same place. Summary: the row, without what is null.

    project, entity, group (null: attack), tags: W&B's own. timeout: seconds to wait for the server, at either end.
    """

    def __init__(self, *, project: str, entity: str | None, group: str | None, tags: list, mode: str, timeout: float):
        if mode not in (modes := ("auto", "online", "offline")):
            raise UserError(f"logger.mode={mode}: expected {', '.join(modes)}{nearest(mode, modes)}")
        self.project, self.entity, self.group, self.tags = project, entity, group, list(tags)
        self.mode, self.timeout, self.run = mode, timeout, None

    def start(self, cfg, id, folder):
        names = cfg["names"]
        self.open(
            id, folder, config=cfg, name=f"{names['attack']}-{names['defense']}-{cfg['seed']}", job_type=names["defense"],
            group=self.group or names["attack"], tags=[names["dataset"], names["arch"], *self.tags],
        )  # fmt: skip
        self.run.define_metric("epoch", hidden=True, summary="none")
        self.run.define_metric("*", step_metric="epoch", summary="none")

    def open(self, id: str, folder: Path, **of) -> None:
        """Start W&B's run `id`, whose name, group, job type, tags and configuration are in `of`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else lines and 20 s at exit where no server answers
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        lean = {"silent": True, "console": "off", "x_disable_stats": True, "disable_git": True, "save_code": False}
        wait = {"init_timeout": self.timeout, "finish_timeout": self.timeout, "finish_timeout_raises": True}
        about = {
            "project": self.project, "entity": self.entity, "id": id, "resume": "allow", "dir": str(folder),
            "settings": wandb.Settings(**lean, **wait), **of,
        }  # fmt: skip
        try:
            self.run = wandb.init(mode=self.settled(wandb), **about)
        except wandb.errors.UsageError as e:
            raise UserError(f"logger=wandb: {e}") from None
        except (wandb.Error, TimeoutError) as e:
            wandb.teardown()  # the service that failed still holds the id
            self.run = wandb.init(mode="offline", **about)
            self.say(f"not online ({' '.join(str(e).split())}); going on offline")

    def table(
        self, name: str, id: str, folder: Path, about: dict, frames: dict, pages: dict, pictures: dict[str, Path]
    ) -> None:
        """A paper's table as a run of its own, in the group of its cells. about: its summary and configuration;
        frames: name -> (head, rows), kept as NAME.csv among the run's files; pages: key -> HTML; pictures: caption -> PNG."""
        self.open(id, folder, config=about, name=name, job_type="table", group=self.group or name, tags=["table", *self.tags])
        import wandb

        try:
            for stem, (head, rows) in frames.items():  # W&B's own tables are artifacts, which nothing else here needs
                with open(path := Path(self.run.dir) / f"{stem}.csv", "w", newline="") as f:
                    csv.writer(f).writerows([head, *rows])
                self.run.save(str(path), base_path=self.run.dir, policy="now")
            self.run.log({key: wandb.Html(page, inject=False) for key, page in pages.items()})
            if pictures:
                self.run.log({"pictures": [wandb.Image(str(path), caption=text) for text, path in pictures.items()]})
            self.finish(about)
        except BaseException:
            self.fail()
            raise

    def settled(self, wandb) -> str:
        """The mode to start in. Asks neither the user for a key nor the server whether it is good."""
        given = {} if self.mode == "auto" else {"mode": self.mode}
        mode = wandb.setup(wandb.Settings(silent=True, **given)).settings.mode
        if mode != "online" or wandb.login(prompt=False, verify=False):
            return mode
        if self.mode == "auto":
            return "offline"
        raise wandb.Error("no API key; `wandb login` stores one")

    def epoch(self, stage, epoch, values):
        self.run.log({f"{stage}/{k}": v for k, v in values.items()} | {"epoch": epoch})

    def picture(self, path):
        import wandb

        self.run.log({path.stem: wandb.Image(str(path))})

    def finish(self, row):
        self.run.summary.update({k: v for k, v in row.items() if not isinstance(v, dict)})
        self.close(exit_code=0)

    def fail(self):
        self.close(exit_code=1)

    def close(self, exit_code: int) -> None:
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            self.say(f"the server did not take everything within {self.timeout:g} s")

    def say(self, what: str) -> None:
        send = f"wandb sync --include-online {Path(self.run.dir).parent}"
        print(f"wandb: {what}; `{send}` sends the run", file=sys.stderr, flush=True)


def draw_trigger(attack: Attack, test: Split, path: Path, count: int = 8, gain: int = 5) -> None:
    """Write a PNG: `count` test images clean (top), triggered (middle) and their difference times `gain` around grey."""
    some = test[attack.relabel(test.y_true) != test.y_true][:count]
    stamped = attack.stamp(some.x)
    clean, dirty = some.x.float(), stamped.float()
    difference = (128 + gain * (dirty - clean)).clamp(0, 255)
    draw_rows([clean, dirty, difference], path)


def draw_rows(rows: list[Tensor], path: Path) -> None:
    """Write a PNG with each of `rows` (N,C,H,W), float of grey levels, as a row of images; small ones are enlarged."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(torch.cat(rows).cpu(), nrow=len(rows[0]), padding=2, pad_value=255)
    zoom = max(1, 96 // rows[0].shape[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(grid.byte().permute(1, 2, 0).numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
