"""report.html of an evaluation: scores, the comparison, and prompts with what was expected and what came, side by side.

One file that needs nothing else. The figures are those of metrics.json, the rows those of predictions.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MAX_ROWS = 500
"""Rows that the page shows; predictions.jsonl has all."""

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:.6rem 0 1.4rem}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}h2{margin-top:2rem}small,.quiet{color:#666}
.row{border:1px solid #ddd;border-radius:6px;margin:.8rem 0;padding:.6rem .9rem}.row.worse{border-color:#c33}
.row.better{border-color:#2a7}.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));gap:.9rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0;font:13px/1.4 ui-monospace,monospace}
.better>td.verdict{color:#186}.worse>td.verdict{color:#b22}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th,.row{border-color:#444}small,.quiet{color:#999}}
"""
_SCRIPT = """
document.getElementById("show").addEventListener("change", (event) => {
  for (const row of document.querySelectorAll(".row"))
    row.hidden = event.target.value !== "all" && !row.classList.contains(event.target.value);
});
"""


def report_page(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page, as text. `document` is metrics.json's; `rows` are predictions.jsonl's."""
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width,initial-scale=1">',
            f"<title>Evaluation of {escape(str(document['model']))}</title><style>{_STYLE}</style>",
            f"<h1>Evaluation</h1><p>{escape(str(document['model']))}",
            f"<br><small>against {escape(str(document['baseline']))}</small>" if document.get("baseline") else "",
            *_scores(document),
            *_comparison(document["comparison"]),
            *_contamination(document.get("contamination") or {}),
            *_definitions(document),
            *_rows(rows, with_baseline=bool(document.get("baseline"))),
            f"<script>{_SCRIPT}</script></html>",
        ]
    )


def _scores(document: Mapping[str, Any]) -> Iterable[str]:
    names = list(document["scores"])
    yield "<h2>Scores</h2>"
    yield _table(
        ["", "rows", *names],
        [
            [name, f"{part['rows']:,}", *(_number(part["scores"][figure]) for figure in names)]
            for name, part in [*document["files"].items(), ("all", document)]
        ],
    )


def _comparison(comparison: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    if not comparison:
        return
    yield "<h2>Against the baseline</h2>"
    head = ["", "baseline", "model", "difference", "95 % interval", "better", "worse", "same", "verdict"]
    yield _table(
        head,
        [
            [
                name,
                _number(found["base"]),
                _number(found["tuned"]),
                _number(found["difference"], sign=True),
                f"{_number(found['low'], sign=True)} … {_number(found['high'], sign=True)}",
                *(f"{found[count]:,}" for count in ("wins", "losses", "ties")),
                found["verdict"],
            ]
            for name, found in comparison.items()
        ],
        classes=[found["verdict"] for found in comparison.values()],
    )
    yield "<p class=quiet>Rows are drawn anew with replacement; better and worse count rows.</p>"


def _contamination(found: Mapping[str, Any]) -> Iterable[str]:
    if not found:
        return
    yield "<h2>Contamination</h2>"
    if not found["checked"]:
        yield f"<p>Not looked for: {escape(str(found['why']))}.</p>"
        return
    yield f"<p>{found['rows']:,} rows stand among the training rows ({found['exact']:,} word for word).</p>"
    if found["rows"] and found.get("scores_without"):
        names = list(found["scores_without"])
        yield _table(
            ["", *names],
            [
                ["all rows", *(_number(found["scores_with"][name]) for name in names)],
                ["without them", *(_number(found["scores_without"][name]) for name in names)],
            ],
        )


def _definitions(document: Mapping[str, Any]) -> Iterable[str]:
    yield "<details><summary>Definitions and settings</summary><dl>"
    for name, text in document["definitions"].items():
        signature = document["signatures"].get(name)
        yield f"<dt><b>{escape(name)}</b><dd>{escape(text)}{f' ({escape(signature)})' if signature else ''}"
    yield f"</dl><pre>{escape(str(document['settings']))}</pre></details>"


def _rows(rows: Sequence[Mapping[str, Any]], *, with_baseline: bool) -> Iterable[str]:
    # Where not all are shown, those that changed are.
    rank = {"worse": 0, "better": 1}
    by_interest = sorted(range(len(rows)), key=lambda row: rank.get(rows[row].get("change", ""), 2))
    shown = [rows[row] for row in sorted(by_interest[:MAX_ROWS])]
    more = f" ({MAX_ROWS:,} of {len(rows):,}; predictions.jsonl has all)" if len(rows) > MAX_ROWS else ""
    options = "<option value=all>all<option value=worse>got worse<option value=better>got better"
    chooser = f"<select id=show>{options if with_baseline else '<option value=all>all'}</select>"
    yield f"<h2>Rows{more}</h2><p>{chooser}"
    for row in shown:
        sides = [("prompt", row["prompt"]), ("expected", row["expected"])]
        if with_baseline:
            sides.append(("baseline", row["baseline"]["prediction"]))
        sides.append(("prediction", row["prediction"]))
        cells = "".join(f"<div><small>{name}</small><pre>{escape(text)}</pre></div>" for name, text in sides)
        figures = "  ".join(f"{name} {_number(value)}" for name, value in row["scores"].items())
        yield (
            f"<div class='row {escape(row.get('change', ''))}'><small>{escape(row['source'])}"
            f"{' · among the training rows' if row.get('trained_on') else ''}</small>"
            f"<div class=sides>{cells}</div><small>{escape(figures)}</small></div>"
        )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: Sequence[str] | None = None) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}" for cell in head)]
    for index, row in enumerate(rows):
        kind = f" class={classes[index]}" if classes else ""
        last = f"<td class=verdict>{escape(row[-1])}" if classes else f"<td>{escape(row[-1])}"
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}" for cell in row[:-1]) + last)
    return "\n".join([*lines, "</table>"])


def _number(value: Any, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if sign and value else f"{value:.4g}"
