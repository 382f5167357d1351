"""Branches of lakeFS as commits: an address is resolved once, so that all who read it later see the same data."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from llmtrain.storage.address import Address, parse_address, scheme_of

_COMMIT = re.compile(r"[0-9a-f]{64}")


def commit_in(address: str) -> str | None:
    """Return the commit that an address names; None for a branch or tag, and for other stores."""
    if scheme_of(address) != "lakefs":
        return None
    ref = parse_address(address).bucket.partition("/")[2]
    return ref if _COMMIT.fullmatch(ref) else None


def at_commit(text: str, commits: MutableMapping[str, str]) -> str:
    """Return an address of lakeFS with the commit in place of its branch or tag; any other text as it is.

    `commits` maps each `lakefs://repository/branch` to its commit. What it lacks is asked of lakeFS, and added. Raises
    StorageError, and ConfigError as `open_store` does.
    """
    if scheme_of(text) != "lakefs" or commit_in(text):
        return text
    place = parse_address(text)
    branch = place.root.rstrip("/")
    if branch not in commits:
        from llmtrain.storage._lakefs import LakeStore

        commits[branch] = LakeStore(place).commit()
    repository = place.bucket.partition("/")[0]
    return str(Address(place.scheme, f"{repository}/{commits[branch]}", place.key))
