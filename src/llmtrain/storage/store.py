"""The protocol of a store, and `open_store`, which finds the one for an address.

A key is the path in the bucket, as `parse_address` gives it: `open_store("s3://b/x/y").read("x/y")`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from llmtrain.storage.address import Address, parse_address
from llmtrain.storage.failures import NoObject


@dataclass(frozen=True)
class Entry:
    """An object of a store."""

    key: str
    size: int
    """Bytes."""
    etag: str | None
    """Changes when the content does: an entity tag, a checksum, or the time of the last change; None if unknown."""


class Store(Protocol):
    """Objects of one bucket, by key. It may be used by several threads.

    Every method raises StorageError: NoObject for what is not there, AccessDenied for credentials that are missing or
    rejected, and itself for a store that does not answer, after several attempts.
    """

    root: str
    """Address of the bucket, up to where a key begins."""

    def stat(self, key: str) -> Entry:
        """Return size and etag of an object."""
        ...

    def size(self, key: str) -> int:
        """Return the bytes of an object."""
        return self.stat(key).size

    def exists(self, key: str) -> bool:
        """Return whether there is an object with this key; a folder is none."""
        try:
            self.stat(key)
        except NoObject:
            return False
        return True

    def read(self, key: str) -> bytes:
        """Return a whole object."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on. Raises StorageError where they do not lie in the object."""
        ...

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return several ranges, each (start, length), as `read_range` does; they are asked for at once."""
        ...

    def open(self, key: str, *, size: int | None = None) -> BinaryIO:
        """Open an object to be read at any position, with read-ahead where it is read in order.

        `size`: its size where it is known, which saves a request.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects of the folder `prefix` and of folders in it, in no order; "" is the whole bucket."""
        ...

    def write(self, key: str, content: bytes | Path) -> None:
        """Replace an object by bytes or by the content of a file, in one step as readers see it."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        ...


def open_store(address: str | Address) -> Store:
    """Return the store that an address lies in. Nothing is asked of it yet.

    Raises ConfigError for an address that names no store, for a package that is not installed, and for settings that
    are missing. A store is kept for as long as the process runs.
    """
    parts = address if isinstance(address, Address) else parse_address(address)
    return _opened(parts.scheme, parts.bucket, os.getpid())  # a forked process has connections of its own


def locate(address: str) -> tuple[Store, str]:
    """Return the store of an address, and the key in it. Raises what `open_store` does."""
    parts = parse_address(address)
    return open_store(parts), parts.key


@lru_cache(maxsize=64)
def _opened(scheme: str, bucket: str, process: int) -> Store:
    place = Address(scheme, bucket, "")
    if scheme in ("s3", "gs", "az"):
        from llmtrain.storage._objects import ObjectStore

        return ObjectStore(place)
    if scheme in ("http", "https"):
        from llmtrain.storage._web import WebStore

        return WebStore(place)
    if scheme == "lakefs":
        from llmtrain.storage._lakefs import LakeStore

        return LakeStore(place)
    from llmtrain.storage._filesystem import FileSystemStore

    return FileSystemStore(place)


def forget_stores() -> None:
    """Close what `open_store` keeps, so that changed credentials count."""
    _opened.cache_clear()
