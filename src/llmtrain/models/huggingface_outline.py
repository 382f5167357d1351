"""The model that `build_huggingface` would make, from its config.json alone: right in every shape, without a value.

    config.json ─ from_config, without storage ─ adapters ─ frozen weights in 4 or 8 bits ─▶ HuggingFaceModel

For `plan`, on the meta device or under FakeTensorMode. Needs neither weights nor bitsandbytes nor a GPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.models.huggingface import HuggingFaceModel
from llmtrain.models.huggingface_load import from_description, weights_dtype
from llmtrain.models.lora import add_lora, is_linear

BLOCK = 64
"""Weights in 4 bits that share a constant (bitsandbytes' default)."""
BLOCK_OF_CONSTANTS = 256
"""Such constants, in 8 bits themselves, that share one in float32: the double quantization of QLoRA."""


def outline_huggingface(
    config: HuggingFaceConfig, described: Any, *, precision: str, quantized: bool = True
) -> HuggingFaceModel:
    """`described` is the config of transformers, `precision` the resolved one of the trainer.

    Its forward takes on trust what is otherwise tried: that documents of a row can be kept apart, and that the output
    layer is as usual. `quantized=False` leaves weights whole, to count them. Raises ConfigError as `build_huggingface`
    does where the architecture is not known, or a LoRA target matches nothing.
    """
    attention = config.attn_implementation
    if attention is not None and "flash" in attention:
        attention = "sdpa"  # needs no other memory, and no package that is not here
    asked = config.model_copy(update={"attn_implementation": attention})
    network = from_description(asked, described, dtype=weights_dtype(config, precision=precision))
    head = network.get_output_embeddings()
    if config.lora is not None:
        network = add_lora(network, config.lora, base=config.path)
        if quantized and config.quantization != "none":
            _quantize(network, config.quantization, head=head)
    model = HuggingFaceModel(network)
    model.take_on_trust()
    return model


def _quantize(network: nn.Module, kind: Literal["nf4", "int8"], *, head: nn.Module) -> None:
    """Put an outline of a quantized layer in place of every frozen linear layer but the output."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if is_linear(layer) and layer is not head and not layer.weight.requires_grad:
                setattr(parent, name, _QuantizedLinear(layer, kind))


class _QuantizedLinear(nn.Module):
    """As large as bitsandbytes' Linear4bit or Linear8bitLt: the weights with their constants. Its values are none."""

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
        """[…, in] → […, out]."""
        out: Tensor = _Dequantized.apply(x, self.weight, self.out_features)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Dequantized(torch.autograd.Function):
    """A product with weights that are made for it, and made again for the backward pass, as in bitsandbytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = out_features, x.shape[-1]
        return torch.matmul(x, x.new_empty(ctx.shape).t())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        grad = grad_outputs[0]
        return torch.matmul(grad, grad.new_empty(ctx.shape)), None, None
