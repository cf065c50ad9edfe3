"""Narcissus: noise that a clean net takes for the target class is added to few images of that class.

Source: Zeng et al. 2023, Narcissus: a practical clean-label backdoor attack with limited information, CCS, arXiv 2204.05255,
sec. 4: δ = argmin Σ CE(f(x + δ), t) over images of class t, ‖δ‖∞ ≤ 16/255, by RAdam; three times δ at test time. The paper's
attacker knows the target class alone: its net learns from other public images and is then fitted to that class for some
epochs. Here the net is a clean one of the victim's own recipe, which needs no such fitting and knows more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.attacks.made import Made, Progress
from bdx.datasets.base import ImageData
from bdx.errors import UserError
from bdx.split import pieces


class Narcissus(Made):
    """epsilon: L∞ bound of the noise in training, in grey levels of 255. amplify: what it is multiplied by at test time.
    lr, rounds, batch: of the search; a round is one pass over the images of the target class."""

    makes = ("noise",)
    clean_label = True
    later = frozenset({"amplify"})

    def __init__(self, net: nn.Module, *, epsilon: float, amplify: float, lr: float, rounds: int, batch: int, **common):
        super().__init__(net, **common)
        if not 0 < epsilon <= 255 or amplify <= 0 or lr <= 0 or min(rounds, batch) < 1:
            raise UserError(
                f"attack.epsilon={epsilon}, amplify={amplify}, lr={lr}, rounds={rounds}, batch={batch}: expected numbers "
                "above 0, and at most 255 grey levels"
            )
        self.radius, self.amplify, self.lr, self.rounds, self.batch = epsilon / 255, amplify, lr, rounds, batch
        self.register_buffer("noise", torch.zeros(self.shape))

    def make(self, data: ImageData, net, report):
        some = data.train[data.train.y_true == self.target]
        batches = data.batches(some, size=self.batch, shuffle=True, augment=True, stage=7)
        noise = torch.zeros(1, *self.shape, device=some.x.device, requires_grad=True)
        search, say = torch.optim.RAdam([noise], lr=self.lr), Progress(report, "trigger", self.rounds)
        for i in range(self.rounds):
            for batch in batches:
                seen = (batch.x + noise).clamp(0, 1)
                loss = F.cross_entropy(net(seen), torch.full((len(seen),), self.target, device=seen.device))
                (noise.grad,) = torch.autograd.grad(loss, noise)
                search.step()
                noise.data.clamp_(-self.radius, self.radius)  # a pixel beyond the bound would have no gradient to come back
            say(i + 1, loss.detach())
        made = noise.detach()[0]
        return {"noise": made}, self.succeeds(net, made, data)

    @torch.no_grad()
    def succeeds(self, net: nn.Module, noise: Tensor, data: ImageData) -> dict:
        """How many training images of other classes the clean net itself takes for the target class."""
        x = self.images_of(replace(data, train=data.train[data.train.y_true != self.target]), 1000)
        seen = [(net((p + self.amplify * noise).clamp(0, 1)).argmax(1) == self.target) for (p,) in pieces(x)]
        return {"fooled": float(torch.cat(seen).float().mean())}

    def training_trigger(self, x: Tensor, index: Tensor) -> Tensor:
        return (x + self.noise.to(x.device)).clamp(0, 1)

    def trigger(self, x: Tensor) -> Tensor:
        return (x + self.amplify * self.noise.to(x.device)).clamp(0, 1)
