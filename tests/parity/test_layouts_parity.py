"""The decoder computes what transformers' Llama, Qwen3, Mistral and GPT-2 compute with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmtrain.contracts import IGNORE_INDEX
from llmtrain.errors import ConfigError
from llmtrain.models.folder import read_model_config, read_model_folder, write_model_folder
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_decoder

LLAMA: dict[str, Any] = {
    "vocab_size": TINY_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rope_theta": 5000.0,
    "eos_token_id": 0,
    "bos_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": TINY_VOCAB_SIZE,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
THEIRS = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, LLAMA | {"num_key_value_heads": 2}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, LLAMA | {"tie_word_embeddings": True}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (LlamaForCausalLM, LlamaConfig, LLAMA | {"head_dim": 16}),
    "llama-linear": (LlamaForCausalLM, LlamaConfig, LLAMA | {"rope_parameters": LINEAR | {"rope_theta": 5000.0}}),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 50.0}}),
    "mistral": (MistralForCausalLM, MistralConfig, LLAMA | {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral-causal": (MistralForCausalLM, MistralConfig, LLAMA | {"sliding_window": None}),
    "qwen3-window": (
        Qwen3ForCausalLM,
        Qwen3Config,
        LLAMA | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, LLAMA | {"head_dim": 8}),
    "qwen3-gqa-tied": (
        Qwen3ForCausalLM,
        Qwen3Config,
        LLAMA | {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt2-untied": (GPT2LMHeadModel, GPT2Config, GPT2 | {"tie_word_embeddings": False, "n_inner": 80}),
}


def build_theirs(name: str) -> Any:
    """Their model in evaluation mode, with biases and norms that are not at their neutral initial values."""
    model_class, config_class, settings = THEIRS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm.weight" in parameter_name else 0.0))
    return model


@torch.no_grad()
def their_loss_sum(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Their own loss, a mean over labels that they shift themselves, as a sum."""
    shifted = torch.cat([torch.full_like(labels[:, :1], IGNORE_INDEX), labels[:, :-1]], dim=1)
    num_tokens = int((shifted[:, 1:] != IGNORE_INDEX).sum())
    return float(model(input_ids=input_ids, labels=shifted).loss) * num_tokens


@pytest.mark.parametrize("name", THEIRS)
def test_their_model_read_here_gives_equal_logits_and_loss(name: str, tmp_path: Path) -> None:
    theirs = build_theirs(name)
    theirs.save_pretrained(tmp_path)
    decoder, vocab_size = read_model_folder(tmp_path)
    decoder.eval()
    assert vocab_size == TINY_VOCAB_SIZE
    batch = random_batch(seq_len=40, ignored_fraction=0.2)
    with torch.no_grad():
        ours = decoder.logits(batch["input_ids"])
        torch.testing.assert_close(ours, theirs(input_ids=batch["input_ids"]).logits, rtol=0, atol=1e-5)
        batch["labels"][:, -1] = IGNORE_INDEX  # their shift has no label for the last position
        loss_sum, _ = decoder(batch)
    assert float(loss_sum) == pytest.approx(their_loss_sum(theirs, batch["input_ids"], batch["labels"]), rel=1e-5)


OURS: dict[str, dict[str, Any]] = {
    "llama": {"tie_embeddings": False},
    "llama-gqa-tied": {"attention": {"variant": "gqa", "num_kv_heads": 2}},
    "llama-biases": {"attention": {"bias": True}, "ffn": {"bias": True}, "positional": {"rope_base": 777.0}},
    "llama-mqa": {"attention": {"variant": "mqa"}},
    "llama-linear": {"positional": {"rope_scaling": LINEAR}},
    "llama-llama3": {"positional": {"rope_base": 50.0, "rope_scaling": LLAMA3}},
    "mistral": {"attention": {"variant": "gqa", "num_kv_heads": 2, "mask": "sliding_window", "window": 7}},
    "qwen3": {"attention": {"qk_norm": True, "head_dim": 12, "bias": True}},
    "qwen3-window": {"attention": {"qk_norm": True, "mask": "sliding_window", "window": 9}},
    "gpt2": {
        "attention": {"bias": True},
        "positional": {"encoding": "learned"},
        "ffn": {"variant": "mlp", "bias": True},
        "norm": {"type": "layernorm"},
    },
}


@pytest.mark.parametrize("name", OURS)
def test_our_model_loads_in_transformers_as_it_is_written(name: str, tmp_path: Path) -> None:
    decoder = tiny_decoder(**OURS[name])
    write_model_folder(
        tmp_path, config=decoder.config, vocab_size=TINY_VOCAB_SIZE, state_dict=decoder.state_dict(), eos_id=3
    )
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.model_type == name.split("-")[0]
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == 3
    ids = random_batch(seq_len=40)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(decoder.logits(ids), theirs.eval()(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_greedy_generation_equals_transformers(tmp_path: Path) -> None:
    from llmtrain.generation.sampling import Sampling
    from tests.support.decoding import generate

    decoder = tiny_decoder()
    write_model_folder(tmp_path, config=decoder.config, vocab_size=TINY_VOCAB_SIZE, state_dict=decoder.state_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = [5, 17, 3, 40]
    wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.3)
    ours = generate(decoder, [prompt], max_new_tokens=20, sampling=Sampling(temperature=0.0, repetition_penalty=1.3))
    assert ours == [wanted[0, len(prompt) :].tolist()]


def test_a_model_with_some_layers_windowed_is_refused_by_name(tmp_path: Path) -> None:
    settings = LLAMA | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    Qwen3Config(**settings).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="some of the model's layers attend in a sliding window and some do not"):
        read_model_config(tmp_path)


def test_a_scaling_of_positions_that_is_not_here_is_refused_by_name(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    LlamaConfig(**(LLAMA | {"rope_parameters": yarn})).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"scales its rotary positions \(yarn\), which is not supported"):
        read_model_config(tmp_path)
