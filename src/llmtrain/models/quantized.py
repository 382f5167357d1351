"""What weights become in 4 or 8 bits, computed on any machine: the values that a quantized base model really has.

The arithmetic is bitsandbytes' own. Loading a model in so few bits is in `huggingface_load`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.models.lora import is_linear


@torch.no_grad()
def round_as_quantized(network: Any, quantization: str) -> None:
    """Give every weight of `network`, a model of transformers, the value that it has when loaded in `quantization`.

    As there, that is the weights of all linear layers but the output. nf4 has double quantization, and comes back as
    bfloat16, in which such a base computes; int8 has a scale for each row. Raises ConfigError without bitsandbytes.
    """
    if quantization == "none":
        return
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"the base was trained on in {quantization}, and its weights in that are bitsandbytes' to compute: "
            "`pip install 'llmtrain[bnb]'`"
        )
    head = network.get_output_embeddings()
    for module in network.modules():
        if is_linear(module) and module is not head:
            _round(module, quantization)


def _round(layer: nn.Module, quantization: str) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # Conv1D, which GPT-2 has, keeps the matrix transposed; transformers turns it before it is quantized.
    transposed = type(layer).__name__ == "Conv1D"
    matrix = (weight.t() if transposed else weight).contiguous().to(torch.bfloat16)
    rounded = _nf4(matrix) if quantization == "nf4" else _int8(matrix)
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
