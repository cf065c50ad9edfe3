"""A table of texts -> Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from dataclasses import dataclass

BESIDE = ("paper", "Δ")  # columns that say more of the one before them


@dataclass(frozen=True)
class Text:
    """One field; mark: best or second."""

    text: str
    mark: str = ""


def markdown(title: str, head: list[str], rows: list[list[Text]], notes: list[str]) -> str:
    around = {"": "{}", "best": "**{}**", "second": "_{}_"}
    lines = [[around[t.mark].format(t.text.replace("|", "\\|")) for t in row] for row in rows]
    wide = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    body = ["| " + " | ".join(t.ljust(w) for t, w in zip(line, wide, strict=True)) + " |" for line in (head, *lines)]
    rule = "|" + "|".join("-" * (w + 2) for w in wide) + "|"
    return "\n".join([f"**{title}**", "", body[0], rule, *body[1:], "", *(f"- {n}" for n in notes)]) + "\n"


def comma(title: str, head: list[str], rows: list[list[Text]], notes: list[str]) -> str:
    """Title, marks and notes are left to the other formats, so that any program reads it; no two columns have one name."""
    out, last, named = io.StringIO(), "", []
    for name in head:
        named.append(f"{last} {name}" if name in BESIDE else name)
        last = last if name in BESIDE else name
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(named)
    writer.writerows([t.text for t in row] for row in rows)
    return out.getvalue()


TEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "{}&%#_$"}
    | {"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"}
    | {"±": "$\\pm$", "Δ": "$\\Delta$", "−": "$-$", "–": "--"}
)


def latex(title: str, head: list[str], rows: list[list[Text]], notes: list[str]) -> str:
    around = {"": "{}", "best": "\\textbf{{{}}}", "second": "\\underline{{{}}}"}

    safe = lambda text: text.translate(TEX)
    lines = [" & ".join(around[t.mark].format(safe(t.text)) for t in row) + " \\\\" for row in rows]
    top = ["\\begin{table}", f"\\caption{{{safe(title)}}}", f"\\begin{{tabular}}{{{'l' * len(head)}}}", "\\hline"]
    said = ["% " + n for n in notes]
    return "\n".join(
        [*said, *top, " & ".join(map(safe, head)) + " \\\\ \\hline", *lines, "\\hline", "\\end{tabular}", "\\end{table}", ""]
    )


def page(title: str, head: list[str], rows: list[list[Text]], notes: list[str]) -> str:
    around = {"": "{}", "best": "<b>{}</b>", "second": "<u>{}</u>"}
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    lines = ["<tr>" + "".join(f"<td>{around[t.mark].format(html.escape(t.text))}</td>" for t in row) + "</tr>" for row in rows]
    said = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    return "\n".join(
        [f"<table><caption>{html.escape(title)}</caption>", f"<tr>{top}</tr>", *lines, "</table>", f"<ul>{said}</ul>", ""]
    )


FORMATS: dict[str, Callable[..., str]] = {"md": markdown, "csv": comma, "tex": latex, "html": page}
