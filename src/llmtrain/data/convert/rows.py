"""Rows of any source as lines of JSONL.

    RowFile | RowDataset ─┬─ a JSONL line that is a valid row ─────────────────────────────▶ the line, as it is
                          └─ ChatGPT's tree · ShareGPT · columns of a table · objects ─────▶ one line of JSON each

What a valid row is, `data.chat.shapes` knows. What cannot be one is a fault in the tally, by its place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from zipfile import BadZipFile

from llmtrain.data.chat.faults import Fault, Faults, RowError
from llmtrain.data.chat.row_files import RowDataset, RowFile
from llmtrain.data.chat.rows import Row, jsonl_lines, rows_of
from llmtrain.data.chat.shapes import COMPLETION_KEYS, Chat, example_of
from llmtrain.data.convert.chatgpt import is_conversation, turns_of
from llmtrain.data.convert.columns import Columns, found

_SNIFFED_BYTES = 1 << 22
"""A first line longer than this is not looked at to tell JSONL from JSON."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user wants of rows."""

    columns: Columns = field(default_factory=Columns)
    as_messages: bool = False
    """Prompts with completions, and instructions, become conversations."""

    @property
    def keep_lines(self) -> bool:
        """Whether a line that is a valid row already stays as it is."""
        return not (self.columns.given or self.as_messages)


@dataclass(kw_only=True)
class Tally:
    """What became of the rows."""

    copied: int = 0
    """Lines that were valid JSONL already."""
    converted: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Turns of ChatGPT's conversations that are none, by their kind."""
    joined: int = 0
    """Rows of prompt and completion that were made here, with nothing between the two."""
    skipped: Faults = field(default_factory=Faults)

    @property
    def rows(self) -> int:
        """What was written."""
        return self.copied + self.converted


def lines_of(source: RowFile | RowDataset, options: Options, tally: Tally) -> Iterator[bytes]:
    """The lines that a source becomes; each but the last ends in a line end."""
    try:
        yield from _lines_of(source, options, tally)
    except BadZipFile as error:
        tally.skipped.add(Fault(source.name, f"cannot be read ({error}); what comes after it is not read"))


def _lines_of(source: RowFile | RowDataset, options: Options, tally: Tally) -> Iterator[bytes]:
    if isinstance(source, RowFile) and _is_jsonl(source):
        yield from _copied(source, options, tally)
        return
    if isinstance(source, RowFile) and source.format == "jsonl":
        source = RowFile(source.name, "json", source.open)
    is_table = isinstance(source, RowDataset) or source.format in ("csv", "parquet")
    before = ""
    for number, row in enumerate(rows_of([source]), 1):
        if isinstance(row, Fault):
            tally.skipped.add(row)
            continue
        place = f"{row.source} (row {number})" if row.source == before else row.source
        before = row.source
        yield from _converted(row.values, place, options, tally, is_table=is_table)


def _is_jsonl(file: RowFile) -> bool:
    """Whether lines are objects of their own, whatever the file's name says."""
    if file.format not in ("json", "jsonl"):
        return False
    try:
        with file.open() as stream:
            line = b""
            while not line and (line := stream.readline(_SNIFFED_BYTES)):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
        values = None if line.startswith(b"[") else json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return file.format == "jsonl" or _shape_of(values) is not None
    # Either JSON over several lines, the first of which has a value of its own, or JSONL with a bad first line.
    return file.format == "jsonl" and not isinstance(next(rows_of([RowFile(file.name, "json", file.open)])), Row)


def _shape_of(values: Mapping[str, Any]) -> str | None:
    """The shape of what is a valid row as it is."""
    try:
        return example_of(values).shape
    except RowError:
        return None


def _copied(file: RowFile, options: Options, tally: Tally) -> Iterator[bytes]:
    num_rows = 0
    for line, row in jsonl_lines(file):
        num_rows += row is not None
        if isinstance(row, Fault):
            tally.skipped.add(row)
        elif row is None:
            yield line
        elif options.keep_lines and (shape := _shape_of(row.values)):
            tally.copied += 1
            tally.shapes[shape] += 1
            yield line
        else:
            yield from _converted(row.values, row.source, options, tally, is_table=False)
    if not num_rows:
        tally.skipped.add(Fault(file.name, "is empty: it has no rows"))


def _converted(
    values: Mapping[str, Any], place: str, options: Options, tally: Tally, *, is_table: bool
) -> Iterator[bytes]:
    """One line, or none and a fault."""
    try:
        row = _row_of(values, options, tally.left_out, is_table=is_table)
        shape = example_of(row).shape
        line = _json_line(row)
    except RowError as error:
        title = values.get("title") if is_conversation(values) else None
        tally.skipped.add(Fault(f"{place} {title!r}" if isinstance(title, str) else place, str(error)))
        return
    tally.converted += 1
    tally.joined += row is not values and _is_joined(row)
    tally.shapes[shape] += 1
    yield line


def _row_of(
    values: Mapping[str, Any], options: Options, left_out: Counter[str], *, is_table: bool
) -> Mapping[str, Any]:
    """The row as it is written. Raises RowError where there is none."""
    row = _named_row(values, options, left_out, is_table=is_table)
    answer = next((key for key in COMPLETION_KEYS if key in row), None)
    has_system = row is not values and "system" in row
    if isinstance(row.get("prompt"), str) and answer and (options.as_messages or has_system):
        system = [{"role": "system", "content": row["system"]}] if has_system else []
        question = {"role": "user", "content": row["prompt"]}
        return {"messages": [*system, question, {"role": "assistant", "content": row[answer]}]}
    example = example_of(row)
    if not isinstance(example, Chat):
        return row
    if example.shape == "instruction + output":
        return _conversation(example) if options.as_messages else row
    return _conversation(example) if is_table or example.shape == "conversations" else row


def _named_row(
    values: Mapping[str, Any], options: Options, left_out: Counter[str], *, is_table: bool
) -> Mapping[str, Any]:
    """The row under the keys that rows have; `values` itself where it has these already."""
    if options.columns.given:
        row = options.columns.chosen(values)
    elif is_conversation(values):
        return {"messages": turns_of(values, left_out)}
    elif is_table or _shape_of(values) is None:
        row = found(values) or {}
    else:
        return values
    row = {key: value for key, value in row.items() if value or key not in ("system", "tools")}
    if "system" in row and "messages" in row:
        row["conversations"] = row.pop("messages")  # the shape that takes system text from beside the turns
    return row or values


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
    """The row as JSON on one line. Raises RowError for what JSON cannot say."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair, which is no valid Unicode") from None
    except ValueError:
        raise RowError("holds a number that JSON does not know (NaN or infinity)") from None
