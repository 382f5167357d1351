"""Makes report.html of an evaluation: scores, the comparison, and rows with what was expected and what came.

The numbers are those of metrics.json, the rows those of predictions.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain.reports.html import asset, render_file

MAX_ROWS = 500
"""Rows that the page shows; predictions.jsonl has all."""


def report_page(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page. `document` is that of metrics.json, `rows` are those of predictions.jsonl."""
    return render_file(
        "evaluation.html",
        style="evaluation.css",
        scripts=[asset("evaluation.js")],
        title=f"Evaluation of {document['model']}",
        document=document,
        baseline=document.get("baseline"),
        contamination=document.get("contamination"),
        parts=[*document["files"].items(), ("all", document)],
        rows=_most_interesting(rows),
        num_rows=len(rows),
    )


def _most_interesting(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return at most MAX_ROWS rows in their order: those that got worse or better before any other."""
    rank = {"worse": 0, "better": 1}
    by_interest = sorted(range(len(rows)), key=lambda row: rank.get(rows[row].get("change", ""), 2))
    return [rows[row] for row in sorted(by_interest[:MAX_ROWS])]
