"""The loops over data: Recipe (how a net is trained), make_trainer (Lightning, kept thin), predict."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from bdx.adversarial import Budget
from bdx.augment import augmentation
from bdx.errors import UserError
from bdx.split import pieces, pixels
from bdx.surgery import mode

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its adverts and hardware lines at every fit
warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """conf/train: everything that shapes the victim's weights but the data and the net.

    optimizer(params) and schedule(optimizer[, total_steps]) are partials; `every` is what the schedule counts.
    sam_rho: 0, or the radius of sharpness-aware minimisation, adaptive or plain (D3 Table 5's attacker).
    adversarial: steps (0: off), norm, radius, step, along: the PGD of adversarial training (NPD Table 7's attacker).
    """

    epochs: int
    batch: int
    drop_last: bool
    augment: dict
    label_smoothing: float
    optimizer: Callable
    schedule: Callable | None
    every: str
    precision: str
    compile: bool
    sam_rho: float
    sam_adaptive: bool
    adversarial: dict

    def __post_init__(self):
        at_least_one("train", epochs=self.epochs, batch=self.batch)
        if self.precision not in PRECISIONS:
            raise UserError(f"train.precision={self.precision}: expected {' or '.join(PRECISIONS)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"train.label_smoothing={self.label_smoothing}: expected 0 up to, but not, 1")
        if self.sam_rho < 0 or (self.sam_rho and self.precision == "16-mixed"):
            raise UserError(f"train.sam_rho={self.sam_rho}: expected 0 or more, and bf16-mixed or 32-true above 0")
        if (steps := self.adversarial["steps"]) and self.precision == "16-mixed":
            raise UserError(f"train.adversarial.steps={steps}: expected bf16-mixed or 32-true above 0")
        try:
            self.budget  # noqa: B018
        except UserError as e:
            raise UserError(f"train.adversarial: {e}") from None
        augmentation("train.augment", self.augment)
        try_out("train", self)

    def check_steps(self, images: int) -> None:
        """Raise UserError where the schedule cannot go over as few steps as a training on so many images has."""
        if self.schedule is None or self.every != "step":
            return
        steps = self.epochs * (max(1, images // self.batch) if self.drop_last else -(-images // self.batch))
        try:
            with blamed(f"train.schedule over {steps} steps (epochs={self.epochs}, batch={self.batch}, {images} images)"):
                optimizers([nn.Parameter(torch.zeros(1))], self.optimizer, self.schedule, "step", steps)
        except UserError as e:
            raise UserError(f"{e}; take more epochs, a smaller batch or train.schedule=null") from None

    @property
    def budget(self) -> Budget | None:
        """Of adversarial training, or None without it."""
        return Budget(**self.adversarial, stop=None) if self.adversarial["steps"] else None


def at_least_one(group: str, **values: int) -> None:
    for key, value in values.items():
        if value < 1:
            raise UserError(f"{group}.{key}={value}: expected at least 1")


def optimizers(params, optimizer: Callable, schedule: Callable | None, every: str = "epoch", total_steps: int = 0):
    """What configure_optimizers returns. every="epoch": stepped per epoch; "step": per step, and told the total."""
    opt = optimizer(params)
    if schedule is None:
        return opt
    if every not in ("epoch", "step"):
        raise UserError(f"every={every}: a schedule is stepped every epoch or every step")
    plan = schedule(opt, total_steps=total_steps) if every == "step" else schedule(opt)
    return {"optimizer": opt, "lr_scheduler": {"scheduler": plan, "interval": every}}


@contextmanager
def blamed(key: str) -> Iterator[None]:
    """torch's refusal becomes the user's mistake at `key`."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as e:
        raise UserError(f"{key} cannot be used: {(str(e) or type(e).__name__).splitlines()[0]}") from None


def try_out(group: str, how) -> None:
    """Build the optimizer and the schedule of `how` (a Recipe, or a defense that has both) and step them through, on a
    parameter of no net: what torch refuses is refused now, and so is a rate that falls below 0."""
    every = getattr(how, "every", "epoch")
    steps = 1000 if every == "step" else min(getattr(how, "epochs", 1), 1000)  # how many there will be depends on the data
    with blamed(f"{group}.optimizer"):
        opt = how.optimizer([nn.Parameter(torch.zeros(1))])
        check_rate(opt)
    if how.schedule is None:
        return
    with blamed(f"{group}.schedule"):
        plan = optimizers(None, lambda _: opt, how.schedule, every, total_steps=steps + 1)["lr_scheduler"]["scheduler"]
        for _ in range(steps):
            check_rate(opt)
            opt.step(lambda: torch.zeros(()))
            plan.step()


def check_rate(opt: torch.optim.Optimizer) -> None:
    for group in opt.param_groups:
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"the learning rate is {float(group['lr']):g} at some time, expected 0 or more")


class Watch(pl.Callback):
    """Around the epochs of one stage: seeds them, means the losses, stops on NaN, reports, keeps a checkpoint.

    The state at the end of each epoch is copied in memory. It goes to disk now and then, in case the process is killed,
    and when the training is interrupted: the middle of an epoch is no place to go on from.

    Random numbers of epoch e depend on (seed, e) alone: a cache hit or a resumed training changes nothing.
    The losses are collected as tensors and read once per epoch.
    """

    def __init__(self, stage: str, *, seed: int, report: Callable, checkpoint: Path | None, since: float | None):
        self.stage, self.seed, self.report, self.checkpoint = stage, seed, report, checkpoint
        self.since = time.monotonic() if since is None else since  # when the work began; a checkpoint says how much is done
        self.sums: dict[str, Tensor] = {}
        self.saved, self.pause = time.monotonic(), 20.0  # seconds between two checkpoints
        self.state: dict | None = None  # of the last epoch that ended and is not on disk yet

    def on_train_epoch_start(self, trainer, module):
        torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch + 1)
        trainer.train_dataloader.epoch = trainer.current_epoch
        self.sums, self.steps, self.began = {}, 0, time.monotonic()
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # at its end the next epoch's is set already

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, value in outputs.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()  # a sum in bf16 soon stands still
        self.steps += 1

    def on_train_epoch_end(self, trainer, module):
        means = {k: float(v) / self.steps for k, v in self.sums.items()}
        epoch = trainer.current_epoch
        if not torch.isfinite(torch.tensor(list(means.values()))).all():
            raise UserError(
                f"{self.stage}: the loss is not finite in epoch {epoch + 1} of {trainer.max_epochs}; "
                "try a smaller learning rate, or train.precision=32-true"
            )
        seconds = time.monotonic() - self.began
        self.report(self.stage, epoch + 1, trainer.max_epochs, means | {"lr": self.lr}, seconds)
        if self.checkpoint and epoch + 1 < trainer.max_epochs:
            # what save_checkpoint would write; the live tensors change with the next step
            self.state = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
            self.state["seconds"] = time.monotonic() - self.since
            if time.monotonic() - self.saved > self.pause:
                self.keep(trainer)

    def on_exception(self, trainer, module, exception):
        if self.state is not None and not isinstance(exception, UserError):
            self.keep(trainer)

    def keep(self, trainer):
        tmp = self.checkpoint.with_suffix(f".{os.getpid()}.tmp")
        trainer.strategy.save_checkpoint(self.state, tmp)
        os.replace(tmp, self.checkpoint)
        self.state, self.saved = None, time.monotonic()


def accelerate(accelerator: str) -> torch.device:
    """conf/trainer's accelerator (auto, cpu or gpu) -> the device."""
    gpu = torch.cuda.is_available()
    if accelerator not in ("auto", "cpu", "gpu"):
        raise UserError(f"trainer.accelerator={accelerator}: expected auto, cpu or gpu")
    if accelerator == "gpu" and not gpu:
        raise UserError("trainer=gpu, but torch sees no GPU here; take trainer=cpu, or check the driver with nvidia-smi")
    if accelerator == "auto" and not gpu and shutil.which("nvidia-smi"):
        print("bdx: nvidia-smi is here, but torch sees no GPU (is the driver older than this torch?): using the CPU")
    if gpu and accelerator != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Stays(SingleDeviceStrategy):
    """What was trained stays on its device; Lightning would take it to the CPU when a fit ends."""

    def teardown(self):
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module


def make_trainer(
    stage: str, epochs: int, *, device: torch.device, precision: str, seed: int, report: Callable, checkpoint=None, since=None
) -> pl.Trainer:
    """A Trainer for one stage; `report(stage, epoch, epochs, means, seconds)` hears of every epoch, of the rate at its
    start, too. since: of Watch."""
    if device.type == "cpu" and precision == "16-mixed":  # Lightning would take bf16 without a word that is heard
        raise UserError("train.precision=16-mixed: a CPU has no such arithmetic; take bf16-mixed or 32-true")
    return pl.Trainer(
        max_epochs=epochs, precision=precision, devices=1,
        accelerator={"cuda": "gpu"}.get(device.type, device.type), strategy=Stays(device),
        callbacks=[Watch(stage, seed=seed, report=report, checkpoint=checkpoint, since=since)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        inference_mode=False, num_sanity_val_steps=0, gradient_clip_val=None,
        plugins=[LightningEnvironment()],  # in a SLURM job it would take the signals and checkpoints for its own
    )  # fmt: skip


@torch.no_grad()
def predict(net: nn.Module, x: Tensor) -> Tensor:
    """Class predictions (N,) of the net in eval mode for x (N,C,H,W) uint8, on x's device, in full precision."""
    with mode(net, False):
        return torch.cat([net(pixels(part)).argmax(1) for (part,) in pieces(x)])
