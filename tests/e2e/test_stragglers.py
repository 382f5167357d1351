"""A rank at half speed is named in the log of a run with several processes, and no rank is where all are as fast."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.worker_groups import GroupServer

pytestmark = [pytest.mark.slow, pytest.mark.alone]

KEYS = ["trainer.max_steps=50", "trainer.eval_every_steps=null", "trainer.save_every_steps=50"]


@pytest.mark.parametrize(
    ("world_size", "strategy", "name"),
    [
        (2, "ddp", "rank 1 on "),
        (4, "ddp", "rank 3 on "),
        (2, "fsdp", "rank 1 on "),
        # On two cores of a slower processor four ranks that share matrices wait too long for each other to be told
        # apart; the unit test of the watch holds the comparison.
        pytest.param(4, "fsdp_tp", "ranks 2 to 3 on ", marks=pytest.mark.nightly),
    ],
    ids=["two", "four", "two-fsdp", "four-fsdp_tp"],
)
def test_a_rank_at_half_speed_is_named_within_50_steps(
    config_file: Path, groups: GroupServer, world_size: int, strategy: str, name: str
) -> None:
    # What takes a rank's time is mostly these waits, so "half" holds on a busy machine as well.
    own = [0.3] + [0.15] * (world_size - 1)
    faults = ", ".join(f"sleep@loss:{seconds}:rank={rank}" for rank, seconds in enumerate(reversed(own)))
    split = ["distributed.tensor_parallel=2"] if strategy == "fsdp_tp" else []
    keys = [*KEYS, *split, "trainer.micro_batch_size=1", "output.run_id=slow", f"distributed.strategy={strategy}"]
    group = groups.start(["train", str(config_file), *keys], world_size=world_size, faults=faults)
    assert group.wait() == [0] * world_size, group.stderr
    text = (config_file.parent / "runs" / "slow" / "logs" / "train.log").read_text()
    told = [line for line in text.splitlines() if "is slow, and all wait for it" in line]
    assert len(told) == 1, text
    assert name in told[0]
