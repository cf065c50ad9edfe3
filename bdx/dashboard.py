"""`bdx dashboard`: the runs of a table as a W&B report: ACC against ASR of each defense, DER of every attack under every
defense, time against DER. Asks for wandb-workspaces, which is an extra. No torch in here.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from importlib.util import find_spec

from bdx import results
from bdx.configure import compose
from bdx.errors import UserError
from bdx.report import measured, run_id
from bdx.tables import Measured, helped, notes, read

USAGE = "bdx dashboard NAME [scale=…] [key=value …] [logger.project=…] [logger.entity=…]"
PERCENT, WIDE = (8, 6), (24, 14)  # panels: columns of the 24 that a report has, and rows


def dashboard(argv: list[str]) -> int:
    """`bdx dashboard NAME [scale=…] [key=value …]`: save the report beside the table's runs and print where it is. Started
    again, it is the same report, brought up to date."""
    if helped(argv, USAGE, "a table's runs as a W&B report, which is brought up to date where it is there already"):
        return 0
    if find_spec("wandb_workspaces") is None:
        raise UserError("bdx dashboard needs wandb-workspaces, which is not installed: pip install 'bdx[report]'")
    logger, words = [w for w in argv if w.startswith("logger")], [w for w in argv if not w.startswith("logger")]
    found = read(words, USAGE)
    if not measured(found):
        raise UserError(f"{found.table.name}: nothing is measured at scale={found.scale.name}; `bdx sweep` measures it")
    settings = compose(["logger=wandb", *(w for w in logger if w != "logger=wandb")]).logger
    print(f"dashboard   {save(found, run_id(words), settings.project, entity_of(settings))}")
    return 0


def entity_of(settings) -> str:
    """Whose project it is: what logger.entity says, else the one that the key belongs to."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError("bdx dashboard: W&B has no API key here; `wandb login` stores one")
    with answered():
        return settings.entity or wandb.Api().default_entity


@contextmanager
def answered():
    """What W&B answers a mistake with, as one line."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.Error, WandbApiFailedError, ValueError, TimeoutError) as e:
        raise UserError(f"bdx dashboard: {' '.join(str(e).split())}") from None


def save(found: Measured, table_run: str, project: str, entity: str) -> str:
    """Write the report to W&B; returns its address. Which report it is stands beside the page of `bdx report`."""
    import wandb_workspaces.reports.v2 as wr

    name = f"{found.table.name.replace('/', '_')}_{found.scale.name}"
    sheet = found.paths["out"] / "reports" / f"{name}.dashboard.json"
    known = json.loads(sheet.read_text()) if sheet.exists() else {}
    with answered():
        report = wr.Report(
            project=project, entity=entity, title=f"{found.table.name}, scale={found.scale.name}",
            description=found.table.title, width="fluid", blocks=blocks(wr, found, table_run, project, entity),
        )  # fmt: skip
        if (known.get("project"), known.get("entity")) == (project, entity):
            report.id = known["id"]
        report.save()
        address = report.url
    results.write_atomically(sheet, json.dumps({"project": project, "entity": entity, "id": report.id}))
    return address


def by_defense(found: Measured) -> dict[str, list[str]]:
    """Defense -> ids of its runs, which are W&B's ids as well; what stands in for undefended nets is left out."""
    ids: dict[str, list[str]] = {}
    for e in measured(found):
        if (name := e.cell.at.get("defense", "all")) != "none":
            ids.setdefault(name, []).extend(r["id"] for r in e.ours)
    return ids


def blocks(wr, found: Measured, table_run: str, project: str, entity: str) -> list:
    """wr: wandb_workspaces.reports.v2. A panel's runs are named by their ids: a group of W&B's would mix scales."""
    from wandb_workspaces.expr import Metric

    runs = {name: wr.Runset(entity=entity, project=project, name=name, filters=[Metric("ID").isin(ids)])
            for name, ids in ({"table": [table_run]} | by_defense(found)).items()}  # fmt: skip
    table = runs.pop("table")
    summary = wr.SummaryMetric
    share = {"range_x": (0.0, 1.0), "range_y": (0.0, 1.0), "layout": wr.Layout(0, 0, *PERCENT)}
    trade = [
        block
        for name, of in runs.items()
        for block in (
            wr.H3(text=name),
            wr.PanelGrid(runsets=[of], hide_run_sets=True, panels=[
                wr.ScatterPlot(title=f"{name}: ACC against ASR", x=summary("asr"), y=summary("acc"), **share)
            ]),
        )
    ]  # fmt: skip
    wide = {"layout": wr.Layout(0, 0, *WIDE)}
    heat = wr.MediaBrowser(title="DER, attack by defense", media_keys=["der"], num_columns=1, **wide)
    page = wr.MediaBrowser(title="the table", media_keys=["report"], num_columns=1, **wide)
    time = wr.ScatterPlot(title="DER against time", x=summary("seconds_defense"), y=summary("der"), log_x=True, **wide)
    return [
        wr.UnorderedList(items=notes(found.table, found.entries)),
        wr.H2(text="DER"), wr.PanelGrid(runsets=[table], hide_run_sets=True, panels=[heat]),
        wr.H2(text="ACC against ASR, one plot for each defense"), *trade,
        wr.H2(text="Time of a defense against DER"), wr.PanelGrid(runsets=list(runs.values()), panels=[time]),
        wr.H2(text="The table"), wr.PanelGrid(runsets=[table], hide_run_sets=True, panels=[page]),
    ]  # fmt: skip
