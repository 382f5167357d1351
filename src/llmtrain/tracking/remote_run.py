"""Which run of a tracker a run is: <run>/tracking/<tracker>.json, so that a resumed run goes on with the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.tracking.summary import write_json


def record_run(run: Path, tracker: str, identity: Mapping[str, str | None]) -> None:
    """Keep the tracker's names for `run`. Raises OSError if they cannot be written."""
    path = _path(run, tracker)
    path.parent.mkdir(exist_ok=True)
    write_json(path, identity)


def recorded_run(run: Path, tracker: str) -> dict[str, Any]:
    """What `record_run` kept; nothing if there is nothing that can be read."""
    try:
        found = json.loads(_path(run, tracker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(run: Path, tracker: str) -> Path:
    return run / "tracking" / f"{tracker}.json"
