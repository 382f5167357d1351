"""`generate`: prompts from files, results to files, line by line with a user; through the command line."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError
from llmtrain.screen import visible
from llmtrain.verbs.generate import converse, generate, read_prompts
from tests.support.tiny_model import write_tiny_model

FEW: dict[str, Any] = {"max_new_tokens": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(folder)
    return str(folder)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes('\ufeffdef f(\r\n\n  x =\n{"prompt": 1}'.encode())
    assert read_prompts(file) == ["def f(", "  x =", '{"prompt": 1}']


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "a\\nb", "text": "no"}\n\n{"id": 3, "text": ""}\n'),
        ("p.json", '[{"prompt": "a\\nb"},\n {"text": ""}]'),
        ("p.csv", 'prompt\n"a\nb"\n""\n'),
    ],
)
def test_rows_have_a_prompt_or_a_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl:2: an object with the text field `prompt`"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', "p.jsonl:3: is no JSON"),
        ("p.jsonl", b"[3]\n", "p.jsonl:1: is a number, not an object"),
        ("p.jsonl", b'{"prompt": "a\\ud83c"}\n', "p.jsonl:1: 'prompt' holds half of a surrogate pair"),
        ("p.txt", b"\n\n", "p.txt: there is no prompt in it"),
        ("p.txt", b"a\xff", r"p.txt: not a text file in UTF-8 \(byte 1\)"),
        ("missing.txt", None, "missing.txt: cannot be read"),
    ],
)
def test_what_is_no_prompt_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_prompts(tmp_path / name)


def test_a_file_of_prompts_becomes_a_file_of_results_in_its_order(model: str, tmp_path: Path) -> None:
    prompts = ["def f(x):", "x", "def g(x):\n    return x - 1\n\n\ndef", "a", "return"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    out = tmp_path / "o.jsonl"
    results = generate(model, prompts_file=str(tmp_path / "p.jsonl"), output=str(out), batch_size=2, **FEW)
    assert [result["prompt"] for result in results] == prompts
    assert [json.loads(line) for line in out.read_text().splitlines()] == results
    assert results == generate(model, prompts=prompts, batch_size=5, **FEW)
    assert set(results[0]) == {"prompt", "completion", "tokens", "ended_by"}


def test_an_output_that_cannot_be_is_refused_before_anything_is_written(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        generate(model, prompts=["a"], output=str(tmp_path / "no" / "o.jsonl"), **FEW)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stop_tokens": ["no such token"]}, "'no such token' is not one token of this model"),
        ({"stop_tokens": [300]}, "stop token 300 is not in the vocabulary of 278 tokens"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": [""]}, "a stop text is empty"),
    ],
)
def test_mistakes_in_the_settings_come_before_the_first_line(model: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        converse(model, lines=iter(["a"]), say=lambda _: pytest.fail("nothing is to be said"), **FEW, **settings)


def test_a_conversation_says_the_text_piece_by_piece(model: str) -> None:
    said: list[str] = []
    results = converse(model, lines=["def f(x):", "def f(x):"], say=said.append, **FEW)
    assert len(said) > 4
    assert "".join(said) == "".join(result["completion"] + "\n" for result in results)
    assert results[0]["completion"] != results[1]["completion"]  # asked again, it says something else
    assert results[0] == generate(model, prompts=["def f(x):"], **FEW)[0]


def test_an_interrupt_ends_the_text_and_not_the_conversation(model: str) -> None:
    said: list[str] = []

    def say(piece: str) -> None:
        said.append(piece)
        if len(said) == 2:
            raise KeyboardInterrupt

    results = converse(model, lines=["x", "y"], say=say, **FEW)
    assert results[0] == {"prompt": "x", "completion": "".join(said[:2]), "ended_by": "interrupt"}
    assert results[1]["tokens"] == 8


def test_a_prompt_that_is_too_long_does_not_end_the_conversation(model: str, caplog: pytest.LogCaptureFixture) -> None:
    results = converse(model, lines=["é" * 40, "x"], say=lambda _: None, **FEW)
    assert "has 80 tokens" in results[0]["error"]
    assert "has 80 tokens" in caplog.text
    assert results[1]["tokens"] == 8


def test_a_prompt_that_is_no_unicode_does_not_end_the_conversation(model: str) -> None:
    results = converse(model, lines=["caf\udce9", "x"], say=lambda _: None, **FEW)
    assert results[0]["error"].startswith(r"the prompt 'caf\udce9' is not valid Unicode: character 4 is half")
    assert results[1]["tokens"] == 8


def test_interactive_reads_a_pipe_line_by_line_until_an_empty_line(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", model, "--interactive", "--max-new-tokens", "8", "--device", "cpu"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ndef f(x):\n\nnever\n"))
    assert run(argv) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\ndef f(x):"))
    assert run([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert [result["prompt"] for result in results] == ["x", "def f(x):"]
    assert text == "".join(visible(result["completion"]) + "\n" for result in results), "control characters written out"


def test_the_program_passes_stop_texts_and_tokens_on(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", model, "--prompt", "x", "--max-new-tokens", "30", "--device", "cpu", "--json"]
    assert run(argv) == 0
    (plain,) = json.loads(capsys.readouterr().out)
    stop = plain["completion"][5:8]
    assert run([*argv, "--stop", stop]) == 0
    (stopped,) = json.loads(capsys.readouterr().out)
    assert stopped["completion"] == plain["completion"][: plain["completion"].index(stop)]
    assert stopped["ended_by"] == "stop"
    (greedy, penalised) = ([*argv, "--temperature", "0", *more] for more in ([], ["--repetition-penalty", "50"]))
    assert run(greedy) == 0
    repeating = json.loads(capsys.readouterr().out)
    assert run(penalised) == 0
    assert json.loads(capsys.readouterr().out) != repeating


def test_stdin_that_is_no_text_is_said_so(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    assert run(["generate", model]) == 2
    assert capsys.readouterr().err == "error: stdin is not text in UTF-8 (byte 1)\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_current_text_of_the_program_alone(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "long", max_seq_len=30_000)
    argv = ["generate", str(tmp_path / "long"), "--interactive", "--temperature", "0", "--max-new-tokens", "25000"]
    with subprocess.Popen(
        [sys.executable, "-m", "llmtrain", *argv, "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        # A shell's background job ignores Ctrl-C, and so would what it starts: these tests, and with them the program.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("x\n")
        program.stdin.flush()
        assert program.stdout.read(20)  # it writes
        program.send_signal(signal.SIGINT)
        program.stdin.close()  # as the next line, the end: the program was still there to read it
        rest = program.stdout.read()
    assert program.returncode == 0
    assert rest.endswith("\n")
    assert len(rest) < 20_000
