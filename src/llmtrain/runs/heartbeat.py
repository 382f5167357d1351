"""A run's sign of life: a file in its folder that is touched while the run gets something done.

    beat() … ──▶ progressed() ──▶ a thread, every few seconds ──▶ <run>/heartbeat ──▶ `llmtrain health` anywhere

metrics.jsonl says as much only at every `trainer.log_every_steps`, and nothing during an evaluation or a save.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

HEARTBEAT_NAME: Final = "heartbeat"
INTERVAL_SEC: Final = 5.0


class Heartbeat:
    """Touches `path` when it is entered, and in every interval in which `progressed()` has changed. None: does nothing.

    The file system may hang or fail: that delays and stops only this thread.
    """

    def __init__(
        self, path: Path | None, *, progressed: Callable[[], float], interval_sec: float = INTERVAL_SEC
    ) -> None:
        self._path = path
        self._progressed = progressed
        self._interval_sec = interval_sec
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmtrain-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        assert self._path is not None
        told = None
        while True:
            progress = self._progressed()
            if progress != told:
                with suppress(OSError):
                    self._path.touch()
                told = progress
            if self._over.wait(self._interval_sec):
                return
