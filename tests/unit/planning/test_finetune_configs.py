"""The configs for fine-tuning that ship, each with the architecture that it names and the memory that it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtrain.config.loading.load import load_config, shipped_configs
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.schema import Config
from llmtrain.models.huggingface.spec import huggingface_spec
from llmtrain.models.lora import is_linear
from llmtrain.planning import target as plan_target
from llmtrain.verbs.plan import plan

LLAMA = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
    },
    "meta-llama/Llama-3.2-3B-Instruct": {
        **LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-3B-Instruct": {
        **QWEN,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "max_position_embeddings": 32_768,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "max_position_embeddings": 32_768,
    },
    "distilbert/distilgpt2": {"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50_257},
}
"""What their config.json says of sizes, as published."""
PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "distilbert/distilgpt2": 81_912_576,
}
FITS = {
    "finetune-llama3-8b": "rtx4090",  # 24 GB
    "finetune-lakefs": "rtx4090",
    "finetune-llama3.2-3b": "rtx3060",  # 12 GB
    "finetune-qwen2.5-3b": "rtx3060",
    "finetune-lora": "rtx3060",
    "finetune-qlora": "rtx3060",
    "finetune-full": "rtx3060",
    "finetune-distilgpt2": "rtx3060",
}
GIGABYTES = {"rtx4090": 24, "rtx3060": 12}


def loaded(name: str, folder: Path) -> tuple[Config, str]:
    """A config that ships, with a folder with nothing but a config.json in place of the model that it names."""
    config = load_config(name).config
    assert isinstance(config.model, HuggingFaceConfig)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[config.model.path]))
    return load_config(name, [f"model.path={folder}"]).config, config.model.path


def test_every_config_for_fine_tuning_is_tried_here() -> None:
    names = {name for name in shipped_configs() if name.startswith("finetune-")}
    assert names == {*FITS, "finetune-local"}
    assert load_config("finetune-local").config.model.name == "huggingface"


@pytest.mark.parametrize("name", FITS)
def test_its_adapters_find_layers_and_its_parameters_are_those_that_are_published(name: str, tmp_path: Path) -> None:
    config, path = loaded(name, tmp_path)
    assert isinstance(config.model, HuggingFaceConfig)
    transformers_config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = huggingface_spec(config.model, transformers_config, precision="bf16-mixed", quantized=False)
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert model.num_parameters() - adapters == PARAMETERS[path]
    assert model.num_parameters(trainable=True) == (adapters or PARAMETERS[path])
    if adapters:  # each linear layer but the output, whatever they are called there
        linear = [m for n, m in model.named_modules() if is_linear(m) and "lora_" not in n]
        assert sum("lora_A" in n for n, _ in model.named_parameters()) == len(linear) - 1
    assert config.data.seq_len <= (model.max_seq_len or 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_it_fits_the_memory_that_it_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_target, "GEMM_SEC", 0.01)
    device, config = FITS[name], loaded(name, tmp_path)[0]
    assert config.trainer.activation_checkpointing == ("none" if name == "finetune-distilgpt2" else "auto")
    changes: dict[str, Any] = {"activation_checkpointing": "full"}  # the least that auto can take, in one prediction
    if isinstance(config.model, HuggingFaceConfig) and config.model.lora is not None:
        changes["compile"] = False  # not compiled they need more, and fit too
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})
    found = plan(config, device=device)
    assert found["memory"]["device_bytes"] == GIGABYTES[device] * 10**9
    assert found["memory"]["fits"] is True
    title = shipped_configs()[name]
    assert f"{GIGABYTES[device]} GB" in title or not title.rpartition(" GB")[1]
