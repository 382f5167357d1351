"""Whether a model is better: differences pair by pair, intervals that hold what they promise, wins and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from llmtrain.evaluation.comparison import Difference, compare, row_gains
from llmtrain.evaluation.metrics import metrics_named
from llmtrain.evaluation.scores import LOSS_MEASURES, Measure, Statistics, measures_of, row_statistics


def mean_measure(*, higher_is_better: bool = True) -> Measure:
    def mean(sums: Sequence[float]) -> float:
        return sums[0] / sums[1] if sums[1] else math.nan

    return Measure(name="m", definition="", score=mean, row_score=mean, higher_is_better=higher_is_better)


def rows(values: list[float] | np.ndarray) -> Statistics:
    return np.array([(value, 1.0) for value in values])


def compared(ours: list[float], theirs: list[float], **changes: bool) -> Difference:
    return compare([mean_measure(**changes)], {"m": rows(ours)}, {"m": rows(theirs)}, seed=0, num_resamples=1000)["m"]


def test_wins_losses_and_ties_are_counted_by_row() -> None:
    found = compared([1, 1, 0, 0.5], [0, 1, 1, 0.25])
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert (found.tuned, found.base, found.difference) == (0.625, 0.5625, 0.0625)
    assert found.low < 0 < found.high
    assert found.verdict == "unclear"


def test_a_lower_loss_is_better() -> None:
    found = compared([1.0] * 50, [2.0] * 49 + [0.5], higher_is_better=False)
    assert (found.wins, found.losses) == (49, 1)
    assert found.difference < 0
    assert found.high < 0
    assert found.verdict == "better"
    assert compared([2.0] * 50, [1.0] * 50, higher_is_better=False).verdict == "worse"


def test_a_model_is_neither_better_nor_worse_than_itself() -> None:
    found = compared([0.1, 0.7, 0.3], [0.1, 0.7, 0.3])
    assert (found.low, found.high, found.ties, found.verdict) == (0, 0, 3, "unclear")


def test_the_interval_is_as_wide_as_the_normal_one_of_paired_differences() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(0, 5, 400)
    ours = base + generator.normal(0.2, 1, 400)
    found = compared(list(ours), list(base))
    spread = 1.96 * (ours - base).std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1), "the rows' own spread of 5 does not count"
    assert (found.high + found.low) / 2 == pytest.approx(found.difference, abs=0.02)


def test_the_interval_holds_the_true_difference_95_times_in_100() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        base = generator.normal(0, 3, 60)
        found = compared(list(base + generator.normal(0.5, 1, 60)), list(base))
        held += found.low <= 0.5 <= found.high
    assert 180 <= held <= 199


def test_corpus_metrics_are_resampled_from_sums_and_equal_those_of_drawn_rows() -> None:
    expected = ["the cat sat on the mat", "a dog lay there", "it rained all day long", "nobody knew why"]
    ours = [(text, text) for text in expected]
    theirs = [(text.replace("a", "e"), text) for text in expected]
    (measure,) = measures_of(metrics_named(["bleu"]), with_loss=False)
    mine, base = row_statistics(ours, ["bleu"]), row_statistics(theirs, ["bleu"])
    found = compare([measure], mine, base, seed=4, num_resamples=200)["bleu"]
    assert found.tuned == pytest.approx(100)
    generator = np.random.default_rng(4)
    differences = []
    for _ in range(200):
        drawn = generator.integers(4, size=4)
        differences.append(
            measure.score(mine["bleu"][drawn].sum(0).tolist()) - measure.score(base["bleu"][drawn].sum(0).tolist())
        )
    assert [found.low, found.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]).tolist())
    assert found.verdict == "better"


def test_selected_rows_are_compared_alone() -> None:
    ours, theirs = rows([1, 1, 0, 0]), rows([0, 0, 1, 1])
    first = np.array([True, True, False, False])
    found = compare([mean_measure()], {"m": ours}, {"m": theirs}, seed=0, num_resamples=100, rows=first)["m"]
    assert (found.tuned, found.base, found.wins, found.losses) == (1, 0, 2, 0)


def test_rows_without_a_value_are_ties_and_no_rows_are_unclear() -> None:
    loss = LOSS_MEASURES[0]
    ours, theirs = np.array([[0.0, 0, 0], [1.0, 2, 5]]), np.array([[0.0, 0, 0], [2.0, 2, 5]])
    assert row_gains(loss, ours, theirs).tolist() == [0.0, 0.5]
    nothing = np.zeros((0, 2))
    found = compare([mean_measure()], {"m": nothing}, {"m": nothing}, seed=0, num_resamples=100)["m"]
    assert found.verdict == "unclear"
    assert math.isnan(found.difference)
