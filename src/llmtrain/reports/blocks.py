"""The parts of a report for a terminal or a page: values, a table, bars, lines, passages of text, pictures.

`cli.block_text` writes blocks for a terminal, `block_page` for a browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Span(NamedTuple):
    """Text of one kind."""

    text: str
    supervised: bool = False
    control: bool = False


@dataclass(frozen=True)
class Values:
    """Names with values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Columns; the first is aligned to the left, the others to the right. A head without words is not shown.

    On a terminal, tables with the same head are aligned with each other, and the first of them shows it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    dispensable: Sequence[str] = ()
    """Columns that a narrow terminal leaves out, in this order."""


@dataclass(frozen=True)
class Bars:
    """Counts as bars: a histogram, or shares."""

    title: str
    rows: Sequence[tuple[str, int]]
    note: str = ""
    """Stands below the title."""


@dataclass(frozen=True)
class Lines:
    """Sentences below a title."""

    title: str
    lines: Sequence[str]
    kind: Literal["note", "warning", "fault"] = "note"


@dataclass(frozen=True)
class Passage:
    """Text from the data, in sections with or without a heading."""

    caption: str
    sections: Sequence[tuple[str | None, Sequence[Span]]]


@dataclass(frozen=True)
class Picture:
    """A drawing, with what stands in its place on a terminal."""

    title: str
    svg: str
    """Made by `html.render`, so what came from the data is escaped."""
    instead: Values | Table | Bars | Lines
    note: str = ""
    """Stands below the title on a page."""


Block = Values | Table | Bars | Lines | Passage | Picture


def legend_at(blocks: Sequence[Block]) -> int | None:
    """Return the index of the first passage, above which a legend stands; None where no text is supervised."""
    passages = [(index, block) for index, block in enumerate(blocks) if isinstance(block, Passage)]
    if any(span.supervised for _, passage in passages for _, spans in passage.sections for span in spans):
        return passages[0][0]
    return None
