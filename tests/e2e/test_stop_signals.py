"""SIGTERM to one of several processes, wherever it is: all stop at the same step, save it once and end with 75."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_run import weight_hash
from tests.support.worker_groups import GroupServer

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = [
    *("trainer.max_steps=10", "trainer.save_every_steps=4", "trainer.eval_every_steps=3", "trainer.eval_steps=2"),
    *("trainer.micro_batch_size=1", "data.num_workers=0"),
]


def saved(run: Path) -> list[int]:
    """The steps that were saved, in the order of the saves."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "saved"]


@pytest.mark.parametrize(
    ("world_size", "strategy", "fault", "step"),
    [
        (2, "ddp", "term@step:step=5:rank=1", 5),
        (2, "ddp", "term@step:step=5:rank=0", 5),
        (2, "ddp", "term@data:6:rank=1", 5),
        (2, "ddp", "term@evaluation:step=6:rank=1", 6),
        (2, "ddp", "term@update:step=5:rank=1", 6),
        (2, "ddp", "term@before-copy:step=4:rank=0", 4),
        (2, "fsdp", "term@after-copy:step=4:rank=1", 4),
        (2, "fsdp", "term@step:step=5:rank=1", 5),
        (4, "ddp", "term@loss:6:rank=3", 6),
        (4, "fsdp", "term@stepped:step=5:rank=2", 5),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_as_if_nothing_had_happened(
    config_file: Path,
    groups: GroupServer,
    undisturbed: Callable[..., str],
    world_size: int,
    strategy: str,
    fault: str,
    step: int,
) -> None:
    runs = config_file.parent / "runs"
    keys = [*KEYS, f"distributed.strategy={strategy}"]
    command = ["train", str(config_file), *keys, "output.run_id=stopped"]
    group = groups.start(command, world_size=world_size, faults=fault)
    assert group.wait() == [75] * world_size, group.stderr
    due = [3] + [4] * (step >= 4) + [6] * (step >= 6)  # the best so far, every fourth, the best so far
    assert sorted({*saved(runs / "stopped")}) == sorted({*due, step}), group.stderr
    assert [path.name for path in sorted((runs / "stopped" / "checkpoints").glob("step_*"))][-1] == f"step_{step:06d}"
    group = groups.start(["train", f"--resume={runs / 'stopped'}"], world_size=world_size)
    assert group.wait() == [0] * world_size, group.stderr
    assert weight_hash(runs / "stopped") == undisturbed(*keys, world_size=world_size)


def test_a_signal_to_one_worker_of_the_launcher_ends_it_with_75(config_file: Path) -> None:
    keys = [*KEYS, "output.run_id=stopped", "--nproc=2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "train", str(config_file), *keys],
        env={**os.environ, "LLMTRAIN_FAULTS": "term@step:step=5:rank=1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 75
    assert saved(config_file.parent / "runs" / "stopped") == [3, 4, 5]
