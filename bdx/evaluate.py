"""evaluate: a net, an attack and the test split -> ACC, ASR and RA; flagged: what a repair gives away as a detector."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Generator, Tensor, nn

from bdx import metrics
from bdx.attacks.base import Attack
from bdx.split import Split
from bdx.training import predict


@dataclass(frozen=True)
class Seen:
    """What a net makes of the test split. clean (N,): its predictions on clean images, y_true (N,): what they show;
    triggered (M,): on triggered images, wanted (M,): what the attacker asks for, shown (M,): what they show; without a
    trigger these three are None. parts: where each of several triggers has its images among the M."""

    clean: Tensor
    y_true: Tensor
    triggered: Tensor | None = None
    wanted: Tensor | None = None
    shown: Tensor | None = None
    parts: dict[str, slice] = field(default_factory=dict)


def look(net: nn.Module, attack: Attack, test: Split) -> Seen:
    """The net's predictions on all of `test`, and on its triggered images where the attack would change the label."""
    net = net.to(test.x.device)
    clean = predict(net, test.x), test.y_true
    if not attack.has_trigger:
        return Seen(*clean)
    triggered = attack.to(test.x.device).triggered(test)
    sets = attack.by_trigger(test)
    ends = pairwise(accumulate(map(len, sets.values()), initial=0))
    parts = {name: slice(*end) for name, end in zip(sets, ends, strict=True)}
    return Seen(*clean, predict(net, triggered.x), triggered.y, triggered.y_true, parts)


def score(seen: Seen) -> dict[str, float | None]:
    """ACC on all clean images; ASR and RA on the triggered ones, and for each of several triggers: asr_NAME, ra_NAME.

    Without a trigger (attack=none) ASR and RA are None: there is nothing to succeed, which is not a success rate of 0.
    """
    scores = {"acc": metrics.acc(seen.clean, seen.y_true), "asr": None, "ra": None}
    if seen.triggered is not None:
        for name, part in {"": slice(None), **{f"_{n}": p for n, p in seen.parts.items()}}.items():
            scores[f"asr{name}"] = metrics.asr(seen.triggered[part], seen.wanted[part])
            scores[f"ra{name}"] = metrics.ra(seen.triggered[part], seen.shown[part])
    return scores


def evaluate(net: nn.Module, attack: Attack, test: Split) -> dict[str, float | None]:
    """The scores of one net; see `look` and `score`."""
    return score(look(net, attack, test))


def scrambled_asr(net: nn.Module, attack: Attack, test: Split) -> float | None:
    """The control of an ASR: the same with what the trigger changes of an image moved to other pixels, by one permutation.

    It has the size and values of the trigger, not its pattern. As high as the ASR, it says that the net answers to any grain:
    the backdoor has spread beyond its pattern, or the net takes noise that way without one. None without a trigger, or with
    several.
    """
    if not attack.has_trigger or attack.by_trigger(test):
        return None
    triggered = attack.to(test.x.device).triggered(test)
    clean = test.x[attack.relabel(test.y_true) != test.y_true]
    order = torch.randperm(clean[0, 0].numel(), generator=Generator().manual_seed(0)).to(clean.device)
    x = [scrambled(c.to(torch.int16), t, order) for c, t in zip(clean.split(4096), triggered.x.split(4096), strict=True)]
    return metrics.asr(predict(net.to(clean.device), torch.cat(x)), triggered.y)


def scrambled(clean: Tensor, triggered: Tensor, order: Tensor) -> Tensor:
    moved = (triggered - clean).flatten(2)[..., order].view_as(clean)
    return (clean + moved).clamp(0, 255).to(torch.uint8)


def flagged(before: Seen, after: Seen) -> dict[str, float | None]:
    """Detection by disagreement (CNPD): an input is flagged where the repaired net's label differs from the attacked
    net's. tpr: share of the triggered images that are flagged; fpr: of the clean ones."""
    tpr = None if before.triggered is None else metrics.share(before.triggered != after.triggered)
    return {"tpr": tpr, "fpr": metrics.share(before.clean != after.clean)}
