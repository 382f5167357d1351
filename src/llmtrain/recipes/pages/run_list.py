"""The list of all runs for a page that asks every few seconds: only runs that changed are looked at again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtrain.recipes.runs import describe_run, list_runs
from llmtrain.training.runs import is_locked

_TOLD_BY = ("config.yaml", "meta.json", "summary.json", "metrics.jsonl", "checkpoints", "eval")
"""What changes when a run does."""


class RunsList:
    """What `runs` lists of a folder, each run as it was when its files last changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, tuple[object, dict[str, Any]]] = {}

    def now(self) -> list[dict[str, Any]]:
        """As `list_runs`. Raises ConfigError when the folder is gone."""
        return list_runs(root_dir=str(self._root), describe=self._describe)

    def _describe(self, folder: Path) -> dict[str, Any]:
        seen = is_locked(folder), *(_changed(folder / name) for name in _TOLD_BY)
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
