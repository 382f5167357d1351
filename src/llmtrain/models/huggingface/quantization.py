"""Rounds weights to the values that they have in 4 or 8 bits, on any machine, with bitsandbytes' own arithmetic.

`load` loads a model in 4 or 8 bits.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra


class Quantized(NamedTuple):
    """Storage of a base model while adapters on it are trained."""

    kind: Literal["nf4", "int8"]
    dtype: torch.dtype = torch.bfloat16
    """Dtype of the weights before they are quantized, and of nf4 weights after they are dequantized."""


def keep_stored_layout(network: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights in 4 bits in the first forward pass on a CPU with AVX512-BF16.

    Repacked weights have no backward pass, their scales are rounded to bfloat16, and a matrix whose number of columns
    is not a multiple of 64 raises an error.
    """
    for layer in network.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def round_as_quantized(network: Any, quantized: Quantized) -> None:
    """Round the weights of `network`, a model of transformers in float32, to the values of their quantized form.

    As when a model is loaded quantized, these are the weights of all linear layers except the output. nf4 has double
    quantization, int8 one scale for each row. Raises ConfigError without bitsandbytes.
    """
    from llmtrain.models.lora import is_linear  # here, since it imports peft, which takes seconds

    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"the adapter was trained on a base in {quantized.kind}, whose weights need bitsandbytes: "
            f"`{install_extra('bnb')}`"
        )
    head = network.get_output_embeddings()
    for module in network.modules():
        if is_linear(module) and module is not head:
            _round(module, quantized)


def _round(layer: nn.Module, quantized: Quantized) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # GPT-2's Conv1D keeps the matrix transposed; transformers transposes it before it is quantized.
    transposed = type(layer).__name__ == "Conv1D"
    matrix = (weight.t() if transposed else weight).contiguous().to(quantized.dtype)
    rounded = _nf4(matrix) if quantized.kind == "nf4" else _int8(matrix)
    weight.copy_(rounded.t() if transposed else rounded)


def _nf4(matrix: Tensor) -> Tensor:
    from bitsandbytes import functional

    stored, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    values: Tensor = functional.dequantize_4bit(stored, state)
    return values


def _int8(matrix: Tensor) -> Tensor:
    """Round as LLM.int8() does (arXiv:2208.07339). Its treatment of outliers in the input changes no weight."""
    from bitsandbytes import functional

    stored, row_scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
    values: Tensor = functional.int8_vectorwise_dequant(stored, row_scales)
    return values
