"""The only console of this process, on stderr. Log lines and a live bar share it, so neither overwrites the other.

stdout is for the result of a command (`--json`). `logs` writes the lines, `live_view` draws the bar.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.file_proxy import FileProxy


class _LastingConsole(Console):
    """Console that survives the end of its terminal. Rich would end the process when nobody reads stderr any more."""

    def on_broken_pipe(self) -> None:
        """Stop printing."""
        self.quiet = True


_console: Console | None = None
_warn_bar: Callable[[str], None] | None = None
_lines_only = False


def stderr_console() -> Console:
    """Return the console, which is made on first use. It writes to the current `sys.stderr` and respects NO_COLOR."""
    global _console
    if _console is None:
        _console = _LastingConsole(stderr=True, highlight=False, markup=False, emoji=False)
    return _console


def can_draw() -> bool:
    """Return whether a bar can be drawn: stderr is a terminal with a movable cursor, not the log of a CI job or pod.

    No bar is drawn if the log consists of JSON lines (`set_lines_only`), which a program reads.
    """
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    is_recorded = in_ci or "KUBERNETES_SERVICE_HOST" in os.environ
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_recorded and not _lines_only


def bar_is_live() -> bool:
    """Return whether a bar shows the metrics at present, so that log lines need not repeat them."""
    return _warn_bar is not None


def set_live_bar(warn: Callable[[str], None] | None) -> None:
    """Register the live bar by its function for showing a warning; None unregisters it."""
    global _warn_bar
    _warn_bar = warn


def warn_bar(message: str) -> None:
    """Show a warning below the live bar, if there is one."""
    if _warn_bar is not None:
        _warn_bar(message)


def set_lines_only(wanted: bool) -> None:
    """Set whether only log lines may be written."""
    global _lines_only
    _lines_only = wanted


def forget_console() -> None:
    """Drop the console, so that the next use makes a new one for the present stderr."""
    global _console
    _console = None
    set_live_bar(None)
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file


# A forked data worker inherits the console and its lock, which the drawing thread may hold at that moment. That thread
# does not exist in the child, so the worker's first log line would wait forever. It gets a console of its own instead.
os.register_at_fork(after_in_child=forget_console)
