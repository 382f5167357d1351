"""The order of the data: item number -> source, epoch, chunk slot, window. A pure function of the counts and the seed.

What the windows hold, and who reads them, is elsewhere; there is no torch, no file and no state here, so a position in
the data is nothing but an item number, and finding it costs the same anywhere in the sequence.

    items     0 1 2 3 4 5 …                     one endless sequence over all sources
    mixture   block of 10,000 items, exact quotas, permuted by (seed, block)     (only with weights)
    source    epoch e = number // windows; its chunks are permuted by (seed, source, e) and opened K at a time
    group     K open chunks (slots) give one window each in turn; windows are permuted by (seed, source, e, chunk)

Randomness is numpy's Philox through `random_raw`: the streams of bit generators are kept between numpy versions, those
of `Generator.permutation` are not (NEP 19).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.errors import ConfigError

Ints = NDArray[np.int64]

CHUNK_TOKENS: Final = 2**20
"""Tokens in a chunk of a large source: large enough to read in one go, small enough to keep many open."""
MIN_GROUPS: Final = 4
"""A source has at least this many groups of open chunks, so that a small one is not a single group in every epoch."""
SMALL_TOKENS: Final = 2**25
"""A source of no more tokens is kept in memory (64 MiB of uint16), so it can be shuffled as a whole."""
SMALL_CHUNKS: Final = 2**16
"""Chunks of a small source: so many that a chunk is a window or two, so few that an epoch's table takes no time."""
BLOCK_ITEMS: Final = 10_000
"""Items of a mixture over which the quotas are exact."""


def random_bits(size: int, /, *key: int | str) -> NDArray[np.uint64]:
    """`size` random 64-bit words that depend on the key alone."""
    digest = sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)


def permutation(size: int, /, *key: int | str) -> Ints:
    """A permutation of range(size) that depends on the key alone. Stable sort: equal words leave no choice."""
    return np.argsort(random_bits(size, *key), kind="stable")


class Places(NamedTuple):
    """Where items lie: four arrays as long as the items that were asked for."""

    source: Ints
    epoch: Ints
    """Of the source: how often it was gone through before."""
    slot: Ints
    """Which of the K open chunks of its source the item comes from."""
    window: Ints
    """Index among the windows of the source."""


class _Epoch(NamedTuple):
    """One epoch's tables. Groups of K chunks in the order in which they are read; larger chunks last in each group."""

    chunks: Ints
    """[num_chunks] the chunk at each place; group g is chunks[g * K : (g + 1) * K]."""
    group_start: Ints
    """[num_groups + 1] windows before each group."""
    group_larger: Ints
    """[num_groups] chunks of the group that hold one window more than the others."""


class SourceOrder:
    """The endless shuffled sequence of one source's windows: each exactly once an epoch, every epoch in a new order.

    Windows are cut into chunks whose sizes differ by at most one. All is computed from the item number; what is kept
    between calls only saves computing it again.
    """

    def __init__(self, num_windows: int, *, seq_len: int, shuffle_chunks: int, seed: int, source: int) -> None:
        assert num_windows > 0
        assert shuffle_chunks > 0
        self.num_windows = num_windows
        self.shuffle_chunks = shuffle_chunks
        self._tokens = num_windows * seq_len
        self.num_chunks = self._count_chunks()
        self._size, self._num_larger = divmod(num_windows, self.num_chunks)
        self._key = (seed, source)
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], Ints] = {}

    @property
    def is_small(self) -> bool:
        """Windows come from all over the source at any time: its reader should keep all of it."""
        return self._tokens <= SMALL_TOKENS

    def chunk_starts(self) -> Ints:
        """[num_chunks + 1] the window at which each chunk begins, and the end of the last one."""
        chunks = np.arange(self.num_chunks + 1)
        return chunks * self._size + np.minimum(chunks, self._num_larger)

    def locate(self, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """Epoch, slot and window of each of the source's items, numbered from 0 without end."""
        epochs, positions = np.divmod(numbers, self.num_windows)
        slots, windows = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in _distinct(epochs):
            here = np.flatnonzero(epochs == epoch)
            slots[here], windows[here] = self._locate_in_epoch(epoch, positions[here])
        return epochs, slots, windows

    def _count_chunks(self) -> int:
        """A window or two each for small data; about CHUNK_TOKENS for large; whole groups where there are enough."""
        wanted = max(-(-self._tokens // CHUNK_TOKENS), MIN_GROUPS * self.shuffle_chunks)
        if self.is_small:
            wanted = max(wanted, SMALL_CHUNKS)
        return min(self.num_windows, -(-wanted // self.shuffle_chunks) * self.shuffle_chunks)

    def _locate_in_epoch(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        table = self._epoch(epoch)
        group = np.searchsorted(table.group_start, positions, side="right") - 1
        offset = positions - table.group_start[group]
        num_open = np.minimum(self.shuffle_chunks, self.num_chunks - group * self.shuffle_chunks)
        # Round-robin: draw d takes one window of each open chunk; after `size` draws only the larger ones go on.
        rest = offset - num_open * self._size
        slot = np.where(rest < 0, offset % num_open, num_open - table.group_larger[group] + rest)
        draw = np.where(rest < 0, offset // num_open, self._size)
        chunks = table.chunks[group * self.shuffle_chunks + slot]
        if self.num_chunks == self.num_windows:
            return slot, chunks
        windows = np.empty_like(positions)
        for chunk in _distinct(chunks):
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
            _make_room(self._epochs, 2)
            self._epochs[epoch] = _Epoch(chunks, group_start, group_larger)
        return self._epochs[epoch]

    def _chunk_windows(self, epoch: int, chunk: int) -> Ints:
        """The chunk's windows in the order of this epoch."""
        if (epoch, chunk) not in self._windows:
            start, size = chunk * self._size + min(chunk, self._num_larger), self._size + (chunk < self._num_larger)
            _make_room(self._windows, 2 * self.shuffle_chunks + 1)
            self._windows[epoch, chunk] = start + permutation(size, "windows", *self._key, epoch, chunk)
        return self._windows[epoch, chunk]


class Mixture:
    """Which source each item of the endless sequence comes from, and how many items of that source come before it."""

    def __init__(self, num_sources: int, *, weights: Sequence[float] | None, seed: int) -> None:
        """Raises ConfigError when a weight is so small that its source would have no item in a block."""
        assert num_sources == (1 if weights is None else len(weights))
        self.num_sources = num_sources
        self.quotas = np.array([BLOCK_ITEMS] if weights is None else block_quotas(weights))
        self._seed = seed
        self._blocks: dict[int, tuple[Ints, Ints]] = {}

    def locate(self, items: Ints) -> tuple[Ints, Ints]:
        """Source of each item, and its number among the items of that source."""
        if self.num_sources == 1:
            return np.zeros_like(items), items
        blocks, places = np.divmod(items, BLOCK_ITEMS)
        sources, numbers = np.empty_like(items), np.empty_like(items)
        for block in _distinct(blocks):
            here = np.flatnonzero(blocks == block)
            block_sources, ordinals = self._block(block)
            sources[here] = block_sources[places[here]]
            numbers[here] = block * self.quotas[sources[here]] + ordinals[places[here]]
        return sources, numbers

    def _block(self, block: int) -> tuple[Ints, Ints]:
        """For each item of the block its source, and how many items of that source come before it in the block."""
        if block not in self._blocks:
            order = permutation(BLOCK_ITEMS, "block", self._seed, block)
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
            ordinals = np.empty(BLOCK_ITEMS, dtype=np.int64)
            for source, quota in enumerate(self.quotas):
                ordinals[sources == source] = np.arange(quota)
            _make_room(self._blocks, 2)
            self._blocks[block] = sources, ordinals
        return self._blocks[block]


class ItemOrder:
    """The endless sequence of items over one source, or over several by their weights."""

    def __init__(
        self,
        num_windows: Sequence[int],
        *,
        weights: Sequence[float] | None,
        seq_len: int,
        shuffle_chunks: int,
        seed: int,
    ) -> None:
        """`num_windows` of each source, and its weight where there is more than one.

        Raises ConfigError when a weight is so small that its source would have no item in a block.
        """
        assert num_windows
        self.sources = [
            SourceOrder(count, seq_len=seq_len, shuffle_chunks=shuffle_chunks, seed=seed, source=source)
            for source, count in enumerate(num_windows)
        ]
        self.mixture = Mixture(len(num_windows), weights=weights, seed=seed)

    @property
    def items_per_epoch(self) -> int:
        """Windows of all sources together. By its weight, a source of a mixture may be through earlier, or later."""
        return sum(source.num_windows for source in self.sources)

    def locate(self, items: Ints) -> Places:
        """Where the items lie. One call costs about the same for a batch anywhere in the sequence."""
        sources, numbers = self.mixture.locate(items)
        epochs, slots, windows = np.empty_like(items), np.empty_like(items), np.empty_like(items)
        for source in _distinct(sources):
            here = np.flatnonzero(sources == source)
            epochs[here], slots[here], windows[here] = self.sources[source].locate(numbers[here])
        return Places(sources, epochs, slots, windows)


def block_quotas(weights: Sequence[float]) -> list[int]:
    """Items of each source in a block: in proportion to the weights, rounded by largest remainder, BLOCK_ITEMS in all.

    Raises ConfigError when one of them is 0.
    """
    total = sum(map(Fraction, weights))
    shares = [BLOCK_ITEMS * Fraction(weight) / total for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: quotas[source] - shares[source])
    for source in by_remainder[: BLOCK_ITEMS - sum(quotas)]:
        quotas[source] += 1
    for weight, quota in zip(weights, quotas, strict=True):
        if quota == 0:
            raise ConfigError(
                f"data.train: weight {weight:g} is {float(weight / total):.2g} of the sum of all weights, less than "
                f"one item in {BLOCK_ITEMS}: give the source a larger weight or remove it"
            )
    return quotas


def rank_share(places: Places, *, rank: int, world_size: int) -> Ints:
    """Which of a batch's items this rank computes: indices into the batch.

    Items are ordered by source and chunk slot and cut into contiguous shares that differ by at most one item, so that a
    rank keeps to its own chunks where there are at least as many chunks as ranks.
    """
    by_chunk = np.lexsort((places.slot, places.source))
    size = len(by_chunk)
    return by_chunk[rank * size // world_size : (rank + 1) * size // world_size]


def _distinct(values: Ints) -> list[int]:
    return sorted(set(values.tolist()))


def _make_room(kept: dict[Any, Any], limit: int) -> None:
    """Drop the entry that was made first when the dict is full (dicts keep the order of insertion)."""
    while len(kept) >= limit:
        del kept[next(iter(kept))]
