"""NAD: the attacked net is tuned while its attention is held to that of a teacher, itself tuned on the same clean images.

Source: Li et al., Neural Attention Distillation, ICLR 2021, arXiv 2101.05930; sec. 3, released code.

    CE(f(x), y) + Σ_l β_l MSE(A(f_l), A(t_l)),   A(z) = Σ_c |z_c|^p over its L2 norm in space

The maps are those of the last three resolutions (layer2, layer3 and layer4 of a PreAct-ResNet18; the three groups of the
paper's WideResNet). recipe=code compares what BackdoorBench does: layer3, layer4 and the pooled features, whose map is 1
everywhere, so that the last term is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.datasets.base import ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError, one_of
from bdx.training import at_least_one


class NAD(Tuning):
    """betas           weights of the three maps, from the shallow one to the deep one
    p                  power of the attention map
    teacher_epochs     of plain fine-tuning before the teacher is frozen
    recipe             paper or code: which maps are compared
    cutout             side in pixels, of the loops' own augmentation; null: the data set's
    """

    trains = "all weights, twice: a teacher and the net"
    cost = "per clean image and epoch: one training step, and a pass of the teacher; before that, 10 epochs for the teacher"

    def __init__(self, net: nn.Module, *, betas: list, p: float, teacher_epochs: int, recipe: str, cutout: int | None, **loop):
        one_of("defense.recipe", recipe, ("paper", "code"))
        at_least_one("defense", teacher_epochs=teacher_epochs)
        if len(betas) != 3 or min(betas) < 0 or p <= 0:
            raise UserError(f"defense.betas={betas}, p={p}: expected three weights not below 0, and p above 0")
        super().__init__(net, **loop)
        self.betas, self.p, self.teacher_epochs, self.recipe, self.loop = betas, p, teacher_epochs, recipe, loop
        self.cutout = cutout
        self.at = maps(net, net.sample())

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        teacher = Tuning(copy.deepcopy(self.net), **self.loop)
        make_trainer("teacher", self.teacher_epochs).fit(teacher.ready(), self.batches(data))
        self.teacher = surgery.freeze(teacher.net)
        return super().run(data, make_trainer)

    def batches(self, data: ImageData):
        own = self.augment if self.cutout is None or not self.augment else replace(data.augment, cutout=self.cutout)
        return data.batches(self.trusted(data), size=self.batch, shuffle=True, augment=own, stage=1)

    def ready(self) -> NAD:
        self.train()
        self.teacher.eval()
        return self

    def training_step(self, batch, _):
        logits, mine = self.look(self.net, batch.x)
        with torch.no_grad():
            _, wanted = self.look(self.teacher, batch.x)
        ce = F.cross_entropy(logits, batch.y)
        far = sum(b * F.mse_loss(m, w) for b, m, w in zip(self.betas, mine, wanted, strict=True))
        return {"loss": ce + far, "ce": ce, "attention": far}

    def look(self, net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits, the three attention maps)"""
        with ExitStack() as stack:
            seen = [stack.enter_context(surgery.watch_output(net, at)) for at in self.at]
            logits = net(x)
        features = [channels_first(net.get_submodule(at), s[0]) for at, s in zip(self.at, seen, strict=True)]
        if self.recipe == "code":
            features = [*features[1:], features[-1].flatten(2).mean(2)[..., None]]
        return logits, [attention(z.float(), self.p) for z in features]


def attention(z: Tensor, p: float) -> Tensor:
    """(N, C, …) -> (N, positions): Σ_c |z|^p, divided by its L2 norm over the positions."""
    a = z.abs().pow(p).sum(1).flatten(1)
    return a / (a.norm(dim=1, keepdim=True) + 1e-6)


def channels_first(module: nn.Module, z: Tensor) -> Tensor:
    """A map as it is; tokens (N, T, C) or (N, H, W, C) with their channels in dimension 1."""
    return z.movedim(-1, 1) if places.tokens_at(module, tuple(z.shape[1:])) else z


def maps(net: nn.Module, sample: Tensor) -> list[str]:
    """Three modules, shallow to deep: of those with a convolution in them, the last to end at each of the three smallest
    resolutions above 1×1. A net without three has them by depth, as bdx.places counts: middle, penultimate and last."""
    ends, handles = {}, []
    for name, module in net.named_modules():

        def end(module, args, out, name=name):
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1:
                ends[out.shape[2] * out.shape[3]] = name

        if any(places.on_main_path(n, m) for n, m in module.named_modules(prefix=name)):
            handles.append(module.register_forward_hook(end))
    try:
        with torch.no_grad(), surgery.mode(net, False):
            net(sample)
    finally:
        for handle in handles:
            handle.remove()
    found = [ends[size] for size in sorted(ends, reverse=True)][-3:]
    if len(found) == 3:
        return found
    try:
        by_depth = places.places(net, sample)
    except UserError:
        raise UserError(
            "NAD compares three maps, and this net has neither convolutions at three resolutions nor three convolutions or "
            "blocks; take a deeper arch (arch.layers=3 or more of a ViT) or a defense without maps, such as ft"
        ) from None
    return [by_depth[d] for d in ("middle", "penultimate", "last")]
