"""A model folder reads back exactly; whatever is wrong with one is said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import (
    clean_state_dict,
    read_model_config,
    read_model_folder,
    read_state_dict,
    write_model_folder,
)
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config, tiny_decoder

OWN: dict[str, Any] = {"norm": {"type": "layernorm"}}
"""RoPE with LayerNorm: no layout holds it."""


def write(folder: Path, decoder: Decoder, **more: Any) -> None:
    write_model_folder(
        folder, config=decoder.config, vocab_size=TINY_VOCAB_SIZE, state_dict=decoder.state_dict(), **more
    )


VARIANTS: list[dict[str, Any]] = [
    {},
    OWN,
    {"attention": {"qk_norm": True}},
    {"tie_embeddings": False},
    {"attention": {"variant": "complex", "qk_norm": True}},
    {"attention": {"variant": "complex", "num_kv_heads": 2, "mask": "sliding_window", "window": 3}},
    {"attention": {"variant": "mqa", "mask": "sliding_window", "window": 3}},
    {"positional": {"encoding": "alibi"}, "norm": {"placement": "sandwich"}},
    {"positional": {"encoding": "sinusoidal"}, "norm": {"placement": "post"}},
    {"positional": {"encoding": "none"}, "parallel_layers": True},
    {"positional": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
    {"ffn": {"variant": "geglu", "activation": "gelu"}},
    {"ffn": {"variant": "mlp", "activation": "relu2"}, "norm": {"type": "layernorm", "placement": "sandwich"}},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_back_is_exact(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = tiny_decoder(**changes, dropout=0.1, residual_scaled_init=False).to(dtype)
    write(tmp_path, decoder)
    back, vocab_size = read_model_folder(tmp_path)
    assert (back.config, vocab_size) == (decoder.config, TINY_VOCAB_SIZE)
    weights, wanted = back.state_dict(), decoder.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) and weights[name].dtype == dtype for name in wanted)
    ids = random_batch()["input_ids"]
    assert torch.equal(back.eval().logits(ids), decoder.logits(ids))


def test_an_architecture_without_a_layout_keeps_our_names(tmp_path: Path) -> None:
    decoder = tiny_decoder(**OWN)
    write(tmp_path, decoder, eos_id=7)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llmtrain-decoder", 7)
    assert load_file(tmp_path / "model.safetensors").keys() == decoder.state_dict().keys()
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_config_json_has_the_layouts_config_and_ours(tmp_path: Path) -> None:
    write(tmp_path, tiny_decoder(positional={"rope_base": 500.0}), eos_id=7)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["rope_theta"], config["tie_word_embeddings"]) == ("llama", 500.0, True)
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (None, 7, "float32")
    assert read_model_config(tmp_path) == (tiny_config(positional={"rope_base": 500.0}), TINY_VOCAB_SIZE)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    wrapped = {
        f"_forward_module.module._orig_mod.{name.replace('blocks.0.', 'blocks.0._orig_mod.')}": tensor
        for name, tensor in decoder.state_dict().items()
    }
    assert clean_state_dict(wrapped).keys() == decoder.state_dict().keys()
    write_model_folder(tmp_path, config=decoder.config, vocab_size=TINY_VOCAB_SIZE, state_dict=wrapped)
    weights = read_state_dict(tmp_path, decoder.config)
    assert all(torch.equal(weights[name], tensor) for name, tensor in decoder.state_dict().items())
    with pytest.raises(ValueError, match="two tensors would be named a"):
        clean_state_dict({"a": torch.zeros(1), "module.a": torch.zeros(1)})


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    source, folder = tmp_path / "tokenizer", tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "spiece.model").write_bytes(b"pieces")
    (source / "notes.txt").write_text("stays")
    write(folder, tiny_decoder(), tokenizer_folder=source)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (folder / "tokenizer.json").exists()
    assert (folder / "spiece.model").read_bytes() == b"pieces"
    assert not (folder / "notes.txt").exists()
    with pytest.raises(ConfigError, match="no tokenizer here"):
        write(folder, tiny_decoder(), tokenizer_folder=folder.parent)


@pytest.mark.parametrize("changes", [{}, OWN], ids=["layout", "own-names"])
def test_missing_extra_and_misshapen_tensors_are_named(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, tiny_decoder(**changes))
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if name.endswith("o_proj.weight"))
    rest = {other: tensor for other, tensor in whole.items() if other != name}

    save_file(rest, path)
    with pytest.raises(ConfigError, match=f"missing tensors: {name}"):
        read_model_folder(tmp_path)
    save_file(whole | {"surplus.weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"does not have: surplus\.weight"):
        read_model_folder(tmp_path)
    save_file(rest | {name: torch.zeros(3, 5)}, path)
    with pytest.raises(ConfigError, match=r"o_proj\.weight has shape \[3, 5\], expected \[32, 32\]"):
        read_model_folder(tmp_path)


def test_writing_rejects_an_incomplete_model(tmp_path: Path) -> None:
    state_dict = tiny_decoder().state_dict()
    del state_dict["final_norm.weight"]
    with pytest.raises(ValueError, match=r"missing tensors: final_norm\.weight"):
        write_model_folder(tmp_path, config=tiny_config(), vocab_size=TINY_VOCAB_SIZE, state_dict=state_dict)
    assert not list(tmp_path.iterdir())


def test_damaged_and_absent_files_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a model folder: there is no config\.json in it"):
        read_model_folder(tmp_path / "nowhere")
    write(tmp_path, tiny_decoder())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        read_model_folder(tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors here"):
        read_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type bert is not a decoder that can be built here"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "scales its rotary positions"),
        ({"hidden_act": "gelu"}, "the model's activation is gelu"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"hidden_size": None}, "d_model"),
    ],
    ids=str,
)
def test_a_model_of_transformers_that_fits_no_layout_is_rejected(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, tiny_decoder())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    del config["llmtrain"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_model_folder(tmp_path)


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    write(tmp_path, decoder)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    path.unlink()
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    back, _ = read_model_folder(tmp_path)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in decoder.state_dict().items())
