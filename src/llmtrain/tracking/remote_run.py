"""Stores a run's id in each tracker in <run>/tracking/<tracker>.json, so that a resumed run continues the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.atomic import write_json


def record_run(run: Path, tracker: str, identity: Mapping[str, str | None]) -> None:
    """Write the tracker's ids of `run`. Raises OSError if they cannot be written."""
    path = _path(run, tracker)
    path.parent.mkdir(exist_ok=True)
    write_json(path, identity)


def recorded_run(run: Path, tracker: str) -> dict[str, Any]:
    """Return the ids that `record_run` wrote; {} if they cannot be read."""
    try:
        found = json.loads(_path(run, tracker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(run: Path, tracker: str) -> Path:
    return run / "tracking" / f"{tracker}.json"
