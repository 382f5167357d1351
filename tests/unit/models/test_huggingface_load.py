"""Models of transformers from and to folders: what is loaded, rejected, written and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.errors import ConfigError
from llmtrain.models.huggingface.folder import (
    checkpoint_tensors,
    read_huggingface_folder,
    write_huggingface_folder,
)
from llmtrain.models.huggingface.load import (
    build_huggingface,
    check_quantization,
    fetch,
    quantization_config,
    weights_dtype,
)
from llmtrain.models.huggingface.model import HuggingFaceModel
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import VOCAB_SIZE, tiny_network, write_tiny_folder


def build(folder: Path, *, seed: int = 0, precision: str = "32", **settings: Any) -> HuggingFaceModel:
    config = HuggingFaceConfig.model_validate({"path": str(folder), **settings})
    return build_huggingface(config, fetch(config)[0], seed=seed, precision=precision).eval()


def test_a_model_is_loaded_in_float32_with_the_requested_attention(tmp_path: Path) -> None:
    network = tiny_network("qwen3")
    network.to(torch.bfloat16).save_pretrained(tmp_path)
    model = build(tmp_path, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.causal_lm.config._attn_implementation == "eager"
    for name, parameter in network.named_parameters():
        assert torch.equal(model.network.get_parameter(name), parameter.float()), name


def test_a_random_model_is_a_function_of_the_seed_and_needs_no_weights(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, again, other = (build(tmp_path, init="random", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.lm_head.weight"], other["network.lm_head.weight"])


def test_the_tokenizer_may_be_in_another_folder(tmp_path: Path) -> None:
    model, other = write_tiny_folder(tmp_path / "model"), write_tiny_folder(tmp_path / "tokenizer")
    assert fetch(HuggingFaceConfig(path=str(model))) == (model, model)
    assert fetch(HuggingFaceConfig(path=str(model), tokenizer=str(other))) == (model, other)


def test_a_tensor_that_is_missing_or_of_another_shape_is_rejected_by_name(tmp_path: Path) -> None:
    file = write_tiny_folder(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"the weights lack lm_head.weight, which would be drawn at random"):
        build(tmp_path)
    save_file({**tensors, "lm_head.weight": head[:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head.weight|mismatch"):
        build(tmp_path)


def test_an_unknown_kind_of_model_is_rejected(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path)
    for kind in ("no-such-kind", "vit"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ConfigError, match=r"cannot be built: ") as caught:
            build(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "precision", "dtype"),
    [
        ({}, "bf16-mixed", torch.float32),  # trained, so these are the master weights
        ({}, "bf16-true", torch.bfloat16),
        ({"lora": {}}, "bf16-mixed", torch.bfloat16),
        ({"lora": {}}, "32", torch.float32),
        ({"lora": {}, "dtype": "float32"}, "bf16-mixed", torch.float32),
        ({"dtype": "bfloat16"}, "32", torch.bfloat16),
    ],
)
def test_trained_weights_are_float32_and_frozen_ones_as_narrow_as_the_run(
    settings: dict[str, Any], precision: str, dtype: torch.dtype
) -> None:
    config = HuggingFaceConfig.model_validate({"path": "x", **settings})
    assert weights_dtype(config, precision=precision) == dtype


def test_quantization_is_rejected_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization nf4 runs on cuda and cpu, not on mps: set run\.device"):
        check_quantization("nf4", device=torch.device("mps"))
    monkeypatch.setattr("llmtrain.models.huggingface.load.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"int8 needs bitsandbytes: `.*pip install .*\[bnb\]'`, or set it to none"):
        build(write_tiny_folder(tmp_path), quantization="int8", lora={})


def test_four_bits_are_nf4_with_double_quantization() -> None:
    settings = quantization_config("nf4").to_dict()
    assert (settings["load_in_4bit"], settings["bnb_4bit_quant_type"]) == (True, "nf4")
    assert settings["bnb_4bit_use_double_quant"] is True
    assert quantization_config("int8").to_dict()["load_in_8bit"] is True
    assert quantization_config("none") is None


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("mixtral", False)])
def test_a_full_model_is_loaded_by_transformers_and_resumed_exactly(tmp_path: Path, family: str, tied: bool) -> None:
    source = write_tiny_folder(tmp_path / "base", family, tie_word_embeddings=tied)
    model = build(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    tokens = random_batch(VOCAB_SIZE)["input_ids"]
    saved = {name: tensor.clone() for name, tensor in checkpoint_tensors(model).items()}
    expected = model.logits(tokens).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what is written is the snapshot, not what the model has become
    folder = tmp_path / "model"
    write_huggingface_folder(folder, model=model, state_dict=saved, tokenizer_folder=source)

    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(folder, local_files_only=True)) == VOCAB_SIZE
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (folder / "model.safetensors").exists()

    read_huggingface_folder(folder, model)
    for name, tensor in checkpoint_tensors(model).items():
        assert torch.equal(tensor, saved[name]), name


def test_tensors_of_another_model_are_not_written_and_not_read(tmp_path: Path) -> None:
    model = build(write_tiny_folder(tmp_path / "base"))
    tensors = checkpoint_tensors(model)
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head.weight"):
        write_huggingface_folder(tmp_path / "model", model=model, state_dict=tensors, tokenizer_folder=None)
    with pytest.raises(ConfigError, match="lacks"):
        read_huggingface_folder(tmp_path / "model", model)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2).model_dump()])
@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"do_sample": False, "top_p": 0.9}, {"do_sample": True}])
def test_a_generation_config_is_copied_unchanged(tmp_path: Path, settings: dict[str, Any], lora: Any) -> None:
    write_tiny_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(written := json.dumps(settings))
    model = build(tmp_path, lora=lora)
    tensors, out = checkpoint_tensors(model), tmp_path / "out"
    write_huggingface_folder(out, model=model, state_dict=tensors, tokenizer_folder=tmp_path, base=tmp_path)
    assert (out / "generation_config.json").read_text() == written


@pytest.mark.parametrize("sampled", [True, False])
def test_generation_settings_in_the_config_of_the_model_are_kept(tmp_path: Path, sampled: bool) -> None:
    base = write_tiny_folder(tmp_path / "base")
    (base / "generation_config.json").unlink()
    described = json.loads((base / "config.json").read_text())
    described |= {"do_sample": sampled, "temperature": 0.7, "repetition_penalty": 1.2}
    (base / "config.json").write_text(json.dumps(described))
    model, out = build(base), tmp_path / "out"
    write_huggingface_folder(out, model=model, state_dict=checkpoint_tensors(model), tokenizer_folder=base, base=base)
    settings = GenerationConfig.from_pretrained(out)
    assert settings.repetition_penalty == 1.2
    assert (settings.do_sample, settings.temperature) == ((True, 0.7) if sampled else (False, None))
