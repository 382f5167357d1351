"""Write documents: encoded files for the time of the preparation, and the shards that are put together from them.

    documents of a unit ─ write_encoded ─→ <partial>/work/….arrow ─ ShardWriter ─→ <partial>/train/shard_00000.parquet

A file appears under its name when it is whole. It may be written twice, by a task whose worker was lost and by the one
that took its place: both write the same. Where shards end is `shard_plan`; reading shards is `data.shards`; the format
is in docs/data-format.md.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llmtrain.data.manifest import Shard, TokenDtype
from llmtrain.data.prepare.shard_plan import PlannedShard, Rows
from llmtrain.faults import reach

WORK_FOLDER = "work"
"""Folder in the unfinished output for what is not a part of it."""


def document_table(
    sources: Sequence[str],
    tokens: Sequence[NDArray[np.unsignedinteger]],
    *,
    dtype: TokenDtype,
    texts: Sequence[str] | None = None,
) -> pa.Table:
    """Return documents as rows of a shard. `tokens` are those of each document, its end token included."""
    lengths = np.array([len(of_document) for of_document in tokens], np.int32)
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    item = pa.field("item", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
    values = pa.array(np.concatenate([np.empty(0, dtype), *tokens]).astype(dtype, copy=False))
    columns = {
        "source": pa.array(sources, pa.string()),
        "length": pa.array(lengths),
        "text": None if texts is None else pa.array(texts, pa.string()),
        "tokens": pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(item)),
    }
    kept = {name: column for name, column in columns.items() if column is not None}
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in kept.items()])
    return pa.table(list(kept.values()), schema=schema)


def write_encoded(work: Path, name: str, documents: pa.Table) -> None:
    """Write documents into a file of the work folder, for `ShardWriter`."""
    with _whole(work / name, work=work) as path, pa.ipc.new_file(str(path), documents.schema) as writer:
        writer.write_table(documents)


@dataclass(frozen=True)
class ShardWriter:
    """Task that writes a planned shard into `folder` from the encoded files in `work`."""

    folder: Path
    work: Path

    def __call__(self, planned: PlannedShard) -> Shard:
        """Return the record of the shard, which is on disk for good."""
        target = self.folder / planned.path
        reach("shard-begun", path=planned.path)
        with _whole(target, work=self.work) as path:
            parquet: pq.ParquetWriter | None = None
            tables: dict[str, pa.Table] = {}
            for rows in planned.rows:
                group = self._read(rows, tables)
                if parquet is None:
                    parquet = _open_parquet(path, group.schema)
                parquet.write_table(group, row_group_size=len(group))
            assert parquet is not None, "a shard has a row group"
            parquet.close()
            digest, size = _sync_and_hash(path)
        return Shard(
            path=planned.path,
            size=size,
            sha256=digest,
            rows=sum(planned.row_groups.documents),
            tokens=sum(planned.row_groups.tokens),
            bytes=sum(planned.row_groups.bytes),
            row_groups=planned.row_groups,
        )

    def _read(self, rows: Sequence[Rows], tables: dict[str, pa.Table]) -> pa.Table:
        """Return the documents of a row group in one piece, since pages end where pieces end.

        `tables`: the encoded files that are open, by name; what is read of one is a view of the file.
        """
        parts = []
        for part in rows:
            if part.file not in tables:
                with pa.memory_map(str(self.work / part.file)) as file:
                    tables[part.file] = pa.ipc.open_file(file).read_all()
            parts.append(tables[part.file].slice(part.start, part.stop - part.start))
        return pa.concat_tables(parts).combine_chunks()


def _open_parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=True,
        dictionary_pagesize_limit=1 << 23,  # of 4 bytes a token: holds any vocabulary, so none falls back to plain
        write_page_checksum=True,
        write_statistics=["tokens.list.element"],  # the others: a third of the footer, and nothing reads them
    )


@contextmanager
def _whole(target: Path, *, work: Path) -> Iterator[Path]:
    """Yield a path of this attempt alone, whose file takes the place of `target` when the block ends well."""
    path = work / f"{uuid.uuid4().hex}.tmp"
    try:
        yield path
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_and_hash(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
