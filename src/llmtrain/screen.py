"""Text as a screen shows it: control characters written out, widths in columns, lines wrapped between words.

Text from elsewhere (names, rows, messages, what a model wrote) passes `visible` before it is printed or logged: a
terminal obeys escape sequences, and marks of the writing direction move the text beside them.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal or a page obeys: escape sequences, carriage returns, changes of the writing direction."""
_WIDE = "\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
_UNIT = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+|\s+")
"""Units that a line is broken between: blanks, words, and characters of scripts that are written without spaces."""


def visible(text: str) -> str:
    """Return `text` with its control characters written out."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else ascii(found[0])[1:-1], text)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: `counted(1, "row")` is "1 row", `counted(2000, "row")` "2,000 rows".

    `many`: the plural, where `one` with an s (es after a hiss) is not; both may go on ("row is", "rows are").
    """
    if number == 1:
        return f"1 {one}"
    return f"{number:,} {many or one + ('es' if one.endswith(('s', 'x', 'ch', 'sh')) else 's')}"


def columns_of(text: str) -> int:
    """Return how many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    return sum(_columns_of_character(character) for character in text)


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Return `text` filled up with blanks to `width` columns, on its right or its left."""
    blanks = " " * (width - columns_of(text))
    return blanks + text if right else text + blanks


def wrapped(text: str, width: int | None, *, indent: int = 0) -> list[str]:
    """Return `text`, a line, as lines of at most `width` columns; the further ones begin with `indent` blanks more.

    A line is broken between words only, so a word that is longer than a line stays whole. None: one line.
    """
    if width is None or columns_of(text) <= width:
        return [text]
    own = text[: len(text) - len(text.lstrip(" "))]
    lines, line, used, gap = [], own, len(own), ""
    begin = own + " " * indent
    for unit in _UNIT.findall(text[len(own) :]):
        if unit.isspace():
            gap = unit
            continue
        taken = columns_of(unit)
        if line.strip() and used + len(gap) + taken > width:
            lines.append(line)
            line, used = begin, len(begin)
        elif line.strip():
            line, used = line + gap, used + len(gap)
        line, used, gap = line + unit, used + taken, ""
    return [*lines, line]


def known_width(descriptor: int) -> int | None:
    """Return the columns that a stream (1: stdout, 2: stderr) is shown in, to which it is wrapped; None if unknown.

    COLUMNS wins. Of a pipe it is the width of this process's terminal, on which the pipe's reader mostly writes; a file
    and a pipe without a terminal get whole lines.
    """
    if (given := os.environ.get("COLUMNS", "")).isdigit() and int(given) > 0:
        return int(given)
    for one in (descriptor, *((2, 0) if _is_pipe(descriptor) else ())):
        try:
            return os.get_terminal_size(one).columns or None
        except OSError:
            continue
    return None


def _columns_of_character(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False
