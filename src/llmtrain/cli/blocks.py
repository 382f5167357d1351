"""The parts of a report that is read on a terminal or on a page: figures, a table, bars, lines, passages of text.

What a report says is put together once, as blocks; `as_text` here and `cli.page` write them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


def as_text(blocks: Sequence[Block], *, colour: bool) -> str:
    """The blocks for a terminal, an empty line between them."""
    texts = ["\n".join(_lines(block, colour)) for block in blocks]
    if has_supervision(blocks):
        first = next(index for index, block in enumerate(blocks) if isinstance(block, Passage))
        learned, control = "\x1b[32mgreen\x1b[0m", "\x1b[36mcyan\x1b[0m"
        how = f"in {learned}; control tokens: {control}" if colour else "between ⟦ and ⟧"
        texts.insert(first, f"what is learned is {how}")
    return "\n\n".join(text for text in texts if text)


def visible(text: str) -> str:
    """`text` with what a terminal would obey written out."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else ascii(found[0])[1:-1], text)


def _lines(block: Block, colour: bool) -> Iterator[str]:
    match block:
        case Figures(rows):
            width = max((len(name) for name, _ in rows), default=0)
            yield from (f"{name:<{width}}  {visible(value)}" for name, value in rows)
        case Table(title, head, rows):
            yield title
            yield from columns(head, [[visible(cell) for cell in row] for row in rows])
        case Bars(title, rows):
            yield title
            most = max((count for _, count in rows), default=0)
            width = max((len(label) for label, _ in rows), default=0)
            digits = max((len(f"{count:,}") for _, count in rows), default=0)
            for label, count in rows:
                bar = "█" * -(-count * BAR_WIDTH // max(1, most))
                yield f"  {label:>{width}}  {count:>{digits},}  {bar}".rstrip()
        case Lines(title, lines, kind):
            styles = {"fault": "1;31", "warning": "1;33", "note": ""}
            yield f"\x1b[{styles[kind]}m{title}\x1b[0m" if colour and styles[kind] else title
            yield from (f"  {visible(line)}" for text in lines for line in text.split("\n"))
        case Passage(caption, sections):
            yield visible(caption)
            for heading, pieces in sections:
                if heading is not None:
                    yield f"  ── {visible(heading)}"
                yield INDENT + _styled(pieces, colour).replace("\n", "\n" + INDENT)


def _styled(pieces: Sequence[Piece], colour: bool) -> str:
    if not colour:
        text = "".join(f"⟦{visible(piece.text)}⟧" if piece.supervised else visible(piece.text) for piece in pieces)
        return text.replace("⟧⟦", "")
    return "".join(_coloured(visible(piece.text), _STYLES.get((piece.supervised, piece.control))) for piece in pieces)


def _coloured(text: str, style: str | None) -> str:
    """Each line by itself, so that what stands before the next one has no colour."""
    if style is None:
        return text
    return "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
