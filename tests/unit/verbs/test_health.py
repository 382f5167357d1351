"""health: whether a run has started and gets on, for the probes of a pod."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.cli.app import run as run_cli
from llmtrain.runs.heartbeat import HEARTBEAT_NAME
from llmtrain.verbs.health import container_began, health
from tests.support.recorded_run import recorded_run

NAME = "one"


def proc_of(folder: Path, *, began: float) -> Path:
    """A /proc whose first process started at `began`, in seconds since 1970."""
    proc = folder / "proc"
    (proc / "1").mkdir(parents=True)
    booted = int(began) - 1000
    ticks = int((began - booted) * os.sysconf("SC_CLK_TCK"))
    (proc / "1" / "stat").write_text(f"1 (a (b) c) S {' '.join(['0'] * 18)} {ticks} 0 0\n")
    (proc / "stat").write_text(f"cpu 1 2\nbtime {booted}\n")
    return proc


def run_in(folder: Path, *, beat: float | None, ended: float | None = None) -> Path:
    """A run whose heartbeat and summary are of these times."""
    run = recorded_run(folder, NAME, state="killed")
    for name, when in ((HEARTBEAT_NAME, beat), ("summary.json", ended)):
        if when is not None:
            (run / name).write_text("{}")
            os.utime(run / name, (when, when))
    return run


@pytest.mark.parametrize(
    ("beat", "ended", "started", "progress"),
    [
        (None, None, False, True),  # a pod that has just begun
        (-50, None, False, True),  # the heartbeat of the container before
        (60, None, True, True),
        (60, 70, True, True),  # over, whatever comes after: publishing
        (-50, -40, False, True),  # the end of the container before
    ],
)
def test_only_what_happened_since_the_container_began_counts(
    tmp_path: Path, beat: float | None, ended: float | None, started: bool, progress: bool
) -> None:
    began = time.time() - 100
    run_in(tmp_path, beat=beat and began + beat, ended=ended and began + ended)
    proc = proc_of(tmp_path, began=began)
    assert container_began(proc) == pytest.approx(began, abs=1)
    found = health(NAME, root_dir=str(tmp_path), started=True, proc=proc)
    assert (found["healthy"], found["step"]) == (started, 200)
    assert health(NAME, root_dir=str(tmp_path), started=False, proc=proc)["healthy"] is progress


def test_progress_ends_when_the_last_sign_is_older_than_the_watchdog_would_allow(tmp_path: Path) -> None:
    now = time.time()
    run = run_in(tmp_path, beat=now - 1700)
    proc = proc_of(tmp_path, began=now - 5000)
    assert health(NAME, root_dir=str(tmp_path), started=False, proc=proc)["healthy"]  # 3 × 600 s, the default
    found = health(NAME, root_dir=str(tmp_path), started=False, max_age_sec=1600, proc=proc)
    assert not found["healthy"]
    assert "1700 s old, over 1600 s" in found["why"]
    with (run / "config.yaml").open("a") as file:
        file.write("distributed:\n  timeout_sec: 500\n")
    assert not health(NAME, root_dir=str(tmp_path), started=False, proc=proc)["healthy"]


def test_without_a_run_nothing_has_started(tmp_path: Path) -> None:
    for started in (True, False):
        found = health(NAME, root_dir=str(tmp_path), started=started)
        assert not found["healthy"]
        assert found["why"].startswith("not started")


def test_the_command_answers_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_in(tmp_path, beat=time.time())
    root = f"--root-dir={tmp_path}"
    assert run_cli(["health", NAME, "--started", root]) == 0
    assert run_cli(["health", NAME, "--progress", root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["step"] == 200
    assert run_cli(["health", "other", "--progress", root]) == 1
    assert run_cli(["health", NAME, root]) == 2
    assert run_cli(["health", NAME, "--started", "--progress", root]) == 2


def test_a_probe_is_fast_and_imports_nothing_heavy(tmp_path: Path) -> None:
    run_in(tmp_path, beat=time.time())
    script = "import sys; from llmtrain.cli.app import run; run(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", script, "health", NAME, "--progress", f"--root-dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "rich", "transformers"}.isdisjoint(done.stdout.split())
