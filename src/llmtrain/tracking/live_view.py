"""Draws a run's progress on a terminal: bars, and below the run's own bar its newest metrics.

    ⠼ training ━━━━━━━━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 420/900  eta 4m12s
      loss   3.210  ▇█▆▅▅▄▃▃▂▂▂▁▂▁▁                lr      3.0e-03  grad 0.82
      speed  6.1k tok/s  mfu 41%                   memory  1.2 GB, peak 1.4
      val    3.100 at step 400, the best           saved   step 400, 12s ago
      note   waiting for data took 30 % of the time so far: raise data.num_workers (now 0)

A small terminal gets only the bar, with the metrics that fit beside it. So does the last drawing, which stays on the
screen when the run has ended. `progress` decides what is shown and when.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Final

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from llmtrain.tracking import metric_names as names
from llmtrain.tracking import terminal
from llmtrain.tracking.machine_monitor import GPU_MEMORY_GB, PEAK_RSS_GB, RSS_GB
from llmtrain.tracking.metric_names import describe, short_duration

# A redraw takes about a millisecond from a training process that may own two cores.
REDRAWS_PER_SEC: Final = 2
# A terminal echoes ^C at the cursor. After a full line that would wrap, and the next redraw would leave a line behind.
_ROOM_FOR_ECHO = len("^C")
_MIN_BAR_WIDTH = 6
_MIN_COLUMNS_FOR_METRICS = 50
_MIN_ROWS_FOR_METRICS = 12
_MIN_COLUMNS_FOR_PAIRS = 76
_MAX_SPARK_CELLS = 24
_BESIDE_SPARK = len("  skipped  12.345    ")
_SPARK_LEVELS = "▁▂▃▄▅▆▇█"
_MAX_LOSSES = 512


class LatestMetrics:
    """Keeps the newest metrics of a run, and lays them out as rows of label and text. It needs no terminal."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._values: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=_MAX_LOSSES)
        self._evaluated: tuple[int, bool] | None = None
        self._saved: tuple[int, float] | None = None
        self._num_warnings = 0
        self._last_warning = ""

    def update(self, metrics: Mapping[str, float]) -> None:
        """Store newer values, by the metrics' full names."""
        self._values |= metrics
        if (loss := metrics.get(names.TRAIN_LOSS)) is not None:
            self._losses.append(loss)

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        """Store the metrics of an evaluation."""
        self._values |= metrics
        if names.VAL_LOSS in metrics:
            self._evaluated = (step, best)

    def saved(self, step: int) -> None:
        """Record that a checkpoint is being written."""
        self._saved = (step, self._clock())

    def warned(self, message: str) -> None:
        """Keep a warning that was logged, since its log line scrolls away."""
        self._num_warnings += 1
        self._last_warning = " ".join(message.split())

    def brief(self) -> str:
        """Return the few metrics that fit beside a bar."""
        return describe(self._values, brief=True)

    def rows(self, *, spark_cells: int) -> list[tuple[str, str]]:
        """Return label and text of the metrics that are known, the most important first."""
        known = self._values
        rows = []
        if names.TRAIN_LOSS in known:
            curve = sparkline(self._losses.copy(), cells=spark_cells) if len(self._losses) > 1 else ""
            rows.append(("loss", f"{known[names.TRAIN_LOSS]:.3f}  {curve}".rstrip()))
        if names.TRAIN_LR in known:
            rows.append(("lr", self._describe(names.TRAIN_LR, names.TRAIN_GRAD_NORM).removeprefix("lr ")))
        if names.TRAIN_TOKENS_PER_SEC in known:
            rows.append(("speed", self._describe(names.TRAIN_TOKENS_PER_SEC, names.TRAIN_MFU)))
        if RSS_GB in known:
            host = f"{known[RSS_GB]:.1f} GB"
            peak = f", peak {known[PEAK_RSS_GB]:.1f}" if PEAK_RSS_GB in known else ""
            on_gpu = GPU_MEMORY_GB in known
            rows.append(("memory", f"GPU {known[GPU_MEMORY_GB]:.1f} GB, host {host}" if on_gpu else host + peak))
        if self._evaluated and names.VAL_LOSS in known:
            step, best = self._evaluated
            rows.append(("val", f"{known[names.VAL_LOSS]:.3f} at step {step}{', the best' if best else ''}"))
        if self._saved:
            step, when = self._saved
            rows.append(("saved", f"step {step}, {short_duration(self._clock() - when)} ago"))
        if known.get(names.TRAIN_SKIPPED_STEPS):
            rows.append(("skipped", f"{known[names.TRAIN_SKIPPED_STEPS]:.0f} steps without an update"))
        return rows

    def note(self) -> str:
        """Return the newest warning and the number of warnings; empty without any."""
        return self._last_warning + (f" ({self._num_warnings} so far)" if self._num_warnings > 1 else "")

    def lines(self, *, width: int, with_curve: bool = True) -> list[Text]:
        """Return the rows in two columns, or in one on a narrow terminal, and the note."""
        num_columns = 2 if width >= _MIN_COLUMNS_FOR_PAIRS else 1
        column_width = width // num_columns
        rows = self.rows(spark_cells=min(_MAX_SPARK_CELLS, column_width - _BESIDE_SPARK) if with_curve else 0)
        label_widths = [max((len(label) for label, _ in rows[at::num_columns]), default=0) for at in range(num_columns)]
        lines = []
        for first in range(0, len(rows), num_columns):  # a rich.Table would be slower than everything else here
            line = Text(no_wrap=True, overflow="ellipsis")
            for (label, text), label_width in zip(rows[first : first + num_columns], label_widths, strict=False):
                cell = Text(text, end="")
                cell.truncate(column_width - label_width - 4, overflow="ellipsis", pad=True)
                line.append(f"  {label:<{label_width}}  ", style="dim").append_text(cell)
            lines.append(line)
        if note := self.note():
            lines.append(Text.assemble(("  note   ", "dim"), (note, "yellow"), no_wrap=True, overflow="ellipsis"))
        return lines

    def _describe(self, *wanted: str) -> str:
        return describe({name: self._values[name] for name in wanted if name in self._values})


def sparkline(values: Iterable[float], *, cells: int) -> str:
    """Return a curve of the finite values, `▇▅▃▂▁▁`. Each cell is the mean of some values, from ▁ (lowest) to █."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or cells < 1:
        return ""
    count = min(cells, len(finite))
    bounds = [round(cell * len(finite) / count) for cell in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    if high == low:
        return _SPARK_LEVELS[0] * count
    top = len(_SPARK_LEVELS) - 1
    return "".join(_SPARK_LEVELS[round(top * (mean - low) / (high - low))] for mean in means)


class LiveView:
    """Draws the run's bar with its metrics below, and one bar for each stage that is tracked."""

    def __init__(self, total_steps: int | None, *, start_step: int) -> None:
        """Prepare the bars. `total_steps`: None for work without steps, which has no bar of its own."""
        self.latest = LatestMetrics()
        self._bars = RichProgress(
            SpinnerColumn(finished_text="✓", table_column=Column(no_wrap=True)),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_MIN_BAR_WIDTH)),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("{task.fields[eta]}"),
            console=terminal.stderr_console(),
            expand=True,
            auto_refresh=False,
        )
        self._stages: dict[str, TaskID] = {}
        self._total_steps = total_steps
        self._run: TaskID | None = None
        if total_steps is not None:
            self._run = self._add("starting", total_steps)
            self.move(start_step, eta="")
        self._is_over = False
        self._live = Live(
            get_renderable=self._render,
            console=terminal.stderr_console(),
            refresh_per_second=REDRAWS_PER_SEC,
            # Text printed to a terminal goes above the bar. A redirected stdout is left alone.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        """Begin to draw."""
        self._live.start(refresh=True)
        terminal.set_live_bar(self.latest.warned)

    def stop(self) -> None:
        """Draw the bar for the last time, with the metrics that fit beside it, and leave it there."""
        terminal.set_live_bar(None)
        for task in self._stages.values():
            self._bars.remove_task(task)
        if self._bars.finished:
            self.set_stage("done")
        self._is_over = True
        self._live.stop()

    def move(self, step: int, *, eta: str) -> None:
        """Show that `step` steps are done."""
        if self._run is not None:
            self._bars.update(self._run, completed=step, count=f"{step}/{self._total_steps}", eta=eta)

    def set_stage(self, text: str) -> None:
        """Show the present stage of the run."""
        if self._run is not None:
            self._bars.update(self._run, description=text)

    def show_stage(self, stage: str, done: int, total: int, *, text: str = "") -> None:
        """Show the progress of a stage on a bar of its own, which is removed when the stage is done."""
        if stage not in self._stages:
            self._stages[stage] = self._add(stage, total)
        self._bars.update(self._stages[stage], completed=done, total=total, metrics=text)
        if done >= total:
            self._bars.remove_task(self._stages.pop(stage))

    def _add(self, name: str, total: int) -> TaskID:
        return self._bars.add_task(name, total=total, count="", metrics="", eta="")

    def _render(self) -> RenderableType:
        """Return the drawing. Rich's thread calls this twice a second."""
        if self._run is None:
            return self._bars.get_renderable()
        console = self._bars.console
        width = console.width - _ROOM_FOR_ECHO
        has_room = console.width >= _MIN_COLUMNS_FOR_METRICS and console.height >= _MIN_ROWS_FOR_METRICS
        can_draw_curve = console.encoding.startswith("utf")
        below = self.latest.lines(width=width, with_curve=can_draw_curve) if has_room and not self._is_over else []
        self._bars.update(self._run, metrics="" if below else self._fitting(width))
        return Constrain(Group(self._bars.get_renderable(), *below), width)

    def _fitting(self, width: int) -> str:
        """Return the metrics that fit into the bar's line; on a narrow terminal the last ones are left out."""
        task = self._bars.tasks[0]
        room = width - len(f"⠼ {task.description} {'━' * _MIN_BAR_WIDTH} {task.fields['count']}  {task.fields['eta']}")
        metrics = self.latest.brief()
        while metrics and len(metrics) > room:
            metrics = metrics.rpartition("  ")[0]
        return metrics
