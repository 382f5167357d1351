"""Shards: row groups, files, types, and text again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.manifest import Shard, TokenDtype
from llmtrain.data.prepare import shard_plan
from llmtrain.data.prepare.encode import token_dtype
from llmtrain.data.prepare.shard_plan import PlannedShard, ShardPlan
from llmtrain.data.prepare.shard_writer import ShardWriter, document_table, write_encoded


def _write(
    folder: Path,
    lengths: list[int],
    *,
    shard_size: int,
    dtype: TokenDtype = "uint16",
    keep_text: bool = False,
    a_file: int = 3,
) -> list[Shard]:
    """Write documents of these lengths, so many of them from each encoded file."""
    work = folder / "work"
    work.mkdir(parents=True)
    plan = ShardPlan("train", shard_size=shard_size)
    planned = []
    for start in range(0, len(lengths), a_file):
        numbers = range(start, min(start + a_file, len(lengths)))
        tokens = [np.full(lengths[number], number + 1, dtype) for number in numbers]
        for of_document in tokens:
            of_document[-1:] = 0
        texts = [f"text {number}" for number in numbers] if keep_text else None
        table = document_table([f"in:a:{number}" for number in numbers], tokens, dtype=dtype, texts=texts)
        write_encoded(work, f"{start}.arrow", table)
        of_file = [lengths[number] for number in numbers]
        planned += plan.add(f"{start}.arrow", lengths=of_file, num_bytes=[3 * length for length in of_file])
    return [ShardWriter(folder, work)(shard) for shard in planned + plan.close()]


def _groups(shards: list[Shard]) -> list[list[tuple[int, int]]]:
    return [list(zip(shard.row_groups.documents, shard.row_groups.tokens, strict=True)) for shard in shards]


def test_row_groups_and_shards_end_before_they_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_plan, "ROW_GROUP_TOKENS", 10)
    shards = _write(tmp_path, [4, 6, 1, 25, 3, 3, 3, 3, 9], shard_size=22)
    assert _groups(shards) == [[(2, 10), (1, 1)], [(1, 25)], [(3, 9), (1, 3), (1, 9)]]
    assert [shard.path for shard in shards] == [f"train/shard_0000{n}.parquet" for n in range(3)]
    totals = [sum(getattr(shard, name) for shard in shards) for name in ("rows", "tokens", "bytes")]
    assert totals == [9, 57, 3 * 57]
    for shard in shards:
        path = tmp_path / shard.path
        assert (shard.size, shard.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        footer = pq.read_metadata(path)
        row_groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
        assert tuple(group.num_rows for group in row_groups) == shard.row_groups.documents
        assert [group.column(2).statistics.max for group in row_groups]  # footers.py compares it with the vocabulary
        assert {group.column(0).statistics for group in row_groups} == {None}


def test_encoded_files_leave_no_trace_in_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_plan, "ROW_GROUP_TOKENS", 30_000)
    lengths = np.random.default_rng(0).integers(1, 3000, 100).tolist()
    made = [
        [shard.sha256 for shard in _write(tmp_path / str(a_file), lengths, shard_size=70_000, a_file=a_file)]
        for a_file in (1, 7, 100)
    ]
    assert len(made[0]) > 1
    assert made[0] == made[1] == made[2]


def test_a_shard_may_be_written_twice_and_nothing_else_stays(tmp_path: Path) -> None:
    [shard] = _write(tmp_path, [3, 1], shard_size=100)
    again = _write_again(tmp_path, [3, 1])
    assert again == shard
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["0.arrow"]


def _write_again(folder: Path, lengths: list[int]) -> Shard:
    plan = ShardPlan("train", shard_size=100)
    plan.add("0.arrow", lengths=lengths, num_bytes=[3 * length for length in lengths])
    [planned] = plan.close()
    return ShardWriter(folder, folder / "work")(planned)


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), max_size=12),
    st.integers(1, 60),
)
def test_a_plan_has_every_document_once_and_names_every_file_that_is_used_up(
    files: list[list[int]], shard_size: int
) -> None:
    plan = ShardPlan("val", shard_size=shard_size)
    planned: list[PlannedShard] = []
    used_up: set[str] = set()
    for number, lengths in enumerate(files):
        planned += plan.add(str(number), lengths=lengths, num_bytes=lengths)
    planned += plan.close()
    found = [
        (int(rows.file), row)
        for shard in planned
        for group in shard.rows
        for rows in group
        for row in range(rows.start, rows.stop)
    ]
    assert found == [(number, row) for number, lengths in enumerate(files) for row in range(len(lengths))]
    for shard in planned:
        assert not used_up & {rows.file for group in shard.rows for rows in group}
        used_up |= set(shard.spent)
        groups = shard.row_groups
        for documents, tokens, rows in zip(groups.documents, groups.tokens, shard.rows, strict=True):
            lengths = [length for part in rows for length in files[int(part.file)][part.start : part.stop]]
            assert (documents, tokens) == (len(lengths), sum(lengths))
            assert documents == 1 or tokens <= shard_size
    assert used_up == {str(number) for number in range(len(files))}
    rest = ShardPlan("val", shard_size=shard_size, first_shard=1)  # as after a stop with one shard written
    skip = sum(planned[0].row_groups.documents) if planned else 0
    for number, lengths in enumerate(files):
        left = lengths[skip:]
        skip = max(0, skip - len(lengths))
        planned += rest.add(str(number), lengths=left, num_bytes=left)
    planned += rest.close()
    half = (len(planned) + 1) // 2
    assert [(shard.path, shard.row_groups) for shard in planned[1:half]] == [
        (shard.path, shard.row_groups) for shard in planned[half:]
    ]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_columns_are_as_documented(tmp_path: Path, dtype: TokenDtype) -> None:
    _write(tmp_path, [3, 1], shard_size=100, dtype=dtype, keep_text=True)
    path = tmp_path / "train/shard_00000.parquet"
    table = pq.read_table(path)
    assert [(field.name, field.type, field.nullable) for field in table.schema] == [
        ("source", pa.string(), False),
        ("length", pa.int32(), False),
        ("text", pa.string(), False),
        ("tokens", pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)), False),
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
    tokens = np.random.default_rng(0).integers(0, 260_000, 1_000_000).astype(np.uint32)
    write_encoded(tmp_path, "0.arrow", document_table(["a"], [tokens], dtype="uint32"))
    plan = ShardPlan("val", shard_size=10**9)
    plan.add("0.arrow", lengths=[len(tokens)], num_bytes=[0])
    [planned] = plan.close()
    shard = ShardWriter(tmp_path, tmp_path)(planned)
    assert shard.size < 1_000_000 * 18 / 8 + 260_000 * 4 + 20_000


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")],
)
def test_tokens_have_the_narrowest_type(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1
