"""Writing a folder of shards: documents go in one by one, Parquet files and their record come out.

Where row groups and shards end depends on the documents alone, so the same documents give the same bytes.
Reading shards is `data.shards`; the format is in docs/data-format.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmtrain.data.manifest import RowGroups, Shard, Split
from llmtrain.faults import reach

ROW_GROUP_TOKENS = 1 << 15
"""A row group ends before the document that would make it longer; a document that is longer has one of its own.

A row group is what a reader fetches. A chunk of the order holds 32 of them, and begins and ends inside of others: it
costs 1/32 more than it holds. Smaller ones would save less than their entries in the footer cost.
"""


class ShardWriter:
    """Writes <folder>/<name>/shard_00000.parquet and on, from the first that is not written yet.

    `name` is the split, or the split and the subset. `on_shard` is called with every shard that is whole and on disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        dtype: np.dtype[np.unsignedinteger],
        shard_size: int,
        keep_text: bool,
        written: Sequence[Shard] = (),
        on_shard: Callable[[Shard], None] = lambda shard: None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._on_shard = on_shard
        self._shard_size = shard_size
        self._row_group_size = min(ROW_GROUP_TOKENS, shard_size)
        fields = [
            pa.field("source", pa.string(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("tokens", pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)), nullable=False),
        ]
        if keep_text:
            fields.insert(2, pa.field("text", pa.string(), nullable=False))
        self._schema = pa.schema(fields)
        self._dtype = dtype
        self._shards = list(written)
        self._row_groups: list[tuple[int, int, int]] = []
        """Documents, tokens and bytes of each row group of the open shard."""
        self._parquet: pq.ParquetWriter | None = None
        self._clear_row_group()

    @property
    def num_written(self) -> int:
        """Documents in whole shards. The next one begins a shard, as it would have without a stop between them."""
        return sum(shard.rows for shard in self._shards)

    def add(self, source: str, *, tokens: NDArray[np.unsignedinteger], num_bytes: int, text: str) -> None:
        """Append a document: its tokens with the end token, and the UTF-8 bytes of its text."""
        if self._sources and self._group_tokens + len(tokens) > self._row_group_size:
            self._write_row_group()
        self._sources.append(source)
        self._texts.append(text)
        self._tokens.append(tokens)
        self._group_tokens += len(tokens)
        self._group_bytes += num_bytes

    def close(self) -> Split:
        """Write what is left. The files are on disk for good when this returns."""
        if self._sources:
            self._write_row_group()
        self._close_shard()
        return Split(
            documents=sum(shard.rows for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            bytes=sum(shard.bytes for shard in self._shards),
            shards=tuple(self._shards),
        )

    def abort(self) -> None:
        """Let go of the open file, on the way out of an error; closing twice is no harm."""
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None

    def _clear_row_group(self) -> None:
        self._sources: list[str] = []
        self._texts: list[str] = []
        self._tokens: list[NDArray[np.unsignedinteger]] = []
        self._group_tokens = 0
        self._group_bytes = 0

    def _write_row_group(self) -> None:
        shard_tokens = sum(tokens for _, tokens, _ in self._row_groups)
        if shard_tokens and shard_tokens + self._group_tokens > self._shard_size:
            self._close_shard()
        if self._parquet is None:
            self._parquet = self._open_shard()
        lengths = np.array([len(tokens) for tokens in self._tokens], np.int32)
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        columns = {
            "source": pa.array(self._sources, pa.string()),
            "length": pa.array(lengths),
            "tokens": pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(np.concatenate(self._tokens)), type=self._schema.field("tokens").type
            ),
            "text": pa.array(self._texts, pa.string()),
        }
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        self._parquet.write_table(table, row_group_size=len(lengths))
        self._row_groups.append((len(lengths), self._group_tokens, self._group_bytes))
        self._clear_row_group()

    @property
    def _shard_path(self) -> str:
        return f"{self._name}/shard_{len(self._shards):05d}.parquet"

    def _open_shard(self) -> pq.ParquetWriter:
        path = self._folder / self._shard_path
        path.parent.mkdir(parents=True, exist_ok=True)
        reach("shard-begun", path=self._shard_path)
        return pq.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            use_dictionary=True,
            dictionary_pagesize_limit=1 << 23,  # of 4 bytes a token: holds any vocabulary, so none falls back to plain
            write_page_checksum=True,
            write_statistics=[
                "tokens.list.element"
            ],  # the others would make a third of the footer, and nothing reads them
        )

    def _close_shard(self) -> None:
        if self._parquet is None:
            return
        self._parquet.close()
        self._parquet = None
        path = self._folder / self._shard_path
        digest, size = _sync_and_hash(path)
        documents, tokens, num_bytes = zip(*self._row_groups, strict=True)
        shard = Shard(
            path=self._shard_path,
            size=size,
            sha256=digest,
            rows=sum(documents),
            tokens=sum(tokens),
            bytes=sum(num_bytes),
            row_groups=RowGroups(documents=documents, tokens=tokens, bytes=num_bytes),
        )
        self._shards.append(shard)
        self._row_groups = []
        self._on_shard(shard)


def _sync_and_hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
