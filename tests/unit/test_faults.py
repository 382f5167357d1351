"""Fault injection: wishes are read strictly, come true where and when they say, and cost nothing if there is none."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmtrain import faults


@pytest.fixture(autouse=True)
def _fresh_counts() -> None:
    faults.forget()


def test_without_a_wish_nothing_happens_and_a_call_costs_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    began = time.process_time()
    for _ in range(1000):
        faults.reach("after-rename", step=1)
    assert time.process_time() - began < 0.1  # 100 µs a call would be a hundred times too much


def test_raise_comes_true_each_time_at_its_point_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "raise@here")
    faults.reach("there")
    for _ in range(2):
        with pytest.raises(faults.FaultInjected, match="fault injected at here"):
            faults.reach("here")


def test_a_number_picks_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "raise@here:2")
    faults.reach("here")
    with pytest.raises(faults.FaultInjected):
        faults.reach("here")
    faults.reach("here")


def test_a_detail_must_fit_and_only_fitting_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "raise@here:step=5:2")
    for step in (5, 6, 7):
        faults.reach("here", step=step)
    with pytest.raises(faults.FaultInjected):
        faults.reach("here", step=5)


def test_raise_with_an_errno_looks_like_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "raise@here:EROFS")
    with pytest.raises(OSError, match="Read-only file system") as caught:
        faults.reach("here")
    assert caught.value.errno == errno.EROFS


def test_sleep_waits_and_several_wishes_stand_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "sleep@here:0.05, raise@there")
    began = time.perf_counter()
    faults.reach("here")
    assert time.perf_counter() - began >= 0.05
    with pytest.raises(faults.FaultInjected):
        faults.reach("there")


def test_wait_goes_on_once_its_file_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    monkeypatch.setenv(faults.VARIABLE, f"wait@here:{there}:step=2, raise@here:step=2")
    faults.reach("here", step=1)  # another step: waits for nothing
    waiter = threading.Timer(0.05, there.mkdir)
    waiter.start()
    with pytest.raises(faults.FaultInjected):
        faults.reach("here", step=2)
    assert there.exists()
    waiter.join()


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("term", signal.SIGTERM)])
def test_signals_end_the_process_at_the_asked_time(action: str, number: signal.Signals) -> None:
    code = "from llmtrain.faults import reach\nfor n in (1, 2, 3): print(n, flush=True); reach('p')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={faults.VARIABLE: f"{action}@p:2"}, capture_output=True, text=True
    )
    assert done.returncode == -number
    assert done.stdout == "1\n2\n"


def test_nan_is_wished_for_and_the_caller_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "nan@figures:rank=0:step=3, nan@figures:rank=1")
    assert [faults.reach("figures", step=step) for step in (2, 3, 4)] == [False, True, False]


@pytest.mark.parametrize(
    ("wish", "part"),
    [
        ("explode@here", "cut, hup, int, kill, nan, raise, sleep, stop, term, wait"),
        ("kill", "ACTION@POINT"),
        ("sleep@here", "how many seconds"),
        ("wait@here", "what to wait for"),
        ("kill@here:EROFS", "'EROFS'"),
        ("raise@here:ENOTHING", "'ENOTHING'"),
    ],
)
def test_a_wish_that_cannot_be_read_is_an_error(wish: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, wish)
    with pytest.raises(ValueError, match=part):
        faults.reach("anywhere")


def test_the_docs_list_exactly_the_points_that_a_save_passes() -> None:
    package = Path(faults.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in package.glob("training/checkpoint/*.py"))
    reached = set(re.findall(r'reach\(f?"([^"{]+)"', sources))
    reached |= {f"{when}-{link}" for when in ("before", "after") for link in ("latest", "best", "final")}
    manual = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z-]+)`", manual.split("in order:")[1]))
    assert listed == reached
