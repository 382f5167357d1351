"""Reject addresses (`s3://bucket/x`, `http://…`) where paths of this machine alone are read or written.

Keys of the config have LOCAL or LOCAL_OR_HUB in their schema, options of commands the callback `local` of cli/options.
As a path, such an address would be a folder named `s3:`.
"""

from __future__ import annotations

import re
from typing import Any, Final

from llmtrain.errors import ConfigError

LOCAL: Final[dict[str, Any]] = {"format": "path"}
"""`json_schema_extra` of a key that takes paths of this machine."""
LOCAL_OR_HUB: Final[dict[str, Any]] = {"format": "path or hf://"}
"""The same, for a key that takes hf:// as well: a data set of the Hub."""

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+):/")
"""One slash is enough: pathlib makes one of two. A scheme has two letters at least; c:/ is a path."""
_HUB = "hf"


def reject_address(path: str, *, key: str = "", hub: bool = False) -> None:
    """Raise ConfigError, which begins with `key`, if `path` is an address; with `hub`, one of the Hub may pass."""
    found = _ADDRESS.match(path)
    if found is None or (hub and found["scheme"] == _HUB):
        return
    if found["scheme"] == _HUB:
        instead = "name a folder, or a model of the Hub as owner/name (hub:owner/name to publish it there)"
    else:
        instead = "name a file or folder here, and copy it from or to there with that store's own tools"
    raise ConfigError(
        f"{f'{key}: ' if key else ''}{path} is an address, and only paths of this machine work: {instead}"
    )
