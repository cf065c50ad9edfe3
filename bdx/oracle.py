"""ORACLE: what a choice made on test data would have had to choose from. Looked at, never fed back.

With eval.oracle=true a run leaves ORACLE_curve.csv beside the repaired net: ACC, ASR and RA on the test images at every
threshold that a defense could have cut at, and after every epoch it could have stopped at. No defense sees any of it, and
the row is the same with and without.
"""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import torch

from bdx import results
from bdx.attacks.base import Attack
from bdx.defenses.base import Defense
from bdx.evaluate import evaluate
from bdx.split import Split

FILE = "ORACLE_curve.csv"
HEAD = ("choice", "value", "ORACLE_acc", "ORACLE_asr", "ORACLE_ra", "chosen_without_test_data")


class Oracle:
    """attack, test: what no defense gets. `seconds`: what looking has cost so far, for the run to leave out."""

    def __init__(self, attack: Attack, test: Split):
        self.attack, self.test, self.seconds = attack, test, 0.0
        self.rows: list[tuple] = []

    def look(self, choice: str, value: float, net, chosen: bool) -> None:
        started, devices = time.monotonic(), [self.test.x.device] if self.test.x.is_cuda else []
        with torch.random.fork_rng(devices):  # a trigger may draw; the training that goes on must not notice
            scores = evaluate(net, self.attack, self.test)
        self.rows.append((choice, value, *(scores[k] for k in ("acc", "asr", "ra")), chosen))
        self.seconds += time.monotonic() - started

    def epoch(self, defense: Defense, stage: str, epoch: int, epochs: int) -> None:
        """After an epoch of the loop that tunes the net itself, the net as it would be if that were the last one."""
        if defense.tunes(stage):
            self.look("epoch", epoch, defense.net, epoch == epochs)

    def thresholds(self, defense: Defense) -> None:
        """All of the grid, once the repair is done; FP's nets are those before its tuning."""
        if defense.replay:
            for value, net in defense.replay.nets(defense.net):
                self.look("threshold", value, net, value == defense.replay.chosen)

    def write(self, folder: Path) -> Path | None:
        """The file, or None where there was nothing to choose."""
        if not self.rows:
            return None
        csv.writer(text := io.StringIO(), lineterminator="\n").writerows([HEAD, *self.rows])
        results.write_atomically(path := folder / FILE, text.getvalue())
        return path
