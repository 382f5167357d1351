"""Samples of a corpus: which blocks are analysed, and the documents whose text is looked at.

Both depend on the seed and on numbers in reading order alone, so the same corpus gives the same sample.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

from llmtrain.errors import ConfigError

Item = TypeVar("Item")


class BlockSample(NamedTuple):
    """A share of the blocks: row groups of shards, text files or blocks of 4 MB of other files, or rows."""

    share: float = 1.0
    seed: int = 0

    def takes(self, block: int) -> bool:
        """Return whether a block is in the sample, by its number in reading order."""
        return self.share >= 1 or draw(self.seed, "block", block) < self.share

    def reject_none(self, taken: int, *, of: int) -> None:
        """Raise ConfigError where the sample has none of the blocks of a corpus."""
        if of and not taken:
            raise ConfigError(
                f"--sample {self.share:g} takes none of the {of:,} blocks of this corpus: give a larger share, or "
                "another --sample-seed"
            )


def draw(seed: int, purpose: str, number: int) -> float:
    """Return a number in [0, 1) that depends on the arguments alone."""
    digest = blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / (1 << 56)


class DrawnItems(Generic[Item]):
    """At most `size` items out of any number, each as likely as any other; the others are not kept."""

    def __init__(self, size: int, *, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._heap: list[tuple[float, int, Item]] = []
        """The highest draw first, with the number of the item."""

    def offer(self, number: int, make: Callable[[], Item]) -> None:
        """Keep the item with this number if its draw is among the lowest; only then it is made."""
        rank = -draw(self._seed, "excerpt", number)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (rank, number, make()))
        elif self._heap and rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, number, make()))

    def in_order(self) -> list[Item]:
        """Return the items that were kept, by their numbers."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[1])]
