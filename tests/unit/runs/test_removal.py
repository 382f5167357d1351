"""`runs rm`: what is removed and what never is; it asks first; `latest` stays true."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError
from llmtrain.runs.folders import locked, point_to_latest
from llmtrain.runs.listing import list_runs
from llmtrain.runs.removal import remove_runs
from tests.support.recorded_run import recorded_run


def yes(about: Sequence[Mapping[str, Any]]) -> bool:
    return True


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("1", "2", "3"):
        recorded_run(tmp_path, name, num_steps=5)
    point_to_latest(tmp_path)
    return tmp_path


def ids(root: Path) -> list[str]:
    return sorted(one["id"] for one in list_runs(root_dir=str(root)))


def test_only_the_named_runs_go_and_latest_is_the_newest_that_is_left(root: Path) -> None:
    taken = sum(file.stat().st_size for file in (root / "3").rglob("*"))
    assert remove_runs(["latest"], root_dir=str(root), agree=yes) == {"removed": ["3"], "bytes": taken}
    assert sorted(path.name for path in root.iterdir()) == ["1", "2", "latest"]
    assert (root / "latest").resolve().name == "2"
    remove_runs(["1", str(root / "1")], root_dir=str(root), agree=yes)
    assert (root / "latest").resolve().name == "2"
    remove_runs(["2"], root_dir=str(root), agree=yes)
    assert list(root.iterdir()) == []


def test_nothing_is_removed_unless_the_user_agrees(root: Path) -> None:
    asked: list[Mapping[str, Any]] = []

    def no(about: Sequence[Mapping[str, Any]]) -> bool:
        asked.extend(about)
        return False

    assert remove_runs(["1", "2"], root_dir=str(root), agree=no) == {"removed": [], "bytes": 0}
    assert [(one["id"], one["steps"], one["used_by"]) for one in asked] == [("1", 5, []), ("2", 5, [])]
    assert ids(root) == ["1", "2", "3"]


def test_one_that_is_not_there_keeps_the_others(root: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 'nobody'"):
        remove_runs(["1", "nobody"], root_dir=str(root), agree=yes)
    assert ids(root) == ["1", "2", "3"]


def test_a_checkpoint_is_not_a_run(root: Path) -> None:
    (root / "1" / "checkpoints" / "step_000005").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is a checkpoint, and only whole runs are removed; its run is 1"):
        remove_runs([str(root / "1" / "checkpoints" / "step_000005")], root_dir=str(root), agree=yes)
    assert ids(root) == ["1", "2", "3"]


def test_runs_that_begin_from_it_are_named(root: Path) -> None:
    with (root / "3" / "config.yaml").open("a") as file:
        file.write("tuned:\n  path: runs/1/model\n")
    asked: list[Mapping[str, Any]] = []
    remove_runs(["1"], root_dir=str(root), agree=lambda about: asked.extend(about) or False)  # type: ignore[func-returns-value]
    assert [one["used_by"] for one in asked] == [["3"]]


def _train(folder: Path, begun: Event, done: Event) -> None:
    with locked(folder):
        begun.set()
        done.wait(60)


@pytest.mark.parametrize("begins", ["before", "while the user thinks"])
def test_a_run_that_trains_is_never_removed(root: Path, begins: str) -> None:
    context = multiprocessing.get_context("spawn")
    begun, done = context.Event(), context.Event()
    process = context.Process(target=_train, args=(root / "1", begun, done))

    def start(about: Sequence[Mapping[str, Any]] = ()) -> bool:
        process.start()
        assert begun.wait(60)
        return True

    if begins == "before":
        start()
    try:
        with pytest.raises(ConfigError, match=r"a process trains in it, so nothing is removed|is being trained"):
            remove_runs(["1"], root_dir=str(root), agree=yes if begins == "before" else start)
        assert ids(root) == ["1", "2", "3"]
        assert (root / "1" / "metrics.jsonl").is_file()
    finally:
        done.set()
        process.join()


def test_the_program_asks_and_takes_only_a_yes(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["runs", "rm", "1", "--root-dir", str(root)]
    assert run(command) == 2
    assert "there is nobody to ask: add --yes" in capsys.readouterr().err
    for answer, code, left in (("", 1, ["1", "2", "3"]), ("n\n", 1, ["1", "2", "3"]), ("y\n", 0, ["2", "3"])):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda answer=answer: answer))
        assert run(command) == code
        said = capsys.readouterr()
        assert "finished" in said.err
        assert said.err.endswith("Remove for good? [y/N] ")
        assert ids(root) == left
    assert said.out.startswith("removed 1 (")
    assert run(["runs", "rm", "2", "--yes", "--json", "--root-dir", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == ["2"]
    assert run(["runs", "rm"]) == 2
    assert "runs rm: name the runs to remove" in capsys.readouterr().err
    assert run(["runs", "3", "--yes", "--root-dir", str(root)]) == 2
    assert ids(root) == ["3"]
