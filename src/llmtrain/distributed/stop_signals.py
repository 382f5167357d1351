"""Signals that ask a run to save and stop. Nothing here imports torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def signals_to_handle() -> list[signal.Signals]:
    """Return the stop signals for which this process may install a handler.

    The list is empty in a thread other than the main one, where Python allows no handlers. A signal that is already
    ignored, as SIGHUP under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object], signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Let `handler` handle `signals` within the block, and restore their earlier handlers afterwards."""
    earlier = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)
