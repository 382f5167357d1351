"""Compares two models on the same rows: paired differences, with bootstrap intervals.

Rows are resampled with replacement, the same rows for both models (Koehn 2004, "Statistical significance tests for
machine translation evaluation"). The interval is the middle 95 % of the differences of all resamples. Corpus metrics
are computed from the sums of the drawn rows' statistics, so no text is counted again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrain.evaluation.scores import Measure, Statistics

_ROWS_AT_A_TIME = 8_000_000
"""Number of drawn rows that are in memory at a time."""
TIE = 1e-9
"""Two scores of a row that differ by less are equal."""
NOT_DEFINED = "not defined"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A measure of two models on the same rows. `difference` is always tuned − base."""

    base: float
    tuned: float
    difference: float
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Upper end of the interval."""
    wins: int
    """Number of rows on which the tuned model is better."""
    losses: int
    ties: int
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """better or worse if the interval excludes 0, else unclear; not defined if no row has a value."""
        if np.isnan(self.difference) and self.wins + self.losses + self.ties:
            return NOT_DEFINED
        if not (self.low > 0.0 or self.high < 0.0):
            return "unclear"
        return "better" if (self.low > 0.0) == self.higher_is_better else "worse"


def compare(
    measures: Sequence[Measure],
    statistics: Mapping[str, Statistics],
    baseline: Mapping[str, Statistics],
    *,
    seed: int,
    num_resamples: int,
    rows: NDArray[np.bool_] | None = None,
) -> dict[str, Difference]:
    """Compare each measure of a model with that of a baseline, on all rows or on those that `rows` [rows] selects."""
    ours = {measure.name: _chosen(statistics[measure.name], rows) for measure in measures}
    theirs = {measure.name: _chosen(baseline[measure.name], rows) for measure in measures}
    drawn = _resampled_differences(measures, ours, theirs, seed=seed, num_resamples=num_resamples)
    found = {}
    for measure in measures:
        tuned, base = (measure.score(side[measure.name].sum(axis=0).tolist()) for side in (ours, theirs))
        gains = row_gains(measure, ours[measure.name], theirs[measure.name])
        some = np.isfinite(drawn[measure.name]).any()
        low, high = np.nanquantile(drawn[measure.name], [0.025, 0.975]).tolist() if some else (np.nan, np.nan)
        found[measure.name] = Difference(
            base=base,
            tuned=tuned,
            difference=tuned - base,
            low=low,
            high=high,
            wins=int((gains > TIE).sum()),
            losses=int((gains < -TIE).sum()),
            ties=int((abs(gains) <= TIE).sum()),
            higher_is_better=measure.higher_is_better,
        )
    return found


def row_gains(measure: Measure, ours: Statistics, theirs: Statistics) -> NDArray[np.float64]:
    """Return [rows]: how much better each row of `ours` is by this measure; below 0: worse; 0 if it is not defined."""
    pairs = zip(ours.tolist(), theirs.tolist(), strict=True)
    gains = np.array([measure.row_score(our) - measure.row_score(their) for our, their in pairs], np.float64)
    return np.nan_to_num(gains if measure.higher_is_better else -gains, nan=0.0)


def _resampled_differences(
    measures: Sequence[Measure],
    ours: Mapping[str, Statistics],
    theirs: Mapping[str, Statistics],
    *,
    seed: int,
    num_resamples: int,
) -> dict[str, NDArray[np.float64]]:
    """Return [num_resamples] differences by measure, each on rows drawn with replacement."""
    num_rows = len(next(iter(ours.values()))) if ours else 0
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {measure.name: [] for measure in measures}
    at_a_time = max(1, _ROWS_AT_A_TIME // max(1, num_rows))
    for begin in range(0, num_resamples if num_rows else 0, at_a_time):
        size = min(at_a_time, num_resamples - begin)
        counts = np.stack(
            [
                np.bincount(generator.integers(num_rows, size=num_rows), minlength=num_rows).astype(np.float64)
                for _ in range(size)
            ]
        )  # how often each row is drawn: the sums are then one matrix product
        for measure in measures:
            sums, base_sums = counts @ ours[measure.name], counts @ theirs[measure.name]
            drawn[measure.name] += [
                measure.score(our) - measure.score(their)
                for our, their in zip(sums.tolist(), base_sums.tolist(), strict=True)
            ]
    return {name: np.array(values) for name, values in drawn.items()}


def _chosen(statistics: Statistics, rows: NDArray[np.bool_] | None) -> Statistics:
    return statistics if rows is None else statistics[rows]
