"""Windows of tokens as items: input tokens, labels and document numbers of each, as numpy arrays.

    token shards (shards.py), or random tokens (synthetic.py) -> windows -> inputs, labels, padding where one is short

Window w of a source holds its tokens from w·seq_len up to (w + 1)·seq_len, both included. The order of the windows is
order.py's. Workers import this module, so it imports no torch and no config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.contracts import IGNORE_INDEX
from llmtrain.data.batches import BatchArrays
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.data.mixture import Amount, ItemOrder, MixtureSpec
from llmtrain.data.order import Ints, Places, WindowOrder, in_order, rank_share


class WindowReader(Protocol):
    """Reads windows of one source. Not to be shared between threads."""

    @property
    def fetches(self) -> bool:
        """True if windows come from a store, so that `expect` saves time."""
        ...

    def read(self, windows: Ints, out: Ints) -> Ints:
        """Fill the first tokens of each row of `out` [n, seq_len + 1] with a window; return their numbers, [n].

        Only the last window of a source is shorter than its row.
        """
        ...

    def expect(self, windows: Ints) -> bool:
        """Begin to fetch what reading these windows later will need; return False once that is all it can hold."""
        ...


class WindowSource(Protocol):
    """Tokens that are divided into windows."""

    @property
    def num_windows(self) -> int:
        """Windows in one epoch; every token but the first is predicted in exactly one of them."""
        ...

    def open(self, order: WindowOrder | None, *, world_size: int = 1) -> WindowReader:
        """Return a reader that keeps what one of `world_size` ranks needs again in this order; None: one by one."""
        ...


@dataclass(frozen=True, kw_only=True)
class WindowItems:
    """The windows of one or more sources. Meets Items."""

    sources: Sequence[WindowSource]
    mixture: MixtureSpec | None
    """Mixture of the sources; None if there is one source, without a limit."""
    amounts: Sequence[Amount] = ()
    """Tokens and documents of each source; needed where these are what weights count."""
    shuffle_chunks: int
    seed: int
    seq_len: int
    pad_id: int
    """Fills the inputs where a window is short; its labels are ignored."""
    end_id: int | None
    """The token that ends a document, where documents are told apart; None: a window is one document."""
    content_sha256: str
    """Hash of the content of the windows, wherever their files lie."""

    @property
    def num_items(self) -> int:
        """Windows of all sources; in a mixture each source goes through its own epochs, by its weight."""
        return sum(source.num_windows for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Hash that changes when an item number would mean another window; the seed and seq_len do not count."""
        identity = self.mixture.identity if self.mixture else None
        return sha256(f"{self.content_sha256} {identity} {self.shuffle_chunks}".encode()).hexdigest()

    def with_mixture(self, mixture: MixtureSpec) -> WindowItems:
        """Return the same sources, mixed otherwise."""
        return replace(self, mixture=mixture)

    def order(self) -> ItemOrder[WindowOrder]:
        """Return the order of training. Raises ConfigError for a weight that is too small."""
        orders = [
            WindowOrder(
                source.num_windows,
                seq_len=self.seq_len,
                shuffle_chunks=self.shuffle_chunks,
                seed=self.seed,
                source=number,
            )
            for number, source in enumerate(self.sources)
        ]
        return ItemOrder(orders, self.mixture, seed=self.seed, amounts=self.amounts)

    def open(self, *, shuffled: bool, world_size: int = 1) -> WindowItemReader:
        """Return a reader in the order of training, or of the one source in its own order."""
        return WindowItemReader(self, self.order() if shuffled else None, world_size=world_size)


class WindowItemReader:
    """Finds windows and makes batches of them. An ItemReader."""

    def __init__(self, items: WindowItems, order: ItemOrder[WindowOrder] | None, *, world_size: int) -> None:
        assert order or len(items.sources) == 1
        self._items = items
        self._order = order
        orders = order.sources if order else [None]
        self._readers = [
            source.open(one, world_size=world_size) for source, one in zip(items.sources, orders, strict=True)
        ]

    def locate(self, items: Ints) -> Places:
        return self._order.locate(items) if self._order else in_order(items)

    def share(self, places: Places, *, rank: int, world_size: int) -> Ints:
        return rank_share(places, rank=rank, world_size=world_size)

    def expect(self, places: Places) -> bool:
        """Begin to fetch the windows at these places; return False if nothing is fetched, or no room is left."""
        has_room = [
            reader.expect(places.sequence[places.source == source])
            for source, reader in enumerate(self._readers)
            if reader.fetches
        ]
        return bool(has_room) and all(has_room)

    def read(self, places: Places, *, num_batches: int, batch_size: int) -> list[BatchArrays]:
        """Read all windows into one array: the batches are views of it."""
        items = self._items
        tokens = np.full((num_batches * batch_size, items.seq_len + 1), items.pad_id, dtype=np.int64)
        lengths = np.zeros(len(places.source), dtype=np.int64)
        begin = 0
        for source, reader in enumerate(self._readers):  # a share is sorted by source
            windows = places.sequence[places.source == source]
            end = begin + len(windows)
            lengths[begin:end] = reader.read(windows, tokens[begin:end])
            begin = end
        labels = tokens[:, 1:].copy()
        labels[len(lengths) :] = IGNORE_INDEX
        for row in np.flatnonzero(lengths <= items.seq_len):
            labels[row, max(0, lengths[row] - 1) :] = IGNORE_INDEX
        input_ids = np.ascontiguousarray(tokens[:, :-1])
        batches = [slice(begin, begin + batch_size) for begin in range(0, len(tokens), batch_size)]
        if items.end_id is None:
            return [BatchArrays(input_ids=input_ids[rows], labels=labels[rows]) for rows in batches]
        documents = document_ids(input_ids, items.end_id)
        return [
            BatchArrays(
                input_ids=input_ids[rows],
                labels=labels[rows],
                document_ids=documents[rows],
                cu_seqlens=cu_seqlens(documents[rows]),
            )
            for rows in batches
        ]

    def names(self, places: Places) -> list[str]:
        return []


def document_ids(input_ids: Ints, end_id: int) -> NDArray[np.int32]:
    """Return [n, t] the number of each token's document in its row. An end token belongs to the document it ends."""
    is_end = input_ids == end_id
    numbers: NDArray[np.int32] = np.cumsum(is_end, axis=1, dtype=np.int32)
    numbers -= is_end
    return numbers
