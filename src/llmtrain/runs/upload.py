"""Copies a run to its store while it trains, in a thread that the run never waits for.

    run's folder ─▶ checkpoints, the newest first: files ─▶ MANIFEST.json ─▶ latest, best, final
                 ─▶ checkpoints that were deleted here: MANIFEST.json ─▶ files
                 ─▶ records that changed: metrics, events, logs, config, summary

A checkpoint in the store counts from its manifest on, which is written last and deleted first, as on a file system
without renames. Its files are held by hard links while they are uploaded, so that deletion here does not cut it short.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llmtrain.atomic import LACKING, follow, is_pointer
from llmtrain.errors import RunError
from llmtrain.faults import reach
from llmtrain.runs.folders import is_run, locked
from llmtrain.runs.stores import (
    CHECKPOINTS,
    MANIFEST,
    POINTERS,
    UPLOAD,
    CopyRecord,
    StoredRun,
    address_of,
    delete_run,
    files_in,
    manifest_in,
    parsed,
    same_files,
)
from llmtrain.runs.upload_owner import Owner, TakenOver
from llmtrain.storage.failures import StorageError
from llmtrain.storage.store import Entry

log = logging.getLogger("llmtrain.store")

EVERY_SECONDS: Final = 15.0
"""Time between two looks at what changed; a new checkpoint is seen within a second."""
LONGEST_WAIT_SECONDS: Final = 120.0
"""Time between two attempts while the store fails; the first wait is a second, and each is twice as long."""
END_ATTEMPTS: Final = 5
"""Attempts at the end of a run while the store fails, with this time between two."""
END_WAIT_SECONDS: Final = 4.0
STUCK_SECONDS: Final = 600.0
"""Time without a finished object after which the end of a run waits no longer."""
_SHARE: Final = 20
"""A record that took a second is uploaded again after this many seconds, so that long logs do not fill the line."""
_HELD: Final = ".upload"
_NOT_UPLOADED: Final = ("heartbeat", UPLOAD)
_WHOLE_BYTES: Final = 1 << 26
"""Records up to this size are read before they are sent, since they may grow meanwhile."""


@contextmanager
def locked_and_uploaded(run: Path, keep_last: int, *, is_main: bool) -> Iterator[None]:
    """Lock a run's folder and, if the run is kept in a store, upload it while the block runs. Other ranks do neither.

    At the end wait a bounded time for the rest. What is still missing in the store is logged, and is not an error.
    Raises ConfigError as `locked` does.
    """
    if not is_main:
        yield
        return
    with locked(run):
        address = address_of(run)
        if address is None:
            yield
            return
        log.info("%s is kept in %s and uploaded to %s", run.name, run, address)
        upload = Upload(run, address, keep_last=keep_last, attempt=uuid.uuid4().hex)
        upload.start()
        try:
            yield
        finally:
            upload.end()


def upload_run(run: Path) -> int:
    """Upload what the store lacks of a run in which nobody trains. Return the number of objects that were written.

    Raises RunError if the run is in no store or was continued elsewhere, ConfigError if it trains, and StorageError.
    """
    address = address_of(run)
    if address is None:
        raise RunError(f"{run} is not the copy of a run in a store: its output.root_dir is no address")
    known = CopyRecord.of(run).known
    with locked(run):
        upload = Upload(run, address, keep_last=1, attempt=known[0] if known else uuid.uuid4().hex)
        try:
            upload.copy_all()
        finally:
            upload.stop()
    return upload.written


@dataclass
class _Begun:
    """A checkpoint whose upload began. Its files stay here until it is uploaded, also if it is deleted meanwhile."""

    name: str
    manifest: bytes
    held: Path
    uploaded: set[str] = field(default_factory=set)


class Upload:
    """Uploads one run. A checkpoint that was deleted here is deleted in the store once `keep_last` others are there."""

    def __init__(self, run: Path, address: str, *, keep_last: int, attempt: str) -> None:
        self._run, self._address, self._keep_last = run, address, keep_last
        self._copy = CopyRecord.of(run)
        self._owner = Owner(address, attempt=attempt, known=list(self._copy.known))
        self._copy.known = [attempt, *(one for one in self._copy.known if one != attempt)]
        self._copy.pending = True
        self._copy.write(run)
        self._stored: StoredRun | None = None
        self._manifests: dict[str, bytes | None] = {}
        """Manifest of each checkpoint in the store."""
        self._sent: dict[str, tuple[int, int, float]] = {}
        """Size and time of each record when it was sent, and when it may be sent again."""
        self._pointers: dict[str, str] = {}
        self._ending = threading.Event()
        self._failure: str | None = None
        self._moved = time.monotonic()
        self._begun: _Begun | None = None
        self._thread = threading.Thread(target=self._work, name="llmtrain-upload", daemon=True)
        shutil.rmtree(run / _HELD, ignore_errors=True)
        self.written = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Wait for what is not uploaded yet, within bounds. Say what is not in the store."""
        self._moved = time.monotonic()
        self._ending.set()
        while self._thread.is_alive() and time.monotonic() - self._moved < STUCK_SECONDS:
            self._thread.join(timeout=1)
        self.stop()
        if not is_run(self._run):  # it was rejected in its first step, and removed
            with suppress(StorageError, OSError):
                delete_run(self._address)
            return
        if self._thread.is_alive():
            self._failure = self._failure or "the store takes too long"
        if self._failure is not None:
            log.error(
                "%s is not complete in %s (%s). Nothing is lost, it is in %s: upload it with "
                "`llmtrain runs upload %s`, or resume it on this machine",
                self._run.name,
                self._address,
                self._failure,
                self._run,
                self._address,
            )
        else:
            log.info("%s is complete in %s", self._run.name, self._address)

    def stop(self) -> None:
        """Let go of the run in the store as it is there."""
        self._owner.stop()

    def copy_all(self) -> None:
        """Upload all, and release the run. Raises StorageError, TakenOver and OSError."""
        self._ending.set()
        self._pass()
        self._owner.release()
        self._copy.pending = False
        self._copy.write(self._run)
        self._failure = None

    def _work(self) -> None:
        """Do what the thread does: pass after pass until the end, however the store behaves."""
        wait, attempts = 0.0, END_ATTEMPTS
        while attempts > 0:
            is_end = self._wait(wait)
            wait = max(wait, 1.0)
            if not is_run(self._run):  # not yet, or no more
                if is_end:
                    return
                continue
            try:
                if is_end:
                    self.copy_all()
                    return
                self._pass()
                if self._failure is not None:
                    log.info("%s answers again: the run is uploaded", self._address)
                self._failure, wait = None, EVERY_SECONDS
            except TakenOver as error:
                self._failure = str(error)
                log.error("%s. Training goes on, and is kept in %s", error, self._run)
                return
            except Exception as error:  # whatever it is, it must not end the run, and the next pass may do better
                if self._failure is None:
                    wait = 0.5
                    log.warning("not uploaded: %s. Training goes on, and the upload is tried again", error)
                self._failure = str(error) or type(error).__name__
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
                if is_end:
                    attempts -= 1
                    time.sleep(min(wait, END_WAIT_SECONDS) if attempts else 0)

    def _wait(self, seconds: float) -> bool:
        """Return after a while, or earlier for a new checkpoint, or at the end of the run: then True."""
        newest, until = self._newest(), time.monotonic() + seconds
        while not self._ending.wait(min(1.0, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until or (self._failure is None and self._newest() != newest):
                return False
        return True

    def _newest(self) -> str:
        return follow(self._run / CHECKPOINTS / "latest").name

    def _pass(self) -> None:
        """Upload what changed since the last pass."""
        if self._stored is None:
            self._owner.claim()
            self._stored = StoredRun.at(self._address)
        self._still_owned()
        if self._begun is not None:
            self._finish_checkpoint(self._begun)
        folders = self._checkpoints()
        complete = [folder for folder in folders if self._upload_checkpoint(folder)]
        self._upload_pointers({folder.name for folder in complete})
        if len(complete) == len(folders) >= self._keep_last:
            self._delete_old({folder.name for folder in folders})
        self._upload_records()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _checkpoints(self) -> list[Path]:
        """Return the finished checkpoints here, the newest first."""
        folders = [path.parent for path in (self._run / CHECKPOINTS).glob(f"[!.]*/{MANIFEST}")]
        found = [(manifest_in(folder), folder) for folder in folders if not folder.is_symlink()]
        by_number = [(int(parsed(manifest).get("sequence", 0)), folder) for manifest, folder in found if manifest]
        return [folder for _, folder in sorted(by_number, reverse=True)]

    def _upload_checkpoint(self, folder: Path) -> bool:
        """Upload a checkpoint, unless the store has it. Return whether the store has all of it now."""
        manifest, there = manifest_in(folder), self._manifest_in_store(folder.name)
        if manifest is None:  # it was deleted meanwhile
            return False
        if there == manifest:
            return True
        if same_files(manifest, there):  # only its number is another one
            self._write_manifest(folder.name, manifest)
            return True
        held = self._hold(folder, manifest)
        if held is None:
            return False
        self._begun = _Begun(folder.name, manifest, held)
        self._finish_checkpoint(self._begun)
        return True

    def _finish_checkpoint(self, begun: _Begun) -> None:
        """Upload the files of a checkpoint that are not uploaded yet, then its manifest."""
        prefix = f"{CHECKPOINTS}{begun.name}"
        if self._manifest_in_store(begun.name) is not None:
            self._delete(f"{prefix}/{MANIFEST}")
            self._manifests[begun.name] = None
        for name in files_in(begun.manifest):
            if name not in begun.uploaded:
                reach("upload-file")
                self._write(f"{prefix}/{name}", begun.held / name)
                begun.uploaded.add(name)
                self._upload_records()
        self._upload_records(at_once=True)  # who goes on from this checkpoint has the metrics up to it
        reach("upload-manifest")
        self._write_manifest(begun.name, begun.manifest)
        shutil.rmtree(self._run / _HELD, ignore_errors=True)
        self._begun = None

    def _write_manifest(self, name: str, manifest: bytes) -> None:
        self._write(f"{CHECKPOINTS}{name}/{MANIFEST}", manifest)
        self._manifests[name] = manifest

    def _hold(self, folder: Path, manifest: bytes) -> Path | None:
        """Return a folder of links to a checkpoint's files; itself where links cannot be; None if it is gone."""
        held = self._run / _HELD / folder.name
        shutil.rmtree(self._run / _HELD, ignore_errors=True)
        try:
            for name in files_in(manifest):
                (held / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / name, held / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in LACKING:
                raise
            return folder
        return held if manifest_in(folder) == manifest else None

    def _manifest_in_store(self, name: str) -> bytes | None:
        assert self._stored is not None
        path = f"{CHECKPOINTS}{name}/{MANIFEST}"
        if name not in self._manifests:
            self._manifests[name] = self._stored.read(path) if path in self._stored.entries else None
        return self._manifests[name]

    def _upload_pointers(self, complete: set[str]) -> None:
        for name in POINTERS:
            pointer = self._run / CHECKPOINTS / name
            target = follow(pointer).name if is_pointer(pointer) else None
            if target in complete and self._pointers.get(name) != target:
                self._write(f"{CHECKPOINTS}{name}", f"{target}\n".encode())
                self._pointers[name] = target

    def _delete_old(self, here: set[str]) -> None:
        """Delete from the store the checkpoints that are not here, each from its manifest on."""
        assert self._stored is not None
        old: dict[str, list[str]] = {}
        for name in self._stored.entries:
            folder, slash, file = name.removeprefix(CHECKPOINTS).partition("/")
            if name.startswith(CHECKPOINTS) and slash and folder not in here:
                old.setdefault(folder, []).append(file)
        for folder, files in old.items():
            for file in sorted(files, key=lambda name: name != MANIFEST):
                self._delete(f"{CHECKPOINTS}{folder}/{file}")
            self._manifests.pop(folder, None)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _upload_records(self, *, at_once: bool = False) -> None:
        """Upload the files of the run, apart from checkpoints, that changed; delete those that are gone.

        `at_once`: also those that were uploaded a moment ago.
        """
        now, there, at_once = time.monotonic(), set[str](), at_once or self._ending.is_set()
        for path in sorted(self._run.rglob("*")):
            name = path.relative_to(self._run).as_posix()
            if not _is_record(path, name):
                continue
            there.add(name)
            with suppress(FileNotFoundError):
                status = path.stat()
                state = (status.st_size, status.st_mtime_ns)
                size, changed, due = self._sent.get(name, (-1, 0, 0.0))
                if (size, changed) == state or (now < due and not at_once):
                    continue
                began = time.monotonic()
                self._write(name, path.read_bytes() if status.st_size <= _WHOLE_BYTES else path)
                self._sent[name] = (*state, time.monotonic() + _SHARE * (time.monotonic() - began))
        for name in self._sent.keys() - there:
            self._delete(name)
            del self._sent[name]
        latest = self._run.parent / "latest"
        if "config.yaml" in self._sent and follow(latest).name == self._run.name and "../latest" not in self._pointers:
            assert self._stored is not None
            self._pointers["../latest"] = self._run.name
            parent = self._stored.key.rpartition("/")[0]
            self._stored.store.write(f"{parent}/latest" if parent else "latest", f"{self._run.name}\n".encode())

    def _write(self, name: str, content: bytes | Path) -> None:
        stored = self._still_owned()
        key = f"{stored.key}/{name}"
        stored.store.write(key, content)
        stored.entries[name] = Entry(key, 0, None)
        self.written += 1
        self._moved = time.monotonic()

    def _delete(self, name: str) -> None:
        stored = self._still_owned()
        stored.store.delete(f"{stored.key}/{name}")
        stored.entries.pop(name, None)

    def _still_owned(self) -> StoredRun:
        """Return the run in the store, to write there. Raises TakenOver if another process uploads it now."""
        if self._owner.taken is not None:
            raise self._owner.taken
        assert self._stored is not None
        return self._stored


def _is_record(path: Path, name: str) -> bool:
    if name.startswith(CHECKPOINTS) or name in _NOT_UPLOADED or name.endswith(".tmp"):
        return False
    return not any(part.startswith(".") for part in name.split("/")) and path.is_file() and not path.is_symlink()
