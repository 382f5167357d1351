"""Ends workers whose launcher or torchrun was killed (SIGKILL). Otherwise they would continue to train, unnoticed.

    launcher ─ holds a lock on a file until it ends ─▶ workers check every second whether the lock is free
    torchrun ─ is the workers' parent process       ─▶ and whether their parent has changed

Such a worker gets SIGTERM: a run saves, and exits with 75. Nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.distributed.exit_codes import exit_folder

_LOCK = "launcher.lock"
_EVERY_SEC = 1.0


@contextmanager
def hold_launcher_lock(folder: Path) -> Iterator[None]:
    """Hold a lock in `folder` within the block, which shows the workers that this process is alive."""
    with (folder / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # the file system has no locks; without the file, workers only check their parent
            (folder / _LOCK).unlink()
        yield


def end_with_launcher() -> None:
    """Start a thread that ends this worker when the launcher or torchrun is gone; do nothing without torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        folder = exit_folder()
        lock = folder / _LOCK if folder else None
        descriptor = os.open(lock, os.O_RDONLY) if lock and lock.exists() else None
        threading.Thread(target=_watch, args=(os.getppid(), descriptor), name="llmtrain-launcher", daemon=True).start()


def _watch(torchrun: int, lock: int | None) -> None:
    while os.getppid() == torchrun:
        if lock is not None and _is_free(lock):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.kill(torchrun, signal.SIGTERM)  # torchrun passes it on to all workers, and restarts none
            lock = None
        time.sleep(_EVERY_SEC)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
