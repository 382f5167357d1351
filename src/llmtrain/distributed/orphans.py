"""Ends workers whose launcher or torchrun is gone, killed without a word (SIGKILL): they would train on, unseen.

    launcher ─ holds a lock on a file, however it ends ─▶ workers look every second whether it is free
    torchrun ─ is the workers' parent                  ─▶ and whether they have another parent

A worker then does what it does at SIGTERM: a run saves, and exits with 75. Nothing here imports torch.
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
def seen_alive(folder: Path) -> Iterator[None]:
    """Let the workers that have `folder` see that this process is alive, until the block ends."""
    with (folder / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: workers without the file look at their parent alone
            (folder / _LOCK).unlink()
        yield


def end_with_launcher() -> None:
    """Watch the launcher and torchrun from a worker, in a thread; do nothing in a process that nobody launched."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        folder = exit_folder()
        lock = folder / _LOCK if folder else None
        descriptor = os.open(lock, os.O_RDONLY) if lock and lock.exists() else None
        threading.Thread(target=_watch, args=(os.getppid(), descriptor), name="llmtrain-launcher", daemon=True).start()


def _watch(torchrun: int, lock: int | None) -> None:
    while os.getppid() == torchrun:
        if lock is not None and _is_free(lock):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.kill(torchrun, signal.SIGTERM)  # which passes it on to all workers, and starts none again
            lock = None
        time.sleep(_EVERY_SEC)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
