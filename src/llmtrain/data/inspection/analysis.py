"""The analysis of a corpus, in one pass and bounded memory: lengths, frequencies, bigrams, duplicates, languages.

    row groups of shards ─┐
    texts, rows           ├─▶ DocumentBatch ─▶ Analysis.add ─▶ counts ─▶ Analysis.report
    samples of a config  ─┘                            └▶ excerpts of some documents

What is counted in is units.py's. Pages and pictures of a report are `reports`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.inspection.bigrams import BigramCounts, describe_bigrams
from llmtrain.data.inspection.block_sample import BlockSample, DrawnItems
from llmtrain.data.inspection.exact_duplicates import DuplicateCounts
from llmtrain.data.inspection.excerpts import (
    MAX_EXCERPTS,
    Excerpt,
    bytes_per_token,
    describe_compression,
    describe_languages,
)
from llmtrain.data.inspection.frequencies import TokenCounts, describe_frequencies
from llmtrain.data.inspection.lengths import describe_lengths
from llmtrain.data.inspection.units import CountedUnit
from llmtrain.data.order import Ints

MAX_SOURCES = 1000
"""Sources that are counted by name; the documents of all others are counted together."""
OTHER_SOURCES = "(other sources)"

NEAR_NOT_MEASURED = "only equal texts are looked for; the step near_duplicates of prepare drops similar ones"


class DocumentBatch(NamedTuple):
    """Some documents, in reading order."""

    ids: NDArray[Any]
    """[tokens] ids of all documents, one after the other."""
    ends: Ints
    """[documents] where each ends in `ids`."""
    sources: Sequence[str]
    hashes: Sequence[int]
    """Hash of the text of each document, or of its tokens."""
    excerpt_of: Callable[[int], Excerpt]
    """Makes the excerpt of one of the documents, by its number in the batch."""
    num_bytes: int | None = None
    """UTF-8 bytes of the texts, where they are known."""
    file: str | None = None
    """The shard that they are from."""


class Analysis:
    """Counts of the documents so far."""

    def __init__(self, vocabulary: CountedUnit, sample: BlockSample, *, num_listed: int) -> None:
        self.vocabulary = vocabulary
        self._sample = sample
        self._num_listed = num_listed
        self._num_blocks = self._num_taken = 0
        self._counts = TokenCounts(vocabulary.size or 0)
        self._bigrams = BigramCounts(ignored=vocabulary.ignored)
        self._duplicates = DuplicateCounts()
        self._lengths: Counter[int] = Counter()
        self._num_documents = 0
        self._num_bytes: int | None = 0
        self._sources: dict[str, list[int]] = {}
        self._shards: list[dict[str, Any]] = []
        """Described one after the other, so that only the lengths of one are kept."""
        self._shard: tuple[str | None, Counter[int]] = None, Counter()
        self._excerpts: DrawnItems[tuple[Excerpt, int]] = DrawnItems(MAX_EXCERPTS, seed=sample.seed)

    def takes_next_block(self) -> bool:
        """Return whether the next block, in reading order, is in the sample."""
        self._num_blocks += 1
        taken = self._sample.takes(self._num_blocks - 1)
        self._num_taken += taken
        return taken

    def took_blocks(self, taken: int, *, of: int) -> None:
        """Note blocks that somebody else drew."""
        self._num_blocks, self._num_taken = self._num_blocks + of, self._num_taken + taken

    def add(self, batch: DocumentBatch) -> None:
        """Count the documents of a batch."""
        self._counts.add(batch.ids)
        self._bigrams.add(batch.ids, batch.ends)
        self._duplicates.add(batch.hashes)
        lengths = np.diff(batch.ends, prepend=0).tolist()
        self._lengths.update(lengths)
        if batch.file != self._shard[0]:
            self._end_shard()
            self._shard = batch.file, Counter()
        self._shard[1].update(lengths)
        known = self._num_bytes is not None and batch.num_bytes is not None
        self._num_bytes = (self._num_bytes or 0) + (batch.num_bytes or 0) if known else None
        for index, (source, length) in enumerate(zip(batch.sources, lengths, strict=True)):
            name = source if source in self._sources or len(self._sources) < MAX_SOURCES else OTHER_SOURCES
            counted = self._sources.setdefault(name, [0, 0])
            counted[0] += 1
            counted[1] += length
            self._excerpts.offer(self._num_documents + index, partial(_excerpt, batch, index))
        self._num_documents += len(lengths)

    def report(self, *, bytes_per_unit: float | None = None) -> dict[str, Any]:
        """Return all that was found. `bytes_per_unit`: bytes a token, where it is known from elsewhere.

        Raises ConfigError where the sample has no block of a corpus that has some.
        """
        self._sample.reject_none(self._num_taken, of=self._num_blocks)
        self._end_shard()
        names_of = self.vocabulary.names_of
        counts = self._counts.counts
        others = 0
        if self.vocabulary.ignored is not None and len(counts):
            others = int(counts[self.vocabulary.ignored])
            counts = counts.copy()
            counts[self.vocabulary.ignored] = 0
        excerpts = [excerpt for excerpt, _ in self._excerpts.in_order()]
        return {
            "unit": self.vocabulary.unit,
            "vocabulary_size": self.vocabulary.size,
            "sample": self._sample_report(),
            "documents": self._num_documents,
            "lengths": describe_lengths(self._lengths),
            "frequencies": describe_frequencies(counts, names_of, num_listed=self._num_listed),
            "words_not_told_apart": others,
            "bigrams": describe_bigrams(self._bigrams, names_of, num_listed=self._num_listed),
            "bytes_per_unit": bytes_per_unit or self._bytes_per_unit(excerpts),
            "compression": describe_compression(excerpts),
            "duplicates": self._duplicate_report(),
            "languages": describe_languages(excerpts),
            "sources": self._source_report(),
            "shards": self._shards,
        }

    def _end_shard(self) -> None:
        file, lengths = self._shard
        described = describe_lengths(lengths)
        if file is not None and described is not None:
            del described["histogram"]
            self._shards.append({"file": file, "documents": lengths.total(), **described})
        self._shard = None, Counter()

    def _sample_report(self) -> dict[str, Any]:
        return {
            "share_asked": self._sample.share,
            "seed": self._sample.seed,
            "blocks": self._num_blocks,
            "blocks_analysed": self._num_taken,
            "is_all": self._num_taken == self._num_blocks,
        }

    def _bytes_per_unit(self, excerpts: Sequence[Excerpt]) -> float | None:
        total = sum(length * count for length, count in self._lengths.items())
        if self._num_bytes is None:
            return bytes_per_token(excerpts)
        return self._num_bytes / total if total else None

    def _duplicate_report(self) -> dict[str, Any]:
        drawn = self._excerpts.in_order()
        copies = self._duplicates.copies_of(hash_ for _, hash_ in drawn)
        repeated = {hash_: (count, excerpt) for (excerpt, hash_), count in zip(drawn, copies, strict=True) if count > 1}
        most = sorted(repeated.values(), key=lambda entry: -entry[0])[:5]
        return {
            **self._duplicates.describe(),
            "most_repeated": [
                {"document": excerpt.name, "copies": count, "text": excerpt.text[:160]} for count, excerpt in most
            ],
            "near": {"not_measured": NEAR_NOT_MEASURED},
        }

    def _source_report(self) -> list[dict[str, Any]]:
        total = max(1, sum(length for _, length in self._sources.values()))
        by_size = sorted(self._sources.items(), key=lambda entry: (-entry[1][1], entry[0]))
        return [
            {"source": name, "documents": documents, "length": length, "share": length / total}
            for name, (documents, length) in by_size
        ]


def _excerpt(batch: DocumentBatch, index: int) -> tuple[Excerpt, int]:
    return batch.excerpt_of(index), batch.hashes[index]
