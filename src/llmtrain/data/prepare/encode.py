"""Documents to tokens to shards: the second reading of the corpus, and the reading of its training texts before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.manifest import Split, TokenDtype
from llmtrain.data.prepare.documents import CorpusDocument, CorpusPiece
from llmtrain.data.prepare.journal import Journal
from llmtrain.data.prepare.parallel import ordered_map
from llmtrain.data.prepare.selection import Corpus, Fate, ScannedUnit
from llmtrain.data.prepare.shard_writer import ShardWriter
from llmtrain.data.tokenizers import Tokenizer, library_threads

SPLIT_NAMES = {Fate.TRAIN: "train", Fate.VAL: "val"}


@dataclass(frozen=True)
class _Encoded:
    source: str
    folder: str
    tokens: NDArray[np.unsignedinteger]
    """Tokens of the document, with the end token."""
    num_bytes: int
    text: str
    """Empty when it is not kept."""


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest unsigned integer that holds every id."""
    if vocab_size <= 1 << 8:
        return "uint8"
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def texts_of(
    corpus: Corpus, chosen: NDArray[np.bool_], *, num_workers: int, advance: Callable[[int], None]
) -> Iterator[str]:
    """Texts of the chosen documents in reading order. `advance` is called with the bytes of each."""

    def read(item: tuple[ScannedUnit, CorpusPiece]) -> list[str]:
        return [document.text for _, document in corpus.reread(*item, chosen)]

    sizes = iter(corpus.num_bytes[chosen].tolist())
    for texts in ordered_map(read, corpus.pieces_with(chosen), num_workers=num_workers):
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
    num_workers: int,
    advance: Callable[[int, int], None],
) -> dict[str, Split]:
    """Encode all documents that stay and write them into `folder`; returns the splits' records by name.

    Shards that the journal has are kept, and their documents are not encoded again. `advance` is called with the bytes
    and tokens of each document that is encoded.
    """
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    written = journal.shards()
    writers = {
        name: ShardWriter(
            folder,
            name=name,
            dtype=dtype,
            shard_size=options.shard_size,
            keep_text=options.keep_text,
            written=written.get(name, []),
            on_shard=journal.add_shard,
        )
        for name in _folders_of(corpus)
    }
    to_do = _not_written(corpus, {name: writer.num_written for name, writer in writers.items()})

    def encode(item: tuple[ScannedUnit, CorpusPiece]) -> list[_Encoded]:
        unit, piece = item
        return list(_encode(unit, piece, corpus=corpus, to_do=to_do, tokenizer=tokenizer, dtype=dtype, options=options))

    try:
        with library_threads(False):  # the parallel threads are ours
            for documents in ordered_map(encode, corpus.pieces_with(to_do), num_workers=num_workers):
                for document in documents:
                    writers[document.folder].add(
                        document.source, tokens=document.tokens, num_bytes=document.num_bytes, text=document.text
                    )
                    advance(document.num_bytes, len(document.tokens))
        parts = {name: writer.close() for name, writer in sorted(writers.items())}
    finally:
        for writer in writers.values():
            writer.abort()
    splits = {}
    for split in SPLIT_NAMES.values():
        of_split = [part for name, part in parts.items() if name.split("/")[0] == split]
        if of_split:
            splits[split] = Split(
                documents=sum(part.documents for part in of_split),
                tokens=sum(part.tokens for part in of_split),
                bytes=sum(part.bytes for part in of_split),
                shards=tuple(shard for part in of_split for shard in part.shards),
            )
    return splits


def _folder(corpus: Corpus, fate: Fate, subset: int) -> str:
    name = corpus.subsets[subset]
    return f"{SPLIT_NAMES[fate]}/{name}" if name else SPLIT_NAMES[fate]


def _folders_of(corpus: Corpus) -> list[str]:
    """The folders that get shards: of each split, and in it of each subset that has documents there."""
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


def _encode(
    unit: ScannedUnit,
    piece: CorpusPiece,
    *,
    corpus: Corpus,
    to_do: NDArray[np.bool_],
    tokenizer: Tokenizer,
    dtype: np.dtype[np.unsignedinteger],
    options: PrepareConfig,
) -> Iterator[_Encoded]:
    kept = corpus.reread(unit, piece, to_do)
    encoded = tokenizer.encode_batch([document.text for _, document in kept])
    for (index, document), ids in zip(kept, encoded, strict=True):
        number = unit.first_document + index
        tokens = np.empty(len(ids) + 1, dtype)
        tokens[:-1] = ids
        tokens[-1] = tokenizer.eos_id
        yield _Encoded(
            source=source_of(unit, document),
            folder=_folder(corpus, Fate(corpus.fates[number]), int(corpus.subset[number])),
            tokens=tokens,
            num_bytes=int(corpus.num_bytes[number]),
            text=document.text if options.keep_text else "",
        )


def source_of(unit: ScannedUnit, document: CorpusDocument) -> str:
    """Return where a document is from, as the column `source` has it."""
    row = unit.first_row + document.row
    part = document.file.dataset
    if part is None:
        return f"{unit.unit.input_name}:{document.file.label}:{row}"
    subset = f"/{document.subset}" if document.subset else ""
    return f"{unit.unit.input_name}/{part.split}{subset}:{row if document.id is None else document.id}"
