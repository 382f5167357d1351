"""What a terminal shows while work goes on: bars, and below that of a training run its figures.

    ⠼ training ━━━━━━━━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 420/900  eta 4m12s
      loss   3.210  ▇█▆▅▅▄▃▃▂▂▂▁▂▁▁                lr      3.0e-03  grad 0.82
      speed  6.1k tok/s  mfu 41%                   memory  1.2 GB, peak 1.4
      val    3.100 at step 400, the best           saved   step 400, 12s ago
      note   waiting for data took 30 % of the time so far: raise data.num_workers (now 0)

A narrow or low terminal gets the bar alone, with what figures it has room for; so does what is left when all is over.
What is said there, and when, is `progress`'s matter.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from llmtrain.tracking import terminal
from llmtrain.tracking.machine import GPU_MEMORY_GB, PEAK_RSS_GB, RSS_GB
from llmtrain.tracking.metrics import (
    TRAIN_GRAD_NORM,
    TRAIN_LOSS,
    TRAIN_LR,
    TRAIN_MFU,
    TRAIN_SKIPPED_STEPS,
    TRAIN_TOKENS_PER_SEC,
    VAL_LOSS,
    describe,
    short_count,
    short_duration,
)

# A redraw takes about a millisecond from a training process that may own two cores.
REDRAWS_PER_SEC: Final = 2
# A terminal writes ^C where the cursor is: at a full line's end it would begin a new line, and one of ours stay behind.
_ROOM_FOR_ECHO = len("^C")
_MIN_BAR_WIDTH = 6
_MIN_COLUMNS_FOR_FIGURES = 50
_MIN_ROWS_FOR_FIGURES = 12
_MIN_COLUMNS_FOR_PAIRS = 76
_MAX_SPARK_CELLS = 24
_BESIDE_SPARK = len("  skipped  12.345    ")
_SPARK_LEVELS = "▁▂▃▄▅▆▇█"
_MAX_LOSSES = 512


class Figures:
    """The newest figures of a run, as rows of label and text. Holds no terminal, so it can be drawn anywhere."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=_MAX_LOSSES)
        self._evaluated: tuple[int, bool] | None = None
        self._saved: tuple[int, float] | None = None
        self._warnings = 0
        self._last_warning = ""

    def update(self, figures: Mapping[str, float]) -> None:
        """Newer figures, by their full names."""
        self._shown |= figures
        if (loss := figures.get(TRAIN_LOSS)) is not None:
            self._losses.append(loss)

    def evaluated(self, step: int, figures: Mapping[str, float], *, best: bool) -> None:
        """An evaluation's figures."""
        self._shown |= figures
        if VAL_LOSS in figures:
            self._evaluated = (step, best)

    def saved(self, step: int) -> None:
        """A checkpoint is on its way."""
        self._saved = (step, self._clock())

    def warned(self, message: str) -> None:
        """A warning was logged, which scrolls away."""
        self._warnings += 1
        self._last_warning = " ".join(message.split())

    def brief(self) -> str:
        """What a bar has room for."""
        return describe(self._shown, brief=True)

    def rows(self, *, spark_cells: int) -> list[tuple[str, str]]:
        """Label and text, in the order of interest; what there is nothing of is left out."""
        shown = self._shown
        rows = []
        if TRAIN_LOSS in shown:
            curve = sparkline(self._losses.copy(), cells=spark_cells) if len(self._losses) > 1 else ""
            rows.append(("loss", f"{shown[TRAIN_LOSS]:.3f}  {curve}".rstrip()))
        if TRAIN_LR in shown:
            rows.append(("lr", describe_only(shown, TRAIN_LR).removeprefix("lr ") + self._after(TRAIN_GRAD_NORM)))
        if TRAIN_TOKENS_PER_SEC in shown:
            speed = f"{short_count(shown[TRAIN_TOKENS_PER_SEC])} tok/s"
            rows.append(("speed", speed + self._after(TRAIN_MFU)))
        if RSS_GB in shown:
            gpu = f"GPU {shown[GPU_MEMORY_GB]:.1f} GB, " if GPU_MEMORY_GB in shown else ""
            peak = f", peak {shown[PEAK_RSS_GB]:.1f}" if PEAK_RSS_GB in shown and not gpu else ""
            rows.append(("memory", f"{gpu}{'host ' if gpu else ''}{shown[RSS_GB]:.1f} GB{peak}"))
        if self._evaluated and VAL_LOSS in shown:
            step, best = self._evaluated
            rows.append(("val", f"{shown[VAL_LOSS]:.3f} at step {step}{', the best' if best else ''}"))
        if self._saved:
            step, when = self._saved
            rows.append(("saved", f"step {step}, {short_duration(self._clock() - when)} ago"))
        if shown.get(TRAIN_SKIPPED_STEPS):
            rows.append(("skipped", f"{shown[TRAIN_SKIPPED_STEPS]:.0f} steps without an update"))
        return rows

    def note(self) -> str:
        """The newest warning, and how many there were; empty without any."""
        count = f" ({self._warnings} so far)" if self._warnings > 1 else ""
        return self._last_warning + count

    def _after(self, name: str) -> str:
        return f"  {describe_only(self._shown, name)}" if name in self._shown else ""


def describe_only(figures: Mapping[str, float], name: str) -> str:
    """One figure in words."""
    return describe({name: figures[name]})


def sparkline(values: Iterable[float], *, cells: int) -> str:
    """`▇▅▃▂▁▁` over the finite values, each cell the mean of its share of them; the lowest is ▁, the highest █."""
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
    """The bars as they are drawn: the run's own with its figures below, and one for each stage that is tracked."""

    def __init__(self, total_steps: int | None, *, start_step: int) -> None:
        self.figures = Figures()
        self._bars = RichProgress(
            SpinnerColumn(finished_text="✓", table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_MIN_BAR_WIDTH)),
            TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[eta]}", table_column=Column(no_wrap=True)),
            console=terminal.stderr_console(),
            expand=True,
            auto_refresh=False,
        )
        self._added: dict[str, TaskID] = {}
        self._stage, self._eta = "starting", ""
        self._total_steps = total_steps
        self._main: TaskID | None = None
        self._is_over = False
        self._listener = _Listener(self.figures)
        if total_steps is not None:
            self._main = self._bars.add_task(
                self._stage,
                total=total_steps,
                completed=start_step,
                count=f"{start_step}/{total_steps}",
                figures="",
                eta="",
            )
        self._live = Live(
            get_renderable=self._render,
            console=terminal.stderr_console(),
            refresh_per_second=REDRAWS_PER_SEC,
            # Text printed to a terminal goes above the bar; a redirected stdout is nobody's to touch.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=True,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        """Begin to draw."""
        logging.getLogger("llmtrain").addHandler(self._listener)
        self._live.start(refresh=True)
        terminal.set_bar_live(True)

    def stop(self) -> None:
        """Draw the bar for the last time, with the figures that it has room for, and leave it there."""
        logging.getLogger("llmtrain").removeHandler(self._listener)
        terminal.set_bar_live(False)
        for stage in list(self._added):
            self.remove(stage)
        if self._bars.finished:
            self.set_stage("done")
        self._is_over = True
        self._live.stop()

    def move(self, step: int, *, eta: str) -> None:
        """So many steps are done."""
        if self._main is not None:
            self._eta = eta
            self._bars.update(self._main, completed=step, count=f"{step}/{self._total_steps}", eta=eta)

    def set_stage(self, text: str) -> None:
        """What the run does now."""
        self._stage = text
        if self._main is not None:
            self._bars.update(self._main, description=text)

    def add(self, stage: str, total: int) -> None:
        """A second bar."""
        self._added[stage] = self._bars.add_task(stage, total=total, count="", figures="", eta="")

    def move_added(self, stage: str, done: int, total: int, *, figures: str) -> None:
        """So much of a stage is done."""
        self._bars.update(self._added[stage], completed=done, total=total, figures=figures)

    def remove(self, stage: str) -> None:
        """Take its bar away."""
        self._bars.remove_task(self._added.pop(stage))

    def _render(self) -> RenderableType:
        """Called by rich's thread, twice a second."""
        console = self._bars.console
        if self._main is None:
            return self._bars.get_renderable()
        has_room = console.width >= _MIN_COLUMNS_FOR_FIGURES and console.height >= _MIN_ROWS_FOR_FIGURES
        width = console.width - _ROOM_FOR_ECHO
        below = [] if self._is_over or not has_room else self._below(width)
        self._bars.update(self._main, figures="" if below else self._fitting(width))
        return Constrain(Group(self._bars.get_renderable(), *below), width)

    def _below(self, width: int) -> list[Text]:
        can_draw_curve = self._bars.console.encoding.startswith("utf")
        return figures_below(self.figures, width=width, spark=can_draw_curve)

    def _fitting(self, width: int) -> str:
        """The figures that the bar's line has room for: on a narrow terminal the last ones go, not a bit of each."""
        assert self._main is not None
        figures, count = self.figures.brief(), self._bars.tasks[0].fields["count"]
        room = width - len(f"⠼ {self._stage} {'━' * _MIN_BAR_WIDTH} {count}  {self._eta}")
        while figures and len(figures) > room:
            figures = figures.rpartition("  ")[0]
        return figures


def figures_below(figures: Figures, *, width: int, spark: bool = True) -> list[Text]:
    """What stands below the bar on a terminal of so many columns."""
    pairs = 2 if width >= _MIN_COLUMNS_FOR_PAIRS else 1
    rows = figures.rows(spark_cells=min(_MAX_SPARK_CELLS, width // pairs - _BESIDE_SPARK) if spark else 0)
    if not rows and not figures.note():
        return []
    below = []
    columns = [rows[column::pairs] for column in range(pairs)]
    label_widths = [max(len(label) for label, _ in column) if column else 0 for column in columns]
    room = width // pairs
    for row in _chunks(rows, pairs):  # a rich.Table takes longer than all the rest
        line = Text(no_wrap=True, overflow="ellipsis")
        for (label, text), label_width in zip(row, label_widths, strict=False):
            line.append(f"  {label:<{label_width}}  ", style="dim")
            cell = text.ljust(room - label_width - 4)
            line.append(cell if len(cell) <= room - label_width - 4 else f"{cell[: room - label_width - 5]}…")
        below.append(line)
    if note := figures.note():
        below.append(Text.assemble(("  note   ", "dim"), (note, "yellow"), no_wrap=True, overflow="ellipsis"))
    return below


def _chunks(rows: Sequence[tuple[str, str]], size: int) -> Iterable[Sequence[tuple[str, str]]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))


class _Listener(logging.Handler):
    """Hands warnings to the figures."""

    def __init__(self, figures: Figures) -> None:
        super().__init__(logging.WARNING)
        self._figures = figures

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._figures.warned(record.getMessage())
        except Exception:
            self.handleError(record)
