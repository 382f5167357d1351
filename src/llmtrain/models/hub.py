"""Where a Hugging Face model comes from: a folder as it is, or the Hub; and what to say when it cannot be had.

    path ─┬─ a folder ───────────────────────────────┬─▶ folder with all files of the model
          └─ owner/name ─ Hub, or its cache on disk ─┘

Nothing of Hugging Face is imported before it is needed, so that `use_older_names` comes first. Only safetensors are
fetched or read: a pickled checkpoint can run code.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError, RunError
from llmtrain.contracts import TOKENIZER_FILES

OLDER_NAMES = {"HUGGINGFACE_HUB_TOKEN": "HF_TOKEN", "TRANSFORMERS_CACHE": "HF_HUB_CACHE"}
"""Environment variables that Hugging Face's libraries read no more, and what they are called today."""
TIMEOUT_SEC = 10.0
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt")
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
"""What can be a model on the Hub where one to use is named: owner/name, with @revision or without."""
TOKEN_ADVICE = "put a token in HF_TOKEN, or run `hf auth login`"


def use_older_names(environ: MutableMapping[str, str] | None = None) -> None:
    """Give variables of older names their new ones, with one warning on stderr; the new name wins where both are set.

    To be called before anything of Hugging Face is imported, since its libraries read the environment on import.
    """
    environ = os.environ if environ is None else environ
    taken = [(old, new) for old, new in OLDER_NAMES.items() if environ.get(old) and not environ.get(new)]
    for old, new in taken:
        environ[new] = environ[old]
    if taken and environ.get("RANK", "0") == "0":
        renamed = ", ".join(f"{old} is called {new}" for old, new in taken)
        print(f"warning: {renamed} today; the value is used, set the new name", file=sys.stderr)


def fetch_model(
    path: str, *, revision: str | None, local_files_only: bool, weights: bool = True, code: bool = False
) -> Path:
    """The folder with a model's files, fetched from the Hub if need be. One rank calls it before the others do.

    Without `weights` only config and tokenizer are wanted. Raises ConfigError: it is not there, may not be had, or is
    not complete; RunError: the network failed.
    """
    patterns = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"] + ["*.py"] * code
    folder = _fetch(path, revision=revision, offline=local_files_only, patterns=patterns)
    if is_adapter_folder(folder):
        raise ConfigError(
            f"model.path {path}: {folder} is an adapter: merge it into its base first (llmtrain merge), and name that"
        )
    if missing := missing_files(folder, weights=weights):
        raise ConfigError(f"model.path {path}: {folder} lacks {', '.join(missing)}{_pickled(folder)}")
    return folder


def fetch_tokenizer(path: str, *, revision: str | None = None, local_files_only: bool) -> Path:
    """The folder with a tokenizer's files. Raises as `fetch_model` does."""
    patterns = [pattern for pattern in PATTERNS if pattern != "*.safetensors"]
    folder = _fetch(path, revision=revision, offline=local_files_only, patterns=patterns)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(f"{path}: no tokenizer in {folder} (none of {', '.join(TOKENIZER_FILES)})")
    return folder


def fetch_to_use(path: str, *, revision: str | None = None) -> Path:
    """The folder of a whole model or of an adapter, fetched from the Hub if need be. Raises as `fetch_model` does."""
    folder = _fetch(path, revision=revision, offline=False, patterns=list(PATTERNS))
    lacking = [ADAPTER_WEIGHTS] if is_adapter_folder(folder) else missing_files(folder, weights=True)
    if missing := [name for name in lacking if not (folder / name).exists()]:
        raise ConfigError(f"{path}: {folder} lacks {', '.join(missing)}{_pickled(folder)}")
    return folder


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and not the whole model; some tools write the base's config.json beside it."""
    whole = (folder / "model.safetensors").exists() or (folder / WEIGHTS_INDEX).exists()
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def is_model_folder(folder: Path) -> bool:
    """Whether a folder says that it holds a model, or an adapter of one."""
    return (folder / "config.json").is_file() or is_adapter_folder(folder)


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """Folder or Hub id of the model that an adapter belongs to, and its revision. ConfigError if it names none."""
    file = folder / ADAPTER_CONFIG
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        base = described.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read: {error!r}") from error
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{file} does not say which model it adapts: set base_model_name_or_path there")
    return base, described.get("revision")


def fetch_config(path: str, *, revision: str | None, local_files_only: bool, code: bool = False) -> Path:
    """A folder with a model's config.json: all that is fetched from the Hub. Raises as `fetch_model` does."""
    folder = _fetch(path, revision=revision, offline=local_files_only, patterns=["config.json"] + ["*.py"] * code)
    if missing := missing_files(folder, weights=False):
        raise ConfigError(f"model.path {path}: {folder} lacks {', '.join(missing)}")
    return folder


def missing_files(folder: Path, *, weights: bool) -> list[str]:
    """Names of the files that a model needs and the folder lacks."""
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if not weights or (folder / "model.safetensors").exists():
        return missing
    if not (folder / WEIGHTS_INDEX).exists():
        return [*missing, "model.safetensors"]
    try:
        named = set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / WEIGHTS_INDEX} cannot be read: {error!r}") from error
    return missing + sorted(name for name in named if not (folder / name).exists())


def _pickled(folder: Path) -> str:
    if not any(folder.glob("pytorch_model*.bin")):
        return ""
    return ". Weights in pytorch_model.bin are pickles, which can run code, and are not read: convert them first"


def _fetch(path: str, *, revision: str | None, offline: bool, patterns: list[str]) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ConfigError(f"model.path {path}: there is no such folder")
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        return _from_cache(path, revision=revision, patterns=patterns, why="the run is offline")
    return _from_hub(path, revision=revision, patterns=patterns)


def _from_cache(path: str, *, revision: str | None, patterns: list[str], why: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(path, revision=revision, local_files_only=True, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:
        if part := getattr(error, "snapshot_path", None):  # some files are there: which are not, our caller says
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

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library that it uses: failed connections and timeouts too

    try:
        HfApi().model_info(path, revision=revision, timeout=TIMEOUT_SEC)  # one request, which fails at once or not
        found = snapshot_download(path, revision=revision, allow_patterns=patterns, etag_timeout=TIMEOUT_SEC)
    except HfHubHTTPError as error:
        raise _explain(error, path=path, revision=revision) from error
    except (http_error, ConnectionError, TimeoutError) as error:
        why = f"the Hub cannot be reached ({type(error).__name__})"
        return _from_cache(path, revision=revision, patterns=patterns, why=why)
    return Path(str(found))


def _explain(error: Any, *, path: str, revision: str | None) -> ConfigError | RunError:
    """The Hub's answer in one line that says what to do. It says 401 for what it hides, as for what is not there."""
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
