"""Following runs that may be training: what is new in their folders, as server-sent events.

    metrics.jsonl grew ──▶ lines    events.jsonl grew ──▶ events    samples.jsonl grew ──▶ samples
    it began or ended, or the file is another ──▶ reset

The page puts lines and events on its curves, and shows the samples; at `reset` it asks for the whole document again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.recipes.pages.document import SAMPLES_NAME, read_samples, told_events
from llmtrain.tracking.events import EVENTS_NAME, read_events
from llmtrain.training.runs import is_locked

POLL_SEC = 0.5
BEATS_BETWEEN_SIGNS = 20
"""Polls without news after which an empty comment shows that both ends are still there."""
MAX_BYTES_AT_ONCE = 1 << 20


@dataclass
class Follower:
    """Looks at one run's folder again and again."""

    folder: Path
    offset: int
    """Of metrics.jsonl, where the lines begin that the page does not have yet."""
    file_id: int
    """Of the metrics.jsonl that the page was made from; one that took its place has another."""
    _trains: bool | None = None
    _sizes: dict[str, int] = field(default_factory=dict)

    def news(self) -> list[tuple[str, Any]]:
        """What is new since the last call: (`lines`, [line…]), (`events` or `samples`, all of them), (`reset`, why)."""
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
            found.append(("events", told_events(read_events(self.folder / EVENTS_NAME))))
        if self._grew(SAMPLES_NAME):
            found.append(("samples", read_samples(self.folder / SAMPLES_NAME)))
        return found

    def _grew(self, name: str) -> bool:
        """Whether a file has another size than at the last call; the first call knows none."""
        before, self._sizes[name] = self._sizes.get(name), _size(self.folder / name)
        return before is not None and before != self._sizes[name]

    def _new_lines(self) -> list[dict[str, Any]] | None:
        """Whole lines that were added; None if the file is another or shorter than it was."""
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
        whole = added[: added.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [line for line in map(_json, whole.split(b"\n")[:-1]) if isinstance(line, dict)]


async def follow(followers: Sequence[Follower], *, is_ending: Callable[[], bool] = lambda: False) -> AsyncIterator[str]:
    """Server-sent events about all runs, each with the run's `id`, until the server `is_ending`."""
    quiet = 0
    while not is_ending():
        told = False
        for follower in followers:
            for kind, content in await asyncio.to_thread(follower.news):
                told = True
                yield _message(kind, {"run": follower.folder.name, kind: content})
        quiet = 0 if told else quiet + 1
        if quiet % BEATS_BETWEEN_SIGNS == 0 and not told:
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SEC)


def _message(kind: str, content: Any) -> str:
    # A line break would end the data; JSON has none outside of texts, where it is escaped.
    return f"event: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"


def _json(text: bytes) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON, but Python reads it
    except ValueError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
