"""`report`: one self-contained HTML file about a run, or about several beside each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.recipes.pages.document import page_document
from llmtrain.tracking.page.html import standalone_page
from llmtrain.training.runs import find_run

log = logging.getLogger("llmtrain.report")

REPORT_NAME = "report.html"


def report(refs: Sequence[str], *, output: str | None = None, root_dir: str = "runs") -> dict[str, Any]:
    """Write the page about the runs that `refs` name; returns its path, size, and what it shows.

    `output`: <run>/report.html for one run, ./report.html for several when not given. Raises ConfigError for a run that
    is not there, and for a file that cannot be written.
    """
    folders = list(dict.fromkeys(find_run(ref, Path(root_dir))[0] for ref in refs))
    beside_run = folders[0] if len(folders) == 1 else Path()
    path = beside_run / REPORT_NAME if output is None else Path(output)
    try:
        return write_report(folders, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file with --output") from None


def write_report(folders: Sequence[Path], path: Path) -> dict[str, Any]:
    """Write the page about the runs in `folders` to `path`, whole or not at all. Raises OSError."""
    document = page_document(folders)
    part = path.with_name(path.name + ".part")
    part.write_text(standalone_page(document, title=", ".join(folder.name for folder in folders)), encoding="utf-8")
    part.replace(path)
    return {
        "report": str(path.absolute()),
        "bytes": path.stat().st_size,
        "points": sum(run["num_points"] for run in document["runs"]),
        "runs": [run["id"] for run in document["runs"]],
        "problems": [f"{run['id']}: {problem}" for run in document["runs"] for problem in run["problems"]],
    }


def report_at_end(run: Path) -> None:
    """Write <run>/report.html. Whatever goes wrong is one warning: the run itself is done, and well."""
    try:
        write_report([run], run / REPORT_NAME)
    except Exception as error:
        log.warning("%s could not be made (%s: %s)", run / REPORT_NAME, type(error).__name__, error)
