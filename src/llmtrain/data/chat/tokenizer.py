"""The tokenizer of rows: the one that the config names, or that of its model. No weights are fetched for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.models.fetch import fetch_tokenizer
from llmtrain.runs.folders import find_model, model_to_begin_from
from llmtrain.runs.stores import runs_folder


def tokenizer_folder_of(config: Config) -> Path:
    """Return the folder of the tokenizer of a config with rows, fetched from the Hub if need be.

    Raises ConfigError when none is named or it cannot be had.
    """
    assert isinstance(config.data, ChatConfig)
    model, root = config.model, runs_folder(config.output.root_dir)
    if not isinstance(model, HuggingFaceConfig):
        if config.data.tokenizer is not None:
            return fetch_tokenizer(config.data.tokenizer, local_files_only=False)
        if isinstance(model, DecoderConfig) and model.init_from is not None:
            return fetch_tokenizer(str(find_model(model.init_from, root)), local_files_only=True)
        raise ConfigError(f"data.tokenizer: the {model.name} has no tokenizer of its own; name a folder or a Hub id")
    named = config.data.tokenizer or model.tokenizer
    if named is not None:
        return fetch_tokenizer(named, local_files_only=model.local_files_only)
    path = model_to_begin_from(model.path, root)
    return fetch_tokenizer(path, revision=model.revision, local_files_only=model.local_files_only)


def load_fast_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`. Raises ConfigError where there is none that knows the text of each token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"data.tokenizer: {folder} holds no tokenizer that can be read ({first})") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"data.tokenizer: {folder} has no tokenizer.json, and without one nobody knows which text a token stands "
            "for: convert it with transformers, or name another tokenizer"
        )
    return tokenizer
