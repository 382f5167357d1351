"""What a config asks of several processes, and what can be refused before one of them is started. No torch.

The command that starts processes asks this with their number; each process asks some of it again, with what it finds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.schema import Config
from llmtrain.config.training import RendezvousConfig, TrainerConfig

KEY = "distributed.rendezvous"


def refuse_what_cannot_run(config: Config, *, world_size: int) -> None:
    """Raise ConfigError for what no machine could run in so many processes, which --nproc is to start."""
    strategy = config.distributed.strategy
    if strategy == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but {world_size} processes were asked for: set it to ddp or auto, or "
            "start one process"
        )
    if strategy != "auto":
        refuse_strategy(config, strategy=strategy, world_size=world_size)
    if world_size > 1 and config.run.device.startswith("cuda:"):
        raise ConfigError(
            f"run.device is {config.run.device}, one GPU, but {world_size} processes were asked for: set it to cuda, "
            "and each takes its own"
        )
    refuse_backend(config.distributed.backend, device=config.run.device)
    global_batch_size(config.trainer, world_size=world_size // config.distributed.ranks_per_matrix)
    _refuse_numbers(config.distributed.rendezvous)


def refuse_strategy(config: Config, *, strategy: str, world_size: int) -> None:
    """Raise ConfigError for what cannot be computed under a strategy that cuts or splits parameters."""
    if strategy not in ("fsdp", "fsdp_tp"):
        return
    key = f"distributed.strategy is {strategy}"
    model = config.model
    if isinstance(model, HuggingFaceConfig) and model.quantization != "none":
        raise ConfigError(
            f"{key}, but model.quantization is {model.quantization}, and weights in so few bits are not cut: set one "
            "of them to none or ddp"
        )
    if strategy == "fsdp_tp":
        _refuse_split(config, size=config.distributed.ranks_per_matrix, world_size=world_size)


def _refuse_split(config: Config, *, size: int, world_size: int) -> None:
    key, model = "distributed.strategy is fsdp_tp", config.model
    if world_size % size:
        raise ConfigError(
            f"distributed.tensor_parallel {size} does not divide the {world_size} processes: start a multiple of {size}"
        )
    if model.lora is not None and model.lora.dora:
        raise ConfigError(
            f"{key}, but model.lora.dora is true, which needs whole matrices: set it to false, or take fsdp"
        )
    if isinstance(model, HuggingFaceConfig):
        refuse_uneven(_numbers_of(Path(model.path).expanduser() / "config.json"), size=size)
        return
    if model.init_from is None:  # else the numbers are the other model's, which is looked at later
        refuse_uneven(
            {
                "model.attention.num_heads": model.attention.num_heads,
                "model.attention.num_kv_heads": model.attention.kv_heads,
                "model.ffn.d_ff": model.d_ff,
            },
            size=size,
        )


def refuse_uneven(numbers: Mapping[str, int], *, size: int) -> None:
    """Raise ConfigError if one of a model's numbers, by their names, cannot be shared by `size` ranks."""
    for name, number in numbers.items():
        if number % size:
            raise ConfigError(
                f"distributed.tensor_parallel is {size}, but {name} is {number}, which is not divisible by it: take "
                "another size, or strategy fsdp"
            )


def _numbers_of(file: Path) -> dict[str, int]:
    """What a model's config.json says of heads and widths; nothing if it is not here yet."""
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        described = described.get("text_config", described)
        names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        return {f"{name} in {file}": int(described[name]) for name in names if described.get(name)}
    except (OSError, ValueError, AttributeError):
        return {}


def refuse_backend(backend: str, *, device: str) -> None:
    """Raise ConfigError if `backend` does not carry tensors of `device`; `auto` for either is decided later."""
    if "auto" not in (backend, device) and (backend == "nccl") != device.startswith("cuda"):
        raise ConfigError(f"distributed.backend {backend} does not work on {device}: use auto")


def global_batch_size(trainer: TrainerConfig, *, world_size: int) -> int:
    """Sequences of one optimizer step over all ranks. Raises ConfigError if the keys contradict each other."""
    micro, accumulation, wanted = trainer.micro_batch_size, trainer.grad_accum_steps, trainer.global_batch_size
    if wanted is None:
        return micro * (accumulation or 1) * world_size
    if accumulation is not None and micro * accumulation * world_size != wanted:
        raise ConfigError(
            f"trainer.global_batch_size is {wanted}, but micro_batch_size {micro} × grad_accum_steps {accumulation} × "
            f"{world_size} ranks is {micro * accumulation * world_size}: remove one of the keys or make them agree"
        )
    if wanted % (micro * world_size):
        at_once = micro * world_size
        nearest = max(at_once, round(wanted / at_once) * at_once)
        raise ConfigError(
            f"trainer.global_batch_size {wanted} is not divisible by micro_batch_size {micro} × {world_size} ranks: "
            f"make it {nearest}, or change micro_batch_size"
        )
    return wanted


def address_of(config: RendezvousConfig, *, given: str | None) -> str | None:
    """HOST:PORT of the first machine for --nnodes: `given` (--rendezvous), else what the config says, else None."""
    if config.master_addr is None and config.master_port is None:
        return given
    host, port = config.master_addr, config.master_port
    if host is None or port is None:
        there, missing = ("master_port", "master_addr") if host is None else ("master_addr", "master_port")
        raise ConfigError(f"{KEY}.{there} needs {KEY}.{missing} beside it")
    refuse_difference(f"{KEY}.master_addr:master_port", f"{host}:{port}", "--rendezvous", given)
    return f"{host}:{port}"


def refuse_difference(one: str, value: str, other: str, other_value: str | None) -> None:
    """Raise ConfigError if two places say different things."""
    if other_value is not None and other_value != value:
        raise ConfigError(f"{one} says {value}, but {other} says {other_value}: remove one of them, or make them agree")


def _refuse_numbers(config: RendezvousConfig) -> None:
    for key in ("init_method", "rank", "world_size", "local_rank"):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"{KEY}.{key} is {getattr(config, key)}, but --nproc starts the processes and numbers them itself: "
                "leave one of them out"
            )
