"""Finds what a user names by import path: an adapter, a sink, a metric of their own (`package.module:Name`)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from llmtrain.config.errors import ConfigError


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
        raise ConfigError(f"{key}: {module_name} cannot be imported ({type(error).__name__}: {error})") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name} has no function or class {name!r}")
    return found  # type: ignore[no-any-return]
