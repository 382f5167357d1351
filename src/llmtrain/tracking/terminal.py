"""The one console of this process, on stderr: log lines and a live bar share it, so neither is drawn over the other.

stdout belongs to what a command answers (`--json`). What is said is in `logs`, what is drawn in `progress`.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.file_proxy import FileProxy

_console: Console | None = None
_bar_is_live = False
_lines_only = False


def stderr_console() -> Console:
    """The console, made on first use. It follows `sys.stderr` and honours NO_COLOR."""
    global _console
    if _console is None:
        _console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    return _console


def can_draw() -> bool:
    """Whether a bar can be drawn: stderr is a terminal that moves its cursor, and no CI and no pod's log records it.

    Not where the log is JSON lines (`set_lines_only`): a program reads those.
    """
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    is_recorded = in_ci or "KUBERNETES_SERVICE_HOST" in os.environ
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_recorded and not _lines_only


def bar_is_live() -> bool:
    """Whether a bar shows the figures now, so that log lines need not repeat them."""
    return _bar_is_live


def set_bar_live(live: bool) -> None:
    """Told by the bar when it appears and disappears."""
    global _bar_is_live
    _bar_is_live = live


def set_lines_only(wanted: bool) -> None:
    """Told by the log whether its lines are all that may be written."""
    global _lines_only
    _lines_only = wanted


def forget_console() -> None:
    """Begin anew: the next console looks at stderr again."""
    global _console
    _console = None
    set_bar_live(False)
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file


# A forked data worker inherits the console with its lock as it was, perhaps held by the thread that draws the bar and
# does not exist in the child: the worker's first log line would wait forever. It gets a console of its own instead.
os.register_at_fork(after_in_child=forget_console)
