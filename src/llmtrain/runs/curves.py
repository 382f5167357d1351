"""Reads the curves of a run: metrics.jsonl by columns, and in few enough points that a page draws them at once.

    metrics.jsonl ──read_curves──▶ Curves (every point, numpy) ──as_drawn──▶ a dict for JSON (about a thousand points)

`sinks` writes the file, `downsample` chooses the points.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmtrain.runs.downsample import Floats, bucket_means, visible_points
from llmtrain.runs.json_files import json_lines
from llmtrain.tracking.metric_names import TRAIN_TOKENS_TOTAL

DRAWN_POINTS: Final = 1000
"""Points of each curve: more than a page has columns of pixels, and few enough for a dozen charts at once."""
MEANS: Final = 500
"""Means of neighbouring points, for smoothing: the chosen points are extremes, so their mean would be wrong."""
_DIGITS: Final = 7
_TOO_LARGE: Final = 2**53
"""No step and no time is as large, but JSON may hold larger integers."""


@dataclass(frozen=True)
class Curve:
    """One metric over the run: columns [n] of equal length, of the points that are finite."""

    step: Floats
    seconds: Floats
    """Seconds since the run's beginning, without the time between a stop and a resume."""
    value: Floats


@dataclass(frozen=True)
class Curves:
    """The content of a metrics.jsonl."""

    by_name: Mapping[str, Curve] = field(default_factory=dict)
    non_finite: tuple[tuple[int, str, str], ...] = ()
    """Step, name, and what the value was instead of a number: nan, inf."""
    began: float = 0.0
    """Seconds since 1970 that count as 0 on the curves after the last pause."""
    num_bytes: int = 0
    """Size of the file up to its last complete line."""
    file_id: int = 0
    """The file's number in the file system, which changes when a run is resumed. 0: there is no file yet."""
    damaged_lines: int = 0

    @property
    def num_points(self) -> int:
        """Return the number of points of all curves."""
        return sum(len(curve.value) for curve in self.by_name.values())


def read_curves(path: Path, *, began: float | None, resumes: Iterable[float] = ()) -> Curves:
    """Return the curves of a metrics.jsonl; none without the file. Damaged lines are left out and counted.

    `began`: when the run began, in seconds since 1970; the first line's time if None. `resumes`: when it was resumed;
    the time between a resume and the line before it is left out of `seconds`.
    """
    try:
        with path.open("rb") as file:
            content, file_id = file.read(), os.fstat(file.fileno()).st_ino
    except OSError:
        return Curves()
    num_bytes = content.rfind(b"\n") + 1
    columns = _Columns()
    for line in json_lines(content[:num_bytes]):
        columns.add(line)
    if not columns.times:
        return Curves(num_bytes=num_bytes, file_id=file_id, damaged_lines=columns.damaged)
    times = np.maximum.accumulate(np.array(columns.times))  # a clock that was set back stands still for a while
    began = times[0] if began is None else min(began, times[0])
    pauses = _pauses(times, sorted(resumes))
    seconds = np.maximum.accumulate(times - began - pauses)
    by_name = {
        name: Curve(np.array(steps, float), seconds[np.array(lines)], np.array(values, float))
        for name, (steps, lines, values) in sorted(columns.by_name.items())
    }
    return Curves(
        by_name=by_name,
        non_finite=tuple(columns.non_finite),
        began=float(began + pauses[-1]),
        num_bytes=num_bytes,
        file_id=file_id,
        damaged_lines=columns.damaged,
    )


def as_drawn(curves: Curves, *, num_points: int = DRAWN_POINTS) -> dict[str, Any]:
    """Return by name the columns `step`, `seconds`, `value` to draw, `means` to smooth, and the `count` of all points.

    `means` is absent where all points are drawn.
    """
    return {name: _drawn(curve, num_points=num_points) for name, curve in curves.by_name.items()}


def tokens_by_step(curves: Curves) -> dict[str, list[float]]:
    """Return columns `step` and `tokens`, with which curves are drawn over tokens; between two points it is linear."""
    curve = curves.by_name.get(TRAIN_TOKENS_TOTAL)
    if curve is None:
        return {"step": [], "tokens": []}
    chosen = visible_points(curve.step, curve.value, num_points=DRAWN_POINTS)
    return {"step": _plain(curve.step[chosen]), "tokens": _plain(curve.value[chosen])}


def mean(values: Floats) -> float:
    """Return the mean: what a loss of training, which varies from step to step, was over some steps."""
    return float(values.mean())


def newest(values: Floats) -> float:
    """Return the last value: what a loss of validation, measured on all of its data, is at a step."""
    return float(values[-1])


def values_by_step(
    curves: Sequence[Curve | None], *, take: Callable[[Floats], float], num_rows: int = 10
) -> list[dict[str, Any]]:
    """Return at most `num_rows` rows of `step` and `values`, one value for each curve, evenly over the longest curve.

    A value is what `take` makes of the curve's values since the row before (their mean, the newest); None where it has
    no point there.
    """
    known = [curve.step for curve in curves if curve is not None]
    if not known:
        return []
    steps = np.unique(np.concatenate(known))
    # Rows end at steps that have a point, so that a rare metric keeps its own steps.
    ends = steps[np.linspace(0, len(steps), min(num_rows, len(steps)) + 1)[1:].astype(np.int64) - 1]
    rows = []
    for begin, end in pairwise([-math.inf, *ends.tolist()]):
        parts = [None if one is None else one.value[(one.step > begin) & (one.step <= end)] for one in curves]
        values = [None if part is None or not len(part) else take(part) for part in parts]
        rows.append({"step": int(end), "values": values})
    return rows


def _drawn(curve: Curve, *, num_points: int) -> dict[str, Any]:
    chosen = visible_points(curve.step, curve.value, num_points=num_points)
    drawn: dict[str, Any] = {
        "count": len(curve.value),
        "step": _plain(curve.step[chosen]),
        "seconds": _plain(curve.seconds[chosen], decimals=2),
        "value": _plain(curve.value[chosen]),
    }
    if len(chosen) < len(curve.value):
        step, seconds, value = bucket_means(curve.step, curve.seconds, curve.value, num_buckets=MEANS)
        drawn["means"] = {
            "step": _plain(step, decimals=1),
            "seconds": _plain(seconds, decimals=2),
            "value": _plain(value),
        }
    return drawn


def _plain(values: Floats, *, decimals: int | None = None) -> list[float]:
    """Return values that JSON writes shortly: 7 digits or `decimals` decimals, and whole numbers without a point."""
    rounded = (
        float(f"{value:.{_DIGITS}g}") if decimals is None else round(value, decimals) for value in values.tolist()
    )
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in rounded]


class _Columns:
    """The lines of a metrics.jsonl as columns by name."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.by_name: dict[str, tuple[list[int], list[int], list[float]]] = {}
        """Name → steps, numbers of the line, values."""
        self.non_finite: list[tuple[int, str, str]] = []
        self.damaged = 0

    def add(self, line: dict[str, Any] | None) -> None:
        step, moment = (line.get("step"), line.get("time")) if line else (None, None)
        if line is None or not isinstance(step, int) or not isinstance(moment, float | int):
            self.damaged += 1
            return
        if not max(abs(step), abs(moment)) < _TOO_LARGE:
            self.damaged += 1
            return
        number = len(self.times)
        self.times.append(moment)
        for name, value in line.items():
            if name in ("step", "time"):
                continue
            if type(value) is float or type(value) is int:
                if not abs(value) <= sys.float_info.max:  # an integer in JSON may be larger
                    continue
                column = self.by_name.get(name)
                if column is None:
                    column = self.by_name[name] = ([], [], [])
                column[0].append(step)
                column[1].append(number)
                column[2].append(value)
            elif name == "non_finite" and isinstance(value, dict):
                self.non_finite.extend((step, key, str(what)) for key, what in value.items())


def _pauses(times: Floats, resumes: list[float]) -> Floats:
    """Return for each line the seconds before it between a stop and a resume."""
    pauses = np.zeros(len(times))
    for resumed in resumes:
        after = int(np.searchsorted(times, resumed))
        if 0 < after < len(times):
            pauses[after:] += max(0.0, resumed - times[after - 1])
    return pauses
