"""The program: its exit codes, and what it prints to stdout and stderr."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.cli.output import json_document, named_values, printable
from llmtrain.errors import ConfigError, Hang, Preempted, RunError, WillFailAgain

VERBS = ("prepare", "train", "eval", "generate", "validate", "print-config", "list-configs", "version")


def stub_train(monkeypatch: pytest.MonkeyPatch, behave: Any) -> None:
    """Put a verb in the place of the real one, which needs torch."""
    module = ModuleType("llmtrain.verbs.train")
    module.train = behave  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmtrain.verbs.train", module)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(*args: object, **options: object) -> None:
        raise error

    stub_train(monkeypatch, train)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_takes_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out
    assert run([verb, "--json", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: llmtrain")


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (ConfigError("c.yaml:3: no"), 2, "config"),
        (RunError("disk full"), 1, "failed"),
        (WillFailAgain("the loss is NaN"), 42, "will_fail_again"),
        (Preempted("saved step 7"), 75, "preempted"),
        (Hang("no step for 600 s"), 76, "hang"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_ending_has_its_code_and_one_message(
    error: BaseException, code: int, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert run(["train", "quickstart", "logging.level=WARNING"]) == code
    plain = capsys.readouterr()
    assert plain.out == ""
    what = "stopped" if code == 75 else "error"  # a run that is to go on has not failed
    assert plain.err == f"{what}: {str(error) or 'interrupted'}\n"
    assert run(["train", "quickstart", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document == {"error": {"kind": kind, "message": str(error) or "interrupted", "exit_code": code}}


def test_a_bug_shows_its_traceback_and_is_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("oops"))
    assert run(["train", "quickstart", "--json"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert json.loads(captured.out)["error"] == {"kind": "bug", "message": "ZeroDivisionError: oops", "exit_code": 1}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?\nsee `llmtrain --help`"),
        (["train", "quickstart", "--resum"], "--resum"),
        (["generate", "--top-p", "2"], "--top-p"),
        (["generate", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "a", "b"], "extra argument"),
        (["validate"], "CONFIG is missing: a YAML or JSON file, or one of those that ship ("),
        (["validate", "trainer.max_steps=3"], "CONFIG is missing"),
        (["train"], "CONFIG is missing"),
        (["prepare"], "CONFIG is missing"),
        (["validate", "quickstart", "--config", "c.yaml"], "CONFIG is given twice: quickstart and --config c.yaml"),
        (["validate", "quickstart", "other"], 'override "other": expected key=value'),
        (["train", "quickstart", "--batch", "8"], "--batch is trainer.micro_batch_size now"),
        (["train", "--lora-r", "8"], "--lora-r is model.lora.r now: model.lora.r=8"),
        (["train", "--data", "x.jsonl"], "--data is data.train now (rows need `data.name: chat`): data.train=x.jsonl"),
        (["train", "quickstart", "--trainer.max_steps=3"], "without dashes: trainer.max_steps=3"),
    ],
)
def test_a_usage_error_is_one_message_and_exit_2(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert told in captured.err
    assert run([*argv, "--json"]) == 2
    assert told.partition("\n")[0] in json.loads(capsys.readouterr().out)["error"]["message"]


def test_with_json_everything_that_others_print_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(*args: object, **options: object) -> dict[str, object]:
        print("from python")
        os.write(1, b"from a C library\n")
        subprocess.run(["echo", "from a child"], check=True)
        return {"last_loss": float("nan"), "run": Path("runs/x")}

    stub_train(monkeypatch, train)
    assert run(["train", "quickstart", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"last_loss": None, "run": "runs/x"}
    for line in ("from python", "from a C library", "from a child"):
        assert line in captured.err


def test_only_the_first_rank_prints_and_messages_of_others_name_their_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run(["version", "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["validate"]) == 2
    assert capsys.readouterr().err.startswith("[rank 3] error: CONFIG is missing")


def test_windows_is_told_about_wsl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(["version"]) == 2
    assert "WSL2" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["list-configs"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nothing_is_printed_when_the_reader_of_stdout_has_left(argv: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "llmtrain", *argv]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_version_prints_the_versions_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"llmtrain", "python", "torch"}
    assert document["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"llmtrain {document['llmtrain']} (Python {document['python']}, torch ")


def test_json_documents_are_strict() -> None:
    document = {"a": float("inf"), "b": (1, 2.5), "c": {"d": Path("x"), 3: True}, "e": None, "é": "ü"}
    text = json_document(document)
    assert json.loads(text) == {"a": None, "b": [1, 2.5], "c": {"d": "x", "3": True}, "e": None, "é": "ü"}
    assert "é" in text


def test_a_table_is_aligned_and_leaves_out_missing_values() -> None:
    result = {"loss": 3.14159, "tokens": 1234567, "speed": 5210.4, "none": None, "ok": True}
    rows = (("loss", "loss"), ("tokens", "tokens"), ("tokens/s", "speed"), ("nothing", "none"), ("done", "ok"))
    assert (
        printable([named_values(result, rows)])
        == "loss      3.142\ntokens    1,234,567\ntokens/s  5,210\ndone      yes"
    )
    assert printable([named_values({}, rows)]) == ""


def test_a_broken_pipe_inside_a_verb_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, BrokenPipeError(errno.EPIPE, "a worker died"))
    assert run(["train", "quickstart"]) == 1
    assert "a worker died" in capsys.readouterr().err
