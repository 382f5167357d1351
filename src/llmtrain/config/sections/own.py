"""`model` and `data` of a name that is an import path: a class of the user's own. The contracts are in contracts.py."""

from __future__ import annotations

from typing import Any

from llmtrain.config.sections.base import IMPORT_PATTERN, Section, key, opt


class OwnModelConfig(Section):
    """A model of your own: a torch module that meets `llmtrain.contracts.Model`."""

    name: str = key("Its import path, package.module:Class.", pattern=IMPORT_PATTERN)
    options: dict[str, Any] = opt({}, "Keyword arguments of the class, besides vocab_size.")


class OwnDataConfig(Section):
    """Data of your own: a class that meets `llmtrain.contracts.TokenSequences`."""

    name: str = key("Its import path, package.module:Class.", pattern=IMPORT_PATTERN)
    options: dict[str, Any] = opt({}, "Keyword arguments of the class, besides split and seq_len.")
    seq_len: int = opt(1024, "Length of a sequence, in tokens that the model predicts.", ge=1)
    num_workers: int = opt(0, "Processes that read ahead; with 0 the training process reads.", ge=0)
