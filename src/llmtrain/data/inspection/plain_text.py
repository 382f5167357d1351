"""Inspection of text: files, folders and globs of documents, as `prepare` would read them, without a config.

    path ─ find_inputs ─▶ blocks ─ sample ─▶ documents ─▶ Analysis; the first documents; what cannot be read

Rows and token shards have their own parts (rows.py, tokens.py). A text file is one document, and is read whole.
"""

from __future__ import annotations

import glob
import os
from typing import Any

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.files.find import format_of
from llmtrain.data.inspection.analysis import Analysis
from llmtrain.data.inspection.analysis_options import AnalysisOptions
from llmtrain.data.inspection.document_batches import TextBatches
from llmtrain.data.inspection.units import vocabulary_of
from llmtrain.data.prepare.documents import CorpusDocument, open_corpus
from llmtrain.data.prepare.inputs import CorpusInput, find_inputs, total_size

SHOWN_CHARACTERS = 600
MAX_FAULTS = 100
"""Faults that are listed; all are counted."""


def holds_text(path: str) -> bool:
    """Return whether a path is there and has no file in a format of rows or token shards."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        path = os.path.join(glob.escape(path), "**", "*")
    found = [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    return bool(found) and not any(map(format_of, found))


def inspect_texts(path: str, options: AnalysisOptions, *, num_documents: int = 3) -> dict[str, Any]:
    """Describe the documents at `path` and analyse them. Files that cannot be read are part of the report.

    Raises ConfigError where there is nothing to read.
    """
    wanted = PrepareConfig(input=path, output=os.devnull)
    inputs = find_inputs(wanted)
    vocabulary, encode = vocabulary_of(options)
    sample = options.sample_of(total_size(inputs))
    analysis = Analysis(vocabulary, sample, num_listed=options.num_listed)
    batches = TextBatches(analysis, encode)
    reader = open_corpus(inputs, wanted)
    first: list[dict[str, Any]] = []
    faults: list[dict[str, str]] = []
    num_faults = 0
    for piece in reader.pieces():
        if not analysis.takes_next_block():
            continue
        for document in reader.read(piece).documents:
            if document.error is not None:
                num_faults += 1
                if len(faults) < MAX_FAULTS:
                    faults.append({"source": _place(document), "message": document.error})
                continue
            batches.add(source=_source_of(document, inputs), name=document.file.label, text=document.text)
            if len(first) < num_documents:
                first.append(_shown(document))
    return {
        "name": path,
        "tokenizer": options.tokenizer,
        "files": sum(len(source.files) for source in inputs),
        "bytes_of_files": total_size(inputs),
        "first_documents": first,
        "num_faults": num_faults,
        "faults": faults,
        "analysis": batches.report(),
    }


def _source_of(document: CorpusDocument, inputs: list[CorpusInput]) -> str:
    """Return the part of the corpus that a document is from: its subset, or the first part of its file's name."""
    return document.subset or document.file.label.partition("/")[0] or inputs[0].name


def _place(document: CorpusDocument) -> str:
    return document.file.label if document.line is None else f"{document.file.label}:{document.line}"


def _shown(document: CorpusDocument) -> dict[str, Any]:
    return {
        "source": document.file.label,
        "characters": len(document.text),
        "text": document.text[:SHOWN_CHARACTERS],
    }
