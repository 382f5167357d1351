"""Errors of stores: each is one message that says what failed, where, and what to do, without secrets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus

from llmtrain.errors import ConfigError, RunError
from llmtrain.installing import install_extra
from llmtrain.storage.address import shown

ATTEMPTS = 5
"""Number of times that a request is made which fails in a way that may pass: 5xx, 429, a lost connection."""
FIRST_WAIT_SECONDS = 0.2
"""Time before the second attempt; it doubles with each."""


class StorageError(RunError, OSError):
    """A store failed, or rejected a request. An OSError, so that a file that cannot be read is one wherever it is."""


class NoObject(StorageError, FileNotFoundError):
    """There is no such object, bucket or repository."""


class RangeOutside(StorageError):
    """The object is shorter than it should be."""


class AccessDenied(StorageError, PermissionError):
    """The store does not know who asks, or does not let them."""


_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile of AWS_PROFILE in ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the login of `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN)",
    "hf": "HF_TOKEN, and that it may read this repository",
    "lakefs": "LAKEFS_ACCESS_KEY and LAKEFS_SECRET_KEY",
}
_PLACE = {
    "s3": "bucket",
    "gs": "bucket",
    "az": "container",
    "lakefs": "repository, branch or commit",
    "hf": "repository",
}


def missing_object(address: str, scheme: str, *, is_place: bool = False) -> NoObject:
    """Return the error of something that is not there; `is_place`: the bucket is not."""
    if is_place:
        place = _PLACE.get(scheme, "place")
        return NoObject(
            f"{shown(address)}: there is no such {place} (or none that these credentials see): check its name"
        )
    return NoObject(f"{shown(address)}: there is no such object: check the address")


def access_denied(address: str, scheme: str, status: int | None = None) -> AccessDenied:
    """Return the error of a request that the store rejected: 401 or 403."""
    said = f" ({status} {HTTPStatus(status).phrase})" if status in (401, 403) else ""
    check = f"check {_CREDENTIALS[scheme]}" if scheme in _CREDENTIALS else "this address needs a login or a signed link"
    return AccessDenied(f"{shown(address)}: access denied{said}: {check}")


def not_answering(address: str, where: str, reason: str) -> StorageError:
    """Return the error of a store that cannot be reached, or fails on its side, after all attempts."""
    return StorageError(
        f"{shown(address)}: {shown(where)} {shown(reason)} ({ATTEMPTS} attempts): check that it runs and can be "
        "reached from this machine, then try again"
    )


def not_inside(address: str, ranges: Sequence[tuple[int, int]]) -> RangeOutside:
    """Return the error of ranges, each (start, length), that do not lie in an object: it is shorter than it was."""
    end = max(start + length for start, length in ranges)
    return RangeOutside(f"{shown(address)}: the object ends before byte {end:,}: it was replaced while it was read")


def missing_extra(address: str, extra: str) -> ConfigError:
    """Return the error of an address whose library is not installed."""
    return ConfigError(f"{shown(address)} needs a package that is not installed: {install_extra(extra)}")


def one_line(error: BaseException, *, limit: int = 200) -> str:
    """Return the beginning of a library's message, on one line and without secrets in its addresses."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return shown(text if len(text) <= limit else f"{text[:limit]}…")
