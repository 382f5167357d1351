"""Follow a stage of the preparation: call back while it runs, and log its speed at the end."""

from __future__ import annotations

import logging
import time
from typing import Protocol

logger = logging.getLogger("llmtrain.prepare")


class ProgressCall(Protocol):
    """Called with a stage (read, tokenizer, encode), its bytes of text, done and in all, and how fast it is."""

    def __call__(self, stage: str, done: int, total: int, *, speed: str | None = None) -> None: ...


_SECONDS_BETWEEN_CALLS = 0.1


class Stage:
    """One stage; `with Stage("read", total=..., report=...) as stage:` and `stage.advance(bytes)` in it."""

    def __init__(self, name: str, *, total: int, report: ProgressCall) -> None:
        self._name = name
        self._total = total
        self._report = report
        self._done = 0
        self._tokens = 0
        self._start = time.perf_counter()
        self._last_call = self._start
        self.seconds = 0.0
        """Set at the end."""

    def __enter__(self) -> Stage:
        self._report(self._name, 0, self._total)
        return self

    def advance(self, num_bytes: int, num_tokens: int = 0) -> None:
        """Count bytes of text as done, and the tokens that they gave."""
        self._done += num_bytes
        self._tokens += num_tokens
        now = time.perf_counter()
        if now - self._last_call >= _SECONDS_BETWEEN_CALLS:
            self._last_call = now
            self._report(self._name, self._done, self._total, speed=self._speed(now - self._start))

    def __exit__(self, error: object, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        if error is None:
            self._report(self._name, self._total, self._total, speed=self._speed(self.seconds))

    def log(self, what: str) -> None:
        """Say at INFO what the stage gave, and how fast it was. Call it after the block."""
        logger.info("%s: %s in %.1f s (%s)", self._name, what, self.seconds, self._speed(self.seconds))

    def _speed(self, seconds: float) -> str:
        seconds = max(seconds, 1e-9)
        speed = f"{self._done / 1e6 / seconds:.1f} MB/s"
        return f"{speed}, {self._tokens / seconds:,.0f} tokens/s" if self._tokens else speed
