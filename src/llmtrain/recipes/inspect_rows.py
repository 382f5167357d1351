"""`inspect` of bare rows, with no config, tokenizer or model: shapes, lengths in characters and bytes, every fault.

    path ─ find_rows ─▶ rows_of ─▶ example_of ─▶ counts, faults, the first rows

Nothing heavy is imported, so that it answers at once. What a tokenizer makes of rows is `inspect_chat`'s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from llmtrain.data.chat.faults import Fault, RowError
from llmtrain.data.chat.lengths import describe_lengths
from llmtrain.data.chat.row_files import RowDataset, RowFile, find_rows
from llmtrain.data.chat.rows import rows_of
from llmtrain.data.chat.shapes import Chat, Completion, Example, example_of

KEY = "rows"
"""What messages call the paths, which stand in no config."""


def inspect_rows(paths: str | Sequence[str], *, num_rows: int = 3) -> dict[str, Any]:
    """What is in the rows at `paths`. Faults are part of it: all of them, each with its `file:line`.

    Raises ConfigError where there is nothing to read.
    """
    sources = find_rows(paths, key=KEY)
    files = [_read(source, num_rows=num_rows) for source in sources]
    characters: Counter[int] = sum((one.characters for one in files), Counter())
    num_bytes: Counter[int] = sum((one.num_bytes for one in files), Counter())
    shapes: Counter[str] = sum((one.shapes for one in files), Counter())
    first = [row for one in files for row in one.first_rows]
    return {
        "name": paths if isinstance(paths, str) else ", ".join(paths),
        "rows": sum(one.num_rows for one in files),
        "files": [{"name": one.name, "rows": one.num_rows, "faults": len(one.faults)} for one in files],
        "shapes": dict(shapes.most_common()),
        "characters": describe_lengths(characters),
        "bytes": describe_lengths(num_bytes),
        "first_rows": first[:num_rows],
        "faults": [{"source": fault.source, "message": fault.message} for one in files for fault in one.faults],
    }


class _File:
    """What was found in one file or dataset."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_rows = 0
        self.shapes: Counter[str] = Counter()
        self.characters: Counter[int] = Counter()
        self.num_bytes: Counter[int] = Counter()
        self.faults: list[Fault] = []
        self.first_rows: list[dict[str, Any]] = []


def _read(source: RowFile | RowDataset, *, num_rows: int) -> _File:
    found = _File(source.name)
    shapes, characters, num_bytes = found.shapes, found.characters, found.num_bytes
    for row in rows_of([source]):
        if isinstance(row, Fault):
            found.faults.append(row)
            found.num_rows += row.source != source.name  # else it is the file's
            continue
        found.num_rows += 1
        try:
            example = example_of(row.values)
        except RowError as error:
            found.faults.append(Fault(row.source, str(error)))
            continue
        texts = [text for _, text in _pieces(example)]
        length = sum(map(len, texts))
        shapes[example.shape] += 1
        characters[length] += 1
        num_bytes[length if all(map(str.isascii, texts)) else sum(len(text.encode()) for text in texts)] += 1
        if len(found.first_rows) < num_rows:
            pieces = [{"role": role, "text": text} for role, text in _pieces(example)]
            found.first_rows.append(
                {"source": row.source, "shape": example.shape, "characters": length, "pieces": pieces}
            )
    return found


def _pieces(example: Example) -> Iterator[tuple[str, str]]:
    """Who says what."""
    if isinstance(example, Completion):
        yield "prompt", example.prompt
        yield "completion", example.completion
    elif isinstance(example, Chat):
        for turn in example.messages:
            yield turn["role"], turn["content"] or json.dumps(turn.get("tool_calls"), ensure_ascii=False)
    else:
        yield "text", example.text
