"""`smoke` passes here on one process and two, and fails where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmtrain.cli.app import run
from llmtrain.verbs.smoke import judge

SMALL = [
    "--samples",
    "512",
    "--batch-size",
    "64",
    "--features",
    "16",
    "--epochs",
    "3",
    "--lr",
    "0.02",
    "--device",
    "cpu",
]


def test_one_process_passes_and_prints_a_line_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["smoke", *SMALL]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["all_reduce", "device", "gradients", "loss"]
    assert len(set(head.split())) == len(head.split()), "no two columns have one name"
    assert line.split()[-4:] == ["ok"] * 4


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("start", [["--nproc=2"], []])
def test_two_processes_hold_the_same_gradients(start: list[str]) -> None:
    """By --nproc, and under torchrun itself."""
    torchrun = [] if start else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "llmtrain", "smoke", *SMALL, *start, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    result = json.loads(done.stdout)
    assert (result["ok"], result["world_size"]) == (True, 2)
    first, second = result["ranks"]
    assert first["gradient_digests"] == second["gradient_digests"]
    assert first["last_loss"] < 0.8 * first["first_loss"]


def test_a_loss_that_does_not_fall_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["smoke", *SMALL, "--lr", "0"]) == 1
    assert "the smoke test failed: loss on rank 0" in capsys.readouterr().err


def test_ranks_that_disagree_are_named() -> None:
    rank = {"host": "a", "device": "cuda:0", "sum_of_ranks": 3, "first_loss": 2.0, "last_loss": 1.0}
    result = judge([{**rank, "rank": i, "gradient_digests": [str(i)]} for i in (0, 1)])
    assert not result["ok"]
    assert result["ranks"][0]["checks"] == {"all_reduce": True, "device": False, "gradients": True, "loss": True}
    assert result["ranks"][1]["checks"]["gradients"] is False


def test_too_few_samples_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["smoke", "--samples", "10", "--device", "cpu"]) == 2
    assert "fewer than one batch of 256" in capsys.readouterr().err
