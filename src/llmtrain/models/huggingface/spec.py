"""Builds the model of `build_huggingface` from config.json alone, with all shapes and no values.

    config.json ─ from_config, without storage ─ adapters ─ frozen weights in 4 or 8 bits ─▶ HuggingFaceModel

`plan` uses it on the meta device or under FakeTensorMode. It needs neither weights nor bitsandbytes nor a GPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.models.huggingface.load import network_of, weights_dtype
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.lora import add_lora, is_linear

BLOCK = 64
"""Number of weights in 4 bits that share a constant (bitsandbytes' default)."""
BLOCK_OF_CONSTANTS = 256
"""Number of these constants, in 8 bits themselves, that share one in float32: the double quantization of QLoRA."""


def huggingface_spec(
    config: HuggingFaceConfig, transformers_config: Any, *, precision: str, quantized: bool = True
) -> HuggingFaceModel:
    """Return the model of `config` without values. `precision` is the trainer's resolved precision.

    Its forward pass assumes what a real model is tried for: that documents in a row can be kept apart, and that the
    output layer is the usual one. With `quantized=False` the weights are not quantized, so that they can be counted.
    Raises ConfigError, as `build_huggingface` does, if the architecture is unknown or a LoRA target matches nothing.
    """
    attention = config.attn_implementation
    if attention is not None and "flash" in attention:
        attention = "sdpa"  # takes the same memory, and needs no package that may be missing here
    config = config.model_copy(update={"attn_implementation": attention})
    network = network_of(config, transformers_config, dtype=weights_dtype(config, precision=precision))
    head = network.get_output_embeddings()
    if config.lora is not None:
        network = add_lora(network, config.lora, base=config.path)
        if quantized and config.quantization != "none":
            _quantize(network, config.quantization, head=head)
    model = HuggingFaceModel(network)
    model.assume_standard()
    return model


def _quantize(network: nn.Module, kind: Literal["nf4", "int8"], *, head: nn.Module) -> None:
    """Replace every frozen linear layer, except the output, by a spec of a quantized one."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if is_linear(layer) and layer is not head and not layer.weight.requires_grad:
                setattr(parent, name, _QuantizedLinear(layer, kind))


class _QuantizedLinear(nn.Module):
    """Layer of the same size as bitsandbytes' Linear4bit or Linear8bitLt: weights and constants, without values."""

    def __init__(self, layer: nn.Module, kind: Literal["nf4", "int8"]) -> None:
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        size, device = layer.weight.shape, layer.weight.device
        numel = size.numel()
        self.out_features, self.in_features = reversed(size) if type(layer).__name__ == "Conv1D" else size
        self.bias: Any = layer.bias
        if kind == "nf4":
            num_blocks = -(-numel // BLOCK)
            weight = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
            constants = torch.empty(num_blocks, dtype=torch.uint8, device=device)
            of_constants = torch.empty(-(-num_blocks // BLOCK_OF_CONSTANTS), dtype=torch.float32, device=device)
        else:
            weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device=device)
            constants = torch.empty(self.out_features, dtype=torch.float32, device=device)
            of_constants = torch.empty(0, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("constants", constants)
        self.register_buffer("of_constants", of_constants)

    def forward(self, x: Tensor) -> Tensor:
        """Compute […, in] → […, out]."""
        out: Tensor = _Dequantized.apply(x, self.weight, self.out_features)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Dequantized(torch.autograd.Function):
    """Product with dequantized weights. As in bitsandbytes, the backward pass dequantizes them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = out_features, x.shape[-1]
        return torch.matmul(x, x.new_empty(ctx.shape).t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad = grad_outputs[0]
        return torch.matmul(grad, grad.new_empty(ctx.shape)), None, None
