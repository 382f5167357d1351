"""Inspection of rows without a config, tokenizer or model: shapes, lengths in characters and bytes, every fault.

    path ─ find_rows ─▶ rows_of ─▶ example_of ─▶ counts, faults, the first rows

Nothing heavy is imported, so that it answers at once. What a tokenizer makes of rows is shown by chat.py.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from llmtrain.config.sections.schema import Config
from llmtrain.data.chat.shapes import Chat, Example, PromptCompletion, example_of
from llmtrain.data.chat.unused import Unused, add_unused
from llmtrain.data.files.datasets import hub_part, is_saved_dataset
from llmtrain.data.files.find import (
    KINDS,
    DataFile,
    RowSource,
    find_rows,
    format_of,
    local_file,
    objects_at,
    remote_file,
)
from llmtrain.data.files.json_values import json_values
from llmtrain.data.files.read import layout_of, rows_of
from llmtrain.data.files.row_faults import RowError, RowFault
from llmtrain.data.files.tables import schema_of
from llmtrain.data.inspection.lengths import describe_lengths
from llmtrain.data.manifest import MANIFEST_NAME
from llmtrain.storage.address import is_remote, shown

if TYPE_CHECKING:
    from llmtrain.data.inspection.analysis_options import AnalysisOptions

KEY = "rows"
"""Name of the paths in messages; they have no key in a config."""
OnText = Callable[[str, str, str], None]
"""Takes the file, the place and the text of a row."""


def inspect_rows(
    paths: str | Sequence[str], *, num_rows: int = 3, analyse: AnalysisOptions | None = None
) -> dict[str, Any]:
    """Describe the rows at `paths`. All faults are part of the report, each with its `file:line`.

    `analyse` adds the analysis of their texts. Raises ConfigError where there is nothing to read.
    """
    sources = find_rows(paths, key=KEY)
    analysis, on_text = _analysis_of(sources, analyse) if analyse else (None, None)
    files = [_read(source, num_rows=num_rows, on_text=on_text) for source in sources]
    characters: Counter[int] = sum((one.characters for one in files), Counter())
    num_bytes: Counter[int] = sum((one.num_bytes for one in files), Counter())
    shapes: Counter[str] = sum((one.shapes for one in files), Counter())
    first = [row for one in files for row in one.first_rows]
    unused: dict[str, Unused] = {}
    for one in files:
        add_unused(unused, one.unused)
    return {
        "name": paths if isinstance(paths, str) else ", ".join(paths),
        "rows": sum(one.num_rows for one in files),
        "files": [
            {"name": one.name, "layout": one.layout, "rows": one.num_rows, "faults": len(one.faults)} for one in files
        ],
        "shapes": dict(shapes.most_common()),
        "characters": describe_lengths(characters),
        "bytes": describe_lengths(num_bytes),
        "first_rows": first[:num_rows],
        "unused": {name: count._asdict() for name, count in unused.items()},
        "faults": [{"source": fault.source, "message": fault.message} for one in files for fault in one.faults],
        **({"analysis": analysis()} if analysis else {}),
    }


def _analysis_of(sources: Sequence[RowSource], options: AnalysisOptions) -> tuple[Callable[[], dict[str, Any]], OnText]:
    """Return what gives the report at the end, and what takes the text of each row before."""
    from llmtrain.data.inspection.analysis import Analysis
    from llmtrain.data.inspection.document_batches import TextBatches
    from llmtrain.data.inspection.units import vocabulary_of

    vocabulary, encode = vocabulary_of(options)
    size = sum((source.size or 0) for source in sources if isinstance(source, DataFile))
    analysis = Analysis(vocabulary, options.sample_of(size), num_listed=options.num_listed)
    batches = TextBatches(analysis, encode)

    def take(file: str, place: str, text: str) -> None:
        if analysis.takes_next_block():
            batches.add(source=file, name=place, text=text)

    return batches.report, take


def holds_rows(path: str) -> bool:
    """Return whether there are rows at `path`, not token shards or a config: by the ending or the content of files.

    Raises ConfigError for an address where there is nothing, and StorageError where the store fails.
    """
    if is_remote(path):
        told = format_of(shown(path).removesuffix("?***"))  # parquet may be token shards: only its columns tell
        return hub_part(path) is not None or told not in (None, "parquet") or _are_remote_rows(path)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        if is_saved_dataset(path):
            return True
        if os.path.exists(os.path.join(path, MANIFEST_NAME)):
            return False
        path = os.path.join(glob.escape(path), "**", "*")
    found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    file = next((file for file in found if format_of(file)), path)
    told = format_of(file)
    if told not in ("json", "parquet"):
        return told is not None
    if not os.path.isfile(file):
        return False
    source = local_file(file, KEY)
    return _is_json_of_rows(source) if told == "json" else not _has_tokens(source)


def _are_remote_rows(address: str) -> bool:
    found = objects_at(address, KEY, otherwise=f"give {KINDS}")
    first = next((one for one in found if format_of(one.path)), None)
    return first is not None and not (format_of(first.path) == "parquet" and _has_tokens(remote_file(first, KEY)))


def _is_json_of_rows(file: DataFile) -> bool:
    """Return whether a .json file is not a config, which is one object with sections."""
    try:
        with file.open() as stream:
            start = stream.read(1 << 16)
            first = next(json_values(chain([start], iter(lambda: stream.read(1 << 20), b""))), None)
    except OSError:
        return True
    if first is None or not isinstance(first.value, dict):
        return first is None or first.error is None or start.lstrip().startswith(b"[")
    sections = Config.model_fields.keys() & first.value.keys()
    return not any(isinstance(first.value[name], dict) for name in sections)


def _has_tokens(file: DataFile) -> bool:
    """Return whether a Parquet file is a token shard; one that cannot be read is none, and reading it says why."""
    from llmtrain.data.shards import TOKENS_COLUMNS

    try:
        return not set(TOKENS_COLUMNS).isdisjoint(schema_of(file).names)
    except OSError:
        return False


class _File:
    """Counts and first rows of one file or dataset."""

    def __init__(self, source: RowSource) -> None:
        self.name = source.name
        self.layout = layout_of(source)
        self.num_rows = 0
        self.shapes: Counter[str] = Counter()
        self.characters: Counter[int] = Counter()
        self.num_bytes: Counter[int] = Counter()
        self.unused: dict[str, Unused] = {}
        self.faults: list[RowFault] = []
        self.first_rows: list[dict[str, Any]] = []


def _read(source: RowSource, *, num_rows: int, on_text: OnText | None) -> _File:
    found = _File(source)
    shapes, characters, num_bytes = found.shapes, found.characters, found.num_bytes
    for row in rows_of([source]):
        if isinstance(row, RowFault):
            found.faults.append(row)
            found.num_rows += row.source != source.name  # else it is the file's
            continue
        found.num_rows += 1
        try:
            example = example_of(row.values)
        except RowError as error:
            found.faults.append(RowFault(row.source, str(error)))
            continue
        texts = [text for _, text in _pieces(example)]
        length = sum(map(len, texts))
        shapes[example.shape] += 1
        add_unused(found.unused, {name: Unused(1, row.source) for name in example.unused})
        characters[length] += 1
        num_bytes[length if all(map(str.isascii, texts)) else sum(len(text.encode()) for text in texts)] += 1
        if on_text is not None:
            on_text(source.name, row.source, "\n".join(texts))
        if len(found.first_rows) < num_rows:
            pieces = [{"role": role, "text": text} for role, text in _pieces(example)]
            found.first_rows.append(
                {"source": row.source, "shape": example.shape, "characters": length, "pieces": pieces}
            )
    return found


def _pieces(example: Example) -> Iterator[tuple[str, str]]:
    """Yield each role and its text."""
    if isinstance(example, PromptCompletion):
        yield "prompt", example.prompt
        yield "completion", example.completion
    elif isinstance(example, Chat):
        for turn in example.messages:
            calls = [json.dumps(turn["tool_calls"], ensure_ascii=False)] if turn.get("tool_calls") else []
            yield turn["role"], "\n".join(filter(None, [turn["content"], *calls]))
    else:
        yield "text", example.text
