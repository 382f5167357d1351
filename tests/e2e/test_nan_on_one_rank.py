"""A loss that is no number on one rank of several: all do the same about it, as one process alone would."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.tracking.metric_names import TRAIN_LOSS
from llmtrain.tracking.sinks import read_metrics
from llmtrain.training.checkpoint import load_state, newest_good
from tests.support.worker_groups import GroupServer

pytestmark = pytest.mark.slow

KEYS = [
    *("trainer.max_steps=12", "trainer.save_every_steps=4", "trainer.keep_last=1", "trainer.eval_every_steps=null"),
    *("trainer.global_batch_size=4", "model.dropout=0", "data.num_workers=0"),
]
NAMED = "step 7: the loss is nan and the gradient norm nan (sequences 24 to 27)"


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line[TRAIN_LOSS] for line in read_metrics(run / "metrics.jsonl") if TRAIN_LOSS in line}


def logs(run: Path, world_size: int) -> list[str]:
    names = ["train.log", *(f"rank_{rank}.log" for rank in range(1, world_size))]
    return [(run / "logs" / name).read_text() for name in names]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 2), ("ddp", 4)])
def test_skip_and_rollback_go_on_as_one_process_would(
    config_file: Path, groups: GroupServer, policy: str, strategy: str, world_size: int
) -> None:
    runs = config_file.parent / "runs"
    command = ["train", str(config_file), *KEYS, f"trainer.non_finite={policy}"]
    alone = [*command, "trainer.micro_batch_size=4", "output.run_id=one"]
    group = groups.start(alone, faults="nan@loss:7")
    assert group.wait() == [0], group.stderr
    several = [*command, f"trainer.micro_batch_size={4 // world_size}", f"distributed.strategy={strategy}"]
    group = groups.start([*several, "output.run_id=many"], world_size=world_size, faults="nan@loss:7:rank=1")
    assert group.wait() == [0] * world_size, group.stderr
    assert losses(runs / "many") == pytest.approx(losses(runs / "one"), abs=1e-5)
    assert 7 not in losses(runs / "many")
    for text in logs(runs / "many", world_size):
        assert text.count(NAMED) == 1, text
    many, one = (load_state(runs / name / "checkpoints" / "latest")["position"] for name in ("many", "one"))
    for key in ("step", "item", "tokens", "skipped_steps", "left_out"):
        assert many[key] == one[key]
    assert many["left_out"] == ([[24, 28]] if policy == "rollback" else [])


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp", 4)])
def test_stop_ends_all_with_42_and_the_last_finite_checkpoint_stays(
    config_file: Path, groups: GroupServer, strategy: str, world_size: int
) -> None:
    run = config_file.parent / "runs" / "stopped"
    command = ["train", str(config_file), *KEYS, f"distributed.strategy={strategy}", "trainer.non_finite=stop"]
    arguments = [*command, "trainer.micro_batch_size=1", "output.run_id=stopped", "--resume=auto"]
    for fault in (
        "nan@loss:7:rank=1:micro_batch=0",
        "nan@loss:3:rank=1:micro_batch=0",
    ):  # the second start begins at step 4
        group = groups.start(arguments, world_size=world_size, faults=fault)
        assert group.wait() == [42] * world_size, group.stderr
        found = newest_good(run / "checkpoints")
        assert found is not None
        assert (found[0].name, found[1]) == ("step_000004", [])
    for text in logs(run, world_size):
        assert text.count(NAMED) == 2, text
