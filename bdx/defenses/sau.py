"""SAU: unlearn the perturbations that fool the net at hand and the attacked net alike, towards the same class.

Source: Wei et al., Shared Adversarial Unlearning, NeurIPS 2023, arXiv 2307.10562; sec. 4, eqs. 4 to 8.

Lower problem, per image: δ = argmin β1 L_adv + β2 L_share within ‖δ‖∞ ≤ ε, f the net at hand and f₀ the attacked one,
    L_adv = −½ (CE(f(x+δ), y) + CE(f₀(x+δ), y)), each counted until that net's prediction has left the one on x,
    L_share = JS(f(x+δ), f₀(x+δ)), counted until both have left it for the same class.
Upper problem: λ1 CE(f(x), y) + λ2 CE(f(x+δ), y) + λ3 L_sh; L_sh = −log(1 − s_ỹ) where f₀ says ỹ, neither y nor what it
said on x. Means are over the batch. (The code clips L_sh's logarithm at 10⁻⁶; here it is exact.)
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx import surgery
from bdx.adversarial import project_linf
from bdx.defenses.base import Tuning
from bdx.errors import UserError
from bdx.training import at_least_one


class SAU(Tuning):
    """beta_adv, beta_share, lambda_clean, lambda_adv, lambda_share   β1, β2, λ1, λ2, λ3
    radius, step, steps   ε, length of a step along the sign, how many; δ starts at ε everywhere
    clamp                 whether x+δ is kept inside [0,1]; the released code lets it leave
    """

    trains = "all weights"
    cost = "per clean image and epoch: the perturbation's passes through two nets, and a training step of twice the batch"
    takes_scaled = False

    def __init__(
        self, net: nn.Module, *, beta_adv: float, beta_share: float, lambda_clean: float, lambda_adv: float,
        lambda_share: float, radius: float, step: float, steps: int, clamp: bool, **loop,
    ):  # fmt: skip
        at_least_one("defense", steps=steps)
        if min(radius, step) <= 0 or min(beta_adv, beta_share, lambda_clean, lambda_adv, lambda_share) < 0:
            raise UserError(
                f"defense.radius={radius}, step={step}, beta_adv={beta_adv}, beta_share={beta_share}, lambda_clean="
                f"{lambda_clean}, lambda_adv={lambda_adv}, lambda_share={lambda_share}: expected the first two above 0 "
                "and no weight below 0"
            )
        super().__init__(net, **loop)
        self.beta_adv, self.beta_share = beta_adv, beta_share
        self.weights = {"clean": lambda_clean, "adv": lambda_adv, "share": lambda_share}
        self.radius, self.step, self.steps, self.clamp = radius, step, steps, clamp
        self.attacked = surgery.freeze(copy.deepcopy(net))

    def ready(self) -> SAU:
        return self.eval()

    def training_step(self, batch, _):
        x, y = batch.x, batch.y
        with torch.no_grad():
            said, said_before = self.net(x).argmax(1), self.attacked(x).argmax(1)
        worst = self.shared(x, y, said, said_before)
        with torch.no_grad():
            fooled = self.attacked(worst).argmax(1)
        clean, adv = self.net(torch.cat([x, worst])).float().chunk(2)
        terms = {
            "clean": F.cross_entropy(clean, y),
            "adv": F.cross_entropy(adv, y),
            "share": unlearn(adv, fooled, wrong(fooled, y) & (fooled != said_before)),
        }
        return {"loss": sum(self.weights[k] * v for k, v in terms.items()), **terms}

    def shared(self, x: Tensor, y: Tensor, said: Tensor, said_before: Tensor) -> Tensor:
        """x + δ, by descent along the sign. said, said_before (N,): what f and f₀ predict on x."""
        delta = torch.full_like(x, self.radius)
        for _ in range(self.steps):
            at = self.moved(x, delta).requires_grad_()
            f, before = self.net(at).float(), self.attacked(at).float()
            (grad,) = torch.autograd.grad(self.lower(f, before, y, said, said_before), at)
            delta = project_linf(delta - self.step * grad.sign(), self.radius)
        return self.moved(x, delta)

    def moved(self, x: Tensor, delta: Tensor) -> Tensor:
        return (x + delta).clamp(0, 1) if self.clamp else x + delta

    def lower(self, f: Tensor, before: Tensor, y: Tensor, said: Tensor, said_before: Tensor) -> Tensor:
        """β1 L_adv + β2 L_share from the logits (N,K) of f and f₀ at x+δ."""
        stays, stays_before = f.argmax(1) == said, before.argmax(1) == said_before
        alone = stays | stays_before | (f.argmax(1) != before.argmax(1))
        ce = [F.cross_entropy(z, y, reduction="none") * s for z, s in ((f, stays), (before, stays_before))]
        adv, share = -sum(ce).sum() / 2, (jensen_shannon(f, before) * alone).sum()
        return (self.beta_adv * adv + self.beta_share * share) / len(y)


def wrong(said: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: said (N,) is not the label, or after CutMix, y (N,K), neither of the two."""
    return said != y if y.ndim == 1 else y.gather(1, said[:, None])[:, 0] == 0


def jensen_shannon(f: Tensor, g: Tensor) -> Tensor:
    """(N,) divergence, in nats, of the distributions that the logits (N,K) give."""
    f, g = f.log_softmax(1), g.log_softmax(1)
    middle = torch.logaddexp(f, g) - torch.tensor(2.0).log()
    return (f.exp() * (f - middle) + g.exp() * (g - middle)).sum(1) / 2


def unlearn(logits: Tensor, k: Tensor, counts: Tensor) -> Tensor:
    """−log(1 − s_k), exact by log-sum-exp, over the images (N,) bool that count, divided by the size of the batch."""
    others = logits.scatter(1, k[:, None], float("-inf")).logsumexp(1)
    return ((logits.logsumexp(1) - others) * counts).sum() / len(logits)
