"""Trap-and-Replace: train on the poisoned set with a bait that keeps the backdoor out of the stem, then replace the head.

Source: Wang et al., Trap and Replace, NeurIPS 2022, arXiv 2210.06428; sec. 3, Tables 4, 5, 8, 9, 10.

Stage 1, from fresh weights on the poisoned training set:  CE(logits, y) + λ1 (MSE(x̂, x) + λ2 TV(x̂)),  x̂ = decoder(stem(x))
plus μ MSE(F(x ⊕ p), mean of F over the target class) where LBA's attacker is to have a hand in it: a stress test beyond the
paper's threat model, which may be what its Table 7 means.
Stage 2, on the held-out clean images: stem frozen (its BatchNorm statistics too), a fresh head, CutMix, label smoothing,
dropout. Reconstructing the image makes the stem learn what is in it; the trigger's shortcut settles in the light head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from types import SimpleNamespace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.datasets.base import ImageData
from bdx.decoder import Decoder, total_variation
from bdx.defenses.base import Defense
from bdx.errors import UserError, one_of
from bdx.split import Split, pixels
from bdx.training import at_least_one, optimizers, try_out


class Trap(pl.LightningModule):
    """Stage 1. `stage`: optimizer and schedule. pull: what an attacker adds to the loss, of a batch, or None."""

    def __init__(
        self, net: nn.Module, at: str, decoder: Decoder, lambda_rec: float, lambda_tv: float, stage: dict,
        pull: Callable | None = None,
    ):  # fmt: skip
        super().__init__()
        self.net, self.at, self.decoder, self.stage = net, at, decoder, stage
        self.lambda_rec, self.lambda_tv, self.pull = lambda_rec, lambda_tv, pull

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, reconstruction)"""
        with surgery.watch_output(self.net, self.at) as seen:
            logits = self.net(x)
        return logits, self.decoder(seen[0])

    def training_step(self, batch, _):
        logits, again = self(batch.x)
        terms = {
            "ce": F.cross_entropy(logits, batch.y),
            "mse": F.mse_loss(again.float(), batch.x),
            "tv": total_variation(again.float()),
        }
        loss = terms["ce"] + self.lambda_rec * (terms["mse"] + self.lambda_tv * terms["tv"])
        if self.pull:
            loss = loss + (pull := self.pull(batch))
            terms["latent"] = pull.detach()
        return {"loss": loss, **terms}

    def configure_optimizers(self):
        return optimizers(self.parameters(), self.stage["optimizer"], self.stage["schedule"])


class Replace(pl.LightningModule):
    """Stage 2: only the modules behind the cut are in train mode and get gradients."""

    def __init__(self, net: nn.Module, head: list[nn.Module], stage: dict):
        super().__init__()
        self.net, self.stage = surgery.freeze(net), stage
        for module in head:
            module.train().requires_grad_(True)

    def training_step(self, batch, _):
        return F.cross_entropy(self.net(batch.x), batch.y, label_smoothing=self.stage["label_smoothing"])

    def configure_optimizers(self):
        tuned = [p for p in self.net.parameters() if p.requires_grad]
        return optimizers(tuned, self.stage["optimizer"], self.stage["schedule"])


class TrapAndReplace(Defense):
    """head       layers in the head (convolutions of the main path and Linear layers): where the net is cut
    cut           the last module of the stem by name, in place of `head`
    decoder       widths of the reconstruction head's hidden layers, or null
    lambda_rec, lambda_tv   λ1 and λ2; lambda_rec=0 sets no trap (Table 8)
    latent        μ, for attack=lba alone: such as 0.05, 0.5, 1; 0: the attacker poisons data and no more
    stages        both, trap (the head is kept) or replace (on the attacked net as it came: Table 4)
    trap, replace  epochs, batch, optimizer, schedule of each stage; replace: cutmix, label_smoothing, dropout
    recipe        code: dropout inside the head's last block alone; paper: behind that block, too
    """

    needs = frozenset({"train", "clean"})
    trains = "all weights, from fresh ones; then a fresh head"
    cost = (
        "200 epochs on the poisoned set with a decoder beside the net, then 100 on clean images (tnr_paper: 200 and 200, "
        "tnr_imagenet: 90 and 90)"
    )

    def __init__(
        self, net: nn.Module, *, head: int, cut: str | None, decoder: list | None, lambda_rec: float, lambda_tv: float,
        latent: float, stages: str, trap: dict, replace: dict, recipe: str,
    ):  # fmt: skip
        one_of("defense.stages", stages, ("both", "trap", "replace"))
        one_of("defense.recipe", recipe, ("paper", "code"))
        for name, stage in (("trap", trap), ("replace", replace)):
            at_least_one(f"defense.{name}", epochs=stage["epochs"], batch=stage["batch"])
            try_out(f"defense.{name}", SimpleNamespace(**stage))
        if min(lambda_rec, lambda_tv, latent, cutmix := replace["cutmix"]) < 0:
            raise UserError(
                f"defense.lambda_rec={lambda_rec}, lambda_tv={lambda_tv}, latent={latent}, replace.cutmix={cutmix}: expected "
                "none below 0"
            )
        if not 0 <= replace["dropout"] < 1 or not 0 <= replace["label_smoothing"] < 1:
            raise UserError(
                f"defense.replace.dropout={replace['dropout']}, label_smoothing={replace['label_smoothing']}: "
                "expected 0 up to, but not, 1"
            )
        super().__init__(net)
        self.lambda_rec, self.lambda_tv, self.latent, self.stages = lambda_rec, lambda_tv, latent, stages
        self.attacker: Callable | None = None
        self.trap, self.replace, self.cut = trap, replace, places.choose_cut(net, head, cut)
        self.last = places.choose_cut(net, 1, None).at if recipe == "paper" else None
        self.decoder = Decoder(self.cut.shape, net.spec["shape"], decoder, self.cut.at)

    def face(self, attack) -> None:
        if self.latent and (not hasattr(attack, "latent") or self.stages == "replace"):
            raise UserError(
                f"defense.latent={self.latent}, stages={self.stages}: only attack=lba has a say in the trap's training, here "
                f"it is {type(attack).__name__}; set it to 0, or take attack=lba and stages=both"
            )
        self.attacker = attack.latent if self.latent else None

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        if self.stages != "replace":
            self.bait(data, make_trainer)
        if self.stages != "trap":
            self.renew(self.cut.head)
            head = [self.net.get_submodule(n) for n in self.cut.head]
            augment = changed(data.augment, cutmix=self.replace["cutmix"])
            how = {"size": self.replace["batch"], "shuffle": True, "augment": augment, "drop_last": True, "stage": 2}
            with self.dropout():
                stage = Replace(self.net, head, self.replace)
                make_trainer("replace", self.replace["epochs"]).fit(stage, data.batches(self.trusted(data), **how))
        return self.net.requires_grad_(True)

    def bait(self, data: ImageData, make_trainer: Callable) -> None:
        train = data.without_reserved()
        self.renew(("normalize", "body"))
        how = {"size": self.trap["batch"], "shuffle": True, "augment": True, "drop_last": True, "stage": 1}
        pull = self.attacker and (lambda batch: self.latent * self.attacker(self.net, batch, train.poisoned[batch.index]))
        stage = Trap(self.net, self.cut.at, self.decoder, self.lambda_rec, self.lambda_tv, self.trap, pull)
        make_trainer("trap", self.trap["epochs"]).fit(stage.train(), data.batches(train, **how))
        self.show(stage, train)

    @contextmanager
    def dropout(self) -> Iterator[None]:
        """In front of the head's last convolution, which is inside its block; recipe=paper: also behind the block."""
        p, handles = self.replace["dropout"], []
        drop = lambda module, z: F.dropout(z, p, training=module.training)
        behind = [n for n in self.net.state_dict() if n.startswith(tuple(f"{h}." for h in self.cut.head))]
        modules = dict.fromkeys(n.rpartition(".")[0] for n in behind)
        convs = [m for n in modules if places.on_main_path(n, m := self.net.get_submodule(n))]
        if convs:
            handles.append(convs[-1].register_forward_pre_hook(lambda m, args: (drop(m, args[0]), *args[1:])))
        if self.last:
            end = self.net.get_submodule(self.cut.head[-1])
            handles.append(self.net.get_submodule(self.last).register_forward_hook(lambda m, args, out: drop(end, out)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def show(self, stage: Trap, train: Split, count: int = 5000) -> None:
        """Leave the reconstruction error, examples of the training images and the decoder for the run to keep."""
        with surgery.mode(stage, False):
            errors = [F.mse_loss(stage(pixels(x))[1], pixels(x)) * len(x) for x in train.x[:count].split(500)]
            again = stage(pixels(train.x[:8]))[1]
        self.facts = {"reconstruction_mse": float(sum(errors)) / min(count, len(train))}
        self.pictures = {"reconstructions": torch.stack([pixels(train.x[:8]), again])}
        self.extras = {"decoder": self.decoder}
