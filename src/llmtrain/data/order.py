"""The order of one source: number in the source -> epoch, chunk slot, sequence. A pure function of counts and seed.

    source    epoch e = number // sequences; each source has its own order in it (`SourceOrder`)

    windows of tokens (`WindowOrder`)
    epoch     the chunks are permuted by (seed, source, e) and opened K at a time
    group     K open chunks (slots) give one window each in turn; windows are permuted by (seed, source, e, chunk)

Which source an item comes from is decided in mixture.py; the order of rows for fine-tuning is in `chat.row_order`. What
the sequences hold, and who reads them, is elsewhere. There is no torch, no file and no state here: a position in the
data is an item number, and finding it costs the same anywhere.

Randomness is numpy's Philox through `random_raw`: the streams of bit generators are kept between numpy versions, those
of `Generator.permutation` are not (NEP 19).
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CHUNK_TOKENS: Final = 2**20
"""Tokens in a chunk of a large source: large enough to read in one go, small enough to keep many open."""
MIN_GROUPS: Final = 4
"""A source has at least this many groups of open chunks, so that a small one is not a single group in every epoch."""
SMALL_TOKENS: Final = 2**25
"""A source of no more tokens is kept in memory (64 MiB of uint16), so it can be shuffled as a whole."""
SMALL_CHUNKS: Final = 2**16
"""Chunks of a small source: enough that a chunk is a window or two, few enough that an epoch's table takes no time."""


def random_bits(size: int, /, *key: int | str) -> NDArray[np.uint64]:
    """Return `size` random 64-bit words that depend on the key alone."""
    digest = sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)


def permutation(size: int, /, *key: int | str) -> Ints:
    """Return a permutation of range(size) that depends on the key alone. The sort is stable, as words may be equal."""
    return np.argsort(random_bits(size, *key), kind="stable")


class Places(NamedTuple):
    """Places of items: four arrays with one entry for each requested item."""

    source: Ints
    epoch: Ints
    """Number of times that the source was read completely before."""
    slot: Ints
    """Number of the open chunk, of K, that the item comes from; 0 where the source has no chunks."""
    sequence: Ints
    """Number of the window, pack or row among those of the source."""

    def take(self, entries: Ints | slice) -> Places:
        """Return some of the places."""
        return Places(*(column[entries] for column in self))


class SourceOrder(Protocol):
    """The order of one source's sequences: each exactly once an epoch, every epoch in a new order."""

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch."""
        ...

    def locate(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Return the chunk slot and the sequence at each position of an epoch, counted from 0."""
        ...


class _Epoch(NamedTuple):
    """One epoch's tables. Groups of K chunks in the order in which they are read; larger chunks last in each group."""

    chunks: Ints
    """[num_chunks] the chunk at each place; group g is chunks[g * K : (g + 1) * K]."""
    group_start: Ints
    """[num_groups + 1] windows before each group."""
    group_larger: Ints
    """[num_groups] chunks of the group that hold one window more than the others."""


class WindowOrder:
    """The shuffled order of one source's windows of tokens. A SourceOrder.

    Windows are cut into chunks whose sizes differ by at most one. What is kept between calls only saves time.
    """

    def __init__(self, num_windows: int, *, seq_len: int, shuffle_chunks: int, seed: int, source: int) -> None:
        assert num_windows > 0
        assert shuffle_chunks > 0
        self.num_sequences = num_windows
        self.shuffle_chunks = shuffle_chunks
        self._tokens = num_windows * seq_len
        self.num_chunks = self._count_chunks()
        self._size, self._num_larger = divmod(num_windows, self.num_chunks)
        self._key = (seed, source)
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], Ints] = {}

    @property
    def is_small(self) -> bool:
        """True if windows may come from anywhere in the source at any time: its reader should keep all of it."""
        return self._tokens <= SMALL_TOKENS

    def chunk_starts(self) -> Ints:
        """Return [num_chunks + 1] the window at which each chunk begins, and the end of the last one."""
        chunks = np.arange(self.num_chunks + 1)
        return chunks * self._size + np.minimum(chunks, self._num_larger)

    def _count_chunks(self) -> int:
        """Give chunks of small data a window or two, of large data about CHUNK_TOKENS; fill groups where possible."""
        wanted = max(-(-self._tokens // CHUNK_TOKENS), MIN_GROUPS * self.shuffle_chunks)
        if self.is_small:
            wanted = max(wanted, SMALL_CHUNKS)
        return min(self.num_sequences, -(-wanted // self.shuffle_chunks) * self.shuffle_chunks)

    def locate(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Return the chunk slot and the window at each position of an epoch."""
        table = self._epoch(epoch)
        group = np.searchsorted(table.group_start, positions, side="right") - 1
        offset = positions - table.group_start[group]
        num_open = np.minimum(self.shuffle_chunks, self.num_chunks - group * self.shuffle_chunks)
        # Round-robin: draw d takes one window of each open chunk; after `size` draws only the larger ones go on.
        rest = offset - num_open * self._size
        slot = np.where(rest < 0, offset % num_open, num_open - table.group_larger[group] + rest)
        draw = np.where(rest < 0, offset // num_open, self._size)
        chunks = table.chunks[group * self.shuffle_chunks + slot]
        if self.num_chunks == self.num_sequences:
            return slot, chunks
        windows = np.empty_like(positions)
        for chunk in distinct(chunks):
            here = np.flatnonzero(chunks == chunk)
            windows[here] = self._chunk_windows(epoch, chunk)[draw[here]]
        return slot, windows

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            chunks = permutation(self.num_chunks, "chunks", *self._key, epoch)
            groups = np.arange(self.num_chunks) // self.shuffle_chunks
            larger = chunks < self._num_larger
            chunks = chunks[np.argsort(2 * groups + larger, kind="stable")]
            sizes = np.bincount(groups) * self._size
            group_larger = np.bincount(groups, weights=larger).astype(np.int64)
            group_start = np.concatenate(([0], np.cumsum(sizes + group_larger)))
            make_room(self._epochs, 2)
            self._epochs[epoch] = _Epoch(chunks, group_start, group_larger)
        return self._epochs[epoch]

    def _chunk_windows(self, epoch: int, chunk: int) -> Ints:
        """Return the chunk's windows in the order of this epoch."""
        if (epoch, chunk) not in self._windows:
            start, size = chunk * self._size + min(chunk, self._num_larger), self._size + (chunk < self._num_larger)
            make_room(self._windows, 2 * self.shuffle_chunks + 1)
            self._windows[epoch, chunk] = start + permutation(size, "windows", *self._key, epoch, chunk)
        return self._windows[epoch, chunk]


def in_order(items: Ints) -> Places:
    """Return where the items of one source lie that is not shuffled."""
    zeros = np.zeros_like(items)
    return Places(zeros, zeros, zeros, items)


def rank_share(places: Places, *, rank: int, world_size: int) -> Ints:
    """Return which of a batch's items this rank computes: indices into the batch, ordered by source and chunk slot.

    Shares differ by at most one item. Chunk slot s belongs to rank s modulo `world_size`: a batch takes its windows
    from the slots in turn, so where the slots are a multiple of the ranks every rank gets its share from its own
    chunks, whatever the batch size, and reads no other. Where ranks have too many items, as with more ranks than
    slots, the rest is divided among the others, slot by slot.
    """
    owner = places.slot % world_size
    counts = np.bincount(owner, minlength=world_size)
    share, larger = divmod(len(owner), world_size)
    shares = np.full(world_size, share)
    shares[np.argsort(-counts, kind="stable")[:larger]] += 1
    by_owner = np.lexsort((places.slot, places.source, owner))
    number = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner[by_owner]]
    is_kept = number < shares[owner[by_owner]]
    kept, rest = by_owner[is_kept], by_owner[~is_kept]
    rest = rest[np.lexsort((places.slot[rest], places.source[rest]))]
    ends = np.cumsum(np.maximum(shares - counts, 0))
    begin = ends[rank] - max(int(shares[rank] - counts[rank]), 0)
    own = np.concatenate([kept[owner[kept] == rank], rest[begin : ends[rank]]])
    return own[np.lexsort((places.slot[own], places.source[own]))]


def distinct(values: Ints) -> list[int]:
    """Return the values, each once, in ascending order."""
    return sorted(set(values.tolist()))


def make_room(kept: dict[Any, Any], limit: int) -> None:
    """Drop the entry that was made first when the dict is full (dicts keep the order of insertion)."""
    while len(kept) >= limit:
        del kept[next(iter(kept))]
