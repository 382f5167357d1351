"""Prepares text for other people: replaces paths of this machine by the names of their files or folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PART = r"[^\s/\"'`,;:|=<>()\[\]{}]+"
_PATH = re.compile(rf"(?:(?<=\bfile://)|(?<=\bsqlite:///)|(?<![\w./~<*-]))~?/(?:{_PART}/)*({_PART})/?")


def public(value: Any) -> Any:
    """Return `value` without paths of this machine, in text, mappings and lists at any depth.

    A text that is one path may contain blanks; within other text, a path ends at a blank.
    """
    if isinstance(value, Mapping):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~/")) and "\n" not in value:
        return Path(value).name or value
    return _PATH.sub(r"\1", value.replace(f"{Path.home()}/", "").replace(f"{Path.cwd()}/", ""))
