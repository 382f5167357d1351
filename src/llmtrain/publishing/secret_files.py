"""Searches the files of a model for secrets, before anything leaves this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmtrain.contracts import TOKENIZER_FILES
from llmtrain.errors import RunError
from llmtrain.tracking.redaction import is_secret_name, line_with_secret

MAX_BYTES = 64 * 1024**2
"""Larger files are weights, which contain no text."""
WEIGHTS = frozenset({".safetensors", ".onnx", ".data", ".pt2"})
_MIN_LENGTH = 8
"""Shortest value of a variable that is searched, since a shorter one may occur in any text."""


def check_no_secrets(folder: Path, *, environ: Mapping[str, str] = os.environ) -> None:
    """Raise RunError with file and line of the first secret.

    A secret is a text in the form of a token, a value after a secret name, or the value of an environment variable with
    a secret name.
    """
    known = {
        name: value.strip()
        for name, value in environ.items()
        if is_secret_name(name) and len(value.strip()) >= _MIN_LENGTH
    }
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in WEIGHTS or path.stat().st_size > MAX_BYTES:
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        # A vocabulary has all words, "password" too, each followed by a number: there, names mean nothing.
        where = line_with_secret(text, by_name=path.name not in TOKENIZER_FILES and path.suffix != ".jinja")
        if where is not None:
            raise _found(path, f"line {where} looks like a secret")
        if names := [name for name, value in known.items() if value in text]:
            raise _found(path, f"it contains the value of {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _found(path: Path, why: str) -> RunError:
    return RunError(f"not published: {path.name}: {why}; remove it from {path}")
