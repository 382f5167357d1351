"""Lets the linear layers of a model's blocks multiply in float8, by torchao.

    weight, input, gradient ─ each scaled by its largest value at that moment, cast ─▶ product in float8 ─▶ bfloat16

(Micikevicius et al. 2022, arXiv:2209.05433.) A layer keeps its parameters, their names and dtypes, so checkpoints,
optimizers and sharding do not know of it. Embeddings, the output layer, attention, norms and adapters stay in bfloat16.
"""

from __future__ import annotations

import logging

from torch import nn

from llmtrain.distributed.sharding import layers_of
from llmtrain.errors import ConfigError

log = logging.getLogger("llmtrain.model")

MULTIPLE = 16
"""Float8 kernels multiply matrices whose rows and columns are multiples of this number."""


def float8_layers(module: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of the blocks that can multiply in float8, without adapters, which are too narrow."""
    return [
        layer
        for block in layers_of(module)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
        and ".lora_" not in name
    ]


def use_float8(module: nn.Module) -> None:
    """Let the `float8_layers` of `module` multiply in float8, in place; call it before compiling and sharding.

    Raises ConfigError if there is no such layer.
    """
    from torchao.float8 import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    chosen = {id(layer) for layer in float8_layers(module)}
    if not chosen:
        raise ConfigError(
            "trainer.precision is fp8-mixed, but the model's blocks have no linear layer whose sizes are multiples of "
            f"{MULTIPLE}: set it to bf16-mixed"
        )
    # Padding is for the gradient of a weight, which sums over the tokens: these need not be a multiple of 16.
    config = Float8LinearConfig(pad_inner_dim=True)
    for block in layers_of(module):
        convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, _: id(layer) in chosen)
    others = sum(isinstance(layer, nn.Linear) for block in layers_of(module) for layer in block.modules()) - len(chosen)
    log.info("%d linear layers of the blocks multiply in float8, %d do not", len(chosen), others)


def flops_as_bf16(module: nn.Module, flops_per_token: int) -> int:
    """Return a token's FLOPs with those in float8 counted half, since they take half the time of the others.

    As in `flops_per_token`, a frozen weight counts 4 and not 6.
    """
    weights = [layer.weight for layer in float8_layers(module)]
    return flops_per_token - sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights) // 2
