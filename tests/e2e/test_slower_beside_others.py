"""A run that other processes take the cores from says so in its log, while it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmtrain.distributed.limits import usable_cores

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BUSY_PER_CORE = 6
"""So many that a run which shared its cores at the start already still becomes much slower."""
KEYS = [
    *("trainer.max_steps=1000000", "trainer.eval_every_steps=null", "trainer.save_every_steps=1000000"),
    *("trainer.log_every_steps=100", "logging.level=DEBUG", "output.run_id=slowed"),
]
WITHIN_SEC = 240.0


def wait_for_line(log: Path, text: str, *, run: subprocess.Popen[bytes]) -> str:
    """Return the first line of the log with `text`, as soon as there is one."""
    gives_up = time.monotonic() + WITHIN_SEC
    while time.monotonic() < gives_up and run.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if found := next((line for line in lines if text in line), None):
            return found
        time.sleep(0.2)
    raise AssertionError(f"the log does not say {text!r} (the run's exit code: {run.poll()})")


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep all cores busy with other processes."""
    code = "while True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(BUSY_PER_CORE * usable_cores())]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_run_beside_busy_processes_says_that_it_became_slower_and_why(config_file: Path) -> None:
    log = config_file.parent / "runs" / "slowed" / "logs" / "train.log"
    command = [sys.executable, "-m", "llmtrain", "train", str(config_file), *KEYS]
    run = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        start = wait_for_line(log, "at the start; others use", run=run)
        with busy_cores():
            line = wait_for_line(log, "times as long as at the start", run=run)
        assert "WARN" in line
        if float(start.split("others use ")[1].split()[0]) < usable_cores() / 2:  # else it was no calm start
            assert "other processes use" in line
        run.terminate()
        assert run.wait(60) == 75
    finally:
        run.kill()
        run.wait()
    told = [line for line in log.read_text().splitlines() if "times as long as at the start" in line]
    assert len(told) == 1
