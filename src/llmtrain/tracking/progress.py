"""How far a run is: a live bar on a terminal, plain lines elsewhere.

    ⠼ training ━━━━━━━━━╸━━━━━━━━━━━━━━━━━━ 120/900  loss 3.210  6.1k tok/s  mfu 41%  eta 4m12s
    12:01:33 INFO  [train] step 120/900  loss 3.210  lr 3.0e-03  grad 0.82  6.1k tok/s  mfu 41%  eta 4m12s

The figures are always logged, so the run's log file has them; a terminal with the bar repeats only validation's.
Both go to stderr. What the figures are called is in `metrics`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from llmtrain.tracking import terminal
from llmtrain.tracking.metrics import VAL_LOSS, describe, short_count, short_duration

log = logging.getLogger("llmtrain.train")
stage_log = logging.getLogger("llmtrain.progress")

# Each redraw takes over a millisecond from a training process that may own two cores.
_REDRAWS_PER_SEC = 2
_LINE_INTERVAL_SEC = 10.0
_PACE_WINDOW = 200
_MIN_BAR_WIDTH = 6


class Progress:
    """Shows the steps of a run, and the progress of other stages (`track`); used as a context manager.

    `total_steps`: None for work that has no steps, such as preparing data. `start_step`: steps that a resumed run has
    behind it. `plain`: lines instead of a bar; None finds out. `quiet`: neither, for the ranks that say nothing.
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
        self._shown: dict[str, float] = {}
        # (time, step); the first is that of the first step's end, so that its compilation does not count.
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_WINDOW)
        self._tracked: dict[str, _Tracked] = {}
        use_bar = not quiet and not (not terminal.can_draw() if plain is None else plain)
        self._bar = _Bar(total_steps, start_step=start_step) if use_bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are done; with `metrics`, which carry their full names, they are shown and logged."""
        now = self._clock()
        self._pace.append((now, step))
        if self._quiet:
            return
        seconds_left = self._seconds_left(step)
        eta = "" if seconds_left is None else f"eta {short_duration(seconds_left)}"
        if metrics is not None:
            self._shown |= metrics
            line = "  ".join(filter(None, (f"step {step}/{self._total_steps}", describe(metrics), eta)))
            is_rare = VAL_LOSS in metrics  # a result to keep on the screen, even above a bar
            log.info("%s", line, extra={"shown_by_bar": not is_rare, "step": step, "metrics": dict(metrics)})
        if self._bar:
            self._bar.move(step, figures=describe(self._shown, brief=True), eta=eta)

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
            if self._bar:
                self._bar.add(stage, total)
        finished = done >= total
        interval = 1 / _REDRAWS_PER_SEC if self._bar else _LINE_INTERVAL_SEC
        if now - tracked.told >= interval or (finished and (self._bar or tracked.told > tracked.began)):
            tracked.told = now
            figures = tracked.describe(done, total, now=now, speed=speed)
            if self._bar:
                self._bar.move_added(stage, done, total, figures=figures)
            else:
                stage_log.info("%s %s", stage, figures)
        if finished:
            del self._tracked[stage]
            if self._bar:
                self._bar.remove(stage)

    def _set_stage(self, text: str) -> None:
        if text != self._stage:
            self._stage = text
            if self._bar:
                self._bar.set_stage(text)
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


class _Bar:
    """The bars as they are drawn: the run's own, and one for each stage that is tracked."""

    def __init__(self, total_steps: int | None, *, start_step: int) -> None:
        self._rich = RichProgress(
            SpinnerColumn(finished_text="✓", table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_MIN_BAR_WIDTH)),
            TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[eta]}", table_column=Column(no_wrap=True)),
            console=terminal.stderr_console(),
            refresh_per_second=_REDRAWS_PER_SEC,
            expand=True,
            # Text printed to a terminal goes above the bar; a redirected stdout is nobody's to touch.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
        )
        self._added: dict[str, TaskID] = {}
        self._stage = "starting"
        self._total_steps = total_steps
        self._main: TaskID | None = None
        if total_steps is not None:
            self._main = self._rich.add_task(
                self._stage,
                total=total_steps,
                completed=start_step,
                count=f"{start_step}/{total_steps}",
                figures="",
                eta="",
            )

    def start(self) -> None:
        self._rich.start()
        terminal.set_bar_live(True)

    def stop(self) -> None:
        terminal.set_bar_live(False)
        for stage in list(self._added):
            self.remove(stage)
        if self._rich.finished:
            self.set_stage("done")
        self._rich.stop()

    def move(self, step: int, *, figures: str, eta: str) -> None:
        if self._main is not None:
            count = f"{step}/{self._total_steps}"
            room = self._rich.console.width - len(f"⠼ {self._stage} {'━' * _MIN_BAR_WIDTH} {count}  {eta}")
            while len(figures) > room:  # on a narrow terminal the last ones go, not a bit of each
                figures = figures.rpartition("  ")[0]
            self._rich.update(self._main, completed=step, count=count, figures=figures, eta=eta)

    def set_stage(self, text: str) -> None:
        self._stage = text
        if self._main is not None:
            self._rich.update(self._main, description=text)

    def add(self, stage: str, total: int) -> None:
        self._added[stage] = self._rich.add_task(stage, total=total, count="", figures="", eta="")

    def move_added(self, stage: str, done: int, total: int, *, figures: str) -> None:
        self._rich.update(self._added[stage], completed=done, total=total, figures=figures)

    def remove(self, stage: str) -> None:
        self._rich.remove_task(self._added.pop(stage))
