"""Standard streams that nobody reads, that are closed, full, or in an encoding that lacks the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LATIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
ASCII = {**LATIN, "PYTHONIOENCODING": "ascii:strict"}


BEGIN = """
import os, subprocess, sys
from llmtrain.cli.output import json_document, keep_streams, stdout_is_read
keep_streams()
"""


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    command, environment = [sys.executable, "-c", BEGIN + code], {**os.environ, **environ}
    return subprocess.run(command, env=environment, check=False, capture_output=True)


@pytest.mark.parametrize("environ", [ASCII, LATIN])
def test_text_that_the_encoding_lacks_is_escaped_and_none_is_lost(environ: dict[str, str]) -> None:
    done = run_python(r'print("a caf\xe9 \u4f60 \U0001f600 z")', **environ)
    assert (done.returncode, done.stderr) == (0, b"")
    accent = b"\\xe9" if environ is ASCII else b"\xe9"
    assert done.stdout == b"a caf" + accent + b" \\u4f60 \\U0001f600 z\n"


def test_json_stays_json_in_any_encoding() -> None:
    code = r'print(json_document({"text": "caf\xe9 \u4f60"}))'
    for environ in (ASCII, LATIN, {"PYTHONIOENCODING": "utf-8"}):
        assert json.loads(run_python(code, **environ).stdout) == {"text": "caf\xe9 \u4f60"}


def test_the_shipped_configs_are_listed_in_ascii() -> None:
    command = [sys.executable, "-m", "llmtrain", "list-configs"]
    done = subprocess.run(command, env={**os.environ, **ASCII}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"quickstart" in done.stdout


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_continues_when_the_reader_of_a_stream_leaves(stream: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"""
for _ in range(3):
    print("x" * 100_000, file=sys.{stream}, flush=True)
os.write({1 if stream == "stdout" else 2}, b"from a C library")
subprocess.run(["echo", "from a child"], check=True)
open({str(tmp_path / "done")!r}, "w").write(str(stdout_is_read()))
"""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], check=False, **streams)  # type: ignore[call-overload]
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == str(stream == "stderr")


def test_a_full_disk_behind_stdout_is_one_message() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "llmtrain", "list-configs"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: stdout takes no more: No space left on device\n")


def test_output_to_closed_streams_is_discarded() -> None:
    command = ["sh", "-c", f"exec {sys.executable} -m llmtrain list-configs --json >&- 2>&- <&-"]
    assert subprocess.run(command, check=False).returncode == 0


def test_a_closed_stdin_is_empty() -> None:
    command = [
        "sh",
        "-c",
        f'exec {sys.executable} -c "$0" <&-',
        BEGIN + "print(repr(sys.stdin.read()), sys.stdin.isatty())",
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"'' False\n", b"")
