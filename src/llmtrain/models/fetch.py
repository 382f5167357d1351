"""Finds a Hugging Face model in a folder, or fetches it from the Hub, and explains why that failed.

    path ─┬─ a folder ───────────────────────────────┬─▶ folder with all files of the model
          ├─ s3://… ───── copy of a store's folder ──┤
          └─ owner/name ─ Hub, or its cache on disk ─┘

Libraries of Hugging Face are imported only in functions, so that `use_older_names` runs first. Only safetensors are
fetched or read, since a pickled checkpoint can run code.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from llmtrain.contracts import TOKENIZER_FILES
from llmtrain.errors import ConfigError, RunError
from llmtrain.screen import known_width, wrapped
from llmtrain.storage.address import is_remote, local_path

OLDER_NAMES = {"HUGGINGFACE_HUB_TOKEN": "HF_TOKEN", "TRANSFORMERS_CACHE": "HF_HUB_CACHE"}
"""Environment variables that Hugging Face's libraries no longer read, and their names today."""
TIMEOUT_SEC = 10.0
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt", "LICENSE*", "NOTICE*")
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
"""Id of a model on the Hub in a command: owner/name or owner/name@revision."""
TOKEN_ADVICE = "put a token in HF_TOKEN, or run `hf auth login`"


def use_older_names(environ: MutableMapping[str, str] | None = None) -> None:
    """Set variables whose older name is set under their new name as well, with one warning on stderr.

    If both are set, the new name takes precedence. Call it before any library of Hugging Face is imported, since these
    read the environment on import.
    """
    environ = os.environ if environ is None else environ
    taken = [(old, new) for old, new in OLDER_NAMES.items() if environ.get(old) and not environ.get(new)]
    for old, new in taken:
        environ[new] = environ[old]
    if taken and environ.get("RANK", "0") == "0":
        renamed = ", ".join(f"{old} is called {new}" for old, new in taken)
        warning = f"warning: {renamed} today; the value is used, set the new name"
        print("\n".join(wrapped(warning, known_width(2), indent=2)), file=sys.stderr)


def fetch_model(
    path: str, *, revision: str | None, local_files_only: bool, weights: bool = True, code: bool = False
) -> Path:
    """Return the folder with a model's files, fetched from the Hub if needed. One rank calls it before the others.

    Without `weights` only config and tokenizer are fetched. Raises ConfigError if the model does not exist, is not
    accessible or is incomplete, and RunError if the network failed.
    """
    patterns = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"] + ["*.py"] * code
    folder = _fetch(path, revision=revision, offline=local_files_only, patterns=patterns)
    if is_adapter_folder(folder):
        raise ConfigError(
            f"model.path {path}: {folder} is an adapter: merge it into its base first (llmtrain merge), and name the "
            "result"
        )
    if missing := missing_files(folder, weights=weights):
        raise ConfigError(f"model.path {path}: {folder} lacks {', '.join(missing)}{_pickled(folder)}")
    return folder


def fetch_tokenizer(path: str, *, revision: str | None = None, local_files_only: bool) -> Path:
    """Return the folder with a tokenizer's files. Raises as `fetch_model` does."""
    patterns = [pattern for pattern in PATTERNS if pattern != "*.safetensors"]
    folder = _fetch(path, revision=revision, offline=local_files_only, patterns=patterns)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(f"{path}: no tokenizer in {folder} (none of {', '.join(TOKENIZER_FILES)})")
    return folder


def fetch_model_or_adapter(path: str, *, revision: str | None = None, code: bool = False) -> Path:
    """Return the folder of a full model or an adapter, fetched from the Hub if needed. Raises as `fetch_model` does."""
    folder = _fetch(path, revision=revision, offline=False, patterns=[*PATTERNS, *["*.py"] * code])
    lacking = [ADAPTER_WEIGHTS] if is_adapter_folder(folder) else missing_files(folder, weights=True)
    if missing := [name for name in lacking if not (folder / name).exists()]:
        raise ConfigError(f"{path}: {folder} lacks {', '.join(missing)}{_pickled(folder)}")
    return folder


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder has an adapter and no full model. It may have the base's config.json as well."""
    has_model = (folder / WEIGHTS_FILE).exists() or (folder / WEIGHTS_INDEX).exists()
    return (folder / ADAPTER_CONFIG).is_file() and not has_model


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder has the config file of a model or of an adapter."""
    return (folder / "config.json").is_file() or is_adapter_folder(folder)


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter names, as a folder or Hub id, and its revision.

    Raises ConfigError if the adapter names none.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{file} does not say which model it adapts: set base_model_name_or_path there")
    return base, config.get("revision")


def fetch_config(path: str, *, revision: str | None, local_files_only: bool, code: bool = False) -> Path:
    """Return a folder with a model's config.json, the only file fetched. Raises as `fetch_model` does."""
    folder = _fetch(path, revision=revision, offline=local_files_only, patterns=["config.json"] + ["*.py"] * code)
    if missing := missing_files(folder, weights=False):
        raise ConfigError(f"model.path {path}: {folder} lacks {', '.join(missing)}")
    return folder


def missing_files(folder: Path, *, weights: bool) -> list[str]:
    """Return the names of the files that a model needs and the folder lacks."""
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if not weights or (folder / WEIGHTS_FILE).exists():
        return missing
    if not (folder / WEIGHTS_INDEX).exists():
        return [*missing, WEIGHTS_FILE]
    try:
        named = set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / WEIGHTS_INDEX} cannot be read: {error!r}") from error
    return missing + sorted(name for name in named if not (folder / name).exists())


def _pickled(folder: Path) -> str:
    """Return a sentence about pickled weights in a folder, if there are any."""
    if not any(folder.glob("pytorch_model*.bin")):
        return ""
    return ". Weights in pytorch_model.bin are pickles, which can run code, and are not read: convert them first"


def _fetch(path: str, *, revision: str | None, offline: bool, patterns: list[str]) -> Path:
    if is_remote(path):
        from llmtrain.storage.local_copies import fetch_folder

        return fetch_folder(path, patterns=patterns, offline=offline)
    folder = Path(local_path(path)).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ConfigError(f"model.path {path}: there is no such folder")
    from huggingface_hub import constants

    try:
        if offline or constants.HF_HUB_OFFLINE:
            return _from_cache(path, revision=revision, patterns=patterns, why="the run is offline")
        return _from_hub(path, revision=revision, patterns=patterns)
    except OSError as error:
        raise ConfigError(
            f"model.path {path}: the cache {constants.HF_HUB_CACHE} cannot be used ({error.strerror or error}): set "
            "HF_HOME to a folder that can be written"
        ) from error


def _from_cache(path: str, *, revision: str | None, patterns: list[str], why: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(path, revision=revision, local_files_only=True, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:
        if part := getattr(error, "snapshot_path", None):  # some files are there: the caller names those that are not
            return Path(str(part))
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"model.path {path}{at} is neither a folder nor in the cache {constants.HF_HUB_CACHE}, and {why}: "
            f"fetch it where there is a network (`hf download {path}`), or name a folder"
        ) from error
    return Path(str(found))


def _from_hub(path: str, *, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of its HTTP library: failed connections and timeouts as well

    try:
        HfApi().model_info(path, revision=revision, timeout=TIMEOUT_SEC)  # one request, to fail quickly
        found = snapshot_download(path, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_SEC)
    except HfHubHTTPError as error:
        raise _explain(error, path=path, revision=revision) from error
    except (http_error, ConnectionError, TimeoutError) as error:
        why = f"the Hub cannot be reached ({type(error).__name__})"
        return _from_cache(path, revision=revision, patterns=patterns, why=why)
    return Path(str(found))


def _explain(error: Any, *, path: str, revision: str | None) -> ConfigError | RunError:
    """Turn the Hub's answer into one line that says what to do. 401 is the answer for hidden and for missing models."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"huggingface.co/{path}"
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"model.path {path} has no revision {revision!r}")
    if isinstance(error, GatedRepoError) or status == 403:
        return ConfigError(
            f"model.path {path} is gated ({status}): accept its licence at {page} with your account, "
            f"then {TOKEN_ADVICE}"
        )
    if status in (401, 404):
        return ConfigError(
            f"model.path {path} is not on the Hub, or is private or gated ({status}): check the name; if it is right, "
            f"ask for access at {page} and {TOKEN_ADVICE}"
        )
    return RunError(f"model.path {path}: the Hub answered {status or error}: try again, or name a local folder")
