"""Rows of any source as lines of JSONL.

    DataFile, RowDataset ─┬─ a JSONL line that is a valid row ─────────────────────────────▶ the line, as it is
                          └─ ChatGPT's tree · ShareGPT · columns of a table · objects ─────▶ one line of JSON each

What a valid row is, `data.chat.shapes` knows. What cannot be one is a fault in the counts, by its place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmtrain.data.chat.shapes import COMPLETION_KEYS, Chat, example_of, holds_something
from llmtrain.data.chat.tools import reject_what_cannot_be_shown
from llmtrain.data.chat.unused import Unused, add_unused
from llmtrain.data.convert.chatgpt import is_conversation, turns_of
from llmtrain.data.convert.columns import Columns, FoundRow, found
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import DataFile, RowSource
from llmtrain.data.files.json_rows import is_lines
from llmtrain.data.files.read import Row, lines_of_rows, rows_of
from llmtrain.data.files.row_faults import RowError, RowFault, RowFaults


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Options of a conversion."""

    columns: Columns = field(default_factory=Columns)
    as_messages: bool = False
    """Prompts with completions, and instructions, become conversations."""

    @property
    def keep_lines(self) -> bool:
        """True if a line that is a valid row already stays as it is."""
        return not (self.columns.given or self.as_messages)


@dataclass(kw_only=True)
class ConversionCounts:
    """Counts of what became of the rows."""

    copied: int = 0
    """Lines that were valid JSONL already."""
    converted: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Messages of ChatGPT's conversations that are not turns, by kind."""
    unused: dict[str, Unused] = field(default_factory=dict)
    """Values of rows that the lines made of them lack, by name."""
    joined: int = 0
    """Rows of prompt and completion that were made here, with nothing between the two."""
    skipped: RowFaults = field(default_factory=RowFaults)

    @property
    def rows(self) -> int:
        """Rows that were written."""
        return self.copied + self.converted


def lines_of(source: RowSource, options: ConversionOptions, counts: ConversionCounts) -> Iterator[bytes]:
    """Yield the lines that a source becomes; each but the last ends in a line end."""
    if isinstance(source, DataFile) and _is_jsonl(source):
        yield from _copied(source, options, counts)
        return
    is_table = isinstance(source, RowDataset) or source.format in ("csv", "parquet", "arrow")
    before = ""
    for number, row in enumerate(rows_of([source]), 1):
        if isinstance(row, RowFault):
            counts.skipped.add(row)
            continue
        # Rows may begin on the same line.
        place = f"{row.source} (row {number})" if row.source == before else row.source
        before = row.source
        yield from _converted(row.values, place, options, counts, is_table=is_table)


def _is_jsonl(file: DataFile) -> bool:
    """Return whether each line is an object of its own, whatever the file's name says."""
    try:
        if file.format == "json" and is_lines(replace(file, format="jsonl")):
            first = next(rows_of([file]))
            return isinstance(first, Row) and _shape_of(first.values) is not None
        return is_lines(file)
    except OSError:
        return False  # reading it will say why


def _shape_of(values: Mapping[str, Any]) -> str | None:
    """Return the shape of a row that is valid as it is; None for any other."""
    try:
        return example_of(values).shape
    except RowError:
        return None


def _copied(file: DataFile, options: ConversionOptions, counts: ConversionCounts) -> Iterator[bytes]:
    num_rows = 0
    for line, row in lines_of_rows(file):
        num_rows += row is not None
        if isinstance(row, RowFault):
            counts.skipped.add(row)
        elif row is None:
            yield line
        elif options.keep_lines and (shape := _shape_of(row.values)):
            counts.copied += 1
            counts.shapes[shape] += 1
            yield line
        else:
            yield from _converted(row.values, row.source, options, counts, is_table=False)
    if not num_rows:
        counts.skipped.add(RowFault(file.name, "is empty: it has no rows"))


def _converted(
    values: Mapping[str, Any], place: str, options: ConversionOptions, counts: ConversionCounts, *, is_table: bool
) -> Iterator[bytes]:
    """Yield one line, or none and count a fault."""
    try:
        row, unused = _row_of(values, options, counts.left_out, is_table=is_table)
        shape = example_of(row).shape
        line = _json_line(row)
    except RowError as error:
        title = values.get("title") if is_conversation(values) else None
        counts.skipped.add(RowFault(f"{place} {title!r}" if isinstance(title, str) else place, str(error)))
        return
    counts.converted += 1
    counts.joined += row is not values and _is_joined(row)
    counts.shapes[shape] += 1
    add_unused(counts.unused, {name: Unused(1, place) for name in unused})
    yield line


def _row_of(
    values: Mapping[str, Any], options: ConversionOptions, left_out: Counter[str], *, is_table: bool
) -> tuple[Mapping[str, Any], list[str]]:
    """Return the row as it is written, and the names of what it leaves out. Raises RowError where there is none."""
    reject_what_cannot_be_shown(values, "")
    row, left_over = _named_row(values, options, left_out, is_table=is_table)
    answer = next((key for key in COMPLETION_KEYS if key in row), None)
    has_system = isinstance(row.get("system"), str) and holds_something(row["system"])
    if isinstance(row.get("prompt"), str) and answer and (options.as_messages or (has_system and row is not values)):
        system = [{"role": "system", "content": row["system"]}] if has_system else []
        question = {"role": "user", "content": row["prompt"]}
        used = {"prompt", answer, *(["system"] if has_system else [])}
        others = [key for key, value in row.items() if key not in used and holds_something(value)]
        return {"messages": [*system, question, {"role": "assistant", "content": row[answer]}]}, left_over + others
    example = example_of(row)
    becomes_messages = options.as_messages if example.shape == "instruction + output" else is_table
    if isinstance(example, Chat) and (becomes_messages or example.shape == "conversations"):
        return _conversation(example), [*left_over, *example.unused]
    return row, left_over


def _named_row(
    values: Mapping[str, Any], options: ConversionOptions, left_out: Counter[str], *, is_table: bool
) -> tuple[Mapping[str, Any], list[str]]:
    """Return the row under the keys that rows have (`values` itself where it has these), and what is left over."""
    named: FoundRow | None = None
    if options.columns.given:
        named = options.columns.chosen(values)
    elif is_conversation(values):
        return {"messages": turns_of(values, left_out)}, []
    elif is_table or _shape_of(values) is None:
        named = found(values)
    if named is None:
        return values, []
    row = {key: value for key, value in named.row.items() if value or key not in ("system", "tools")}
    return (row, named.left_over) if row else (values, [])


def _is_joined(row: Mapping[str, Any]) -> bool:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return False
    return not (prompt[-1:].isspace() or completion[:1].isspace())


def _conversation(example: Chat) -> dict[str, Any]:
    messages = [
        message if message["role"] != "assistant" or index in example.supervised else {**message, "weight": 0}
        for index, message in enumerate(example.messages)
    ]
    return {"messages": messages, **({"tools": example.tools} if example.tools else {})}


def _json_line(row: Mapping[str, Any]) -> bytes:
    """Return the row as JSON on one line. Raises RowError for what JSON cannot say."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair, which is no valid Unicode") from None
    except ValueError:
        raise RowError("holds a number that JSON does not know (NaN or infinity)") from None
