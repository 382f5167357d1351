"""Hash everything that tokenised rows are made from: equal keys promise equal samples, wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain._version import __version__
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import DataFile


def samples_key(
    sources: Sequence[DataFile | RowDataset], *, template: ChatTemplate, options: Mapping[str, Any]
) -> dict[str, str]:
    """Return the key of the cache for the samples of `sources`; all of their content is read.

    `options` is whatever else decides what a row becomes (values that JSON can hold). Names of the files count as well,
    since samples name their rows by them. So does the version of llmtrain, whose rules a release may change.
    """
    tokenizer = template.tokenizer
    return {
        "rows": _hash([[source.name, _content(source)] for source in sources]),
        "tokenizer": _hash([tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]),
        "template": _hash([template.text, tokenizer.chat_template]),
        "options": _hash(dict(options)),
        "version of llmtrain": __version__,
    }


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
