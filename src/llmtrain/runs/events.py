"""events.jsonl: what happened to a run besides its metrics, one JSON object a line, in the order of time.

    {"time": 1795216293.125, "step": 300, "event": "saved", "best": true}

No line is ever removed: after a kill at step 340 there is `resumed` at step 300, and a report shows both.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Final, Literal

from llmtrain.atomic import append_lines
from llmtrain.runs.json_files import json_lines_of

log = logging.getLogger("llmtrain.tracking")

EVENTS_NAME: Final = "events.jsonl"

Event = Literal["mixture", "not_saved", "resumed", "saved", "skipped", "stopped"]
"""mixture: the shares of the data's sources changed. not_saved: a full disk or the like, as the log tells. skipped:
a step without an update. stopped: by a signal. resumed: after a stop, a kill or a roll-back."""


class EventLog:
    """Appends to `path`; None is for the ranks that write nothing.

    A file that cannot be written (a full disk) gives one warning; the run goes on, and writes again once it can.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._warned = False

    def add(self, event: Event, *, step: int, **details: bool | float | str) -> None:
        """Append that `event` happened when `step` steps were done; `details` are for people."""
        if self._path is None:
            return
        line = {"time": round(time.time(), 3), "step": step, "event": event, **details}
        try:
            append_lines(self._path, [json.dumps(line)])
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written; the run goes on without it (%s)", self._path, error.strerror)
            self._warned = True


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events in the file, [] without one. A line that a kill or a full disk damaged is left out."""
    lines = json_lines_of(path)
    return [line for line in lines if isinstance(line.get("event"), str) and isinstance(line.get("step"), int)]
