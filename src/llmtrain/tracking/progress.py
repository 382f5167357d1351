"""How far a run is: a live view on a terminal (`live`), plain lines elsewhere.

    12:01:33 INFO  [train] step 120/900  loss 3.210  lr 3.0e-03  grad 0.82  6.1k tok/s  mfu 41%  eta 4m12s

The figures are always logged, so the run's log file has them; a terminal with the view repeats only validation's.
Both go to stderr. What the figures are called is in `metrics`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from llmtrain.tracking import terminal
from llmtrain.tracking.live import REDRAWS_PER_SEC, LiveView
from llmtrain.tracking.metrics import VAL_LOSS, describe, short_count, short_duration

log = logging.getLogger("llmtrain.train")
stage_log = logging.getLogger("llmtrain.progress")

_LINE_INTERVAL_SEC = 10.0
_PACE_WINDOW = 200


class Progress:
    """Shows the steps of a run, and the progress of other stages (`track`); used as a context manager.

    `total_steps`: None for work that has no steps, such as preparing data. `start_step`: steps that a resumed run has
    behind it. `plain`: lines instead of the view; None finds out. `quiet`: neither, for the ranks that say nothing.
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
        # (time, step); the first is that of the first step's end, so that its compilation does not count.
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_WINDOW)
        self._tracked: dict[str, _Tracked] = {}
        draws = not quiet and not (not terminal.can_draw() if plain is None else plain)
        self._view = LiveView(total_steps, start_step=start_step) if draws else None

    def __enter__(self) -> Self:
        if self._view:
            self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._view:
            self._view.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are done; with `metrics`, which carry their full names, they are shown and logged."""
        now = self._clock()
        self._pace.append((now, step))
        if self._quiet:
            return
        seconds_left = self._seconds_left(step)
        eta = "" if seconds_left is None else f"eta {short_duration(seconds_left)}"
        if metrics is not None:
            if self._view:
                self._view.figures.update(metrics)
            line = "  ".join(filter(None, (f"step {step}/{self._total_steps}", describe(metrics), eta)))
            is_rare = VAL_LOSS in metrics  # a result to keep on the screen, even above a bar
            log.info("%s", line, extra={"shown_by_bar": not is_rare, "step": step, "metrics": dict(metrics)})
        if self._view:
            self._view.move(step, eta=eta)

    def evaluated(self, step: int, figures: Mapping[str, float], *, best: bool) -> None:
        """An evaluation is done; it is logged elsewhere."""
        if self._view:
            self._view.figures.evaluated(step, figures, best=best)

    def saved(self, step: int) -> None:
        """A checkpoint is being written."""
        if self._view:
            self._view.figures.saved(step)

    def stage(self, text: str) -> StageScope:
        """Show what the run does now: training, compiling, evaluating, saving.

        It stays until the next call; as a context manager (`with progress.stage("saving"):`) until the block's end.
        """
        before = self._stage
        self._set_stage(text)
        return StageScope(lambda: self._set_stage(before))

    def track(self, stage: str, done: int, total: int, *, speed: str | None = None) -> None:
        """`done` of `total` of a stage's work is done; cheap enough to call for each document.

        On a terminal a second bar, which goes when all is done; else a line every ten seconds. `speed` is shown in
        place of how much of the work is done in a second.
        """
        if self._quiet:
            return
        now = self._clock()
        tracked = self._tracked.get(stage)
        if tracked is None:
            tracked = self._tracked[stage] = _Tracked(began=now, first=done, told=now)
            if self._view:
                self._view.add(stage, total)
        finished = done >= total
        interval = 1 / REDRAWS_PER_SEC if self._view else _LINE_INTERVAL_SEC
        if now - tracked.told >= interval or (finished and (self._view or tracked.told > tracked.began)):
            tracked.told = now
            figures = tracked.describe(done, total, now=now, speed=speed)
            if self._view:
                self._view.move_added(stage, done, total, figures=figures)
            else:
                stage_log.info("%s %s", stage, figures)
        if finished:
            del self._tracked[stage]
            if self._view:
                self._view.remove(stage)

    def _set_stage(self, text: str) -> None:
        if text != self._stage:
            self._stage = text
            if self._view:
                self._view.set_stage(text)
            elif not self._quiet:
                stage_log.debug("%s", text)

    def _seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if self._total_steps is None or step >= self._total_steps or last_step <= first_step:
            return None
        return (self._total_steps - step) * (last_time - first_time) / (last_step - first_step)


class StageScope:
    """What `Progress.stage` gives: leaving it brings the stage before back."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()


@dataclass
class _Tracked:
    """A stage that counts its own work; times in seconds."""

    began: float
    first: int
    told: float

    def describe(self, done: int, total: int, *, now: float, speed: str | None = None) -> str:
        """`1.2M/5.0M  24%  310k/s  eta 12s`."""
        parts = [f"{short_count(done)}/{short_count(total)}", f"{100 * done / max(1, total):.0f}%"]
        rate = (done - self.first) / (now - self.began) if now > self.began else 0.0
        if rate > 0:
            parts += [speed or f"{short_count(rate)}/s", f"eta {short_duration((total - done) / rate)}"]
        return "  ".join(parts)
