"""Quotes commands for all the shells between this machine and another. No other file quotes anything.

    script, arguments ─▶ command_line ─▶ ssh ─▶ login shell (sh, bash, zsh, fish, csh, …) ─▶ sh ─▶ script, arguments

ssh joins the words of a command and passes them to the user's login shell, and shells differ in quoting. So the login
shell only gets plain characters and backslashes in single quotes, which all shells read in the same way. All other
characters are octal numbers, which sh decodes.
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
            raise ConfigError(f"{word!r} has a zero byte, which no name or argument can contain: remove it")
    return shlex.join(words)


def quote_path(path: str) -> str:
    """Return a path on another machine, quoted for sh. A relative path, and ~, start from the home folder there."""
    home = '"$HOME"'
    if path == "~":
        return home
    if path.startswith("/"):
        return quote(path)
    return f"{home}/{quote(path.removeprefix('~/'))}"


def command_line(script: str, *arguments: str) -> str:
    """Return a line that runs `script` in sh from any login shell. Words after the line are added to `arguments`."""
    text = f'shift; set -- {quote(*arguments)} "$@"\n{script}'
    encoded = "".join(
        chr(byte) if byte in _PLAIN else f"\\0{byte:03o}" for byte in text.encode("utf-8", "surrogateescape")
    )
    return f"{_DECODE} '{encoded}'"


def rsync_shell(words: Sequence[str]) -> str:
    """Return `words` for rsync's --rsh, which splits at blanks; in quotes, it reads doubled quotes but no backslash."""
    return " ".join("'" + word.replace("'", "''") + "'" for word in words)
