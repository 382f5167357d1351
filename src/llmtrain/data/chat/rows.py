"""Reading rows: one after the other, in bounded memory, each with the place that it comes from.

A row is a JSON object, whatever kind of file it stands in. What is no row is a fault in its place, and reading goes on
where that is possible. What a row means is `shapes`.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import IO, Any, NamedTuple

from llmtrain.data.chat.faults import Fault
from llmtrain.data.chat.row_files import RowDataset, RowFile, find_rows
from llmtrain.data.json_values import JsonValue, json_values

_BLOCK_BYTES = 1 << 20
"""Of a JSON file, read at a time."""
_BATCH_ROWS = 512
"""Rows of a columnar file that are made into objects at a time."""

_BOM = b"\xef\xbb\xbf"
_WRAPPERS = ("data", "rows", "train", "examples", "records", "items")
"""Keys of a JSON file's only object that may hold the rows."""

_JSON_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools")
"""Columns of a CSV file that may hold JSON, since a cell has no lists."""


class Row(NamedTuple):
    """A row as it was read."""

    values: dict[str, Any]
    source: str
    """`file:line`; the row's number, from 1, where a file has no lines."""


def read_rows(paths: str | Sequence[str], *, key: str, default_split: str = "train") -> Iterator[Row | Fault]:
    """The rows at `paths` (see `find_rows`) in their order, and faults in place of those that are none.

    Raises ConfigError before the first row when there is nothing to read at one of the paths.
    """
    return rows_of(find_rows(paths, key=key, default_split=default_split))


def rows_of(sources: Sequence[RowFile | RowDataset]) -> Iterator[Row | Fault]:
    """The rows of files and datasets that were found."""
    for source in sources:
        num_rows = 0
        for row in _rows_of_dataset(source) if isinstance(source, RowDataset) else _rows_of_file(source):
            num_rows += 1
            yield row
        if not num_rows:
            yield Fault(source.name, "is empty: it has no rows")


def _rows_of_file(file: RowFile) -> Iterator[Row | Fault]:
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    try:
        with file.open() as stream:
            yield from readers[file.format](stream, file.name)
    except UnicodeDecodeError:
        yield _first_fault_of_encoding(file)
    except (OSError, EOFError, zlib.error) as error:
        yield _unreadable(file, error)


def jsonl_lines(file: RowFile) -> Iterator[tuple[bytes, Row | Fault | None]]:
    """The lines of a JSONL file as they stand there, each with the row that it is; None for a blank one."""
    try:
        with file.open() as stream:
            yield from _lines_of_jsonl(stream, file.name)
    except (OSError, EOFError, zlib.error) as error:
        yield b"", _unreadable(file, error)


def _unreadable(file: RowFile, error: Exception) -> Fault:
    return Fault(file.name, f"cannot be read ({getattr(error, 'strerror', None) or error})")


def _first_fault_of_encoding(file: RowFile) -> Fault:
    """The line that is no UTF-8; a reader that decodes block by block does not know which it is."""
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return Fault(f"{file.name}:{number}", f"{_not_utf8(error)}; what comes after it is not read")
    return Fault(file.name, "changed while it was read")


def _read_jsonl(stream: IO[bytes], name: str) -> Iterator[Row | Fault]:
    for _, row in _lines_of_jsonl(stream, name):
        if row is not None:
            yield row


def _lines_of_jsonl(stream: IO[bytes], name: str) -> Iterator[tuple[bytes, Row | Fault | None]]:
    loads = json.JSONDecoder().decode
    prefix = f"{name}:"
    for number, line in enumerate(stream, 1):
        source = prefix + str(number)
        try:
            value = loads((line if number > 1 else line.removeprefix(_BOM)).decode())
        except UnicodeDecodeError as error:
            yield line, Fault(source, _not_utf8(error))
        except json.JSONDecodeError as error:
            text = line.strip()
            if not text:
                yield line, None
                continue
            if number == 1 and text in (b"{", b"["):
                several = "begins JSON over several lines, where each line should be one object: name it .json"
                yield line, Fault(source, several)
                return
            yield line, Fault(source, f"is no JSON ({error.msg} at character {error.pos + 1})")
        except RecursionError:
            yield line, Fault(source, "is no JSON (nested too deeply)")
        except ValueError as error:  # a number of more digits than Python takes
            yield line, Fault(source, f"is no JSON ({str(error).partition(';')[0]})")
        else:
            yield line, _row(value, source)


def _read_json(stream: IO[bytes], name: str) -> Iterator[Row | Fault]:
    values = json_values(iter(lambda: stream.read(_BLOCK_BYTES), b""))
    first = next(values, None)
    if first is None:
        return
    second = next(values, None)
    wrapper = _wrapper_of(first.value) if second is None and isinstance(first.value, dict) else None
    if wrapper is not None:
        for index, inner in enumerate(first.value[wrapper]):  # type: ignore[index]
            yield _row(inner, f"{name}:{first.line} ({wrapper}[{index}])")
        return
    for value in chain([first], [second] if second else [], values):
        yield _row_of_value(value, f"{name}:{value.line}")


def _row_of_value(value: JsonValue, source: str) -> Row | Fault:
    return _row(value.value, source) if value.error is None else Fault(source, value.error)


def _wrapper_of(value: dict[str, Any]) -> str | None:
    """The key whose value holds the rows, of an object that may be nothing but a wrapper around them."""
    for key in _WRAPPERS:
        inner = value.get(key)
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            return key
    return None


def _read_csv(stream: IO[bytes], name: str) -> Iterator[Row | Fault]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    first = text.readline()
    if not first:
        return
    text.seek(0)
    csv.field_size_limit(1 << 30)
    reader = csv.reader(text, delimiter=max(",;\t", key=first.count), strict=True)
    line = 1
    try:
        header = [field.strip() for field in next(reader)]
        if "" in header or len(set(header)) < len(header):
            yield Fault(f"{name}:1", f"the first line should name the columns, each once, but it is {first.strip()!r}")
            return
        line = reader.line_num + 1
        for fields in reader:
            source = f"{name}:{line}"
            line = reader.line_num + 1
            if len(fields) == len(header):
                yield Row(_with_json(dict(zip(header, fields, strict=True))), source)
            elif fields:
                yield Fault(source, f"has {len(fields)} fields, but the first line names {len(header)} columns")
    except csv.Error as error:
        yield Fault(f"{name}:{line}", f"is no CSV ({error}); what comes after it is not read")


def _with_json(row: dict[str, Any]) -> dict[str, Any]:
    for column in _JSON_COLUMNS:
        cell = row.get(column)
        if cell and cell[0] == "[":
            try:
                row[column] = json.loads(cell)
            except ValueError:
                continue  # text that begins with a bracket; where it should be a list, its shape will say so
    return row


def _read_parquet(stream: IO[bytes], name: str) -> Iterator[Row | Fault]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(stream).iter_batches(batch_size=_BATCH_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{name}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).strip().splitlines()[0]
        yield Fault(name, f"is no Parquet file that can be read, after row {number:,} ({message})")


def _rows_of_dataset(source: RowDataset) -> Iterator[Row | Fault]:
    number = 0
    for table in source.dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        for values in table.to_pylist():
            number += 1
            yield Row(values, f"{source.name}:{number}")


def _row(value: object, source: str) -> Row | Fault:
    if isinstance(value, dict):
        return Row(value, source)
    what = {list: "a list", str: "text", type(None): "null", bool: "true or false"}.get(type(value), "a number")
    return Fault(source, f"is {what}, not an object with keys and values")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})"
