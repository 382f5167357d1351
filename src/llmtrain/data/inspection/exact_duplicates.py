"""Exact duplicates: documents with the same text, by a hash of it.

Memory is bounded by the hashes themselves: when more than MAX_HASHES are known, those whose lowest bits are not all
zero are forgotten, one bit more each time. Of a text either all copies are counted or none, so the shares stay right.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_HASHES = 1 << 22

Hashes = NDArray[np.uint64]


def hash_of(text: str | bytes) -> int:
    """Return 64 bits of a hash of a text, or of the bytes of its tokens."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class DuplicateCounts:
    """Counts documents by the hashes of their texts."""

    def __init__(self, *, max_hashes: int = MAX_HASHES) -> None:
        self._max_hashes = max_hashes
        self._num_bits = 0
        """Number of low bits that are zero in the hashes that are counted."""
        self._hashes: list[Hashes] = [np.zeros(0, np.uint64)]

    def add(self, hashes: Iterable[int]) -> None:
        """Count documents."""
        self._hashes.append(self._counted(np.fromiter(hashes, np.uint64)))
        while sum(map(len, self._hashes)) > self._max_hashes and self._num_bits < 63:
            self._num_bits += 1
            self._hashes = [self._counted(np.concatenate(self._hashes))]

    def describe(self) -> dict[str, Any]:
        """Return the number of documents that repeat one before them, and of texts that occur more than once."""
        _, copies = np.unique(np.concatenate(self._hashes), return_counts=True)
        counted = int(copies.sum())
        duplicates = counted - len(copies)
        return {
            "documents": counted,
            "share_of_texts_counted": 0.5**self._num_bits,
            "duplicates": duplicates,
            "share": duplicates / counted if counted else 0.0,
            "repeated_texts": int((copies > 1).sum()),
            "most_copies": int(copies.max(initial=0)),
        }

    def copies_of(self, hashes: Iterable[int]) -> list[int]:
        """Return how often each of these texts occurs; 0 where it is not among those counted."""
        known, copies = np.unique(np.concatenate(self._hashes), return_counts=True)
        wanted = np.fromiter(hashes, np.uint64)
        places = np.minimum(np.searchsorted(known, wanted), max(0, len(known) - 1))
        is_known = known[places] == wanted if len(known) else np.zeros(len(wanted), bool)
        return [int(copies[place]) if there else 0 for place, there in zip(places, is_known, strict=True)]

    def _counted(self, hashes: Hashes) -> Hashes:
        counted: Hashes = hashes[hashes & np.uint64((1 << self._num_bits) - 1) == 0]
        return counted
