"""Choose the documents that stay, and those of them that are held out.

    reader ─ scan ─→ Corpus (hash, size and fate of each document) ─ select ─→ fates: train, val, or why left out
               └─ quality steps leave documents out, and change texts

A document's hash alone decides whether it is held out, so neither order nor the other documents matter, and a text
that occurs twice cannot be on both sides. No text is kept here but a small sample: 29 bytes for each document are, and
24 more for each step that may change its text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.manifest import Counts, InputRecord, StepRecord
from llmtrain.data.prepare.documents import (
    CorpusDocument,
    CorpusPiece,
    CorpusReader,
    Unit,
    file_hash,
    hash_file,
)
from llmtrain.data.prepare.error_log import ErrorLog
from llmtrain.data.prepare.inputs import CorpusFile, CorpusInput, total_size
from llmtrain.data.prepare.parallel import Executor, ordered_map
from llmtrain.data.prepare.quality.duplicates import drop_duplicates
from llmtrain.data.prepare.quality.near_duplicates import SignatureFiles
from llmtrain.data.prepare.quality.plan import Examined
from llmtrain.data.prepare.quality.records import step_records
from llmtrain.data.prepare.quality.workers import OpenSteps
from llmtrain.data.prepare.rereading import Portion, Rereader, ScannedUnit, changed
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

_SAMPLE_BYTES = (1 << 20, 1 << 24)
"""Least and most that is kept of the texts, for whoever wants to try something out on them."""
_MOST_SUBSETS = 1000


class Fate(IntEnum):
    """Fate of a document."""

    TRAIN = 0
    VAL = 1
    DROPPED = 2
    """A quality step left it out."""
    EMPTY = 3
    ERROR = 4


@dataclass(frozen=True)
class Corpus:
    """All documents in reading order, without their text. Arrays have one entry for each document.

    A text has a version more for each quality step that may change it; the last one becomes tokens.
    """

    reader: CorpusReader
    steps: OpenSteps
    units: list[ScannedUnit]
    version_hashes: NDArray[np.uint64]
    """[versions, documents, 2]: the first 128 bits of the sha256 of the text."""
    version_bytes: NDArray[np.int64]
    """[versions, documents]: bytes of the text in UTF-8."""
    fates: NDArray[np.uint8]
    """Fate of each; after `scan`, TRAIN stands for every document that the quality steps leave in."""
    dropped_by: NDArray[np.uint16]
    """0, or one more than the index of the rule in `steps.plan.rules` that dropped it."""
    originals: dict[int, int]
    """Index of the document that some duplicates repeat, by their own."""
    subset: NDArray[np.int16]
    """Index in `subsets`."""
    subsets: list[str]
    """Names of the subsets, as folders have them, by their first document; an empty one stands for none."""
    errors: list[str]
    """The bad files and rows, each with its place; as many as are named."""
    inputs: tuple[InputRecord, ...]
    sample: list[str] = field(repr=False)
    """Beginnings of some texts, by hash, from all over the corpus: a fiftieth of it in the limits of _SAMPLE_BYTES."""

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """[documents, 2]: of the last version of each text."""
        last: NDArray[np.uint64] = self.version_hashes[-1]
        return last

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        """Bytes of the last version of each text."""
        last: NDArray[np.int64] = self.version_bytes[-1]
        return last

    def counts(self) -> Counts:
        """Return the number of documents of each fate; none is lost."""
        by_fate = np.bincount(self.fates, minlength=len(Fate)).tolist()
        counts = Counts(
            read=sum(unit.num_documents for unit in self.units),
            train=by_fate[Fate.TRAIN],
            val=by_fate[Fate.VAL],
            dropped=by_fate[Fate.DROPPED],
            empty=by_fate[Fate.EMPTY],
            errors=by_fate[Fate.ERROR],
        )
        counts.check()
        return counts

    def step_records(self) -> tuple[StepRecord, ...]:
        """Return what each quality step was given, altered and dropped."""
        has_text = self.fates <= Fate.DROPPED
        names = [source.name for source in self.reader.inputs]
        number = {name: index for index, name in enumerate(names)}
        of_units = [number[unit.unit.input_name] for unit in self.units]
        sources = np.repeat(np.array(of_units, np.int16), [unit.num_documents for unit in self.units])
        return step_records(
            self.steps.options,
            self.steps.plan,
            hashes=self.version_hashes[:, has_text],
            num_bytes=self.version_bytes[:, has_text],
            dropped_by=self.dropped_by[has_text],
            sources=sources[has_text],
            source_names=names,
        )

    def kept_bytes(self) -> int:
        """UTF-8 bytes of the documents for training and held out."""
        return int(self.num_bytes[self.fates <= Fate.VAL].sum())

    def pieces_with(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[ScannedUnit, CorpusPiece]]:
        """Yield the units that hold chosen documents, to be read again. Raises RunError when a file has changed."""
        pieces = self.reader.pieces()
        for unit in self.units:
            piece = next(pieces, None)
            if piece is None or piece.unit != unit.unit:
                raise changed(unit)
            if chosen[unit.span].any():
                yield unit, piece

    @property
    def rereader(self) -> Rereader:
        """Reader of documents that were read before."""
        return Rereader(self.reader, self.steps)

    def portions(self, chosen: NDArray[np.bool_]) -> Iterator[Portion]:
        """Yield the chosen documents, which have to be ones that stay, unit by unit.

        Raises RunError when a file is not what it was.
        """
        for unit, piece in self.pieces_with(chosen):
            inside = np.flatnonzero(chosen[unit.span])
            hashes = self.hashes[unit.first_document + inside]
            yield Portion(unit, piece, self.version_hashes[0, unit.span], inside.tolist(), hashes)

    def read_raw(self, unit: ScannedUnit, piece: CorpusPiece) -> list[CorpusDocument]:
        """Return the documents of a unit as they are in its files. Raises RunError when they are not what they were."""
        return self.rereader.read_raw(unit, piece, self.version_hashes[0, unit.span])


@dataclass(frozen=True)
class _Scan:
    """Result of the first reading of a unit, without its texts. Arrays have one entry for each document."""

    unit: Unit
    num_bytes: int
    num_lines: int
    block_hashes: tuple[tuple[bytes, ...], ...]
    faulty: dict[int, CorpusDocument]
    """Documents that could not be read or examined, by index."""
    examined: Examined
    fates: NDArray[np.uint8]
    subset: NDArray[np.int16]
    """Index in `subsets`."""
    subsets: list[str]


@dataclass(frozen=True)
class _ScanTask:
    """Task that reads a piece for the first time."""

    reader: CorpusReader
    steps: OpenSteps
    sample_share: float

    def __call__(self, piece: CorpusPiece) -> _Scan:
        content = self.reader.read(piece)
        documents = content.documents
        texts = [document.text for document in documents]
        fates = np.array([_first_fate(document) for document in documents], np.uint8)
        has_text = np.flatnonzero(fates == Fate.TRAIN)
        examined = self.steps.examine([texts[index] for index in has_text], sample_share=self.sample_share)
        fates[has_text[examined.dropped_by > 0]] = Fate.DROPPED
        fates[has_text[list(examined.errors)]] = Fate.ERROR
        if len(has_text) < len(texts):
            examined = examined.spread(has_text, texts)
        subsets: dict[str, int] = {}
        return _Scan(
            unit=piece.unit,
            num_bytes=content.num_bytes,
            num_lines=content.num_lines,
            block_hashes=content.block_hashes,
            faulty={int(index): replace(documents[index], text="") for index in np.flatnonzero(fates == Fate.ERROR)},
            examined=examined,
            fates=fates,
            subset=_numbered([_folder_name(document.subset) for document in documents], subsets),
            subsets=list(subsets),
        )


def scan(
    reader: CorpusReader,
    *,
    options: PrepareConfig,
    steps: OpenSteps | None = None,
    scratch: Path | None = None,
    executor: Executor,
    advance: Callable[[int], None],
) -> Corpus:
    """Read everything once, through the quality steps. `advance` is called with the bytes of each unit.

    `steps`: those of the options, opened, where they are; `scratch`: folder for files that vanish at the end. Raises
    ConfigError at the first bad file or row when `options.on_error` is fail, and when there is no document.
    """
    steps = OpenSteps(options.steps) if steps is None else steps
    with ExitStack() as files:
        signatures = {
            position: files.enter_context(closing(SignatureFiles(step, scratch)))
            for position, step in steps.plan.near_duplicates.items()
        }
        corpus = _scan(reader, options, steps, list(signatures.values()), executor=executor, advance=advance)
        dropped_by, originals = drop_duplicates(
            steps.plan,
            hashes=corpus.version_hashes,
            dropped_by=corpus.dropped_by,
            has_text=corpus.fates <= Fate.DROPPED,
            signatures=signatures,
        )
    fates = np.where((corpus.fates == Fate.TRAIN) & (dropped_by > 0), np.uint8(Fate.DROPPED), corpus.fates)
    return replace(corpus, fates=fates, dropped_by=dropped_by, originals=originals)


def _scan(
    reader: CorpusReader,
    options: PrepareConfig,
    steps: OpenSteps,
    signatures: Sequence[SignatureFiles],
    *,
    executor: Executor,
    advance: Callable[[int], None],
) -> Corpus:
    """Read everything once; the steps that compare documents are still to be done."""
    log = ErrorLog(options.on_error)
    units: list[ScannedUnit] = []
    arrays: list[tuple[NDArray[Any], ...]] = []
    subsets: dict[str, int] = {}
    hashes: dict[CorpusFile, list[bytes]] = {}
    sample = _Sample(total_size(reader.inputs))
    first_document = lines_before = 0

    for result in ordered_map(_ScanTask(reader, steps, sample.share), reader.pieces(), executor=executor):
        unit, examined = result.unit, result.examined
        lines_before = 0 if unit.start == 0 else lines_before
        first_row = lines_before if unit.files[0].format == "jsonl" else unit.start
        log.add_unit(result.faulty, examined.errors, lines_before=lines_before, first_row=first_row)
        _add_hashes(hashes, result)
        units.append(ScannedUnit(unit, first_document, len(result.fates), first_row))
        subset = _numbered(result.subsets, subsets)[result.subset]
        # Copies: what an executor returns may lie in memory that it needs for other results.
        of_unit = (examined.hashes, examined.num_bytes, result.fates, examined.dropped_by, subset)
        arrays.append(tuple(array.copy() for array in of_unit))
        first_document += len(result.fates)
        lines_before += result.num_lines
        sample.take(examined.sample)
        for file, of_texts in zip(signatures, examined.signatures, strict=True):
            file.add(of_texts)
        advance(result.num_bytes)
    log.close()
    if not first_document:
        raise ConfigError("prepare.input: there is no document in the files: all are empty")
    version_hashes, version_bytes, fates, dropped_by, all_subsets = zip(*arrays, strict=True)
    return Corpus(
        reader=reader,
        steps=steps,
        units=units,
        version_hashes=np.concatenate(version_hashes, axis=1),
        version_bytes=np.concatenate(version_bytes, axis=1),
        fates=np.concatenate(fates),
        dropped_by=np.concatenate(dropped_by),
        originals={},
        subset=np.concatenate(all_subsets),
        subsets=list(subsets),
        errors=log.named,
        inputs=tuple(
            _input_record(source, [_scanned_hash(file, hashes[file]) for file in source.files])
            for source in reader.inputs
        ),
        sample=sample.texts,
    )


def _add_hashes(hashes: dict[CorpusFile, list[bytes]], result: _Scan) -> None:
    """Add what a unit adds to the hash of each of its files; a remote dataset is hashed by its documents."""
    for file, of_file in zip(result.unit.files, result.block_hashes, strict=True):
        hashes.setdefault(file, []).extend(of_file)
        if file.dataset is not None and file.dataset.is_remote:
            hashes[file].append(result.examined.hashes[0].tobytes())


def fingerprint(inputs: Sequence[CorpusInput], *, executor: Executor) -> tuple[InputRecord | None, ...]:
    """Return what `scan` records of the inputs, from the files as they are now, without opening them.

    None for a dataset on the Hub, of which that is not known.
    """
    return tuple(
        None
        if any(file.dataset is not None and file.dataset.is_remote for file in source.files)
        else _input_record(source, list(ordered_map(hash_file, source.files, executor=executor)))
        for source in inputs
    )


def select(corpus: Corpus, options: PrepareConfig) -> Corpus:
    """Return the corpus with each document's final fate.

    A document is held out when the first 64 bits of its hash, as a fraction, are below `options.val_fraction`. Raises
    ConfigError when nothing is left for training, or nothing is held out that should be.
    """
    fates = corpus.fates.copy()
    threshold = np.uint64(int(options.val_fraction * 2**64))
    fates[(fates == Fate.TRAIN) & (corpus.hashes[:, 0] < threshold)] = Fate.VAL
    chosen = replace(corpus, fates=fates)
    counts = chosen.counts()
    if not counts.train and not counts.val:
        raise ConfigError(
            f"prepare.input: no document is left: of {counted(counts.read, 'document')} read, "
            f"{counted(counts.empty, 'has', 'have')} no text, {counted(counts.errors, 'has', 'have')} errors"
            f"{_why_dropped(corpus)}"
        )
    if options.val_fraction > 0 and not counts.val:
        raise ConfigError(
            f"prepare.val_fraction: {options.val_fraction} of {counted(counts.train, 'document')} held out none: "
            "these are too "
            "few documents; raise val_fraction, split the text into more documents, or set it to 0 and remove data.val"
        )
    if not counts.train:
        raise ConfigError(
            f"prepare.val_fraction: {options.val_fraction} of {counted(counts.val, 'document')} held out all of them: "
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


class _Sample:
    """Beginnings of some texts, up to a limit."""

    def __init__(self, num_bytes: int) -> None:
        least, most = _SAMPLE_BYTES
        self._left = min(most, max(least, num_bytes // 50))
        self.share = min(1.0, self._left / max(1, num_bytes))
        """Share of the texts to draw."""
        self.texts: list[str] = []

    def take(self, texts: list[str]) -> None:
        """Take those for which there is room, and empty the list."""
        for text in texts:
            if self._left > 0:
                self.texts.append(text)
                self._left -= len(text)
        texts.clear()


def _why_dropped(corpus: Corpus) -> str:
    """Return what each rule dropped, as the end of a sentence."""
    return "".join(
        f", {record.name} dropped {dropped.documents} ({rule})"
        for record in corpus.step_records()
        for rule, dropped in record.dropped.items()
    )


def _numbered(names: Sequence[str], subsets: dict[str, int]) -> NDArray[np.int16]:
    """Return the number of each subset; new ones are added to `subsets`."""
    numbers = [subsets.setdefault(name, len(subsets)) for name in names]
    if len(subsets) > _MOST_SUBSETS:
        raise ConfigError(
            f"prepare.adapter: it gives more than {_MOST_SUBSETS} subsets, each of which would have a folder: "
            f"{', '.join(list(subsets)[-3:])}, …: let it give fewer, or none"
        )
    return np.array(numbers, np.int16)


def _folder_name(subset: str | None) -> str:
    return re.sub(r"[^\w.+-]+", "-", subset).strip("-.") if subset else ""


def _first_fate(document: CorpusDocument) -> Fate:
    if document.error is not None:
        return Fate.ERROR
    return Fate.EMPTY if not document.text or document.text.isspace() else Fate.TRAIN


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
