"""Looking at token shards: counts and cuts are those of the documents."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.inspection.lengths import describe_lengths
from llmtrain.data.inspection.survey import UNKNOWN_SOURCE, count_documents, evenly_spaced, iter_documents, survey
from llmtrain.data.shards import TokenStream
from llmtrain.data.sources import open_source
from llmtrain.errors import ConfigError
from tests.support.token_shards import Cut, write_token_shards

DOCUMENTS: Cut = [[[[5, 6, 0], [7, 0]], [[5, 5, 5, 5, 0]]], [[[9, 0], [0], [8, 8]]]]


def stream_of(folder: Path, cut: Cut = DOCUMENTS) -> TokenStream:
    write_token_shards(folder, {"train": cut}, vocab_size=12)
    return open_source(str(folder / "train"), key="data.train").stream


def test_lengths_tokens_sources_and_faults_are_counted(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    found = survey([stream], vocab_size=8, eos_id=0, seq_len=100)
    assert found.lengths.tolist() == [3, 2, 5, 2, 1, 2]
    assert found.token_counts.tolist() == [5, 0, 0, 0, 0, 5, 1, 1]
    assert found.foreign_ids == {8, 9}
    assert found.num_without_end == 1
    assert found.documents_by_source == {"test": 6}
    assert found.tokens_by_source == {"test": 15}
    assert found.num_divided == 0
    described = describe_lengths(Counter(found.lengths.tolist()))
    assert described is not None
    assert [tuple(row.values()) for row in described["histogram"]] == [(1, 1, 1, 1), (2, 3, 4, 9), (4, 7, 1, 5)]
    assert [described[name] for name in ("shortest", "median", "p90", "longest")] == [1, 2, 5, 5]
    assert count_documents(stream) == 6
    assert (found.num_row_groups, found.num_row_groups_read) == (3, 3)


def test_documents_come_in_reading_order(tmp_path: Path) -> None:
    documents = list(iter_documents(stream_of(tmp_path)))
    assert [document.tokens.tolist() for document in documents] == [
        [5, 6, 0],
        [7, 0],
        [5, 5, 5, 5, 0],
        [9, 0],
        [0],
        [8, 8],
    ]
    assert [document.source for document in documents[:2]] == ["test:0", "test:1"]


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=30), seq_len=st.integers(2, 9))
def test_a_document_is_divided_where_no_window_holds_all_of_it(
    lengths: list[int], seq_len: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    stream = stream_of(folder, [[[[1] * (length - 1) + [0] for length in lengths]]])
    shutil.rmtree(folder / "val", ignore_errors=True)
    ends = np.cumsum(lengths)
    windows = [range(begin, begin + seq_len + 1) for begin in range(0, int(ends[-1]), seq_len)]
    whole = sum(
        any(end - length in window and end - 1 in window for window in windows)
        for end, length in zip(ends.tolist(), lengths, strict=True)
    )
    found = survey([stream], vocab_size=4, eos_id=0, seq_len=seq_len)
    assert found.num_divided == len(lengths) - whole


def test_of_many_row_groups_some_are_read_evenly_spaced(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[[[token, 0]] for token in range(1, 11)]])
    found = survey([stream], vocab_size=12, eos_id=0, seq_len=4, chosen=evenly_spaced(10, at_most=5))
    assert (found.num_row_groups, found.num_row_groups_read) == (10, 5)
    assert np.flatnonzero(found.token_counts).tolist() == [0, 1, 3, 5, 7, 9]


def test_several_streams_are_one_survey(tmp_path: Path) -> None:
    streams = [stream_of(tmp_path / "a"), stream_of(tmp_path / "b")]
    assert len(survey(streams, vocab_size=12, eos_id=0, seq_len=4).lengths) == 12


def test_shards_without_sources_are_read_all_the_same(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    for path in stream.paths:
        with pq.ParquetFile(path) as file:
            groups = [file.read_row_group(index).select(["tokens"]) for index in range(file.num_row_groups)]
        with pq.ParquetWriter(path, groups[0].schema) as writer:
            for group in groups:
                writer.write_table(group)
    found = survey([stream], vocab_size=12, eos_id=0, seq_len=4)
    assert found.documents_by_source == {UNKNOWN_SOURCE: 6}


def test_a_shard_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    path = stream.paths[1]
    assert isinstance(path, Path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"shard_00001\.parquet"):
        count_documents(stream)
    with pytest.raises(ConfigError, match=r"shard_00001\.parquet"):
        survey([stream], vocab_size=12, eos_id=0, seq_len=4)
