"""Weights in bfloat16 that are rounded from float32 masters, for a residual stream in bfloat16.

    float32 weights ─ narrow_weights ─┬─ bfloat16, with which the model computes, and which have the gradients
                                      └─ masters, which `NamedOptimizer` updates, and which are read and saved

A checkpoint is the same as without: its weights are the masters.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.resolve import Resolved
from llmtrain.distributed.strategy import SHARDING


def trains_narrow_weights(config: Config, resolved: Resolved) -> bool:
    """Return whether a run narrows its weights: on a GPU, if all weights of a model of transformers are trained.

    Under autocast alone, that model's embeddings would be float32, and with them the residual stream. Our decoder casts
    its stream itself, adapters are on frozen weights in bfloat16, and sharded parameters are gathered in bfloat16.
    """
    model = config.model
    return (
        isinstance(model, HuggingFaceConfig)
        and model.lora is None
        and model.dtype == "auto"
        and config.optimizer.master_weights
        and resolved.precision == "bf16-mixed"
        and resolved.device.startswith("cuda")
        and resolved.strategy not in SHARDING
    )


@torch.no_grad()
def narrow_weights(module: nn.Module, *, keep: Collection[str] = ()) -> dict[Tensor, Tensor]:
    """Round the trained float32 parameters of `module` to bfloat16, in place; return the master of each.

    Parameters stay the same objects, so tied ones stay tied. Those with a part of their name in `keep` stay float32.
    """
    masters: dict[Tensor, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32 and not set(name.split(".")) & set(keep):
            master = parameter.data
            parameter.data = master.bfloat16()
            masters[parameter] = master.requires_grad_()
    return masters
