"""What a verb hands back, and how it is written: one JSON document, or a short aligned table."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a verb has to say: `document` with --json, `text` without."""

    document: Any
    text: str
    exit_code: int = 0
    """1 where what was asked for was done, and the answer is no; 2 where rows were looked at, and have faults."""


def json_document(document: Any) -> str:
    """Strict JSON: what is not finite is null, and a path is text."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)


def table(result: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> str:
    """The rows (label, key) that `result` has a value for, in two columns."""
    shown = [(label, show(result[key])) for label, key in rows if result.get(key) is not None]
    width = max((len(label) for label, _ in shown), default=0)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in shown)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, with_head: bool = True) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right, two blanks before each.

    `head` is of the same width whether it is shown or not, so that several tables stand below each other.
    """
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows] if with_head else rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def drop_stdout() -> int:
    """The reader of stdout went away (`| head`): that is no error worth words, and the flush at exit must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def show(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    return str(value)
