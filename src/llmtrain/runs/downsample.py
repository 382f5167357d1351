"""Chooses few points of a curve that look like all of them, and computes means for smoothing.

a million points ─ smallest and largest of each small bucket ─▶ a few thousand ─ largest triangles ─▶ a thousand

None of our dependencies does this (numpy, pyarrow and Plotly have no LTTB), and tsdownsample would be one for 40 lines.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_PRESELECTED_PER_POINT = 4

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def visible_points(x: Floats, y: Floats, *, num_points: int) -> Indices:
    """Return the indices of the points of the curve [n] to draw: at most `num_points`, in order.

    The first, the last, the lowest and the highest are always among them; the others are chosen by
    largest-triangle-three-buckets (Steinarsson 2013), after a choice of each bucket's extremes where there are many
    points (MinMaxLTTB, arXiv:2305.00332). `x` ascends, and all is finite. Raises ValueError for fewer than 4 points.
    """
    if num_points < 4:
        raise ValueError(f"num_points is {num_points}, but the ends and the extremes are 4")
    if len(x) <= num_points:
        return np.arange(len(x))
    extremes = np.array([np.argmin(y), np.argmax(y)])
    candidates = np.arange(len(x))
    if len(x) > 2 * _PRESELECTED_PER_POINT * num_points:
        candidates = _extremes_of_buckets(y, num_buckets=_PRESELECTED_PER_POINT * num_points // 2)
    chosen = candidates[_largest_triangles(x[candidates], y[candidates], num_points=num_points - 2)]
    return np.union1d(chosen, extremes)


def bucket_means(*columns: Floats, num_buckets: int) -> list[Floats]:
    """Return each column's means over `num_buckets` groups of neighbours; all values if there are fewer."""
    length = len(columns[0])
    if length <= num_buckets:
        return list(columns)
    edges = np.linspace(0, length, num_buckets + 1).astype(np.int64)
    return [np.add.reduceat(column, edges[:-1]) / np.diff(edges) for column in columns]


def _extremes_of_buckets(y: Floats, *, num_buckets: int) -> Indices:
    """Return the indices of both ends and of the lowest and highest point of each bucket."""
    size = -(-len(y) // num_buckets)
    whole = len(y) // size
    buckets = y[: whole * size].reshape(whole, size)
    begins = np.arange(whole) * size
    rest = np.arange(whole * size, len(y))
    last = rest[[np.argmin(y[rest]), np.argmax(y[rest])]] if len(rest) else rest
    found = [begins + buckets.argmin(axis=1), begins + buckets.argmax(axis=1), last, np.array([0, len(y) - 1])]
    return np.unique(np.concatenate(found))


def _largest_triangles(x: Floats, y: Floats, *, num_points: int) -> Indices:
    """Return the indices of both ends and, from each bucket between them, the point of the largest triangle.

    Its corners are the point chosen before, the candidate, and the mean of the bucket that follows.
    """
    if num_points >= len(x):
        return np.arange(len(x))
    edges = np.linspace(1, len(x) - 1, num_points - 1).astype(np.int64)
    chosen = [0]
    for bucket, (begin, end) in enumerate(pairwise(edges)):
        after = slice(end, edges[bucket + 2]) if bucket + 2 < len(edges) else slice(len(x) - 1, len(x))
        mean_x, mean_y = x[after].mean(), y[after].mean()
        last = chosen[-1]
        areas = np.abs((x[last] - mean_x) * (y[begin:end] - y[last]) - (x[last] - x[begin:end]) * (mean_y - y[last]))
        chosen.append(int(begin + areas.argmax()))
    return np.array([*chosen, len(x) - 1])
