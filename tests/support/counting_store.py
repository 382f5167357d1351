"""Counting what is read of shards in a store, which fails when a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import pytest

from llmtrain.data import remote_shards
from llmtrain.storage.failures import StorageError
from llmtrain.storage.store import Store, locate


class RangeCounts:
    """Counts of ranges, over all stores."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        """Key, start and length of each range that was read."""
        self.fail_after: int | None = None
        """Number of ranges after which reading fails."""
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of all ranges."""
        return sum(length for _, _, length in self.ranges)

    def read_range(self, store: Store, key: str, start: int, length: int) -> bytes:
        with self._lock:
            self.ranges.append((key, start, length))
            if self.fail_after is not None and len(self.ranges) > self.fail_after:
                raise StorageError(f"{store.root}{key}: the store fails")
        return store.read_range(key, start, length)


class _Counted:
    def __init__(self, store: Store, counts: RangeCounts) -> None:
        self._store = store
        self._counts = counts

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return self._counts.read_range(self._store, key, start, length)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeCounts]:
    """Count the ranges that are read of shards in the block."""
    counts = RangeCounts()

    def located(address: str) -> tuple[Any, str]:
        store, key = locate(address)
        return _Counted(store, counts), key

    with monkeypatch.context() as patch:
        patch.setattr(remote_shards, "locate", located)
        yield counts
