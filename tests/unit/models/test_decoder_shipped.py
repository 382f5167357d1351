"""The configs that ship build the models that they promise."""

from __future__ import annotations

import pytest
import torch

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.data import TokensConfig
from llmtrain.config.sections.schema import Config
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.layouts import layout_for


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("small", 8192, 24_648_960),
        ("medium", 8192, 119_563_008),
        ("gpt2-small", 50257, 124_439_808),
        ("complex-attention", 8192, 5_442_816),
    ],
)
def test_a_shipped_config_has_the_size_that_it_says(name: str, vocab_size: int, parameters: int) -> None:
    config = load_config(name).config.decoder(wanted_by="a test")
    with torch.device("meta"):
        assert Decoder(config, vocab_size).num_parameters() == parameters


def test_shipped_configs_are_what_transformers_loads_where_they_can_be() -> None:
    found = {}
    for name in ("small", "medium", "gpt2-small", "complex-attention"):
        layout = layout_for(load_config(name).config.decoder(wanted_by="a test"))
        found[name] = layout and layout.model_type
    assert found == {"small": "qwen3", "medium": "llama", "gpt2-small": "gpt2", "complex-attention": None}


def test_shipped_configs_read_the_shards_of_the_quickstart() -> None:
    def source(config: Config) -> tuple[object, ...]:
        data = config.data
        assert isinstance(data, TokensConfig)
        return config.prepare, data.train, data.val

    wanted = source(load_config("quickstart").config)
    for name in ("small", "medium", "gpt2-small", "complex-attention"):
        assert source(load_config(name).config) == wanted
