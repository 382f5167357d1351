"""A run that is sent back to an older checkpoint stays on the course that begins there, whatever happens to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmtrain.cli.app import run
from tests.support.tiny_run import SYNTHETIC, weight_hash, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that trains six steps on data that need no preparation, and saves every second one."""
    keys = {
        **SYNTHETIC,
        "trainer": {**SYNTHETIC["trainer"], "max_steps": 6, "save_every_steps": 2, "log_every_steps": 1},
        "run": {"device": "cpu"},
        "output": {"root_dir": str(tmp_path / "runs"), "run_id": "one"},
        "tracking": {"tensorboard": {"enabled": False}},
    }
    return write_config(tmp_path / "tiny.yaml", keys)


def test_a_run_that_is_made_longer_keeps_the_rates_that_it_has_used(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rates() -> list[float]:
        lines = (config.parent / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
        return [line["train/lr"] for line in map(json.loads, lines) if "train/lr" in line]

    keys = ["optimizer.lr=0.09", "scheduler.warmup_steps=40", "scheduler.name=constant"]
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=2")
    assert run(["train", str(config), *keys, "trainer.max_steps=16"]) == 75  # warm-up takes 4 of 16
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    used = rates()
    assert used == pytest.approx([0.018, 0.036])
    capsys.readouterr()
    assert run(["train", str(config), *keys, "trainer.max_steps=40", "--resume", "auto"]) == 0
    assert "warm-up keeps the 4 steps that the run began with; a new run of this length takes 10" in " ".join(
        capsys.readouterr().err.split()
    )
    assert rates()[:6] == pytest.approx([*used, 0.054, 0.072, 0.09, 0.09])

    assert run(["train", str(config), *keys, "output.run_id=two", "trainer.max_steps=4"]) == 0
    asked = [*keys[::2], "output.run_id=two", "trainer.max_steps=8", "scheduler.warmup_steps=2"]
    capsys.readouterr()
    assert run(["train", str(config), *asked, "--resume", "auto"]) == 0
    assert "warm-up 2" in capsys.readouterr().err, "what is asked for anew is done"


@pytest.mark.parametrize("resume", [["--resume", "auto"], ["--resume", "one"]])
def test_a_run_that_is_sent_back_and_killed_before_it_saves_goes_on_with_the_course_that_it_was_sent_to(
    config: Path, resume: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.parent / "runs" / "one"
    assert run(["train", str(config)]) == 0
    first = weight_hash(folder)
    monkeypatch.setenv("LLMTRAIN_FAULTS", "raise@stepped:step=3")
    back = ["--resume", str(folder / "checkpoints" / "step_000002"), "optimizer.lr=0.01"]
    assert run(["train", str(config), *back]) == 1
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    assert os.readlink(folder / "checkpoints" / "latest") == "step_000002"
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_000002", "step_000004", "step_000006"], "the course that was left is still there"
    capsys.readouterr()
    assert run(["train", str(config), *resume, "optimizer.lr=0.01"]) == 0
    assert "going on from step 2" in capsys.readouterr().err
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert weight_hash(folder) != first

    again = [*back, "output.root_dir=" + str(config.parent / "other")]
    assert run(["train", str(config), "output.root_dir=" + str(config.parent / "other")]) == 0
    again[1] = str(config.parent / "other" / "one" / "checkpoints" / "step_000002")
    assert run(["train", str(config), *again]) == 0
    assert weight_hash(config.parent / "other" / "one") == weight_hash(folder), "as if it had not been killed"
