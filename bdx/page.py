"""One HTML page in one file: no script, nothing loaded from anywhere, fit for a phone, for light and dark."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from bdx.layout import Text

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --soft: #666; --line: #ddd; --shade: #f5f5f4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e8e6e3; --soft: #a0a0a0; --line: #3a3d41; --shade: #1f2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p, ul { margin: .5rem 0; } ul { padding-left: 1.2rem; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th { background: var(--shade); font-weight: 600; } td.word, th.word { text-align: left; }
tr.empty { color: var(--soft); }
tr > :first-child { position: sticky; left: 0; background: var(--page); } thead tr > :first-child { background: var(--shade); }
tr.first td { border-top: 1px solid var(--line); }
td.heat { text-align: center; border: 2px solid var(--page); min-width: 4.5rem; line-height: 1.25; }
td small { display: block; opacity: .85; font-size: .7rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: .5rem; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); }
svg, img { width: 100%; height: auto; display: block; } img { image-rendering: pixelated; }
.keys span { margin-right: 1rem; white-space: nowrap; } .keys i { display: inline-block; width: .7em; height: .7em;
  border-radius: 50%; margin-right: .35em; }
pre { margin: .3rem 0; padding: .6rem; overflow-x: auto; background: var(--shade); border-radius: 4px; font-size: .8rem; }
summary { cursor: pointer; } details { margin: .5rem 0; }
"""
# Whatever else a browser might be talked into, it may load nothing and run nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def whole(title: str, parts: list[str]) -> str:
    head = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body>\n</html>\n"])


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *parts, "</section>"])


def text(what: str, kind: str = "") -> str:
    return f"<p class={kind}>{escape(what)}</p>" if kind else f"<p>{escape(what)}</p>"


def items(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def code(lines: list[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def folded(title: str, *parts: str) -> str:
    return "\n".join([f"<details><summary>{escape(title)}</summary>", *parts, "</details>"])


def table(head: list[str], rows: list[list[Text]], words: int) -> str:
    """In a box that scrolls by itself. words: how many of the first columns are no numbers; the last may count rows."""
    around = {"": "{}", "best": "<b>{}</b>", "second": "<u>{}</u>"}
    kind = lambda i: " class=word" if i < words else ""
    top = "".join(f"<th{kind(i)}>{escape(h)}</th>" for i, h in enumerate(head))
    lines, last = [], None
    for row in rows:
        cells = "".join(f"<td{kind(i)}>{around[t.mark].format(escape(t.text))}</td>" for i, t in enumerate(row))
        kinds = [k for k, yes in (("first", row[0].text != last), ("empty", row[-1].text == "0")) if yes]
        lines.append(f'<tr class="{" ".join(kinds)}">{cells}</tr>')
        last = row[0].text
    return "\n".join(["<div class=scroll><table>", f"<thead><tr>{top}</tr></thead>", *lines, "</table></div>"])


def heat(head: list[str], rows: list[tuple[str, list[tuple[str, str, str, str] | None]]]) -> str:
    """rows: label and its cells, (text, small text below it, colour behind, colour of the text), or None."""
    top = "".join(f"<th style='text-align:center'>{escape(h)}</th>" for h in head)
    lines = []
    for label, cells in rows:
        made = "".join(
            "<td class=heat>–</td>" if c is None
            else f'<td class=heat style="background:{c[2]};color:{c[3]}">{escape(c[0])}<small>{escape(c[1])}</small></td>'
            for c in cells
        )  # fmt: skip
        lines.append(f"<tr><td class=word>{escape(label)}</td>{made}</tr>")
    return "\n".join(["<div class=scroll><table>", f"<thead><tr>{top}</tr></thead>", *lines, "</table></div>"])


def keys(colours: dict[str, str]) -> str:
    """A legend. colours: name -> colour."""
    spans = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f"<p class=keys>{' '.join(spans)}</p>"


def panels(figures: list[str], wide: bool = False) -> str:
    return "\n".join([f'<div class="panels{" wide" if wide else ""}">', *figures, "</div>"])


def picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    about = escape(caption, quote=True)
    return f'<figure><img alt="{about}" src="data:image/png;base64,{data}"><figcaption>{about}</figcaption></figure>'
