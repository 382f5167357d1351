"""Gives an analysis its documents: texts, rows of a run, row groups of shards, some at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmtrain.data.chat.sample import Sample
from llmtrain.data.inspection.analysis import Analysis, DocumentBatch
from llmtrain.data.inspection.exact_duplicates import hash_of
from llmtrain.data.inspection.excerpts import EXCERPT_CHARACTERS, Excerpt
from llmtrain.data.inspection.survey import RowGroupContent
from llmtrain.data.inspection.units import Encode
from llmtrain.data.order import Ints

BATCH_CHARACTERS = 1 << 20
BATCH_TOKENS = 1 << 18
BATCH_DOCUMENTS = 4096
EXCERPT_TOKENS = 1024
"""Tokens whose text is an excerpt, where the documents are tokens."""

Decode = Callable[[list[int]], str]


class TextBatches:
    """Collects texts, encodes them some at a time, and hands them to an analysis."""

    def __init__(self, analysis: Analysis, encode: Encode) -> None:
        self._analysis = analysis
        self._encode = encode
        self._texts: list[tuple[str, str, str]] = []
        """Source, name and text of each document that waits."""
        self._num_characters = 0

    def add(self, *, source: str, name: str, text: str) -> None:
        """Take the next document."""
        self._texts.append((source, name, text))
        self._num_characters += len(text)
        if self._num_characters >= BATCH_CHARACTERS or len(self._texts) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits; to be called at the end."""
        if not self._texts:
            return
        waiting, self._texts, self._num_characters = self._texts, [], 0
        sources, names, texts = zip(*waiting, strict=True)
        ids, ends = self._encode(texts)

        def excerpt_of(index: int) -> Excerpt:
            is_whole = len(texts[index]) <= EXCERPT_CHARACTERS
            num_tokens = int(ends[index] - (ends[index - 1] if index else 0)) if is_whole else None
            return Excerpt(names[index], texts[index][:EXCERPT_CHARACTERS], num_tokens)

        num_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        self._analysis.add(
            DocumentBatch(ids, ends, sources, [hash_of(text) for text in texts], excerpt_of, num_bytes=num_bytes)
        )

    def report(self) -> dict[str, Any]:
        """Return what the analysis found in all texts."""
        self.flush()
        return self._analysis.report()


class SampleBatches:
    """Collects the samples of a config's rows, and hands them to an analysis."""

    def __init__(self, analysis: Analysis, decode: Decode) -> None:
        self._analysis = analysis
        self._decode = decode
        self._samples: list[Sample] = []
        self._num_tokens = 0

    def add(self, sample: Sample) -> None:
        """Take the next sample."""
        if not self._analysis.takes_next_block():
            return
        self._samples.append(sample)
        self._num_tokens += len(sample.input_ids)
        if self._num_tokens >= BATCH_TOKENS or len(self._samples) >= BATCH_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits; to be called at the end."""
        if not self._samples:
            return
        samples, self._samples, self._num_tokens = self._samples, [], 0
        ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
        ends = np.cumsum([len(sample.input_ids) for sample in samples], dtype=np.int64)
        names = [sample.source for sample in samples]
        self._analysis.add(_batch_of_tokens(ids, ends, [_file_of(name) for name in names], names, self._decode))

    def report(self) -> dict[str, Any]:
        """Return what the analysis found in all samples."""
        self.flush()
        return self._analysis.report()


def row_group_batch(content: RowGroupContent, *, decode: Decode, eos_id: int) -> DocumentBatch:
    """Return the documents of a row group. End tokens count as tokens, and are left out of excerpts."""

    def decode_text(ids: list[int]) -> str:
        return decode(ids[:-1] if ids[-1:] == [eos_id] else ids)

    sources = [name.partition(":")[0] for name in content.sources]
    batch = _batch_of_tokens(content.tokens, content.ends, sources, content.sources, decode_text)
    return batch._replace(file=str(content.path))


def _batch_of_tokens(ids: Ints, ends: Ints, sources: list[str], names: list[str], decode: Decode) -> DocumentBatch:
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    spans: list[tuple[Any, Any]] = list(zip(begins.tolist(), ends.tolist(), strict=True))

    def excerpt_of(index: int) -> Excerpt:
        begin, end = spans[index]
        shown = ids[begin : min(end, begin + EXCERPT_TOKENS)].tolist()
        return Excerpt(names[index], decode(shown), len(shown))

    return DocumentBatch(ids, ends, sources, [hash_of(ids[begin:end].tobytes()) for begin, end in spans], excerpt_of)


def _file_of(place: str) -> str:
    """Return the file of `file:line` or `file:line (where in it)`."""
    return place.rpartition(":")[0] or place
