"""`bdx report`: the page says what the rows say, loads nothing, and fits a phone; the same table in W&B."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest
import wandb
from PIL import Image
from test_tables import cells, row, write
from test_tracking_wandb import KEY, Records, bare, nobody, seclude  # noqa: F401
from wandb_stub import Stub

from bdx import charts, page, report, sweep
from bdx.cli import dispatch
from bdx.comparison import Entry
from bdx.configure import compose
from bdx.errors import UserError
from bdx.grid import Cell
from bdx.sweep import Plan

pytestmark = pytest.mark.usefixtures("no_rows_but_these")
NAME, WORDS = "npd2023/table01", ("attack=badnets,blended,nobody", "defense=none,ft,npd")
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Three rows of two attacks and two defenses; what a run leaves beside its net, for the first of them."""
    root = tmp_path_factory.mktemp("report")
    by = {(c.at["attack"], c.at["defense"]): c for c in cells(NAME, "cpu", *WORDS) if not c.lacks}
    same = {"backdoor": "b" * 16, "finished": "2026-11-21T10:00:00+00:00", "seconds_defense": 1.0}
    first = row(by["badnets", "npd"], acc=0.8125, asr=0.0625, der=0.925, **same)
    others = row(by["badnets", "npd"], 1, acc=0.8125, asr=0.0625, der=0.925, **same), row(by["blended", "npd"], der=0.6, **same)
    write(root / "results", first, *others)
    log = root / "nets" / f"{first['id']}.log"
    log.mkdir(parents=True)
    Image.linear_gradient("L").convert("RGB").resize((24, 24)).save(log / "trigger.png")
    Image.linear_gradient("L").convert("RGB").resize((8, 8)).save(log / "grad_cam.png")
    curves = "stage,epoch,name,value\nNPD,1,loss,2.5\nNPD,2,loss,1.5\nNPD,1,lr,0.1\nNPD,2,lr,0.1\nNPD,2"
    (log / "curves.csv").write_text(curves)
    for folder, sheet, sha in ((root / "nets" / first["id"], "net.json", "1"), (root / "store" / ("b" * 16), "meta.json", "2")):
        folder.mkdir(parents=True)
        (folder / sheet).write_text(json.dumps({"sha256": 64 * sha}))
    return root


def made(root, *words: str) -> str:
    assert dispatch(["report", NAME, "scale=cpu", f"paths.out={root}", *(words or WORDS)]) == 0
    return (root / "reports" / "npd2023_table01_cpu.html").read_text()


@pytest.fixture(scope="module")
def text(out):
    return made(out)


def plain(text: str) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>|<style.*?</style>", "", text, flags=re.DOTALL)))


def lines(part: str) -> dict[str, list[str]]:
    """First fields -> all fields of a table's rows."""
    fields = [[" ".join(plain(c).split()) for c in re.findall(r"<td.*?</td>", r)] for r in re.findall(r"<tr.*?</tr>", part)]
    return {" ".join(f[:2]): f for f in fields if f}


def section(text: str, title: str) -> str:
    (found,) = re.findall(rf"<section>\n<h2>{re.escape(title)}</h2>(.*?)</section>", text, re.DOTALL)
    return found


def test_table_holds_ours_the_printed_and_the_difference(text):
    """Printed: NPD Table 1, BadNets: 88.93 / 1.26 / 94.82."""
    found = lines(section(text, "The table"))
    assert found["badnets npd"][2:] == [
        "81.25 ± 0.00", "88.93", "-7.68", "6.25 ± 0.00", "1.26", "+4.99", "92.50 ± 0.00", "94.82", "-2.32", "2",
    ]  # fmt: skip
    assert found["badnets none"][2:8] == ["90.00 ± 0.00", "91.82", "-1.82", "100.00 ± 0.00", "93.79", "+6.21"]
    assert found["badnets ft"][2] == "–"


def test_heat_map_is_of_der(text):
    found = lines(section(text, "DER, in percent"))
    assert found["badnets 92.50 94.82"] == ["badnets", "92.50 94.82"]  # ours, and printed; ft is neither run nor printed
    assert f"background:{charts.shade(92.5, 50, 100)[0]}" in text


def test_shade_runs_from_dark_to_bright():
    (low, on_low), (high, on_high) = charts.shade(10, 50, 100), charts.shade(100, 50, 100)
    assert (low, on_low, high, on_high) == ("#440154", "#fff", "#fde725", "#111")  # the ends of viridis


def test_pictures_and_curves_are_those_of_the_runs(text, out):
    log = next((out / "nets").glob("*.log"))
    for name, title in (("trigger", "Triggers"), ("grad_cam", "Figures of the runs")):
        (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', section(text, title))
        assert base64.b64decode(data) == (log / f"{name}.png").read_bytes()
    assert "no picture at hand of blended" in text
    assert section(text, "Curves").count("<svg") == 1  # the learning rate is left out, and so is the line cut in half


def test_what_is_missing_is_named_with_its_command(text):
    part = plain(section(text, "What is missing"))
    assert "attack=nobody: nobody none, nobody ft, nobody npd" in part
    assert re.search(r"^bdx experiment=cpu_scale attack=blended defense=ft paths.out=\S+ defense.epochs=33", part, re.MULTILINE)
    assert "bdx sweep npd2023/table01 scale=cpu" in plain(section(text, "Commands"))


def test_hardware_counts_each_row_once(text):
    (line,) = lines(section(text, "Versions and hardware")).values()
    assert (line[0], line[-4:]) == ("toy", ["2026-11-21", "2026-11-21", "3", "3"])


class Links(HTMLParser):
    """What a page refers to, and elements that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.open, self.wrong, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, given):
        self.links += [v for k, v in given if k in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [v for k, v in given if k == "id"]
        if tag not in ("meta", "img", "br", "li", "td", "th", "tr", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, given):
        self.handle_starttag(tag, given)
        self.open = self.open[:-1] if tag not in ("meta", "img") else self.open

    def handle_endtag(self, tag):
        if tag not in ("li", "td", "th", "tr") and self.open.pop() != tag:
            self.wrong.append(tag)


def test_page_is_whole_and_refers_to_nothing_else(text):
    found = Links(text)
    assert (found.open, found.wrong) == ([], [])
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert "<script" not in text
    assert 'name="viewport" content="width=device-width' in text


def test_the_same_rows_make_the_same_page(text, out):
    assert made(out) == text


def test_without_any_row_the_page_says_so(tmp_path, capsys):
    text = made(tmp_path, "attack=lf", "defense=none,npd", "seed=99")
    assert "Nothing of this table has been measured yet" in text
    assert "bdx sweep npd2023/table01 scale=cpu" in plain(text)
    assert not re.findall("<img|<svg", text)
    said = capsys.readouterr().out.splitlines()
    assert said == ["0 rows, 0 of 2 cells measured", f"report   {tmp_path / 'reports' / 'npd2023_table01_cpu.html'}"]


def test_what_a_name_holds_is_text():
    assert "<b>" not in page.text("<b>", "soft").removeprefix("<p class=soft>")
    assert page.code(["a & b"]) == "<pre>a &amp; b</pre>"


def test_scatter_has_a_plot_for_each_defense():
    entry = lambda defense, **of: Entry(Cell({"attack": "a", "defense": defense}, ()), [{"acc": 0.5, "acc_before": 0.9, **of}])
    both = {"asr": 0.1, "asr_before": 1.0}
    plots = charts.trade_offs([entry("x", **both), entry("y", **both), entry("none", **both), entry("z")], {"a": "#ff0000"})
    assert [re.search('aria-label="([^"]*)"', p)[1] for p in plots] == ["ACC against ASR of x", "ACC against ASR of y"]
    assert all("#ff0000" in p and charts.INK not in p and "currentColor" in p for p in plots)


@pytest.mark.parametrize(("argv", "match"), [
    ([NAME, "logger=csv"], "logger=csv: expected none or wandb"), ([], "expected `bdx report"),
    (["npd2023/tabel01"], "no such table .did you mean npd2023/table01"),
])  # fmt: skip
def test_a_mistake_is_answered_in_one_line(argv, match):
    with pytest.raises(UserError, match=match):
        report.report(argv)


# in a browser

PROBE = """<!doctype html><title>probe</title><iframe width={width} height=800 srcdoc="{page}"></iframe><pre id=said></pre>
<script>
window.onerror = what => {{ said.textContent += 'error ' + what }};
window.onload = () => {{
  const frame = document.querySelector('iframe').contentDocument, root = frame.documentElement;
  const asked = frame.defaultView.performance.getEntriesByType('resource').map(e => e.name);
  const loaded = asked.filter(n => !n.startsWith('data:'));
  const boxes = [...frame.querySelectorAll('.scroll')].filter(b => b.getBoundingClientRect().right > {width}).length;
  const broken = [...frame.images].filter(i => !i.naturalWidth).length;
  said.textContent += JSON.stringify([root.scrollWidth, root.clientWidth, boxes, loaded, broken, frame.images.length]);
}};
</script>"""


QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser_nothing_is_loaded_and_nothing_is_too_wide(text, tmp_path, width):
    (tmp_path / "probe.html").write_text(PROBE.format(width=width, page=escape(text, quote=True)))
    ran = subprocess.run(
        [CHROMIUM, *QUIET, "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'user'}", "--window-size=1400,900",
         "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    wide, seen, boxes, loaded, broken, images = json.loads(re.search("<pre id=.said.>(.*?)</pre>", ran.stdout, re.DOTALL)[1])
    assert (wide, boxes, loaded, broken, images) == (seen, 0, [], 0, 2)
    assert seen <= width
    assert "Content Security Policy" not in ran.stderr
    assert "CONSOLE" not in ran.stderr


# in W&B

FRAMES = ("table", "cells", "weights")


@pytest.fixture(scope="module", autouse=True)
def leave_no_service():
    yield
    wandb.teardown()


def test_table_run_lies_offline_without_a_key(out, tmp_path, monkeypatch, nobody):  # noqa: F811
    seclude(monkeypatch, tmp_path, nobody)
    made(out, *WORDS, "logger=wandb")
    records = Records(out / "reports")
    (run,) = records.of("run")
    assert (run["run_group"], run["job_type"], run["display_name"]) == (NAME, "table", NAME)
    about = {"table": NAME, "scale": "cpu", "cells": 9, "measured": 4}
    assert about.items() <= records.summary.items()
    table, several, weights = (
        list(csv.reader((records.folder / "files" / f"{name}.csv").read_text().splitlines())) for name in FRAMES
    )
    assert table[0][:3] == ["attack", "defense", "ACC"]
    assert (table[3][:3], table[3][-1]) == (["badnets", "npd", "81.25 ± 0.00"], "2")
    assert sorted(line[-1] for line in several[1:]) == sorted(p.stem for p in (out / "results").glob("*.json"))
    assert ["1" * 64, "b" * 16, "2" * 64] in [line[1:] for line in weights]
    item = {k: v for r in records.rows for k, v in r.items()}
    assert "<h2>The table</h2>" in (records.folder / "files" / item["report.path"]).read_text()
    assert [e["exit_code"] for e in records.of("exit")] == [0]


def test_table_run_reaches_the_server_with_its_files(out, tmp_path, monkeypatch, capfd):
    with Stub() as stub:
        seclude(monkeypatch, tmp_path, stub.url, KEY)
        made(out, *WORDS, "logger=wandb", "logger.mode=online")
    (run,) = stub.runs.values()
    assert (run.about["groupName"], run.about["jobType"], run.exit_codes) == (NAME, "table", [0])
    assert bare(run.summary)["measured"] == 4
    assert any(name.endswith(".html") and b"<h2>The table</h2>" in body for name, body in run.files.items())
    assert {f"{name}.csv" for name in FRAMES} <= set(run.files)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "group"), [(["logger=wandb"], NAME), (["logger=wandb", "logger.group=mine"], "mine"), ([], None)]
)
def test_cells_of_a_sweep_stand_in_the_group_of_their_table(words, group, monkeypatch, tmp_path):
    seen = []
    empty = Plan([], {"results": tmp_path})
    monkeypatch.setattr(sweep, "plan", lambda table, scale, words, *_, **__: seen.extend(words) or empty)
    assert sweep.sweep([NAME, "scale=cpu", *words]) == 0
    assert [w for w in seen if w.startswith("logger.group=")] == ([f"logger.group={group}"] if group else [])
    assert compose(["experiment=cpu_scale", *seen]).logger.get("group") == group


@pytest.mark.parametrize(("words", "match"), [
    (["logger.project=x"], "logger.project=x: nothing is sent anywhere; expected logger=wandb beside it, or neither"),
    (["logger=none", "logger.group=x"], "logger.group=x: nothing is sent"), (["loggr=wandb"], "loggr: no such key"),
    (["logger=csv"], "logger=csv: expected none or wandb"), (["attack=badnetz"], "no cell can run, for want of attack=badnetz"),
])  # fmt: skip
def test_words_that_would_do_nothing_are_refused(words, match, tmp_path):
    with pytest.raises(UserError, match=match):
        report.report([NAME, "scale=cpu", f"paths.out={tmp_path}", *words])
    assert not list(tmp_path.iterdir())
