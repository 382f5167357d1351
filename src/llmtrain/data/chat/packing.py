"""Rows -> packs: which lengths share a sequence of `seq_len` tokens. A pure function of the lengths, without torch.

    lengths, longest first ─→ each into the fullest pack that still has room (best-fit decreasing), else into a new one

Packs are made of *slots*. A slot has a length, and any row of that length may fill it. So the packs stay the same while
rows change places from epoch to epoch (row_order.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from llmtrain.data.order import Ints
from llmtrain.screen import counted


@dataclass(frozen=True)
class Packs:
    """Slots 0, 1, … from the longest to the shortest, and the packs that they form."""

    seq_len: int
    slots: Ints
    """[num_rows] the slots of pack 0, of pack 1, …, longest first in each."""
    starts: Ints
    """[num_packs + 1] where each pack begins in `slots`, and the end of the last one."""
    num_tokens: Ints
    """[num_packs] tokens in each."""
    rows: Ints
    """[num_rows] a row for each slot, where rows are not shuffled."""

    @property
    def efficiency(self) -> float:
        """Share of the positions of all packs that hold a token."""
        return float(self.num_tokens.sum()) / (len(self.num_tokens) * self.seq_len)


def pack(lengths: Ints, seq_len: int) -> Packs:
    """Pack by best-fit decreasing (Johnson 1974: at most 11/9 of the fewest packs, plus 4), one length at a time.

    Rows of one length are placed together: the fullest pack with room for one is also the fullest after taking it, as
    long as it has room for another. So all packs with equal room are filled at once, and time hardly grows with rows.

    Raises ValueError when a row is longer than `seq_len`, or empty.
    """
    if lengths.min() < 1 or lengths.max() > seq_len:
        wrong = int(np.flatnonzero((lengths < 1) | (lengths > seq_len))[0])
        raise ValueError(f"row {wrong} has {counted(lengths[wrong], 'token')}, which is not from 1 to {seq_len}")
    counts = np.bincount(lengths)
    packs_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of packs_by_room, sorted
    num_packs = 0
    taken: list[Ints] = []  # the packs of slots 0, 1, …
    for length in range(len(counts) - 1, 0, -1):
        left = int(counts[length])
        while left:
            place = bisect_left(rooms, length)
            room = rooms[place] if place < len(rooms) else seq_len
            each = min(left, room // length)
            wanted = left // each
            if place < len(rooms):
                packs = packs_by_room[room][-wanted:]
                del packs_by_room[room][-wanted:]
                if not packs_by_room[room]:
                    del packs_by_room[room], rooms[place]
            else:
                packs = list(range(num_packs, num_packs + wanted))
                num_packs += wanted
            taken.append(np.repeat(np.array(packs, dtype=np.int64), each))
            left -= len(packs) * each
            rest = room - each * length
            if rest not in packs_by_room:
                insort(rooms, rest)
                packs_by_room[rest] = []
            packs_by_room[rest].extend(packs)
    pack_of_slot = np.concatenate(taken)
    slot_lengths = np.repeat(np.arange(len(counts) - 1, 0, -1), counts[:0:-1])
    return Packs(
        seq_len=seq_len,
        slots=np.argsort(pack_of_slot, kind="stable"),
        starts=np.concatenate(([0], np.cumsum(np.bincount(pack_of_slot, minlength=num_packs)))),
        num_tokens=np.bincount(pack_of_slot, weights=slot_lengths, minlength=num_packs).astype(np.int64),
        rows=np.argsort(-lengths, kind="stable"),
    )
