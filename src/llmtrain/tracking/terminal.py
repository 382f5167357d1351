"""The one console of this process, on stderr. Log lines and a live bar share it, so neither is drawn over the other.

stdout belongs to the answer of a command (`--json`). `logs` writes the lines, `live_view` draws.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.console import Console
from rich.file_proxy import FileProxy


class _LastingConsole(Console):
    """Console that outlives its terminal: Rich would end the process when nobody reads stderr any more."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True


_console: Console | None = None
_warn_bar: Callable[[str], None] | None = None
_lines_only = False


def stderr_console() -> Console:
    """Return the console, made on first use. It follows `sys.stderr` and honours NO_COLOR."""
    global _console
    if _console is None:
        _console = _LastingConsole(stderr=True, highlight=False, markup=False, emoji=False)
    return _console


def can_draw() -> bool:
    """Return whether a bar can be drawn: stderr is a terminal that moves its cursor, and no CI or pod records it.

    None is drawn where the log is JSON lines (`set_lines_only`), which a program reads.
    """
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    is_recorded = in_ci or "KUBERNETES_SERVICE_HOST" in os.environ
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_recorded and not _lines_only


def bar_is_live() -> bool:
    """Return whether a bar shows the metrics now, so that log lines need not repeat them."""
    return _warn_bar is not None


def set_live_bar(warn: Callable[[str], None] | None) -> None:
    """Register the live bar by its function that shows a warning; None when the bar is gone."""
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
    """Drop the console; the next one looks at stderr again."""
    global _console
    _console = None
    set_live_bar(None)
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file


# A forked data worker inherits the console with its lock as it was, perhaps held by the thread that draws the bar and
# does not exist in the child: the worker's first log line would wait forever. It gets a console of its own instead.
os.register_at_fork(after_in_child=forget_console)
