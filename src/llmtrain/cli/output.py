"""The result of a command, and functions that print it: as one JSON document, or as blocks of text."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmtrain.reports.blocks import Block, Values
from llmtrain.runs.json_files import json_value
from llmtrain.screen import CONTROL, known_width, visible


class Outcome(NamedTuple):
    """The result of a command: `document` is printed with --json, `text` without."""

    document: Any
    text: str | Sequence[Block]
    """Blocks are wrapped to the terminal; a text, such as YAML, keeps its lines."""
    exit_code: int = 0
    """1 if the command worked and its answer is no; 2 if the rows that it read have faults."""


def json_document(document: Any) -> str:
    """Return strict JSON: numbers that are not finite are null, paths are text, and control characters are escaped."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")  # pytest's has none
    text = json.dumps(json_value(document), indent=2, ensure_ascii=not is_unicode, allow_nan=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def printable(text: str | Sequence[Block], *, stream: int = 1) -> str:
    """Return the text of an Outcome for stdout (1) or stderr (2), with control characters escaped."""
    if isinstance(text, str):
        return visible(text)
    from llmtrain.cli.block_text import as_text, wants_colour

    return as_text(text, colour=wants_colour(), width=known_width(stream))


def named_values(result: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> Values:
    """Return label and value for each row (label, key) whose key has a value in `result`."""
    return Values([(label, show(result[key])) for label, key in rows if result.get(key) is not None])


class _LastingFile(io.FileIO):
    """File of a standard stream. Once its reader has left (`| head`, a closed terminal), the rest is discarded."""

    def __init__(self, descriptor: int, *, reader_left: frozenset[int] | None) -> None:
        """`reader_left`: the errors that mean that; None: all errors, so that no failed write stops the program."""
        super().__init__(descriptor, "wb", closefd=False)
        self._reader_left = reader_left
        self.has_reader = True

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.has_reader = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for C libraries and child processes too
            if self._reader_left is not None and error.errno not in self._reader_left:
                raise
            return len(data)


def keep_streams() -> None:
    """Keep writes to stdout and stderr from ending the program when a reader leaves or an encoding lacks a character.

    Such characters are written as `\\xe9`, `\\u4f60`. Output to a closed stream is discarded; a closed stdin is empty.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    if sys.stdin is None:  # Python's for a closed one
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _lasting(sys.stdout, 1, reader_left=frozenset({errno.EPIPE, errno.EIO}))
    sys.stderr = _lasting(sys.stderr, 2, reader_left=None)


def _lasting(stream: Any, descriptor: int, *, reader_left: frozenset[int] | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, reader_left=reader_left)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def stdout_is_read() -> bool:
    """Return whether everything that was written to stdout so far could be written."""
    sys.stdout.flush()
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return not isinstance(file, _LastingFile) or file.has_reader


def show(value: Any) -> str:
    """Return a value as text for a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def gigabytes(num_bytes: int) -> str:
    """Return a size in GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e9:.3f} GB"
