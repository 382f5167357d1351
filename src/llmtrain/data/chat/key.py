"""Hash everything that tokenised rows are made from: equal keys promise equal samples, wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from llmtrain import data
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import DataFile

_LIBRARIES: Final = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")


def samples_key(
    sources: Sequence[DataFile | RowDataset], *, template: ChatTemplate, options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the key of the cache for the samples of `sources`; all of their content is read.

    `options` is whatever else decides what a row becomes (values that JSON can hold). Names of the files count as well,
    since samples name their rows by them. So do the code that reads and renders rows, and the libraries it calls.
    """
    tokenizer = template.tokenizer
    return {
        "rows": _hash([[source.name, _content(source)] for source in sources]),
        "tokenizer": _hash([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
        "template": _hash([template.text, tokenizer.chat_template]),
        "options": _hash(dict(options)),
        "code": _code(),
    }


@cache
def _code() -> str:
    """Return a hash of all modules of `llmtrain.data`, and of the libraries' versions."""
    folder = Path(data.__file__).parent
    modules = [(path.relative_to(folder).as_posix(), path.read_text("utf-8")) for path in sorted(folder.rglob("*.py"))]
    return _hash([modules, [(name, version(name)) for name in _LIBRARIES]])


def _content(source: DataFile | RowDataset) -> str:
    if isinstance(source, RowDataset):
        return str(source.dataset._fingerprint)  # of datasets itself: changes with whatever made the dataset
    digest = hashlib.sha256()
    with source.open() as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
