"""Makes the pages about runs: the report as one file, and the pages that `ui` serves.

The scripts draw what a page shows from its document (document.py), as text nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from llmtrain.atomic import write_text
from llmtrain.reports.document import page_document
from llmtrain.reports.html import asset, plotly_script, render, render_file

log = logging.getLogger("llmtrain.report")

REPORT_NAME: Final = "report.html"
STYLE: Final = "page.css"
SCRIPTS: Final = ("elements.js", "charts.js", "evaluations.js", "page.js")
"""Scripts in this order: each uses what the ones before it define."""

LIVE_SCRIPTS: Final = ("plotly.js", *SCRIPTS, "runs_list.js", "chat.js", "live.js")
"""Scripts of the pages that a server shows, in their order; plotly.js is `plotly_script`."""


def write_report(folders: Sequence[Path], path: Path) -> dict[str, Any]:
    """Write the page about the runs in `folders` to `path`, complete or not at all. Raises OSError."""
    document = page_document(folders)
    write_text(path, standalone_page(document, title=", ".join(folder.name for folder in folders)))
    return {
        "report": str(path.absolute()),
        "bytes": path.stat().st_size,
        "points": sum(run["num_points"] for run in document["runs"]),
        "runs": [run["id"] for run in document["runs"]],
        "problems": [f"{run['id']}: {problem}" for run in document["runs"] for problem in run["problems"]],
    }


def report_at_end(run: Path) -> None:
    """Write <run>/report.html. A failure is one warning, since the run itself has ended well."""
    try:
        write_report([run], run / REPORT_NAME)
    except Exception as error:
        log.warning("%s could not be made (%s: %s)", run / REPORT_NAME, type(error).__name__, error)


def standalone_page(document: Mapping[str, Any], *, title: str) -> str:
    """Return the report as one file, which works from the disk."""
    scripts = [plotly_script(), *map(asset, SCRIPTS), "startReport();"]
    return render_file("runs.html", style=STYLE, scripts=scripts, has_images=True, title=title, document=document)


def live_page(*, title: str, kind: Literal["list", "runs"]) -> str:
    """Return a page that loads its parts and its data from the server that sent it."""
    return render("live.html", title=title, kind=kind, style=STYLE, scripts=LIVE_SCRIPTS)
