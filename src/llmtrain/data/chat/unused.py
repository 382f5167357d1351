"""Counts of what rows hold and a run does not use, by name: fields, keys of turns, parts of tools and calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llmtrain.screen import counted


class Unused(NamedTuple):
    """Rows that hold something which is not used."""

    rows: int
    first: str
    """`file:line`."""


def add_unused(counts: dict[str, Unused], later: Mapping[str, Unused]) -> None:
    """Count in what was counted of rows that come after those counted so far."""
    for name, (rows, first) in later.items():
        before = counts.get(name, Unused(0, first))
        counts[name] = Unused(before.rows + rows, before.first)


def unused_line(counts: Mapping[str, Unused]) -> str | None:
    """Return what to say of values that are not used; None where there are none."""
    if not counts:
        return None
    by_count = sorted(counts.items(), key=lambda item: -item[1].rows)
    named = ", ".join(f"{name} ({counted(count.rows, 'row')}, the first is {count.first})" for name, count in by_count)
    return f"rows hold what is neither shown to the model nor used otherwise: {named}"
