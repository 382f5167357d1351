from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from llmtrain.config.sections.running import LoggingConfig
from llmtrain.tracking import terminal
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.metric_names import METRIC_NAMES, describe, short_count, short_duration
from llmtrain.tracking.progress import Progress
from tests.support.terminal import terminal_as_stderr

pytestmark = pytest.mark.usefixtures("plain_terminal")

METRICS = {
    "train/loss": 3.2104,
    "train/lr": 3e-3,
    "train/epoch": 0.1,
    "train/grad_norm": 0.8249,
    "train/tokens_per_sec": 6123.0,
    "train/mfu": 0.412,
}


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_line_has_the_metrics_in_a_fixed_order(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with caplog.at_level("INFO", "llmtrain"), Progress(900, plain=True, clock=clock) as progress:
        progress.update(1, METRICS)
        clock.now += 119 * 0.5
        progress.update(120, METRICS)
        progress.update(120, {"val/loss": 3.1, "val/perplexity": 22.198, "val/bits_per_byte": 1.4603})

    assert caplog.messages == [
        "step 1/900  loss 3.210  lr 3.0e-03  grad 0.82  6.1k tok/s  mfu 41%",
        "step 120/900  loss 3.210  lr 3.0e-03  grad 0.82  6.1k tok/s  mfu 41%  eta 6m30s",
        "step 120/900  val 3.100  perplexity 22.2  bits/byte 1.460  eta 6m30s",
    ]
    assert capsys.readouterr() == ("", "")


def test_an_unknown_device_has_no_mfu_and_a_loss_of_nan_is_shown() -> None:
    assert describe({"train/loss": math.nan, "train/tokens_per_sec": 512.0}) == "loss nan  512 tok/s"
    assert set(METRICS) < set(METRIC_NAMES)


def test_the_eta_leaves_out_the_first_step_also_after_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level("INFO", "llmtrain"), Progress(1000, start_step=500, plain=True, clock=clock) as progress:
        clock.now += 60  # compiling
        progress.update(501)
        for step in range(502, 601):
            clock.now += 2
            progress.update(step)
        progress.update(600, {"train/loss": 1.0})
        for step in range(601, 1001):
            clock.now += 1
            progress.update(step)
        progress.update(999, {"train/loss": 1.0})
        progress.update(1000, {"train/loss": 1.0})

    assert caplog.messages == [
        "step 600/1000  loss 1.000  eta 13m20s",
        "step 999/1000  loss 1.000  eta 1s",
        "step 1000/1000  loss 1.000",
    ]


def test_tracked_work_is_logged_every_ten_seconds_and_not_at_all_if_it_is_short(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with caplog.at_level("INFO", "llmtrain"), Progress(plain=True, clock=clock) as progress:
        for done in range(0, 25_001, 1000):
            progress.track("tokenise", done, 25_000)
            clock.now += 1
        for done in range(1, 6):
            progress.track("validation", done, 5)
            clock.now += 1

    assert caplog.messages == [
        "tokenise 10.0k/25.0k  40%  1.0k/s  eta 15s",
        "tokenise 20.0k/25.0k  80%  1.0k/s  eta 5s",
        "tokenise 25.0k/25.0k  100%  1.0k/s  eta 0s",
    ]


def test_a_bar_and_log_lines_do_not_garble_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_as_stderr() as tty:
        setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
        with Progress(40) as progress:
            progress.stage("training")
            for step in range(1, 41):
                progress.update(step, METRICS if step % 10 == 0 else None)
                logging.getLogger("llmtrain.model").info("line %d", step)
                if step == 20:
                    progress.stage("evaluating")
                    progress.track("validation", 1, 2)
                    time.sleep(0.6)
                    progress.track("validation", 2, 2)
                    progress.stage("training")
                    progress.update(20, {"val/loss": 3.1})
                    print("a library writes", file=sys.stderr)
            print('{"answer": 42}')

    screen = tty.screen()
    lines = [line for line in screen if "[model]" in line]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d INFO  \[model\] line \d+", line) for line in lines)
    assert [int(line.rpartition(" ")[2]) for line in lines] == list(range(1, 41))
    assert screen.count("a library writes") == 1
    assert sum("[train] step 20/40  val 3.100" in line for line in screen) == 1
    assert len(screen) == 40 + 1 + 1 + 1
    assert re.fullmatch(r"✓ done ━+ 40/40 loss 3.210  val 3.100  6.1k tok/s  mfu 41%", screen[-1])
    assert "evaluating" in tty.raw
    assert "validation" in tty.raw
    assert tty.raw.count("\x1b[?25l") == tty.raw.count("\x1b[?25h") == 1  # the cursor is back
    assert capsys.readouterr().out == '{"answer": 42}\n'
    logged = re.findall(r"\[train\] step (\d+)/40", (tmp_path / "logs" / "train.log").read_text())
    assert logged == ["10", "20", "20", "30", "40"]


def test_the_bar_leaves_the_terminal_in_order_when_the_run_fails() -> None:
    def fail() -> None:
        with Progress(40) as progress:
            progress.update(3, METRICS)
            progress.track("validation", 1, 2)
            raise RuntimeError

    with terminal_as_stderr() as tty:
        with pytest.raises(RuntimeError):
            fail()
        assert not terminal.bar_is_live()

    assert tty.raw.count("\x1b[?25h") == 1
    assert re.search(r"starting .*━+ +3/40", tty.screen()[-1])


def test_no_color_removes_the_colours_and_not_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = {}
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.setenv(name, "1")
        with terminal_as_stderr() as tty:
            setup_logging(LoggingConfig(), run_folder=None, rank=0)
            with Progress(40) as progress:
                progress.update(20, METRICS)
                logging.getLogger("llmtrain.model").warning("hello")
        monkeypatch.delenv(name)
        assert "━" in tty.raw
        colours[name] = re.findall(r"\x1b\[(?:\d+;)*((?:3|4|9|10)[0-8])(?:;[\d;]*)?m", tty.raw)

    assert colours["NO_COLOR"] == []
    assert len(colours["COLORTERM"]) >= 3


@pytest.mark.parametrize(
    ("name", "value"), [("CI", "true"), ("TERM", "dumb"), ("KUBERNETES_SERVICE_HOST", "10.96.0.1")]
)
def test_in_ci_in_a_pod_and_on_a_dumb_terminal_there_are_plain_lines(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with terminal_as_stderr() as tty:
        setup_logging(LoggingConfig(), run_folder=None, rank=0)
        with Progress(40) as progress:
            progress.update(20, METRICS)

    assert "━" not in tty.raw
    assert "step 20/40  loss 3.210" in tty.raw


def test_a_quiet_rank_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "llmtrain")
    with terminal_as_stderr() as tty, Progress(40, quiet=True) as progress:
        progress.stage("training")
        progress.update(20, METRICS)
        progress.track("validation", 1, 2)
        progress.track("validation", 2, 2)

    assert (tty.raw, caplog.messages) == ("", [])


@pytest.mark.parametrize(
    ("columns", "metrics"), [(60, "loss 3.210  6.1k tok/s eta 20s"), (45, "loss 3.210 eta 20s"), (32, " eta 20s")]
)
def test_a_narrow_terminal_drops_full_metrics_from_the_end(columns: int, metrics: str) -> None:
    clock = Clock()
    with terminal_as_stderr(columns=columns) as tty, Progress(40, clock=clock) as progress:
        progress.stage("training")
        progress.update(10)
        clock.now += 10
        progress.update(20, METRICS)

    line = tty.screen()[-1]
    assert line.endswith(f" 20/40 {metrics}")
    assert len(line) <= columns


def test_a_forked_worker_can_log_while_the_bar_is_being_drawn() -> None:
    with terminal_as_stderr() as tty:
        setup_logging(LoggingConfig(), run_folder=None, rank=0)
        with Progress(40) as progress:
            progress.update(1)
            console = terminal.stderr_console()
            held, release = threading.Event(), threading.Event()

            def draw_forever() -> None:
                with console._lock:
                    held.set()
                    release.wait()

            thread = threading.Thread(target=draw_forever)
            thread.start()
            held.wait()
            child = os.fork()
            if child == 0:
                logging.getLogger("llmtrain.data").warning("from a worker")
                os._exit(0)
            ended = wait_for(child, timeout_sec=5)
            release.set()
            thread.join()

    assert ended, "the worker hangs"
    assert "[data] from a worker" in tty.raw


def wait_for(child: int, *, timeout_sec: float) -> bool:
    """Whether the process ended well in time; it is killed otherwise."""
    deadline = time.monotonic() + timeout_sec
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def test_tracking_each_document_costs_little() -> None:
    with terminal_as_stderr(), Progress(900) as progress:
        began = time.thread_time()
        for done in range(20_000):
            progress.track("tokenise", done, 20_001)
        seconds = (time.thread_time() - began) / 20_000

    assert seconds < 20e-6


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7.25, "7.2"), (999, "999"), (999.6, "1.0k"), (6123, "6.1k"), (123456, "123k"), (1.25e6, "1.2M")],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert short_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (252, "4m12s"), (3599.7, "1h00m"), (3900, "1h05m"), (180000, "2d02h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text
