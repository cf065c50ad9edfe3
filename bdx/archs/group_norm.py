"""group_norm: any net with GroupNorm in place of BatchNorm, for training in which images must not see each other."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from torch import nn


def group_norm(*, net: Callable[..., nn.Module], groups: int, num_classes: int) -> nn.Module:
    """net: a partial of an architecture. Each BatchNorm of C channels becomes gcd(groups, C) groups."""
    body = net(num_classes=num_classes)
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, child = name.rpartition(".")
            norm = nn.GroupNorm(gcd(groups, module.num_features), module.num_features, eps=module.eps)
            setattr(body.get_submodule(parent), child, norm)
    return body
