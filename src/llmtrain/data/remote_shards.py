"""Token shards in an object store: the ranges of a file that a row group needs, and fetching them ahead of time.

    footer ─▶ where the tokens of a row group lie ─▶ RangeCache (range_cache.py) ─▶ store, a range each ─▶ pyarrow

Nothing but footers and columns of tokens is read. Fetching happens in threads that end with the process, since a store
may not answer. Which shards a source has, and whether they are what the manifest says, is found out in
remote_sources.py. Workers import this module, so it knows no config and no torch.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import Final, TypeVar
from weakref import finalize

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data.range_cache import RangeCache
from llmtrain.errors import ConfigError, Preempted
from llmtrain.screen import counted
from llmtrain.storage.address import shown
from llmtrain.storage.failures import AccessDenied, NoObject, RangeOutside, StorageError
from llmtrain.storage.store import locate

NUM_FETCHES: Final = 16
"""Requests at the same time, of one reader: at 50 ms each, they bring 30 MB/s of ranges of 100 kB."""
MAX_AHEAD_TOKENS: Final = 2**25
"""Tokens that are fetched and not decoded yet, of one reader: 64 MiB at most, and mostly half of that."""
_FOOTER_BYTES: Final = 2**16
"""Bytes from the end of a file that are read at first; the footer of a shard of 8M tokens takes half of them."""

Key = TypeVar("Key")
Range = tuple[int, int]
"""Begin in the file, and length in bytes."""


@dataclass(frozen=True)
class RemoteShard:
    """A Parquet file in a store. Can be sent to another process."""

    address: str
    size: int
    rows: int
    num_row_groups: int
    sha256: str
    cache: RangeCache

    def __str__(self) -> str:
        return shown(self.address)

    def read(self, wanted: Range) -> bytes:
        """Return a range. Raises ConfigError where the object is gone or shorter, Preempted if the store fails."""
        return self.cache.get(self._name(wanted), lambda: self._fetch(wanted))

    def forget(self, wanted: Range) -> None:
        """Keep a range no longer: its content is not what it should be."""
        self.cache.forget(self._name(wanted))

    def tokens_range(self, row_group: int, column: str) -> Range:
        """Return where the tokens of a row group lie."""
        group = footer(self).row_group(row_group)
        chunk = next(
            chunk
            for chunk in map(group.column, range(group.num_columns))
            if chunk.path_in_schema.split(".")[0] == column
        )
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        return start, chunk.total_compressed_size

    def open(self, held: Mapping[Range, bytes]) -> pq.ParquetFile:
        """Open it, with ranges that were fetched already; others are fetched when they are read."""
        file = pa.PythonFile(_RangeFile(self, held), mode="r")
        return pq.ParquetFile(file, metadata=footer(self), page_checksum_verification=True)

    def changed(self, found: str) -> ConfigError:
        """Return the error of a shard that is not the one that the manifest describes."""
        return ConfigError(
            f"{self}: {found}: it is not the shard that its manifest.json describes. Copy the shards there again, with "
            "their manifest, or make them again with `llmtrain prepare CONFIG`"
        )

    def _name(self, wanted: Range) -> str:
        return f"{self.sha256[:32]}-{wanted[0]}-{wanted[1]}"

    def _fetch(self, wanted: Range) -> bytes:
        try:
            store, key = locate(self.address)
            return store.read_range(key, *wanted)
        except NoObject as error:
            raise self.changed("there is no such object any more") from error
        except RangeOutside as error:
            raise self.changed("it is shorter than it was") from error
        except AccessDenied:
            raise
        except StorageError as error:
            raise Preempted(f"{error}. Start the run again: it goes on from its last checkpoint") from error


def footer(shard: RemoteShard) -> pq.FileMetaData:
    """Return the shard's footer, which a process reads once. Raises what RemoteShard.read does."""
    with _reading(shard):
        return _read_footer(shard)


@lru_cache(maxsize=1024)
def _reading(shard: RemoteShard) -> threading.Lock:
    """Return the lock that lets one thread read the footer while others wait for it."""
    return threading.Lock()


@lru_cache(maxsize=256)
def _read_footer(shard: RemoteShard) -> pq.FileMetaData:
    tail = min(shard.size, _FOOTER_BYTES)
    content = shard.read((shard.size - tail, tail))
    length = int.from_bytes(content[-8:-4], "little") + 8
    if content[-4:] == b"PAR1" and tail < length <= shard.size:
        content = shard.read((shard.size - length, length))
    try:
        metadata = pq.read_metadata(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:
        shard.forget((shard.size - len(content), len(content)))
        raise shard.changed(f"it has no footer of Parquet ({error})") from error
    if (metadata.num_rows, metadata.num_row_groups) != (shard.rows, shard.num_row_groups):
        shard.forget((shard.size - len(content), len(content)))
        raise shard.changed(
            f"it has {counted(metadata.num_rows, 'document')} in {metadata.num_row_groups} row groups instead of "
            f"{shard.rows} in {shard.num_row_groups}"
        )
    return metadata


class _RangeFile(io.RawIOBase):
    """The shard as a file, for pyarrow, which reads the ranges that the footer names."""

    def __init__(self, shard: RemoteShard, held: Mapping[Range, bytes]) -> None:
        super().__init__()
        self._shard = shard
        self._held = held
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shard.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._shard.size - self._position)
        wanted = self._position, left if size < 0 else min(size, left)
        content = self._held.get(wanted)
        if content is None and wanted[1]:
            content = self._shard.read(wanted)
        self._position += wanted[1]
        return content or b""


class Fetcher:
    """Fetches things in threads, each once, in the order in which they were requested, until they are taken.

    Used by one thread. `fetch` is called in several.
    """

    def __init__(self, fetch: Callable[[int], bytes], *, num_threads: int = NUM_FETCHES) -> None:
        self._fetch = fetch
        self._requested: dict[int, Future[bytes]] = {}
        self._queue: SimpleQueue[tuple[int, Future[bytes]] | None] = SimpleQueue()
        self._num_threads = num_threads
        self._started = 0
        finalize(self, _end, self._queue, num_threads)

    def request(self, number: int) -> None:
        """Begin to fetch something that will be taken later."""
        if number in self._requested:
            return
        future = self._requested[number] = Future()
        self._queue.put((number, future))
        if self._started < self._num_threads:
            self._started += 1
            # A daemon: a store that does not answer must not keep the process from ending.
            threading.Thread(target=_serve, args=(self._queue, self._fetch), name="llmtrain-fetch", daemon=True).start()

    def is_requested(self, number: int) -> bool:
        """Return whether it was requested, and not taken yet."""
        return number in self._requested

    def take(self, number: int) -> bytes:
        """Return what was requested as `number`, waiting for it. Raises what `fetch` did."""
        return self._requested.pop(number).result()


def _serve(queue: SimpleQueue[tuple[int, Future[bytes]] | None], fetch: Callable[[int], bytes]) -> None:
    while (request := queue.get()) is not None:
        number, future = request
        try:
            future.set_result(fetch(number))
        except Exception as error:
            future.set_exception(error)


def _end(queue: SimpleQueue[tuple[int, Future[bytes]] | None], num_threads: int) -> None:
    for _ in range(num_threads):
        queue.put(None)
