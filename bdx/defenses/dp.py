"""DP: DP-SGD, training on the poisoned set in which no image has much of a say.

Source: Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133; alg. 1.

Each image's gradient is cut to norm C, Gaussian noise of deviation σC goes onto the sum, batches are drawn by lot. From
fresh weights, with GroupNorm, since BatchNorm lets images see each other: the returned net is another architecture. As a
defense against backdoors: Trap-and-Replace, tables 11 and 12 (after Du et al., ICLR 2020), where it leaves little of the
accuracy. Per-sample gradients and the accountant are Opacus's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Generator, nn

from bdx.archs.base import build
from bdx.datasets.base import Batch, Batches, ImageData
from bdx.defenses.base import Tuning
from bdx.errors import UserError
from bdx.training import optimizers

LEAST = 32  # smaller batches by lot may come out empty


class ByLot(Batches):
    """Batches of `size` on average: each image is in each of them with the same probability (Poisson sampling)."""

    def __iter__(self) -> Iterator[Batch]:
        device, n = self.split.x.device, len(self.split)
        g = Generator(device).manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        for _ in range(len(self)):
            drawn = torch.rand(n, generator=g, device=device) < self.size / n
            yield self.batch(drawn.nonzero().flatten(), g)


def with_group_norm(net: nn.Module, groups: int) -> nn.Module:
    """A fresh net as `net` was built, GroupNorm in place of BatchNorm; what a pass does not use is frozen."""
    spec = {k: v for k, v in net.spec.items() if k != "arch"} | {"shape": tuple(net.spec["shape"])}
    inner = {**net.spec["arch"], "_partial_": True}
    net = build({"_target_": "bdx.archs.group_norm.group_norm", "groups": groups, "net": inner}, **spec)
    net.to(memory_format=torch.contiguous_format)  # Opacus 1.6 gets convolutions wrong in channels-last
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # Opacus needs what came in as it came
    net(net.sample()).sum().backward()
    for p in net.parameters():
        p.requires_grad, p.grad = p.grad is not None, None
    return net


class DPSGD(Tuning):
    """noise  σ, as a multiple of the clipping norm · clip: C · delta: δ of (ε, δ); ε is a fact of the row
    groups   of GroupNorm, at most
    """

    trains = "all weights, from fresh ones"
    cost = "a training on the poisoned set with a gradient for each image"
    needs = frozenset({"train"})

    def __init__(self, net: nn.Module, *, noise: float, clip: float, delta: float, groups: int, **loop):
        if not find_spec("opacus"):
            raise UserError("DPSGD needs Opacus, which is not installed; `pip install 'bdx[dp]'` brings it")
        if min(noise, clip) <= 0 or not 0 < delta < 1 or groups < 1 or loop["batch"] < LEAST:
            raise UserError(
                f"defense.noise={noise}, clip={clip}, delta={delta}, groups={groups}, batch={loop['batch']}: expected noise "
                f"and clip above 0, delta between 0 and 1, groups of at least 1, a batch of at least {LEAST}"
            )
        super().__init__(net, **loop)
        self.noise, self.clip, self.delta = noise, clip, delta
        self.net = with_group_norm(net, groups)

    def trained(self):
        return [p for p in self.net.parameters() if p.requires_grad]

    def configure_optimizers(self):
        from opacus.optimizers import DPOptimizer

        kind = {"noise_multiplier": self.noise, "max_grad_norm": self.clip, "expected_batch_size": self.batch}
        return optimizers(self.trained(), lambda p: DPOptimizer(self.optimizer(p), **kind), self.schedule)

    def batches(self, data: ImageData) -> ByLot:
        if self.batch > len(data.train):
            raise UserError(f"defense.batch={self.batch}: there are {len(data.train)} training images")
        augment = replace(data.augment, cutmix=0.0) if self.augment else None  # CutMix would mix what must stay apart
        how = {"size": self.batch, "shuffle": True, "augment": augment, "drop_last": True}
        return ByLot(data.train, **how, classes=data.num_classes, seed=data.seed)

    def training_step(self, batch, _):
        with torch.autocast(batch.x.device.type, enabled=False):
            return F.cross_entropy(self.sampled(batch.x.contiguous()), batch.y)

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        from opacus import GradSampleModule
        from opacus.accountants import RDPAccountant

        batches, net = self.batches(data), self.net
        self.sampled = GradSampleModule(net.train())
        make_trainer("DPSGD", self.epochs).fit(self.train(), batches)
        self.sampled.to_standard_module()
        spent = RDPAccountant()
        spent.history = [(self.noise, self.batch / len(data.train), self.epochs * len(batches))]
        self.facts = {"epsilon": spent.get_epsilon(self.delta)}
        return net.requires_grad_(True)
