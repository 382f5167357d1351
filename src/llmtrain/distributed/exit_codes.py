"""Exit codes of a run's processes: each worker writes its code to a folder, and the launcher exits with one of them.

torchrun exits with 1 whatever its workers exited with, and its error files hold only the first failure. With the
folder, a run of several processes exits with the documented codes (2, 42, 75, …). Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

EXIT_FOLDER = "LLMTRAIN_EXIT_FOLDER"
"""Environment variable that names the folder to which a worker writes its exit code."""

STRONGEST_FIRST = (2, 42, 1, 76, 75)
"""The run exits with the first of these codes that any worker has: a user's mistake (2), a failure that would happen
again (42), any other failure (1), then codes of workers that only lost another one (76, 75)."""


def leave_exit_code(code: int) -> None:
    """Write this worker's exit code for the launcher, if there is one.

    The code is the target of a symbolic link, which can be made even if the disk is full.
    """
    if folder := exit_folder():
        link = folder / os.environ.get("RANK", "0")
        link.unlink(missing_ok=True)
        link.symlink_to(str(code))


def hopeless_exit_code() -> int | None:
    """Return the code to exit with at once, if torchrun restarted this worker after a failure that would happen again.

    Otherwise return None, and delete the code that this rank wrote before the restart.
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
    """Return the codes that workers have written to `folder`."""
    codes = []
    for path in folder.iterdir():
        with suppress(OSError, ValueError):  # another worker is writing or deleting its code
            codes.append(int(os.readlink(path)))
    return codes


def exit_code_of(codes: Sequence[int], *, num_workers: int, torchrun: int) -> int:
    """Return the run's exit code, by STRONGEST_FIRST. A worker without a code was killed, which counts as 75.

    `torchrun` is torchrun's own return code.
    """
    if not codes:
        return 75 if torchrun < 0 else 1  # torchrun was killed, or could not start the workers
    return strongest([*codes, *[75] * (num_workers - len(codes))])


def strongest(codes: Iterable[int]) -> int:
    """Return the code that counts for all, by STRONGEST_FIRST; 0 if all are 0."""
    failed = [code for code in codes if code]
    return next((code for code in STRONGEST_FIRST if code in failed), failed[0] if failed else 0)


def exit_folder() -> Path | None:
    """Return the folder to which this worker writes its exit code; None if no launcher started this process."""
    folder = os.environ.get(EXIT_FOLDER)
    return Path(folder) if folder and Path(folder).is_dir() else None
