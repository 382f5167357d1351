"""Exit codes of a run's processes: each worker leaves its own in a folder, and the launcher makes one of them.

torchrun ends with 1 whatever its workers ended with, and its error files hold the first failure alone. The folder keeps
the contract of exit codes (2, 42, 75, …). Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

EXIT_FOLDER = "LLMTRAIN_EXIT_FOLDER"
"""Environment variable with the folder in which a worker leaves its exit code."""

STRONGEST_FIRST = (2, 42, 1, 76, 75)
"""Order in which one worker's code counts for all: a user's mistake, then what will fail again, then a failure that the
others only followed."""


def leave_exit_code(code: int) -> None:
    """Tell the launcher, if there is one, how this worker ends. A link holds it: a full disk has room for that."""
    if folder := exit_folder():
        link = folder / os.environ.get("RANK", "0")
        link.unlink(missing_ok=True)
        link.symlink_to(str(code))


def hopeless_exit_code() -> int | None:
    """Return the exit code for this worker if torchrun started it again although a worker would fail again.

    Otherwise return None, and forget what this rank left at an earlier start.
    """
    folder = exit_folder()
    if folder is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    codes = exit_codes_in(folder)
    hopeless = next((code for code in STRONGEST_FIRST[:2] if code in codes), None)
    if hopeless is None:
        (folder / os.environ.get("RANK", "0")).unlink(missing_ok=True)
    return hopeless


def exit_codes_in(folder: Path) -> list[int]:
    """Return the codes that workers have left in `folder`."""
    codes = []
    for path in folder.iterdir():
        with suppress(OSError, ValueError):  # another worker writes or removes its own at this moment
            codes.append(int(os.readlink(path)))
    return codes


def exit_code_of(codes: Sequence[int], *, num_workers: int, torchrun: int) -> int:
    """Return the strongest of the workers' codes. A worker that left none was killed, so the run can be tried again."""
    if not codes:
        return 75 if torchrun < 0 else 1  # torchrun was killed, or could not start them
    killed = [75] * (num_workers - len(codes))
    failed = [code for code in (*codes, *killed) if code]
    return next((code for code in STRONGEST_FIRST if code in failed), failed[0] if failed else 0)


def exit_folder() -> Path | None:
    """Return the folder in which this worker leaves its exit code; None in a process that was not launched."""
    folder = os.environ.get(EXIT_FOLDER)
    return Path(folder) if folder and Path(folder).is_dir() else None
