"""DBD: features from images without labels, a head on them, then semi-supervised tuning that trusts the low losses.

Source: Huang et al., Backdoor Defense via Decoupling the Training Process, ICLR 2022, arXiv 2202.03423; sec. 4, app. D.

From fresh weights: 1. SimCLR on all images, labels unread: poisoned ones lie where their content puts them; 2. only the
head is trained, with symmetric cross-entropy, which a wrong label raises; 3. MixMatch on everything, each epoch: the half
of lowest loss keeps its labels, the other half loses them.
Losses are those of plain images (released code: augmented ones), MixMatch starts with a new Adam (released code: the head's),
and crops are padded with zeros (released code: mirrored).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdx.datasets.base import Batch, Batches, ImageData
from bdx.defenses.base import Staged
from bdx.errors import UserError
from bdx.isolation import losses, lowest, shares, symmetric
from bdx.training import at_least_one
from bdx.views import Twice, View


def sharpen(p: Tensor, temperature: float) -> Tensor:
    """p (N,K) to the power 1/T, normalised again."""
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def mixed(x: Tensor, y: Tensor, share: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Each image and its probabilities with those of its partner: `share` of its own, at least half."""
    share = torch.maximum(share, 1 - share)
    return torch.lerp(x[partner], x, share), torch.lerp(y[partner], y, share)


class Halves:
    """Pairs of batches: trusted images with labels, the others in two draws. Each pass asks anew whom to trust."""

    def __init__(self, iterations: int, split: Callable[[], tuple[Batches, Batches]]):
        self.iterations, self.split, self.epoch = iterations, split, 0

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        parts = [self.around(batches, self.epoch) for batches in self.split()]
        self.epoch += 1
        return islice(zip(*parts, strict=True), self.iterations)

    def around(self, batches: Batches, epoch: int) -> Iterator[Batch]:
        batches.epoch = epoch * -(-self.iterations // len(batches))
        while True:
            yield from batches


class DBD(Staged):
    """sce       α and β of the symmetric cross-entropy, in stages 2 and 3
    trust       share of the images whose labels MixMatch reads
    temperature, alpha, lambda_u, ramp   of MixMatch: T, α, λ of the unlabelled term and the epochs over which it grows
    iterations  batches of an epoch of MixMatch
    view        of the contrastive stage · contrast, head, mixmatch: epochs, batch, optimizer, schedule of each
    """

    trains = "all weights, from fresh ones"
    cost = (
        "epochs on the poisoned set: 1000 contrastive ones of twice the images, 10 of a head, 190 of 1024 batches of MixMatch, "
        "of three times the images"
    )
    needs = frozenset({"train"})

    def __init__(
        self, net: nn.Module, *, sce: dict, trust: float, temperature: float, alpha: float, lambda_u: float, ramp: float,
        iterations: int, view: View, contrast: dict, head: dict, mixmatch: dict,
    ):  # fmt: skip
        shares("defense", trust=trust)
        at_least_one("defense", iterations=iterations)
        if min(temperature, alpha, ramp) <= 0 or lambda_u < 0:
            raise UserError(
                f"defense.temperature={temperature}, alpha={alpha}, ramp={ramp}, lambda_u={lambda_u}: "
                "expected the first three above 0 and lambda_u not below"
            )
        super().__init__(net, contrast=contrast, head=head, mixmatch=mixmatch)
        self.loss, self.trust, self.temperature, self.alpha = partial(symmetric, **sce), trust, temperature, alpha
        self.lambda_u, self.ramp, self.iterations, self.view = lambda_u, ramp, iterations, view
        self.seen = 0  # batches of MixMatch

    def run(self, data: ImageData, make_trainer: Callable) -> nn.Module:
        self.renew()
        at = self.learn_views("contrast", data, self.view, make_trainer, None)
        self.net.requires_grad_(False)  # BatchNorm's statistics go on moving, as in the released code
        head = self.net.get_submodule(at).requires_grad_(True)
        batches = self.batches("head", data, data.train, True)
        self.fit("head", batches, lambda b: self.loss(self.net(b.x), b.y).mean(), make_trainer, head.parameters())
        self.net.requires_grad_(True)
        self.fit("mixmatch", Halves(self.iterations, lambda: self.halves(data)), self.semi, make_trainer)
        return self.net

    def halves(self, data: ImageData) -> tuple[Batches, Batches]:
        """Batches of the trusted images, and of the others."""
        train, low = data.train, lowest(losses(self.net, data.train, self.loss), self.trust)
        self.facts = {"trusted_poison": float(train.poisoned[low].float().mean())}
        trusted = self.batches("mixmatch", data, train[low], True)
        return trusted, self.batches("mixmatch", data, train[~low], Twice(data.augment), part=1)

    def semi(self, pair: tuple[Batch, Batch]) -> dict[str, Tensor]:
        """MixMatch (Berthelot et al. 2019): CE on the trusted, squared error on guesses for the others, all mixed up.

        One pass over both kinds, so that BatchNorm sees them together: what the code's interleaving is for.
        """
        known, unknown = pair
        with torch.no_grad():
            guess = self.net(unknown.x).float().softmax(1)
            guess = sharpen((guess[: len(guess) // 2] + guess[len(guess) // 2 :]) / 2, self.temperature)
        hot = F.one_hot(known.y, guess.shape[1]).float() if known.y.ndim == 1 else known.y
        y = torch.cat([hot, guess, guess])
        share = torch.distributions.Beta(self.alpha, self.alpha).sample().to(y)
        x, y = mixed(torch.cat([known.x, unknown.x]), y, share, torch.randperm(len(y), device=y.device))
        logits, n = self.net(x).float(), len(known.x)
        ce = F.cross_entropy(logits[:n], y[:n])
        mse = F.mse_loss(logits[n:].softmax(1), y[n:])
        weight = self.lambda_u * min(1.0, self.seen / (self.iterations * self.ramp))
        self.seen += 1
        return {"loss": ce + weight * mse, "labelled": ce, "unlabelled": mse}
