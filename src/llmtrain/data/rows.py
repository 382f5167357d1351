"""Windows of tokens -> the rows of a step: inputs, labels, document numbers, as numpy arrays.

    step -> items -> this rank's share -> windows of the sources -> rows, padded to whole micro-batches

A plan says which rows each step has. It is small, can be sent to another process, and imports no torch, so that workers
start quickly; `open` gives the function that makes a step's rows, with the readers and tables that it keeps. Where
windows come from is behind `WindowSource`; in which order they come is order.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.contracts import IGNORE_INDEX
from llmtrain.data.order import Ints, ItemOrder, SourceOrder, rank_share


class Rows(NamedTuple):
    """The rows of a step, or of a batch of an evaluation, on one rank."""

    input_ids: Ints
    """[rows, seq_len]"""
    labels: Ints
    """[rows, seq_len]; IGNORE_INDEX where there is nothing to predict."""
    document_ids: NDArray[np.int32] | None
    """[rows, seq_len]; None where a row is one document."""
    lengths: Ints | None = None
    """[rows]; tokens before the padding. None where all of them are supervised."""


class WindowReader(Protocol):
    """Reads windows of one source. Not to be shared between threads."""

    def read(self, windows: Ints, out: Ints) -> Ints:
        """Fill the first tokens of each row of `out` [n, seq_len + 1] with a window's; returns how many, [n].

        Only the last window of a source is shorter than its row.
        """
        ...


class WindowSource(Protocol):
    """Tokens that are cut into windows: window w holds tokens w·seq_len up to (w + 1)·seq_len, both included."""

    @property
    def num_windows(self) -> int:
        """Windows in one epoch; every token but the first is predicted in exactly one of them."""
        ...

    def open(self, order: SourceOrder | None) -> WindowReader:
        """A reader that keeps what reading in this order needs again; None: one window after the other."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a window becomes a row."""

    seq_len: int
    pad_id: int
    """Fills the inputs where a window is short; its labels are ignored."""
    end_id: int | None
    """The token that ends a document, where documents are told apart; None: a row is one document."""

    def empty(self, num_rows: int) -> Ints:
        """[num_rows, seq_len + 1] of padding, for windows to be read into."""
        return np.full((num_rows, self.seq_len + 1), self.pad_id, dtype=np.int64)

    def rows(self, tokens: Ints, lengths: Ints) -> Rows:
        """Inputs are all tokens of a row but its last, labels all but its first; `lengths` [n] are the real tokens.

        Rows after the n-th hold padding alone.
        """
        labels = tokens[:, 1:].copy()
        labels[len(lengths) :] = IGNORE_INDEX
        for row in np.flatnonzero(lengths <= self.seq_len):
            labels[row, max(0, lengths[row] - 1) :] = IGNORE_INDEX
        input_ids = np.ascontiguousarray(tokens[:, :-1])
        return Rows(input_ids, labels, None if self.end_id is None else document_ids(input_ids, self.end_id))


def document_ids(input_ids: Ints, end_id: int) -> NDArray[np.int32]:
    """[n, t] number of each token's document in its row, from 0. An end token belongs to the document that it ends."""
    is_end = input_ids == end_id
    numbers: NDArray[np.int32] = np.cumsum(is_end, axis=1, dtype=np.int32)
    numbers -= is_end
    return numbers


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """This rank's rows of each step: step s has the `batch_size` items from start_item + s·batch_size, to `end_item`.

    A step has as many rows on each rank, a multiple of the micro-batch (the last step, which may be short, perhaps
    fewer than the others). What the items do not fill is padding.
    """

    sources: Sequence[WindowSource]
    weights: Sequence[float] | None
    format: RowFormat
    shuffle_chunks: int
    seed: int
    start_item: int
    end_item: int
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def num_steps(self) -> int:
        """Steps, with the short one at the end."""
        return max(0, -(-(self.end_item - self.start_item) // self.batch_size))

    def order(self) -> ItemOrder:
        """The order of the items, of which the plan takes a part. Raises ConfigError for a weight that is too small."""
        return ItemOrder(
            [source.num_windows for source in self.sources],
            weights=self.weights,
            seq_len=self.format.seq_len,
            shuffle_chunks=self.shuffle_chunks,
            seed=self.seed,
        )

    def open(self) -> Callable[[int], Rows]:
        """The function from a step (0 is the one that begins at `start_item`) to its rows."""
        order = self.order()
        readers = [source.open(source_order) for source, source_order in zip(self.sources, order.sources, strict=True)]

        def rows_of_step(step: int) -> Rows:
            first = self.start_item + step * self.batch_size
            items = np.arange(first, min(first + self.batch_size, self.end_item))
            places = order.locate(items)
            share = rank_share(places, rank=self.rank, world_size=self.world_size)
            tokens = self.format.empty(whole_batches(len(items), self.micro_batch_size, self.world_size))
            lengths = np.zeros(len(share), dtype=np.int64)
            begin = 0
            for source, reader in enumerate(readers):  # a share is sorted by source
                windows = places.window[share[places.source[share] == source]]
                end = begin + len(windows)
                lengths[begin:end] = reader.read(windows, tokens[begin:end])
                begin = end
            return self.format.rows(tokens, lengths)

        return rows_of_step


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """This rank's batches of an evaluation: each window once, in their order, in contiguous shares.

    With `max_batches`, as many windows as fill these batches are taken, evenly spaced: the same at each evaluation and
    for any number of ranks, which share them. Every rank has as many batches.
    """

    source: WindowSource
    format: RowFormat
    batch_size: int
    """Rows of a batch on one rank."""
    max_batches: int | None
    rank: int
    world_size: int

    @property
    def _num_windows(self) -> int:
        limit = self.source.num_windows if self.max_batches is None else self.max_batches * self.batch_size
        return min(self.source.num_windows, limit)

    @property
    def num_batches(self) -> int:
        """Batches on each rank."""
        return whole_batches(self._num_windows, self.batch_size, self.world_size) // self.batch_size

    def open(self) -> Callable[[int], Rows]:
        """The function from a batch's index to its rows."""
        taken = self._num_windows
        begin, end = self.rank * taken // self.world_size, (self.rank + 1) * taken // self.world_size
        windows = np.arange(begin, end) * self.source.num_windows // taken
        reader = self.source.open(None)

        def rows_of_batch(index: int) -> Rows:
            mine = windows[index * self.batch_size : (index + 1) * self.batch_size]
            tokens = self.format.empty(self.batch_size)
            return self.format.rows(tokens, reader.read(mine, tokens[: len(mine)]))

        return rows_of_batch


def whole_batches(num_rows: int, batch_size: int, world_size: int) -> int:
    """Rows of each rank, in whole batches, that hold the largest rank's share of `num_rows`."""
    largest_share = -(-num_rows // world_size)
    return -(-largest_share // batch_size) * batch_size
