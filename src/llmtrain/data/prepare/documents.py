"""Reading: files are cut into pieces of work, and a piece is read into documents.

    inputs ─ CorpusReader.pieces ─→ Piece … ─ CorpusReader.read ─→ Document …
             one thread, in order              any thread

A text file is one document, a row of JSONL, JSON, Parquet or a dataset is one, by its adapter. Text files, and JSONL in
blocks, are read by whoever works on the piece. What can only be read from the front (packed files, JSON, the columns of
Parquet) is read piece by piece as the pieces are asked for, and goes along with them. The same files give the same
pieces, so a corpus is read once to choose and again to encode, and never has to fit into memory. Which documents stay
is `selection`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.config.data import PrepareConfig
from llmtrain.config.errors import ConfigError
from llmtrain.data.json_values import JsonValue, json_values
from llmtrain.data.prepare.adapters import Adapter, BadRowError, load_adapter
from llmtrain.data.prepare.hugging_face import columns_of, open_dataset
from llmtrain.data.prepare.inputs import Input, SourceFile, size_of
from llmtrain.data.prepare.streams import open_anywhere, read_blocks, read_whole

BLOCK_BYTES = 1 << 22
"""Work is handed out, and files are hashed, in blocks of this size: a large file is read by several workers."""

PIECE_ROWS = 256
"""Rows of Parquet and datasets, and values of JSON, in a piece."""

TEXT_COLUMNS = ("text", "content", "body", "document", "raw_content", "article", "code", "markdown")
"""Fields that hold the text when the config names none; the first that a file's first row has."""

_BOM = b"\xef\xbb\xbf"
_READ_ERRORS = (OSError, pa.ArrowException)


@dataclass(frozen=True)
class Unit:
    """What a worker reads at a time: some whole text files, or a piece of a file of rows."""

    input_name: str
    files: tuple[SourceFile, ...]
    start: int = 0
    """Of the piece in the file: bytes of JSONL, else rows."""


@dataclass(frozen=True)
class Piece:
    """A unit, with what was already read of it."""

    unit: Unit
    content: bytes | pa.Table | list[JsonValue] | None = None
    """Lines, rows or values; None: nothing."""
    num_bytes: int = 0
    """Of the file, that the content took."""
    error: str | None = None
    """Why the file cannot be read from here on."""


@dataclass(frozen=True)
class Document:
    """A document, or (`error`) what stands in its place."""

    file: SourceFile
    row: int
    """Zero for a text file; else counted from the first row of the unit, in JSONL over its lines."""
    text: str = ""
    error: str | None = None
    line: int | None = None
    """Where the error is, counted from one; in JSONL from the first line of the unit."""
    id: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class UnitContent:
    """A unit, read."""

    documents: list[Document]
    num_bytes: int
    """Of the unit's files, or of its part of one."""
    num_lines: int
    """Lines that begin in the unit (JSONL), blank ones too."""
    block_hashes: tuple[tuple[bytes, ...], ...]
    """For each file of the unit the sha256 of its blocks, as `file_hash` joins them; none when it cannot be read. Those
    of a file that is read from the front come with its first piece; a dataset has none."""


@dataclass(frozen=True)
class CorpusReader:
    """Reads the documents of inputs. Made by `open_corpus`."""

    inputs: Sequence[Input]
    adapter: Adapter
    text_columns: dict[SourceFile, str]
    """Where the text is, in files of rows."""

    def pieces(self) -> Iterator[Piece]:
        """The corpus in reading order. What is wrong with a file goes along in its place."""
        for source in self.inputs:
            group: list[SourceFile] = []
            group_bytes = 0
            for file in source.files:
                size = size_of(file) if file.format == "text" else 0
                if group and (file.format != "text" or group_bytes + size > BLOCK_BYTES):
                    yield Piece(Unit(source.name, tuple(group)))
                    group, group_bytes = [], 0
                if file.format == "text":
                    group.append(file)
                    group_bytes += size
                else:
                    yield from self._pieces_of_rows(source.name, file)
            if group:
                yield Piece(Unit(source.name, tuple(group)))

    def read(self, piece: Piece) -> UnitContent:
        """Read the documents of a piece. What is wrong with a file or row is in its `Document.error`."""
        unit = piece.unit
        if unit.files[0].format == "text":
            return _read_texts(unit)
        (file,) = unit.files
        if piece.error is not None:
            content = UnitContent([Document(file, 0, error=piece.error)], piece.num_bytes, 0, ((),))
        elif isinstance(piece.content, list):
            content = UnitContent(list(self._of_values(file, piece.content)), piece.num_bytes, 0, ((),))
        elif isinstance(piece.content, pa.Table):
            content = UnitContent(list(self._of_table(file, piece.content, unit.start)), piece.num_bytes, 0, ((),))
        elif isinstance(piece.content, bytes):
            documents, num_lines = self._of_lines(file, piece.content)
            content = UnitContent(documents, piece.num_bytes, num_lines, ((),))
        else:
            return self._read_block_of_lines(unit)
        if unit.start > 0 or file.dataset is not None:
            return content
        return UnitContent(content.documents, content.num_bytes, content.num_lines, (_hash_blocks(file),))

    def _pieces_of_rows(self, name: str, file: SourceFile) -> Iterator[Piece]:
        if file.format == "jsonl" and file.compression is None:
            for start in range(0, max(size_of(file), 1), BLOCK_BYTES):
                yield Piece(Unit(name, (file,), start))
            return
        start = 0
        empty: bytes | list[JsonValue] = b"" if file.format == "jsonl" else []
        try:
            for content, num_bytes in self._contents(file):
                yield Piece(Unit(name, (file,), start), content, num_bytes)
                start += len(content)
        except _READ_ERRORS as error:
            yield Piece(Unit(name, (file,), start), error=_unreadable(error))
            return
        if start == 0:
            yield Piece(Unit(name, (file,), 0), empty, size_of(file))

    def _contents(self, file: SourceFile) -> Iterator[tuple[bytes | list[JsonValue] | pa.Table, int]]:
        """A file from the front, in pieces, and the bytes of the file that each took."""
        if file.format == "jsonl":
            yield from _whole_lines(read_blocks(file, block_bytes=BLOCK_BYTES))
        elif file.format == "json":
            yield from _groups_of_values(file)
        else:
            wanted = self.adapter.columns_to_read(self.text_columns.get(file, ""))
            yield from (_tables_of_dataset if file.dataset else _tables_of_parquet)(file, wanted)

    def _of_lines(self, file: SourceFile, data: bytes) -> tuple[list[Document], int]:
        """The documents of whole lines, and how many lines there are."""
        lines = data.split(b"\n")  # not splitlines: U+2028 and its like stand inside of strings
        if lines[-1] == b"":
            lines.pop()
        documents = []
        for row, line in enumerate(lines):
            if line.strip():
                try:
                    documents.append(self._of_row(file, row, _parse_row(line)))
                except BadRowError as error:
                    documents.append(Document(file, row, error=str(error), line=row + 1))
        return documents, len(lines)

    def _of_values(self, file: SourceFile, values: Iterable[JsonValue]) -> Iterator[Document]:
        for row, value in enumerate(values):
            try:
                if value.error is not None:
                    raise BadRowError(value.error)
                yield self._of_row(file, row, value.value)
            except BadRowError as error:
                yield Document(file, row, error=str(error), line=value.line)

    def _of_table(self, file: SourceFile, table: pa.Table, start: int) -> Iterator[Document]:
        for row, fields in enumerate(table.to_pylist()):
            try:
                yield self._of_row(file, row, fields)
            except BadRowError as error:
                yield Document(file, row, error=f"row {start + row} {error}")

    def _of_row(self, file: SourceFile, row: int, fields: object) -> Document:
        found = self.adapter.read(fields, text_column=self.text_columns.get(file, ""))
        subset = found.subset or (file.dataset.config if file.dataset else None)
        return Document(file, row, text=found.text, id=found.id, subset=subset)

    def _read_block_of_lines(self, unit: Unit) -> UnitContent:
        (file,) = unit.files
        try:
            block, lines = _read_block(file.path, unit.start)
        except OSError as error:
            return UnitContent([Document(file, 0, error=_unreadable(error))], 0, 0, ((),))
        if unit.start == 0:
            lines = lines.removeprefix(_BOM)
        documents, num_lines = self._of_lines(file, lines)
        return UnitContent(documents, len(block), num_lines, ((hashlib.sha256(block).digest(),) if block else (),))


def open_corpus(inputs: Sequence[Input], options: PrepareConfig) -> CorpusReader:
    """A reader of the inputs' documents.

    Raises ConfigError when the adapter or a dataset cannot be had, and when a file has no field that could be the text.
    """
    adapter = load_adapter(options.adapter)
    columns = {}
    for source in inputs:
        for file in source.files:
            if file.format != "text" and adapter.function is None:
                columns[file] = options.text_column or _find_text_column(file)
    return CorpusReader(inputs, adapter, columns)


def file_hash(block_hashes: Sequence[bytes]) -> bytes:
    """The hash of a file: sha256 over the sha256 of each block of BLOCK_BYTES."""
    return hashlib.sha256(b"".join(block_hashes)).digest()


def hash_file(file: SourceFile) -> bytes:
    """`file_hash` of a file on disk; of nothing when it cannot be read, as `read` has it.

    Of a dataset in a folder: over the names and hashes of the files there.
    """
    if file.dataset is None:
        return file_hash(_hash_blocks(file))
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(file.path).rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = path.relative_to(file.path).as_posix()
        digest.update(os.fsencode(name) + b"\0" + file_hash(_hash_blocks(SourceFile(str(path), name, "text"))))
    return digest.digest()


def _hash_blocks(file: SourceFile) -> tuple[bytes, ...]:
    try:
        with open(file.path, "rb") as stream:
            blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
            return tuple(hashlib.sha256(block).digest() for block in blocks)
    except OSError:
        return ()


# -- text files --------------------------------------------------------------------------------------------------------


def _read_texts(unit: Unit) -> UnitContent:
    documents = []
    hashes: list[tuple[bytes, ...]] = []
    num_bytes = 0
    for file in unit.files:
        try:
            data = read_whole(file)
        except _READ_ERRORS as error:
            documents.append(Document(file, 0, error=_unreadable(error)))
            hashes.append(_hash_blocks(file))
            continue
        documents.append(_decoded(file, data))
        if file.compression is None:
            hashes.append(tuple(hashlib.sha256(block).digest() for block in _blocks(data)))
        else:
            hashes.append(_hash_blocks(file))
        num_bytes += size_of(file) if file.compression else len(data)
    return UnitContent(documents, num_bytes=num_bytes, num_lines=0, block_hashes=tuple(hashes))


def _decoded(file: SourceFile, data: bytes) -> Document:
    try:
        return Document(file, 0, text=data.removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return Document(file, 0, error=_not_utf8(error), line=line)


def _blocks(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(data), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]


# -- files of rows -----------------------------------------------------------------------------------------------------


def _read_block(path: str, start: int) -> tuple[bytes, bytes]:
    """The block at `start`, and the bytes of the lines that begin in it: without the end of one that began before,
    with the rest of the last one."""
    with open(path, "rb") as stream:
        stream.seek(max(start - 1, 0))
        begins_line = start == 0 or stream.read(1) == b"\n"
        block = stream.read(BLOCK_BYTES)
        first = 0 if begins_line else block.find(b"\n") + 1
        if first == len(block) or (first == 0 and not begins_line):
            return block, b""
        rest = b"" if block.endswith(b"\n") else stream.readline()
        return block, block[first:] + rest


def _whole_lines(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The blocks, cut where lines end."""
    begun: list[bytes] = []
    taken = 0
    is_first = True
    for block, num_bytes in blocks:
        if is_first:
            block, is_first = block.removeprefix(_BOM), False
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


def _groups_of_values(file: SourceFile) -> Iterator[tuple[list[JsonValue], int]]:
    taken = 0

    def blocks() -> Iterator[bytes]:
        nonlocal taken
        for block, num_bytes in read_blocks(file, block_bytes=BLOCK_BYTES):
            taken += num_bytes
            yield block

    group: list[JsonValue] = []
    group_characters = 0
    for value in json_values(blocks()):
        group.append(value)
        group_characters += value.num_characters
        if len(group) == PIECE_ROWS or group_characters >= BLOCK_BYTES:
            yield group, taken
            group, group_characters, taken = [], 0, 0
    if group:
        yield group, taken


def _tables_of_parquet(file: SourceFile, wanted: tuple[str, ...] | None) -> Iterator[tuple[pa.Table, int]]:
    with open_anywhere(file) as content, pq.ParquetFile(content) as parquet:
        names = [name for name in parquet.schema_arrow.names if wanted is None or name in wanted]
        rows_left, bytes_left = parquet.metadata.num_rows, size_of(file)
        for batch in parquet.iter_batches(batch_size=PIECE_ROWS, columns=names):
            num_bytes = bytes_left * len(batch) // max(1, rows_left)
            yield pa.Table.from_batches([batch]), num_bytes
            rows_left, bytes_left = rows_left - len(batch), bytes_left - num_bytes


def _parquet_schema(file: SourceFile) -> pa.Schema:
    with open_anywhere(file) as content:
        return pq.read_schema(content)


def _tables_of_dataset(file: SourceFile, wanted: tuple[str, ...] | None) -> Iterator[tuple[pa.Table, int]]:
    assert file.dataset is not None
    data: Any = open_dataset(file.dataset)
    if wanted is not None:
        data = data.select_columns([name for name in data.column_names if name in wanted])
    rows_left, bytes_left = len(data), size_of(file)
    for table in data.with_format("arrow").iter(batch_size=PIECE_ROWS):
        num_bytes = bytes_left * len(table) // max(1, rows_left)
        yield table, num_bytes
        rows_left, bytes_left = rows_left - len(table), bytes_left - num_bytes


def _parse_row(line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRowError(_not_utf8(error)) from None
    except ValueError as error:
        raise BadRowError(f"is no JSON ({error})") from None
    except RecursionError:
        raise BadRowError("is no JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict):
        raise BadRowError(f"is {type(row).__name__}, not a JSON object with a text field")
    return row


# -- which field holds the text ----------------------------------------------------------------------------------------


def _find_text_column(file: SourceFile) -> str:
    """The field with the text: by the types of the columns, or by the first row that is an object."""
    try:
        if file.format in ("parquet", "dataset"):
            schema = columns_of(file.dataset) if file.dataset else _parquet_schema(file)
            texts = {
                field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            }
            return _usual_column(str(file.dataset or file.path), texts, schema.names)
        for line, row in _first_rows(file):
            texts = {name for name, value in row.items() if isinstance(value, str)}
            return _usual_column(f"{file.path}:{line}", texts, list(row))
    except _READ_ERRORS:
        pass  # reading it will say why
    return TEXT_COLUMNS[0]


def _usual_column(where: str, texts: set[str], names: Sequence[str]) -> str:
    for column in TEXT_COLUMNS:
        if column in texts:
            return column
    raise ConfigError(
        f"{where}: none of the usual text fields ({', '.join(TEXT_COLUMNS)}) among "
        f"{', '.join(map(repr, names)) or 'none'}: name the field in prepare.text_column"
    )


def _first_rows(file: SourceFile) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows that are objects, with their lines."""
    blocks = read_blocks(file, block_bytes=min(BLOCK_BYTES, 1 << 16))
    if file.format == "json":
        for value in json_values(block for block, _ in blocks):
            if isinstance(value.value, dict):
                yield value.line, value.value
        return
    number = 0
    for lines, _ in _whole_lines(blocks):
        for line in lines.removesuffix(b"\n").split(b"\n"):
            number += 1
            try:
                yield number, _parse_row(line)
            except BadRowError:
                continue


def _unreadable(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return f"cannot be read ({reason})"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})"
