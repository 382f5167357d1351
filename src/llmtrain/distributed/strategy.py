"""Strategies for several processes: which one `auto` chooses, and whether a config can use one. No torch.

    one process                                    single
    weights, gradients, optimizer state fit        ddp    every process holds the full model
    they do not fit                                fsdp   each process holds a shard, of as many replicas as configured

`auto` never chooses tensor parallelism (fsdp_tp), which pays only if links are fast and the batch is too small for data
parallelism alone. The command that starts processes makes these checks with their number. Each process makes some of
them again with the machine's facts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import TrainerConfig
from llmtrain.distributed.rendezvous import reject_identity
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

SHARDING = frozenset({"fsdp", "fsdp_tp"})
"""Strategies under which each rank holds a shard of the parameters."""

SHARE_FOR_STATE = 0.6
"""Share of a process's memory that weights, gradients and optimizer state may take under ddp. The rest is for
activations, logits, gradient buckets and fragmentation."""


@dataclass(frozen=True)
class Choice:
    """A strategy, and the reason for it as a phrase."""

    strategy: str
    because: str


def choose_strategy(*, world_size: int, state_bytes: int, memory_bytes: int, replicate: int = 1) -> Choice:
    """Choose a strategy for `world_size` processes of `memory_bytes` each, which hold `replicate` replicas of shards.

    `state_bytes` is what training keeps for the full model: weights, gradients and optimizer state.
    """
    if world_size == 1:
        return Choice("single", "one process")
    state = f"weights, gradients and optimizer state take {_size(state_bytes)}"
    if state_bytes <= SHARE_FOR_STATE * memory_bytes:
        return Choice("ddp", f"{state}, which fit into the {_size(memory_bytes)} of each process")
    of_each = state_bytes * replicate // world_size
    shard = f"each of {counted(world_size, 'process')} holds {_size(of_each)}"
    return Choice("fsdp", f"{state}, over {SHARE_FOR_STATE:.0%} of the {_size(memory_bytes)} of a process: {shard}")


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e6:.3g} MB"


# -- what a config can run under --------------------------------------------------------------------------------------


def reject_what_cannot_run(config: Config, *, world_size: int) -> None:
    """Raise ConfigError if no machine could run `config` in `world_size` processes, before they are started."""
    strategy = config.distributed.strategy
    if strategy == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but {world_size} processes were requested: set it to ddp or auto, or "
            "start one process"
        )
    if strategy != "auto":
        reject_strategy(config, strategy=strategy, world_size=world_size)
    if world_size > 1 and config.run.device.startswith("cuda:"):
        raise ConfigError(
            f"run.device is {config.run.device}, one GPU, but {world_size} processes were requested: set it to cuda, "
            "so that each process uses its own"
        )
    reject_backend(config.distributed.backend, device=config.run.device)
    global_batch_size(config.trainer, world_size=world_size // config.distributed.tensor_parallel_size)
    reject_identity(config.distributed.rendezvous)


def reject_strategy(config: Config, *, strategy: str, world_size: int) -> None:
    """Raise ConfigError if a strategy that shards or splits parameters does not fit the model or the processes."""
    if strategy not in SHARDING:
        return
    key = f"distributed.strategy is {strategy}"
    model = config.model
    if isinstance(model, HuggingFaceConfig) and model.quantization != "none":
        raise ConfigError(
            f"{key}, but model.quantization is {model.quantization}, and quantized weights are not sharded: set "
            "model.quantization=none or distributed.strategy=ddp"
        )
    tensor_parallel, replicate = config.distributed.tensor_parallel_size, config.distributed.replicate
    if strategy == "fsdp_tp":
        _reject_tensor_parallel(config, size=tensor_parallel, world_size=world_size)
    if (groups := world_size // tensor_parallel) % replicate:
        of = counted(groups, "process")
        if tensor_parallel > 1:
            of = f"{counted(groups, 'group')} of processes that share a matrix"
        raise ConfigError(
            f"distributed.replicate is {replicate}, which does not divide the {of}: set it to the number of machines"
        )


def _reject_tensor_parallel(config: Config, *, size: int, world_size: int) -> None:
    key, model = "distributed.strategy is fsdp_tp", config.model
    if world_size % size:
        raise ConfigError(
            f"distributed.tensor_parallel is {size}, which does not divide the {counted(world_size, 'process')}: "
            f"start a multiple of {size}"
        )
    if isinstance(model, OwnModelConfig):
        raise ConfigError(f"{key}, but {model.name} does not say how its matrices are split: use fsdp")
    if model.lora is not None and model.lora.dora:
        raise ConfigError(
            f"{key}, but model.lora.dora is true, which needs full matrices: set it to false, or use fsdp"
        )
    if isinstance(model, HuggingFaceConfig):
        reject_uneven(_sizes_in(Path(model.path).expanduser() / "config.json"), size=size)
        return
    if model.init_from is None:  # else the sizes are those of the initial model, which is read later
        reject_uneven(
            {
                "model.attention.num_heads": model.attention.num_heads,
                "model.attention.num_kv_heads": model.attention.kv_heads,
                "model.ffn.d_ff": model.d_ff,
            },
            size=size,
        )


def reject_uneven(numbers: Mapping[str, int], *, size: int) -> None:
    """Raise ConfigError if `size` does not divide one of the model's numbers (of heads, of features), given by name."""
    for name, number in numbers.items():
        if number % size:
            raise ConfigError(
                f"distributed.tensor_parallel is {size}, but {name} is {number}, which is not divisible by it: use "
                "another size, or distributed.strategy=fsdp"
            )


def _sizes_in(file: Path) -> dict[str, int]:
    """Return the numbers of heads and features in a model's config.json; nothing if the file cannot be read yet."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        return {f"{name} in {file}": int(config[name]) for name in names if config.get(name)}
    except (OSError, ValueError, AttributeError):
        return {}


def reject_backend(backend: str, *, device: str) -> None:
    """Raise ConfigError if `backend` cannot exchange tensors of `device`. If either is `auto`, accept it."""
    if "auto" not in (backend, device) and (backend == "nccl") != device.startswith("cuda"):
        raise ConfigError(f"distributed.backend is {backend}, which does not work on {device}: set it to auto")


def global_batch_size(trainer: TrainerConfig, *, world_size: int) -> int:
    """Return the number of sequences of one optimizer step over all ranks.

    Raises ConfigError if the keys of the batch size contradict each other.
    """
    micro, accumulation, requested = trainer.micro_batch_size, trainer.grad_accum_steps, trainer.global_batch_size
    if requested is None:
        return micro * (accumulation or 1) * world_size
    if accumulation is not None and micro * accumulation * world_size != requested:
        raise ConfigError(
            f"trainer.global_batch_size is {requested}, but micro_batch_size {micro} × grad_accum_steps {accumulation} "
            f"× {world_size} ranks is {micro * accumulation * world_size}: remove one of the keys, or make them agree"
        )
    if requested % (micro * world_size):
        at_once = micro * world_size
        nearest = max(at_once, round(requested / at_once) * at_once)
        raise ConfigError(
            f"trainer.global_batch_size is {requested}, which is not divisible by micro_batch_size {micro} × "
            f"{world_size} ranks: set it to {nearest}, or change micro_batch_size"
        )
    return requested
