"""A survey of token shards: lengths of documents, their sources, the tokens that occur, documents that windows divide.

    stream ─ row groups, evenly spaced where there are many ─▶ Survey
           └ the first documents ─▶ TokenizedDocument

Reading for training is shards.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llmtrain.data.order import Ints
from llmtrain.data.remote_shards import RemoteShard
from llmtrain.data.shards import TOKENS_COLUMNS, TokenStream, open_shard
from llmtrain.errors import ConfigError

MAX_ROW_GROUPS = 512
"""Row groups that a survey reads: seconds, whatever the size of the data."""
SOURCE_COLUMN = "source"
UNKNOWN_SOURCE = "(not recorded)"


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """A row of a shard."""

    source: str
    tokens: NDArray[Any]
    """Tokens of the document, with the end token."""


@dataclass(kw_only=True)
class Survey:
    """Counts of the row groups that were read; they are estimates if those are not all."""

    num_row_groups: int
    num_row_groups_read: int
    token_counts: Ints
    """[vocab_size] number of times that each token occurs."""
    lengths: Ints = field(default_factory=lambda: _zeros(0))
    """[documents] tokens of each, end token counted."""
    documents_by_source: Counter[str] = field(default_factory=Counter)
    """Number of documents by the start of `source`, up to its colon: an input, or a data set with split and subset."""
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    num_divided: int = 0
    """Documents that no window holds completely."""
    num_without_end: int = 0
    """Documents whose last token is not the end token."""
    foreign_ids: set[int] = field(default_factory=set)
    """Ids that the vocabulary does not have."""


class RowGroupContent(NamedTuple):
    """Documents of a row group."""

    path: Path
    sources: list[str]
    tokens: Ints
    """Tokens of all documents, without ids that the vocabulary does not have."""
    ends: Ints
    """[documents] where each ends in `tokens`."""


def evenly_spaced(num_row_groups: int, *, at_most: int = MAX_ROW_GROUPS) -> list[int]:
    """Return numbers of row groups: all of them, or `at_most` evenly spaced."""
    num_read = min(num_row_groups, at_most)
    return [place * num_row_groups // num_read for place in range(num_read)]


def survey(
    streams: Sequence[TokenStream],
    *,
    vocab_size: int,
    eos_id: int | None,
    seq_len: int,
    chosen: Sequence[int] | None = None,
    observe: Callable[[RowGroupContent], None] | None = None,
) -> Survey:
    """Read the row groups of the streams whose numbers are `chosen`, and count. `observe` gets each of them.

    Without `chosen`: all, or MAX_ROW_GROUPS of them evenly spaced. Raises ConfigError when a file cannot be read.
    """
    row_groups = [(stream, index) for stream in streams for index in range(stream.num_row_groups)]
    places = evenly_spaced(len(row_groups)) if chosen is None else chosen
    found = Survey(num_row_groups=len(row_groups), num_row_groups_read=len(places), token_counts=_zeros(vocab_size))
    lengths = [_zeros(0)]
    for stream, index in (row_groups[place] for place in places):
        sources, tokens, ends = _read(stream, index)
        begins = np.concatenate([_zeros(1), ends[:-1]])
        lengths.append(ends - begins)
        is_known = tokens < vocab_size
        found.foreign_ids |= set(np.unique(tokens[~is_known]).tolist())
        found.token_counts += np.bincount(tokens[is_known], minlength=vocab_size)
        if observe is not None:
            known_ends = np.concatenate([_zeros(1), np.cumsum(is_known)])[ends]
            observe(RowGroupContent(stream.paths[stream.shard[index]], sources, tokens[is_known], known_ends))
        first = int(stream.token_start[index])
        # Window w holds the tokens from w·seq_len up to (w + 1)·seq_len, both.
        found.num_divided += int((first + ends - 1 > ((first + begins) // seq_len + 1) * seq_len).sum())
        ends_well = (ends > begins) & (tokens[np.maximum(ends, 1) - 1] == eos_id)
        found.num_without_end += 0 if eos_id is None else int((~ends_well).sum())
        for source, length in zip(sources, lengths[-1].tolist(), strict=True):
            name = source.partition(":")[0]
            found.documents_by_source[name] += 1
            found.tokens_by_source[name] += length
    found.lengths = np.concatenate(lengths)
    return found


def _zeros(size: int) -> Ints:
    return np.zeros(size, dtype=np.int64)


def count_documents(stream: TokenStream) -> int:
    """Return the number of documents, from the footers of files here. Raises ConfigError when a file cannot be read."""
    total = 0
    for path in stream.paths:
        if isinstance(path, RemoteShard):
            total += path.rows
            continue
        try:
            with open_shard(path) as file:
                total += file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{path} cannot be read ({error})") from error
    return total


def iter_documents(stream: TokenStream) -> Iterator[TokenizedDocument]:
    """Yield the documents of a stream in reading order, with one row group in memory at a time."""
    for index in range(stream.num_row_groups):
        sources, tokens, ends = _read(stream, index)
        begin = 0
        for source, end in zip(sources, ends.tolist(), strict=True):
            yield TokenizedDocument(source=source, tokens=tokens[begin:end])
            begin = end


def _read(stream: TokenStream, index: int) -> tuple[list[str], NDArray[Any], Ints]:
    """Return of a row group: each document's source, all tokens one after the other, and where each document ends."""
    tokens = stream.decode(index).astype(np.int64)  # which checks that they are as many as they should be
    path, row_group = stream.paths[stream.shard[index]], int(stream.row_group[index])
    with open_shard(path) as file:
        present = file.schema_arrow.names
        column = next(name for name in TOKENS_COLUMNS if name in present)
        names = [name for name in (SOURCE_COLUMN, column) if name in present]
        table = file.read_row_group(row_group, columns=names, use_threads=False)
    lengths = pc.list_value_length(table.column(column)).fill_null(0).to_numpy()
    named = table.column(SOURCE_COLUMN).to_pylist() if SOURCE_COLUMN in names else [None] * len(lengths)
    sources = [UNKNOWN_SOURCE if source is None else str(source) for source in named]
    return sources, tokens, np.cumsum(lengths, dtype=np.int64)
