"""Find the model that a run starts from: a run's id becomes a folder, and its architecture is read there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.models.folder import read_model_config
from llmtrain.models.own_model import check_same_class
from llmtrain.runs.folders import find_model, model_to_begin_from
from llmtrain.runs.stores import runs_folder

FREE_TO_CHANGE = frozenset(
    f"model.{key}"
    for key in (
        "init_from",
        "lora",
        "dropout",
        "attention.dropout",
        "ffn.dropout",
        "init_std",
        "residual_scaled_init",
    )
)
"""Keys of a decoder that may differ from those of its initial model."""


def with_model_found(config: Config) -> Config:
    """Return `config` with the initial model's folder in place of a run's name, and with its architecture.

    Raises ConfigError as `architecture_of` does.
    """
    root = runs_folder(config.output.root_dir)
    if isinstance(config.model, OwnModelConfig):
        if config.model.init_from is None:
            return config
        folder = find_model(config.model.init_from, root)
        check_same_class(folder, config.model)
        return config.model_copy(update={"model": config.model.model_copy(update={"init_from": str(folder)})})
    if isinstance(config.model, HuggingFaceConfig):
        path = model_to_begin_from(config.model.path, root)
        if path == config.model.path:
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    return config.model_copy(update={"model": architecture_of(config.model, root=root)})


def architecture_of(config: DecoderConfig, *, root: Path) -> DecoderConfig:
    """Return `config` itself, or with init_from the architecture that is found there, with the folder's path in it.

    Raises ConfigError if there is no such model, or a key that was given contradicts it.
    """
    if config.init_from is None:
        return config
    folder = find_model(config.init_from, root)
    found, vocab_size = read_model_config(folder)
    values = found.model_dump(mode="json") | {"vocab_size": vocab_size, "preset": None}
    given = config.model_dump(mode="json", exclude_unset=True) | {"preset": None}  # its keys are given by now
    if wrong := _override(values, given):
        raise ConfigError(
            f"model.init_from: the model in {folder} is another one ({'; '.join(wrong)}): leave these keys out"
        )
    return DecoderConfig.model_validate(values | {"init_from": str(folder)})


def _override(values: dict[str, Any], given: Mapping[str, Any], prefix: str = "model.") -> list[str]:
    """Put the given keys that are free to change into `values`; return which other keys are given and differ."""
    wrong = []
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(values[key], dict):
            wrong += _override(values[key], value, f"{prefix}{key}.")
        elif f"{prefix}{key}" in FREE_TO_CHANGE:
            values[key] = value
        elif values[key] != value:
            wrong.append(f"{prefix}{key} is {values[key]} there and {value} here")
    return wrong
