"""Finds what a user names by import path, `package.module:Name`: a model, data, an adapter, a sink, a metric."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from llmtrain.errors import ConfigError


def import_callable(path: str, *, key: str) -> Callable[..., Any]:
    """The class or function at `package.module:Name`; modules of the working folder are found too.

    `key` is where the config names it. Raises ConfigError if it cannot be imported or is not there.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the program's script has its own folder there, and not the user's
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key}: {module_name} cannot be imported ({what_failed(error)}); modules are looked for among the "
            f"installed packages and in {os.getcwd()}, where the command was started"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name} has no function or class {name!r}")
    return found  # type: ignore[no-any-return]


def what_failed(error: BaseException) -> str:
    """Return an error of the user's code in a line: its type, its message, and the file:line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    theirs = os.path.isfile(frame.filename) and not frame.filename.startswith(os.path.dirname(__file__))
    return f"{type(error).__name__}: {error}" + (f" at {frame.filename}:{frame.lineno}" if theirs else "")
