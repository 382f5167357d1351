"""The heartbeat: a file that is touched while a run gets something done."""

from __future__ import annotations

import os
import time
from pathlib import Path

from llmtrain.runs.heartbeat import HEARTBEAT_NAME, Heartbeat


def wait_for(path: Path, *, after: float) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or path.stat().st_mtime <= after:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_progress_touches_the_file_and_a_standstill_does_not(tmp_path: Path) -> None:
    path, progress = tmp_path / HEARTBEAT_NAME, [1.0]
    looked = [0]

    def progressed() -> float:
        looked[0] += 1
        return progress[0]

    with Heartbeat(path, progressed=progressed, interval_sec=0.01):
        wait_for(path, after=0)
        os.utime(path, (1000, 1000))
        seen = looked[0]
        while looked[0] < seen + 5:
            time.sleep(0.01)
        assert path.stat().st_mtime == 1000
        progress[0] = 2.0
        wait_for(path, after=1000)


def test_a_folder_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    looked = [0]

    def progressed() -> float:
        looked[0] += 1
        return float(looked[0])

    with Heartbeat(tmp_path / "gone" / HEARTBEAT_NAME, progressed=progressed, interval_sec=0.01):
        while looked[0] < 3:
            time.sleep(0.01)
    assert not (tmp_path / "gone").exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    asked: list[float] = []

    def progressed() -> float:
        asked.append(1.0)
        return 1.0

    with Heartbeat(None, progressed=progressed, interval_sec=0.01):
        time.sleep(0.05)
    assert not asked
    assert not list(tmp_path.iterdir())
