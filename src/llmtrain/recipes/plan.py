"""`plan`: what a run would be, without running it. Needs no GPU, no weights, and no data where sizes are known.

    config ─▶ device, model, data ─▶ parameters, FLOPs ─▶ steps, tokens ─▶ memory of a step ─▶ time

What had to be assumed is said. The device is in `plan_target`, model and data in `planned`, memory in
`planned_memory`.
"""

from __future__ import annotations

import os
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import Config
from llmtrain.distributed.asked import refuse_strategy
from llmtrain.distributed.engine import CUTTING
from llmtrain.distributed.strategy import Choice
from llmtrain.recipes.planning.memory import planned_memory
from llmtrain.recipes.planning.planned import PlannedData, PlannedModel, choice_for, planned_data, planned_model
from llmtrain.recipes.planning.target import Target, target_of
from llmtrain.recipes.run.trained import with_model_found
from llmtrain.training.memory import CUDA_CONTEXT_BYTES, parameters_by_part
from llmtrain.training.plan import Schedule, make_schedule
from llmtrain.training.state import RunState

ENDLESS = 2**62


def plan(config: Config, *, device: str | None = None, num_ranks: int | None = None) -> dict[str, Any]:
    """What `config` would train, as plain values. Raises ConfigError for a device or a model that is not known.

    `device`: a name of GPUS, cpu, or this (the machine's own, as `train` would take it). `num_ranks`: processes, one a
    device; those of torchrun's environment when not given.
    """
    world_size = num_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    assumed: list[str] = []
    config = with_model_found(config)
    target = target_of(config, device or "this", assumed)
    data = planned_data(config, assumed)
    model = planned_model(config, data, precision=target.precision, assumed=assumed)
    each = target.memory_bytes if target.on_gpu else target.memory_bytes // world_size
    choice = _strategy(config, model, target, world_size=world_size, memory_bytes=each)
    dp_size = world_size // config.distributed.ranks_per_matrix
    schedule = _schedule(config, data, dp_size=dp_size, assumed=assumed)

    seq_len, micro = config.data.seq_len, config.trainer.micro_batch_size
    memory = planned_memory(
        config,
        model,
        schedule=schedule,
        documents_apart=data.documents_apart,
        precision=target.precision,
        compiled=target.compiled,
        on_gpu=target.on_gpu,
        world_size=world_size,
        strategy=choice.strategy,
    )
    if choice.strategy in CUTTING:
        assumed.append(f"memory under {choice.strategy}: worked out from that of one process, not measured")
    flops_per_token = model.module.flops_per_token(seq_len)
    steps = None if schedule.total_steps > ENDLESS // schedule.batch_size // 2 else schedule.total_steps
    tokens = None if steps is None else round(schedule.end_item * data.tokens_per_item)
    epochs = None if data.items_per_epoch is None or steps is None else schedule.end_item / data.items_per_epoch
    return {
        "model": {"name": config.model.name, "vocab_size": model.vocab_size},
        "parameters": {
            **parameters_by_part(model.module),
            "total": sum(parameter.numel() for parameter in model.module.parameters()),
            "trainable": sum(parameter.numel() for parameter in model.module.parameters() if parameter.requires_grad),
            "non_embedding": model.module.num_parameters(non_embedding=True),
        },
        "flops_per_token": flops_per_token,
        "flops": None if tokens is None else flops_per_token * tokens,
        "run": {
            "steps": steps,
            "tokens": tokens,
            "supervised_share": data.supervised_share,
            "tokens_per_step": round(schedule.batch_size * data.tokens_per_item),
            "items_per_epoch": data.items_per_epoch,
            "epochs": epochs,
        },
        "layout": {
            "ranks": world_size,
            "strategy": choice.strategy,
            "because": choice.because,
            "tensor_parallel": config.distributed.ranks_per_matrix,
            "micro_batch_size": micro,
            "grad_accum_steps": schedule.batch_size // (micro * dp_size),
            "batch_size": schedule.batch_size,
            "seq_len": seq_len,
            "precision": target.precision,
            "compile": target.compiled,
            "activation_checkpointing": config.trainer.activation_checkpointing,
        },
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "parts": memory.parts,
            "device_bytes": each,
            "fits": memory.peak_bytes + (CUDA_CONTEXT_BYTES if target.on_gpu else 0) < each,
        },
        "time": _time(target, flops_per_token=flops_per_token, tokens=tokens, world_size=world_size),
        "assumed": assumed,
    }


def _time(target: Target, *, flops_per_token: int, tokens: int | None, world_size: int) -> dict[str, Any]:
    share = target.utilisation
    speed = None if target.flops is None else target.flops * share * world_size / flops_per_token
    return {
        "device": target.name,
        "flops_per_sec": target.flops,
        "assumed_utilisation": share,
        "tokens_per_sec": speed,
        "seconds": None if speed is None or tokens is None else tokens / speed,
    }


def _schedule(config: Config, data: PlannedData, *, dp_size: int, assumed: list[str]) -> Schedule:
    if data.items_per_epoch is None and config.trainer.max_epochs is not None:
        what = "rows" if config.data.name == "chat" else "shards"
        assumed.append(f"steps and tokens are not known: trainer.max_epochs needs the {what}")
    return make_schedule(
        config.trainer,
        config.scheduler,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        items_per_epoch=data.items_per_epoch or ENDLESS,
        state=RunState(),
        world_size=dp_size,
    )


def _strategy(config: Config, model: PlannedModel, target: Target, *, world_size: int, memory_bytes: int) -> Choice:
    """For processes of `memory_bytes` each. Raises ConfigError for what so many cannot run."""
    wanted = config.distributed.strategy
    if wanted == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but the plan is for {world_size} processes: set it to ddp or auto"
        )
    refuse_strategy(config, strategy=wanted, world_size=world_size)
    if wanted != "auto":
        return Choice(wanted, "")
    return choice_for(
        config, model.module, world_size=world_size, precision=target.precision, memory_bytes=memory_bytes
    )
