"""Read documents again that were read before, on any worker, and see that they are what they were."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.prepare.documents import CorpusDocument, CorpusPiece, CorpusReader, Unit
from llmtrain.data.prepare.quality.plan import hash_texts
from llmtrain.data.prepare.quality.step import StepError
from llmtrain.data.prepare.quality.workers import OpenSteps
from llmtrain.errors import RunError


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
class Portion:
    """Documents of a unit that are wanted again, with what tells whether they are the same."""

    unit: ScannedUnit
    piece: CorpusPiece
    raw_hashes: NDArray[np.uint64]
    """[documents of the unit, 2]: of their texts as the files have them."""
    chosen: list[int]
    """Index in the unit of each document that is wanted. They have to be ones that stay."""
    hashes: NDArray[np.uint64]
    """[chosen documents, 2]: of their texts after the quality steps."""


@dataclass(frozen=True)
class Rereader:
    """Reads documents again. Raises RunError when they are not what they were."""

    reader: CorpusReader
    steps: OpenSteps

    def read_raw(self, unit: ScannedUnit, piece: CorpusPiece, raw_hashes: NDArray[np.uint64]) -> list[CorpusDocument]:
        """Return all documents of a unit as its files have them."""
        documents = self.reader.read(piece).documents
        if not np.array_equal(_hashes([document.text for document in documents]), raw_hashes):
            raise changed(unit)
        return documents

    def reread(self, portion: Portion) -> list[CorpusDocument]:
        """Return the chosen documents with their last text."""
        documents = self.read_raw(portion.unit, portion.piece, portion.raw_hashes)
        kept = [documents[index] for index in portion.chosen]
        if self.steps.plan.num_versions == 1:
            return kept
        try:
            texts = self.steps.alter([document.text for document in kept])
        except StepError as error:
            raise _unsteady(str(error)) from error
        if not np.array_equal(_hashes(texts), portion.hashes):
            raise _unsteady("it made another text the second time")
        return [replace(document, text=text) for document, text in zip(kept, texts, strict=True)]


def changed(unit: ScannedUnit) -> RunError:
    """Return the error for a unit whose files are not what they were."""
    names = ", ".join(str(file.dataset or file.path) for file in unit.unit.files[:3])
    more = f" and {len(unit.unit.files) - 3} more" if len(unit.unit.files) > 3 else ""
    return RunError(f"one of {names}{more} changed while it was read: run prepare again")


def _unsteady(why: str) -> RunError:
    return RunError(
        f"prepare.steps: a function of your own has to give the same for the same text, whenever it is called: {why}"
    )


def _hashes(texts: list[str]) -> NDArray[np.uint64]:
    return hash_texts(texts)[0]
