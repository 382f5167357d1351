"""Computes scores: statistics of every row and metric (on all cores if there are many rows), and their sums."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.distributed.limits import usable_cores
from llmtrain.evaluation.metrics import Metric, metrics_named

Statistics = NDArray[np.float64]
"""[rows, k]: a metric's counts of each row."""

MANY_ROWS = 20_000
"""Number of rows from which several processes are used; each takes a second to start."""
_CHUNK_ROWS = 2_000


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric or a loss: its name and definition, and the functions that compute scores from statistics."""

    name: str
    definition: str
    score: Callable[[Sequence[float]], float]
    row_score: Callable[[Sequence[float]], float]
    higher_is_better: bool = True
    signature: str | None = None


def measures_of(metrics: Sequence[Metric], *, with_loss: bool) -> list[Measure]:
    """Return the measures of `metrics`; with `with_loss`, those of the loss come first."""
    written = [
        Measure(
            name=metric.name,
            definition=metric.definition,
            score=metric.score,
            row_score=metric.row_score,
            signature=metric.signature,
        )
        for metric in metrics
    ]
    return [*LOSS_MEASURES, *written] if with_loss else written


def row_statistics(
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    *,
    num_processes: int | None = None,
    **options: Any,
) -> dict[str, Statistics]:
    """Return by metric the statistics of each (prediction, expected), in their order.

    `options` are those of `metrics_named`. Raises ConfigError as it does.
    """
    metrics = metrics_named(names, **options)
    chunks = [pairs[begin : begin + _CHUNK_ROWS] for begin in range(0, len(pairs), _CHUNK_ROWS)]
    workers = min(num_processes or (usable_cores() if len(pairs) >= MANY_ROWS else 1), len(chunks))
    if workers <= 1:
        done = [_chunk(chunk, metrics) for chunk in chunks]
    else:
        # Processes are spawned, since a fork of a process with torch's threads may hang.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(_named_chunk, chunk, tuple(names), options) for chunk in chunks]
            done = [job.result() for job in jobs]
    return {
        metric.name: np.concatenate([part[index] for part in done]) if done else np.zeros((0, 2))
        for index, metric in enumerate(metrics)
    }


def total(statistics: Statistics, rows: NDArray[np.bool_] | None = None) -> list[float]:
    """Return the sums over all rows, or over those that `rows` selects."""
    sums: list[float] = (statistics if rows is None else statistics[rows]).sum(axis=0).tolist()
    return sums


def scores(
    measures: Sequence[Measure], statistics: Mapping[str, Statistics], rows: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Return the score of each measure over all rows, or over those that `rows` selects."""
    return {measure.name: measure.score(total(statistics[measure.name], rows)) for measure in measures}


def _named_chunk(
    pairs: Sequence[tuple[str, str]], names: Sequence[str], options: Mapping[str, Any]
) -> list[Statistics]:
    return _chunk(pairs, metrics_named(names, **options))


def _chunk(pairs: Sequence[tuple[str, str]], metrics: Sequence[Metric]) -> list[Statistics]:
    return [
        np.array([metric.statistics(prediction, expected) for prediction, expected in pairs], np.float64)
        for metric in metrics
    ]


def _loss(sums: Sequence[float]) -> float:
    return sums[0] / sums[1] if sums[1] else math.nan


def _perplexity(sums: Sequence[float]) -> float:
    loss = _loss(sums)
    return math.exp(loss) if loss < 700 else math.inf


def _bits_per_byte(sums: Sequence[float]) -> float:
    return sums[0] / math.log(2) / sums[2] if sums[2] else math.nan


_OF_ANSWERS = "of the expected answer's tokens and its end token, given the prompt"
LOSS_MEASURES = tuple(
    Measure(name=name, definition=definition, score=score, row_score=score, higher_is_better=False)
    for name, definition, score in (
        ("loss", f"mean negative log probability {_OF_ANSWERS}; nats a token", _loss),
        ("perplexity", "exp(loss)", _perplexity),
        ("bits_per_byte", f"negative log probability {_OF_ANSWERS}; bits a UTF-8 byte of the answer", _bits_per_byte),
    )
)
"""Their statistics of a row: the sum of its loss in nats, its number of tokens, its number of bytes."""
