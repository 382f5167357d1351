"""Documents to tokens to shards: the second reading of the corpus, and the reading of its training texts before it.

units ─ _EncodeTask ─→ encoded files and their lengths ─ ShardPlan ─→ planned shards ─ ShardWriter ─→ shards
        any worker                                       here, in order               any worker
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.manifest import Shard, Split, TokenDtype
from llmtrain.data.prepare.documents import CorpusDocument
from llmtrain.data.prepare.journal import Journal
from llmtrain.data.prepare.parallel import Executor, WorkPool, ordered_map
from llmtrain.data.prepare.rereading import Portion, Rereader, ScannedUnit
from llmtrain.data.prepare.selection import Corpus, Fate
from llmtrain.data.prepare.shard_plan import PlannedShard, ShardPlan
from llmtrain.data.prepare.shard_writer import WORK_FOLDER, ShardWriter, document_table, write_encoded
from llmtrain.data.tokenizers import Tokenizer, library_threads

SPLIT_NAMES = {Fate.TRAIN: "train", Fate.VAL: "val"}


def token_dtype(vocab_size: int) -> TokenDtype:
    """Return the narrowest unsigned integer that holds every id."""
    if vocab_size <= 1 << 8:
        return "uint8"
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class _Work:
    """Documents of a unit that a task encodes."""

    number: int
    """Position in the order of the work."""
    portion: Portion
    folders: list[str]
    """Folder of shards of each document."""
    num_bytes: list[int]
    """Bytes of the text of each document."""


@dataclass(frozen=True)
class _EncodedFile:
    """A file of encoded documents, all for one folder of shards."""

    folder: str
    name: str
    lengths: list[int]
    """Tokens of each document, with its end token."""
    num_bytes: list[int]


def texts_of(
    corpus: Corpus, chosen: NDArray[np.bool_], *, executor: Executor, advance: Callable[[int], None]
) -> Iterator[str]:
    """Texts of the chosen documents in reading order. `advance` is called with the bytes of each."""
    sizes = iter(corpus.num_bytes[chosen].tolist())
    for texts in ordered_map(_TextTask(corpus.rereader), corpus.portions(chosen), executor=executor):
        for text in texts:
            yield text
            advance(next(sizes))


def write_splits(
    folder: Path,
    *,
    corpus: Corpus,
    tokenizer: Tokenizer,
    options: PrepareConfig,
    journal: Journal,
    executor: Executor,
    advance: Callable[[int, int], None],
) -> dict[str, Split]:
    """Encode all documents that stay and write them into `folder`; returns the splits' records by name.

    Shards that the journal has are kept, and their documents are not encoded again. `advance` is called with the bytes
    and tokens of each unit that is encoded.
    """
    work = folder / WORK_FOLDER
    work.mkdir()
    written = journal.shards()
    shards = {name: written.get(name, []) for name in sorted(_folders_of(corpus))}
    to_do = _not_written(corpus, {name: sum(shard.rows for shard in done) for name, done in shards.items()})
    plans = {
        name: ShardPlan(name, shard_size=options.shard_size, first_shard=len(done)) for name, done in shards.items()
    }
    encode = _EncodeTask(corpus.rereader, tokenizer, work, options.keep_text)
    with library_threads(False), WorkPool(executor) as pool:  # the parallel threads are ours
        writing = _Writing(pool, ShardWriter(folder, work), journal)
        for files in pool.in_order(encode, _work(corpus, to_do)):
            for file in files:
                full = plans[file.folder].add(file.name, lengths=file.lengths, num_bytes=file.num_bytes)
                writing.begin(full)
                advance(sum(file.num_bytes), sum(file.lengths))
            writing.note_finished()
        for plan in plans.values():
            writing.begin(plan.close())
        writing.note_all()
    shutil.rmtree(work)
    return _splits(journal.shards())


class _Writing:
    """The shards that are being written. Each is noted in the journal when it and all before it are done."""

    def __init__(self, pool: WorkPool, writer: ShardWriter, journal: Journal) -> None:
        self._pool = pool
        self._writer = writer
        self._journal = journal
        self._waiting: deque[tuple[PlannedShard, Future[Shard]]] = deque()

    def begin(self, planned: list[PlannedShard]) -> None:
        for shard in planned:
            self._waiting.append((shard, self._pool.submit(self._writer, shard)))

    def note_finished(self) -> None:
        while self._waiting and self._waiting[0][1].done():
            self._note_first()

    def note_all(self) -> None:
        while self._waiting:
            self._note_first()

    def _note_first(self) -> None:
        planned, written = self._waiting.popleft()
        self._journal.add_shard(written.result())
        for name in planned.spent:
            (self._writer.work / name).unlink()


def _splits(shards: dict[str, list[Shard]]) -> dict[str, Split]:
    """Return the record of each split; its shards stand in the order of their folders."""
    splits = {}
    for split in SPLIT_NAMES.values():
        of_split = [shard for name in sorted(shards) if name.split("/")[0] == split for shard in shards[name]]
        if of_split:
            splits[split] = Split(
                documents=sum(shard.rows for shard in of_split),
                tokens=sum(shard.tokens for shard in of_split),
                bytes=sum(shard.bytes for shard in of_split),
                shards=tuple(of_split),
            )
    return splits


def _folder(corpus: Corpus, fate: Fate, subset: int) -> str:
    name = corpus.subsets[subset]
    return f"{SPLIT_NAMES[fate]}/{name}" if name else SPLIT_NAMES[fate]


def _folders_of(corpus: Corpus) -> list[str]:
    """Return the folders that get shards: of each split, and in it of each subset that has documents there."""
    return [
        _folder(corpus, fate, int(subset))
        for fate in SPLIT_NAMES
        for subset in np.unique(corpus.subset[corpus.fates == fate])
    ]


def _not_written(corpus: Corpus, num_written: dict[str, int]) -> NDArray[np.bool_]:
    """Return the documents that go into shards and are in none yet: those of each folder after its written ones."""
    to_do: NDArray[np.bool_] = corpus.fates <= Fate.VAL
    for fate in SPLIT_NAMES:
        for subset in range(len(corpus.subsets)):
            done = num_written.get(_folder(corpus, fate, subset), 0)
            if done:
                to_do[np.flatnonzero((corpus.fates == fate) & (corpus.subset == subset))[:done]] = False
    return to_do


def _work(corpus: Corpus, chosen: NDArray[np.bool_]) -> Iterator[_Work]:
    """Yield the chosen documents, unit by unit. Raises RunError when a file is not what it was."""
    for number, portion in enumerate(corpus.portions(chosen)):
        documents = portion.unit.first_document + np.array(portion.chosen)
        places = zip(corpus.fates[documents].tolist(), corpus.subset[documents].tolist(), strict=True)
        folders = [_folder(corpus, Fate(fate), subset) for fate, subset in places]
        yield _Work(number, portion, folders, corpus.num_bytes[documents].tolist())


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TextTask:
    """Task that reads the texts of documents."""

    rereader: Rereader

    def __call__(self, portion: Portion) -> list[str]:
        return [document.text for document in self.rereader.reread(portion)]


@dataclass(frozen=True)
class _EncodeTask:
    """Task that encodes documents into a file for each folder of shards that they go to."""

    rereader: Rereader
    tokenizer: Tokenizer
    folder: Path
    keep_text: bool

    def __call__(self, work: _Work) -> list[_EncodedFile]:
        documents = self.rereader.reread(work.portion)
        tokens = self._encode([document.text for document in documents])
        files = []
        for index, folder in enumerate(sorted(set(work.folders))):
            inside = [position for position, name in enumerate(work.folders) if name == folder]
            name = f"{work.number:08d}-{index:03d}.arrow"
            table = document_table(
                [source_of(work.portion.unit, documents[position]) for position in inside],
                [tokens[position] for position in inside],
                dtype=token_dtype(self.tokenizer.vocab_size),
                texts=[documents[position].text for position in inside] if self.keep_text else None,
            )
            write_encoded(self.folder, name, table)
            lengths = [len(tokens[position]) for position in inside]
            files.append(_EncodedFile(folder, name, lengths, [work.num_bytes[position] for position in inside]))
        return files

    def _encode(self, texts: list[str]) -> list[NDArray[np.unsignedinteger]]:
        """Return the tokens of each text, with the end token."""
        dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))
        ended = []
        for ids in self.tokenizer.encode_batch(texts):
            tokens = np.empty(len(ids) + 1, dtype)
            tokens[:-1] = ids
            tokens[-1] = self.tokenizer.eos_id
            ended.append(tokens)
        return ended


def source_of(unit: ScannedUnit, document: CorpusDocument) -> str:
    """Return where a document is from, as the column `source` has it."""
    row = unit.first_row + document.row
    part = document.file.dataset
    if part is None:
        return f"{unit.unit.input_name}:{document.file.label}:{row}"
    subset = f"/{document.subset}" if document.subset else ""
    return f"{unit.unit.input_name}/{part.split}{subset}:{row if document.id is None else document.id}"
