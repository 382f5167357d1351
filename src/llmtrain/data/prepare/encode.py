"""Documents to tokens to shards: the second reading of the corpus, and the reading of its training texts before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import PrepareConfig
from llmtrain.data.manifest import Split, TokenDtype
from llmtrain.data.prepare.documents import Document
from llmtrain.data.prepare.parallel import ordered_map
from llmtrain.data.prepare.selection import Corpus, Fate, ScannedUnit
from llmtrain.data.prepare.shard_writer import ShardWriter
from llmtrain.data.tokenizers import Tokenizer, library_threads


@dataclass(frozen=True)
class _Encoded:
    source: str
    fate: Fate
    tokens: NDArray[np.unsignedinteger]
    """With the end token."""
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
    units = [unit for unit in corpus.units if chosen[_span(unit)].any()]
    contents = ordered_map(ScannedUnit.reread, units, num_workers=num_workers)
    for unit, content in zip(units, contents, strict=True):
        for index, document in enumerate(content.documents, unit.first_document):
            if chosen[index]:
                yield document.text
                advance(int(corpus.num_bytes[index]))


def write_splits(
    folder: Path,
    *,
    corpus: Corpus,
    tokenizer: Tokenizer,
    options: PrepareConfig,
    num_workers: int,
    advance: Callable[[int], None],
) -> dict[str, Split]:
    """Encode all documents that stay and write them into `folder`; returns the splits' records by name.

    `advance` is called with the bytes of each document.
    """
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    writers = {
        fate: ShardWriter(folder, split=split, dtype=dtype, shard_size=options.shard_size, keep_text=options.keep_text)
        for fate, split in ((Fate.TRAIN, "train"), (Fate.VAL, "val"))
        if (corpus.fates == fate).any()
    }
    units = [unit for unit in corpus.units if (corpus.fates[_span(unit)] <= Fate.VAL).any()]

    def encode(unit: ScannedUnit) -> list[_Encoded]:
        return _encode_unit(unit, corpus=corpus, tokenizer=tokenizer, dtype=dtype, keep_text=options.keep_text)

    try:
        with library_threads(False):  # the parallel threads are ours
            for documents in ordered_map(encode, units, num_workers=num_workers):
                for document in documents:
                    writers[document.fate].add(
                        document.source, tokens=document.tokens, num_bytes=document.num_bytes, text=document.text
                    )
                    advance(document.num_bytes)
        return {("train" if fate == Fate.TRAIN else "val"): writer.close() for fate, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()


def _encode_unit(
    unit: ScannedUnit,
    *,
    corpus: Corpus,
    tokenizer: Tokenizer,
    dtype: np.dtype[np.unsignedinteger],
    keep_text: bool,
) -> list[_Encoded]:
    fates = corpus.fates[_span(unit)]
    num_bytes = corpus.num_bytes[_span(unit)]
    documents = unit.reread().documents
    kept = [index for index, fate in enumerate(fates) if fate <= Fate.VAL]
    return [
        _Encoded(
            source=_source(unit, documents[index]),
            fate=Fate(fates[index]),
            tokens=np.append(ids, tokenizer.eos_id).astype(dtype),
            num_bytes=int(num_bytes[index]),
            text=documents[index].text if keep_text else "",
        )
        for index, ids in zip(kept, tokenizer.encode_batch([documents[i].text for i in kept]), strict=True)
    ]


def _source(unit: ScannedUnit, document: Document) -> str:
    return f"{unit.unit.input_name}:{document.file.label}:{unit.first_line + document.row}"


def _span(unit: ScannedUnit) -> slice:
    return slice(unit.first_document, unit.first_document + unit.num_documents)
