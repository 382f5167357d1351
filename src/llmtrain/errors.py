"""The errors that end a command with one message and an exit code, never with a traceback.

What is not one of these is a bug, and shows its traceback; but for what lies in the machine around the program.
"""

from __future__ import annotations

import errno
import os
import re


class ConfigError(ValueError):
    """A request of the user cannot be met: the message says what, where and what to do instead. Exit code 2."""

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


_FIXES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "name another place",
    errno.EACCES: "give this user the right to it, or name another place",
    errno.ENOTDIR: "name another place",
    errno.EFBIG: "raise the limit for the size of files (`ulimit -f`)",
    errno.EIO: "the disk or the network drive has a fault: see `dmesg`",
    errno.EMFILE: "raise the limit for open files (`ulimit -n`)",
    errno.ENAMETOOLONG: "give it a shorter name",
}

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""Number in the errors of libraries in Rust (safetensors, tokenizers), which are no OSError."""


def in_surroundings(error: Exception) -> str | None:
    """Return a message for an error that the machine is to blame for: a disk, rights, a missing home; None for others.

    The code that writes a file mostly has a better message; this is for files that nobody thought of.
    """
    if isinstance(error, OSError) and error.errno in _FIXES:
        return f"{error.filename or 'a file'}: {error.strerror}: {_FIXES[error.errno]}"
    in_rust = _RUST_ERROR.search(str(error))
    if in_rust is not None and int(in_rust[1]) in _FIXES:
        return f"a file: {os.strerror(int(in_rust[1]))}: {_FIXES[int(in_rust[1])]}"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        if "temporary directory" in str(error):
            return f"{error.strerror}: set TMPDIR to a folder that can be written"
        if not _has_working_folder():
            return "the folder in which the command was started is gone: change to another (`cd`)"
    if isinstance(error, RuntimeError) and str(error) == "Could not determine home directory.":
        return "this user has no home folder: set HOME, or data.cache_dir and HF_HOME, and begin no path with ~"
    return None


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
