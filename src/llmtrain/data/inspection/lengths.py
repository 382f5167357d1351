"""Lengths of rows: exact quantiles and a histogram, from counts of each length, without numpy."""

from __future__ import annotations

from collections import Counter
from typing import Any


def describe_lengths(lengths: Counter[int]) -> dict[str, Any] | None:
    """Return shortest, median, mean, p90, p99, longest, and a histogram in powers of two; None where there are no rows.

    `lengths`: length -> number of rows that have it. A quantile is the length that its share of the rows does not
    exceed.
    """
    num_rows, total = lengths.total(), sum(length * count for length, count in lengths.items())
    if not num_rows:
        return None
    ascending = sorted(lengths.items())
    names = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    quantiles = {name: _quantile(ascending, share * num_rows) for name, share in names.items()}
    return {**quantiles, "mean": total / num_rows, "total": total, "histogram": _histogram(lengths)}


def _quantile(ascending: list[tuple[int, int]], rank: float) -> int:
    counted = 0
    for length, count in ascending:
        counted += count
        if counted >= rank:
            return length
    return ascending[-1][0]


def _histogram(lengths: Counter[int]) -> list[dict[str, int]]:
    rows: Counter[int] = Counter()
    totals: Counter[int] = Counter()
    for length, count in lengths.items():
        power = max(length, 1).bit_length() - 1
        rows[power] += count
        totals[power] += length * count
    return [
        {"from": 2**power, "to": 2 ** (power + 1) - 1, "rows": rows[power], "total": totals[power]}
        for power in range(min(rows), max(rows) + 1)
    ]
