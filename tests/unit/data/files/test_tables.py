"""Tables are read in parts, whatever their files look like."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data.files.find import DataFile
from llmtrain.data.files.tables import BATCH_ROWS, tables_of


def test_a_row_group_as_large_as_its_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [random.Random(n).randbytes(250).hex() for n in range(60_000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=len(texts))
    assert pq.read_metadata(path).num_row_groups == 1
    assert path.stat().st_size > 15_000_000
    start, before = 0, pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()  # what Arrow reads from a Python file is Python's
    try:
        for table, _ in tables_of(DataFile(str(path), "parquet", None), ["text"]):
            most = max(most, pa.total_allocated_bytes() - before)
            assert len(table) <= BATCH_ROWS
            assert table.column("text").to_pylist() == texts[start : start + len(table)]
            start += len(table)
        most += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert start == len(texts)
    assert most < path.stat().st_size / 2
