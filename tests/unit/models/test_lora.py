"""Adapters of a decoder are merged and written beside training, which goes on with the live model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmtrain.config.sections.lora import LoraConfig
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.fetch import ADAPTER_WEIGHTS
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.lora import (
    add_lora,
    add_lora_to_decoder,
    merged_state_dict,
    read_adapter,
    trainable_state_dict,
    weights_left_out,
    with_adapter,
    write_adapter,
)
from tests.support.tiny import random_batch, tiny_decoder
from tests.support.tiny_huggingface import (
    FAMILIES,
    VOCAB_SIZE,
    tiny_network,
    write_tiny_adapter,
    write_tiny_chat_folder,
)


def decoder_with_adapters(**lora: Any) -> Decoder:
    """A decoder with adapters that have an effect, since B is not 0."""
    torch.manual_seed(2)
    decoder = tiny_decoder()
    add_lora_to_decoder(decoder, LoraConfig.model_validate({"r": 4, "alpha": 8, **lora}))
    with torch.no_grad():
        for tensor in trainable_state_dict(decoder).values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return decoder


def fail(*_: object, **__: object) -> None:
    raise AssertionError("this reads all of the live model")


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_into_copies_on_the_cpu_and_the_model_stays(
    dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ids = decoder_with_adapters(dora=dora), random_batch()["input_ids"]
    logits = decoder.logits(ids)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    staged = {name: tensor.detach().clone() for name, tensor in trainable_state_dict(decoder).items()}
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", fail)  # it would copy on the device of the model
        patch.setattr(nn.Parameter, "__deepcopy__", fail)
        merged = merged_state_dict(decoder, staged)
    plain = tiny_decoder()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain.logits(ids), logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_an_adapter_is_written_and_read_without_the_state_dict_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_with_adapters()
    again = decoder_with_adapters(r=4)
    with torch.no_grad():
        for tensor in trainable_state_dict(again).values():
            tensor.zero_()
    monkeypatch.setattr(decoder, "state_dict", fail)
    monkeypatch.setattr(again, "state_dict", fail)
    trained = trainable_state_dict(decoder)
    write_adapter(tmp_path, decoder, trained)
    read_adapter(tmp_path, again)
    assert len(load_file(tmp_path / ADAPTER_WEIGHTS)) == len(trained)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in trainable_state_dict(again).items())


def test_tensors_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    decoder = decoder_with_adapters()
    with pytest.raises(ValueError, match=r"tensors that the model does not have: blocks\.9\.lora_A"):
        write_adapter(tmp_path, decoder, {"blocks.9.lora_A": torch.zeros(1)})


MIXTURE: dict[str, Any] = {
    **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_weights_of_a_mixture_without_adapters_are_named_with_their_share() -> None:
    network = tiny_network("mixtral")
    total = sum(parameter.numel() for parameter in network.parameters())
    experts = 2 * (4 * 3 * 32 * 48 + 4 * 32)
    found = weights_left_out(add_lora(network, LoraConfig(r=2)))
    assert found is not None
    assert f"LoRA does not adapt mlp.gate.weight, {', '.join(EXPERTS)}: {experts / total:.0%} of the weights" in found
    assert f"model.lora.target_parameters=[mlp.gate.weight,{','.join(EXPERTS)}]" in found
    everything = LoraConfig(r=2, target_parameters=["mlp.gate.weight", *EXPERTS])
    assert weights_left_out(add_lora(tiny_network("mixtral"), everything)) is None


@pytest.mark.parametrize("kind", ["Qwen3MoeConfig", "GptOssConfig", "DeepseekV3Config"])
def test_the_named_weights_of_any_mixture_can_be_adapted(kind: str) -> None:
    config = getattr(transformers, kind)(**MIXTURE)
    found = weights_left_out(add_lora(AutoModelForCausalLM.from_config(config), LoraConfig(r=2)))
    assert found is not None
    assert "bias" not in found
    advised = found.partition("target_parameters=[")[2].partition("]")[0].split(",")
    lora = LoraConfig(r=2, target_parameters=advised)
    tuned = HuggingFaceModel(add_lora(AutoModelForCausalLM.from_config(config), lora))
    assert weights_left_out(tuned.network) is None
    loss_sum, _ = tuned(random_batch(VOCAB_SIZE))
    loss_sum.backward()
    assert all(tensor.grad is not None for tensor in trainable_state_dict(tuned.network).values())


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mixtral"}))
def test_all_linear_leaves_nothing_out_of_other_families(family: str) -> None:
    for tied in (True, False):
        assert weights_left_out(add_lora(tiny_network(family, tie_word_embeddings=tied), LoraConfig(r=2))) is None


def test_an_unknown_target_parameter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no matrix 'experts.w1'. There are .*mlp.ex"):
        add_lora(tiny_network("mixtral"), LoraConfig(target_parameters=["experts.w1"]))
    with pytest.raises(ConfigError, match="the decoder only has linear layers"):
        decoder_with_adapters(target_parameters=["ffn"])
    with pytest.raises(ValueError, match="adapted without dropout and dora"):
        LoraConfig(target_parameters=EXPERTS, dropout=0.1)


def test_experts_are_trained_and_resumed(tmp_path: Path) -> None:
    def tuned() -> HuggingFaceModel:
        lora = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
        return HuggingFaceModel(add_lora(tiny_network("mixtral"), lora))

    model = tuned()
    loss_sum, _ = model(random_batch(VOCAB_SIZE, num_documents=2))
    loss_sum.backward()
    trained = trainable_state_dict(model.network)
    assert len(trained) == 2 * 2 * 2
    assert all(tensor.grad is not None for tensor in trained.values())
    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(0.1)
    write_adapter(tmp_path, model.network, trained)
    again = tuned()
    read_adapter(tmp_path, again.network)
    ids = random_batch(VOCAB_SIZE)["input_ids"]
    torch.testing.assert_close(again.logits(ids), model.logits(ids))


def test_an_opened_adapter_warns_of_no_name_of_its_base(tmp_path: Path) -> None:
    base = write_tiny_chat_folder(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_tiny_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    described = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "me/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    network = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_adapter(network, adapter)
