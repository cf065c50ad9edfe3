"""instantiate: the only door from configuration to code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import hydra.errors
import hydra.utils
from omegaconf import DictConfig, OmegaConf

from bdx.errors import UserError

ALLOWED = ("bdx.", "torch.optim.", "torch.nn.", "torchvision.models.", "timm.create_model")


def targets(node) -> Iterator[str]:
    """Every `_target_` in a nested dict or list."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from targets(child)


def instantiate(node: DictConfig | dict, *, allowed: tuple[str, ...] = ALLOWED, **extra):
    """Build what `node` describes: `_target_` names a class or function, `_partial_` leaves it to be called later.

    Only targets from `allowed` are imported: a configuration that came with somebody's model must not name os.system.
    Raises UserError where the target is not allowed, does not exist, or does not take the keys given.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    for target in targets(plain):
        if not any(target == a or (a.endswith(".") and target.startswith(a)) for a in allowed):
            raise UserError(f"_target_={target} is not allowed here; allowed are {', '.join(a + '*' for a in allowed)}")
    name = plain["_target_"]
    try:
        build = hydra.utils.instantiate({**plain, "_partial_": True}, _convert_="all")
    except hydra.errors.InstantiationException as e:
        if isinstance(e.__cause__, UserError):
            raise e.__cause__ from None
        raise UserError(f"cannot build {name}: {str(e).splitlines()[0]}") from e
    partial = plain.get("_partial_", False)
    try:
        signature = inspect.signature(build)
        signature.bind_partial(**extra) if partial else signature.bind(**extra)
    except TypeError as e:
        raise UserError(f"cannot build {name}: {e}") from None
    return functools.partial(build, **extra) if partial else build(**extra)
