"""instantiate: the only door from configuration to code."""

from __future__ import annotations

import functools
import importlib.util
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


def check_target(target: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError unless `target` exists, stands below `allowed`, and is defined there too: a module's own imports
    (bdx.polarizers.torch.load) and what the base classes use to read and write are no targets."""
    below = tuple(a for a in allowed if a.endswith("."))  # the others are targets by their full name
    text = f"_target_={target} is not allowed here; allowed are {', '.join(a + '*' * (a in below) for a in allowed)}"
    if target not in allowed and not str(target).startswith(below):
        raise UserError(text)
    if importlib.util.find_spec(root := str(target).partition(".")[0]) is None:  # one of `allowed`, so bdx has an extra for it
        raise UserError(f"_target_={target} needs {root}, which is not installed: pip install 'bdx[{root}]'")
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, AttributeError, ValueError) as e:
        missing = getattr(e, "name", None) or target
        why = broken(str(target)) or f"{missing} is not there, or not installed"
        raise UserError(f"_target_={target} cannot be found: {why}") from None
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if target not in allowed and (not home.startswith(below) or ".base." in home):
        raise UserError(text)


def broken(target: str) -> str:
    """What its module raises as it is imported; empty where it can be, or is not there."""
    try:
        importlib.import_module(target.rpartition(".")[0])
    except ModuleNotFoundError:
        return ""
    except Exception as e:
        return f"its module raises {type(e).__name__}: {' '.join(str(e).split())}"
    return ""


def instantiate(node: DictConfig | dict, *, allowed: tuple[str, ...] = ALLOWED, **extra):
    """Build what `node` describes: `_target_` names a class or function, `_partial_` leaves it to be called later.

    Only targets from `allowed` are imported: a configuration that came with somebody's model must not name os.system.
    Raises UserError where the target is not allowed, does not exist, or does not take the keys given.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    for target in targets(plain):
        check_target(target, allowed)
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
    except (TypeError, ValueError) as e:
        raise UserError(f"cannot build {name}: {e.__cause__ or e.__context__ or e}") from None
    return functools.partial(build, **extra) if partial else build(**extra)
