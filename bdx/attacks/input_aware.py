"""Input-Aware: a network paints a trigger of its own for each image; one painted for another image must not work.

Source: Nguyen and Tran 2020, Input-aware dynamic backdoor attack, NeurIPS, arXiv 2010.08138; sec. 3.
Trigger: x' = x + m(x) (p(x) − x); the pattern p and the mask m come from two networks. Stage 1 trains m alone: few pixels,
different for different images. Stage 2 trains the victim and p: CE + λ_div D(x, x̃; p(x), p(x̃)), where D is the distance of
two images over that of their patterns; cross images carry the pattern and mask of another image, and keep their label.
Both networks see normalised pixels, and distances are taken there, as in the originals; the painting in [0,1] is the same.
Triggers are put on after augmentation, as floats; `stamp` rounds them at test time. The other image is the next one of the
same shuffled batch, where the released code reads a second loader.
follow=code brings back what BackdoorBench does: tanh twice, the pattern network's gradient never zeroed, and stage 1
counted within train.epochs (25 of 100). Its constant learning rate is train.schedule=null.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor, nn

from bdx import files
from bdx.attacks.base import Attack
from bdx.attacks.controlled import Controlled, Joint, Roles, whole_labels
from bdx.datasets.base import ImageData
from bdx.errors import UserError, one_of
from bdx.surgery import freeze, mode
from bdx.training import at_least_one, optimizers, try_out


class Painter(nn.Sequential):
    """U-Net without skips, (N,C,H,W) -> (N,out,H,W) in [0,1]. widths: of its levels. twice: tanh(tanh(z)), which leaves
    only 0.119 to 0.881."""

    def __init__(self, channels: int, out: int, widths: list[int], twice: bool):
        layers, w = [], channels
        for wide in widths:
            layers += [*block(w, wide), *block(wide, wide), nn.MaxPool2d(2)]
            w = wide
        layers += block(w, w)
        for narrow in reversed([out, *widths[:-1]]):
            up = nn.Upsample(scale_factor=2, mode="bilinear")
            layers += [up, *block(w, w), *block(w, narrow)]
            w = narrow
        super().__init__(*layers[:-1])  # no ReLU at the end
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x).float().tanh()
        return (z.tanh() if self.twice else z) / 2 + 0.5


def block(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out, momentum=0.05), nn.ReLU()]


def sharpen(m: Tensor) -> Tensor:
    """Nearly 0 or 1."""
    return (20 * m - 10).tanh() / 2 + 0.5


def diversity(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """mean of rms(a − b) / (rms(of_a − of_b) + ε) over pairs of images."""
    rms = lambda d: d.square().mean((1, 2, 3)).clamp_min(1e-14).sqrt()  # the root of 0 has no gradient
    return (rms(a - b) / (rms(of_a - of_b) + 1e-7)).mean()


class Masking(pl.LightningModule):
    """Stage 1. x is followed by the next image of the batch. stage: density, weight (λ_norm), optimizer, schedule, …"""

    def __init__(self, masker: nn.Module, normalize: nn.Module, lambda_div: float, stage: dict):
        super().__init__()
        self.masker, self.normalize, self.lambda_div, self.stage = masker, normalize, lambda_div, stage

    def training_step(self, batch, _):
        x = self.normalize(batch.x)
        m = sharpen(self.masker(x))
        area = (m - self.stage["density"]).relu().mean()
        alike = diversity(x, x.roll(1, 0), m, m.roll(1, 0))
        return {"loss": self.stage["weight"] * area + self.lambda_div * alike, "density": m.detach().mean()}

    def configure_optimizers(self):
        return optimizers(self.masker.parameters(), self.stage["optimizer"], self.stage["schedule"])


class InputAware(Joint, Controlled):
    """widths: of both networks' levels. lambda_div: weight of diversity. mask: stage 1 (epochs, density: the share of
    pixels that is free, weight of what exceeds it, optimizer, schedule). generator: optimizer, schedule of the patterns."""

    leaves_poison = False
    sample_specific = True
    trigger_from = "trained"
    hardens = True

    def __init__(self, net, *, widths: list, lambda_div: float, mask: dict, follow: str, recipe, **common):
        one_of("attack.follow", follow, ("paper", "code"))
        at_least_one("attack.mask", epochs=mask["epochs"])
        try_out("attack.mask", SimpleNamespace(**mask))
        self.code = follow == "code"
        if self.code:
            if recipe.sam_rho:
                raise UserError(
                    f"train.sam_rho={recipe.sam_rho}: a sharpness-aware step has two passes, and with attack.follow=code the "
                    "painter's gradients add up over passes; take attack.follow=paper"
                )
            if recipe.epochs <= mask["epochs"]:
                raise UserError(
                    f"train.epochs={recipe.epochs}: with attack.follow=code {mask['epochs']} of them train the mask, and "
                    f"none is left for the victim; take more than {mask['epochs']}, or fewer attack.mask.epochs"
                )
            recipe = replace(recipe, epochs=recipe.epochs - mask["epochs"])
        super().__init__(net, recipe=recipe, **common)
        whole_labels(self)
        channels, h, w = self.shape
        if not widths or h % 2 ** len(widths) or w % 2 ** len(widths):
            raise UserError(f"attack.widths={widths}: images of {h}×{w} cannot be halved {len(widths)} times, or not once")
        self.lambda_div, self.mask, self.gradients = lambda_div, mask, None
        self.maker = Painter(channels, channels, widths, self.code)
        self.masker = Painter(channels, 1, widths, self.code)

    def train(self, mode: bool = True) -> InputAware:
        super().train(mode)
        self.masker.eval()  # it has its own stage
        return self

    def painted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pattern (N,C,H,W) and mask (N,1,H,W) for x."""
        z = self.net.normalize(x)
        return self.maker(z), sharpen(self.masker(z))

    def trigger(self, x: Tensor) -> Tensor:
        with mode(self.maker, False), mode(self.masker, False):
            return torch.cat([p.lerp(*self.painted(p)) for p in x.split(512)])  # 512: what its layers take in memory

    def plant(self, x: Tensor, roles: Roles, g: Generator) -> Tensor:
        return x  # the painter's gradient is wanted: triggers are put on in the step

    def training_step(self, batch, _):
        victim, painter = self.optimizers()

        def closure() -> tuple[Tensor, Tensor]:
            victim.zero_grad()
            if not self.code:
                painter.zero_grad()
            ce, alike = self.losses(batch)
            self.manual_backward(ce + self.lambda_div * alike)
            return ce, alike

        ce, alike = self.differentiate(closure)
        for optimizer in (victim, painter):
            optimizer.step()
        self.move_rates()
        return {"loss": ce.detach(), "alike": alike.detach()}

    def losses(self, batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all images in their roles, and D of the patterns of backdoor and donor images."""
        x, rows, k = batch.x, torch.cat(batch.roles[:2]), len(batch.roles.backdoor)
        donors = torch.cat([batch.roles.backdoor, (batch.roles.cross + 1) % len(x)])
        alike = x.new_zeros(())
        if len(rows):
            pattern, mask = self.painted(x[donors])
            pairs = min(k, len(rows) - k)
            x = x.index_copy(0, rows, x[rows].lerp(pattern, mask))
            if pairs:
                own, other = donors[:pairs], donors[k : k + pairs]
                z, p = self.net.normalize(batch.x), self.net.normalize(pattern)
                alike = diversity(z[own], z[other], p[:pairs], p[k : k + pairs])
        return self.loss(x, batch.y), alike

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.code:  # what is never zeroed goes on from where it was
            checkpoint["gradients"] = [p.grad for p in self.maker.parameters()]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.gradients = checkpoint.get("gradients")

    def on_train_start(self) -> None:
        for p, grad in zip(self.maker.parameters(), self.gradients or [], strict=False):
            p.grad = grad if grad is None else grad.to(p.device)

    def fit(self, data: ImageData, make_trainer: Callable, checkpoint=None) -> None:
        """Two stages, each with a checkpoint of its own; that of stage 2 holds what stage 1 has made."""
        first = checkpoint and checkpoint.with_name(f"{checkpoint.stem}-mask.ckpt")
        if not (checkpoint and checkpoint.exists()):
            stage = Masking(self.masker, self.net.normalize, self.lambda_div, self.mask)
            trainer = make_trainer("mask", self.mask["epochs"], checkpoint=first)
            go_on = first if first and first.exists() else None
            trainer.fit(stage.train(), Attack.batches(self, data), ckpt_path=go_on, weights_only=True)
        freeze(self.masker)
        super().fit(data, make_trainer, checkpoint)
        if first:
            files.remove(first)
