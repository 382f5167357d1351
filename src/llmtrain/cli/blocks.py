"""The parts of a report that is read on a terminal or on a page: figures, a table, bars, lines, passages of text.

What a report says is put together once, as blocks; `as_text` here and `cli.page` write them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from llmtrain.cli.output import columns

BAR_WIDTH = 40
INDENT = "    │ "
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey, or a page: escape sequences, carriage returns, a change of the writing direction."""
_STYLES = {(True, False): "32", (True, True): "1;32", (False, True): "36"}
"""By whether a piece is learned, and whether it is a control token: green, bold green, cyan."""


class Piece(NamedTuple):
    """Text of one kind."""

    text: str
    supervised: bool = False
    control: bool = False


@dataclass(frozen=True)
class Figures:
    """Names with values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Columns; the first to the left, the others to the right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Bars:
    """A histogram, or shares."""

    title: str
    rows: Sequence[tuple[str, int]]
    note: str = ""
    """Below the title."""


@dataclass(frozen=True)
class Lines:
    """Sentences below a title."""

    title: str
    lines: Sequence[str]
    kind: Literal["note", "warning", "fault"] = "note"


@dataclass(frozen=True)
class Passage:
    """Text out of the data, in sections with a heading or none."""

    caption: str
    sections: Sequence[tuple[str | None, Sequence[Piece]]]


Block = Figures | Table | Bars | Lines | Passage


def has_supervision(blocks: Sequence[Block]) -> bool:
    """Whether there is text of which a part is learned, so that it has to be said how that is shown."""
    passages = (block for block in blocks if isinstance(block, Passage))
    return any(piece.supervised for passage in passages for _, pieces in passage.sections for piece in pieces)


def wants_colour() -> bool:
    """Whether stdout is a terminal that shows colours; NO_COLOR and FORCE_COLOR have their usual meaning."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


def terminal_width() -> int | None:
    """Columns of stdout, where it is a terminal: what is longer is wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def as_text(blocks: Sequence[Block], *, colour: bool, width: int | None = None) -> str:
    """The blocks for a terminal, an empty line between them; sentences and passages are wrapped to `width`."""
    texts = ["\n".join(_lines(block, colour, width)) for block in blocks]
    if has_supervision(blocks):
        first = next(index for index, block in enumerate(blocks) if isinstance(block, Passage))
        learned, control = "\x1b[32mgreen\x1b[0m", "\x1b[36mcyan\x1b[0m"
        how = f"in {learned}; control tokens: {control}" if colour else "between ⟦ and ⟧"
        texts.insert(first, f"what is learned is {how}")
    return "\n\n".join(text for text in texts if text)


def visible(text: str) -> str:
    """`text` with what a terminal would obey written out."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else ascii(found[0])[1:-1], text)


def _lines(block: Block, colour: bool, width: int | None) -> Iterator[str]:
    match block:
        case Figures(rows):
            longest = max((len(name) for name, _ in rows), default=0)
            yield from (f"{name:<{longest}}  {visible(value)}" for name, value in rows)
        case Table(title, head, rows):
            yield title
            yield from columns(head, [[visible(cell) for cell in row] for row in rows])
        case Bars(title, rows, note):
            yield title
            if note:
                yield f"  {note}"
            most = max((count for _, count in rows), default=0)
            longest = max((len(label) for label, _ in rows), default=0)
            digits = max((len(f"{count:,}") for _, count in rows), default=0)
            for label, count in rows:
                bar = "█" * -(-count * BAR_WIDTH // max(1, most))
                yield f"  {label:>{longest}}  {count:>{digits},}  {bar}".rstrip()
        case Lines(title, lines, kind):
            styles = {"fault": "1;31", "warning": "1;33", "note": ""}
            yield _coloured(title, styles[kind] if colour else "")
            for line in (visible(line) for text in lines for line in text.split("\n")):
                whole = [line] if width is None else _wrapped_sentence(line, width)
                yield from (f"{'    ' if number else '  '}{part}" for number, part in enumerate(whole))
        case Passage(caption, sections):
            yield visible(caption)
            room = None if width is None else max(10, width - len(INDENT))
            for heading, pieces in sections:
                if heading is not None:
                    yield f"  ── {visible(heading)}"
                for runs in _wrapped([*_runs(pieces, colour)], room):
                    yield INDENT + "".join(_coloured(text, style) for text, style in runs)


def _wrapped_sentence(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, max(20, width - 4), break_long_words=False, break_on_hyphens=False) or [""]


Run = tuple[str, str]
"""Text and its style, empty for none."""


def _runs(pieces: Sequence[Piece], colour: bool) -> Iterator[Run]:
    """The pieces with their colours, or with marks around what is learned."""
    if colour:
        for piece in pieces:
            yield visible(piece.text), _STYLES.get((piece.supervised, piece.control), "")
        return
    for learned, together in groupby(pieces, lambda piece: piece.supervised):
        text = "".join(visible(piece.text) for piece in together)
        yield (f"⟦{text}⟧" if learned else text), ""


def _wrapped(runs: Sequence[Run], width: int | None) -> Iterator[list[Run]]:
    """Lines of runs: cut at line ends, and where `width` is full, after a blank if there is one."""
    line: list[Run] = []
    used = 0
    for text, style in runs:
        for number, part in enumerate(text.split("\n")):
            if number:
                yield line
                line, used = [], 0
            while width is not None and used + len(part) > width:
                cut = part.rfind(" ", 0, width - used + 1) + 1
                if not cut and not used:
                    cut = width
                yield [*line, (part[:cut].rstrip(" "), style)]
                part, line, used = part[cut:], [], 0
            line.append((part, style))
            used += len(part)
    yield line


def _coloured(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if text and style else text
