"""The curves of a run: metrics.jsonl by columns, and in few enough points that a page draws them at once.

    metrics.jsonl ──read_curves──▶ Curves (every point, numpy) ──as_drawn──▶ a dict for JSON (about a thousand points)

What is written to the file is in `sinks`, how points are chosen in `downsample`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmtrain.tracking.downsample import Floats, bucket_means, visible_points
from llmtrain.tracking.metrics import TRAIN_TOKENS_TOTAL

DRAWN_POINTS: Final = 1000
"""Of each curve: more than a page has pixels beside each other, and few enough for a dozen charts at once."""
MEANS: Final = 500
"""Of neighbouring points, which are what is smoothed: the chosen points are extremes, so their mean would be wrong."""
_DIGITS: Final = 7


@dataclass(frozen=True)
class Curve:
    """One figure over the run: columns [n] of equal length. Points that are not finite are left out of them."""

    step: Floats
    seconds: Floats
    """Since the run's beginning, without the time that it lay still before it was resumed."""
    value: Floats


@dataclass(frozen=True)
class Curves:
    """All that a metrics.jsonl tells."""

    by_name: Mapping[str, Curve] = field(default_factory=dict)
    non_finite: tuple[tuple[int, str, str], ...] = ()
    """Step, name, and what it was instead of a number: nan, inf."""
    began: float = 0.0
    """Seconds since 1970 that count as 0 on the curves after the last pause."""
    num_bytes: int = 0
    """Of the file, up to its last whole line."""
    file_id: int = 0
    """Of the file system; when a run goes on, a file with another takes its place. 0: there is none yet."""
    damaged_lines: int = 0

    @property
    def num_points(self) -> int:
        """Of all curves."""
        return sum(len(curve.value) for curve in self.by_name.values())


def read_curves(path: Path, *, began: float | None, resumes: Iterable[float] = ()) -> Curves:
    """The curves of a metrics.jsonl; none without the file. A line that a kill has cut is passed over and counted.

    `began`: when the run began, in seconds since 1970; the first line's time if None. `resumes`: when it went on; the
    time between such a moment and the line before it is left out of `seconds`.
    """
    try:
        with path.open("rb") as file:
            content, file_id = file.read(), os.fstat(file.fileno()).st_ino
    except OSError:
        return Curves()
    num_bytes = content.rfind(b"\n") + 1
    columns = _Columns()
    for line in _lines(content):
        columns.add(line)
    if not columns.times:
        return Curves(num_bytes=num_bytes, file_id=file_id, damaged_lines=columns.damaged)
    times = np.array(columns.times)
    began = times[0] if began is None else began
    pauses = _pauses(times, sorted(resumes))
    seconds = np.maximum.accumulate(times - began - pauses)
    by_name = {
        name: Curve(np.array(steps, float), seconds[np.array(lines)], np.array(values, float))
        for name, (steps, lines, values) in sorted(columns.figures.items())
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
    """Name → columns `step`, `seconds`, `value` of the points to draw, `means` to smooth, and `count` of all points.

    `means` is absent where the points to draw are all that there are.
    """
    return {name: _drawn(curve, num_points=num_points) for name, curve in curves.by_name.items()}


def tokens_by_step(curves: Curves) -> dict[str, list[float]]:
    """Columns `step` and `tokens`, to lay curves over tokens; between two points it is a straight line."""
    curve = curves.by_name.get(TRAIN_TOKENS_TOTAL)
    if curve is None:
        return {"step": [], "tokens": []}
    chosen = visible_points(curve.step, curve.value, num_points=DRAWN_POINTS)
    return {"step": _plain(curve.step[chosen]), "tokens": _plain(curve.value[chosen])}


def means_by_step(curves: Sequence[Curve | None], *, num_rows: int = 10) -> list[dict[str, Any]]:
    """Curves as a table of at most `num_rows` rows, evenly over the longest of them, of `step` and `values`.

    A value is the curve's mean since the row before, None where it has no point there.
    """
    known = [curve.step for curve in curves if curve is not None]
    if not known:
        return []
    steps = np.unique(np.concatenate(known))
    # Rows end at steps that have a point, so that a figure that is rare keeps its own steps.
    ends = steps[np.linspace(0, len(steps), min(num_rows, len(steps)) + 1)[1:].astype(np.int64) - 1]
    rows = []
    for begin, end in pairwise([-math.inf, *ends.tolist()]):
        parts = [None if one is None else one.value[(one.step > begin) & (one.step <= end)] for one in curves]
        values = [None if part is None or not len(part) else float(part.mean()) for part in parts]
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
    """As short as they can be written in JSON: 7 digits, or so many decimals, and whole numbers without a point."""
    rounded = (
        float(f"{value:.{_DIGITS}g}") if decimals is None else round(value, decimals) for value in values.tolist()
    )
    return [int(value) if value.is_integer() and abs(value) < 1e15 else value for value in rounded]


class _Columns:
    """Lines, taken apart into columns by name."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.figures: dict[str, tuple[list[int], list[int], list[float]]] = {}
        """Name → steps, numbers of the line, values."""
        self.non_finite: list[tuple[int, str, str]] = []
        self.damaged = 0

    def add(self, line: Any) -> None:
        step, moment = (line.get("step"), line.get("time")) if isinstance(line, dict) else (None, None)
        if not isinstance(step, int) or not isinstance(moment, float | int):
            self.damaged += 1
            return
        number = len(self.times)
        self.times.append(moment)
        for name, value in line.items():
            if name in ("step", "time"):
                continue
            if type(value) is float or type(value) is int:
                if not math.isfinite(value):
                    continue
                column = self.figures.get(name)
                if column is None:
                    column = self.figures[name] = ([], [], [])
                column[0].append(step)
                column[1].append(number)
                column[2].append(value)
            elif name == "non_finite" and isinstance(value, dict):
                self.non_finite.extend((step, key, str(what)) for key, what in value.items())


def _lines(content: bytes) -> Iterator[Any]:
    """Each line's value, None where it is no JSON. The rest after the last line's end is not counted as one."""
    for text in content.split(b"\n")[:-1]:
        try:
            yield json.loads(text)
        except ValueError:
            yield None


def _pauses(times: Floats, resumes: list[float]) -> Floats:
    """For each line, the seconds before it in which the run lay still."""
    pauses = np.zeros(len(times))
    for resumed in resumes:
        after = int(np.searchsorted(times, resumed))
        if 0 < after < len(times):
            pauses[after:] += max(0.0, resumed - times[after - 1])
    return pauses
