"""Ingredients of a run with their hashes: <run>/lineage.json, written when the run starts, read by `llmtrain lineage`.

    {"format_version": 1, "ingredients": [{"kind", "name", "folder", "revision", "files": {path: sha256}, "facts"}]}

`training.setup.ingredients` finds out what a run is made of. This file knows how that is stored and compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from llmtrain.atomic import file_sha256, write_json
from llmtrain.errors import ConfigError
from llmtrain.runs.json_files import json_object
from llmtrain.storage.address import is_remote
from llmtrain.storage.store import locate
from llmtrain.tracking.redaction import redact

LINEAGE_NAME: Final = "lineage.json"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """Files that a run or a model is made of."""

    kind: str
    """Role in the run, such as `base model`, `tokenizer` or `training data`."""
    name: str
    """Name that the config gives it."""
    folder: str | None = None
    """Absolute folder of the files, or address of the store that holds them; None where they are in neither."""
    revision: str | None = None
    """Commit on the Hub or in lakeFS, or fingerprint of a dataset that has no files here."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by path, relative to the folder."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further values that JSON can hold."""

    def changes(self) -> list[str]:
        """Return a sentence for each file that is gone or has another content now."""
        found = []
        for name, sha256 in self.files.items():
            path: Path | str = Path(self.folder or ".") / name
            try:
                if self.folder is not None and is_remote(self.folder):
                    path = f"{self.folder}{name}"
                    now = remote_sha256(path)
                else:
                    now = file_sha256(Path(path))
            except (OSError, ConfigError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                found.append(f"{path}: cannot be read any more ({reason})")
                continue
            if now != sha256:
                found.append(f"{path}: its content has changed (sha256 was {sha256[:16]}…, and is {now[:16]}…)")
        return found


def remote_sha256(address: str) -> str:
    """Return the SHA-256 of an object of a store. Raises StorageError, and ConfigError as `open_store` does."""
    store, key = locate(address)
    with store.open(key) as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 23):
            digest.update(block)
    return digest.hexdigest()


def hashed_files(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the files in `folder` that match one of `patterns`, by path. Raises OSError.

    A file of the Hub's cache is a link to a file that is named by its SHA-256, which is taken as it is.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return {name: _sha256_of(folder / name) for name in names}


def _sha256_of(path: Path) -> str:
    target = path.resolve().name
    is_hash = path.is_symlink() and len(target) == 64 and not set(target) - set("0123456789abcdef")
    return target if is_hash else file_sha256(path)


def write_lineage(run: Path, ingredients: Sequence[Ingredient]) -> None:
    """Write lineage.json into a run's folder. Raises OSError."""
    found = [{**asdict(one), "name": redact(one.name)} for one in ingredients]
    write_json(run / LINEAGE_NAME, {"format_version": FORMAT_VERSION, "ingredients": found})


def read_lineage(run: Path, *, problems: list[str]) -> list[Ingredient]:
    """Return the ingredients of a run; a file that is missing or cannot be read is told in `problems`."""
    path = run / LINEAGE_NAME
    if not path.is_file():
        problems.append(f"{path}: no such file; the run began with a version that did not record its ingredients")
        return []
    document = json_object(path, problems=problems)
    try:
        return [Ingredient(**entry) for entry in document.get("ingredients", [])]
    except TypeError:
        problems.append(f"{path}: format_version is {json.dumps(document.get('format_version'))}; update llmtrain")
        return []
