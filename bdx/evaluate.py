"""evaluate: a net, an attack and the test split -> ACC, ASR and RA."""

from __future__ import annotations

from torch import nn

from bdx import metrics
from bdx.attacks.base import Attack
from bdx.split import Split
from bdx.training import predict


def evaluate(net: nn.Module, attack: Attack, test: Split) -> dict[str, float | None]:
    """ACC on all of `test`; ASR and RA on its triggered images, counted only where the attack would change the label.

    Without a trigger (attack=none) ASR and RA are None: there is nothing to succeed, which is not a success rate of 0.
    """
    net = net.to(test.x.device)
    scores = {"acc": metrics.acc(predict(net, test.x), test.y_true), "asr": None, "ra": None}
    if attack.has_trigger:
        triggered = attack.to(test.x.device).triggered(test)
        pred = predict(net, triggered.x)
        scores |= {"asr": metrics.asr(pred, triggered.y), "ra": metrics.ra(pred, triggered.y_true)}
    return scores
