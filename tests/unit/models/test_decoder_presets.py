"""Presets have the shapes of the models that they are named after, and what is given wins over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from llmtrain.config.loading.load import load_config, to_yaml
from llmtrain.config.sections.model import AttentionConfig, DecoderConfig
from llmtrain.config.sections.presets import PRESETS, PresetName
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.layouts import layout_for

PUBLISHED = {
    "gpt2-small": (50257, 124_439_808, "gpt2"),
    "gpt2-medium": (50257, 354_823_168, "gpt2"),
    "gpt2-large": (50257, 774_030_080, "gpt2"),
    "gpt2-xl": (50257, 1_557_611_200, "gpt2"),
    "llama-60m": (32000, 58_073_600, "llama"),
    "llama-125m": (32000, 134_105_856, "llama"),
    "llama-350m": (32000, 367_969_280, "llama"),
    "llama-1b": (32000, 1_345_423_360, "llama"),
    "smollm2-135m": (49152, 134_515_008, "llama"),
    "llama-3.2-1b": (128256, 1_235_814_400, "llama"),
    "llama-3.2-3b": (128256, 3_212_749_824, "llama"),
    "llama-3-8b": (128256, 8_030_261_248, "llama"),
    "qwen3-0.6b": (151936, 596_049_920, "qwen3"),
    "qwen3-1.7b": (151936, 1_720_574_976, "qwen3"),
    "mistral-7b": (32000, 7_241_732_096, "mistral"),
}
"""Vocabulary, parameters with it, and what transformers calls the architecture."""

FILE = "data: {name: synthetic, seq_len: 64}\nmodel:\n"


def load(tmp_path: Path, model: str, *overrides: str) -> DecoderConfig:
    """The model of a config whose model section is `model`, after a round trip through its resolved form."""
    file = tmp_path / "c.yaml"
    file.write_text(FILE + model)
    config = load_config(str(file), overrides).config
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    again = load_config(str(resolved)).config
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    return config.decoder(wanted_by="a test")


def test_every_preset_has_a_name_in_the_schema_and_a_published_size() -> None:
    assert set(get_args(PresetName)) == PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_parameters_that_were_published(name: str, tmp_path: Path) -> None:
    vocab_size, parameters, model_type = PUBLISHED[name]
    config = load(tmp_path, f"  preset: {name}\n", "model.max_seq_len=1024")
    layout = layout_for(config)
    assert layout is not None
    assert layout.model_type == model_type
    with torch.device("meta"):
        assert Decoder(config, vocab_size).num_parameters() == parameters


def test_explicit_keys_win_at_any_depth_and_the_rest_stays(tmp_path: Path) -> None:
    text = "  preset: llama-3.2-1b\n  num_layers: 3\n  attention: {head_dim: 32}\n"
    model = load(tmp_path, text, "model.positional.rope_scaling.factor=4", "model.norm.eps=1e-6")
    scaling = model.positional.rope_scaling
    assert scaling is not None
    assert (model.num_layers, model.attention.head_dim, model.norm.eps, scaling.factor) == (3, 32, 1e-6, 4.0)
    assert (model.d_model, model.attention.num_kv_heads, scaling.high_freq_factor) == (2048, 8, 4.0)
    assert load(tmp_path, "  preset: llama-3.2-1b\n", "model.positional.rope_scaling=null").positional.rope_base == 5e5


def test_an_override_may_choose_the_preset_under_what_the_file_says(tmp_path: Path) -> None:
    model = load(tmp_path, "  preset: gpt2-xl\n  dropout: 0.1\n", "model.preset=gpt2-small")
    assert (model.preset, model.d_model, model.num_layers, model.dropout) == ("gpt2-small", 768, 12, 0.1)
    assert load(tmp_path, "  d_model: 96\n", "model.preset=gpt2-small").d_model == 96


@pytest.mark.parametrize(
    ("preset", "text", "wanted"),
    [
        ("llama-3-8b", "  attention: {variant: mha}\n", {"attention": {"num_kv_heads": None, "num_heads": 32}}),
        ("mistral-7b", "  attention: {mask: causal}\n", {"attention": {"window": None, "num_kv_heads": 8}}),
        ("llama-3.2-1b", "  positional: {encoding: alibi}\n", {"positional": {"rope_scaling": None}}),
        (
            "llama-3.2-1b",
            "  positional: {rope_scaling: {rope_type: linear}}\n",
            {"positional": {"rope_scaling": {"rope_type": "linear", "factor": 32.0, "low_freq_factor": None}}},
        ),
        ("gpt2-small", "  ffn: {variant: swiglu}\n", {"ffn": {"activation": None, "bias": True}}),
        ("gpt2-small", "  ffn: {expansion: 2}\n", {"ffn": {"d_ff": None, "expansion": 2.0}}),
    ],
)
def test_keys_that_belong_to_another_choice_are_left_out(
    preset: str, text: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    def assert_holds(found: Any, wanted: Any) -> None:
        for key, value in wanted.items():
            if isinstance(value, dict):
                assert_holds(getattr(found, key), value)
            else:
                assert getattr(found, key) == value

    assert_holds(load(tmp_path, f"  preset: {preset}\n{text}"), wanted)


def test_faults_keep_their_lines_and_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml:3: model\.preset: .*did you mean gpt2-small\?"):
        load(tmp_path, "  preset: gpt-small\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:4: model\.num_layers: expected a number ≥ 1 \(got 0\)"):
        load(tmp_path, "  preset: gpt2-small\n  num_layers: 0\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:5: model\.attention\.num_head: unknown key; did you mean"):
        load(tmp_path, "  preset: gpt2-small\n  attention:\n    num_head: 6\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:4: model\.attention: num_heads 6 is not divisible"):
        load(tmp_path, "  preset: llama-3-8b\n  attention: {num_heads: 6}\n")


def test_a_preset_holds_in_python_too() -> None:
    config = DecoderConfig(preset="gpt2-small", num_layers=2, attention=AttentionConfig(dropout=0.1))
    assert (config.d_model, config.num_layers, config.attention.bias, config.attention.dropout) == (768, 2, True, 0.1)
    assert DecoderConfig.model_validate(config.model_dump()) == config
