"""`train --nproc N --max-restarts M` takes the folder of its run before the processes start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import train as train_command
from llmtrain.cli.app import run
from llmtrain.cli.output import Outcome
from llmtrain.runs.folders import is_run
from tests.support.tiny_run import SYNTHETIC, write_config

COMMAND = ["train", "tiny.yaml", "--nproc", "2", "--max-restarts", "1", "output.root_dir=runs"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids with which processes were started; each finds the folder of that id, empty."""
    ids: list[str] = []

    def run_in(group: Any, arguments: Sequence[str], *, as_json: bool) -> Outcome:
        given = dict(word.split("=", 1) for word in arguments if "=" in word)
        folder = Path(given["output.root_dir"]) / given["output.run_id"]
        assert list(folder.iterdir()) == []
        assert not is_run(folder)
        ids.append(folder.name)
        if len(ids) == 1:
            assert run(COMMAND) == 0  # another start, at the same moment
        return Outcome({}, "")

    monkeypatch.setattr(train_command, "run_in", run_in)
    return ids


def test_two_launchers_in_one_second_take_two_ids_and_leave_no_empty_folder(
    started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", {**SYNTHETIC, "run": {"device": "cpu"}})
    assert run(COMMAND) == 0
    assert len(set(started)) == len(started) == 2
    assert list((tmp_path / "runs").iterdir()) == [], "the processes left nothing"


def test_several_machines_need_one_name_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.yaml", {**SYNTHETIC, "run": {"device": "cpu"}})
    nodes = ["--nproc", "1", "--nnodes", "2", "--node-rank", "1", "--rendezvous", "127.0.0.1:29500"]
    assert run(["train", "tiny.yaml", *nodes, "--max-restarts", "1"]) == 2
    assert "needs output.run_id" in capsys.readouterr().err
