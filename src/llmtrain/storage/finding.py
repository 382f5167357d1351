"""Find the objects at an address: one object, those of a folder, or those that a pattern matches."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from llmtrain.storage.address import Address, parse_address
from llmtrain.storage.failures import NoObject, missing_object
from llmtrain.storage.store import Entry, Store, open_store


@dataclass(frozen=True)
class StoredObject:
    """An object that was found. It can be sent to another process."""

    address: Address
    """Its address, which may hold secrets."""
    entry: Entry
    inside: str
    """Its path in the folder, or from the first folder with a wildcard on; of an object that was named, its name."""

    @cached_property
    def name(self) -> str:
        """Its address for messages and records."""
        return self.address.shown

    @property
    def path(self) -> str:
        """Its path, without the query of a signed link: its suffix tells the format."""
        return _without_query(self.address)

    def open(self) -> BinaryIO:
        """Open it to be read at any position. Raises StorageError."""
        return open_store(self.address).open(self.entry.key, size=self.entry.size)


def find_objects(address: str) -> list[StoredObject]:
    """Return the object at an address, or those in the folder or of the glob that it names, sorted by key.

    `*` matches within a folder, `**` folders too. Objects whose name, or the name of whose folder, begins with a dot
    are left out unless they are named. Raises NoObject where there is none, StorageError where the store fails, and
    ConfigError as `open_store` does.
    """
    place = parse_address(address)
    store = open_store(place)
    is_web = place.scheme in ("http", "https")
    if (folder := _above_wildcard(place)) is not None:
        return _in_folder(store, place, folder, re.compile(_pattern(place.key)))
    try:
        if place.key and not place.key.endswith("/"):
            return [StoredObject(place, store.stat(place.key), _without_query(place).rpartition("/")[2])]
    except NoObject:
        if is_web:
            raise
    return _in_folder(store, place, place.key.rstrip("/"), None)


def find_places(address: str, *, suffix: str) -> list[Address]:
    """Return the folders with objects of a suffix, and such objects, that a glob matches, sorted by key.

    What lies in a folder that matches is not named again. An address without a wildcard is the only place. Raises what
    `find_objects` does.
    """
    place = parse_address(address)
    folder = _above_wildcard(place)
    if folder is None:
        return [place]
    pattern = re.compile(_pattern(place.key.rstrip("/")))
    places = set()
    for found in _in_folder(open_store(place), place, folder, None):
        parts = found.entry.key.split("/")
        keys = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        if found.entry.key.endswith(suffix) and (match := next(filter(pattern.match, keys), None)):
            places.add(match)
    if not places:
        raise missing_object(str(place), place.scheme)
    return [place.joined(key) for key in sorted(places)]


def is_one_object(address: str, found: list[StoredObject]) -> bool:
    """Return whether `find_objects` found the object that the address names itself."""
    return len(found) == 1 and found[0].address == parse_address(address)


def has_wildcard(address: str) -> bool:
    """Return whether an address is a glob."""
    return glob.has_magic(_without_query(parse_address(address)))


def _in_folder(store: Store, place: Address, folder: str, pattern: re.Pattern[str] | None) -> list[StoredObject]:
    below = f"{folder}/" if folder else ""
    found = []
    for entry in store.list(folder):
        inside = entry.key.removeprefix(below)
        is_hidden = inside.startswith(".") or "/." in inside
        if not is_hidden and not entry.key.endswith("/") and (pattern is None or pattern.match(entry.key)):
            found.append(StoredObject(place.joined(entry.key), entry, inside))
    if not found:
        raise missing_object(str(place), place.scheme)
    return sorted(found, key=lambda one: one.entry.key)


def _above_wildcard(place: Address) -> str | None:
    """Return the key of the folder in which the first wildcard stands; None for an address without one."""
    is_web = place.scheme in ("http", "https")  # where a question mark begins a query
    wildcard = re.search(r"[*\[]" if is_web else r"[*?\[]", _without_query(place))
    return place.key[: wildcard.start()].rpartition("/")[0] if wildcard else None


def _pattern(key: str) -> str:
    from fsspec.utils import glob_translate

    return str(glob_translate(key))


def _without_query(address: Address) -> str:
    return address.key.partition("?")[0] if address.scheme in ("http", "https") else address.key
