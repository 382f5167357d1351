"""Stores by fsspec: files of this machine, memory, and repositories of the Hugging Face Hub."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from llmtrain.storage._range_file import open_ranges
from llmtrain.storage.address import Address
from llmtrain.storage.failures import (
    StorageError,
    access_denied,
    missing_object,
    not_answering,
    not_inside,
    one_line,
)
from llmtrain.storage.store import Entry, Store


class FileSystemStore(Store):
    """A store whose objects fsspec reads and writes."""

    def __init__(self, place: Address) -> None:
        self.root = place.root if place.bucket else f"{place.scheme}:///"
        self._scheme = place.scheme
        self._files = fsspec.filesystem(place.scheme, use_listings_cache=False)
        self._below = "/" if place.scheme == "file" else f"{place.bucket}/"

    def stat(self, key: str) -> Entry:
        """Return size and etag of an object."""
        with self._failures(key):
            info = self._files.info(self._path(key))
        if info["type"] != "file":
            raise missing_object(self.root + key, self._scheme)
        return Entry(key, int(info["size"]), _etag(info))

    def read(self, key: str) -> bytes:
        """Return a whole object."""
        with self._failures(key):
            return bytes(self._files.cat_file(self._path(key)))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on."""
        if length <= 0:
            return b""
        with self._failures(key):
            data = bytes(self._files.cat_file(self._path(key), start=start, end=start + length))
        if len(data) != length:
            raise not_inside(self.root + key, [(start, length)])
        return data

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return several ranges."""
        return [self.read_range(key, start, length) for start, length in ranges]

    def open(self, key: str, *, size: int | None = None) -> BinaryIO:
        """Open an object to be read at any position."""
        if self._scheme == "file":
            with self._failures(key):
                return open(self._path(key), "rb")
        size = self.size(key) if size is None else size
        return open_ranges(lambda start, length: self.read_range(key, start, length), size)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects of a folder and of folders in it."""
        with self._failures(prefix):
            found = self._files.find(self._path(prefix).rstrip("/") or "/", detail=True)
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        for path, info in cast(Mapping[str, Any], found).items():
            key = path.removeprefix("/") if self._scheme == "file" else path.lstrip("/").removeprefix(self._below)
            if key.startswith(folder):
                yield Entry(key, int(info["size"]), _etag(info))

    def write(self, key: str, content: bytes | Path) -> None:
        """Replace an object by bytes or by the content of a file."""
        path = self._path(key)
        with self._failures(key):
            if self._scheme != "file":
                self._files.pipe_file(path, content if isinstance(content, bytes) else content.read_bytes())
                return
            temporary = f"{path}.{uuid.uuid4().hex}.tmp"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                Path(temporary).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with self._failures(key):
            try:
                self._files.rm_file(self._path(key))
            except FileNotFoundError:
                return

    def _path(self, key: str) -> str:
        return f"{self._below}{key}"

    @contextmanager
    def _failures(self, key: str) -> Iterator[None]:
        address = self.root + key
        try:
            yield
        except StorageError:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise missing_object(address, self._scheme) from error
        except PermissionError as error:
            raise access_denied(address, self._scheme) from error
        except OSError as error:
            if self._scheme != "hf":
                raise
            raise _of_the_hub(error, address) from error
        except Exception as error:  # huggingface_hub: httpx's errors, and its own
            if self._scheme != "hf":
                raise
            raise _of_the_hub(error, address) from error


def _of_the_hub(error: Exception, address: str) -> StorageError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return access_denied(address, "hf", status)
    if status == 404 or "NotFound" in type(error).__name__:
        return missing_object(address, "hf", is_place=True)
    return not_answering(address, "the Hub", f"fails ({one_line(error)})")


def _etag(info: Mapping[str, Any]) -> str | None:
    """Return what tells one content of an object from another, as each file system has it."""
    if info.get("blob_id"):
        return str(info["blob_id"])
    changed = info.get("mtime", info.get("created"))
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    return None if seconds is None else f"{seconds}-{info['size']}"
