"""Loads configs that a test writes, and gives the messages about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError

MINIMAL = "data: {name: tokens, train: shards}\n"


def load(folder: Path, text: str, *overrides: str, name: str = "c.yaml") -> Config:
    """Write `text` to a file and load it."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return load_config(str(file), overrides).config


def message_of(folder: Path, text: str, *overrides: str, name: str = "c.yaml") -> str:
    """Return the message of a config that cannot be loaded, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides, name=name)
    return str(caught.value).replace(f"{folder}/", "")
