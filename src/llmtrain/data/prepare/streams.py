"""The bytes of a file, unpacked, block by block, and the values of a JSON file: no file has to fit into memory."""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

import pyarrow as pa

from llmtrain.data.prepare.inputs import SourceFile

_BLANK = re.compile(r"[ \t\r\n]*")
_BLANK_OR_COMMA = re.compile(r"[ \t\r\n,]*")
_NEXT_OBJECT = re.compile(r"\n(?=\{)")
_TAIL = 16
"""An error so near to the end of what was read may be none when more is read: half of a word or of an escape."""


def read_blocks(file: SourceFile, *, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of a file's content, and how many bytes on disk each took.

    Raises OSError or pa.ArrowException when it cannot be read, or is not packed as its name says.
    """
    with open(file.path, "rb") as raw:
        stream = raw if file.compression is None else pa.CompressedInputStream(raw, file.compression)
        position = 0
        while block := stream.read(block_bytes):
            yield block, raw.tell() - position
            position = raw.tell()


def read_whole(file: SourceFile) -> bytes:
    """All of a file's content. Raises what `read_blocks` does."""
    return b"".join(block for block, _ in read_blocks(file, block_bytes=1 << 24))


@contextmanager
def open_anywhere(file: SourceFile) -> Iterator[IO[bytes]]:
    """A file's content to be read at any position, as Parquet asks for: a packed one is unpacked to a temporary file.

    Raises what `read_blocks` does.
    """
    if file.compression is None:
        with open(file.path, "rb") as plain:
            yield plain
        return
    with tempfile.TemporaryFile() as unpacked:
        for block, _ in read_blocks(file, block_bytes=1 << 24):
            unpacked.write(block)
        unpacked.seek(0)
        yield unpacked


class JsonValue(NamedTuple):
    """A value of a JSON file, or what is wrong in its place."""

    line: int
    """Where it begins, counted from one."""
    value: object
    error: str | None
    num_characters: int


def json_values(blocks: Iterable[bytes]) -> Iterator[JsonValue]:
    """The elements of the array that a file holds, or else its values one after the other (one object, or many).

    After a value that is no JSON, reading goes on at the next line that begins with an object; in an array it ends.
    """
    reader = _Reader(blocks)
    try:
        yield from reader.values()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        yield JsonValue(reader.line, None, f"is not UTF-8 text (byte 0x{byte:02x}: {error.reason})", 0)


class _Reader:
    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.line = 1
        self._blocks = iter(blocks)
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decode = json.JSONDecoder().raw_decode
        self._buffer = ""
        self._position = 0
        self._ended = False

    def values(self) -> Iterator[JsonValue]:
        in_array = self._next_after(_BLANK) == "["
        if in_array:
            self._advance(self._position + 1)
        while character := self._next_after(_BLANK_OR_COMMA if in_array else _BLANK):
            if in_array and character == "]":
                self._advance(self._position + 1)
                if self._next_after(_BLANK):
                    yield JsonValue(self.line, None, "is no JSON (there is more after the end of the array)", 0)
                return
            line, begin = self.line, self._position
            try:
                value = self._value()
            except (ValueError, RecursionError) as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                yield JsonValue(line, None, f"is no JSON ({error})", 0)
                if in_array or not self._skip_to_next_object():
                    return
            else:
                yield JsonValue(line, value, None, self._position - min(begin, self._position))
        if in_array:
            yield JsonValue(self.line, None, "is no JSON (the file ends inside of the array)", 0)

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                line = self.line + self._buffer.count("\n", self._position, error.pos)
                may_go_on = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _TAIL
                if not may_go_on or not self._read_more():
                    raise ValueError(f"{error.msg}, in line {line}") from None
            else:
                self._advance(end)
                return value

    def _next_after(self, skipped: re.Pattern[str]) -> str:
        """The character after what is skipped; empty at the end of the file."""
        while True:
            match = skipped.match(self._buffer, self._position)
            assert match
            self._advance(match.end())
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more():
                return ""

    def _skip_to_next_object(self) -> bool:
        while True:
            found = _NEXT_OBJECT.search(self._buffer, self._position)
            if found:
                self._advance(found.end())
                return True
            self._advance(max(self._position, len(self._buffer) - 1))  # its last character may be the line end
            if not self._read_more():
                return False

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        if self._ended:
            return False
        block = next(self._blocks, b"")
        self._ended = not block
        self._buffer = self._buffer[self._position :] + self._bytes_to_text(block, self._ended)
        self._position = 0
        return not self._ended
