"""A model and data of the user's own are named by import path, which loading a config does not import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config, to_yaml
from llmtrain.config.sections.own import OwnDataConfig, OwnModelConfig
from tests.support.configs import MINIMAL, load, message_of

OWN = """\
model: {name: "nowhere.models:Mine", options: {width: 8}}
data:
  name: nowhere.data:Mine
  seq_len: 16
"""


def test_an_import_path_chooses_a_class_of_ones_own_and_nothing_is_imported(tmp_path: Path) -> None:
    config = load(tmp_path, OWN)
    assert config.model == OwnModelConfig(name="nowhere.models:Mine", options={"width": 8})
    assert config.data == OwnDataConfig(name="nowhere.data:Mine", seq_len=16)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(str(again)).config == config
    assert "nowhere" not in sys.modules


def test_an_override_with_an_import_path_leaves_the_keys_of_the_other_kind_out(tmp_path: Path) -> None:
    text = "data: {name: tokens, train: a, seq_len: 64}\nmodel: {d_model: 64, num_layers: 2, max_seq_len: 64}\n"
    config = load(tmp_path, text, "data.name=a.b:C", "model.name=a.b:D", "model.options.depth=3")
    assert config.data == OwnDataConfig(name="a.b:C", seq_len=64)
    assert config.model == OwnModelConfig(name="a.b:D", options={"depth": 3})
    assert load(tmp_path, OWN, "model.name=decoder", "data.name=synthetic").data.seq_len == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "model: {name: 'my pkg:M'}\n", "c.yaml:2: model.name: expected text: Its import path"),
        (MINIMAL + "model: {name: 'a:M', dtype: x}\n", "c.yaml:2: model.dtype: a key of model.name: huggingface"),
        (MINIMAL + "model: {name: 'a:M', lora: {}}\n", "name a trained model in init_from"),
        (
            MINIMAL + "model: {name: 'a:M', init_from: r, lora: {target_parameters: [w]}}\n",
            "lora.target_parameters is for models of name huggingface: remove it",
        ),
        (MINIMAL + "model: {name: 'a:M', opt: {}}\n", "c.yaml:2: model.opt: unknown key; did you mean model.options?"),
        ("data: {name: 'a:D', train: x}\n", "c.yaml:1: data.train: a key of data.name: tokens or corpus"),
        ("data: {name: nothing}\n", "package.module:Class"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    assert message in message_of(tmp_path, text)
