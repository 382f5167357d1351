"""The values of a JSON file one by one, in bounded memory, however the file is laid out.

A file holds one array, whose elements are the values, or values one after the other, each over any number of lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")
_AT_END = 16
"""An error this near to the end of what was read may be no error: a word or an escape that is cut there."""


class BadJsonError(ValueError):
    """The file is no JSON from here on."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def json_values(stream: TextIO) -> Iterator[tuple[int, object]]:
    """The line on which a value begins, from 1, and the value. Raises BadJsonError, UnicodeDecodeError."""
    text = _Text(stream)
    if text.next_character() == "[":
        text.advance(text.position + 1)
        yield from _elements(text)
        if text.next_character():
            raise BadJsonError(text.line, "there is more text after the end of the array")
    else:
        while text.next_character():
            yield text.line, text.value()


def _elements(text: _Text) -> Iterator[tuple[int, object]]:
    if text.next_character() != "]":
        while True:
            text.next_character()
            yield text.line, text.value()
            if text.next_character() != ",":
                break
            text.advance(text.position + 1)
    if (character := text.next_character()) != "]":
        expected = "the array has no end" if not character else f"expected , or ] after a row, not {character!r}"
        raise BadJsonError(text.line, expected)
    text.advance(text.position + 1)


class _Text:
    """A file that is read chunk by chunk, and how far its values were taken."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._at_end = False
        self._decoder = json.JSONDecoder()
        self.position = 0
        self.line = 1

    def next_character(self) -> str:
        """The next character that is no blank, which `position` then is at; an empty string at the end."""
        while True:
            match = _BLANKS.match(self._text, self.position)
            assert match
            self.advance(match.end())
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._read_more(_CHUNK):
                return ""

    def value(self) -> object:
        """The value at `position`, which then is after it."""
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.position)
                if end < len(self._text) or not self._read_more(size):  # else it may be a number that goes on
                    break
            except json.JSONDecodeError as error:
                is_cut = error.pos + _AT_END > len(self._text) or error.msg.startswith("Unterminated string")
                if not (is_cut and self._read_more(size)):
                    line = self.line + self._text.count("\n", self.position, error.pos)
                    raise BadJsonError(line, f"is no JSON ({error.msg})") from None
            except RecursionError:
                raise BadJsonError(self.line, "is no JSON that can be read (nested too deeply)") from None
            size *= 2  # so that a long value is not parsed again for each chunk
        self.advance(end)
        return value

    def advance(self, position: int) -> None:
        """Go on to `position`, counting lines."""
        self.line += self._text.count("\n", self.position, position)
        self.position = position

    def _read_more(self, size: int) -> bool:
        chunk = "" if self._at_end else self._stream.read(size)
        if not chunk:
            self._at_end = True
            return False
        self._text = self._text[self.position :] + chunk
        self.position = 0
        return True
