"""The step `near_duplicates`: MinHash signatures of texts, and the search for documents with similar ones.

    text ─ words ─▶ n-gram hashes ─ rensa (compiled) ─▶ signature ─▶ band hashes ─┐   workers
    per band: sort by hash ─▶ groups ─▶ compare signatures with the group's first ─┘   main process, numpy

The share of equal entries of two signatures estimates the Jaccard similarity of the sets of n-grams (Broder 1997).
Groups of entries, bands, find the pairs worth a comparison (Leskovec et al., Mining of Massive Datasets, section 3.4).
Signatures and band hashes are in temporary files, so memory holds 8 bytes a document and band at a time: see
`SignatureFiles`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.quality import NearDuplicatesStep
from llmtrain.data.prepare.quality.words import Hashes, ngram_hashes, word_hashes
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra

NUM_HASHES: Final = 128
"""Entries of a signature, of 4 bytes each. The estimate's standard error is at most 0.044, at similarity 0.5."""
_SEED: Final = 1
_RECALL_AT_THRESHOLD: Final = 0.99
_COMPARED: Final = 1 << 14
"""Pairs that are compared at a time: 16 MB of signatures."""
_MOST_ROUNDS: Final = 64
"""Documents of one group that others are compared with, since a group of different texts would take n² comparisons."""

Signatures = NDArray[np.uint32]


class Band(NamedTuple):
    """Division of a signature: bands of `rows` entries; a pair that agrees in all entries of a band is compared."""

    bands: int
    rows: int


def bands_for(threshold: float) -> Band:
    """Return the longest bands by which 99 % of the pairs at the threshold share one.

    A pair of similarity s shares a band with probability 1 − (1 − s^rows)^bands.
    """
    for rows in range(NUM_HASHES, 1, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL_AT_THRESHOLD:
            return Band(bands, rows)
    return Band(NUM_HASHES, 1)


class NearDuplicates:
    """Makes signatures by the step's options."""

    version: ClassVar[int] = 1

    def __init__(self, options: NearDuplicatesStep, *, key: str) -> None:
        """Raises ConfigError, with the config's `key`, when rensa is not installed."""
        try:
            from rensa import RMinHash
        except ImportError as error:
            raise ConfigError(f"{key}: near_duplicates needs rensa: `{install_extra('quality')}`") from error
        self._minhash: Any = RMinHash
        self._ngram = options.ngram
        self.threshold = options.threshold
        self.band = bands_for(options.threshold)

    def signatures(self, texts: Sequence[str]) -> Signatures:
        """Return [texts, NUM_HASHES]: the signature of each text's set of n-grams."""
        sets = [self._shingles(text) for text in texts]
        offsets = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
        hashes = np.concatenate([*sets, np.zeros(0, np.uint64)])
        matrix = self._minhash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_HASHES, _SEED)
        return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_HASHES)

    def _shingles(self, text: str) -> Hashes:
        words = word_hashes(text)
        return ngram_hashes(words, min(self._ngram, len(words)))


class SignatureFiles:
    """Signatures of all documents, in order, in temporary files that vanish with the process.

    A document takes 512 bytes on disk and 8 for each band (21 bands at threshold 0.8: 680 MB for a million documents).
    The search reads a band at a time: at most 50 bytes of memory for each document that it looks at.
    """

    def __init__(self, step: NearDuplicates, folder: Path | None) -> None:
        """Raises OSError when there can be no files in `folder` (None: the system's own for such files)."""
        self._step = step
        self._signatures: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._bands = [tempfile.TemporaryFile(dir=folder) for _ in range(step.band.bands)]  # noqa: SIM115
        self._count = 0

    def add(self, signatures: Signatures) -> None:
        """Append the signatures of the next documents. Raises OSError when the disk is full."""
        self._count += len(signatures)
        self._signatures.write(signatures.tobytes())
        rows = self._step.band.rows
        for number, file in enumerate(self._bands):
            file.write(_row_hashes(signatures[:, number * rows : (number + 1) * rows]).tobytes())

    def close(self) -> None:
        """Remove the files."""
        for file in (self._signatures, *self._bands):
            file.close()

    def duplicates(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return those of `documents` (ascending) that are similar to an earlier one of them, and that one for each.

        Band by band, in a fixed order: the documents with the same hash are compared with the first of them; those that
        are not similar to it with the first of those; and so on. What was found takes no part in later bands. So the
        first of similar documents always stays.
        """
        self._signatures.flush()
        if not len(documents):
            return documents, documents
        signatures = np.memmap(self._signatures, np.uint32, mode="r", shape=(self._count, NUM_HASHES))
        is_left = np.zeros(self._count, np.bool_)
        is_left[documents] = True
        found: list[NDArray[np.int64]] = [documents[:0]]
        originals: list[NDArray[np.int64]] = [documents[:0]]
        for file in self._bands:
            for repeated, first in self._of_band(signatures, *_sharing(file, is_left)):
                is_left[repeated] = False
                found.append(repeated)
                originals.append(first)
        repeated, first = np.concatenate(found), np.concatenate(originals)
        order = np.argsort(repeated)
        return repeated[order], first[order]

    def _of_band(
        self, signatures: Signatures, documents: NDArray[np.int64], hashes: Hashes
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield documents with the earlier one that they are similar to; those with the same hash stand together."""
        for _ in range(_MOST_ROUNDS):
            if not len(documents):
                return
            begins = np.ones(len(hashes), np.bool_)
            begins[1:] = hashes[1:] != hashes[:-1]
            starts = np.flatnonzero(begins)
            firsts = np.repeat(documents[starts], np.diff(starts, append=len(hashes)))[~begins]
            documents, hashes = documents[~begins], hashes[~begins]
            similar = self._similar(signatures, documents, firsts)
            yield documents[similar], firsts[similar]
            documents, hashes = documents[~similar], hashes[~similar]

    def _similar(self, signatures: Signatures, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
        least = self._step.threshold * NUM_HASHES
        parts = [
            (signatures[one[at : at + _COMPARED]] == signatures[other[at : at + _COMPARED]]).sum(axis=1) >= least
            for at in range(0, len(one), _COMPARED)
        ]
        return np.concatenate([*parts, np.zeros(0, np.bool_)])


def _sharing(file: IO[bytes], chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Hashes]:
    """Return the chosen documents that share the hash of a band with another of them, and the hash.

    Equal hashes stand together, and in them documents in their order.
    """
    file.flush()
    file.seek(0)
    hashes = np.fromfile(file, np.uint64)
    documents = np.flatnonzero(chosen)
    hashes = hashes[documents]
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    shares = np.zeros(len(hashes), np.bool_)
    shares[1:] = hashes[1:] == hashes[:-1]
    shares[:-1] |= shares[1:]
    return documents[order[shares]], hashes[shares]


def _row_hashes(rows: NDArray[np.uint32]) -> Hashes:
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes
