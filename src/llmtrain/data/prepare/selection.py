"""Choose the documents that stay, and those of them that are held out.

    reader ─ scan ─→ Corpus (hash, size and fate of each document) ─ select ─→ fates: train, val, or why left out

A document's hash alone decides whether it is held out, so neither order nor the other documents matter, and a text
that occurs twice cannot be on both sides. No text is kept here but a small sample: 27 bytes for each document are.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.manifest import Counts, InputRecord
from llmtrain.data.prepare.documents import (
    CorpusDocument,
    CorpusPiece,
    CorpusReader,
    Unit,
    UnitContent,
    file_hash,
    hash_file,
)
from llmtrain.data.prepare.inputs import CorpusFile, CorpusInput, total_size
from llmtrain.data.prepare.parallel import ordered_map
from llmtrain.errors import ConfigError, RunError

logger = logging.getLogger("llmtrain.prepare")

_SAMPLE_BYTES = (1 << 20, 1 << 24)
"""Least and most that is kept of the texts, for whoever wants to try something out on them."""
_SAMPLE_LENGTH = 1 << 18
"""Characters of one text that are kept."""

_MOST_SUBSETS = 1000

_NAMED_ERRORS = 20
"""Bad files and rows that are named one by one; all are counted."""


class Fate(IntEnum):
    """Fate of a document."""

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
    first_document: int
    num_documents: int
    first_row: int
    """Rows of the file before the unit; of JSONL, lines."""

    @property
    def span(self) -> slice:
        """Its documents in the arrays of the corpus."""
        return slice(self.first_document, self.first_document + self.num_documents)


@dataclass(frozen=True)
class Corpus:
    """All documents in reading order, without their text. Arrays have one entry (row) for each document."""

    reader: CorpusReader
    units: list[ScannedUnit]
    hashes: NDArray[np.uint64]
    """[documents, 2]: the first 128 bits of the sha256 of the text."""
    num_bytes: NDArray[np.int64]
    """Bytes of the text in UTF-8."""
    fates: NDArray[np.uint8]
    """Fate of each; after `scan`, TRAIN stands for every document with a text that is long enough."""
    subset: NDArray[np.int16]
    """Index in `subsets`."""
    subsets: list[str]
    """Names of the subsets, as folders have them, by their first document; an empty one stands for none."""
    errors: list[str]
    """The bad files and rows, each with its place; as many as are named."""
    inputs: tuple[InputRecord, ...]
    sample: list[str] = field(repr=False)
    """Beginnings of some texts, by hash, from all over the corpus: a fiftieth of it in the limits of _SAMPLE_BYTES."""

    def counts(self) -> Counts:
        """Return the number of documents of each fate; none is lost."""
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

    def pieces_with(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[ScannedUnit, CorpusPiece]]:
        """The units that hold chosen documents, to be read again. Raises RunError when a file is not what it was."""
        pieces = self.reader.pieces()
        for unit in self.units:
            piece = next(pieces, None)
            if piece is None or piece.unit != unit.unit:
                raise _changed(unit)
            if chosen[unit.span].any():
                yield unit, piece

    def reread(self, unit: ScannedUnit, piece: CorpusPiece) -> list[CorpusDocument]:
        """The documents of a unit, again. Raises RunError when they are not what they were."""
        documents = self.reader.read(piece).documents
        hashes, _ = _hashes_and_sizes(documents)
        if not np.array_equal(hashes, self.hashes[unit.span]):
            raise _changed(unit)
        return documents


@dataclass(frozen=True)
class _Scan:
    content: UnitContent
    hashes: NDArray[np.uint64]
    num_bytes: NDArray[np.int64]
    fates: NDArray[np.uint8]
    sample: list[str]


def scan(reader: CorpusReader, *, options: PrepareConfig, num_workers: int, advance: Callable[[int], None]) -> Corpus:
    """Read everything once. `advance` is called with the bytes of each unit.

    Raises ConfigError at the first bad file or row when `options.on_error` is fail, and when there is no document.
    """
    log = _ErrorLog(options.on_error)
    units: list[ScannedUnit] = []
    scans: list[_Scan] = []
    subset_arrays: list[NDArray[np.int16]] = []
    subsets: dict[str, int] = {}
    hashes: dict[CorpusFile, list[bytes]] = {}
    sample: list[str] = []
    num_bytes = total_size(reader.inputs)
    sample_left = _sample_size(num_bytes)
    share = min(1.0, sample_left / max(1, num_bytes))
    first_document = lines_before = 0
    in_order = ordered_map(
        lambda piece: (piece.unit, _scan_piece(reader, piece, options.min_length, share)),
        reader.pieces(),
        num_workers=num_workers,
    )
    for unit, result in in_order:
        lines_before = 0 if unit.start == 0 else lines_before
        documents = result.content.documents
        for document in documents:
            if document.error is not None:
                log.add(document, lines_before=lines_before)
        _add_hashes(hashes, unit, result)
        first_row = lines_before if unit.files[0].format == "jsonl" else unit.start
        units.append(ScannedUnit(unit, first_document, len(documents), first_row))
        subset_arrays.append(_numbered(documents, subsets))
        first_document += len(documents)
        lines_before += result.content.num_lines
        documents.clear()  # their texts
        for text in result.sample:
            if sample_left > 0:
                sample.append(text)
                sample_left -= len(text)
        result.sample.clear()
        scans.append(result)
        advance(result.content.num_bytes)
    log.close()
    if not first_document:
        raise ConfigError("prepare.input: there is no document in the files: all are empty")
    return Corpus(
        reader=reader,
        units=units,
        hashes=np.concatenate([result.hashes for result in scans]),
        num_bytes=np.concatenate([result.num_bytes for result in scans]),
        fates=np.concatenate([result.fates for result in scans]),
        subset=np.concatenate(subset_arrays),
        subsets=list(subsets),
        errors=log.named,
        inputs=tuple(
            _input_record(source, [_scanned_hash(file, hashes[file]) for file in source.files])
            for source in reader.inputs
        ),
        sample=sample,
    )


def _add_hashes(hashes: dict[CorpusFile, list[bytes]], unit: Unit, result: _Scan) -> None:
    """Add what a unit adds to the hash of each of its files; a remote dataset is hashed by its documents."""
    for file, of_file in zip(unit.files, result.content.block_hashes, strict=True):
        hashes.setdefault(file, []).extend(of_file)
        if file.dataset is not None and file.dataset.is_remote:
            hashes[file].append(result.hashes.tobytes())


def fingerprint(inputs: Sequence[CorpusInput], *, num_workers: int) -> tuple[InputRecord | None, ...]:
    """Return what `scan` records of the inputs, from the files as they are now, without opening them.

    None for a dataset on the Hub, of which that is not known.
    """
    return tuple(
        None
        if any(file.dataset is not None and file.dataset.is_remote for file in source.files)
        else _input_record(source, list(ordered_map(hash_file, source.files, num_workers=num_workers)))
        for source in inputs
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
    """Return the documents that a tokenizer learns from: all for training, or the lowest hashes up to `max_bytes`.

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


def _scan_piece(reader: CorpusReader, piece: CorpusPiece, min_length: int, sample_share: float) -> _Scan:
    content = reader.read(piece)
    documents = content.documents
    hashes, num_bytes = _hashes_and_sizes(documents)
    fates = np.array([_first_fate(document.text, document.error, min_length) for document in documents], np.uint8)
    sampled = (hashes[:, 1] * 2.0**-64 <= sample_share) & (fates == Fate.TRAIN)
    sample = [documents[index].text[:_SAMPLE_LENGTH] for index in np.flatnonzero(sampled)]
    return _Scan(content, hashes, num_bytes, fates, sample)


def _hashes_and_sizes(documents: Sequence[CorpusDocument]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    digests = bytearray()
    num_bytes = np.zeros(len(documents), np.int64)
    for index, document in enumerate(documents):
        data = document.text.encode()
        digests += hashlib.sha256(data).digest()[:16]
        num_bytes[index] = len(data)
    return np.frombuffer(bytes(digests), ">u8").astype(np.uint64).reshape(len(documents), 2), num_bytes


def _numbered(documents: Sequence[CorpusDocument], subsets: dict[str, int]) -> NDArray[np.int16]:
    """The number of each document's subset; new ones are added to `subsets`."""
    numbers = [subsets.setdefault(_folder_name(document.subset), len(subsets)) for document in documents]
    if len(subsets) > _MOST_SUBSETS:
        raise ConfigError(
            f"prepare.adapter: it gives more than {_MOST_SUBSETS} subsets, each of which would have a folder: "
            f"{', '.join(list(subsets)[-3:])}, …: let it give fewer, or none"
        )
    return np.array(numbers, np.int16)


def _folder_name(subset: str | None) -> str:
    return re.sub(r"[^\w.+-]+", "-", subset).strip("-.") if subset else ""


def _changed(unit: ScannedUnit) -> RunError:
    names = ", ".join(str(file.dataset or file.path) for file in unit.unit.files[:3])
    more = f" and {len(unit.unit.files) - 3} more" if len(unit.unit.files) > 3 else ""
    return RunError(f"one of {names}{more} changed while it was read: run prepare again")


def _first_fate(text: str, error: str | None, min_length: int) -> Fate:
    if error is not None:
        return Fate.ERROR
    if not text or text.isspace():
        return Fate.EMPTY
    return Fate.TOO_SHORT if len(text) < min_length else Fate.TRAIN


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each row whether an earlier row has the same hash."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in reading order
    in_order = hashes[order]
    repeated = np.zeros(len(hashes), np.bool_)
    repeated[order[1:]] = (in_order[1:] == in_order[:-1]).all(axis=1)
    return repeated


class _ErrorLog:
    """The bad files and rows: the first one ends the preparation, or all are counted and some are named."""

    def __init__(self, on_error: str) -> None:
        self.named: list[str] = []
        self._on_error = on_error
        self._count = 0

    def add(self, document: CorpusDocument, *, lines_before: int) -> None:
        line = "" if document.line is None else f":{lines_before + document.line}"
        error = f"{document.file.dataset or document.file.path}{line}: {document.error}"
        if self._on_error == "fail":
            raise ConfigError(f"{error}; repair it, or leave such ones out with prepare.on_error: skip")
        self._count += 1
        if self._count <= _NAMED_ERRORS:
            self.named.append(error)
            logger.warning("left out: %s", error)

    def close(self) -> None:
        if self._count > len(self.named):
            logger.warning("left out: %d more bad files and rows", self._count - len(self.named))


def _scanned_hash(file: CorpusFile, found: list[bytes]) -> bytes:
    return hash_file(file) if file.dataset is not None and not file.dataset.is_remote else file_hash(found)


def _input_record(source: CorpusInput, file_hashes: Sequence[bytes]) -> InputRecord:
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
