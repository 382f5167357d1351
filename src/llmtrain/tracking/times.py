"""Measures where a run's time goes, and how fast it trains.

    wall time = step + data + compile + evaluation + saving + other       (each second counts once)
    goodput   = step / wall time

Times are measured on the host with the monotonic clock. On a GPU the host runs ahead of the device, so the time of a
single step means little. Over a window whose end waits for the device, as reading the loss does, it is right.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

from llmtrain.tracking.metric_names import (
    PERF_CHECKPOINT_STALL,
    PERF_COMPILE_SEC,
    PERF_DATA_WAIT,
    PERF_GOODPUT,
    TRAIN_STEP_TIME_SEC,
    TRAIN_TOKENS_PER_SEC,
)

log = logging.getLogger("llmtrain.train")

Activity = Literal["step", "data", "compile", "evaluation", "saving"]
"""step: training. data: waiting for a batch. compile: a step that compiled. saving: the loop waits for a checkpoint."""

STALL_SHARE: Final = 0.10
"""Share of the wall time above which waiting gives a warning."""
_JUDGED_AFTER_SEC: Final = 30.0
_WAITING_FOR: Final[dict[Activity, str]] = {"data": "waiting for data", "saving": "waiting for checkpoints"}

_STALLS: Final[tuple[Activity, ...]] = ("compile", "evaluation", "saving")


@dataclass(frozen=True)
class Spent:
    """Time that a run has spent so far. Checkpoints contain it, and a resumed run adds to it."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time by activity, including `other`."""
    timed_tokens: int = 0
    """Tokens of the steps that count for the speed."""
    timed_seconds: float = 0.0
    """Time of these steps."""


class Timings:
    """Measures a run's wall time by activity: `with times.spent("evaluation"): …`.

    Activities may nest; time counts only for the innermost one. Only one thread may use it. `before`: the seconds of
    earlier attempts of the run.
    """

    def __init__(
        self, *, before: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        before = before or {}
        self._clock = clock
        self._changed = clock()
        self._began = self._changed - sum(before.values())
        self._open: list[Activity] = []
        self._seconds: dict[Activity, float] = {activity: before.get(activity, 0.0) for activity in get_args(Activity)}

    @contextmanager
    def spent(self, activity: Activity) -> Iterator[None]:
        """Count the time of the block for `activity`. Raises ValueError if there is no such activity."""
        if activity not in self._seconds:
            raise ValueError(f"{activity!r} is not an activity: use one of {', '.join(self._seconds)}")
        self._charge()
        self._open.append(activity)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def seconds(self, activity: Activity) -> float:
        """Return the seconds of `activity` so far, including open blocks."""
        self._charge()
        return self._seconds[activity]

    def training_seconds(self) -> float:
        """Return the wall time without compiling, evaluating and saving, which is the time for throughput."""
        self._charge()
        return self._changed - self._began - sum(self._seconds[stall] for stall in _STALLS)

    def goodput(self) -> float:
        """Return the share of the wall time that was spent in steps, from 0 to 1."""
        return self.summary().goodput

    def summary(self) -> TimeSummary:
        """Return the times of all activities until now."""
        self._charge()
        wall = self._changed - self._began
        by_activity: dict[str, float] = {str(activity): seconds for activity, seconds in self._seconds.items()}
        by_activity["other"] = wall - sum(by_activity.values())
        return TimeSummary(
            wall_sec=wall, seconds=by_activity, goodput=self._seconds["step"] / wall if wall > 0 else 0.0
        )

    def _charge(self) -> None:
        """Add the time since the last call to the innermost open activity."""
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._changed
        self._changed = now


@dataclass(frozen=True)
class TimeSummary:
    """Wall time by activity; the sum of `seconds` is `wall_sec`."""

    wall_sec: float
    goodput: float
    seconds: dict[str, float] = field(default_factory=dict)


class Throughput:
    """Measures tokens per second and time per step, between two log lines and over the entire run.

    Evaluation, saving, and steps that compiled do not count. Waiting for data does.
    """

    def __init__(self, times: Timings, *, before: Spent | None = None) -> None:
        before = before or Spent()
        self._times = times
        self._compile_sec = times.seconds("compile")
        self._step_began = times.training_seconds()
        self._window = _Window()
        self._all = _Window(tokens=before.timed_tokens, seconds=before.timed_seconds)

    def add(self, tokens: int) -> None:
        """Count a step that trained on `tokens` tokens over all ranks."""
        now, compile_sec = self._times.training_seconds(), self._times.seconds("compile")
        if compile_sec == self._compile_sec:
            for window in (self._window, self._all):
                window.add(tokens, seconds=now - self._step_began)
        self._step_began, self._compile_sec = now, compile_sec

    def next_window(self) -> dict[str, float]:
        """Return the metrics of the steps since the last call; {} if all of these steps compiled."""
        window, self._window = self._window, _Window()
        if window.steps == 0 or window.seconds <= 0:
            return {}
        return {
            TRAIN_TOKENS_PER_SEC: window.tokens / window.seconds,
            TRAIN_STEP_TIME_SEC: window.seconds / window.steps,
        }

    def add_to(self, spent: Spent) -> Spent:
        """Return `spent` with the tokens and seconds that count for the speed."""
        return replace(spent, timed_tokens=self._all.tokens, timed_seconds=self._all.seconds)

    def tokens_per_sec(self) -> float | None:
        """Return the speed over all steps so far; None before the first step that did not compile."""
        return self._all.tokens / self._all.seconds if self._all.seconds > 0 else None


class Waiting:
    """Measures how long training waits for data and checkpoints, and warns once for each if it is too long.

    `advice`: what to change, by the activity that takes too long. Compiling and evaluating do not count as training.
    """

    def __init__(self, times: Timings, *, advice: Mapping[Activity, str]) -> None:
        self._times = times
        self._advice = dict(advice)
        self._before = times.summary()

    def next_window(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        before, now = self._before, self._times.summary()
        self._before = now
        wall = now.wall_sec - before.wall_sec
        if wall <= 0:
            return {}
        self._warn_if_slow(now)
        return {
            PERF_DATA_WAIT: (now.seconds["data"] - before.seconds["data"]) / wall,
            PERF_CHECKPOINT_STALL: (now.seconds["saving"] - before.seconds["saving"]) / wall,
            PERF_COMPILE_SEC: now.seconds["compile"],
            PERF_GOODPUT: now.goodput,
        }

    def _warn_if_slow(self, now: TimeSummary) -> None:
        training_sec = now.wall_sec - now.seconds["compile"] - now.seconds["evaluation"]
        if training_sec < _JUDGED_AFTER_SEC:
            return
        for activity, words in _WAITING_FOR.items():
            share = now.seconds[activity] / training_sec
            if share > STALL_SHARE and (advice := self._advice.pop(activity, None)):
                log.warning("%s took %.0f %% of the time so far: %s", words, 100 * share, advice)


@dataclass
class _Window:
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, *, seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
