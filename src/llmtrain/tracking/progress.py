"""Shows the progress of a run: a live view on a terminal (`live_view`), log lines elsewhere.

    12:01:33 INFO  [train] step 120/900  loss 3.210  lr 3.0e-03  grad 0.82  6.1k tok/s  mfu 41%  eta 4m12s

Metrics are always logged, so they are in the run's log file. A terminal with the live view prints only the log lines
with validation metrics. Both go to stderr.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from llmtrain.tracking import terminal
from llmtrain.tracking.live_view import REDRAWS_PER_SEC, LiveView
from llmtrain.tracking.metric_names import VAL_LOSS, describe, short_count, short_duration

log = logging.getLogger("llmtrain.train")
stage_log = logging.getLogger("llmtrain.progress")

_LINE_INTERVAL_SEC = 10.0
_MAX_STEP_TIMES = 200


class Progress:
    """Context manager that shows the steps of a run and the progress of other stages (`track`).

    `total_steps`: None for work without steps, such as preparing data. `start_step`: the steps before a resume.
    `plain`: log lines instead of the view; None: depends on the terminal. `quiet`: show nothing, for ranks but rank 0.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        start_step: int = 0,
        plain: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._quiet = quiet
        self._clock = clock
        self._stage = "starting"
        # (time, step). The first entry is the end of the first step, so that its compilation does not count.
        self._step_times: deque[tuple[float, int]] = deque(maxlen=_MAX_STEP_TIMES)
        self._tracked: dict[str, _Tracked] = {}
        draws = not quiet and (terminal.can_draw() if plain is None else not plain)
        self._view = LiveView(total_steps, start_step=start_step) if draws else None

    def __enter__(self) -> Self:
        if self._view:
            self._view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._view:
            self._view.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that `step` steps are done. `metrics`, by their full names, are shown and logged."""
        self._step_times.append((self._clock(), step))
        if self._quiet:
            return
        seconds_left = self._seconds_left(step)
        eta = "" if seconds_left is None else f"eta {short_duration(seconds_left)}"
        if metrics is not None:
            if self._view:
                self._view.latest.update(metrics)
            line = "  ".join(filter(None, (f"step {step}/{self._total_steps}", describe(metrics), eta)))
            is_rare = VAL_LOSS in metrics  # it stays on the screen, above the bar
            log.info("%s", line, extra={"shown_by_bar": not is_rare, "step": step, "metrics": dict(metrics)})
        if self._view:
            self._view.move(step, eta=eta)

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        """Show the metrics of an evaluation, which the caller logs."""
        if self._view:
            self._view.latest.evaluated(step, metrics, best=best)

    def saved(self, step: int) -> None:
        """Show that a checkpoint is being written."""
        if self._view:
            self._view.latest.saved(step)

    def stage(self, text: str) -> None:
        """Show what the run does from now on: training, compiling, evaluating, saving."""
        if text == self._stage:
            return
        self._stage = text
        if self._view:
            self._view.set_stage(text)
        elif not self._quiet:
            stage_log.debug("%s", text)

    def track(self, stage: str, done: int, total: int, *, speed: str | None = None) -> None:
        """Show that `done` of `total` units of a stage are done. It is cheap enough to be called for each document.

        A terminal gets a second bar until the stage is done, anything else a line every ten seconds. `speed` replaces
        the rate that is computed from `done`.
        """
        if self._quiet:
            return
        now, finished = self._clock(), done >= total
        tracked = self._tracked.get(stage)
        if tracked is None:
            tracked = self._tracked[stage] = _Tracked(began=now, first=done, shown=now)
            if self._view:
                self._view.show_stage(stage, done, total)
        due = now - tracked.shown >= (1 / REDRAWS_PER_SEC if self._view else _LINE_INTERVAL_SEC)
        if due or (finished and (self._view or tracked.shown > tracked.began)):
            tracked.shown = now
            text = tracked.describe(done, total, now=now, speed=speed)
            if self._view:
                self._view.show_stage(stage, done, total, text=text)
            else:
                stage_log.info("%s %s", stage, text)
        if finished:
            del self._tracked[stage]

    def _seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._step_times[0], self._step_times[-1]
        if self._total_steps is None or step >= self._total_steps or last_step <= first_step:
            return None
        return (self._total_steps - step) * (last_time - first_time) / (last_step - first_step)


@dataclass
class _Tracked:
    """Times at which a stage began and was last shown, in seconds of the clock."""

    began: float
    first: int
    """Units that were done when the stage began."""
    shown: float

    def describe(self, done: int, total: int, *, now: float, speed: str | None = None) -> str:
        """Return `1.2M/5.0M  24%  310k/s  eta 12s`."""
        parts = [f"{short_count(done)}/{short_count(total)}", f"{100 * done / max(1, total):.0f}%"]
        rate = (done - self.first) / (now - self.began) if now > self.began else 0.0
        if rate > 0:
            parts += [speed or f"{short_count(rate)}/s", f"eta {short_duration((total - done) / rate)}"]
        return "  ".join(parts)
