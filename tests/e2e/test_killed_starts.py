"""A start that is killed before its run began blocks no later start, and takes nothing with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtrain.cli.app import run
from tests.support.tiny_run import SYNTHETIC, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that trains two steps on data that need no preparation."""
    keys = {
        **SYNTHETIC,
        "trainer": {**SYNTHETIC["trainer"], "max_steps": 2},
        "run": {"device": "cpu"},
        "output": {"root_dir": str(tmp_path / "runs"), "run_id": "one"},
        "tracking": {"tensorboard": {"enabled": False}},
    }
    return write_config(tmp_path / "tiny.yaml", keys)


@pytest.mark.parametrize("options", [["--resume", "auto"], []])
@pytest.mark.parametrize("point", ["run-made", "run-described"])
def test_a_start_that_was_killed_before_its_run_began_is_made_up_for(
    config: Path, point: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", f"raise@{point}")
    assert run(["train", str(config), *options]) == 1
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    folder = config.parent / "runs" / "one"
    assert folder.is_dir()
    assert not (folder / "config.yaml").exists()
    assert not (folder.parent / "latest").exists()
    assert run(["train", str(config), *options]) == 0
    err = capsys.readouterr().err
    assert ("was left by a start that was stopped before the run began" in err) == (point == "run-described")
    assert os.readlink(folder.parent / "latest") == "one"
    assert (folder / "checkpoints" / "final").exists()
    assert run(["train", str(config)]) == 2, "now there is a run of this id"
    assert "--resume one" in capsys.readouterr().err
