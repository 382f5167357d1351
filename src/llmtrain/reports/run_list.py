"""Lists all runs for a page that asks every few seconds; only runs that changed are read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtrain.runs.folders import is_locked
from llmtrain.runs.listing import describe_run, list_runs

_CHANGES_WITH_RUN = ("config.yaml", "meta.json", "summary.json", "metrics.jsonl", "checkpoints", "eval")
"""Files and folders of which at least one changes when the run does."""


class RunsList:
    """Lists a folder as `runs` does, and keeps each run's description until its files change."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, tuple[object, dict[str, Any]]] = {}

    def now(self) -> list[dict[str, Any]]:
        """Return the list, as `list_runs` does. Raises ConfigError when the folder is gone."""
        return list_runs(root_dir=str(self._root), describe=self._describe)

    def _describe(self, folder: Path) -> dict[str, Any]:
        seen = is_locked(folder), *(_changed(folder / name) for name in _CHANGES_WITH_RUN)
        known = self._known.get(folder)
        if known is None or known[0] != seen:
            known = self._known[folder] = seen, describe_run(folder)
        return known[1]


def _changed(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
