"""Follows runs that may be training and sends what is new in their folders as server-sent events.

    metrics.jsonl grew ──▶ lines    events.jsonl grew ──▶ events    samples.jsonl grew ──▶ samples
    training began or ended, or metrics.jsonl was replaced ──▶ reset

The page adds lines and events to its curves and shows the samples. At `reset` it asks for the whole document again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.reports.document import shown_events
from llmtrain.runs.events import EVENTS_NAME, read_events
from llmtrain.runs.folders import is_locked
from llmtrain.runs.generated_samples import SAMPLES_NAME, read_samples
from llmtrain.runs.json_files import json_lines

POLL_SEC = 0.5
POLLS_BETWEEN_SIGNS = 20
"""Polls without news after which an empty comment shows that the connection still works."""
MAX_BYTES_AT_ONCE = 1 << 20


@dataclass
class Follower:
    """Finds what is new in one run's folder since its last look."""

    folder: Path
    offset: int
    """Position in metrics.jsonl of the first line that the page does not have yet."""
    file_id: int
    """File number of the metrics.jsonl from which the page was made; a file that replaced it has another."""
    _trains: bool | None = None
    _sizes: dict[str, int] = field(default_factory=dict)

    def news(self) -> list[tuple[str, Any]]:
        """Return what is new since the last call: (`lines`, [line…]), (`events` or `samples`, all), (`reset`, why)."""
        before, self._trains = self._trains, is_locked(self.folder)
        if before is not None and self._trains != before:
            return [("reset", "it goes on" if self._trains else "it ended")]
        found: list[tuple[str, Any]] = []
        lines = self._new_lines()
        if lines is None:
            return [("reset", "it went on from an earlier step")]
        if lines:
            found.append(("lines", lines))
        if self._grew(EVENTS_NAME):
            found.append(("events", shown_events(read_events(self.folder / EVENTS_NAME))))
        if self._grew(SAMPLES_NAME):
            found.append(("samples", read_samples(self.folder / SAMPLES_NAME)))
        return found

    def _grew(self, name: str) -> bool:
        """Return whether a file's size has changed since the last call; false at the first call."""
        before, self._sizes[name] = self._sizes.get(name), _size(self.folder / name)
        return before is not None and before != self._sizes[name]

    def _new_lines(self) -> list[dict[str, Any]] | None:
        """Return the complete lines that were added; None if the file was replaced or is shorter than before."""
        path = self.folder / "metrics.jsonl"
        try:
            status = path.stat()
            if self.file_id and (status.st_ino != self.file_id or status.st_size < self.offset):
                return None
            self.file_id = status.st_ino
            with path.open("rb") as file:
                file.seek(self.offset)
                added = file.read(MAX_BYTES_AT_ONCE)
        except OSError:
            return []
        complete = added[: added.rfind(b"\n") + 1]
        self.offset += len(complete)
        return [line for line in json_lines(complete) if line is not None]


async def follow(followers: Sequence[Follower], *, is_ending: Callable[[], bool] = lambda: False) -> AsyncIterator[str]:
    """Yield server-sent events about all runs, each with the run's id, until the server `is_ending`."""
    quiet = 0
    while not is_ending():
        has_news = False
        for follower in followers:
            for kind, content in await asyncio.to_thread(follower.news):
                has_news = True
                yield _message(kind, {"run": follower.folder.name, kind: content})
        quiet = 0 if has_news else quiet + 1
        if quiet % POLLS_BETWEEN_SIGNS == 0 and not has_news:
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SEC)


def _message(kind: str, content: Any) -> str:
    # A line break would end the data. JSON has none outside of texts, in which it is escaped.
    return f"event: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
