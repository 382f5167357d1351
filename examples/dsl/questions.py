"""Questions about the language, with answers that the reference implementation works out.

Each function draws one question from a generator of random numbers. `PLAIN` are what a user asks; `TRAPS` are formulas
that look right: arguments in another order, Time as the target, an unknown direction, a window that is longer than the
series, and names that resemble each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from examples.dsl.language import DIRECTIONS, TIME, LanguageError, Series, Sheet, evaluate

PERIODS = (
    tuple("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()),
    tuple(f"Q{quarter} FY{year}" for year in range(24, 27) for quarter in range(1, 5)),
    tuple(f"Week {number}" for number in range(1, 13)),
)
LINE_ITEMS = (
    "Revenue, Net Revenue, Revenue Plan, Cost, Unit Cost, Cost Plan, Headcount, New Hires, Leavers, Units, Units Sold, "
    "Orders, Open Orders, Returns, Cash In, Cash Out, Payroll, Bookings, Billings, Backlog, Demand, Shipments, Stock, "
    "Safety Stock, Visits, Signups, Churn, Rent, Travel, Margin"
).split(", ")
SIMILAR = (
    ("Revenue", "Net Revenue"),
    ("Revenue", "Revenue Plan"),
    ("Cost", "Unit Cost"),
    ("Units", "Units Sold"),
    ("Orders", "Open Orders"),
    ("Stock", "Safety Stock"),
    ("Cash In", "Cash Out"),
)
DIMENSIONS = {
    "City": "Lyon Turin Porto Graz Gent Malmo Cork Brno Split Basel Leeds Bonn".split(),
    "Country": "France Italy Portugal Austria Belgium Sweden Ireland Switzerland Germany".split(),
    "Product": "P10 P11 P12 P20 P21 P22 P30 P31 P32 P40".split(),
    "Family": "Pumps Valves Filters Motors Sensors".split(),
    "Employee": "Ada Bela Cleo Dov Emre Fay Gus Hana Ivo Jun".split(),
    "Team": "Sales Finance Support Research Logistics".split(),
    "Account": "4000 4010 4020 5000 5010 6000 6100".split(),
    "Statement Line": ["Income", "Cost of Sales", "Overheads", "Interest"],
    "Store": "S1 S2 S3 S4 S5 S6 S7 S8".split(),
    "Region": "North South East West Centre".split(),
    TIME: "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(),
    "Season": "Winter Spring Summer Autumn".split(),
}
PAIRS = (
    ("City", "Country"),
    ("Product", "Family"),
    ("Employee", "Team"),
    ("Account", "Statement Line"),
    ("Store", "Region"),
    ("City", "Region"),
    ("Store", "City"),
    (TIME, "Season"),
)
WRONG_DIRECTIONS = ("BACKWARDS", "BACK", "FORWARDS", "AHEAD", "PAST", "NEXT", "LEFT", "UP", "TRAILING", "BOTH")
WRONG_NAMES = {
    "FLOWROLL": ("ROLLFLOW", "FLOWROL", "FLOWROLLS", "ROLLSUM", "FLOW_ROLL"),
    "DIMMATCH": ("DIMMAP", "DIMATCH", "MATCHDIM", "DIMLOOKUP", "DIM_MATCH"),
}
EXPLAINED = {
    "FLOWROLL": (
        "FLOWROLL sums a line item over a window of periods, for each period.",
        "Use FLOWROLL(LineItem, PeriodCount, Direction); the direction is BACKWARD (a period and those before it) or "
        "FORWARD (a period and those after it).",
        "Where the window reaches beyond the series or holds a blank, it is incomplete, and the result is blank.",
    ),
    "DIMMATCH": (
        "DIMMATCH looks up which value of another dimension a value belongs to.",
        "Use DIMMATCH(SourceValue, SourceDimension, TargetDimension); Time cannot be the target.",
        "Where the value has no mapping, the result is blank.",
    ),
}
"""What it is, how it is used, and when it is blank."""


class Question(NamedTuple):
    """What is asked, and what is right."""

    kind: str
    prompt: str
    answer: str


Maker = Callable[[random.Random], Question]


# -- FLOWROLL ----------------------------------------------------------------------------------------------------------


def flowroll_series(rng: random.Random) -> Question:
    """What a formula gives in every period."""
    sheet = _series(rng, [rng.choice(LINE_ITEMS)])
    formula = _flowroll(rng, sheet)
    ask = rng.choice(["What does {} give for each period?", "Work out {}.", "Evaluate {} for all periods."])
    return Question("flowroll-series", f"{_table(sheet)}\n{ask.format(formula)}", _answer(formula, sheet))


def flowroll_period(rng: random.Random) -> Question:
    """What a formula gives in one period, with the sum."""
    sheet = _series(rng, [rng.choice(LINE_ITEMS)])
    formula = _flowroll(rng, sheet)
    period = rng.choice(sheet.periods)
    ask = rng.choice(["What is {} in {}?", "Give the value of {} in {}.", "What does {} show for {}?"])
    values = evaluate(formula, sheet)
    assert isinstance(values, tuple)
    prompt = f"{_table(sheet)}\n{ask.format(formula, period)}"
    return Question("flowroll-period", prompt, _shown(values[sheet.periods.index(period)]))


def flowroll_formula(rng: random.Random) -> Question:
    """Which formula says what is wanted."""
    line_item, count, direction = rng.choice(LINE_ITEMS), rng.randint(2, 24), rng.choice(DIRECTIONS)
    where = "before it" if direction == "BACKWARD" else "after it"
    total = rng.choice(["total", "sum"])
    unit = rng.choice(["months", "weeks", "quarters", "periods"])
    ask = rng.choice(
        [
            f"Write the formula for the {total} of {line_item} over {count} {unit}: the current one and those {where}.",
            f"I need, for each of the {unit}, the {total} of {line_item} in it and the {count - 1} {where}.",
            f"Which formula gives a rolling {total} of {line_item} over {count} {unit}, this one and those {where}?",
        ]
    )
    return Question("flowroll-formula", ask, f"FLOWROLL({line_item}, {count}, {direction})")


# -- DIMMATCH ----------------------------------------------------------------------------------------------------------


def dimmatch_value(rng: random.Random) -> Question:
    """What a lookup gives, mapped or not."""
    sheet, source, target = _mapped(rng)
    formula = f"DIMMATCH({rng.choice(sheet.dimensions[source])}, {source}, {target})"
    ask = rng.choice(["What does {} give?", "Work out {}.", "What is {}?"])
    return Question(
        "dimmatch-value", f"{_mapping(sheet, source, target)}\n{ask.format(formula)}", _answer(formula, sheet)
    )


def dimmatch_formula(rng: random.Random) -> Question:
    """Which formula looks a value up."""
    source, target = rng.choice(PAIRS)
    value = rng.choice(DIMENSIONS[source])
    ask = rng.choice(
        [
            f"Write the formula for the {target} of the {source} {value}.",
            f"Which formula finds the {target} that {value} belongs to? {value} is a value of {source}.",
            f"Look up {value}, a {source}, in the dimension {target}: what is the formula?",
            f"From {source} to {target}: which formula for {value}?",
        ]
    )
    return Question("dimmatch-formula", ask, f"DIMMATCH({value}, {source}, {target})")


# -- both --------------------------------------------------------------------------------------------------------------


def concept(rng: random.Random) -> Question:
    """What a function is and takes."""
    name = rng.choice(list(EXPLAINED))
    what, arguments, special = EXPLAINED[name]
    asked, answer = rng.choice(
        [
            ("What is {}?", f"{what} {special}"),
            ("What does {} do?", f"{what} {special}"),
            ("Explain {}.", f"{what} {arguments} {special}"),
            ("How do I use {}?", arguments),
            ("Which arguments does {} take?", arguments),
            ("What are the arguments of {}, in order?", arguments),
            ("When is the result of {} blank?", special),
            ("When does {} give blank?", special),
        ]
    )
    wish = rng.choice(["", " Answer shortly.", " I am new to this language.", " Be exact.", " I know spreadsheets."])
    return Question("concept", asked.format(name) + wish, answer)


# -- traps -------------------------------------------------------------------------------------------------------------


def wrong_order(rng: random.Random) -> Question:
    """A formula with its arguments in another order."""
    if rng.random() < 0.5:
        sheet = _series(rng, [rng.choice(LINE_ITEMS)])
        name, arguments, given = "FLOWROLL", _flowroll(rng, sheet)[9:-1].split(", "), _table(sheet)
    else:
        sheet, source, target = _mapped(rng)
        name, arguments = "DIMMATCH", [rng.choice(sheet.dimensions[source]), source, target]
        given = _mapping(sheet, source, target)
        return _trap(rng, "wrong-order", sheet, given, f"{name}({arguments[1]}, {arguments[0]}, {arguments[2]})")
    first, second, third = arguments
    orders = [(second, first, third), (first, third, second), (third, second, first), (third, first, second)]
    return _trap(rng, "wrong-order", sheet, given, f"{name}({', '.join(rng.choice(orders))})")


def time_as_target(rng: random.Random) -> Question:
    """A lookup of a period."""
    sheet, source, target = _mapped(rng)
    formula = f"DIMMATCH({rng.choice(sheet.dimensions[source])}, {source}, {TIME})"
    return _trap(rng, "time-as-target", sheet, _mapping(sheet, source, target), formula)


def unknown_direction(rng: random.Random) -> Question:
    """A direction that resembles one."""
    sheet = _series(rng, [rng.choice(LINE_ITEMS)])
    formula = _flowroll(rng, sheet, direction=rng.choice(WRONG_DIRECTIONS))
    return _trap(rng, "unknown-direction", sheet, _table(sheet), formula)


def window_too_long(rng: random.Random) -> Question:
    """A window that no period has enough others for: all is blank."""
    sheet = _series(rng, [rng.choice(LINE_ITEMS)])
    formula = _flowroll(rng, sheet, count=len(sheet.periods) + rng.randint(1, 6))
    return _trap(rng, "window-too-long", sheet, _table(sheet), formula)


def similar_function(rng: random.Random) -> Question:
    """A function that is not there, but nearly."""
    if rng.random() < 0.5:
        sheet = _series(rng, [rng.choice(LINE_ITEMS)])
        formula, given, name = _flowroll(rng, sheet), _table(sheet), "FLOWROLL"
    else:
        sheet, source, target = _mapped(rng)
        formula = f"DIMMATCH({rng.choice(sheet.dimensions[source])}, {source}, {target})"
        given, name = _mapping(sheet, source, target), "DIMMATCH"
    return _trap(rng, "similar-function", sheet, given, formula.replace(name, rng.choice(WRONG_NAMES[name])))


def similar_line_items(rng: random.Random) -> Question:
    """Two line items with nearly the same name; the formula means one of them, or one that is not there."""
    pair = list(rng.choice(SIMILAR))
    rng.shuffle(pair)
    if rng.random() < 0.3:
        sheet = _series(rng, pair[:1])
        formula = _flowroll(rng, sheet).replace(f"({pair[0]},", f"({pair[1]},")
    else:
        sheet = _series(rng, pair)
        formula = _flowroll(rng, sheet)
    return _trap(rng, "similar-line-items", sheet, _table(sheet), formula)


PLAIN: tuple[Maker, ...] = (
    flowroll_series,
    flowroll_period,
    flowroll_formula,
    dimmatch_value,
    dimmatch_formula,
    concept,
)
TRAPS: tuple[Maker, ...] = (
    wrong_order,
    time_as_target,
    unknown_direction,
    window_too_long,
    similar_function,
    similar_line_items,
)


# -- sheets and their words --------------------------------------------------------------------------------------------


def _series(rng: random.Random, line_items: Sequence[str]) -> Sheet:
    names = rng.choice(PERIODS)
    length = rng.randint(3, 8)
    first = rng.randint(0, len(names) - length)
    series: dict[str, Series] = {}
    for line_item in line_items:
        values: list[int | None] = [rng.randint(1, 99) for _ in range(length)]
        if rng.random() < 0.25:
            values[rng.randrange(length)] = None
        series[line_item] = tuple(values)
    return Sheet(periods=names[first : first + length], line_items=series)


def _flowroll(rng: random.Random, sheet: Sheet, *, count: int | None = None, direction: str | None = None) -> str:
    """A formula over the sheet's first line item."""
    count = count or rng.randint(1, min(5, len(sheet.periods)))
    return f"FLOWROLL({next(iter(sheet.line_items))}, {count}, {direction or rng.choice(DIRECTIONS)})"


def _mapped(rng: random.Random) -> tuple[Sheet, str, str]:
    """A mapping of some values, most of which have a target."""
    source, target = rng.choice(PAIRS)
    values = rng.sample(DIMENSIONS[source], rng.randint(3, 6))
    targets = DIMENSIONS[target]
    mapping = {value: rng.choice(targets) for value in values if rng.random() < 0.75}
    sheet = Sheet(mappings={(source, target): mapping}, dimensions={source: tuple(values), target: tuple(targets)})
    return sheet, source, target


def _table(sheet: Sheet) -> str:
    return "\n".join(f"{name}: {_pairs(sheet.periods, values)}" for name, values in sheet.line_items.items())


def _mapping(sheet: Sheet, source: str, target: str) -> str:
    mapping = sheet.mappings[source, target]
    rows = "; ".join(f"{value} is in {mapping.get(value, 'nothing')}" for value in sheet.dimensions[source])
    return f"{source} to {target}: {rows}"


def _pairs(periods: Sequence[str], values: Series) -> str:
    return ", ".join(f"{period} {_shown(value)}" for period, value in zip(periods, values, strict=True))


def _shown(value: int | str | None) -> str:
    return "blank" if value is None else str(value)


def _trap(rng: random.Random, kind: str, sheet: Sheet, given: str, formula: str) -> Question:
    ask = rng.choice(["What does {} give?", "Work out {}.", "Evaluate {}."])
    return Question(kind, f"{given}\n{ask.format(formula)}", _answer(formula, sheet))


def _answer(formula: str, sheet: Sheet) -> str:
    try:
        value = evaluate(formula, sheet)
    except LanguageError as error:
        return f"Not valid: {error}."
    return _pairs(sheet.periods, value) if isinstance(value, tuple) else _shown(value)
