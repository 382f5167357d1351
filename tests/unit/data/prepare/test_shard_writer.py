"""Shards: row groups, files, types, and text again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.manifest import Split
from llmtrain.data.prepare import shard_writer
from llmtrain.data.prepare.encode import token_dtype
from llmtrain.data.prepare.shard_writer import ShardWriter


def _write(
    folder: Path, lengths: list[int], *, shard_size: int, dtype: str = "uint16", keep_text: bool = False
) -> Split:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, name="train", dtype=np.dtype(dtype), shard_size=shard_size, keep_text=keep_text)
    for index, length in enumerate(lengths):
        tokens = np.full(length, index + 1, dtype)
        tokens[-1:] = 0
        writer.add(f"in:a:{index}", tokens=tokens, num_bytes=3 * length, text=f"text {index}")
    return writer.close()


def test_row_groups_and_shards_end_before_they_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "ROW_GROUP_TOKENS", 10)
    split = _write(tmp_path, [4, 6, 1, 25, 3, 3, 3, 3, 9], shard_size=22)
    groups = [list(zip(shard.row_groups.documents, shard.row_groups.tokens, strict=True)) for shard in split.shards]
    assert groups == [[(2, 10), (1, 1)], [(1, 25)], [(3, 9), (1, 3), (1, 9)]]
    assert [shard.path for shard in split.shards] == [f"train/shard_0000{n}.parquet" for n in range(3)]
    assert (split.documents, split.tokens, split.bytes) == (9, 57, 3 * 57)
    for shard in split.shards:
        path = tmp_path / shard.path
        assert (shard.size, shard.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        footer = pq.read_metadata(path)
        row_groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
        assert tuple(group.num_rows for group in row_groups) == shard.row_groups.documents
        assert [group.column(2).statistics.max for group in row_groups]  # footers.py compares it with the vocabulary
        assert {group.column(0).statistics for group in row_groups} == {None}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_columns_are_as_documented(tmp_path: Path, dtype: str) -> None:
    _write(tmp_path, [3, 1], shard_size=100, dtype=dtype, keep_text=True)
    path = tmp_path / "train/shard_00000.parquet"
    table = pq.read_table(path)
    assert [(field.name, field.type) for field in table.schema] == [
        ("source", pa.string()),
        ("length", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))),
    ]
    assert table.to_pylist() == [
        {"source": "in:a:0", "length": 3, "text": "text 0", "tokens": [1, 1, 0]},
        {"source": "in:a:1", "length": 1, "text": "text 1", "tokens": [0]},
    ]
    group = pq.read_metadata(path).row_group(0)
    for column in range(group.num_columns):
        assert group.column(column).compression == "ZSTD"
        assert group.column(column).has_dictionary_page


def test_a_large_vocabulary_keeps_its_dictionary(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, name="val", dtype=np.dtype("uint32"), shard_size=10**9, keep_text=False)
    tokens = np.random.default_rng(0).integers(0, 260_000, 1_000_000).astype(np.uint32)
    writer.add("a", tokens=tokens, num_bytes=0, text="")
    split = writer.close()
    assert split.shards[0].size < 1_000_000 * 18 / 8 + 260_000 * 4 + 20_000


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")],
)
def test_tokens_have_the_narrowest_type(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_an_aborted_writer_lets_go_of_its_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, name="train", dtype=np.dtype("uint8"), shard_size=1, keep_text=False)
    for _ in range(3):
        writer.add("a", tokens=np.zeros(2, np.uint8), num_bytes=1, text="")
    writer.abort()
    writer.abort()
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
