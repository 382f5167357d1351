"""No name and no argument can break out of the quoting, whatever the login shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.errors import ConfigError
from llmtrain.launching.ssh.quoting import command_line, quote, quote_path, rsync_shell

SHELLS = [shell for name in ("sh", "bash", "zsh", "fish", "tcsh", "ksh") if (shell := shutil.which(name))]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
ODD = [
    "it's",
    '"',
    "$(touch pwned)",
    "`touch pwned`",
    "a\nb\n",
    "-rf",
    "~",
    "#{q}",
    "!!",
    "\\",
    "*",
    "",
    "ü €",
    "%b\\041",
]
ECHO = 'for word; do printf "%s\\0" "$word"; done'


def words_after(shell: str, line: str) -> list[str]:
    done = subprocess.run([shell, "-c", line], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("shell", SHELLS)
@given(words=st.lists(TEXT, max_size=4))
@example(words=ODD)
@settings(max_examples=40)
def test_a_script_gets_exactly_these_words_from_every_login_shell(shell: str, words: list[str]) -> None:
    assert words_after(shell, command_line(ECHO, *words)) == words


@pytest.mark.parametrize("shell", SHELLS)
def test_words_after_the_line_become_arguments_and_a_script_may_have_several_lines(shell: str) -> None:
    line = command_line(f"shift\n# it's a comment\n{ECHO}\n", "first", "sec'ond")
    assert words_after(shell, f"{line} --server .") == ["sec'ond", "--server", "."]


@given(words=st.lists(TEXT, min_size=1, max_size=4))
@example(words=ODD)
@settings(max_examples=30)
def test_sh_reads_quoted_words_back(words: list[str]) -> None:
    assert words_after("sh", f"set -- {quote(*words)}; {ECHO}") == words


@given(path=TEXT)
@example(path="a b/$(touch pwned)/it's\n")
@settings(max_examples=30)
def test_only_a_leading_tilde_means_the_home(path: str) -> None:
    home = os.environ["HOME"]
    assert words_after("sh", f"set -- {quote_path(f'~/{path}')}; {ECHO}") == [f"{home}/{path}"]
    assert words_after("sh", f"set -- {quote_path(f'/x/{path}')}; {ECHO}") == [f"/x/{path}"]


def test_a_relative_path_is_in_the_home() -> None:
    assert words_after("sh", f"set -- {quote_path('a~b')} {quote_path('~')}; {ECHO}") == [
        f"{os.environ['HOME']}/a~b",
        os.environ["HOME"],
    ]


def test_a_zero_byte_is_rejected() -> None:
    with pytest.raises(ConfigError, match="zero byte"):
        quote("a\0b")


@pytest.mark.slow  # needs rsync
def test_rsync_starts_the_shell_with_exactly_these_words(tmp_path: Path) -> None:
    words = [word for word in ODD if word]
    shell = tmp_path / "it's a shell"
    shell.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >"{tmp_path}/words"\nexit 1\n')
    shell.chmod(0o755)
    subprocess.run(
        ["rsync", f"--rsh={rsync_shell([str(shell), *words])}", "host:./", "."], capture_output=True, check=False
    )
    assert (tmp_path / "words").read_text().split("\0")[: len(words)] == words
