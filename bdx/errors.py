"""The one exception that a user's mistake ends in; the command line prints it as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was asked, what was found, and what would do."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """' (did you mean a, b?)', or nothing where nothing is near."""
    names, tail = list(dict.fromkeys(names)), name.rsplit(".", 1)[-1]
    alike = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    # a dotted name may be right but for the place it stands in: defense.lr is defense.optimizer.lr
    moved = [o for o in names if o.rsplit(".", 1)[-1] == tail]
    group = [o for o in moved if o.partition(".")[0] == name.partition(".")[0]]
    near = list(dict.fromkeys([*group, *alike, *moved]))[:n]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def one_of(key: str, value, choices: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of `choices`; `key` as it is written on the command line."""
    if value not in (choices := list(choices)):
        expected = " or ".join(choices) if len(choices) < 3 else f"one of {', '.join(choices)}"
        raise UserError(f"{key}={value}: expected {expected}{nearest(str(value), choices)}")
