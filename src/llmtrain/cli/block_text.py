"""Renders blocks as text for a terminal: aligned, wrapped to its width, in colour if the terminal has colours."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from llmtrain.reports.blocks import Bars, Block, Lines, Passage, Picture, Span, Table, Values, legend_at
from llmtrain.screen import columns_of, padded, visible, wrapped

BAR_WIDTH = 40
MIN_ROOM = 20
"""Number of columns that a value needs beside its name; with fewer it is put below the name."""
INDENT = "    │ "
BELOW = "  "
"""Beginning of a line of cells that are below the first cell of their row."""
_STYLES = {(True, False): "32", (True, True): "1;32", (False, True): "36"}
"""Styles by (span is learned, span is a control token): green, bold green, cyan."""


def wants_colour() -> bool:
    """Return whether stdout is a terminal that shows colours; NO_COLOR and FORCE_COLOR have their usual meaning."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")


def as_text(blocks: Sequence[Block], *, colour: bool, width: int | None = None) -> str:
    """Return the blocks with an empty line between them, wrapped to `width`."""
    written = [block.instead if isinstance(block, Picture) else block for block in blocks]
    by_head: dict[tuple[str, ...], list[Table]] = defaultdict(list)
    for block in written:
        if isinstance(block, Table):
            by_head[tuple(block.head)].append(block)
    texts = []
    for block in written:
        alike = by_head[tuple(block.head)] if isinstance(block, Table) else []
        texts.append(
            "\n".join(_table(block, alike, width) if isinstance(block, Table) else _lines(block, colour, width))
        )
    if (first := legend_at(blocks)) is not None:
        learned, control = "\x1b[32mgreen\x1b[0m", "\x1b[36mcyan\x1b[0m"
        how = f"in {learned}; control tokens: {control}" if colour else "between ⟦ and ⟧"
        texts.insert(first, f"what is learned is {how}")
    return "\n\n".join(text for text in texts if text)


def _lines(block: Values | Bars | Lines | Passage, colour: bool, width: int | None) -> Iterator[str]:
    match block:
        case Values(rows):
            yield from _values([(visible(name), visible(value)) for name, value in rows], width)
        case Bars(title, rows, note):
            yield from wrapped(visible(title), width, indent=2)
            if note:
                yield from wrapped(f"  {visible(note)}", width)
            most = max((count for _, count in rows), default=0)
            longest = max((columns_of(visible(label)) for label, _ in rows), default=0)
            digits = max((len(f"{count:,}") for _, count in rows), default=0)
            room = BAR_WIDTH if width is None else max(1, min(BAR_WIDTH, width - longest - digits - 6))
            for label, count in rows:
                bar = "█" * -(-count * room // max(1, most))
                yield f"  {padded(visible(label), longest, right=True)}  {count:>{digits},}  {bar}".rstrip()
        case Lines(title, lines, kind):
            style = {"fault": "1;31", "warning": "1;33", "note": ""}[kind] if colour else ""
            for line in wrapped(visible(title), width, indent=2):
                yield _coloured(line, style)
            for line in (visible(line) for text in lines for line in text.split("\n")):
                yield from wrapped(f"  {line}", width, indent=2)
        case Passage(caption, sections):
            yield from wrapped(visible(caption), width, indent=2)
            room_for_text = None if width is None else max(10, width - len(INDENT))
            for heading, spans in sections:
                if heading is not None:
                    yield from wrapped(f"  ── {visible(heading)}", width, indent=3)
                for runs in _wrapped([*_runs(spans, colour)], room_for_text):
                    yield INDENT + "".join(_coloured(text, style) for text, style in runs)


def _values(rows: Sequence[tuple[str, str]], width: int | None) -> Iterator[str]:
    """Yield names and values in two columns; a value that is too wide is put below its name."""
    longest = max((columns_of(name) for name, _ in rows), default=0)
    room = None if width is None else width - longest - 2
    for name, value in rows:
        lines = wrapped(value, room)
        if room is not None and len(value) > room and (room < MIN_ROOM or any(columns_of(one) > room for one in lines)):
            yield name
            yield from wrapped(f"  {value}", width)
        else:
            yield f"{padded(name, longest)}  {lines[0]}".rstrip()
            yield from (f"{' ' * longest}  {line}" for line in lines[1:])


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(table: Table, alike: Sequence[Table], width: int | None) -> Iterator[str]:
    """Yield the lines of a table. If it is too wide, dispensable columns are left out; then it is divided into parts.

    Each part repeats the first column. Tables that are `alike` have the same column widths.
    """
    if table.title:
        yield from wrapped(visible(table.title), width, indent=2)
    head = [visible(cell) for cell in table.head]
    rows = [[visible(cell) for cell in row] for row in table.rows]
    widths = _widths([head, *([visible(cell) for cell in row] for one in alike for row in one.rows)])
    kept = list(range(len(head)))
    for name in table.dispensable:
        if width is not None and sum(widths[column] + 2 for column in kept) > width:
            kept.remove(head.index(name))
    first, parts = _layout(widths, kept[1:], width)
    shown = [head, *rows] if any(head) and (table is alike[0] or len(parts) > 1) else rows
    for number, part in enumerate(parts):
        if number:
            yield ""
        for row in shown:
            yield from _row(row, first, {column: widths[column] for column in part}, width)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(columns_of, column)) for column in zip(*rows, strict=True)]


def _layout(widths: list[int], columns: Sequence[int], width: int | None) -> tuple[int | None, list[list[int]]]:
    """Return the width of the first column, or None if the others are put below it, and the columns of each part.

    They are put below it if that avoids a division. Lowers `widths` to the available width.
    """
    if width is None:
        return widths[0], [list(columns)]
    beside, below = width - 2 - widths[0], width - len(BELOW)
    fits = widths[0] <= width // 2 or all(widths[column] + 2 <= beside for column in columns)
    is_beside = fits and (len(_parts(widths, columns, beside)) == 1 or len(_parts(widths, columns, below)) > 1)
    room = beside if is_beside else below
    for column in columns:
        widths[column] = min(widths[column], room - 2)
    return widths[0] if is_beside else None, _parts(widths, columns, room)


def _parts(widths: Sequence[int], columns: Sequence[int], room: int) -> list[list[int]]:
    """Divide the columns into parts that fit into `room`, each of at least one column."""
    parts: list[list[int]] = [[]]
    for column in columns:
        if parts[-1] and sum(widths[one] + 2 for one in [*parts[-1], column]) > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def _row(row: Sequence[str], first: int | None, widths: Mapping[int, int], width: int | None) -> Iterator[str]:
    """Yield the lines of a row; a cell that is wrapped is aligned to the left.

    If a word is wider than its column, the cells are put below the first one.
    """
    cells = {column: wrapped(row[column], room) for column, room in widths.items()}
    taken = sum(2 + max(widths[column], *map(columns_of, cell)) for column, cell in cells.items())
    if first is None or (width is not None and 2 + first + taken > width):
        if row[0]:
            yield from wrapped(f"  {row[0]}", width, indent=2)
        begin = BELOW
    else:
        begin = "  " + padded(row[0], first)
    for number in range(max(map(len, cells.values()), default=1)):
        line = begin if not number else " " * columns_of(begin)
        for column, cell in cells.items():
            text = cell[number] if number < len(cell) else ""
            line += "  " + padded(text, widths[column], right=len(cell) == 1)
        yield line.rstrip()


# -- text of the data --------------------------------------------------------------------------------------------------

Run = tuple[str, str]
"""Text and its style; the style may be empty."""


def _runs(spans: Sequence[Span], colour: bool) -> Iterator[Run]:
    """Yield the spans with their colours, or with marks around learned text."""
    if colour:
        for span in spans:
            yield visible(span.text), _STYLES.get((span.supervised, span.control), "")
        return
    for learned, together in groupby(spans, lambda span: span.supervised):
        text = "".join(visible(span.text) for span in together)
        yield (f"⟦{text}⟧" if learned else text), ""


def _wrapped(runs: Sequence[Run], width: int | None) -> Iterator[list[Run]]:
    """Yield lines of runs: cut at line ends and, where `width` is full, after a blank if there is one.

    `screen.wrapped` and Rich would drop blanks, but this is text of the data, shown as it is.
    """
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
