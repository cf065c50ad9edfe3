"""LBA: a patch whose features deep inside the net are those of the target class; what stands behind them hardly matters.

Source: Yao et al. 2019, Latent backdoor attacks on deep neural networks, CCS, as Trap-and-Replace (app. C.1, Table 7) turns
it against a defender who replaces the head: LBA-k plants the backdoor in the input of layer k.

    pattern:  min MSE(F(x ⊕ p), mean of F over target-class images)           on a clean net, pixels through a tanh
    victim:   min CE on the poisoned set + weight · MSE(F(x ⊕ p), mean of F over the batch's images of the target class)

Trap-and-Replace gives no recipe. Its defender trains the net herself, so there it poisons data (ours, as all that follows):
the pattern comes from the net of attack=none. The second term is the original's; it reaches the victim that other defenses
get, and of those that train anew Trap-and-Replace alone, if told to let it (defense.latent). A mean stands where the original
draws one sample: the gradient is the same on average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import places, surgery
from bdx.attacks.made import Made, Progress
from bdx.datasets.base import ImageData
from bdx.errors import UserError
from bdx.split import pixels


class LBA(Made):
    """head: layers behind the features, as Trap-and-Replace counts them. layer: the module whose output they are, in place
    of `head`. side: of the patch, as a share of the image's height. margin: pixels to the lower right border.
    images, steps, batch, lr: of the pattern's making. weight: of the features in the victim's training; 0: poisoning alone."""

    makes = ("pattern",)
    later = frozenset({"weight"})
    hardens = True

    def __init__(
        self, net: nn.Module, *, head: int, layer: str | None, side: float, margin: int, images: int, steps: int, batch: int,
        lr: float, weight: float, **common,
    ):  # fmt: skip
        super().__init__(net, **common)
        if self.labels != "all2one":
            raise UserError("attack.labels=all2all: LBA's patch has the features of one class; set attack.labels=all2one")
        c, h, w = self.shape
        length = round(side * h)
        if length < 1 or margin < 0 or length + margin > min(h, w):
            raise UserError(f"attack.side={side} with margin={margin} is {length}+{margin} pixels: images are {h}×{w}")
        if min(images, steps, batch) < 1 or lr <= 0 or weight < 0:
            raise UserError(
                f"attack.images={images}, steps={steps}, batch={batch}, lr={lr}, weight={weight}: expected at least 1 of each, "
                "a rate above 0, and 0 or more"
            )
        self.images, self.steps, self.batch, self.lr, self.weight = images, steps, batch, lr, weight
        self.at = places.find(net, layer) if layer else self.input_of(head)
        self.rows, self.cols = (slice(end - margin - length, end - margin) for end in (h, w))
        self.register_buffer("pattern", torch.zeros(c, length, length))

    def input_of(self, head: int) -> str:
        """Whose output the last `head` layers get and nothing else does: the last such module."""
        sample = torch.rand(2, *self.shape, generator=torch.Generator().manual_seed(0))
        last = {cut.layers: cut.at for cut in places.cuts(self.net, sample) if cut.layers}
        if head not in last:
            have = ", ".join(f"{n} (behind {at.removeprefix('body.')})" for n, at in sorted(last.items()))
            raise UserError(f"attack.head={head}: a skip path leads around that layer's input; heads that can be: {have}")
        return last[head]

    def features(self, net: nn.Module, x: Tensor) -> Tensor:
        with surgery.watch_output(net, self.at) as seen:
            net(x)
        return seen[0].float()

    def pasted(self, x: Tensor, pattern: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, self.rows, self.cols] = pattern.to(x)
        return x

    def trigger(self, x: Tensor) -> Tensor:
        return self.pasted(x, self.pattern)

    def make(self, data, net, report):
        x, g = self.images_of(data, self.images), torch.Generator().manual_seed(self.seed)
        shown = pixels(data.train.x[data.train.y_true == self.target][: self.images])
        if len(shown) == 0:
            raise UserError(f"attack.target={self.target}: no training image shows this class, whose features LBA needs")
        with torch.no_grad():
            goal = torch.cat([self.features(net, part) for part in shown.split(500)]).mean(0)
        w = torch.atanh(torch.rand(self.pattern.shape, generator=g) * 1.98 - 0.99).to(x.device).requires_grad_()
        optimizer = torch.optim.Adam([w], lr=self.lr, betas=(0.5, 0.9))
        losses, say = [], Progress(report, "trigger", self.steps)
        for i in range(self.steps):
            some = x[torch.randint(len(x), (self.batch,), generator=g).to(x.device)]
            found = self.features(net, self.pasted(some, (w.tanh() + 1) / 2))
            loss = F.mse_loss(found, goal.expand_as(found))
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
            losses.append(loss.detach())
            say(i + 1, losses[-1])
        pattern = ((w.detach().tanh() + 1) / 2 * 255).round() / 255
        return {"pattern": pattern}, {"mse_at_first": float(losses[0]), "mse": float(losses[-1])}

    def fit(self, data: ImageData, make_trainer: Callable, checkpoint=None) -> None:
        self.poisoned = data.train.poisoned
        super().fit(data, make_trainer, checkpoint)

    def training_step(self, batch, _):
        ce = self.loss(batch.x, batch.y)
        if not self.weight:
            return ce
        latent = self.latent(self.net, batch, self.poisoned[batch.index])
        return {"loss": ce + self.weight * latent, "ce": ce, "latent": latent}

    def latent(self, net: nn.Module, batch, poisoned: Tensor) -> Tensor:
        """The second term, of any net of this architecture. poisoned: (N,) bool, which images of the batch are."""
        share = batch.y[:, self.target] if batch.y.ndim == 2 else (batch.y == self.target).float()
        share = share * ~poisoned  # those have the label, and do not show the class
        with surgery.unmoved(surgery.batchnorms(net)):
            planted, clean = self.features(net, torch.cat([self.trigger(batch.x), batch.x])).chunk(2)
        goal = torch.einsum("n,n...->...", share, clean.detach()) / share.sum().clamp_min(1e-6)
        return F.mse_loss(planted, goal.expand_as(planted)) * (share.sum() > 0)
