"""The order of rows for fine-tuning: position in an epoch -> pack or row. A pure function of lengths, seed and epoch.

    packed      an item is a pack; in every epoch the packs come in a new order, and the rows of a length change places
    grouped     an item is a row; rows of like length come together, so that a micro-batch needs little padding

Several sources are mixed by `data.mixture.ItemOrder`; the random streams are those of `data.order`. An epoch's table is
made once an epoch (about a second for a million rows); finding an item in it costs the same anywhere.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from llmtrain.data.chat.packing import Packs
from llmtrain.data.order import Ints, SourceOrder, make_room, permutation, random_bits

ORDER_VERSION: Final = 2
"""Rises when an item number comes to mean other rows."""
BLOCK_ROWS: Final = 16_384
"""Rows that are drawn from the whole source and sorted together: enough that neighbours are nearly of one length."""
RUN_ROWS: Final = 32
"""Sorted rows that stay together: a micro-batch or a few."""
STRIP_RUNS: Final = 4
"""Runs of neighbouring lengths that follow each other, so that larger micro-batches, and those whose size does not go
into that of a run, need little padding too. With more, long stretches of training would see one length only."""


class RowOrder(SourceOrder, Protocol):
    """The order of the packs or rows of one source."""

    @property
    def lengths(self) -> Ints:
        """[num_sequences] tokens of each pack or row."""
        ...

    def rows(self, sequence: int, *, epoch: int | None) -> Ints:
        """Return the rows of a pack, or the row itself. `epoch` is None in evaluation, where rows are not shuffled."""
        ...


class PackedOrder:
    """Packs of rows: their make-up by length is fixed; which rows fill them, and their order, is the epoch's."""

    def __init__(self, lengths: Ints, packs: Packs, *, seed: int, source: int) -> None:
        """`lengths` [num_rows]: of the rows that `packs` was made for."""
        self.num_sequences = len(packs.num_tokens)
        self.lengths = packs.num_tokens
        self._packs = packs
        self._row_lengths = lengths
        self._key = (seed, source)
        self._epochs: dict[int, tuple[Ints, Ints]] = {}

    def locate(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Return slot 0 and the pack at each position of an epoch."""
        return np.zeros_like(positions), self._epoch(epoch)[0][positions]

    def rows(self, sequence: int, *, epoch: int | None) -> Ints:
        """Return the rows of a pack."""
        row_of_slot = self._packs.rows if epoch is None else self._epoch(epoch)[1]
        return row_of_slot[self._packs.slots[self._packs.starts[sequence] : self._packs.starts[sequence + 1]]]

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """Return the packs in the order of this epoch, and the row in each slot."""
        if epoch not in self._epochs:
            rows = permutation(len(self._row_lengths), "rows", *self._key, epoch)
            row_of_slot = rows[np.argsort(-self._row_lengths[rows], kind="stable")]
            make_room(self._epochs, 2)
            self._epochs[epoch] = permutation(self.num_sequences, "packs", *self._key, epoch), row_of_slot
        return self._epochs[epoch]


class GroupedOrder:
    """Single rows: random blocks of rows are sorted by length and divided into strips of runs.

    The strips are shuffled in their block, and the runs in their strip. Blocks, strips and runs begin at multiples of
    their sizes, counted over all epochs: batches whose size goes into that of a run then stay in one, in every epoch,
    whatever the number of rows.
    """

    def __init__(self, lengths: Ints, *, seed: int, source: int) -> None:
        """`lengths` [num_rows] of the rows."""
        self.num_sequences = len(lengths)
        self.lengths = lengths
        self._key = (seed, source)
        self._epochs: dict[int, Ints] = {}

    def locate(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Return slot 0 and the row at each position of an epoch."""
        if epoch not in self._epochs:
            make_room(self._epochs, 2)
            self._epochs[epoch] = self._make_epoch(epoch)
        return np.zeros_like(positions), self._epochs[epoch][positions]

    def rows(self, sequence: int, *, epoch: int | None) -> Ints:
        """Return the row itself."""
        return np.array([sequence])

    def _make_epoch(self, epoch: int) -> Ints:
        """Return the rows in the order of this epoch."""
        num_rows = self.num_sequences
        items = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
        run, block = items // RUN_ROWS, items // BLOCK_ROWS
        strip = run // STRIP_RUNS
        rows = permutation(num_rows, "rows", *self._key, epoch)

        # Lengths are compared within a thirty-second, or rows of small data would meet the same rows in every epoch.
        blur = (random_bits(num_rows, "blur", *self._key, epoch) >> np.uint64(44)).astype(np.int64)
        blurred = self.lengths * (32 * 2**20 + blur)
        by_length = rows[np.lexsort((blurred[rows], block))]

        # The sorted rows of a block go to its strips in random order, to their runs in random order, and to random
        # places in the run.
        turn_of_strip = random_bits(int(strip[-1] - strip[0]) + 1, "strips", *self._key, epoch)[strip - strip[0]]
        turn_of_run = random_bits(int(run[-1] - run[0]) + 1, "runs", *self._key, epoch)[run - run[0]]
        within_run = random_bits(num_rows, "within", *self._key, epoch)
        order = np.empty(num_rows, dtype=np.int64)
        order[np.lexsort((within_run, turn_of_run, turn_of_strip, block))] = by_length
        return order
