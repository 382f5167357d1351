"""Repositories of lakeFS, by the few requests of its HTTP API that are needed.

LAKEFS_ENDPOINT, LAKEFS_ACCESS_KEY and LAKEFS_SECRET_KEY say where and who. Where the server can sign links to its
object store, content is read from there and not through the server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from llmtrain.errors import ConfigError
from llmtrain.storage._range_file import open_ranges
from llmtrain.storage._web import Requests, get_range, get_ranges
from llmtrain.storage.address import Address
from llmtrain.storage.failures import AccessDenied, NoObject, missing_object
from llmtrain.storage.store import Entry, Store

LINK_SECONDS = 300
"""Time for which a signed link is used when the server does not say when it ends."""
LIST_AMOUNT = 1000
"""Entries that are asked for at a time: the most that lakeFS gives."""


class LakeStore(Store):
    """A repository at a branch, tag or commit."""

    def __init__(self, place: Address) -> None:
        self.root = place.root
        repository, _, self._ref = place.bucket.partition("/")
        variables = ("LAKEFS_ENDPOINT", "LAKEFS_ACCESS_KEY", "LAKEFS_SECRET_KEY")
        missing = [name for name in variables if not os.environ.get(name)]
        if missing:
            raise ConfigError(f"{place.shown}: set {' and '.join(missing)}: where lakeFS is, and who asks it")
        endpoint, access_key, secret_key = (os.environ[name] for name in variables)
        self._api = f"{endpoint.rstrip('/').removesuffix('/api/v1')}/api/v1"
        self._repository = f"{self._api}/repositories/{quote(repository, safe='')}"
        self._ask = Requests("lakefs", (access_key, secret_key)).ask
        self._ask_link = Requests("lakefs").ask  # a signed link says itself who asks
        self._signs: bool | None = None
        self._links: dict[str, tuple[str, float]] = {}
        self._lock = Lock()

    def commit(self) -> str:
        """Return the commit that the branch, tag or commit is now."""
        address = self.root
        try:
            document = self._json(f"{self._at_ref}/commits", address, amount=1, limit=True)
        except NoObject:
            raise missing_object(address, "lakefs", is_place=True) from None
        return str(document["results"][0]["id"])

    def stat(self, key: str) -> Entry:
        """Return size and checksum of an object."""
        found = self._json(
            f"{self._at_ref}/objects/stat", self.root + key, path=key, presign=True if self._signs_links() else None
        )
        if self._signs:
            ends = float(found.get("physical_address_expiry") or time.time() + LINK_SECONDS)
            with self._lock:
                self._links[key] = (str(found["physical_address"]), ends)
        return _entry(found)

    def read(self, key: str) -> bytes:
        """Return a whole object."""
        return self.read_range(key, 0, self.size(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on."""
        address = self.root + key
        if not self._signs_links():
            url = f"{self._at_ref}/objects?path={quote(key, safe='')}"
            return get_range(self._ask, url, address, start, length)
        try:
            return get_range(self._ask_link, self._link(key), address, start, length)
        except AccessDenied:  # the link has ended
            self.stat(key)
            return get_range(self._ask_link, self._link(key), address, start, length)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return several ranges."""
        return get_ranges(self.read_range, key, ranges)

    def open(self, key: str, *, size: int | None = None) -> BinaryIO:
        """Open an object to be read at any position."""
        size = self.size(key) if size is None else size
        return open_ranges(lambda start, length: self.read_range(key, start, length), size)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects of a folder and of folders in it."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        after, has_more = "", True
        while has_more:
            page = self._json(
                f"{self._at_ref}/objects/ls", self.root + prefix, prefix=folder, after=after, amount=LIST_AMOUNT
            )
            yield from (_entry(one) for one in page["results"] if one["path_type"] == "object")
            has_more, after = page["pagination"]["has_more"], page["pagination"]["next_offset"]

    def write(self, key: str, content: bytes | Path) -> None:
        """Replace an object on the branch by bytes or by the content of a file; nothing is committed."""
        url = f"{self._repository}/branches/{quote(self._ref, safe='')}/objects"
        headers = {"Content-Type": "application/octet-stream"}
        data = content if isinstance(content, bytes) else content.read_bytes()
        self._ask("POST", url, address=self.root + key, params={"path": key}, data=data, headers=headers)

    def delete(self, key: str) -> None:
        """Delete an object on the branch, if it is there; nothing is committed."""
        url = f"{self._repository}/branches/{quote(self._ref, safe='')}/objects"
        try:
            self._ask("DELETE", url, address=self.root + key, params={"path": key})
        except NoObject:
            return

    @property
    def _at_ref(self) -> str:
        return f"{self._repository}/refs/{quote(self._ref, safe='')}"

    def _json(self, url: str, address: str, **parameters: Any) -> dict[str, Any]:
        parameters = {name: str(value).lower() if value is True else value for name, value in parameters.items()}
        return cast(dict[str, Any], self._ask("GET", url, address=address, params=parameters).json())

    def _signs_links(self) -> bool:
        """Return whether the server signs links to its object store; it is asked once."""
        if self._signs is None:
            config = self._json(f"{self._api}/config", self.root)
            self._signs = bool(config.get("storage_config", {}).get("pre_sign_support", False))
        return self._signs

    def _link(self, key: str) -> str:
        """Return a signed link to the object as it was at the last `stat`, or is now if that link ends soon."""
        url, ends = self._links.get(key, ("", 0.0))
        if ends - 30 > time.time():
            return url
        self.stat(key)
        return self._links[key][0]


def _entry(found: dict[str, Any]) -> Entry:
    return Entry(str(found["path"]), int(found.get("size_bytes", 0)), found.get("checksum") or None)
