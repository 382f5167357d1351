"""Say for each key and option whether it takes paths of this machine alone, or addresses (`s3://bucket/x`) as well.

Keys of the config have LOCAL, LOCAL_OR_HUB, ADDRESS or STORE in their schema; options of commands have the callback
`local`, `readable` or `stored` of cli/options. Where paths alone are taken, an address would be a folder named `s3:`,
and is rejected.
"""

from __future__ import annotations

import os
from typing import Any, Final

from llmtrain.errors import ConfigError
from llmtrain.storage.address import has_user, local_path, parse_address, scheme_of, shown

LOCAL: Final[dict[str, Any]] = {"format": "path"}
"""`json_schema_extra` of a key that takes paths of this machine."""
LOCAL_OR_HUB: Final[dict[str, Any]] = {"format": "path or hf://"}
"""The same, for a key that takes hf:// as well: a data set of the Hub."""
ADDRESS: Final[dict[str, Any]] = {"format": "path or address"}
"""The same, for a key that takes the address of any store."""

STORE: Final[dict[str, Any]] = {"format": "path or store"}
"""The same, for a key that takes the address of a store that is written: one in which runs are kept."""
STORES_OF_RUNS: Final = ("s3", "gs", "az", "lakefs", "memory")

MAX_NAME_BYTES: Final = 255
_HUB = "hf"


def checked_path(path: str, kind: dict[str, Any], *, key: str = "") -> str:
    """Return a path or an address that a key of this `kind` takes; the path in place of a `file://` address.

    Raises ConfigError, which begins with `key`, for an address that the key does not take, and for one that has a
    password in it, or that no store can have.
    """
    scheme, where = scheme_of(path), f"{key}: " if key else ""
    if scheme == _HUB and kind in (ADDRESS, LOCAL_OR_HUB):
        return path
    try:
        if scheme is None or scheme == "file":
            return _possible(local_path(path))
        if kind in (ADDRESS, STORE):
            parse_address(path)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    if kind == ADDRESS:
        if has_user(path):
            raise ConfigError(
                f"{where}{shown(path)} has a user in it, and a config is no place for secrets: use ~/.netrc"
            )
        return path
    if kind == STORE and scheme in STORES_OF_RUNS:
        return path
    if kind == STORE:
        raise ConfigError(
            f"{where}{shown(path)}: runs are not kept there: name a folder, or a store that is one of "
            f"{', '.join(STORES_OF_RUNS)}"
        )
    if scheme == _HUB:
        instead = "name a folder, or a model of the Hub as owner/name (hub:owner/name to publish it there)"
    else:
        instead = "name a file or folder here, and copy it from or to there with that store's own tools"
    raise ConfigError(f"{where}{shown(path)} is an address, and only paths of this machine work: {instead}")


def _possible(path: str) -> str:
    """Return a path of this machine. Raises ConfigError where no file system takes it."""
    if "\0" in path:
        raise ConfigError(f"{path!r} has the character NUL in it, which no path has")
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in path.split("/")):
        raise ConfigError(
            f"{path[:40]!r} … is no path: a name in it has more than {MAX_NAME_BYTES} bytes, which no file system takes"
        )
    return path
