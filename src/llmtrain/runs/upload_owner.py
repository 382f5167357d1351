"""upload.json of a run in a store: which attempt uploads the run, and a sign of life, renewed while it does.

It keeps two machines from training one run without notice. It is no lock: stores have none that all of them share. Two
starts within the same second may both see no other. From then on the one that wrote last uploads, and the other stops.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llmtrain.errors import ConfigError, RunError
from llmtrain.runs.json_files import json_object
from llmtrain.runs.stores import UPLOAD, parsed
from llmtrain.storage.failures import NoObject, StorageError
from llmtrain.storage.store import locate

log = logging.getLogger("llmtrain.store")

RENEW_SECONDS: Final = 15.0
LEASE_SECONDS: Final = 60.0
"""Time without a sign of life after which the process is taken to be gone."""


class TakenOver(RunError):
    """Another process uploads the run: what this one has must not be mixed with it."""


class Owner:
    """The upload.json of one run, for the attempt that uploads it. A thread renews it from the first claim on."""

    def __init__(self, address: str, *, attempt: str, known: list[str]) -> None:
        self._address, self._attempt, self._known = address, attempt, known
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="llmtrain-upload-owner", daemon=True)
        self.taken: TakenOver | None = None

    def claim(self) -> None:
        """Say in the store that this attempt uploads the run. Raises TakenOver if another does, and StorageError."""
        theirs = read_owner(self._address)
        other = theirs.get("attempt")
        if other is not None and other != self._attempt and other not in self._known:
            where = "is uploaded from" if is_alive(theirs) else "was continued on"
            self.taken = TakenOver(
                f"{self._address} {where} {theirs.get('host')}: nothing of this run's course is uploaded over that"
            )
            raise self.taken
        self._write(ended=False)
        if not self._thread.is_alive() and not self._over.is_set():
            self._thread.start()

    def release(self) -> None:
        """Say that the run is uploaded. Raises StorageError."""
        self._over.set()
        self._write(ended=True)

    def stop(self) -> None:
        """End the thread, and leave in the store what is there."""
        self._over.set()

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                self.claim()
            except TakenOver:
                return
            except (StorageError, OSError):  # the thread that uploads says so
                continue

    def _write(self, *, ended: bool) -> None:
        store, key = locate(f"{self._address}/{UPLOAD}")
        about = {"attempt": self._attempt, "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
        store.write(key, json.dumps(about | {"ended": ended}).encode())


def read_owner(address: str) -> dict[str, Any]:
    """Return the upload.json of a run in a store; {} without one. Raises StorageError."""
    store, key = locate(f"{address}/{UPLOAD}")
    try:
        return parsed(store.read(key))
    except NoObject:
        return {}


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Return whether the process of an upload.json was alive a minute ago, by its clock and this one's."""
    if owner.get("ended", True) or time.time() - float(owner.get("renewed", 0)) > LEASE_SECONDS:
        return False
    import psutil  # here, so that a list of runs starts without it

    pid = int(owner.get("pid", 0))
    return owner.get("host") != socket.gethostname() or (pid != os.getpid() and psutil.pid_exists(pid))


def trains_elsewhere(run: Path) -> bool:
    """Return whether another machine trained in a run when its records were fetched."""
    return is_alive(json_object(run / UPLOAD, problems=[]))


def wait_until_free(address: str) -> None:
    """Return when no process trains the run. One that does not show itself within a minute is taken to be gone.

    Raises ConfigError if a process trains it, and StorageError.
    """
    theirs = first = read_owner(address)
    ends = time.monotonic() + LEASE_SECONDS
    while is_alive(theirs) and time.monotonic() < ends:
        if theirs == first:
            log.info("%s: waiting to see whether it is still trained on %s", address, theirs.get("host"))
        time.sleep(min(RENEW_SECONDS, LEASE_SECONDS) / 3)
        theirs = read_owner(address)
        if theirs.get("renewed") != first.get("renewed") and is_alive(theirs):
            raise ConfigError(
                f"{address} is being trained by a process on {theirs.get('host')}: wait for it, or stop it"
            )
