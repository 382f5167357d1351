"""A decoder from a config and one safetensors file: any prefix, any of the tied names, every fault named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.models.weights import read_decoder
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config, tiny_decoder

UNTIED = {"tie_embeddings": False}
GPT2 = {
    "positional": {"encoding": "learned"},
    "norm": {"type": "layernorm"},
    "ffn": {"variant": "mlp", "bias": True, "d_ff": 128},
    "attention": {"bias": True},
}


def saved(path: Path, decoder: Decoder, *, prefix: str = "", extra: dict[str, Tensor] | None = None) -> Path:
    tensors = {prefix + name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    save_file(tensors | (extra or {}), path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_forward_module."])
@pytest.mark.parametrize("changes", [{}, UNTIED], ids=["tied", "untied"])
def test_names_are_read_with_and_without_prefixes_of_wrappers(
    prefix: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    decoder = tiny_decoder(**changes)
    again = read_decoder(decoder.config, saved(tmp_path / "w.safetensors", decoder, prefix=prefix)).eval()
    assert again.vocab_size == TINY_VOCAB_SIZE
    ids = random_batch()["input_ids"]
    assert torch.equal(again.logits(ids), decoder.logits(ids))


@pytest.mark.parametrize("changes", [{}, UNTIED, GPT2, {"attention": {"qk_norm": True}}], ids=str)
def test_the_weights_of_a_model_folder_are_read_under_their_names(changes: dict[str, Any], tmp_path: Path) -> None:
    decoder = tiny_decoder(**changes)
    write_model_folder(tmp_path, config=decoder.config, vocab_size=TINY_VOCAB_SIZE, state_dict=decoder.state_dict())
    again = read_decoder(decoder.config, tmp_path / "model.safetensors").eval()
    ids = random_batch()["input_ids"]
    assert torch.equal(again.logits(ids), decoder.logits(ids))


def test_tied_weights_are_read_under_either_name_or_both(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    table = decoder.token_embedding.weight.detach()
    both = saved(tmp_path / "both.safetensors", decoder, extra={"output.weight": table.clone()})
    tensors = {name: tensor for name, tensor in decoder.state_dict().items() if name != "token_embedding.weight"}
    save_file(tensors | {"output.weight": table.clone()}, tmp_path / "other.safetensors")
    for file in (both, tmp_path / "other.safetensors"):
        again = read_decoder(decoder.config, file)
        assert torch.equal(again.token_embedding.weight, table)
        assert again.output_weight is again.token_embedding.weight
    saved(tmp_path / "differs.safetensors", decoder, extra={"output.weight": table + 1})
    with pytest.raises(ConfigError, match=r"the embeddings are tied, but output\.weight differs"):
        read_decoder(decoder.config, tmp_path / "differs.safetensors")


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    tensors = dict(decoder.state_dict())
    del tensors["final_norm.weight"]
    tensors["blocks.9.x"] = torch.zeros(1)
    tensors["blocks.0.attention_norm.weight"] = torch.zeros(5)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError) as caught:
        read_decoder(decoder.config, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "missing tensors: final_norm.weight" in message
    assert "does not have: blocks.9.x" in message
    assert "blocks.0.attention_norm.weight has shape [5], expected [32]" in message


def test_the_vocabulary_is_that_of_the_file_and_must_be_that_of_the_config(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    file = saved(tmp_path / "w.safetensors", decoder)
    assert read_decoder(tiny_config(vocab_size=TINY_VOCAB_SIZE), file).vocab_size == TINY_VOCAB_SIZE
    with pytest.raises(ConfigError, match="has 61 rows, but the config's vocab_size is 64"):
        read_decoder(tiny_config(vocab_size=64), file)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ConfigError, match=r"broken\.safetensors: cannot be read as safetensors"):
        read_decoder(tiny_config(), tmp_path / "broken.safetensors")
    with pytest.raises(ConfigError, match=r"none\.safetensors: no such file"):
        read_decoder(tiny_config(), tmp_path / "none.safetensors")


def test_the_dtype_of_the_file_is_kept(tmp_path: Path) -> None:
    decoder = tiny_decoder().to(torch.bfloat16)
    again = read_decoder(decoder.config, saved(tmp_path / "w.safetensors", decoder))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
