"""The errors that end a command with one message and an exit code, never with a traceback.

What is not one of these is a bug, and shows its traceback.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """What the user asked for cannot be: the message says what, where and what to do instead. Exit code 2."""

    exit_code = 2
    kind = "config"


class RunError(Exception):
    """The work was asked for rightly, and failed. The message is shown to the user as it is."""

    exit_code = 1
    kind = "failed"


class WillFailAgain(RunError):
    """Started again it would fail the same way: non-finite loss, crash loop. A supervisor must not retry."""

    exit_code = 42
    kind = "will_fail_again"


class Preempted(RunError):
    """Stopped from outside, with a checkpoint to go on from, or by the loss of a peer. A supervisor retries."""

    exit_code = 75
    kind = "preempted"


class Hang(RunError):
    """No progress for longer than allowed."""

    exit_code = 76
    kind = "hang"


class WorkersFailed(RunError):
    """The processes that were started for a run ended badly; they have said why."""

    def __init__(self, message: str, *, exit_code: int, kind: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.kind = kind
