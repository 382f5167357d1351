"""Fewer points of a curve: the ends and the extremes stay, no bucket is left out, and it is quick."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmtrain.runs.downsample import Floats, bucket_means, visible_points

VALUES = st.integers(1, 4000).flatmap(
    lambda length: arrays(np.float64, length, elements=st.floats(-1e6, 1e6, allow_subnormal=False))
)


@given(VALUES, st.integers(4, 300))
def test_ends_and_extremes_stay_and_points_keep_their_order(values: Floats, num_points: int) -> None:
    steps = np.arange(len(values), dtype=float)
    chosen = visible_points(steps, values, num_points=num_points)
    assert len(chosen) == len(values) if len(values) <= num_points else len(chosen) <= num_points
    assert (np.diff(chosen) > 0).all()
    assert (chosen[0], chosen[-1]) == (0, len(values) - 1)
    assert values[chosen].min() == values.min()
    assert values[chosen].max() == values.max()


@given(VALUES, st.integers(4, 300))
def test_no_stretch_of_a_curve_is_left_without_points(values: Floats, num_points: int) -> None:
    chosen = visible_points(np.arange(len(values), dtype=float), values, num_points=num_points)
    # A bucket has a point each, so the widest gap is two buckets; choosing among extremes moves their edges a little.
    assert np.diff(chosen).max(initial=0) <= max(2, 5 * len(values) / num_points + 2)


def test_the_points_are_those_that_the_paper_would_choose() -> None:
    values = np.random.default_rng(3).normal(size=200).cumsum()
    steps = np.arange(200.0)
    expected = {int(values.argmin()), int(values.argmax()), *plain_lttb(steps, values, num_points=28)}
    assert set(visible_points(steps, values, num_points=30).tolist()) == expected


def plain_lttb(x: Floats, y: Floats, *, num_points: int) -> list[int]:
    """Largest-triangle-three-buckets as Steinarsson's thesis has it, a point at a time."""
    edges = [int(edge) for edge in np.linspace(1, len(x) - 1, num_points - 1)]
    chosen = [0]
    for left, right, after in zip(edges, edges[1:], [*edges[2:], len(x)], strict=False):
        last, mean_x, mean_y = chosen[-1], x[right:after].mean(), y[right:after].mean()

        def area(i: int, last: int = last, mean_x: float = mean_x, mean_y: float = mean_y) -> float:
            return float(abs((x[last] - mean_x) * (y[i] - y[last]) - (x[last] - x[i]) * (mean_y - y[last])))

        chosen.append(max(range(left, right), key=area))
    return [*chosen, len(x) - 1]


def test_a_spike_among_a_million_points_is_seen() -> None:
    values = np.full(1_000_000, 2.0)
    values[[123_456, 777_777]] = 50.0, -3.0
    chosen = visible_points(np.arange(1e6), values, num_points=1000)
    assert len(chosen) <= 1000
    assert {123_456, 777_777} <= set(chosen.tolist())


def test_a_step_in_the_curve_is_kept_where_it_is() -> None:
    values = np.concatenate([np.full(5000, 1.0), np.full(5000, 0.0)])
    chosen = visible_points(np.arange(1e4), values, num_points=100)
    last_high, first_low = chosen[values[chosen] == 1.0][-1], chosen[values[chosen] == 0.0][0]
    assert first_low - last_high <= 200


@given(VALUES, st.integers(1, 300))
def test_means_weigh_every_point_once(values: Floats, num_buckets: int) -> None:
    (means,) = bucket_means(values, num_buckets=num_buckets)
    assert len(means) == min(len(values), num_buckets)
    sizes = np.diff(np.linspace(0, len(values), len(means) + 1).astype(int))
    assert (means * sizes).sum() == pytest.approx(values.sum(), rel=1e-9, abs=1e-3)


def test_fewer_than_four_points_are_rejected() -> None:
    with pytest.raises(ValueError, match="num_points is 3"):
        visible_points(np.arange(9.0), np.arange(9.0), num_points=3)
