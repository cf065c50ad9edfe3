"""`bdx detect`: the command. Imports neither torch nor Lightning until a detection starts."""

from __future__ import annotations

import itertools
from pathlib import Path

from rich.table import Table

from bdx import recipe, results
from bdx.configure import compose, options, parse
from bdx.errors import UserError, nearest
from bdx.files import of_a_file
from bdx.screen import Screen, percent

HELP = """bdx detect: which images carry a trigger? Scores images, or the net itself, by a detector and measures it

  bdx detect detector=NAME attack=NAME [dataset=NAME arch=NAME train=NAME] [key=value …]
  bdx detect -m detector=ac,spectral attack=badnets,sig                    a grid, one table
  bdx detect detector=strip detector.limit=1000                            fewer images, where a method is slow

The backdoor is trained, or loaded where `bdx` has trained it. Judged are the poisoned training set (detector.judge=train)
or clean and triggered test inputs (detector.judge=test). detector=nc judges the net: which of its classes have a
trigger, by an anomaly index for each; also a net from elsewhere, attack=given attack.file=PATH. The row lies in
paths.detections; one that is done is shown.
AUC needs no threshold; TPR and FPR are at the method's own. `bdx info detectors` says what each one needs.
"""


def detect(argv: list[str]) -> int:
    if not argv or any(a in ("-h", "--help", "help") for a in argv):
        print(f"{HELP}\n  detector   {' '.join(options('detector'))}")
        return 0
    grid = any(a in ("-m", "--multirun") for a in argv)
    words = [a for a in argv if a not in ("-m", "--multirun")]
    check(words)
    rows, failed = [], []
    for cell, cfg in [(cell, compose(cell)) for cell in (cells(words) if grid else [words])]:
        try:
            rows.append(execute(cfg))
        except (UserError, OSError) as e:
            if not grid or not (isinstance(e, UserError) or of_a_file(e)):
                raise
            failed.append(f"bdx: failed: {' '.join(cell)}: {e}")
    show(rows)
    for text in failed:
        Screen().say(text)
    return 1 if failed else 0


def check(words: list[str]) -> None:
    if unknown := [w for w in words if w.startswith("-") or "=" not in w]:
        near = nearest(unknown[0], ["--help", "--multirun"])
        raise UserError(f"bdx detect {unknown[0]}: expected key=value{near}; `bdx detect --help` shows what there is")
    keys = [o.key_or_group for o in parse(words)]
    if "detector" not in keys:
        raise UserError(f"bdx detect takes a detector: detector=NAME, of {', '.join(options('detector'))}")
    if repair := next((k for k in keys if k.split(".")[0] == "defense"), None):
        raise UserError(f"bdx detect {repair}=…: it looks at the backdoored net, before any defense; leave that out")


def cells(words: list[str]) -> list[list[str]]:
    """Every combination of the values a,b,c."""
    axes = []
    for o in parse(words):
        sweep = o.is_choice_sweep() or o.is_range_sweep()
        axes.append([f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] if sweep else [o.input_line])
    return [list(cell) for cell in itertools.product(*axes)]


def execute(cfg) -> dict:
    screen, names = Screen(), cfg.names
    screen.say(f"{names.detector} on {names.attack}, {names.dataset}, {names.arch}, train={names.train}; seed {cfg.seed}")
    folder = Path(cfg.paths.detections).expanduser()
    row = results.known(cfg, folder, recipe.of_detection)
    if row:
        screen.say(results.DONE)
    else:
        from bdx.detection import detect

        try:
            row = detect(cfg, screen)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    screen.places(row=results.path(folder, row["id"]))
    return row


def show(rows: list[dict]) -> None:
    """AUC, TPR and FPR in percent, with everything that makes the number checkable; of one detection, a line to end with."""
    if not rows:
        return
    table, screen = Table(title=None), Screen()
    if screen.narrow:
        for row in rows:
            screen.say(line(row))
        return
    for name in ("data set", "arch", "attack", "detector", "judged", "seed"):
        table.add_column(name)
    for name in ("AUC", "TPR", "FPR", "flagged", "poisoned", "n", "s"):
        table.add_column(name, justify="right")
    for row in rows:
        names = (str(row[k]) for k in ("dataset", "arch", "attack", "detector", "judged", "seed"))
        shares = (percent(row[k]) for k in ("auc", "tpr", "fpr"))
        counts = (str(row[k]) for k in ("n_flagged", "n_poisoned", "n"))
        table.add_row(*names, *shares, *counts, f"{row['seconds']:.1f}")
    screen.console.print(table)
    for row in rows:
        if len(rows) == 1 or row["judged"] == "net":
            screen.say(line(row))


def line(row: dict) -> str:
    if row["judged"] == "net":
        flagged, above = row["flagged_classes"].split(), row["anomaly_threshold"]
        which = f"class{'es' * (len(flagged) > 1)} {', '.join(flagged)} flagged" if flagged else "no class flagged"
        each = enumerate(row["anomaly_indices"].split())
        indices = ", ".join(f"{k}: {float(n):.2f}{' (above)' * (str(k) in flagged)}" for k, n in each)
        return f"{row['detector']} on {row['attack']}: {which}; anomaly index of each class, threshold {above:g}: {indices}"
    rates = ", ".join(f"{k.upper()} {percent(row[k])}" for k in ("auc", "tpr", "fpr"))
    return f"{row['detector']} on {row['attack']}: {rates} ({row['n_poisoned']} poisoned of {row['n']} images)"
