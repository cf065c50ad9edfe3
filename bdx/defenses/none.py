"""none: the net as it came, the "no defense" rows of every table.

Source: all four papers.
"""

from __future__ import annotations

from bdx.defenses.base import Defense


class NoDefense(Defense):
    needs = frozenset()
    trains = "nothing"
    cost = "nothing"

    def run(self, data, make_trainer):
        return self.net
