"""events.jsonl: what happened to a run besides its figures, one JSON object a line, in the order of time.

    {"time": 1795216293.125, "step": 300, "event": "saved", "best": true}

Nothing is taken back: after a kill at step 340 there is `resumed` at step 300, and both lie on the curves of a report.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Final, Literal

from llmtrain.files import append_lines

log = logging.getLogger("llmtrain.tracking")

EVENTS_NAME: Final = "events.jsonl"

Event = Literal["resumed", "saved", "skipped", "stopped"]
"""skipped: a step without an update. stopped: by a signal. resumed: after a stop, a kill or a roll-back."""


class EventLog:
    """Appends to `path`; with None, which is for the ranks that write nothing, to nowhere.

    A file that cannot be written gives one warning; the run goes on.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def add(self, event: Event, *, step: int, **details: bool | float | str) -> None:
        """`event` happened when `step` steps were done; `details` are for people."""
        if self._path is None:
            return
        line = {"time": round(time.time(), 3), "step": step, "event": event, **details}
        try:
            append_lines(self._path, [json.dumps(line)])
        except OSError as error:
            log.warning("%s cannot be written; the run goes on without it (%s)", self._path, error.strerror)
            self._path = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the file, [] without one; a line that a kill or a full disk left unreadable is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    events = []
    for text in lines:
        try:
            line = json.loads(text, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("event"), str) and isinstance(line.get("step"), int):
            events.append(line)
    return events
