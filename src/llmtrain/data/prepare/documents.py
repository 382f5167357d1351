"""Reading: files are cut into units of work, and a unit is read into documents, byte for byte.

    SourceFile ─ units_of ─→ Unit (about 4 MiB) ─ read_unit ─→ Document …

A text file is one document, a line of JSONL is one. The same unit read twice gives the same documents, so a corpus is
read once to choose and again to encode, and never has to fit into memory. Which documents stay is `selection`.
A new kind of file needs its units here and a branch in `read_unit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtrain.config.errors import ConfigError
from llmtrain.data.prepare.inputs import Input, SourceFile, size_of

BLOCK_BYTES = 1 << 22
"""Work is handed out, and files are hashed, in blocks of this size: a large file is read by several workers."""

TEXT_COLUMNS = ("text", "content", "body", "document", "raw_content", "article", "code", "markdown")
"""Fields of JSONL rows that hold the text when the config names none; the first that a file's first row has."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unit:
    """What a worker reads at a time: some whole text files, or the lines that begin in one block of a JSONL file."""

    input_name: str
    files: tuple[SourceFile, ...]
    start: int = 0
    """Of the block in the file (JSONL)."""
    text_column: str = ""


@dataclass(frozen=True)
class Document:
    """A document, or (`error`) what stands in its place."""

    file: SourceFile
    row: int
    """Zero for a text file; in JSONL the lines before it in the unit."""
    text: str = ""
    error: str | None = None
    line: int | None = None
    """Where the error is, counted from one; in JSONL from the first line of the unit."""


@dataclass(frozen=True)
class UnitContent:
    """A unit, read."""

    documents: list[Document]
    num_bytes: int
    """Of the unit's files, or of its block."""
    num_lines: int
    """Lines that begin in the unit (JSONL), blank ones too."""
    block_hashes: tuple[tuple[bytes, ...], ...]
    """For each file of the unit the sha256 of its blocks, as `file_hash` joins them; none when it cannot be read."""


def units_of(inputs: Sequence[Input], *, text_column: str | None) -> list[Unit]:
    """The corpus in reading order. Raises ConfigError when a JSONL file has no field that could be the text."""
    units: list[Unit] = []
    for source in inputs:
        group: list[SourceFile] = []
        group_bytes = 0
        for file in source.files:
            size = size_of(file)
            if group and (file.format != "text" or group_bytes + size > BLOCK_BYTES):
                units.append(Unit(source.name, tuple(group)))
                group, group_bytes = [], 0
            if file.format == "text":
                group.append(file)
                group_bytes += size
            else:
                column = text_column or _find_text_column(file)
                starts = range(0, max(size, 1), BLOCK_BYTES)
                units.extend(Unit(source.name, (file,), start, column) for start in starts)
        if group:
            units.append(Unit(source.name, tuple(group)))
    return units


def read_unit(unit: Unit) -> UnitContent:
    """Read the documents of a unit. What is wrong with a file or line is in its `Document.error`."""
    if unit.files[0].format == "jsonl":
        return _read_lines(unit)
    documents = []
    hashes: list[tuple[bytes, ...]] = []
    num_bytes = 0
    for file in unit.files:
        try:
            data = _read_whole(file)
        except OSError as error:
            documents.append(Document(file, 0, error=_unreadable(error)))
            hashes.append(())
            continue
        documents.append(_decoded(file, data))
        hashes.append(tuple(hashlib.sha256(block).digest() for block in _blocks(data)))
        num_bytes += len(data)
    return UnitContent(documents, num_bytes=num_bytes, num_lines=0, block_hashes=tuple(hashes))


def file_hash(block_hashes: Sequence[bytes]) -> bytes:
    """The hash of a file: sha256 over the sha256 of each block of BLOCK_BYTES."""
    return hashlib.sha256(b"".join(block_hashes)).digest()


def hash_file(file: SourceFile) -> bytes:
    """`file_hash` of a file on disk; of nothing when it cannot be read, as `read_unit` has it."""
    try:
        with open(file.path, "rb") as stream:
            blocks = iter(lambda: stream.read(BLOCK_BYTES), b"")
            return file_hash([hashlib.sha256(block).digest() for block in blocks])
    except OSError:
        return file_hash([])


def _read_whole(file: SourceFile) -> bytes:
    with open(file.path, "rb") as stream:
        return stream.read()


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


def _read_lines(unit: Unit) -> UnitContent:
    (file,) = unit.files
    try:
        block, lines_bytes = _read_block(file.path, unit.start)
    except OSError as error:
        document = Document(file, 0, error=_unreadable(error))
        return UnitContent([document], num_bytes=0, num_lines=0, block_hashes=((),))
    hashes = (hashlib.sha256(block).digest(),) if block else ()
    if unit.start == 0:
        lines_bytes = lines_bytes.removeprefix(_BOM)
    lines = lines_bytes.split(b"\n")  # not splitlines: U+2028 and its like stand inside of strings
    if lines[-1] == b"":
        lines.pop()
    documents = []
    for row, line in enumerate(lines):
        if line.strip():
            try:
                documents.append(Document(file, row, text=_text_of_row(line, unit.text_column)))
            except _BadRowError as error:
                documents.append(Document(file, row, error=str(error), line=row + 1))
    return UnitContent(documents, num_bytes=len(block), num_lines=len(lines), block_hashes=(hashes,))


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


class _BadRowError(Exception):
    """A line of JSONL that gives no text."""


def _text_of_row(line: bytes, column: str) -> str:
    row = _parse_row(line)
    if column not in row:
        raise _BadRowError(f"has no field {column!r}, only {_fields(row)}")
    text = row[column]
    if not isinstance(text, str):
        raise _BadRowError(f"field {column!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"field {column!r} holds half of a surrogate pair, which is no valid Unicode") from None
    return text


def _parse_row(line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRowError(_not_utf8(error)) from None
    except ValueError as error:
        raise _BadRowError(f"is no JSON ({error})") from None
    except RecursionError:
        raise _BadRowError("is no JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict):
        raise _BadRowError(f"is {type(row).__name__}, not a JSON object with a text field")
    return row


def _find_text_column(file: SourceFile) -> str:
    """The field with the text, by the first line that is a JSON object."""
    try:
        with open(file.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    row = _parse_row(line.removeprefix(_BOM) if number == 1 else line)
                except _BadRowError:
                    continue
                for column in TEXT_COLUMNS:
                    if isinstance(row.get(column), str):
                        return column
                raise ConfigError(
                    f"{file.path}:{number}: none of the usual text fields ({', '.join(TEXT_COLUMNS)}) among "
                    f"{_fields(row)}: name the field in prepare.text_column"
                )
    except OSError:
        pass  # reading it will say why
    return TEXT_COLUMNS[0]


def _fields(row: dict[str, object]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror})"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})"
