"""Planned items -> arrays: the rows of each step, on one rank, as micro-batches. No torch, so workers start quickly.

    step -> items -> their rows (plan.py) -> by length -> dealt to the ranks -> micro-batches, padded on the right

A row of n tokens takes n positions. The label of a position is the next token of the same row, where that is
supervised; a row's last position has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmtrain.contracts import IGNORE_INDEX, PADDING_DOCUMENT
from llmtrain.data.chat.cache import SampleStore
from llmtrain.data.chat.plan import ChatOrder, GroupedOrder, ItemPlan, PackedOrder, PlannedItem
from llmtrain.data.order import Ints
from llmtrain.data.rows import Rows, whole_batches

TOKENS_MULTIPLE: Final = 8
"""Micro-batches that are as wide as their longest row hold a multiple of this many tokens: so many at a time a matrix
unit works on."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How rows become the sequences of a batch."""

    seq_len: int
    """The longest row; the length of every pack."""
    packing: bool
    mask_documents: bool
    """Rows of a pack are told apart. Without packing there is nothing to tell apart: no token sees padding to its
    right, and attention that need not look at document numbers is faster."""
    pad_id: int
    """Fills the inputs after the last token. It may be a token that rows use as well: what is ignored are positions."""

    def order(self, store: SampleStore, *, seed: int, source: int) -> ChatOrder:
        """The items of one source."""
        if self.packing:
            return PackedOrder(store.lengths, seq_len=self.seq_len, seed=seed, source=source)
        return GroupedOrder(store.lengths, seed=seed, source=source)

    def micro_batch(self, items: Sequence[PlannedItem], stores: Sequence[SampleStore], size: int) -> Rows:
        """[size, width]: the items, one in each sequence, and sequences of padding alone."""
        width = self.seq_len if self.packing else self._width(items, stores, size)
        input_ids = np.full((size, width), self.pad_id, dtype=np.int64)
        labels = np.full((size, width), IGNORE_INDEX, dtype=np.int64)
        lengths = np.zeros(size, dtype=np.int64)
        document_ids: NDArray[np.int32] | None = None
        if self.packing and self.mask_documents:
            document_ids = np.full((size, width), PADDING_DOCUMENT, dtype=np.int32)
        for sequence, item in enumerate(items):
            begin = 0
            for document, row in enumerate(item.rows.tolist()):
                ids, supervised = stores[item.source].tokens(row)
                end = begin + len(ids)
                input_ids[sequence, begin:end] = ids
                labels[sequence, begin : end - 1] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
                if document_ids is not None:
                    document_ids[sequence, begin:end] = document
                lengths[sequence] = begin = end
        return Rows(input_ids, labels, document_ids, lengths)

    def _width(self, items: Sequence[PlannedItem], stores: Sequence[SampleStore], size: int) -> int:
        longest = max((int(stores[item.source].lengths[item.rows].sum()) for item in items), default=1)
        multiple = TOKENS_MULTIPLE // math.gcd(size, TOKENS_MULTIPLE)
        return min(self.seq_len, -(-longest // multiple) * multiple)


@dataclass(frozen=True, kw_only=True)
class ChatTrainingPlan:
    """This rank's micro-batches of each step: step s has the `batch_size` items from start_item + s·batch_size, to
    `end_item`.

    A step has as many micro-batches on each rank; what the items do not fill is padding.
    """

    stores: Sequence[SampleStore]
    weights: Sequence[float] | None
    format: ChatFormat
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

    def open(self) -> Callable[[int], list[Rows]]:
        """The function from a step (0 is the one that begins at `start_item`) to its micro-batches."""
        plan = item_plan(self.stores, self.weights, self.format, seed=self.seed)

        def micro_batches_of_step(step: int) -> list[Rows]:
            first = self.start_item + step * self.batch_size
            items = plan.locate(np.arange(first, min(first + self.batch_size, self.end_item)))
            share = deal(item_lengths(items, self.stores), rank=self.rank, world_size=self.world_size)
            num_sequences = whole_batches(len(items), self.micro_batch_size, self.world_size)
            return [
                self.format.micro_batch(
                    [items[index] for index in share[begin : begin + self.micro_batch_size]],
                    self.stores,
                    self.micro_batch_size,
                )
                for begin in range(0, num_sequences, self.micro_batch_size)
            ]

        return micro_batches_of_step


@dataclass(frozen=True, kw_only=True)
class ChatEvaluationPlan:
    """This rank's batches of an evaluation: each row once.

    With `max_batches`, as many items as fill these batches are taken, evenly spaced: the same at each evaluation and
    for any number of ranks, which share them. Every rank has as many batches.
    """

    store: SampleStore
    order: ChatOrder
    format: ChatFormat
    batch_size: int
    """Items of a batch on one rank."""
    max_batches: int | None
    rank: int
    world_size: int

    @property
    def _num_items(self) -> int:
        limit = self.order.num_items if self.max_batches is None else self.max_batches * self.batch_size
        return min(self.order.num_items, limit)

    @property
    def num_batches(self) -> int:
        """Batches on each rank."""
        return whole_batches(self._num_items, self.batch_size, self.world_size) // self.batch_size

    def open(self) -> Callable[[int], Rows]:
        """The function from a batch's index to its arrays."""
        taken = np.arange(self._num_items) * self.order.num_items // self._num_items
        share = taken[deal(self.order.item_lengths[taken], rank=self.rank, world_size=self.world_size)]

        def batch(index: int) -> Rows:
            mine = share[index * self.batch_size : (index + 1) * self.batch_size].tolist()
            items = [PlannedItem(0, self.order.in_order(item)) for item in mine]
            return self.format.micro_batch(items, [self.store], self.batch_size)

        return batch


def item_plan(
    stores: Sequence[SampleStore], weights: Sequence[float] | None, format: ChatFormat, *, seed: int
) -> ItemPlan:
    """The order of the items of all stores. Raises ConfigError for a weight that is too small."""
    orders = [format.order(store, seed=seed, source=source) for source, store in enumerate(stores)]
    return ItemPlan(orders, weights=weights, seed=seed)


def item_lengths(items: Sequence[PlannedItem], stores: Sequence[SampleStore]) -> Ints:
    """Tokens of each item."""
    return np.array([stores[item.source].lengths[item.rows].sum() for item in items])


def deal(lengths: Ints, *, rank: int, world_size: int) -> Ints:
    """Which of a step's items this rank computes: indices into them, the longest first.

    Dealt in turn, so that every rank has as much to compute, in micro-batches of about the same widths.
    """
    return np.argsort(-lengths, kind="stable")[rank::world_size]
