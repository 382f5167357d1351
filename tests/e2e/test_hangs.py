"""A rank that is stopped, cut off or stuck: all notice and write their stacks, and the group starts again by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = [
    "trainer.max_steps=12",
    "trainer.save_every_steps=4",
    "trainer.micro_batch_size=2",
    "distributed.timeout_sec=6",
]


def run_several(
    config_file: Path, *arguments: str, world_size: int = 2, faults: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmtrain", "train", str(config_file), *KEYS, *arguments]
    command += ["--nproc", str(world_size)]
    environment = {**os.environ, "LLMTRAIN_FAULTS": faults}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)


def stacks(run: Path, rank: int) -> str:
    path = run / "logs" / f"stacks_rank_{rank}.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    ("fault", "silent", "strategy", "world_size"),
    [
        ("stop@step:step=6:rank=1", "rank 1 wrote none", "ddp", 2),  # SIGSTOP
        ("stop@step:step=6:rank=0", "rank 0 wrote none", "ddp", 2),  # which also keeps the rendezvous
        ("cut@step:step=6:rank=1", None, "ddp", 2),
        ("sleep@data:1000:7:rank=1", None, "ddp", 2),  # its data does not come
        # A minute, most of it the start of four processes; what notices a silent rank is the same.
        pytest.param("stop@step:step=6:rank=2", "rank 2 wrote none", "fsdp", 4, marks=pytest.mark.nightly),
    ],
)
def test_a_silent_rank_is_noticed_by_all_and_the_run_goes_on_by_itself_to_the_same_weights(
    config_file: Path,
    fault: str,
    silent: str | None,
    strategy: str,
    world_size: int,
    undisturbed: Callable[..., str],
) -> None:
    runs, keys = config_file.parent / "runs", [f"distributed.strategy={strategy}"]
    arguments = [*keys, "output.run_id=hung", "--max-restarts=3"]
    done = run_several(config_file, *arguments, world_size=world_size, faults=f"{fault}:restart=0")
    assert done.returncode == 0, done.stderr
    assert weight_hash(runs / "hung") == undisturbed(*KEYS, *keys, world_size=world_size)
    for rank in range(world_size):
        assert "--- hang: " in stacks(runs / "hung", rank), done.stderr
        assert "MainThread" in stacks(runs / "hung", rank)
    assert "hang: no progress for " in done.stderr
    if silent:
        assert silent in done.stderr


def test_a_hang_without_restarts_ends_with_76_and_a_resume_goes_on(config_file: Path) -> None:
    run = config_file.parent / "runs" / "hung"
    step_4 = run / "checkpoints" / "step_000004"
    stop = f"wait@step:{step_4}:step=6:rank=1, stop@step:step=6:rank=1"  # saves end in the background
    done = run_several(config_file, "output.run_id=hung", "--json", faults=stop)
    assert done.returncode == 76, done.stderr
    assert '"exit_code": 76' in done.stdout
    result = train(None, resume=str(run), overrides=["trainer.max_steps=8"])
    assert result["resumed_from_step"] == 4
