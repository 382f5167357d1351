"""Secrets in the files of a model: looked for in every text before anything leaves this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmtrain.contracts import TOKENIZER_FILES
from llmtrain.errors import RunError
from llmtrain.tracking.redaction import is_secret_name, line_with_secret

MAX_BYTES = 64 * 1024**2
"""Larger files are weights, in which there is no text."""
WEIGHTS = frozenset({".safetensors", ".onnx", ".data", ".pt2"})
_MIN_LENGTH = 8
"""Shortest value of a variable that is searched for verbatim: a shorter one may stand in any text."""


def check_no_secrets(folder: Path, *, environ: Mapping[str, str] = os.environ) -> None:
    """RunError that names file and line of the first secret: a token's form, a password's name, or the value of an
    environment variable that holds a secret on this machine."""
    known = {
        name: value.strip()
        for name, value in environ.items()
        if is_secret_name(name) and len(value.strip()) >= _MIN_LENGTH
    }
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in WEIGHTS or path.stat().st_size > MAX_BYTES:
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        # A vocabulary has any word, "password" too, with a number behind it: there a name tells nothing.
        where = line_with_secret(text, by_name=path.name not in TOKENIZER_FILES and path.suffix != ".jinja")
        if where is not None:
            raise _found(path, f"line {where} looks like a secret")
        if names := [name for name, value in known.items() if value in text]:
            raise _found(path, f"it holds the value of {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _found(path: Path, why: str) -> RunError:
    return RunError(f"not published: {path.name}: {why}; take it out of {path}")
