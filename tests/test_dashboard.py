"""`bdx dashboard` and the table's run: what reaches a W&B that answers on 127.0.0.1, and what lies offline."""

from __future__ import annotations

import json
import re

import pytest
import wandb
from test_tables import cells, row, write
from test_tracking_wandb import KEY, Records, bare, nobody, seclude  # noqa: F401
from wandb_stub import Stub

from bdx import dashboard as module
from bdx.cli import dispatch
from bdx.dashboard import dashboard
from bdx.errors import UserError
from bdx.report import run_id

NAME = "npd2023/table01"
WORDS = ["scale=cpu", "attack=badnets,blended", "defense=none,ft,npd"]


class Server(Stub):
    """And what a W&B report asks for. views: id -> the last one saved under it; known: projects that there are."""

    def __init__(self, known: tuple[str, ...] = ("bdx",), **how):
        super().__init__(**how)
        self.views, self.known = {}, known

    def answer(self, query, given):
        name = re.search(r"\b(?:query|mutation)\s+(\w+)", query)[1]
        if name == "ProjectInternalId":
            there = given["projectName"] in self.known
            return {"project": {"id": "p", "internalId": "7"} if there else None}
        if name == "upsertView":
            return {"upsertView": {"view": self.keep(given), "inserted": not given.get("id")}}
        if "viewer" in query:
            self.asked.append(name)
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "GetProjects":
            return {"models": self.projects(given)}
        return super().answer(query, given)

    def keep(self, given: dict) -> dict:
        id = given.get("id") or f"view{len(self.views)}"
        self.views[id] = given | {"spec": json.loads(given["spec"])}
        place = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        said = {k: given[k] for k in ("name", "displayName", "description", "spec", "type")}
        return said | {"id": id, "project": place, "updatedAt": "2026-11-21T10:00:00Z"}

    def projects(self, given: dict) -> dict:
        nodes = [
            {"node": {"id": n, "name": n, "entityName": "me", "createdAt": "", "isBenchmark": False, "user": None}}
            for n in self.known
        ]
        return {"edges": nodes, "pageInfo": {"endCursor": None, "hasNextPage": False}}


@pytest.fixture(scope="module", autouse=True)
def leave_no_service(no_rows_but_these):
    yield
    wandb.teardown()


@pytest.fixture
def out(tmp_path):
    """Rows of two defenses, two seeds of one of them."""
    by = {(c.at["attack"], c.at["defense"]): c for c in cells(NAME, "cpu", *WORDS[1:])}
    same = {"backdoor": "b" * 16, "finished": "2026-11-21T10:00:00+00:00", "seconds_defense": 2.0}
    rows = [row(by["badnets", "ft"], **same), row(by["badnets", "npd"], **same), row(by["badnets", "npd"], 1, **same)]
    write(tmp_path / "results", *rows)
    return tmp_path


def ids(out, defense: str) -> list[str]:
    rows = [json.loads(p.read_text()) for p in (out / "results").glob("*.json")]
    return sorted(r["id"] for r in rows if r["defense"] == defense)


def asked(out, *more: str) -> list[str]:
    return [NAME, *WORDS, f"paths.out={out}", *more]


def grids(view: dict) -> list[tuple[dict[str, list[str]], list[dict]]]:
    """(run set -> the ids it takes, configurations of its panels) of every grid of a report, as the server got them."""
    found = []
    for block in view["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            of = block["metadata"]
            takes = {}
            for runs in of["runSets"]:
                (only,) = runs["filters"]["filters"]
                assert (only["key"], only["op"]) == ({"section": "run", "name": "name"}, "IN")
                assert runs["project"]["name"] == "bdx"
                takes[runs["name"]] = sorted(only["value"])
            found.append((takes, [p | {"config": p["config"]} for p in of["panelBankSectionConfig"]["panels"]]))
    return found


def test_one_table_is_one_run_however_it_is_asked_for():
    same = ([NAME, "attack=badnets,blended"], ["attack=blended,badnets", NAME, "scale=paper", "paths.out=x"])
    assert len({run_id(words) for words in same}) == 1
    assert run_id([NAME, "attack=badnets"]) != run_id([NAME, "attack=badnets", "scale=cpu"])


def test_the_report_has_a_plot_for_each_defense_a_heat_map_and_times(out, tmp_path, monkeypatch, capsys):
    """The keys and ids that its panels name are those of the run that `bdx report logger=wandb` leaves."""
    with Server() as server:
        seclude(monkeypatch, tmp_path, server.url, KEY)
        assert dispatch(["report", *asked(out, "logger=wandb", "logger.mode=online")]) == 0
        capsys.readouterr()
        assert dashboard(asked(out)) == 0
        assert dashboard(asked(out)) == 0  # brought up to date, not a second one
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "bdx", f"{NAME}, scale=cpu")
    (der, [heat]), (ft, [first]), (npd, [second]), (every, [time]), (table, [page]) = grids(view)
    of_table = {"table": [run_id([NAME, *WORDS])]}
    assert (der, heat["viewType"], heat["config"]["mediaKeys"]) == (of_table, "Media Browser", ["der"])
    assert (table, page["config"]["mediaKeys"]) == (of_table, ["report"])
    assert (ft, npd) == ({"ft": ids(out, "ft")}, {"npd": ids(out, "npd")})
    for plot in (first, second):
        assert (plot["viewType"], plot["config"]["xAxis"], plot["config"]["yAxis"]) == (
            "Scatter Plot", "summary:asr", "summary:acc",
        )  # fmt: skip
    assert every == ft | npd
    assert (time["config"]["xAxis"], time["config"]["yAxis"]) == ("summary:seconds_defense", "summary:der")
    run = server.runs[run_id([NAME, *WORDS])]
    logged = {k: v for sent in run.rows for k, v in bare(sent).items()}
    for key, text in (("der", "DER, in percent"), ("report", "The table")):
        assert f"<h2>{text}</h2>" in run.files[logged[key]["path"]].decode()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].startswith("dashboard   ")
    assert "/me/bdx/reports/" in said[0]


def test_the_table_run_carries_the_heat_map_and_figures_offline(out, tmp_path, monkeypatch, nobody):  # noqa: F811
    from PIL import Image

    folder = out / "figures" / "npd2023_fig05_cpu"
    folder.mkdir(parents=True)
    Image.linear_gradient("L").save(folder / "grad_cam_badnets.png")
    seclude(monkeypatch, tmp_path, nobody)
    assert dispatch(["report", *asked(out, "logger=wandb")]) == 0
    records = Records(out / "reports")
    item = {k: v for r in records.rows for k, v in r.items()}
    assert "92.50" not in (heat := (records.folder / "files" / item["der.path"]).read_text())
    assert "90.00" in heat  # the rows' DER
    assert "npd2023/fig05 grad cam badnets" in json.dumps(item)


@pytest.mark.parametrize(("words", "match"), [
    (["npd2023/tabel01"], "no such table .did you mean npd2023/table01"), ([], "expected `bdx dashboard"),
    ([NAME, "scale=smoke", "attack=badnets", "defense=npd"], "nothing is measured at scale=smoke; `bdx sweep`"),
])  # fmt: skip
def test_a_mistake_is_answered_in_one_line(words, match, tmp_path):
    with pytest.raises(UserError, match=match):
        dashboard([*words, f"paths.out={tmp_path}"])


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs wandb-workspaces, which is not installed: pip install 'bdx\[report\]'"):
        dashboard([NAME])


def test_without_a_key_nobody_is_asked(out, tmp_path, monkeypatch):
    with Server() as server:
        seclude(monkeypatch, tmp_path, server.url)
        with pytest.raises(UserError, match="W&B has no API key here; `wandb login` stores one"):
            dashboard(asked(out))
    assert not server.asked


def test_a_project_that_is_not_there_is_named(out, tmp_path, monkeypatch):
    with Server() as server:
        seclude(monkeypatch, tmp_path, server.url, KEY)
        with pytest.raises(UserError, match="project 'team/elsewhere' not found") as e:
            dashboard(asked(out, "logger.entity=team", "logger.project=elsewhere"))
    assert "\n" not in str(e.value)
    assert not server.views
