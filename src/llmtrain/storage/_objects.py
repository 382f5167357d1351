"""Stores by obstore: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtrain.storage import failures
from llmtrain.storage._range_file import open_ranges
from llmtrain.storage.address import Address
from llmtrain.storage.credentials import azure_settings, google_settings, s3_settings
from llmtrain.storage.failures import (
    ATTEMPTS,
    StorageError,
    access_denied,
    missing_extra,
    missing_object,
    not_answering,
    not_inside,
    one_line,
)
from llmtrain.storage.store import Entry, Store

if TYPE_CHECKING:
    import obstore

_STATUS = re.compile(r"(?:status(?: code)?:?|non-success|Server returned)\D{0,30}(?P<status>[45]\d\d)", re.IGNORECASE)
_REASON = re.compile(r'message: "(?P<reason>[^"]+)"')
"""The system's own words in the error of a connection: Connection refused."""


class ObjectStore(Store):
    """A bucket or container."""

    def __init__(self, place: Address) -> None:
        self.root = place.root
        self._scheme = place.scheme
        try:
            import obstore
        except ImportError as error:
            raise missing_extra(place.root, "s3") from error
        self._obstore = obstore
        self._endpoint, self._bucket = _bucket(place)

    def stat(self, key: str) -> Entry:
        """Return size and etag of an object."""
        with self._failures(key):
            return _entry(self._obstore.head(self._bucket, key))

    def read(self, key: str) -> bytes:
        """Return a whole object."""
        with self._failures(key):
            return self._obstore.get(self._bucket, key).bytes().to_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on."""
        return self.read_ranges(key, [(start, length)])[0]

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return several ranges: obstore asks for those that lie near each other as one, and for all at once."""
        wanted = [(start, length) for start, length in ranges if length > 0]
        if not wanted:
            return [b""] * len(ranges)
        starts, lengths = zip(*wanted, strict=True)
        with self._failures(key):
            try:
                found = self._obstore.get_ranges(self._bucket, key, starts=starts, lengths=lengths)
            except BaseException as error:
                # A range beyond the end: 416, or, where it was joined with another, a panic, which is no Exception.
                if type(error).__name__ != "PanicException" and " 416 " not in str(error):
                    raise
                raise not_inside(self.root + key, wanted) from error
        data = iter([one.to_bytes() for one in found])
        read = [next(data) if length > 0 else b"" for _, length in ranges]
        if any(len(one) != length for one, (_, length) in zip(read, ranges, strict=True)):
            raise not_inside(self.root + key, wanted)
        return read

    def open(self, key: str, *, size: int | None = None) -> BinaryIO:
        """Open an object to be read at any position."""
        size = self.size(key) if size is None else size
        return open_ranges(lambda start, length: self.read_range(key, start, length), size)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield the objects of a folder and of folders in it."""
        with self._failures(prefix):
            for chunk in self._obstore.list(self._bucket, prefix.rstrip("/") or None):
                yield from map(_entry, chunk)

    def write(self, key: str, content: bytes | Path) -> None:
        """Replace an object by bytes or by the content of a file, which is sent in parts when it is large."""
        with self._failures(key):
            self._obstore.put(self._bucket, key, content)

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with self._failures(key):
            try:
                self._obstore.delete(self._bucket, key)
            except self._obstore.exceptions.NotFoundError:
                return

    @contextmanager
    def _failures(self, key: str) -> Iterator[None]:
        try:
            yield
        except (self._obstore.exceptions.BaseError, FileNotFoundError, PermissionError) as error:
            if isinstance(error, StorageError):
                raise
            raise self._failure(error, self.root + key) from error

    def _failure(self, error: Exception, address: str) -> StorageError:
        text = str(error)
        found = _STATUS.search(text)
        status = int(found["status"]) if found else None
        kinds = self._obstore.exceptions
        if "NoSuchBucket" in text or "ContainerNotFound" in text or "The specified bucket does not exist" in text:
            return missing_object(self.root, self._scheme, is_place=True)
        if isinstance(error, kinds.NotFoundError | FileNotFoundError):
            return missing_object(address, self._scheme)
        if isinstance(error, kinds.PermissionDeniedError | kinds.UnauthenticatedError | PermissionError):
            return access_denied(address, self._scheme, 401 if isinstance(error, kinds.UnauthenticatedError) else 403)
        if "169.254." in text or "metadata.google" in text or "credential" in text.lower():
            return access_denied(address, self._scheme)
        if status in (301, 307) or "PermanentRedirect" in text:
            return StorageError(f"{address}: the bucket is in another region: set AWS_REGION to that of the bucket")
        reason = _REASON.search(text)
        said = f"answers {status}" if status else f"fails ({reason['reason'] if reason else one_line(error)})"
        return not_answering(address, self._endpoint, said)


def _entry(meta: obstore.ObjectMeta) -> Entry:
    return Entry(meta["path"], meta["size"], (meta["e_tag"] or "").strip('"') or None)


def _bucket(place: Address) -> tuple[str, Any]:
    """Return the endpoint, for messages, and obstore's store."""
    from obstore import store

    settings = {"s3": s3_settings, "gs": google_settings, "az": azure_settings}[place.scheme](place)
    kind: Any = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}[place.scheme]
    opened = kind(
        place.bucket,
        config=settings.options,
        client_options={
            "allow_http": settings.endpoint.startswith("http://"),
            "connect_timeout": "10s",
            "timeout": "60s",
        },
        retry_config={
            "max_retries": ATTEMPTS - 1,
            "retry_timeout": timedelta(minutes=2),
            "backoff": {"init_backoff": timedelta(seconds=failures.FIRST_WAIT_SECONDS), "base": 2},
        },
    )
    return settings.endpoint, opened
