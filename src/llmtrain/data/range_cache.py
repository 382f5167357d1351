"""A bounded cache of byte ranges of immutable objects, in a folder that the processes of a machine share.

    <folder>/entries/<name>    SHA-256 of the content, then the content; written beside it and renamed
    <folder>/total             bytes of all entries, by the processes' own count
    <folder>/locks/            one of a fixed number of locks for each name, and one for `total`

Everything here only saves time. An entry that is damaged is fetched again; a folder that cannot be written is done
without. What the ranges belong to is the caller's: a name has to mean the same bytes for ever.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Iterator

_NUM_LOCKS: Final = 256
"""Files of locks. Two names that share one are not fetched at the same time by two processes, no more."""
_WAIT_SECONDS: Final = 60.0
"""A process waits this long for another that fetches the same range, and then fetches it too."""
_KEPT: Final = 0.9
"""Share of the limit that remains after the oldest entries were deleted."""
_DIGEST_BYTES: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class RangeCache:
    """Ranges by name, the ones used last. May be used by many threads and processes, and be sent to another."""

    folder: Path
    max_bytes: int
    """Entries are deleted, the longest unused first, before they take more. 0: nothing is kept."""

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """Return the range `name`: from the folder, or by `fetch`, by one process at a time. Raises what `fetch` does.

        A range that is larger than the cache, or that cannot be written, is returned and not kept.
        """
        if self.max_bytes <= 0:
            return fetch()
        if (content := self._read(name)) is not None:
            return content
        with self._lock(f"{int(hashlib.sha256(name.encode()).hexdigest(), 16) % _NUM_LOCKS:03}"):
            if (content := self._read(name)) is not None:  # another process has fetched it meanwhile
                return content
            content = fetch()
            with suppress(OSError):
                self._write(name, content)
        return content

    def forget(self, name: str) -> None:
        """Delete a range whose content turned out to be wrong."""
        with suppress(OSError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / "entries" / name

    def _read(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        content = stored[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != stored[:_DIGEST_BYTES]:
            self.forget(name)
            return None
        with suppress(OSError):
            os.utime(path)  # the time of its last use
        return content

    def _write(self, name: str, content: bytes) -> None:
        size = len(content) + _DIGEST_BYTES
        if size > self.max_bytes:
            return
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock("total"):
            self._make_room(size)
            temporary = path.with_name(f".{uuid4().hex}")
            try:
                with temporary.open("xb") as file:
                    file.write(hashlib.sha256(content).digest())
                    file.write(content)
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Count `size` more bytes; where they are too many, count the entries and delete those unused for longest."""
        ledger = self.folder / "total"
        try:
            total = int(ledger.read_text()) + size
        except (OSError, ValueError):
            total = self.max_bytes + 1  # nobody has counted yet, or a process was killed while it wrote
        if total > self.max_bytes:
            entries = []
            for entry in os.scandir(self.folder / "entries"):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    entries.append((status.st_mtime_ns, entry.path, status.st_size))
            total = sum(entry_size for _, _, entry_size in entries) + size
            limit = self.max_bytes if total <= self.max_bytes else max(int(_KEPT * self.max_bytes), size)
            for _, path, entry_size in sorted(entries):
                if total <= limit:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= entry_size
        ledger.write_text(str(total))

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold a lock that all processes see; go on without it where it cannot be had."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / "locks" / name)
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_WAIT_SECONDS)
        except (OSError, Timeout, NotImplementedError):
            yield
            return
        try:
            yield
        finally:
            lock.release()
