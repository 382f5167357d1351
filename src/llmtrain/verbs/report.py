"""`report`: write one self-contained HTML file about a run, or about several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.reports.run_page import REPORT_NAME, write_report
from llmtrain.runs.folders import find_run
from llmtrain.runs.stores import fetched_runs


def report(refs: Sequence[str], *, output: str | None = None, root_dir: str = "runs") -> dict[str, Any]:
    """Write the page about the runs that `refs` name. Returns its path, its size, and what it shows.

    `output`: when None, <run>/report.html for one run and ./report.html for several. Raises ConfigError for a run that
    does not exist, and for a file that cannot be written.
    """
    folders = list(dict.fromkeys(find_run(ref, fetched_runs(root_dir, ref))[0] for ref in refs))
    beside_run = folders[0] if len(folders) == 1 else Path()
    path = beside_run / REPORT_NAME if output is None else Path(output)
    try:
        return write_report(folders, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file with --output") from None
