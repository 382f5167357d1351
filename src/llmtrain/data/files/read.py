"""Reading: the rows of files and datasets, in bounded memory, each with the place that it comes from.

    DataFile, RowDataset ─ contents ─▶ whole lines · values · an Arrow table ─ parse ─▶ ParsedRow …
                         └──────────────────────── rows_of ───────────────────────▶ Row or RowFault …

`rows_of` reads from front to back. `prepare`, which parses on several threads, calls `contents` and `parse`, and takes
the lines of a file that is not compressed from anywhere in it (`read_lines_at` of `byte_blocks`). A row is an object
with keys and values, whatever kind of file it stands in. What is no row is an error in its place, and reading goes on
where that is possible. What a row means is for others to say.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llmtrain.data.files.byte_blocks import not_utf8, only_os_errors, read_blocks, unreadable
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import DataFile, RowSource, find_rows
from llmtrain.data.files.json_rows import ParsedRow, error_at, is_lines, is_turns, layout_of_json, open_document, row_at
from llmtrain.data.files.json_values import JsonDecoder
from llmtrain.data.files.row_faults import RowFault
from llmtrain.data.files.tables import BATCH_ROWS, TABLE_FORMATS, rows_of_table, tables_of
from llmtrain.screen import counted

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 1 << 20
"""Bytes of a file of lines or JSON that are read at a time."""

_BOM = b"\xef\xbb\xbf"
_JSON_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools")
"""Columns of a CSV file that may hold JSON, since a cell has no lists."""
_NOT_READ = "; what comes after it is not read"


class Row(NamedTuple):
    """A row as it was read."""

    values: dict[str, Any]
    source: str
    """`file:line`; the row's number, from 1, where a file has no lines."""


Content: TypeAlias = "bytes | list[ParsedRow] | pa.Table"
"""A part of a file, not parsed yet: whole lines of JSONL, values of JSON or CSV, or rows of a table."""


def read_rows(paths: str | Sequence[str], *, key: str, default_split: str = "train") -> Iterator[Row | RowFault]:
    """Read the rows at `paths` (see `find_rows`) in their order, with faults in place of those that are none.

    Raises ConfigError before the first row when there is nothing to read at one of the paths.
    """
    return rows_of(find_rows(paths, key=key, default_split=default_split))


def rows_of(sources: Sequence[RowSource], *, block_bytes: int = BLOCK_BYTES) -> Iterator[Row | RowFault]:
    """Read the rows of files and datasets that were found."""
    for source in sources:
        num_rows = 0
        for row in _rows_of(source, block_bytes):
            num_rows += 1
            yield row
        if not num_rows:
            yield RowFault(source.name, "is empty: it has no rows")


def layout_of(source: RowSource) -> str:
    """Return where in a file or dataset its rows are, for people: a JSON file may hold them in several ways."""
    if isinstance(source, RowDataset):
        return "rows of a dataset"
    if source.format not in ("json", "jsonl"):
        return f"rows of a table ({source.format})"
    try:
        return layout_of_json(source)
    except OSError as error:
        return unreadable(error)


def lines_of_rows(file: DataFile) -> Iterator[tuple[bytes, Row | RowFault | None]]:
    """Read the lines of a file as they stand there, each with the row of JSON that it is; None for a blank one."""
    before = 0
    try:
        for data, _ in _whole_lines(read_blocks(file, block_bytes=BLOCK_BYTES)):
            for line, parsed in zip(io.BytesIO(data), _parse_lines(data, before), strict=False):
                yield line, None if parsed is None else _placed(parsed, f"{file.name}:")
            before += num_lines(data)
    except OSError as error:
        yield b"", RowFault(file.name, unreadable(error))


def _rows_of(source: RowSource, block_bytes: int) -> Iterator[Row | RowFault]:
    prefix = f"{source.name}:"
    before = 0
    try:
        for data, _ in contents(source, block_bytes=block_bytes):
            for parsed in parse(data, before=before):
                yield _placed(parsed, prefix)
            before += num_lines(data) if isinstance(data, bytes) else len(data)
    except OSError as error:
        if isinstance(source, DataFile) and source.format in TABLE_FORMATS:
            kind = source.format.capitalize()
            yield RowFault(source.name, f"is no {kind} file that can be read, after row {before:,} ({error})")
        else:
            yield RowFault(source.name, unreadable(error))


def _placed(parsed: ParsedRow, prefix: str) -> Row | RowFault:
    line, values, error, inside = parsed
    place = f"{prefix}{line} ({inside})" if inside else f"{prefix}{line}"
    return Row(values, place) if error is None else RowFault(place, error)


# -- contents: what is read at a time ----------------------------------------------------------------------------------


def contents(
    source: RowSource, *, block_bytes: int = BLOCK_BYTES, columns: Sequence[str] | None = None
) -> Iterator[tuple[Content, int]]:
    """Read a file or dataset from the front, each content with the number of bytes on disk that it took.

    Of tables, only `columns` are read where they are named. Raises OSError when the source cannot be read, or is not
    compressed as its name says.
    """
    if isinstance(source, RowDataset) or source.format in TABLE_FORMATS:
        yield from tables_of(source, columns)
    elif is_lines(source):
        yield from _whole_lines(read_blocks(source, block_bytes=block_bytes))
    elif source.format in ("json", "jsonl"):
        yield from _groups_of_values(source, block_bytes)
    else:
        assert source.format == "csv"
        with only_os_errors():
            rows = _csv_rows(source)
            while group := list(islice(rows, BATCH_ROWS)):
                yield group, 0


def parse(data: Content, *, before: int = 0, begins_file: bool = True) -> Iterator[ParsedRow]:
    """Parse the rows of a content. `before`: lines or rows of the file before it; 0 counts from its own first.

    Without `begins_file`, the first line that is counted is not the first of the file.
    """
    if isinstance(data, bytes):
        return filter(None, _parse_lines(data, before, begins_file=begins_file))
    if isinstance(data, list):
        return iter(data)
    return ((number, values, wrong, "") for number, (values, wrong) in enumerate(rows_of_table(data), before + 1))


def num_lines(data: bytes) -> int:
    """Return how many lines begin in `data`."""
    return data.count(b"\n") + (data[-1:] not in (b"", b"\n"))


# -- JSON and CSV ------------------------------------------------------------------------------------------------------


def _whole_lines(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Cut the blocks where lines end."""
    begun: list[bytes] = []
    taken = 0
    for block, num_bytes in blocks:
        taken += num_bytes
        end = block.rfind(b"\n") + 1
        begun.append(block[:end])
        if end:
            yield b"".join(begun), taken
            begun, taken = [block[end:]], 0
        else:
            begun.append(block)
    if any(begun):
        yield b"".join(begun), taken


def _parse_lines(data: bytes, before: int, *, begins_file: bool = True) -> Iterator[ParsedRow | None]:
    """Parse lines of JSONL; None for a blank one."""
    decode = JsonDecoder().decode
    for number, line in enumerate(io.BytesIO(data), before + 1):
        is_first = begins_file and number == 1
        try:
            value, fault = decode((line.removeprefix(_BOM) if is_first else line).decode())
        except UnicodeDecodeError as error:
            yield error_at(number, not_utf8(error))
        except json.JSONDecodeError as error:
            text = line.removeprefix(_BOM).strip()
            if not text:
                yield None
            else:
                yield error_at(number, f"is no JSON ({error.msg} at character {error.pos + 1})")
        except RecursionError:
            yield error_at(number, "is no JSON (nested too deeply)")
        except ValueError as error:  # a number of more digits than Python takes
            yield error_at(number, f"is no JSON ({str(error).partition(';')[0]})")
        else:
            yield row_at(number, value) if fault is None else error_at(number, fault)


def _groups_of_values(file: DataFile, block_bytes: int) -> Iterator[tuple[list[ParsedRow], int]]:
    taken = 0

    def blocks() -> Iterator[bytes]:
        nonlocal taken
        for block, num_bytes in read_blocks(file, block_bytes=block_bytes):
            taken += num_bytes
            yield block

    group: list[ParsedRow] = []
    characters = 0
    for row, num_characters in open_document(blocks()).rows:
        group.append(row)
        characters += num_characters
        if len(group) == BATCH_ROWS or characters >= block_bytes:
            yield group, taken
            group, characters, taken = [], 0, 0
    if group:
        yield group, taken


def _csv_rows(file: DataFile) -> Iterator[ParsedRow]:
    line = 1
    try:
        with file.open() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            if not first:
                return
            csv.field_size_limit(1 << 30)
            reader = csv.reader(chain([first], text), delimiter=max(",;\t", key=first.count), strict=True)
            header = [field.strip() for field in next(reader)]
            if "" in header or len(set(header)) < len(header):
                named = f"the first line should name the columns, each once, but it is {first.strip()!r}"
                yield error_at(1, named)
                return
            line = reader.line_num + 1
            for fields in reader:
                begin, line = line, reader.line_num + 1
                if len(fields) == len(header):
                    yield begin, _with_json(dict(zip(header, fields, strict=True))), None, ""
                elif fields:
                    wrong = (
                        f"has {counted(len(fields), 'field')}, but the first line names "
                        f"{counted(len(header), 'column')}"
                    )
                    yield error_at(begin, wrong)
    except csv.Error as error:
        yield error_at(line, f"is no CSV ({error}){_NOT_READ}")
    except UnicodeDecodeError:
        yield _first_line_that_is_not_utf8(file)


def _first_line_that_is_not_utf8(file: DataFile) -> ParsedRow:
    """Find the line: a reader that decodes block by block does not know which it is."""
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return error_at(number, f"{not_utf8(error)}{_NOT_READ}")
    return error_at(1, "changed while it was read")


def _with_json(row: dict[str, Any]) -> dict[str, Any]:
    for column in _JSON_COLUMNS:
        cell = row.get(column)
        if cell and cell[0] == "[":
            try:
                value = json.loads(cell)
            except (ValueError, RecursionError):
                continue  # text that begins with a bracket; where it should be a list, its shape will say so
            are_tools = column == "tools" and value and all(isinstance(entry, dict) for entry in value)
            if is_turns(value) or are_tools:  # else text, such as []
                row[column] = value
    return row
