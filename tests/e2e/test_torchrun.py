"""The command line under torchrun: two processes make the same run as one, and one process goes on with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train
from tests.support.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return subprocess.run(
        [*command, "-m", "llmtrain", "train", *arguments], capture_output=True, text=True, timeout=240, check=False
    )


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line}


def test_two_processes_make_the_same_run_as_one_and_one_goes_on_with_it(config_file: Path) -> None:
    keys = ["trainer.max_steps=16", "model.dropout=0", "trainer.eval_every_steps=8", "trainer.save_every_steps=8"]
    one = train(load_config(str(config_file), [*keys, "output.run_id=one"]))
    done = torchrun(
        str(config_file), *keys, "trainer.micro_batch_size=2", "output.run_id=two", "data.num_workers=1", "--json"
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["world_size"] == 2
    run = config_file.parent / "runs" / "two"
    assert losses(run) == pytest.approx(losses(Path(one["run"])), abs=1e-5)
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-5)
    assert two["tokens"] == one["tokens"]
    assert (run / "logs" / "train.log").exists()
    assert (run / "logs" / "rank_1.log").exists()

    resumed = train(None, resume=str(run), overrides=["trainer.max_steps=20", "trainer.micro_batch_size=4"])
    assert (resumed["resumed_from_step"], resumed["steps"], resumed["world_size"]) == (16, 20, 1)


def test_a_mistake_is_told_once_and_not_by_every_process(config_file: Path) -> None:
    done = torchrun(str(config_file), "trainer.global_batch_size=20")
    assert done.returncode != 0
    assert "set it to 16" in done.stderr
    assert "llmtrain/verbs/train.py" not in done.stderr, "a user's mistake must not end in a traceback"
