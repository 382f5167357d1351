"""Addresses of objects: `s3://bucket/key`. Parse them, join them, and show them without secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from llmtrain.errors import ConfigError

SCHEMES: Final = ("file", "s3", "gs", "az", "hf", "http", "https", "lakefs", "memory")
"""Schemes of the stores that can be opened."""

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+):/")
"""One slash is enough: pathlib makes one of two. A scheme has two letters at least; c:/ is a path."""
_SYNONYMS: Final = {
    "s3a": "s3",
    "gcs": "gs",
    "abfs": "az",
    "abfss": "az",
    "azure": "az",
    "huggingface": "hf",
}
_URL_IN_TEXT = re.compile(r"\b[A-Za-z][\w+.-]+://[^\s\"'<>`)]+")


@dataclass(frozen=True)
class Address:
    """The parts of an address, or of a folder or pattern there."""

    scheme: str
    """One of SCHEMES."""
    bucket: str
    """Name of the place: bucket, container, host, `repository/ref` of lakeFS, repository of the Hub.

    It is empty for files. A host may have `user:password@` before it.
    """
    key: str
    """Path in the bucket; it never begins with a slash."""

    def __repr__(self) -> str:
        return f"Address({self.shown})"

    def __str__(self) -> str:
        """Return the address as it is given; it may have secrets."""
        return f"{self.root}{self.key}"

    @property
    def root(self) -> str:
        """The address of the bucket, up to where the key begins."""
        return f"{self.scheme}://{self.bucket}/"

    @property
    def shown(self) -> str:
        """The address for messages and records, without secrets."""
        return shown(str(self))

    def joined(self, key: str) -> Address:
        """Return the address of another key in the same bucket."""
        return Address(self.scheme, self.bucket, key)


def scheme_of(text: str) -> str | None:
    """Return the scheme of an address, known or not; None for a path."""
    found = _SCHEME.match(text)
    return found["scheme"].lower() if found else None


def is_address(text: str) -> bool:
    """Return whether `text` is an address rather than a path of this machine; `file://` is one."""
    return scheme_of(text) is not None


def is_remote(text: str) -> bool:
    """Return whether `text` is an address of something that is no file of this machine."""
    return scheme_of(text) not in (None, "file")


def parse_address(text: str) -> Address:
    """Return the parts of an address. Raises ConfigError for one that no store here can have."""
    scheme = scheme_of(text)
    if scheme not in SCHEMES:
        instead = f"write {_SYNONYMS[scheme]}://" if scheme in _SYNONYMS else f"give one of {', '.join(SCHEMES)}"
        raise ConfigError(f"{shown(text)}: no store has the scheme {scheme}: {instead}")
    rest = text[len(scheme) + 1 :]
    if scheme == "file":
        return Address(scheme, "", _path_in_url(text, rest.lstrip("/")))
    rest = rest.removeprefix("/").removeprefix("/")
    parts = rest.split("/")
    size = {"lakefs": 2, "hf": 3 if parts[0] in ("datasets", "spaces", "buckets") else 2}.get(scheme, 1)
    bucket, key = "/".join(parts[:size]), "/".join(parts[size:])
    if not all(parts[:size]) or len(parts) < size:
        example = {
            "lakefs": "lakefs://repository/branch-or-commit/path",
            "hf": "hf://owner/name/path, hf://datasets/owner/name/path",
        }.get(scheme, f"{scheme}://{'host' if scheme.startswith('http') else 'bucket'}/path")
        raise ConfigError(f"{shown(text)} is no whole address: write {example}")
    return Address(scheme, bucket, key)


def _path_in_url(text: str, rest: str) -> str:
    """Return the path of a file: `file:///a%20b` is /a b, `file://localhost/a` is /a."""
    host = urlsplit(text).netloc
    if host not in ("", "localhost"):
        raise ConfigError(f"{text}: files of another machine are not read; write file:///{rest.partition('/')[2]}")
    return unquote(rest.removeprefix("localhost/") if host else rest)


def local_path(text: str) -> str:
    """Return the path that a `file://` address means; any other text as it is. Raises ConfigError."""
    return f"/{parse_address(text).key}" if scheme_of(text) == "file" else text


def has_user(address: str) -> bool:
    """Return whether an address has `user@` or `user:password@` before its host."""
    return scheme_of(address) in ("http", "https") and "@" in urlsplit(address).netloc


def shown(text: str) -> str:
    """Return a text with the addresses in it without secrets: a user's name and password, and what a query holds."""
    return _URL_IN_TEXT.sub(lambda found: _without_secrets(found[0]), text)


def _without_secrets(address: str) -> str:
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() in ("http", "https") and "?" in path:
        path = f"{path.partition('?')[0]}?***"
    if "@" in host and (":" in host or scheme.lower() in ("http", "https")):
        host = f"***@{host.rpartition('@')[2]}"
    return f"{scheme}://{host}{slash}{path}"
