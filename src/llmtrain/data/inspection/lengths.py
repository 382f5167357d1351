"""Lengths of rows: exact quantiles and a histogram, from counts of each length, without numpy."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any


def describe_lengths(lengths: Counter[int]) -> dict[str, Any] | None:
    """Return shortest, median, p90, p99, longest, mean, standard deviation and a histogram in powers of two.

    `lengths`: length -> number of rows that have it; None where there are none. A quantile is the length that its share
    of the rows does not exceed.
    """
    num_rows, total = lengths.total(), sum(length * count for length, count in lengths.items())
    if not num_rows:
        return None
    ascending = sorted(lengths.items())
    names = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    quantiles = {name: _quantile(ascending, share * num_rows) for name, share in names.items()}
    mean = total / num_rows
    variance = sum(count * (length - mean) ** 2 for length, count in lengths.items()) / num_rows
    spread = {"mean": mean, "std": math.sqrt(variance)}
    return {**quantiles, **spread, "total": total, "histogram": _histogram(lengths)}


def _quantile(ascending: list[tuple[int, int]], rank: float) -> int:
    counted = 0
    for length, count in ascending:
        counted += count
        if counted >= rank:
            return length
    return ascending[-1][0]


def _histogram(lengths: Counter[int]) -> list[dict[str, int]]:
    """Return rows and their summed lengths by powers of two; a length of 0 has a bin of its own."""
    rows: Counter[int] = Counter()
    totals: Counter[int] = Counter()
    for length, count in lengths.items():
        bits = length.bit_length()
        rows[bits] += count
        totals[bits] += length * count
    return [
        {"from": (1 << bits) >> 1, "to": (1 << bits) - 1, "rows": rows[bits], "total": totals[bits]}
        for bits in range(min(rows), max(rows) + 1)
    ]
