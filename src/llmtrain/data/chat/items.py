"""Rows for fine-tuning as items: packs of rows, or single rows, and the arrays that they become.

    item -> its rows (row_order.py) -> dealt to the ranks, the longest first -> micro-batches, padded on the right

A row of n tokens takes n positions. The label of a position is the next token of the same row, where that is
supervised; a row's last position has none. Workers import this module, so it imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmtrain.contracts import IGNORE_INDEX, PADDING_DOCUMENT
from llmtrain.data.batches import BatchArrays
from llmtrain.data.chat.cache import SampleStore
from llmtrain.data.chat.packing import Packs, pack
from llmtrain.data.chat.row_order import ORDER_VERSION, GroupedOrder, PackedOrder, RowOrder
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.data.mixture import Amount, ItemOrder, MixtureSpec
from llmtrain.data.order import Ints, Places, distinct, in_order

TOKENS_MULTIPLE: Final = 8
"""Micro-batches that are as wide as their longest row hold a multiple of this number of tokens: matrix units work on
blocks of that size."""


@dataclass(frozen=True, kw_only=True)
class RowItems:
    """The tokenised rows of one or more sources. Meets Items."""

    stores: Sequence[SampleStore]
    """One for each source."""
    mixture: MixtureSpec | None
    """Mixture of the sources; None if there is one source, without a limit."""
    seed: int
    seq_len: int
    """The longest row; the length of every pack."""
    packing: bool
    """An item is a pack of rows; else it is one row."""
    mask_documents: bool
    """Rows of a pack are told apart. Without packing there is nothing to tell apart: no token sees padding to its
    right, and attention that need not look at document numbers is faster."""
    pad_id: int
    """Fills the inputs after the last token. Rows may use the same token: labels are ignored by their position."""

    @property
    def num_items(self) -> int:
        """Items of all sources; in a mixture each source goes through its own epochs, by its weight."""
        return sum(len(packs.num_tokens) for packs in self.packs) if self.packing else sum(map(len, self.stores))

    @property
    def fingerprint(self) -> str:
        """Hash that changes when an item number would mean other rows; the seed and seq_len do not count."""
        contents = " ".join(store.content_sha256 for store in self.stores)
        identity = self.mixture.identity if self.mixture else None
        return sha256(f"{ORDER_VERSION} {contents} {identity} {self.packing}".encode()).hexdigest()

    @cached_property
    def packs(self) -> list[Packs]:
        """The packs of each source. They are made once, and are sent to worker processes with the rest."""
        return [pack(store.lengths, self.seq_len) for store in self.stores]

    def with_mixture(self, mixture: MixtureSpec) -> RowItems:
        """Return the same sources, mixed otherwise."""
        mixed = replace(self, mixture=mixture)
        if "packs" in vars(self):
            vars(mixed)["packs"] = self.packs
        return mixed

    def order(self) -> ItemOrder[RowOrder]:
        """Return the order of training. Raises ConfigError for a weight that is too small."""
        orders: list[RowOrder] = [
            PackedOrder(store.lengths, self.packs[source], seed=self.seed, source=source)
            if self.packing
            else GroupedOrder(store.lengths, seed=self.seed, source=source)
            for source, store in enumerate(self.stores)
        ]
        amounts = [Amount(store.manifest.tokens, len(store)) for store in self.stores]
        return ItemOrder(orders, self.mixture, seed=self.seed, amounts=amounts)

    def open(self, *, shuffled: bool, world_size: int = 1) -> RowItemReader:
        """Return a reader in the order of training, or of the one source in its own order."""
        return RowItemReader(self, shuffled=shuffled)


class RowItemReader:
    """Finds rows and makes batches of them. An ItemReader."""

    def __init__(self, items: RowItems, *, shuffled: bool) -> None:
        assert shuffled or len(items.stores) == 1
        self._items = items
        self._order = items.order()
        self._shuffled = shuffled

    def locate(self, items: Ints) -> Places:
        return self._order.locate(items) if self._shuffled else in_order(items)

    def share(self, places: Places, *, rank: int, world_size: int) -> Ints:
        """Deal the items in turn, the longest first: every rank has as much to compute, in micro-batches of about the
        same widths."""
        return np.argsort(-self._lengths(places), kind="stable")[rank::world_size]

    def expect(self, places: Places) -> bool:
        """Return False: the rows are files of this machine."""
        return False

    def read(self, places: Places, *, num_batches: int, batch_size: int) -> list[BatchArrays]:
        rows, lengths = self._rows(places), self._lengths(places)
        batches = [slice(index * batch_size, (index + 1) * batch_size) for index in range(num_batches)]
        return [self._batch(rows[batch], lengths[batch], batch_size) for batch in batches]

    def names(self, places: Places) -> list[str]:
        return [store.source(row) for store, rows in self._rows(places) for row in rows]

    def _batch(self, items_rows: Sequence[tuple[SampleStore, list[int]]], tokens: Ints, batch_size: int) -> BatchArrays:
        """Return the rows of some items, which have this number of tokens each, and padding."""
        items = self._items
        shape = (batch_size, items.seq_len if items.packing else self._width(tokens, batch_size))
        input_ids = np.full(shape, items.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        lengths = np.zeros(batch_size, dtype=np.int64)
        lengths[: len(tokens)] = tokens
        document_ids: NDArray[np.int32] | None = None
        if items.packing and items.mask_documents:
            document_ids = np.full(shape, PADDING_DOCUMENT, dtype=np.int32)
        for sequence, (store, rows) in enumerate(items_rows):
            begin = 0
            for document, row in enumerate(rows):
                ids, supervised = store.tokens(row)
                end = begin + len(ids)
                input_ids[sequence, begin:end] = ids
                labels[sequence, begin : end - 1] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
                if document_ids is not None:
                    document_ids[sequence, begin:end] = document
                begin = end
        arrays = BatchArrays(input_ids=input_ids, labels=labels, lengths=lengths)
        if document_ids is not None:
            arrays["document_ids"] = document_ids
            arrays["cu_seqlens"] = cu_seqlens(document_ids)
        return arrays

    def _rows(self, places: Places) -> list[tuple[SampleStore, list[int]]]:
        """Return the source of each item and its rows there."""
        found = []
        for source, epoch, _, sequence in zip(*(column.tolist() for column in places), strict=True):
            rows = self._order.sources[source].rows(sequence, epoch=epoch if self._shuffled else None)
            found.append((self._items.stores[source], rows.tolist()))
        return found

    def _lengths(self, places: Places) -> Ints:
        """Return the number of tokens of each item."""
        lengths = np.empty_like(places.sequence)
        for source in distinct(places.source):
            here = places.source == source
            lengths[here] = self._order.sources[source].lengths[places.sequence[here]]
        return lengths

    def _width(self, tokens: Ints, batch_size: int) -> int:
        longest = int(tokens.max(initial=1))
        multiple = TOKENS_MULTIPLE // math.gcd(batch_size, TOKENS_MULTIPLE)
        return min(self._items.seq_len, -(-longest // multiple) * multiple)
