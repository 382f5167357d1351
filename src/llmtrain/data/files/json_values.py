"""Parse the values of a JSON file one by one, in bounded memory, however the file is laid out.

A file holds one array, whose elements are the values, or values one after the other, each over any number of lines. An
error stands in the place of a value, and reading goes on where that is possible.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

_BLANKS = re.compile(r"[ \t\r\n]*")
_NEXT_OBJECT = re.compile(r"\n(?=\{)")
_TAIL = 16
"""An error within so many characters of the end may be half of a word or of an escape: more is read first."""
_NOT_READ = "; what comes after it is not read"


class JsonValue(NamedTuple):
    """A value of a JSON file, or what is wrong in its place."""

    line: int
    """The line on which it begins, counted from one; the line of the error, if there is one."""
    value: object
    error: str | None
    num_characters: int


def json_values(blocks: Iterable[bytes]) -> Iterator[JsonValue]:
    """Yield the elements of the array that a file holds, or else its values one after the other (one object, or many).

    After a value that is no JSON, reading goes on at the next line that begins with an object; in an array it ends.
    `blocks` is the file's content, split anywhere. Raises what reading them raises.
    """
    reader = _JsonReader(blocks)
    with suppress(_BadEncodingError):
        yield from reader.values()
    if reader.bad_encoding is not None:
        yield reader.bad_encoding


class JsonDecoder:
    """A decoder that says where an object has a key twice: the first value would be lost."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._decode, self._raw_decode = decoder.decode, decoder.raw_decode
        self._fault: str | None = None

    def decode(self, text: str) -> tuple[Any, str | None]:
        """Return the value of a text, and what is wrong with its keys. Raises as json.loads does."""
        self._fault = None
        return self._decode(text), self._fault

    def raw_decode(self, text: str, begin: int) -> tuple[Any, int, str | None]:
        """Return the value that begins there, where it ends, and what is wrong with its keys."""
        self._fault = None
        value, end = self._raw_decode(text, begin)
        return value, end, self._fault

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            self._fault = f"the key {json.dumps(twice)} stands twice in one object: remove one"
        return found


class _BadEncodingError(Exception):
    """The text ends at a byte that is no UTF-8, which is reported in place of the unfinished value before it."""


class _BadJson(ValueError):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"is no JSON ({message})")
        self.line = line


class _JsonReader:
    """Reads a file block by block, and keeps the position up to which its values were taken."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.bad_encoding: JsonValue | None = None
        """The error for the byte at which the text ends, if it is no UTF-8."""
        self._line = 1
        self._blocks = iter(blocks)
        self._bytes_to_text = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decode = JsonDecoder().raw_decode
        self._buffer = ""
        self._position = 0
        self._begun = False
        self._ended = False

    def values(self) -> Iterator[JsonValue]:
        if self._next_character() == "[":
            self._advance(self._position + 1)
            yield from self._elements()
            return
        while self._next_character():
            try:
                yield self._value()
            except _BadJson as error:
                yield JsonValue(error.line, None, str(error), 0)
                if not self._skip_to_next_object():
                    return

    def _elements(self) -> Iterator[JsonValue]:
        try:
            if self._next_character() != "]":
                while True:
                    self._next_character()
                    yield self._value()
                    if self._next_character() != ",":
                        break
                    self._advance(self._position + 1)
            if (character := self._next_character()) != "]":
                if not character and self.bad_encoding:
                    raise _BadEncodingError
                what = f"expected , or ] after a value, not {character!r}" if character else "the array has no end"
                raise _BadJson(self._line, what)
            self._advance(self._position + 1)
            if self._next_character():
                raise _BadJson(self._line, "there is more after the end of the array")
        except _BadJson as error:
            yield JsonValue(error.line, None, f"{error}{_NOT_READ}", 0)

    def _value(self) -> JsonValue:
        """Return the value at the position, and move the position behind it."""
        while True:
            begin = self._position
            try:
                value, end, fault = self._decode(self._buffer, begin)
            except json.JSONDecodeError as error:
                line = self._line + self._buffer.count("\n", begin, error.pos)
                may_go_on = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _TAIL
                if not may_go_on or not self._double():
                    if may_go_on and self.bad_encoding:
                        raise _BadEncodingError from None
                    raise _BadJson(line, error.msg) from None
            except RecursionError:
                raise _BadJson(self._line, "nested too deeply") from None
            except ValueError as error:  # a number of more digits than Python takes
                raise _BadJson(self._line, str(error).partition(";")[0]) from None
            else:
                if end == len(self._buffer) and self._double():
                    continue  # it may be a number that goes on
                line = self._line
                self._advance(self._position + end - begin)
                return JsonValue(line, None if fault else value, fault, end - begin)

    def _next_character(self) -> str:
        """Move to the next character that is no blank, and return it; empty at the end."""
        while True:
            match = _BLANKS.match(self._buffer, self._position)
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
        self._line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _double(self) -> bool:
        """Double what is read but not taken yet, so that a long value is not parsed again for each block."""
        wanted = 2 * (len(self._buffer) - self._position)
        has_more = self._read_more()
        while has_more and len(self._buffer) < wanted and self._read_more():
            pass
        return has_more

    def _read_more(self) -> bool:
        if self._ended:
            return False
        block = next(self._blocks, b"")
        self._ended = not block
        begun, self._begun = self._begun, True
        self._buffer = self._buffer[self._position :]
        self._position = 0
        try:
            self._buffer += self._bytes_to_text(block, self._ended)
        except UnicodeDecodeError as error:
            good = error.object[: error.start].decode()
            self._buffer += good if begun else good.removeprefix("\ufeff")
            self._ended = True
            line = self._line + self._buffer.count("\n")
            byte = error.object[error.start]
            message = f"is not UTF-8 text (byte 0x{byte:02x}: {error.reason}){_NOT_READ}"
            self.bad_encoding = JsonValue(line, None, message, 0)
            return bool(self._buffer)
        return not self._ended
