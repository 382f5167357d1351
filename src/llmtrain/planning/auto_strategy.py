"""Chooses the strategy of `auto` for a model by the memory of its training state (rules: distributed/strategy)."""

from __future__ import annotations

from torch import nn

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.distributed.strategy import SHARDING, SHARE_FOR_STATE, Choice, choose_strategy, reject_strategy
from llmtrain.errors import ConfigError
from llmtrain.planning.planned_data import planned_data, unread_data
from llmtrain.planning.planned_model import planned_model
from llmtrain.screen import counted


def strategy_for(config: Config, *, world_size: int, precision: str, memory_bytes: int) -> Choice:
    """Return the strategy of `config` for processes of `memory_bytes` each. Raises as `planned_model`."""
    data = planned_data(config, []) if isinstance(config.data, OwnDataConfig) else unread_data(config)
    module = planned_model(config, data, precision=precision, assumed=[]).module
    return strategy_for_model(config, module, world_size=world_size, precision=precision, memory_bytes=memory_bytes)


def strategy_for_model(
    config: Config, module: nn.Module, *, world_size: int, precision: str, memory_bytes: int
) -> Choice:
    """Return the strategy that `config` names or, if that is auto, the one that fits its model `module`.

    Raises ConfigError for a strategy that the model or `world_size` does not allow.
    """
    wanted = config.distributed.strategy
    if wanted == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but the plan is for {counted(world_size, 'process')}: set it to ddp "
            "or auto"
        )
    reject_strategy(config, strategy=wanted, world_size=world_size)
    if wanted != "auto":
        return Choice(wanted, "")
    if isinstance(config.model, HuggingFaceConfig) and config.model.quantization != "none" and world_size > 1:
        return Choice("ddp", f"weights in {config.model.quantization} are not sharded")
    kept = state_bytes(module, optimizer=config.optimizer, precision=precision)
    return choose_strategy(
        world_size=world_size,
        state_bytes=kept,
        memory_bytes=memory_bytes,
        replicate=config.distributed.replicate,
    )


def reduces_each_micro_batch(
    config: Config,
    module: nn.Module,
    *,
    strategy: str,
    precision: str,
    world_size: int,
    batch_size: int,
    memory_bytes: float,
) -> bool:
    """Return whether sharded gradients are summed over the ranks after each of a step's several micro-batches.

    That is so if full gradients, beside a shard of the training state, would take more of a process's `memory_bytes`
    than the state may take under ddp. Otherwise they are summed after the last one, which takes fewer exchanges.
    `batch_size` counts the sequences of a step.
    """
    tensor_parallel_size = config.distributed.tensor_parallel_size
    at_once = config.trainer.micro_batch_size * world_size // tensor_parallel_size
    if strategy not in SHARDING or batch_size <= at_once:
        return False
    full = sum(4 * parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    state = state_bytes(module, optimizer=config.optimizer, precision=precision)
    shard = state * config.distributed.replicate / world_size
    return shard + full / tensor_parallel_size > SHARE_FOR_STATE * memory_bytes


def state_bytes(model: nn.Module, *, optimizer: OptimizerConfig, precision: str) -> int:
    """Return the bytes of the weights, gradients and optimizer state of the full model."""
    moments = 2 if optimizer.name in ("adam", "adamw") else 1
    total = 0
    for parameter in model.parameters():
        width = 2 if precision == "bf16-true" else parameter.element_size()
        each = width
        if parameter.requires_grad:
            has_master = width == 2 and optimizer.master_weights
            each += width + (4 * (1 + moments) if has_master else width * moments)
        total += parameter.numel() * each
    return total
