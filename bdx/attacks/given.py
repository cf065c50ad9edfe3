"""given: a net that came from elsewhere, with whatever backdoor it may have. Nothing is trained, no trigger is known.

The weights are read as tensors alone, a pickled payload is refused unread, and must fit the architecture key by key. ASR, RA
and DER have no meaning then; ACC on the reserved and on the test images says what a repair costs.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bdx.attacks.base import Attack
from bdx.errors import UserError
from bdx.split import Split


class Given(Attack):
    """file    weights: .safetensors, or what torch.save has written of tensors alone (a state_dict)
    entry   where the file holds more than a state_dict: the name under which that lies
    prefix  of every key, which this net's keys lack; `module.` of a net saved from DataParallel

    Keys are those of the architecture (conv1.weight …), of a whole net of bdx with its Normalize (body.conv1.weight …), or of
    a backdoor in its store (net.body.conv1.weight …, beside what the attack keeps there).
    """

    leaves_poison = False
    has_trigger = False
    trained_here = False

    def __init__(self, net, *, file: str | None, entry: str | None, prefix: str, **common):
        super().__init__(net, **common)
        self.file, self.entry, self.prefix = file, entry, prefix

    def trigger(self, x: Tensor) -> Tensor:
        return x

    def check(self, split: Split) -> None:
        if self.file is None:
            raise UserError("attack=given needs attack.file=PATH, the weights of the net to repair (.safetensors or .pt)")
        found = tensors(Path(self.file).expanduser(), self.entry)
        if odd := [k for k in found if not k.startswith(self.prefix)]:
            raise UserError(f"attack.prefix={self.prefix}: {len(odd)} keys of {self.file} do not begin so, {odd[0]} for one")
        found = {k.removeprefix(self.prefix): v for k, v in found.items()}
        if any(k.startswith("net.body.") for k in found):
            found = {k.removeprefix("net."): v for k, v in found.items() if k.startswith("net.")}
        whole = any(k.startswith("body.") for k in found)
        if bad := [k for k, v in found.items() if v.is_floating_point() and not v.isfinite().all()]:
            raise UserError(
                f"attack.file={self.file}: {len(bad)} of its {len(found)} tensors hold NaN or infinity, {bad[0]} for one: the "
                "file is broken, or of a training that diverged"
            )
        net, name = (self.net, "whole net") if whole else (self.net.body, type(self.net.body).__name__)
        fits(found, net.state_dict(), f"attack.file={self.file} does not fit the {name}", self.prefix)
        net.load_state_dict(found)

    def fit(self, data, make_trainer, checkpoint=None) -> None:
        """Nothing: `check` has read the weights."""


def tensors(path: Path, entry: str | None) -> dict[str, Tensor]:
    """The state_dict in `path`. Raises UserError for a file that holds anything but tensors, without having run it."""
    if not path.is_file():
        raise UserError(f"attack.file={path}: there is no such file")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"attack.file={path} holds Python objects beside tensors, which could run code when they are read: refused; ask "
            "for the state_dict alone, or for .safetensors"
        ) from None
    except Exception as e:  # whatever a reader makes of broken bytes
        size = path.stat().st_size
        why = f"{size:,} bytes; {type(e).__name__}: {' '.join(str(e).split())[:100]}" if size else "it is empty"
        raise UserError(
            f"attack.file={path} cannot be read as weights ({why}): expected a whole state_dict, as "
            ".safetensors or as torch.save writes it"
        ) from None
    if entry is not None:
        if not isinstance(found, dict) or not isinstance(found.get(entry), dict):
            raise UserError(f"attack.entry={entry}: {path} has no state_dict of that name{listed(found)}")
        found = found[entry]
    if isinstance(found, dict) and not found:
        raise UserError(f"attack.file={path} holds nothing: expected a state_dict with the weights of a net")
    others = {k: v for k, v in found.items() if not isinstance(v, Tensor)} if isinstance(found, dict) else None
    if others is None or any(isinstance(v, dict) for v in others.values()):
        raise UserError(f"attack.file={path} is no state_dict{listed(found)}; name the one in it by attack.entry")
    if others:
        first = ", ".join(f"{k} (a {type(v).__name__})" for k, v in list(others.items())[:5])
        raise UserError(f"attack.file={path} holds more than tensors: {first}; take those out, and save the state_dict alone")
    return found


def listed(found: object) -> str:
    if not isinstance(found, dict):
        return f", but a {type(found).__name__}"
    return f": it holds {', '.join(map(str, list(found)[:5]))}" + f" and {len(found) - 5} more" * (len(found) > 5)


def fits(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, prefix: str = "") -> None:
    """Raise UserError unless keys and shapes are equal. prefix: what has been taken off the keys."""
    lacks, more = [k for k in wanted if k not in found], [k for k in found if k not in wanted]
    if lacks or more:
        both = ((lacks, "missing"), (more, "unknown"))
        first = ", ".join(f"{len(keys)} {word} ({keys[0]} for one)" for keys, word in both if keys)
        parts = more[0].split(".") if more else []
        for head in ("".join(f"{part}." for part in parts[:n]) for n in (1, 2, 3)):
            if head and {k.removeprefix(head) for k in found if k.startswith(head)} == set(wanted):
                raise UserError(f"{what}: its keys begin with {prefix}{head}; set attack.prefix={prefix}{head}")
        raise UserError(f"{what}: of its {len(wanted)} keys, {first}; see arch=…, attack.prefix, attack.entry")
    if odd := [k for k in wanted if wanted[k].shape != found[k].shape]:
        shapes = f"{tuple(found[odd[0]].shape)} and not {tuple(wanted[odd[0]].shape)}"
        raise UserError(
            f"{what}: {len(odd)} tensors have other shapes, {odd[0]} {shapes}; see arch=… and the number of classes"
        )
