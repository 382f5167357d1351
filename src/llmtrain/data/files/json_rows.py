"""The rows of a JSON file, by the one rule that says which of its values they are. docs/rows.md has it for users.

    a list                    [{…}, {…}]                    its elements
    objects, one after other  {…} {…}                       each of them; JSON Lines where each has a line of its own
    an object around a list   {"version": 1, "data": [{…}]} the elements of that list
    any other object          {"messages": […]}             the object

An object stands around a list if it has nothing by which a row is known (text, or turns, under a usual key), and if the
list is all that it holds, or has one of the usual names of such lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from llmtrain.data.files.byte_blocks import only_os_errors, read_blocks
from llmtrain.data.files.find import DataFile
from llmtrain.data.files.json_values import JsonValue, json_values
from llmtrain.data.files.row_faults import kind_of

ParsedRow = tuple[int, dict[str, Any], str | None, str]
"""A row, or what is wrong in its place: its line, its values, the error, its place within the line.

The line is counted from one; it is the row's number where a file has no lines. Only rows within one JSON object have a
place there. A plain tuple, since one is made of every row.
"""

TEXT_KEYS = ("text", "content", "body", "document", "raw_content", "article", "code", "markdown")
"""Keys that hold a document's text when the config names none; the first that the first row of a file has."""
_ROW_TEXTS = (*TEXT_KEYS, "prompt", "completion", "instruction", "question", "answer", "response", "output")
_ROW_TURNS = ("messages", "conversations", "prompt", "completion")
_ROW_KEYS = (*_ROW_TURNS, "instruction", "text")
_LIST_NAMES = (
    *("data", "rows", "examples", "records", "items", "samples", "instances", "entries", "documents", "dataset"),
    *("train", "training", "validation", "valid", "val", "dev", "test"),
)
_SNIFFED_BYTES = 1 << 22
"""A first line that is longer is not parsed to tell lines from a document."""
_BLANK = b"\xef\xbb\xbf \t\r\n"

LINES = "one object a line"
_LIST, _VALUES, _OBJECT = "a list", "objects one after the other", "one object"


class Document(NamedTuple):
    """A JSON file that is open."""

    layout: str
    """Description for people of which values are the rows."""
    rows: Iterator[tuple[ParsedRow, int]]
    """Each row, and its share of the characters."""


def open_document(blocks: Iterable[bytes]) -> Document:
    """Find out which values of a document are its rows. Raises what reading the blocks raises."""
    blocks = iter(blocks)
    head = b""
    while not head.strip(_BLANK) and (block := next(blocks, b"")):
        head += block
    values = json_values(chain([head], blocks))
    first, second = next(values, None), next(values, None)
    every = chain(filter(None, (first, second)), values)
    if head.lstrip(_BLANK).startswith(b"["):
        return Document(_LIST, _each(every))
    if first is None or second is not None or not isinstance(first.value, dict):
        return Document(_VALUES, _each(every))
    lists = _lists_of_rows(first.value)
    if not lists:
        return Document(_OBJECT, _each(every))
    if len(lists) > 1:
        named = " and ".join(map(repr, lists))
        fault = error_at(first.line, f"is one object with several lists of rows, {named}: make a file of each")
        return Document(_OBJECT, iter([(fault, 0)]))
    others = ", ".join(repr(key) for key in first.value if key not in lists)
    return Document(
        f"the list {lists[0]!r} of one object" + (f", without its {others}" if others else ""),
        _elements(first, lists[0]),
    )


def layout_of_json(file: DataFile) -> str:
    """Return which values of a JSON file are its rows, for people. Raises OSError when it cannot be read."""
    if is_lines(file):
        return LINES
    return open_document(block for block, _ in read_blocks(file, block_bytes=_SNIFFED_BYTES)).layout


def is_lines(file: DataFile) -> bool:
    """Return whether a file is read line by line, so that what is wrong with a line spoils no other.

    It is if its name says so, and if its first line is an object that is not all of a document. A first line that is
    no JSON counts as a bad line, unless a value begins there that ends on a later one. Raises OSError.
    """
    if file.format != "jsonl":
        return False
    with only_os_errors(), file.open() as stream:
        line = b""
        while not line and (line := stream.readline(_SNIFFED_BYTES)):
            line = line.strip(_BLANK)
        if line.startswith(b"["):
            return False
        others = iter(lambda: stream.readline(_SNIFFED_BYTES), b"")
        is_last = not any(other.strip(_BLANK) for other in others)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        blocks = (block for block, _ in read_blocks(file, block_bytes=_SNIFFED_BYTES))
        first = next(json_values(blocks), None)
        return first is None or first.error is not None or first.num_characters <= len(line.decode(errors="replace"))
    return not (is_last and isinstance(value, dict) and _lists_of_rows(value))


def is_turns(value: object) -> bool:
    """Return whether a value is a list of turns, by the first of them."""
    return isinstance(value, list) and any(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value[:1]
    )


def row_at(line: int, value: object, inside: str = "") -> ParsedRow:
    """Return a value as a row, which is an object, or what it is instead."""
    if isinstance(value, dict):
        return line, value, None, inside
    return error_at(line, f"is {kind_of(value)}, not an object with keys and values", inside)


def error_at(line: int, message: str, inside: str = "") -> ParsedRow:
    """Return what is wrong in the place of a row."""
    return line, {}, message, inside


def _each(values: Iterable[JsonValue]) -> Iterator[tuple[ParsedRow, int]]:
    for line, value, error, num_characters in values:
        yield row_at(line, value) if error is None else error_at(line, error), num_characters


def _elements(document: JsonValue, key: str) -> Iterator[tuple[ParsedRow, int]]:
    rows = document.value[key]  # type: ignore[index]
    for index, inner in enumerate(rows):
        yield row_at(document.line, inner, f"{key}[{index}]"), document.num_characters // len(rows)


def _lists_of_rows(value: dict[str, Any]) -> list[str]:
    """Return the keys under which an object holds a list of rows; none if it is a row itself."""
    if any(isinstance(value.get(key), str) for key in _ROW_TEXTS) or any(
        is_turns(value.get(key)) for key in _ROW_TURNS
    ):
        return []
    lists = [key for key, inner in value.items() if isinstance(inner, list) and _may_be_rows(key, inner)]
    return lists if len(value) == 1 else [key for key in lists if key in _LIST_NAMES]


def _may_be_rows(key: str, entries: list[Any]) -> bool:
    """Return whether a list may hold rows. Under a name for turns, rows are told from bad turns by their keys."""
    if key in _ROW_TURNS:
        return bool(entries) and isinstance(entries[0], dict) and not entries[0].keys().isdisjoint(_ROW_KEYS)
    return all(isinstance(entry, dict) for entry in entries[:1])
