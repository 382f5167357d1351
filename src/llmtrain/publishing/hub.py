"""Publishes to the Hugging Face Hub: checks the right to write, and uploads a folder as one commit, with retries.

    check_may_write ─ token · name · visibility · write access; the repository is made if it does not exist
    upload          ─ the folder as one commit; weights that arrived before are not sent again

huggingface_hub makes the requests and reads HF_ENDPOINT, HF_TOKEN and a stored `hf auth login`. `models.fetch` fetches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError, RunError
from llmtrain.models.fetch import TOKEN_ADVICE

log = logging.getLogger("llmtrain.publish")

ATTEMPTS = 5
MAX_WAIT_SEC = 60.0
TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
STALE = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "*.jinja", "*.bin")
"""Files that the commit deletes from the repository if the new model does not have them, such as shards of an earlier
model, which would be loaded with it."""


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """Commit and address of a model that was uploaded."""

    repo_id: str
    revision: str
    """The commit."""
    url: str
    """Address of the files at this commit."""


def check_may_write(repo_id: str, *, private: bool) -> None:
    """Check that this machine's token may write to `repo_id`, and make an empty repository if it does not exist.

    Raises ConfigError if there is no token, if it is not accepted or may not write, or if the repository is public and
    should be private; RunError if the Hub does not answer.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, and publishing to the Hub needs a network: unset it")
    if get_token() is None:
        raise ConfigError(f"publishing to hub:{repo_id} needs a token that may write: {TOKEN_ADVICE}")
    api = HfApi()
    user = _request(api.whoami, repo_id, "whoami")["name"]
    try:
        found = api.repo_info(repo_id)
    except Exception as error:
        if _status(error) not in (401, 404):
            raise _explained(error, repo_id) from error
        found = None
    if found is None:
        owner = repo_id.partition("/")[0]
        log.info("making the %s repository %s, as %s", "private" if private else "public", repo_id, user)
        _request(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, f"create in {owner}")
    elif private and not found.private:
        raise ConfigError(
            f"hub:{repo_id} is public, but models are published privately by default: give --public (publish.private: "
            "false), or another name"
        )
    _request(lambda: api.auth_check(repo_id, write=True), repo_id, "write")


def upload(folder: Path, repo_id: str, *, message: str, sleep: Callable[[float], None] = time.sleep) -> Uploaded:
    """Upload `folder` as one commit. Failed requests are tried again, and weights that arrived are not sent twice.

    Raises RunError with the Hub's answer; the same command then continues the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=list(STALE)
            )
        except Exception as error:  # its HTTP library's own, some of them wrapped in RuntimeError
            if attempt == ATTEMPTS or not _is_transient(error):
                raise _explained(error, repo_id, uploading=True) from error
            wait = min(MAX_WAIT_SEC, _retry_after(error) or 2.0 ** (attempt - 1))
            log.warning("the upload broke off (the Hub %s); trying again in %.0f s", _answer(error), wait)
            sleep(wait)
        else:
            return Uploaded(repo_id=repo_id, revision=done.oid, url=f"{api.endpoint}/{repo_id}/tree/{done.oid}")
    raise AssertionError("the last attempt returns or raises")


def _request(call: Callable[[], Any], repo_id: str, what: str) -> Any:
    """Call the Hub, and raise its errors as one message."""
    try:
        return call()
    except Exception as error:  # as in `upload`
        log.debug("%s: %s", what, error)
        raise _explained(error, repo_id) from error


def _explained(error: Exception, repo_id: str, *, uploading: bool = False) -> ConfigError | RunError:
    """Return the Hub's answer as an error of one line that says what to do."""
    status = _status(error)
    if status == 401:
        return ConfigError(f"hub:{repo_id}: the token is not accepted (401): {TOKEN_ADVICE}")
    if status == 403:
        return ConfigError(
            f"hub:{repo_id}: the token may not write there (403): use one that may write to "
            f"{repo_id.partition('/')[0]}, or another name"
        )
    if status is None and not _is_transient(error):
        raise error
    again = ". The same command continues: what has arrived is not sent again" if uploading else ": try again"
    return RunError(f"hub:{repo_id}: the Hub {_answer(error)}{again}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_transient(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    status = _status(error)
    if status is not None:
        return status in TRANSIENT
    broken: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library that it uses: failed connections and timeouts
    return any(isinstance(one, broken | ConnectionError | TimeoutError) for one in _chain(error))


def _retry_after(error: BaseException) -> float | None:
    for one in _chain(error):
        headers = getattr(getattr(one, "response", None), "headers", None) or {}
        value = str(headers.get("retry-after", ""))
        if value.isdigit():
            return float(value)
    return None


def _answer(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"answered {status}"
    return f"cannot be reached ({type(list(_chain(error))[-1]).__name__})"
