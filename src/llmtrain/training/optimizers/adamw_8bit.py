"""AdamW with its state in 8 bits, blockwise (Dettmers et al. 2022, arXiv:2110.02861): bitsandbytes' own.

A quarter of the state's memory. Of tensors below 4,096 elements the state stays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch

from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.sharding import is_sharded
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra

MIN_SIZE = 4096
BLOCK = 256
"""Values of a state that share a constant."""
WHOLE_KEYS = frozenset({"step", "state1", "state2"})
BLOCK_KEYS = frozenset({"qmap1", "qmap2", "absmax1", "absmax2"})
"""Keys of an 8-bit state: the values that its 256 codes stand for, and the largest value of each block."""


def adamw_8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW8bit of parameter groups.

    Raises ConfigError where it is not installed, parameters are sharded, or it cannot run on their device, which is
    tried.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"optimizer.name adamw8bit needs bitsandbytes: `{install_extra('bnb')}`, or take adamw")
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(is_sharded(parameter) for parameter in parameters):
        raise ConfigError(
            "optimizer.name adamw8bit cannot update parameters that are sharded over ranks (fsdp): take adamw"
        )
    from bitsandbytes.optim import AdamW8bit

    device = parameters[0].device
    tried = torch.nn.Parameter(torch.zeros(MIN_SIZE, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        AdamW8bit([tried], lr=1.0).step()
    except Exception as error:  # what is not there for a device comes as errors of every kind
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"optimizer.name adamw8bit cannot run on {device.type} with this bitsandbytes ({first}): take adamw"
        ) from error
    made: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return made


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `adamw_8bit` made this optimizer."""
    return type(optimizer).__module__.startswith("bitsandbytes") or isinstance(optimizer, OutlineAdamW8bit)


class OutlineAdamW8bit(torch.optim.Optimizer):
    """Stand-in for plans, without bitsandbytes: as large as `adamw_8bit` after its first step, without values."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    continue
                small = parameter.numel() < MIN_SIZE
                dtype = torch.float32 if small else torch.uint8
                self.state[parameter] = {
                    key: torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
                    for key in ("state1", "state2")
                }
                if not small:
                    blocks = math.ceil(parameter.numel() / BLOCK)
                    self.state[parameter] |= {
                        key: torch.zeros(blocks, device=parameter.device) for key in ("absmax1", "absmax2")
                    }
