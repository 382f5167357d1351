"""A small spreadsheet language that no model has seen: two functions over line items, periods and dimensions.

    FLOWROLL(LineItem, PeriodCount, BACKWARD | FORWARD)       the sum over a window of periods, for each period
    DIMMATCH(SourceValue, SourceDimension, TargetDimension)   the value of another dimension that a value belongs to

BACKWARD: the window is a period and those before it; FORWARD: and those after it. A window that reaches beyond the
series, or holds a blank, is incomplete, and its sum is blank. A value without a mapping gives blank. Time cannot be the
target of DIMMATCH. Names are written exactly; everything else is a LanguageError, whose message says what is wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches

Series = tuple[int | None, ...]
"""A value for each period; None is blank."""

TIME = "Time"
DIRECTIONS = ("BACKWARD", "FORWARD")
ARGUMENTS = {
    "FLOWROLL": ("LineItem", "PeriodCount", "Direction"),
    "DIMMATCH": ("SourceValue", "SourceDimension", "TargetDimension"),
}

_CALL = re.compile(r"\s*([A-Za-z_]+)\s*\((.*)\)\s*", re.DOTALL)


class LanguageError(ValueError):
    """A formula that cannot be; the message is an answer by itself."""


@dataclass(frozen=True)
class Sheet:
    """What formulas are about."""

    periods: tuple[str, ...] = ()
    line_items: dict[str, Series] = field(default_factory=dict)
    mappings: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    """(source dimension, target dimension): value in the source → value in the target."""
    dimensions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name → values. Time has the periods."""


def evaluate(formula: str, sheet: Sheet) -> Series | str | None:
    """What a formula gives: a value for each period (FLOWROLL), or a value of the target dimension (DIMMATCH).

    None is blank. Raises LanguageError.
    """
    call = _CALL.fullmatch(formula)
    if call is None:
        raise LanguageError("a formula is a function with its arguments in parentheses")
    name, arguments = call[1], [argument.strip() for argument in call[2].split(",")]
    if name not in ARGUMENTS:
        close = get_close_matches(name.upper(), ARGUMENTS, n=1, cutoff=0.5)
        raise LanguageError(f"there is no function {name}" + (f"; it is {close[0]}" if close else ""))
    if len(arguments) != len(ARGUMENTS[name]) or "" in arguments:
        raise LanguageError(f"{name} takes three arguments: {', '.join(ARGUMENTS[name])}")
    return _flowroll(sheet, *arguments) if name == "FLOWROLL" else _dimmatch(sheet, *arguments)


def _flowroll(sheet: Sheet, line_item: str, period_count: str, direction: str) -> Series:
    if line_item not in sheet.line_items:
        if period_count in sheet.line_items or direction in sheet.line_items:
            raise LanguageError("the line item comes first: FLOWROLL(LineItem, PeriodCount, Direction)")
        raise LanguageError(f"there is no line item {line_item}")
    if period_count in DIRECTIONS:
        raise LanguageError("the direction comes last: FLOWROLL(LineItem, PeriodCount, Direction)")
    if not period_count.isdecimal() or int(period_count) < 1:
        raise LanguageError(f"PeriodCount is a whole number from 1, not {period_count}")
    if direction not in DIRECTIONS:
        raise LanguageError(f"the direction is BACKWARD or FORWARD, not {direction}")
    values = sheet.line_items[line_item]
    return rolled(values, int(period_count), forward=direction == "FORWARD")


def rolled(values: Series, count: int, *, forward: bool) -> Series:
    """The sums over windows of `count` periods that begin (forward) or end at each period."""
    sums: list[int | None] = []
    for period in range(len(values)):
        first = period if forward else period - count + 1
        window = values[max(first, 0) : first + count]
        complete = [value for value in window if value is not None]
        sums.append(sum(complete) if len(complete) == count else None)
    return tuple(sums)


def _dimmatch(sheet: Sheet, value: str, source: str, target: str) -> str | None:
    if target == TIME:
        raise LanguageError("Time cannot be the target of DIMMATCH")
    if value in sheet.dimensions and source not in sheet.dimensions:
        raise LanguageError("the value comes first: DIMMATCH(SourceValue, SourceDimension, TargetDimension)")
    for dimension in (source, target):
        if dimension not in sheet.dimensions:
            raise LanguageError(f"there is no dimension {dimension}")
    if value not in sheet.dimensions[source]:
        raise LanguageError(f"{value} is no value of {source}")
    return sheet.mappings.get((source, target), {}).get(value)
