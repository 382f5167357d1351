"""Keep the result of the first reading of a corpus beside the unfinished shards: a killed preparation reads only once.

    <partial>/scan.npz      arrays over documents and units, and the rest as JSON

It counts as long as every file has the size and the time of its last change that it had, and the options and the
version of llmtrain are the same. Text that changed behind that is noticed when it is encoded, as any change is.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain._version import __version__
from llmtrain.atomic import replacing
from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.files.datasets import open_dataset
from llmtrain.data.files.find import DataFile
from llmtrain.data.manifest import InputRecord
from llmtrain.data.prepare.documents import CorpusReader, Unit
from llmtrain.data.prepare.inputs import CorpusFile
from llmtrain.data.prepare.quality.records import identities
from llmtrain.data.prepare.quality.workers import OpenSteps
from llmtrain.data.prepare.rereading import ScannedUnit
from llmtrain.data.prepare.selection import Corpus
from llmtrain.faults import reach

SCAN_NAME = "scan.npz"

_ARRAYS = ("version_hashes", "version_bytes", "fates", "dropped_by", "subset")


def save_scan(folder: Path, corpus: Corpus, *, options: PrepareConfig) -> None:
    """Write what `scan` gave into `folder`; it appears whole or not at all."""
    numbers = {file: number for number, (_, file) in enumerate(_files(corpus.reader))}
    units = [
        (
            numbers[unit.unit.files[0]],
            len(unit.unit.files),
            unit.unit.start,
            unit.first_document,
            unit.num_documents,
            unit.first_row,
        )
        for unit in corpus.units
    ]
    rest = {
        "key": _key(corpus.reader, options),
        "subsets": corpus.subsets,
        "errors": corpus.errors,
        "inputs": [record.model_dump(mode="json") for record in corpus.inputs],
        "sample": corpus.sample,
        "originals": list(corpus.originals.items()),
    }
    with replacing(folder / SCAN_NAME) as file:
        np.savez(
            file,
            units=np.array(units, np.int64).reshape(len(units), 6),
            rest=np.frombuffer(json.dumps(rest).encode(), np.uint8),
            **{name: getattr(corpus, name) for name in _ARRAYS},
        )
    reach("scan-saved")


def load_scan(folder: Path, reader: CorpusReader, *, options: PrepareConfig, steps: OpenSteps) -> Corpus | None:
    """Return the stored result of `scan`, if `folder` holds it for the same files and options; else None."""
    try:
        with np.load(folder / SCAN_NAME, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        rest: dict[str, Any] = json.loads(arrays.pop("rest").tobytes())
        rows = arrays.pop("units").tolist()
        if rest["key"] != _key(reader, options):
            return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # none, or a damaged one: the corpus is read again
    files = list(_files(reader))
    units = []
    for first, count, start, first_document, num_documents, first_row in rows:
        name = files[first][0]
        unit = Unit(name, tuple(file for _, file in files[first : first + count]), start)
        units.append(ScannedUnit(unit, first_document, num_documents, first_row))
    return Corpus(
        reader=reader,
        steps=steps,
        units=units,
        subsets=rest["subsets"],
        errors=rest["errors"],
        inputs=tuple(InputRecord.model_validate(record) for record in rest["inputs"]),
        sample=rest["sample"],
        originals=dict(rest["originals"]),
        **arrays,
    )


def _files(reader: CorpusReader) -> Iterator[tuple[str, CorpusFile]]:
    """Every file in reading order, with the name of its input. The files of a unit follow one another."""
    for source in reader.inputs:
        for file in source.files:
            yield source.name, file


def _key(reader: CorpusReader, options: PrepareConfig) -> Any:
    """Return what must be the same for a stored scan to count, as JSON reads it back."""
    wanted = options.model_dump(mode="json", include={"adapter", "text_column", "steps", "on_error"})
    steps = [record.model_dump(mode="json") for record in identities(options.steps)]
    files = [[name, file.path, file.name, *_state(file)] for name, file in _files(reader)]
    key = [__version__, wanted, steps, reader.adapter.source_sha256, files]
    return json.loads(json.dumps(key, ensure_ascii=True))


def _state(file: CorpusFile) -> list[Any]:
    if file.dataset is not None and file.dataset.is_remote:
        return [str(file.dataset), open_dataset(file.dataset)._fingerprint]
    if isinstance(file.found, DataFile) and file.found.remote is not None:
        entry = file.found.remote.entry
        return [entry.size, entry.etag]
    paths = [Path(file.path)] if file.dataset is None else sorted(Path(file.path).rglob("*"))
    found: list[Any] = [str(file.dataset)]
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            found.append(None)
        else:
            found.append([str(path), status.st_size, status.st_mtime_ns])
    return found
