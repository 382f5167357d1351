"""The order of fine-tuning items: item number -> its rows. A pure function of lengths, seed and epoch; no torch.

    packed      an item is a pack; in every epoch the packs come in a new order, and the rows of a length change places
    grouped     an item is a row; rows of like length come together, so that a micro-batch needs little padding
    mixture     items of several sources by their weights, in the blocks of `data.order`

All orders are made from the random streams of `data.order`. What an epoch's table costs is paid once an epoch (about a
second for a million rows); finding an item in it costs the same anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np

from llmtrain.data.chat.packing import pack
from llmtrain.data.order import Ints, Mixture, permutation, random_bits

PLAN_VERSION: Final = 2
"""Rises when an item number comes to mean other rows."""
BLOCK_ROWS: Final = 16_384
"""Rows that are drawn from the whole source and sorted together: enough that neighbours are nearly of one length."""
RUN_ROWS: Final = 32
"""Sorted rows that stay together: a micro-batch or a few."""
STRIP_RUNS: Final = 4
"""Runs of neighbouring lengths that follow each other, so that larger micro-batches, and those whose size does not go
into that of a run, need little padding too. More, and long stretches of training see one length only."""


class ChatOrder(Protocol):
    """The items of one source."""

    @property
    def num_items(self) -> int:
        """Items of one epoch, the same in every one."""
        ...

    @property
    def item_lengths(self) -> Ints:
        """[num_items] tokens of each item in the order of `in_order`."""
        ...

    def locate(self, number: int) -> Ints:
        """The rows of the source's item, numbered from 0 without end."""
        ...

    def in_order(self, item: int) -> Ints:
        """The rows of one of `num_items` items that are never shuffled, for evaluation. They hold each row once."""
        ...


class PackedOrder:
    """Packs of rows: their make-up by length is fixed; which rows fill them, and their order, is the epoch's."""

    def __init__(self, lengths: Ints, *, seq_len: int, seed: int, source: int) -> None:
        """`lengths` [num_rows] of the rows. Raises ValueError when one is longer than `seq_len`."""
        self.packs = pack(lengths, seq_len)
        self._lengths = lengths
        self._key = (seed, source)
        self._epochs: dict[int | None, tuple[Ints, Ints]] = {}

    @property
    def num_items(self) -> int:
        return len(self.packs.num_tokens)

    @property
    def item_lengths(self) -> Ints:
        return self.packs.num_tokens

    def locate(self, number: int) -> Ints:
        epoch, place = divmod(number, self.num_items)
        order, row_of_slot = self._epoch(epoch)
        return self._rows(int(order[place]), row_of_slot)

    def in_order(self, item: int) -> Ints:
        return self._rows(item, self._epoch(None)[1])

    def _rows(self, item: int, row_of_slot: Ints) -> Ints:
        return row_of_slot[self.packs.slots[self.packs.starts[item] : self.packs.starts[item + 1]]]

    def _epoch(self, epoch: int | None) -> tuple[Ints, Ints]:
        """The packs in the order of this epoch, and the row in each slot. None: both as they come."""
        if epoch not in self._epochs:
            num_rows = len(self._lengths)
            rows = np.arange(num_rows) if epoch is None else permutation(num_rows, "rows", *self._key, epoch)
            row_of_slot = rows[np.argsort(-self._lengths[rows], kind="stable")]
            order = np.arange(self.num_items)
            if epoch is not None:
                order = permutation(self.num_items, "packs", *self._key, epoch)
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = order, row_of_slot
        return self._epochs[epoch]


class GroupedOrder:
    """Single rows: random blocks of rows are sorted by length and cut into strips of runs, which are shuffled in the
    block, as are the runs in their strip.

    Blocks, strips and runs begin at multiples of their sizes, counted over all epochs: batches whose size goes into
    that of a run then stay in one, in every epoch, whatever the number of rows.
    """

    def __init__(self, lengths: Ints, *, seed: int, source: int) -> None:
        """`lengths` [num_rows] of the rows."""
        self._lengths = lengths
        self._key = (seed, source)
        self._epochs: dict[int, Ints] = {}

    @property
    def num_items(self) -> int:
        return len(self._lengths)

    @property
    def item_lengths(self) -> Ints:
        return self._lengths

    def locate(self, number: int) -> Ints:
        epoch, place = divmod(number, self.num_items)
        return self._epoch(epoch)[place : place + 1]

    def in_order(self, item: int) -> Ints:
        return np.array([item])

    def _epoch(self, epoch: int) -> Ints:
        """The rows in the order of this epoch."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._make_epoch(epoch)
        return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> Ints:
        num_rows = self.num_items
        items = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
        run, block = items // RUN_ROWS, items // BLOCK_ROWS
        strip = run // STRIP_RUNS
        rows = permutation(num_rows, "rows", *self._key, epoch)

        # Lengths are compared within a thirty-second, or rows of small data would meet the same rows in every epoch.
        blur = (random_bits(num_rows, "blur", *self._key, epoch) >> np.uint64(44)).astype(np.int64)
        blurred = self._lengths * (32 * 2**20 + blur)
        by_length = rows[np.lexsort((blurred[rows], block))]

        # The sorted rows of a block go to its strips in random order, to their runs in random order, and to random
        # places in the run.
        turn_of_strip = random_bits(int(strip[-1] - strip[0]) + 1, "strips", *self._key, epoch)[strip - strip[0]]
        turn_of_run = random_bits(int(run[-1] - run[0]) + 1, "runs", *self._key, epoch)[run - run[0]]
        within_run = random_bits(num_rows, "within", *self._key, epoch)
        order = np.empty(num_rows, dtype=np.int64)
        order[np.lexsort((within_run, turn_of_run, turn_of_strip, block))] = by_length
        return order


class PlannedItem(NamedTuple):
    """What an item holds."""

    source: int
    rows: Ints
    """Of the source."""


class ItemPlan:
    """The endless sequence of items over one source, or over several by their weights."""

    def __init__(self, orders: Sequence[ChatOrder], *, weights: Sequence[float] | None, seed: int) -> None:
        """Raises ConfigError when a weight is so small that its source would have no item in a block."""
        self.orders = orders
        self._mixture = Mixture(len(orders), weights=weights, seed=seed)

    @property
    def items_per_epoch(self) -> int:
        """Items of all sources together. By its weight, a source of a mixture may be through earlier, or later."""
        return sum(order.num_items for order in self.orders)

    def locate(self, items: Ints) -> list[PlannedItem]:
        """The rows of each item."""
        sources, numbers = self._mixture.locate(items)
        return [
            PlannedItem(source, self.orders[source].locate(number))
            for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
        ]
