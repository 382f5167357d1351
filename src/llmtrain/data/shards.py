"""Reading token shards: all shards of a source as one long stream of tokens, divided into windows.

    shard 0: row group 0 | row group 1 | …   shard 1: row group 0 | …
    tokens   0 … 999,983 | 999,984 …                                     token_start: where each row group begins
    windows  |--- w ---|--- w + 1 ---|                                   may cross row groups and shards

Cumulative token counts locate a token in O(log n) without touching a file. Complete row groups are decoded, and the
ones used last are kept, in the narrow integers of the file. Files of a store are read by row groups, which are fetched
ahead of time (remote_shards.py). Which files make a source, and whether they are what `prepare` wrote, is found out in
sources.py. Workers import this module, so it knows no manifest, config or torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmtrain.data.order import Ints, WindowOrder
from llmtrain.data.remote_shards import MAX_AHEAD_TOKENS, Fetcher, Range, RemoteShard, footer
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.storage.failures import StorageError

TOKENS_COLUMNS = ("tokens", "input_ids")
"""The column that holds the tokens: ours, or as other tools call it."""


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Places of the tokens of a source: one entry for each row group, in reading order."""

    paths: tuple[Path | RemoteShard, ...]
    shard: Ints
    """[num_row_groups] index of the file in `paths`."""
    row_group: Ints
    """[num_row_groups] index inside its file."""
    token_start: Ints
    """[num_row_groups + 1] tokens before each row group, and in all."""

    @classmethod
    def of(cls, shards: Sequence[tuple[Path | RemoteShard, Sequence[int]]]) -> TokenStream:
        """Make a stream from each file's path and the token counts of its row groups."""
        counts = [np.asarray(row_groups, dtype=np.int64) for _, row_groups in shards]
        return cls(
            paths=tuple(path for path, _ in shards),
            shard=np.repeat(np.arange(len(shards)), [len(row_groups) for row_groups in counts]),
            row_group=np.concatenate([np.arange(len(row_groups)) for row_groups in counts]),
            token_start=np.concatenate([[0], np.cumsum(np.concatenate(counts))]),
        )

    @property
    def num_row_groups(self) -> int:
        """Over all files."""
        return len(self.row_group)

    @property
    def num_tokens(self) -> int:
        """Over all files."""
        return int(self.token_start[-1])

    def find(self, token: Ints | int) -> Any:
        """Return the row group that holds each of the tokens."""
        return np.searchsorted(self.token_start, token, side="right") - 1

    def token(self, number: int) -> int:
        """Return one token by its number in the stream. It decodes a row group: too slow for training."""
        index = int(self.find(number))
        return int(self.decode(index)[number - int(self.token_start[index])])

    def fetch(self, index: int) -> bytes:
        """Return the bytes of a row group's tokens, of a shard in a store. Raises what RemoteShard.read does."""
        path = self.paths[self.shard[index]]
        assert isinstance(path, RemoteShard)
        return path.read(self._tokens_range(path, index))

    def decode(self, index: int, fetched: bytes | None = None) -> NDArray[Any]:
        """Return all tokens of a row group, as the unsigned integers of the file. `fetched`: what `fetch` returned.

        Raises ConfigError when the file cannot be read or holds another number of tokens than it should; of a shard in
        a store also what RemoteShard.read raises.
        """
        path, row_group = self.paths[self.shard[index]], int(self.row_group[index])
        expected = int(self.token_start[index + 1] - self.token_start[index])
        held = {}
        if isinstance(path, RemoteShard) and fetched is not None:
            held = {self._tokens_range(path, index): fetched}
        try:
            with open_shard(path, held) as file:
                name = _tokens_column(file.schema_arrow.names)
                column = file.read_row_group(row_group, columns=[name], use_threads=False).column(0)
                tokens: NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=True)
        except StorageError:
            raise
        except (OSError, pa.ArrowException, IndexError, StopIteration) as error:
            raise self._damaged(index, f"cannot be read ({error})") from error
        if len(tokens) != expected:
            raise self._damaged(index, f"holds {counted(len(tokens), 'token')}, but {expected} are expected")
        return tokens

    def _tokens_range(self, shard: RemoteShard, index: int) -> Range:
        column = _tokens_column(footer(shard).schema.to_arrow_schema().names)
        return shard.tokens_range(int(self.row_group[index]), column)

    def _damaged(self, index: int, found: str) -> ConfigError:
        path, row_group = self.paths[self.shard[index]], int(self.row_group[index])
        if isinstance(path, RemoteShard):
            path.forget(self._tokens_range(path, index))
            return path.changed(f"row group {row_group} {found}")
        return ConfigError(
            f"{path}: row group {row_group} {found}: the shard is damaged or was changed; make the shards again with "
            "`llmtrain prepare CONFIG`"
        )


def open_shard(path: Path | RemoteShard, held: Mapping[Range, bytes] | None = None) -> pq.ParquetFile:
    """Open a shard, whose footer is read once. `held`: ranges of a shard in a store that were fetched already."""
    if isinstance(path, RemoteShard):
        return path.open(held or {})
    status = path.stat()
    metadata = _local_footer(path, status.st_size, status.st_mtime_ns)
    return pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)


@lru_cache(maxsize=256)
def _local_footer(path: Path, size: int, mtime_ns: int) -> pq.FileMetaData:
    return pq.read_metadata(path)


def _tokens_column(names: Sequence[str]) -> str:
    return next(name for name in TOKENS_COLUMNS if name in names)


@dataclass(frozen=True, eq=False)
class ShardWindows:
    """The windows of a stream: a WindowSource."""

    stream: TokenStream
    seq_len: int

    @property
    def num_windows(self) -> int:
        """Every token but the first is predicted once, so the last window may be short."""
        return -(-(self.stream.num_tokens - 1) // self.seq_len)

    def open(self, order: WindowOrder | None, *, world_size: int = 1) -> ShardReader:
        """Return a reader that keeps the row groups of all chunks that it has open at once: none is read twice.

        Of `world_size` ranks, each reads its part of the open chunks, and now and then one of another rank. In the
        windows' own order (None) two row groups are enough. Of a small source, which is shuffled as a whole, all are
        kept.
        """
        if order is None:
            return ShardReader(self, max_row_groups=2)
        if order.is_small:
            return ShardReader(self, max_row_groups=self.stream.num_row_groups)
        bounds = order.chunk_starts() * self.seq_len
        first = self.stream.find(bounds[:-1])
        last = self.stream.find(np.minimum(bounds[1:], self.stream.num_tokens - 1))
        widest = int((last - first).max()) + 1
        num_open = order.shuffle_chunks if world_size == 1 else -(-order.shuffle_chunks // world_size) + 1
        return ShardReader(self, max_row_groups=num_open * widest + 2)


class ShardReader:
    """Reads windows and keeps the `max_row_groups` row groups that were used last. Not to be shared between threads."""

    def __init__(self, windows: ShardWindows, *, max_row_groups: int) -> None:
        self.max_row_groups = max_row_groups
        self.num_decoded = 0
        """Row groups decoded so far."""
        self._stream = windows.stream
        self._seq_len = windows.seq_len
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._ahead_tokens = 0
        """Tokens that were requested and not decoded yet."""
        is_remote = any(isinstance(path, RemoteShard) for path in self._stream.paths)
        self._fetcher = Fetcher(self._stream.fetch) if is_remote else None

    @property
    def fetches(self) -> bool:
        """True if shards lie in a store."""
        return self._fetcher is not None

    def expect(self, windows: Ints) -> bool:
        """Begin to fetch what reading these windows later will need; return False once that is all it can hold."""
        if self._fetcher is None:
            return True
        starts = windows * self._seq_len
        first = self._stream.find(starts)
        last = self._stream.find(np.minimum(starts + self._seq_len, self._stream.num_tokens - 1))
        for begin, end in zip(first.tolist(), last.tolist(), strict=True):
            for index in range(begin, end + 1):
                if self._ahead_tokens >= MAX_AHEAD_TOKENS:
                    return False
                is_remote = isinstance(self._stream.paths[self._stream.shard[index]], RemoteShard)
                if is_remote and index not in self._kept and not self._fetcher.is_requested(index):
                    self._fetcher.request(index)
                    self._ahead_tokens += self._num_tokens(index)
        return True

    def read(self, windows: Ints, out: Ints) -> Ints:
        """Fill each row of `out` [n, seq_len + 1] with a window; return the number of its tokens, [n]."""
        starts = windows * self._seq_len
        lengths = np.minimum(self._seq_len + 1, self._stream.num_tokens - starts)
        indices = self._stream.find(starts)
        for row, start, length, index in zip(out, starts.tolist(), lengths.tolist(), indices.tolist(), strict=True):
            self._copy(row[:length], start, index)
        return lengths

    def _copy(self, out: Ints, token: int, index: int) -> None:
        """Fill `out` with the tokens from number `token` on, which lies in row group `index`."""
        filled = 0
        while filled < len(out):
            offset = token + filled - int(self._stream.token_start[index])
            piece = self._row_group(index)[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1

    def _row_group(self, index: int) -> NDArray[Any]:
        if index in self._kept:
            self._kept.move_to_end(index)
        else:
            if len(self._kept) >= self.max_row_groups:
                self._kept.popitem(last=False)
            fetched = None
            if self._fetcher is not None and self._fetcher.is_requested(index):
                self._ahead_tokens -= self._num_tokens(index)
                fetched = self._fetcher.take(index)
            self._kept[index] = self._stream.decode(index, fetched)
            self.num_decoded += 1
        return self._kept[index]

    def _num_tokens(self, index: int) -> int:
        return int(self._stream.token_start[index + 1] - self._stream.token_start[index])
