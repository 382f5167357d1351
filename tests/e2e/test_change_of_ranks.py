"""A run that is resumed with other numbers of processes: each sample once, and the losses of a run on one."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.worker_groups import GroupServer

pytestmark = pytest.mark.slow

KEYS = [
    "model.num_layers=1",
    "model.d_model=16",
    "model.dropout=0",
    "trainer.max_steps=null",
    "trainer.max_epochs=1",
    "trainer.global_batch_size=256",
    "trainer.micro_batch_size=64",
    "trainer.eval_every_steps=null",
    "trainer.save_every_steps=5",
    "logging.level=DEBUG",
    "logging.log_batches=all",
]
STEPS_OF_EACH = 6


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def items_logged(run: Path, *, last_step: int) -> Counter[int]:
    """Return how often each item was computed in steps up to `last_step`, by the logs of all ranks."""
    found: Counter[int] = Counter()
    for path in (run / "logs").glob("*.log"):
        for step, items in re.findall(r"\[batch\] step (\d+): sequences ([\d ]+) in", path.read_text()):
            found.update(map(int, items.split()) if int(step) <= last_step else [])
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_two_one_and_four_processes_use_each_sample_once(
    groups: GroupServer, config_file: Path, strategy: str
) -> None:
    assert groups.run(["train", str(config_file), *KEYS, "output.run_id=one"]) == [0]
    runs = config_file.parent / "runs"
    start = ["train", str(config_file), *KEYS, "output.run_id=many"]
    for phase, world_size in enumerate((4, 2, 1)):
        keys = [] if world_size == 1 else [f"distributed.strategy={strategy}"]
        resume = [] if phase == 0 else ["--resume", "many"]
        stop = f"term@stepped:step={STEPS_OF_EACH * (phase + 1)}"
        codes = groups.run([*start, *keys, *resume], world_size=world_size, faults=stop)
        assert codes == [75] * world_size
    assert groups.run([*start, f"distributed.strategy={strategy}", "--resume", "many"], world_size=4) == [0] * 4

    straight, changed = losses(runs / "one"), losses(runs / "many")
    assert len(straight) > 3 * STEPS_OF_EACH
    assert changed == pytest.approx(straight, abs=1e-5)
    once = items_logged(runs / "one", last_step=len(straight))
    assert set(once.values()) == {1}
    assert sorted(once) == list(range(len(once)))
    assert items_logged(runs / "many", last_step=len(straight)) == once
    assert {path.name for path in (runs / "many" / "logs").glob("rank_*.log")} == {f"rank_{n}.log" for n in (1, 2, 3)}
