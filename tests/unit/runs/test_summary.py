from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.atomic import write_json
from llmtrain.runs.summary import ParameterCount, RunSummary

SUMMARY = RunSummary(
    state="finished",
    steps=900,
    resumed_from_step=500,
    world_size=2,
    tokens=900 * 4096,
    seconds=320.5,
    tokens_per_sec=11503.25,
    first_loss=9.01,
    last_loss=3.2,
    best_val_loss=3.1,
    val_loss=3.15,
    skipped_steps=0,
    parameters=ParameterCount(total=14_200_000, trainable=14_200_000),
    peak_memory_bytes=2_000_000_000,
    goodput=0.93,
    time_spent={"step": 298.0},
)


def test_the_summary_holds_every_figure(tmp_path: Path) -> None:
    SUMMARY.write(tmp_path / "summary.json")

    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "state": "finished",
        "steps": 900,
        "resumed_from_step": 500,
        "world_size": 2,
        "tokens": 3_686_400,
        "seconds": 320.5,
        "tokens_per_sec": 11503.25,
        "first_loss": 9.01,
        "last_loss": 3.2,
        "best_val_loss": 3.1,
        "val_loss": 3.15,
        "skipped_steps": 0,
        "parameters": {"total": 14_200_000, "trainable": 14_200_000},
        "peak_memory_bytes": 2_000_000_000,
        "goodput": 0.93,
        "time_spent": {"step": 298.0},
        "mixture": None,
    }


def test_a_loss_that_broke_is_never_told_as_a_number(tmp_path: Path) -> None:
    replace(SUMMARY, state="failed", last_loss=math.nan).write(tmp_path / "summary.json")

    written = json.loads((tmp_path / "summary.json").read_text())

    assert (written["state"], written["last_loss"]) == ("failed", None)
    assert written["non_finite"] == {"last_loss": "nan"}


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    SUMMARY.write(path)
    before = path.read_bytes()

    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": 1, "b": math.inf})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]

    replace(SUMMARY, steps=901).write(path)
    assert json.loads(path.read_text())["steps"] == 901
