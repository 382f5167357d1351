"""`launch ssh` hands its words to the verbs; CONFIG alone is push, init and train."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.cli.options import name_resume
from llmtrain.verbs import launch_ssh as verbs

HOST = ["--host", "gpu1", "--dir", "~/x"]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The verbs that were called, in order."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    results = {"follow": (0, '{"loss": 1}\n'), "train": {"run": "new", "host": "gpu1"}}

    def record(name: str) -> Any:
        def call(*words: Any, **options: Any) -> Any:
            calls.append((name, words, options))
            return results.get(name, [])

        return call

    for name in ("push", "initialize", "train", "follow", "evaluate", "fetch"):
        monkeypatch.setattr(verbs, name, record(name))
    return calls


def test_a_config_alone_means_push_init_and_train(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "ssh", "quickstart", *HOST, "--nproc", "2", "trainer.max_steps=3"]) == 0
    assert [name for name, _, _ in called] == ["push", "initialize", "train", "follow"]
    _, (remote, loaded, words), options = called[2]
    assert (remote.first.name, loaded.config.trainer.max_steps, options["nproc"]) == ("gpu1", 3, 2)
    assert words == ["trainer.max_steps=3"]
    assert capsys.readouterr().out == '{"loss": 1}\n'


def test_detached_training_returns_at_once(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "ssh", "train", "--resume", "latest", "--detach", "--max-restarts", "2", *HOST]) == 0
    ((name, (_, loaded, words), options),) = called
    assert (name, loaded, words, options["resume"]) == ("train", None, ["--max-restarts=2"], "latest")
    assert "new trains on gpu1" in capsys.readouterr().out
    assert name_resume(["launch", "ssh", "train", "--resume", "--detach"])[3] == "--resume=latest"


def test_options_of_eval_are_passed_unchanged(called: list[Any]) -> None:
    words = ["runs/one", "--data", "rows.jsonl", "evaluation.subject=base", "--no-baseline"]
    assert run(["launch", "ssh", "eval", *words, "--config", "eval", *HOST, "--json"]) == 0
    _, (_, loaded, given), _ = called[0]
    assert (given, loaded.source) == ([*words, "--json"], "eval")


def test_fetch_takes_a_config_and_runs(called: list[Any], tmp_path: Any) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {name: synthetic}\nremote: {host: me@gpu2:22, dir: /p}\noutput: {root_dir: out}\n")
    assert run(["launch", "ssh", "fetch", str(config), "one", "two"]) == 0
    _, (remote, about, names), _ = called[0]
    assert (remote.first.destination, about.output.root_dir, names) == ("me@gpu2", "out", ["one", "two"])


def test_a_mistyped_command_is_not_taken_for_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "ssh", "statsu", *HOST]) == 2
    assert "No such command 'statsu'" in capsys.readouterr().err
    assert run(["launch", "ssh", "statsu.yaml", *HOST]) == 2
    assert "statsu.yaml: no such file" in capsys.readouterr().err


def test_a_missing_host_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "ssh", "status"]) == 2
    assert "no machine is named" in capsys.readouterr().err
