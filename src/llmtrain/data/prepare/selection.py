"""Which documents stay, and which of them are held out.

    units ─ scan ─→ Corpus (hash, size and fate of each document) ─ select ─→ fates: train, val, or why left out

A document's hash alone decides whether it is held out, so neither order nor the other documents matter, and a text
that occurs twice cannot be on both sides. No text is kept here but a small sample: 25 bytes for each document are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import PrepareConfig
from llmtrain.config.errors import ConfigError, RunError
from llmtrain.data.manifest import Counts, InputRecord
from llmtrain.data.prepare.documents import Unit, UnitContent, file_hash, hash_file, read_unit
from llmtrain.data.prepare.inputs import Input, total_size
from llmtrain.data.prepare.parallel import ordered_map

logger = logging.getLogger("llmtrain.prepare")

_SAMPLE_BYTES = (1 << 20, 1 << 24)
"""Least and most that is kept of the texts, for whoever wants to try something out on them."""
_SAMPLE_LENGTH = 1 << 18
"""Characters of one text that are kept."""

_NAMED_ERRORS = 20
"""Bad files and lines that are named one by one; all are counted."""


class Fate(IntEnum):
    """What becomes of a document."""

    TRAIN = 0
    VAL = 1
    DUPLICATE = 2
    TOO_SHORT = 3
    EMPTY = 4
    ERROR = 5


@dataclass(frozen=True)
class ScannedUnit:
    """A unit, and what its first reading told."""

    unit: Unit
    block_hashes: tuple[tuple[bytes, ...], ...]
    first_document: int
    num_documents: int
    first_line: int
    """Lines of the file before the unit (JSONL)."""

    def reread(self) -> UnitContent:
        """Read it again. Raises RunError when a file is not what it was."""
        content = read_unit(self.unit)
        if content.block_hashes != self.block_hashes or len(content.documents) != self.num_documents:
            names = ", ".join(file.path for file in self.unit.files[:3])
            more = f" and {len(self.unit.files) - 3} more" if len(self.unit.files) > 3 else ""
            raise RunError(f"one of {names}{more} changed while it was read: run prepare again")
        return content


@dataclass(frozen=True)
class Corpus:
    """All documents in reading order, without their text. Arrays have one entry (row) for each document."""

    units: list[ScannedUnit]
    hashes: NDArray[np.uint64]
    """[documents, 2]: the first 128 bits of the sha256 of the text."""
    num_bytes: NDArray[np.int64]
    """Of the text in UTF-8."""
    fates: NDArray[np.uint8]
    """Fate of each; after `scan`, TRAIN stands for every document with a text that is long enough."""
    errors: list[str]
    """The bad files and lines, each with its place; as many as are named."""
    inputs: tuple[InputRecord, ...]
    sample: list[str] = field(repr=False)
    """Beginnings of some texts, by hash, from all over the corpus: a fiftieth of it in the limits of _SAMPLE_BYTES."""

    def counts(self) -> Counts:
        """How many documents there are of each fate; none is lost."""
        by_fate = np.bincount(self.fates, minlength=len(Fate)).tolist()
        counts = Counts(
            read=sum(unit.num_documents for unit in self.units),
            train=by_fate[Fate.TRAIN],
            val=by_fate[Fate.VAL],
            duplicates=by_fate[Fate.DUPLICATE],
            too_short=by_fate[Fate.TOO_SHORT],
            empty=by_fate[Fate.EMPTY],
            errors=by_fate[Fate.ERROR],
        )
        counts.check()
        return counts

    def kept_bytes(self) -> int:
        """UTF-8 bytes of the documents for training and held out."""
        return int(self.num_bytes[self.fates <= Fate.VAL].sum())


@dataclass(frozen=True)
class _Scan:
    content: UnitContent
    hashes: NDArray[np.uint64]
    num_bytes: NDArray[np.int64]
    fates: NDArray[np.uint8]
    sample: list[str]


def scan(
    inputs: Sequence[Input],
    units: Sequence[Unit],
    *,
    options: PrepareConfig,
    num_workers: int,
    advance: Callable[[int], None],
) -> Corpus:
    """Read everything once. `advance` is called with the bytes of each unit.

    Raises ConfigError at the first bad file or line when `options.on_error` is fail, and when there is no document.
    """
    scanned: list[ScannedUnit] = []
    scans: list[_Scan] = []
    errors: list[str] = []
    block_hashes: dict[str, list[bytes]] = {}
    num_documents = num_errors = first_line = 0
    sample: list[str] = []
    sample_left = _sample_size(total_size(inputs))
    share = min(1.0, sample_left / max(1, total_size(inputs)))
    results = ordered_map(lambda unit: _scan_unit(unit, options.min_length, share), units, num_workers=num_workers)
    for unit, result in zip(units, results, strict=True):
        first_line = 0 if unit.start == 0 else first_line
        for error in _located_errors(result.content, first_line=first_line):
            if options.on_error == "fail":
                raise ConfigError(f"{error}; repair it, or leave such ones out with prepare.on_error: skip")
            num_errors += 1
            if num_errors <= _NAMED_ERRORS:
                errors.append(error)
                logger.warning("left out: %s", error)
        for file, of_file in zip(unit.files, result.content.block_hashes, strict=True):
            block_hashes.setdefault(file.path, []).extend(of_file)
        size = len(result.content.documents)
        scanned.append(ScannedUnit(unit, result.content.block_hashes, num_documents, size, first_line))
        num_documents += size
        first_line += result.content.num_lines
        result.content.documents.clear()  # their texts
        for text in result.sample:
            if sample_left > 0:
                sample.append(text)
                sample_left -= len(text)
        result.sample.clear()
        scans.append(result)
        advance(result.content.num_bytes)
    if num_errors > len(errors):
        logger.warning("left out: %d more bad files and lines", num_errors - len(errors))
    if not num_documents:
        raise ConfigError("prepare.input: there is no document in the files: all are empty")
    return Corpus(
        units=scanned,
        hashes=np.concatenate([result.hashes for result in scans]),
        num_bytes=np.concatenate([result.num_bytes for result in scans]),
        fates=np.concatenate([result.fates for result in scans]),
        errors=errors,
        inputs=tuple(
            _input_record(source, [file_hash(block_hashes[file.path]) for file in source.files]) for source in inputs
        ),
        sample=sample,
    )


def fingerprint(inputs: Sequence[Input], *, num_workers: int) -> tuple[InputRecord, ...]:
    """What `scan` records of the inputs, from the files as they are now, without looking into them."""
    return tuple(
        _input_record(source, list(ordered_map(hash_file, source.files, num_workers=num_workers))) for source in inputs
    )


def select(corpus: Corpus, options: PrepareConfig) -> Corpus:
    """The corpus with each document's final fate.

    Of equal texts the first stays. A document is held out when the first 64 bits of its hash, as a fraction, are below
    `options.val_fraction`. Raises ConfigError when nothing is left for training, or nothing is held out that should be.
    """
    fates = corpus.fates.copy()
    if options.deduplicate:
        fates[_repeated(corpus.hashes) & (fates == Fate.TRAIN)] = Fate.DUPLICATE
    threshold = np.uint64(int(options.val_fraction * 2**64))
    fates[(fates == Fate.TRAIN) & (corpus.hashes[:, 0] < threshold)] = Fate.VAL
    chosen = replace(corpus, fates=fates)
    counts = chosen.counts()
    if not counts.train and not counts.val:
        raise ConfigError(
            f"prepare.input: no document is left: of {counts.read} read, {counts.empty} have no text, "
            f"{counts.too_short} are shorter than min_length {options.min_length}, {counts.errors} have errors"
        )
    if options.val_fraction > 0 and not counts.val:
        raise ConfigError(
            f"prepare.val_fraction: {options.val_fraction} of {counts.train} documents held out none: these are too "
            "few documents; raise val_fraction, split the text into more documents, or set it to 0 and remove data.val"
        )
    if not counts.train:
        raise ConfigError(
            f"prepare.val_fraction: {options.val_fraction} of {counts.val} documents held out all of them: "
            "lower it, or split the text into more documents"
        )
    return chosen


def training_sample(corpus: Corpus, *, max_bytes: int | None) -> NDArray[np.bool_]:
    """Which documents a tokenizer learns from: all for training, or those of the lowest hashes up to `max_bytes`.

    Independent of order, and of what is held out (other bits of the hash decide). At least one document.
    """
    train = np.flatnonzero(corpus.fates == Fate.TRAIN)
    by_hash = train[np.argsort(corpus.hashes[train, 1], kind="stable")]
    total = np.cumsum(corpus.num_bytes[by_hash])
    taken = by_hash if max_bytes is None else by_hash[: max(1, int(np.searchsorted(total, max_bytes, side="right")))]
    sample = np.zeros(len(corpus.fates), np.bool_)
    sample[taken] = True
    return sample


def _sample_size(num_bytes: int) -> int:
    least, most = _SAMPLE_BYTES
    return min(most, max(least, num_bytes // 50))


def _scan_unit(unit: Unit, min_length: int, sample_share: float) -> _Scan:
    content = read_unit(unit)
    num_documents = len(content.documents)
    digests = bytearray()
    num_bytes = np.zeros(num_documents, np.int64)
    fates = np.empty(num_documents, np.uint8)
    for index, document in enumerate(content.documents):
        data = document.text.encode()
        digests += hashlib.sha256(data).digest()[:16]
        num_bytes[index] = len(data)
        fates[index] = _first_fate(document.text, document.error, min_length)
    hashes = np.frombuffer(bytes(digests), ">u8").astype(np.uint64).reshape(num_documents, 2)
    sampled = (hashes[:, 1] * 2.0**-64 <= sample_share) & (fates == Fate.TRAIN)
    sample = [content.documents[index].text[:_SAMPLE_LENGTH] for index in np.flatnonzero(sampled)]
    return _Scan(content, hashes, num_bytes, fates, sample)


def _first_fate(text: str, error: str | None, min_length: int) -> Fate:
    if error is not None:
        return Fate.ERROR
    if not text or text.isspace():
        return Fate.EMPTY
    return Fate.TOO_SHORT if len(text) < min_length else Fate.TRAIN


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether the same hash stands in an earlier row."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in reading order
    in_order = hashes[order]
    repeated = np.zeros(len(hashes), np.bool_)
    repeated[order[1:]] = (in_order[1:] == in_order[:-1]).all(axis=1)
    return repeated


def _located_errors(content: UnitContent, *, first_line: int) -> Iterator[str]:
    for document in content.documents:
        if document.error is not None:
            line = "" if document.line is None else f":{first_line + document.line}"
            yield f"{document.file.path}{line}: {document.error}"


def _input_record(source: Input, file_hashes: Sequence[bytes]) -> InputRecord:
    digest = hashlib.sha256()
    for file, of_file in zip(source.files, file_hashes, strict=True):
        digest.update(file.label.encode() + b"\0" + of_file)
    return InputRecord(
        name=source.name,
        path=source.path,
        files=len(source.files),
        bytes=total_size([source]),
        sha256=digest.hexdigest(),
    )
