"""Adapters on weights in 4 and 8 bits, as bitsandbytes has them, on the CPU: what is loaded, computed, and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.errors import ConfigError
from llmtrain.models.huggingface.load import build_huggingface, read_transformers_config
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.huggingface.spec import huggingface_spec
from llmtrain.models.lora import add_lora
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import VOCAB_SIZE, tiny_network, write_tiny_folder

KINDS: list[Literal["nf4", "int8"]] = ["nf4", "int8"]


def config_of(folder: Path, quantization: str) -> HuggingFaceConfig:
    return HuggingFaceConfig.model_validate({"path": str(folder), "quantization": quantization, "lora": {"r": 4}})


def build(folder: Path, quantization: str, *, precision: str = "32", **changes: Any) -> HuggingFaceModel:
    config = config_of(write_tiny_folder(folder, **changes), quantization)
    return build_huggingface(config, folder, seed=0, precision=precision).train()


def quantized_layers(model: HuggingFaceModel) -> dict[str, Any]:
    """The layers of bitsandbytes; those of peft around them have the same names of classes."""
    modules = model.causal_lm.named_modules()
    return {name: module for name, module in modules if type(module).__module__.startswith("bitsandbytes")}


def values_of(layer: Any) -> torch.Tensor:
    """What the weights of a layer stand for."""
    if hasattr(layer.weight, "quant_state"):
        values: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return values.float()
    values = layer.weight.CB.float() * layer.weight.SCB.view(-1, 1) / 127
    return values


def gradients(model: HuggingFaceModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_sum, _ = model(random_batch(VOCAB_SIZE))
    loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def begin_somewhere(model: HuggingFaceModel) -> None:
    """Adapters begin at zero, where half of their gradients are none."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_four_bits_are_nf4_with_double_quantization_under_adapters_in_float32(tmp_path: Path) -> None:
    model = build(tmp_path, "nf4", precision="bf16-mixed")
    layers = quantized_layers(model)
    assert len(layers) == 14, "seven in each of two blocks"
    for layer in layers.values():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested is True
        assert layer.compute_dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name), name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        elif "base_layer" not in name:  # embedding, output and norms are not made wider, as in any LoRA run
            assert parameter.dtype == torch.bfloat16, name


@pytest.mark.parametrize("quantization", KINDS)
def test_a_step_is_that_of_adapters_on_the_rounded_weights(quantization: str, tmp_path: Path) -> None:
    wide: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 192,
    }  # bitsandbytes' kernel on CPUs errs on rows below 64
    model = build(tmp_path, quantization, **wide)
    rounded = tiny_network("llama", **wide)
    for name, layer in quantized_layers(model).items():
        module = rounded.get_submodule(name.removesuffix(".base_layer"))
        error = (values_of(layer) - module.weight).norm() / module.weight.norm()
        assert 0.001 < error < (0.15 if quantization == "nf4" else 0.02), "rounded, and rightly"
        module.weight.data = values_of(layer)
    reference = HuggingFaceModel(add_lora(rounded, LoraConfig(r=4))).train()
    reference.network.load_state_dict(
        {name: p for name, p in model.network.named_parameters() if "lora_" in name}, strict=False
    )
    for each in (model, reference):
        begin_somewhere(each)
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 2e-3 * gradient.norm(), name


@pytest.mark.parametrize("quantization", KINDS)
def test_an_evaluation_in_between_changes_nothing(quantization: str, tmp_path: Path) -> None:
    model = build(tmp_path, quantization, precision="bf16-mixed")
    begin_somewhere(model)
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(random_batch(VOCAB_SIZE))
        model.logits(random_batch(VOCAB_SIZE)["input_ids"])
    after = gradients(model.train())
    assert all(torch.equal(before[name], gradient) for name, gradient in after.items())


@pytest.mark.parametrize("quantization", KINDS)
def test_the_spec_is_as_large_as_the_model(quantization: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = build(tmp_path, quantization, precision="bf16-mixed", **sizes)
    config = config_of(tmp_path, quantization)
    outline = huggingface_spec(config, read_transformers_config(config, tmp_path), precision="bf16-mixed")
    held = sum(p.nbytes for p in model.parameters())
    for layer in quantized_layers(model).values():
        constants = layer.weight
        if quantization == "nf4":
            held += constants.quant_state.absmax.nbytes + constants.quant_state.state2.absmax.nbytes
        else:
            held += constants.SCB.nbytes
    persistent = [b for n, b in outline.named_buffers() if "constants" in n]
    assert sum(t.nbytes for t in (*outline.parameters(), *persistent)) == held
    assert outline.num_parameters(trainable=True) == model.num_parameters(trainable=True)


def test_quantized_weights_that_would_be_sharded_are_rejected(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"quantization nf4: distributed\.strategy fsdp cannot shard such weights: set"
    ):
        build_huggingface(config_of(folder, "nf4"), folder, seed=0, precision="32", empty=True)
