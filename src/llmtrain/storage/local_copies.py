"""Folders of a store, fetched once into a bounded cache of this machine: tokenizers and models.

    <cache>/<key>/                     the files as they lie in the store
    <cache>/<key>/.copy.json           address, and of each file its etag, size, time and SHA-256; written last
    <cache>/<key>.lock                 held while the copy is made or checked
    <cache>/.<key>.<process>.partial/  a copy that is not finished

`key` is a hash of the address and of the etags, so a changed folder is another copy. A copy is checked when it is used:
a file whose size or time changed since it was fetched must still have its SHA-256, or the folder is fetched anew. When
the cache grows over its limit, the copies that were used longest ago are deleted, but none that was used within a day.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from llmtrain.atomic import file_sha256, write_json
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.storage.address import parse_address, shown
from llmtrain.storage.failures import AccessDenied, NoObject
from llmtrain.storage.finding import StoredObject, find_objects

log = logging.getLogger("llmtrain.storage")

CACHE = "~/.cache/llmtrain/objects"
"""Folder of the copies; LLMTRAIN_CACHE names another place for it."""
LIMIT_GB = 100.0
"""Size of the cache, in GB; LLMTRAIN_CACHE_GB sets another."""
IN_USE_SECONDS = 24 * 3600
_RECORD = ".copy.json"
_BLOCK_BYTES = 1 << 23


def cache_folder() -> Path:
    """Return the folder of what is copied from stores to this machine."""
    return Path(os.environ.get("LLMTRAIN_CACHE") or CACHE).expanduser()


def fetch_folder(address: str, *, patterns: Sequence[str] = ("*",), offline: bool = False) -> Path:
    """Return a local folder with the objects of a folder at an address whose paths match one of `patterns`.

    Any number of processes may call it at once: one fetches, the others wait. `offline`: take the newest copy without
    asking the store. Raises ConfigError where there is no such folder, access is denied or there is no copy, and
    StorageError where the store fails.
    """
    cache = cache_folder()
    if offline:
        return _newest_copy(cache, address)
    try:
        found = find_objects(f"{address.rstrip('/')}/")
    except (NoObject, AccessDenied) as error:
        raise ConfigError(str(error)) from error
    wanted = [one for one in found if any(fnmatchcase(one.inside, pattern) for pattern in patterns)]
    if not wanted:
        raise ConfigError(f"{shown(address)}: holds {found[0].inside}, and none of {', '.join(patterns)}")
    folder = cache / _key(address, wanted)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                _fetch(address, wanted, folder)
            os.utime(folder / _RECORD)
            _make_room(cache, keep=folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError) and error.filename is None:
            raise ConfigError(str(error)) from error
        if error.filename is None:
            raise
        raise ConfigError(
            f"{shown(address)}: the cache {cache} cannot be written ({error.strerror}): set LLMTRAIN_CACHE"
        ) from error
    return folder


def _key(address: str, found: Sequence[StoredObject]) -> str:
    state = [shown(address.rstrip("/")), *([one.inside, one.entry.size, one.entry.etag] for one in found)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def _fetch(address: str, found: Sequence[StoredObject], folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    log.info("%s: fetching %s into %s, once", shown(address), counted(len(found), "file"), folder)
    try:
        files = {one.inside: _fetch_file(one, partial / one.inside) for one in found}
        address = shown(address.rstrip("/"))
        write_json(partial / _RECORD, {"address": address, "files": files})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch_file(found: StoredObject, path: Path) -> dict[str, Any]:
    """Fetch one object, and return the record of its file. Raises StorageError."""
    sha256 = write_stream(found.open(), path)
    status = path.stat()
    return {
        "etag": found.entry.etag,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256,
    }


def write_stream(stream: BinaryIO, path: Path) -> str:
    """Write what is left of a stream to a file, in blocks, and close the stream. Return the SHA-256 of the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with stream, path.open("wb") as file:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _is_whole(folder: Path) -> bool:
    """Return whether the files are as they were fetched."""
    record = _record(folder)
    for name, file in record.get("files", {}).items():
        try:
            status = (folder / name).stat()
            if status.st_size != file["size"]:
                return False
            if status.st_mtime_ns != file["mtime_ns"] and file_sha256(folder / name) != file["sha256"]:
                log.warning("%s was changed: fetching it anew", folder / name)
                return False
        except OSError:
            return False
    return bool(record)


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _copies(cache: Path) -> list[tuple[float, Path]]:
    """Return the copies of the cache, each with the time of its last use, the oldest first."""
    found = []
    for record in cache.glob(f"*/{_RECORD}"):
        try:
            found.append((record.stat().st_mtime, record.parent))
        except OSError:  # another process has deleted it
            continue
    return sorted(found)


def _newest_copy(cache: Path, address: str) -> Path:
    wanted = shown(address.rstrip("/"))
    for _, folder in reversed(_copies(cache)):
        if _record(folder).get("address") == wanted and _is_whole(folder):
            return folder
    raise ConfigError(f"{wanted}: is not in the cache {cache}, and the run is offline: fetch it once with a connection")


def _make_room(cache: Path, *, keep: Path) -> None:
    """Delete the copies that were used longest ago, as long as the cache is over its limit."""
    limit = float(os.environ.get("LLMTRAIN_CACHE_GB") or LIMIT_GB) * 1e9
    copies = _copies(cache)
    sizes = {folder: sum(file["size"] for file in _record(folder).get("files", {}).values()) for _, folder in copies}
    total = sum(sizes.values())
    for used, folder in copies:
        if total <= limit:
            return
        if folder != keep and time.time() - used > IN_USE_SECONDS:
            log.info("%s: deleted, to keep the cache below %.0f GB", folder, limit / 1e9)
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]


def copied_from(folder: Path) -> str | None:
    """Return the address that a folder of the cache was fetched from; None for any other folder."""
    found = _record(folder).get("address")
    return str(parse_address(found)) if found else None
