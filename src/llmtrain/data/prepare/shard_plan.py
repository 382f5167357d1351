"""Decide where row groups and shards end, from the lengths of the documents alone.

    encoded files, in reading order ─ ShardPlan.add ─→ PlannedShard … ─ `shard_writer` ─→ Parquet files

A row group ends before the document that would make it too long, and a shard before such a row group. So the same
documents give the same shards, whoever encodes and writes them. A document that is longer has a row group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.data.manifest import RowGroups

ROW_GROUP_TOKENS = 1 << 15
"""Most tokens in a row group of several documents.

A row group is what a reader fetches. A chunk of the order holds 32 of them, and begins and ends inside of others: it
costs 1/32 more than it holds. Smaller ones would save less than their entries in the footer cost.
"""


@dataclass(frozen=True)
class Rows:
    """Documents that follow one another in an encoded file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class PlannedShard:
    """A shard, and where its documents are."""

    path: str
    """Path in the folder of shards, as in the manifest."""
    row_groups: RowGroups
    rows: tuple[tuple[Rows, ...], ...]
    """Documents of each row group."""
    spent: tuple[str, ...]
    """The encoded files whose last document is in this shard."""


class ShardPlan:
    """Plan of the shards of a folder: <name>/shard_00000.parquet and on, from `first_shard`.

    `name` is the split, or the split and the subset.
    """

    def __init__(self, name: str, *, shard_size: int, first_shard: int = 0) -> None:
        self._name = name
        self._shard_size = shard_size
        self._row_group_size = min(ROW_GROUP_TOKENS, shard_size)
        self._num_shards = first_shard
        self._ends: dict[str, int] = {}
        """Number of documents of each file that is not used up."""
        self._clear_group()
        self._clear_shard()

    def add(self, file: str, *, lengths: Sequence[int], num_bytes: Sequence[int]) -> list[PlannedShard]:
        """Append an encoded file's documents, given their tokens and bytes of text; return the shards that are full."""
        full: list[PlannedShard] = []
        for row, (length, size) in enumerate(zip(lengths, num_bytes, strict=True)):
            if self._rows and self._group_tokens + length > self._row_group_size:
                full += self._end_group()
            if self._rows and self._rows[-1].file == file:
                self._rows[-1] = Rows(file, self._rows[-1].start, row + 1)
            else:
                self._rows.append(Rows(file, row, row + 1))
            self._group_tokens += length
            self._group_bytes += size
        if lengths:
            self._ends[file] = len(lengths)
        return full

    def close(self) -> list[PlannedShard]:
        """Return the shards of the documents that are left: none, one, or two."""
        full = self._end_group() if self._rows else []
        return full + self._end_shard()

    def _end_group(self) -> list[PlannedShard]:
        full = (
            self._end_shard()
            if self._shard_tokens and self._shard_tokens + self._group_tokens > self._shard_size
            else []
        )
        documents = sum(rows.stop - rows.start for rows in self._rows)
        self._groups.append((documents, self._group_tokens, self._group_bytes))
        self._shard_tokens += self._group_tokens
        self._group_rows.append(tuple(self._rows))
        self._clear_group()
        return full

    def _end_shard(self) -> list[PlannedShard]:
        if not self._groups:
            return []
        spent = [rows.file for group in self._group_rows for rows in group if self._ends.get(rows.file) == rows.stop]
        for file in spent:
            del self._ends[file]
        documents, tokens, num_bytes = zip(*self._groups, strict=True)
        shard = PlannedShard(
            path=f"{self._name}/shard_{self._num_shards:05d}.parquet",
            row_groups=RowGroups(documents=documents, tokens=tokens, bytes=num_bytes),
            rows=tuple(self._group_rows),
            spent=tuple(spent),
        )
        self._num_shards += 1
        self._clear_shard()
        return [shard]

    def _clear_group(self) -> None:
        self._rows: list[Rows] = []
        self._group_tokens = 0
        self._group_bytes = 0

    def _clear_shard(self) -> None:
        self._groups: list[tuple[int, int, int]] = []
        """Documents, tokens and bytes of each row group."""
        self._shard_tokens = 0
        self._group_rows: list[tuple[Rows, ...]] = []
