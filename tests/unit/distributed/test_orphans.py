"""Workers whose launcher is killed: they tell torchrun, or end by themselves where that is gone as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.distributed.exit_codes import EXIT_FOLDER

WORKER = """
import signal, sys, time
from pathlib import Path
from llmtrain.distributed import orphans
orphans._EVERY_SEC = 0.02
signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1]).write_text("told"), sys.exit(75)))
orphans.end_with_launcher()
Path(sys.argv[1]).write_text("begun")
while True:
    time.sleep(0.02)
"""
TORCHRUN = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""
LAUNCHER = """
import subprocess, sys
from pathlib import Path
from llmtrain.distributed.orphans import hold_launcher_lock
with hold_launcher_lock(Path(sys.argv[3]).parent):
    child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
    print(child.pid, flush=True)
    child.wait()
"""


def text_of(path: Path, *, other_than: str) -> str:
    for _ in range(3000):
        if path.exists() and path.read_text() not in ("", other_than):
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path} was never written")


@pytest.mark.parametrize("killed", ["launcher", "torchrun", "both"])
def test_a_worker_gets_sigterm_when_its_launcher_or_torchrun_is_killed(killed: str, tmp_path: Path) -> None:
    told = tmp_path / "worker"
    environment = {**os.environ, EXIT_FOLDER: str(tmp_path), "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", LAUNCHER, TORCHRUN, WORKER, str(told)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        torchrun = int(launcher.stdout.readline())
        assert text_of(told, other_than="") == "begun"
        if killed != "torchrun":
            launcher.kill()
        if killed != "launcher":
            os.kill(torchrun, signal.SIGKILL)
        assert text_of(told, other_than="begun") == "told"


def test_a_worker_of_a_living_launcher_gets_no_signal(tmp_path: Path) -> None:
    told = tmp_path / "worker"
    environment = {**os.environ, EXIT_FOLDER: str(tmp_path), "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", LAUNCHER, TORCHRUN, WORKER, str(told)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert text_of(told, other_than="") == "begun"
        time.sleep(0.2)  # ten looks
        assert told.read_text() == "begun"
        launcher.kill()
        assert text_of(told, other_than="begun") == "told"
