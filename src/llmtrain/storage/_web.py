"""Requests over HTTP with several attempts, and objects at http(s) addresses, which are only read."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import requests

from llmtrain.storage import failures
from llmtrain.storage._range_file import open_ranges
from llmtrain.storage.address import Address, shown
from llmtrain.storage.failures import (
    ATTEMPTS,
    StorageError,
    access_denied,
    missing_object,
    not_answering,
    not_inside,
    one_line,
)
from llmtrain.storage.store import Entry, Store

TIMEOUT_SECONDS = (10, 60)
"""Limits for a connection, and between two bytes of an answer."""
AT_ONCE = 8
"""Ranges of an object that are asked for at once."""

_PASSES = frozenset((429, 500, 502, 503, 504))
_TOTAL = re.compile(r"bytes (?:\d+-\d+|\*)/(?P<size>\d+)")
_LOST = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Requests:
    """A session of requests, which knows proxies and certificates from the environment, with several attempts."""

    def __init__(self, scheme: str, auth: tuple[str, str] | None = None) -> None:
        self._scheme = scheme
        self._session = requests.Session()
        self._session.auth = auth
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=2 * AT_ONCE)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def ask(self, method: str, url: str, *, address: str, **options: Any) -> requests.Response:
        """Return the answer to a request, read to its end unless `stream` is among the options of requests.

        `address` is what messages name. Raises StorageError, NoObject and AccessDenied.
        """
        wait = failures.FIRST_WAIT_SECONDS
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(wait)
                wait *= 2
            try:
                answer = self._session.request(method, url, timeout=TIMEOUT_SECONDS, **options)
            except _LOST as error:
                reason = f"cannot be reached ({_reason(error)})"
                continue
            except (requests.RequestException, UnicodeError) as error:  # an address that no request can be made of
                raise StorageError(f"{shown(address)}: no request can be made ({one_line(error)})") from None
            if answer.status_code not in _PASSES:
                self._check(answer, address)
                return answer
            answer.close()
            reason = f"answers {answer.status_code}{_said(answer)}"
        raise not_answering(address, _host(url), reason) from None

    def _check(self, answer: requests.Response, address: str) -> None:
        status = answer.status_code
        if status in (401, 403):
            raise access_denied(address, self._scheme, status)
        if status in (404, 410):
            raise missing_object(address, self._scheme)
        if status >= 400 and status != 416:
            raise StorageError(f"{shown(address)}: {_host(answer.url)} answers {status}{_said(answer)}")


def get_range(ask: Callable[..., requests.Response], url: str, address: str, start: int, length: int) -> bytes:
    """Return a range of what is at `url`; `ask` makes the request. Raises StorageError where there is less."""
    if length <= 0:
        return b""
    headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    answer = ask("GET", url, address=address, headers=headers)
    data = b"" if answer.status_code == 416 else answer.content
    if answer.status_code == 200:  # a server that knows no ranges
        data = data[start : start + length]
    if len(data) != length:
        raise not_inside(address, [(start, length)])
    return data


def get_ranges(
    read_range: Callable[[str, int, int], bytes], key: str, ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    """Return several ranges of an object, AT_ONCE at a time."""
    if len(ranges) < 2:
        return [read_range(key, start, length) for start, length in ranges]
    with ThreadPoolExecutor(min(AT_ONCE, len(ranges))) as pool:
        return list(pool.map(lambda one: read_range(key, *one), ranges))


class WebStore(Store):
    """Files of a host, by their paths and queries. They are only read: HTTP has no list of a folder."""

    def __init__(self, place: Address) -> None:
        self.root = place.root
        self._ask = Requests(place.scheme).ask

    def stat(self, key: str) -> Entry:
        """Return size and etag of a file: of its first byte, since a signed link may allow GET but not HEAD."""
        entry, _ = self._probe(key)
        return entry

    def _probe(self, key: str) -> tuple[Entry, bool]:
        """Return a file's size and etag, and whether the host knows ranges."""
        url = self.root + key
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with self._ask("GET", url, address=url, headers=headers, stream=True) as answer:
            total = _TOTAL.match(answer.headers.get("Content-Range", ""))
            knows_ranges = answer.status_code == 206 and total is not None
            if total is not None:
                size = int(total["size"])
            elif answer.status_code != 416 and "Content-Length" in answer.headers:
                size = int(answer.headers["Content-Length"])
            else:
                size = 0 if answer.status_code == 416 else sum(map(len, answer.iter_content(1 << 20)))
            return Entry(key, size, _etag(answer.headers)), knows_ranges

    def read(self, key: str) -> bytes:
        """Return a whole file."""
        url = self.root + key
        return cast(bytes, self._ask("GET", url, address=url, headers={"Accept-Encoding": "identity"}).content)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on."""
        return get_range(self._ask, self.root + key, self.root + key, start, length)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return several ranges."""
        return get_ranges(self.read_range, key, ranges)

    def open(self, key: str, *, size: int | None = None) -> BinaryIO:
        """Open a file to be read at any position; from a host without ranges it is fetched to a temporary file."""
        entry, knows_ranges = self._probe(key)
        if knows_ranges:
            return open_ranges(lambda start, length: self.read_range(key, start, length), entry.size)
        fetched = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        url = self.root + key
        try:
            with self._ask("GET", url, address=url, headers={"Accept-Encoding": "identity"}, stream=True) as answer:
                for block in answer.iter_content(1 << 20):
                    fetched.write(block)
        except requests.RequestException as error:
            fetched.close()
            raise not_answering(url, _host(url), f"breaks off ({_reason(error)})") from None
        except BaseException:
            fetched.close()
            raise
        fetched.seek(0)
        return cast(BinaryIO, fetched)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Raise StorageError."""
        raise StorageError(f"{shown(self.root + prefix)}: folders and globs of a web server cannot be read: name files")

    def write(self, key: str, content: bytes | Path) -> None:
        """Raise StorageError."""
        raise StorageError(f"{shown(self.root + key)}: files of a web server are only read")

    def delete(self, key: str) -> None:
        """Raise StorageError."""
        raise StorageError(f"{shown(self.root + key)}: files of a web server are only read")


def _etag(headers: Mapping[str, str]) -> str | None:
    return headers.get("ETag", "").removeprefix("W/").strip('"') or headers.get("Last-Modified")


def _host(url: str) -> str:
    return shown("/".join(url.split("/")[:3]))


def _said(answer: requests.Response) -> str:
    """Return what a server says of an error in JSON, as lakeFS does: {"message": …}."""
    try:
        message = answer.json()["message"]
    except (ValueError, KeyError, TypeError, requests.RequestException):
        return ""
    return f" ({one_line(ValueError(message))})"


def _reason(error: Exception) -> str:
    """Return the system's word for what happened to a connection; the messages of requests hold whole addresses."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        reason = getattr(cause, "reason", None) or next((a for a in cause.args if isinstance(a, Exception)), None)
        cause = reason if isinstance(reason, BaseException) else cause.__cause__ or cause.__context__
    return "the name of the host is unknown" if "resolve" in str(error) else "the connection broke"
