"""Quoting for the shells between here and a command on another machine. No other file puts quotes around anything.

    script, arguments ─▶ command_line ─▶ ssh ─▶ login shell (sh, bash, zsh, fish, csh, …) ─▶ sh ─▶ script, arguments

ssh joins the words of a command and hands them to the user's login shell, whose quoting differs from shell to shell. So
the login shell only sees letters, digits and backslashes between single quotes, which all of them read alike; sh turns
the octal numbers back into the text.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from llmtrain.errors import ConfigError

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _-./:=,@+")
_DECODE = """sh -c 'eval "$(printf "%b" "$1")"' sh"""


def quote(*words: str) -> str:
    """Return `words` as one line that sh reads as exactly these words. Raises ConfigError for a zero byte."""
    for word in words:
        if "\0" in word:
            raise ConfigError(f"{word!r} has a zero byte, which no name or argument can hold: remove it")
    return shlex.join(words)


def quote_path(path: str) -> str:
    """Return a path on another machine for sh: ~ at its beginning, and no beginning at all, mean the home there."""
    home = '"$HOME"'
    if path == "~":
        return home
    if path.startswith("/"):
        return quote(path)
    return f"{home}/{quote(path.removeprefix('~/'))}"


def command_line(script: str, *arguments: str) -> str:
    """Return one line for any login shell that runs `script` in sh; words behind the line follow `arguments` there."""
    text = f'shift; set -- {quote(*arguments)} "$@"\n{script}'
    encoded = "".join(
        chr(byte) if byte in _PLAIN else f"\\0{byte:03o}" for byte in text.encode("utf-8", "surrogateescape")
    )
    return f"{_DECODE} '{encoded}'"


def rsync_shell(words: Sequence[str]) -> str:
    """Return `words` for rsync's --rsh, which splits at blanks and knows quotes that are doubled, but no backslash."""
    return " ".join("'" + word.replace("'", "''") + "'" for word in words)
