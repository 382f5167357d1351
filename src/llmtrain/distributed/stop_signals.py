"""Signals that ask a run to save and stop. Nothing here imports torch."""

from __future__ import annotations

import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def heeded_signals() -> list[signal.Signals]:
    """Return the stop signals that this thread may take handlers for.

    None in a thread other than the main one: there signals are left to the program around it. A signal that is ignored
    stays ignored, as SIGHUP under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
