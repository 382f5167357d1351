from __future__ import annotations

import logging
import math
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, Group

from llmtrain.config.sections.running import LoggingConfig
from llmtrain.tracking.live_view import LatestMetrics, sparkline
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.progress import Progress
from tests.support.terminal import Terminal, terminal_as_stderr

pytestmark = pytest.mark.usefixtures("plain_terminal")

METRICS = {
    "train/loss": 3.2104,
    "train/lr": 3e-3,
    "train/grad_norm": 0.8249,
    "train/tokens_per_sec": 6123.0,
    "train/mfu": 0.412,
    "system/rss_gb": 1.23,
    "system/peak_rss_gb": 1.44,
}


def a_run(*, now: list[float] | None = None) -> LatestMetrics:
    """The metrics of a run that has evaluated and saved, five seconds ago."""
    times = now or [0.0]
    latest = LatestMetrics(clock=lambda: times[0])
    for loss in (5.0, 4.5, 4.0, 3.2104):
        latest.update(METRICS | {"train/loss": loss})
    latest.evaluated(400, {"val/loss": 3.1, "val/perplexity": 22.2}, best=True)
    latest.saved(400)
    times[0] += 5.0
    return latest


def test_the_rows_say_loss_rate_speed_memory_validation_and_checkpoint() -> None:
    latest = a_run()
    rows = latest.rows(spark_cells=24)

    assert rows == [
        ("loss", "3.210  █▆▄▁"),
        ("lr", "3.0e-03  grad 0.82"),
        ("speed", "6.1k tok/s  mfu 41%"),
        ("memory", "1.2 GB, peak 1.4"),
        ("val", "3.100 at step 400, the best"),
        ("saved", "step 400, 5s ago"),
    ]
    latest.evaluated(500, {"val/loss": 3.2}, best=False)
    latest.update({"train/skipped_steps": 2.0, "system/gpu_memory_gb": 71.04})
    later = dict(latest.rows(spark_cells=0))
    assert later["val"] == "3.200 at step 500"
    assert later["skipped"] == "2 steps without an update"
    assert later["memory"] == "GPU 71.0 GB, host 1.2 GB"
    assert later["loss"] == "3.210"


def test_a_metric_that_is_not_known_has_no_row() -> None:
    latest = LatestMetrics()
    assert (latest.rows(spark_cells=24), latest.note(), latest.lines(width=80)) == ([], "", [])
    latest.update({"train/loss": math.nan})
    assert latest.rows(spark_cells=24) == [("loss", "nan")]


def test_the_newest_warning_stays_visible_with_the_number_of_warnings() -> None:
    latest = LatestMetrics()
    latest.warned("waiting for data\n took 30 % of the time")
    assert latest.note() == "waiting for data took 30 % of the time"
    latest.warned("SIGTERM")
    assert latest.note() == "SIGTERM (2 so far)"


def shown(latest: LatestMetrics, *, width: int) -> list[str]:
    console = Console(width=width, file=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(Group(*latest.lines(width=width)))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_metrics_are_in_two_columns_if_they_fit_else_in_one() -> None:
    latest = a_run()
    for loss in range(40):
        latest.update({"train/loss": 3.0 - loss / 100})
    latest.warned("the disk is full; " * 9)

    wide, standard, narrow = (shown(latest, width=width) for width in (118, 78, 58))

    assert [line.split()[0] for line in wide] == ["loss", "speed", "val", "note"]
    assert [line.split()[0] for line in narrow] == ["loss", "lr", "speed", "memory", "val", "saved", "note"]
    assert wide[0].index("lr ") == wide[1].index("memory") == wide[2].index("saved")
    for lines, width, cells in ((wide, 118, 24), (standard, 78, 18), (narrow, 58, 24)):
        assert all(len(line) <= width for line in lines)
        assert sum(letter in "▁▂▃▄▅▆▇█" for letter in lines[0]) == cells
        assert [line for line in lines if "…" in line] == lines[-1:], "only the note is cut"


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=600), st.integers(0, 40))
def test_a_sparkline_has_no_more_cells_than_given_and_shows_the_lowest_and_the_highest(
    values: list[float], cells: int
) -> None:
    curve = sparkline(values, cells=cells)
    finite = [value for value in values if math.isfinite(value)]

    assert len(curve) == min(cells, len(finite))
    assert set(curve) <= set("▁▂▃▄▅▆▇█")
    if curve and len(finite) <= cells:
        low, high = finite.index(min(finite)), finite.index(max(finite))
        assert curve[low] == "▁"
        assert curve[high] == ("█" if max(finite) > min(finite) else "▁")


def test_a_sparkline_falls_with_its_values() -> None:
    curve = sparkline([1 / (1 + step) for step in range(64)], cells=8)
    assert (curve[0], curve[-1]) == ("█", "▁")
    assert list(curve) == sorted(curve, reverse=True)


def watch(*, columns: int, rows: int = 40, until: str) -> Terminal:
    """A run on a terminal of that size, with everything that the view shows, which lasts until that is seen."""
    with terminal_as_stderr(columns=columns, rows=rows) as tty:
        setup_logging(LoggingConfig(), run_folder=None, rank=0)
        with Progress(900) as progress:
            progress.stage("training")
            for step, loss in ((1, 5.0), (2, 4.0), (420, 3.2104)):
                progress.update(step, METRICS | {"train/loss": loss})
            progress.evaluated(400, {"val/loss": 3.1}, best=True)
            progress.saved(400)
            logging.getLogger("llmtrain.train").warning("waiting for data took 30 % of the time")
            deadline = time.monotonic() + 30
            while until not in tty.raw and time.monotonic() < deadline:
                time.sleep(0.01)
    return tty


@pytest.mark.parametrize("columns", [80, 120])
def test_metrics_are_below_the_bar_during_the_run_and_only_the_bar_is_left(columns: int) -> None:
    tty = watch(columns=columns, until="ago")

    for text in (
        "█▄▁",
        "3.0e-03  grad 0.82",
        "6.1k tok/s  mfu 41%",
        "1.2 GB, peak 1.4",
        "3.100 at step 400",
    ):
        assert text in tty.raw, text
    assert re.search(r"step 400, \d+s ago", tty.raw)
    assert "note   " in tty.raw
    screen = tty.screen()
    assert [line[9:] for line in screen[:-1]] == ["WARN  [train] waiting for data took 30 % of the time"]
    assert screen[-1].startswith("⠋ training") or screen[-1][2:].startswith("training")
    assert "420/900" in screen[-1]
    assert len(screen[-1]) <= columns - 2, "a ^C that the terminal writes there must not begin a line"


@pytest.mark.parametrize(("columns", "rows"), [(45, 40), (100, 8)])
def test_a_small_terminal_has_only_the_bar(columns: int, rows: int) -> None:
    tty = watch(columns=columns, rows=rows, until="420/900")

    assert "grad" not in tty.raw
    assert "note" not in tty.raw
    assert "420/900" in tty.screen()[-1]


def test_a_terminal_too_narrow_for_anything_does_not_hang() -> None:
    assert watch(columns=8, until="waiting").raw.startswith("\x1b[?25l")
