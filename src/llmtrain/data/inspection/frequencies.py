"""Token frequencies: the most frequent tokens, how many are how rare, and how close the ranks are to Zipf's law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.order import Ints

NamesOf = Callable[[Sequence[int]], list[str]]
"""Names of tokens, by their ids."""

CURVE_POINTS = 60
ID_BANDS = 128
FEWEST_FOR_ZIPF = 5
"""Ranks whose token occurs less often are left out of the exponent: there, a count says more about chance."""


class TokenCounts:
    """Number of times that each token occurs. Memory: eight bytes an id."""

    def __init__(self, size: int = 0) -> None:
        self.counts: Ints = np.zeros(size, np.int64)

    def add(self, ids: NDArray[Any]) -> None:
        """Count ids, [n], not negative."""
        found = np.bincount(ids, minlength=len(self.counts))
        if len(found) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(found) - len(self.counts)))
        self.counts += found


def describe_frequencies(counts: Ints, names_of: NamesOf, *, num_listed: int) -> dict[str, Any] | None:
    """Return totals, the `num_listed` most frequent tokens, the histogram of counts, and Zipf's exponent.

    `counts`: [ids] number of times that each token occurs. None where no token occurs.
    """
    total = int(counts.sum())
    if not total:
        return None
    by_rank = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    ranked = counts[by_rank]
    shares = ranked / total
    listed = by_rank[:num_listed].tolist()
    return {
        "total": total,
        "distinct": len(ranked),
        "once": int((ranked == 1).sum()),
        "entropy_bits": float(-(shares * np.log2(shares)).sum()),
        "covering": {f"{share:.0%}": _covering(ranked, share * total) for share in (0.5, 0.9, 0.99)},
        "top": [
            {"id": token, "token": name, "count": int(counts[token]), "share": int(counts[token]) / total}
            for token, name in zip(listed, names_of(listed), strict=True)
        ],
        "zipf": zipf(ranked),
        "curve": [{"rank": rank, "count": int(ranked[rank - 1])} for rank in _spread_ranks(len(ranked))],
        "by_count": _by_count(ranked),
        "by_id": _by_id(counts),
    }


def zipf(ranked: Ints) -> dict[str, Any] | None:
    """Fit count = scale · rank^-exponent by least squares over the logarithms, at ranks that lie evenly in them.

    `ranked`: the counts, the highest first. None where fewer than three ranks count.
    """
    last = int((ranked >= FEWEST_FOR_ZIPF).sum())
    ranks = np.array(_spread_ranks(last), np.int64)
    if len(ranks) < 3:
        return None
    x, y = np.log(ranks), np.log(ranked[ranks - 1])
    slope, intercept = np.polyfit(x, y, 1)
    left, spread = float(((y - slope * x - intercept) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    return {
        "exponent": float(-slope),
        "scale": float(np.exp(intercept)),
        "last_rank": last,
        "explained": 1 - left / spread if spread > 0 else None,
    }


def _covering(ranked: Ints, wanted: float) -> int:
    """Return how many of the most frequent tokens make up `wanted` occurrences."""
    return int(np.searchsorted(np.cumsum(ranked), wanted)) + 1


def _spread_ranks(last: int) -> list[int]:
    """Return at most CURVE_POINTS ranks from 1 to `last`, evenly spread over their logarithms."""
    if last < 1:
        return []
    ranks: list[int] = np.unique(np.round(np.geomspace(1, last, CURVE_POINTS)).astype(np.int64)).tolist()
    return ranks


def _by_count(ranked: Ints) -> list[dict[str, int]]:
    """Return how many tokens occur how often, in powers of two, and their occurrences."""
    powers = np.frexp(ranked.astype(np.float64))[1] - 1
    tokens = np.bincount(powers)
    occurrences = np.bincount(powers, weights=ranked)
    return [
        {"from": 2**power, "to": 2 ** (power + 1) - 1, "tokens": int(tokens[power]), "total": int(occurrences[power])}
        for power in range(int(powers.min()), len(tokens))
    ]


def _by_id(counts: Ints) -> list[dict[str, int]]:
    """Return the occurrences in at most ID_BANDS equal bands of ids, and how many tokens of each occur."""
    begins = np.arange(0, len(counts), -(-len(counts) // ID_BANDS))
    totals, distinct = np.add.reduceat(counts, begins), np.add.reduceat(counts > 0, begins, dtype=np.int64)
    ends = [*begins[1:].tolist(), len(counts)]
    return [
        {"from": int(begin), "to": end - 1, "total": int(total), "distinct": int(number)}
        for begin, end, total, number in zip(begins, ends, totals, distinct, strict=True)
    ]
