"""What weights become in 4 or 8 bits, computed on any machine: the values that a quantized base model really has.

The arithmetic is bitsandbytes' own. Loading a model in so few bits is in `huggingface_load`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError


class Quantized(NamedTuple):
    """How a base model is kept while adapters on it are trained."""

    kind: Literal["nf4", "int8"]
    dtype: torch.dtype = torch.bfloat16
    """What its weights were before, and what nf4 comes back as."""


@torch.no_grad()
def round_as_quantized(network: Any, quantized: Quantized) -> None:
    """Give every weight of `network`, a model of transformers in float32, the value that it has when so loaded.

    As there, that is the weights of all linear layers but the output. nf4 has double quantization, int8 a scale for
    each row. Raises ConfigError without bitsandbytes.
    """
    from llmtrain.models.lora import (
        is_linear,
    )  # it brings peft, which takes seconds, and not all who name a kind use it

    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"the base was trained on in {quantized.kind}, and its weights in that are bitsandbytes' to compute: "
            "`pip install 'llmtrain[bnb]'`"
        )
    head = network.get_output_embeddings()
    for module in network.modules():
        if is_linear(module) and module is not head:
            _round(module, quantized)


def _round(layer: nn.Module, quantized: Quantized) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # Conv1D, which GPT-2 has, keeps the matrix transposed; transformers turns it before it is quantized.
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
    """LLM.int8() (arXiv:2208.07339). What it does with outliers of the input changes no weight."""
    from bitsandbytes import functional

    stored, row_scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
    values: Tensor = functional.int8_vectorwise_dequant(stored, row_scales)
    return values
