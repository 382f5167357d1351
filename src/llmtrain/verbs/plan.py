"""`plan`: what a run would be, without running it. Needs no GPU, no weights, and no data where sizes are known.

    config ─▶ device, data, model ─▶ parameters, FLOPs ─▶ strategy ─▶ steps, tokens ─▶ memory of a step ─▶ time

What had to be assumed is said. Each part is worked out in planning/.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from llmtrain.config.sections.schema import Config
from llmtrain.data.mixture_report import changes_of, source_rows
from llmtrain.distributed.strategy import SHARDING, Choice
from llmtrain.models.float8 import flops_as_bf16
from llmtrain.planning.auto_strategy import strategy_for_model
from llmtrain.planning.memory import CUDA_CONTEXT_BYTES
from llmtrain.planning.memory_choices import planned_choices
from llmtrain.planning.parameter_counts import parameters_by_part
from llmtrain.planning.planned_data import planned_data
from llmtrain.planning.planned_model import PlannedModel, planned_model
from llmtrain.planning.planned_schedule import PlannedSchedule, planned_schedule
from llmtrain.planning.target import Target, find_target
from llmtrain.training.setup.initial_model import with_model_found


def plan(config: Config, *, device: str | None = None, num_ranks: int | None = None) -> dict[str, Any]:
    """Return what `config` would train, as plain values. Raises ConfigError for an unknown device or model.

    `device`: one of GPU_OPTIONS, cpu, or this (the machine's own, as `train` would take it). `num_ranks`: processes,
    one a device; those of torchrun's environment when not given.
    """
    world_size = num_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    assumed: list[str] = []
    config = with_model_found(config)
    target = find_target(config, device or "this", assumed)
    data = planned_data(config, assumed)
    model = planned_model(config, data, precision=target.precision, assumed=assumed)
    available = target.bytes_of_each(world_size)
    choice = strategy_for_model(
        config, model.module, world_size=world_size, precision=target.precision, memory_bytes=available
    )
    flops_per_token = model.module.flops_per_token(config.data.seq_len)
    effective_flops = flops_per_token
    if config.trainer.in_float8:
        effective_flops = flops_as_bf16(model.module, flops_per_token)
        share = 2 * (1 - effective_flops / flops_per_token)
        assumed.append(f"float8: {share:.0%} of the FLOPs take half the time, and as much memory as under bf16-mixed")
    speed = target.tokens_per_sec(effective_flops, world_size=world_size)
    data_parallel_size = world_size // config.distributed.tensor_parallel_size
    run = planned_schedule(config, data, data_parallel_size=data_parallel_size, tokens_per_sec=speed, assumed=assumed)
    resolved, parts = planned_choices(
        config,
        model,
        target.resolved(strategy=choice.strategy),
        world_size=world_size,
        schedule=run.schedule,
        mask_documents=data.mask_documents,
        available=available,
    )
    if choice.strategy in SHARDING:
        assumed.append(f"memory under {choice.strategy}: worked out from that of one process, not measured")
    return {
        "model": {"name": config.model.name, "vocab_size": model.vocab_size},
        "parameters": _parameters(model),
        "flops_per_token": flops_per_token,
        "flops": None if run.tokens is None else flops_per_token * run.tokens,
        "run": {
            "steps": run.steps,
            "tokens": run.tokens,
            "supervised_share": data.supervised_share,
            "tokens_per_step": run.tokens_per_step,
            "items_per_epoch": data.items_per_epoch,
            "epochs": run.epochs,
        },
        "mixture": _mixture(run),
        "layout": {
            **_layout(config, target, run, choice, world_size=world_size, data_parallel_size=data_parallel_size),
            "num_blocks": model.trained.num_blocks,
            "recomputed_blocks": resolved.recomputed_blocks,
            "reduce_each_micro_batch": resolved.reduce_each_micro_batch,
        },
        "memory": _memory(parts, target, available=available),
        "time": {
            "device": target.name,
            "flops_per_sec": target.flops,
            "assumed_utilisation": target.utilisation,
            "tokens_per_sec": speed,
            "seconds": None if speed is None or run.tokens is None else run.tokens / speed,
        },
        "assumed": assumed,
    }


def _parameters(model: PlannedModel) -> Mapping[str, int]:
    parameters, parts = list(model.module.parameters()), parameters_by_part(model.module)
    total = sum(parameter.numel() for parameter in parameters)
    return {
        **parts,
        "total": total,
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "non_embedding": total - parts["embedding"],
    }


def _mixture(run: PlannedSchedule) -> Mapping[str, Any] | None:
    """Describe the sources over the whole run, and where their shares change; None where there is no mixture."""
    if run.mixture is None:
        return None
    end = run.schedule.end_item if run.steps is not None else 0
    changes = [change for change in changes_of(run.mixture) if run.steps is None or change["sequence"] <= end]
    return {"sources": source_rows(run.mixture, end), "changes": changes}


def _layout(
    config: Config, target: Target, run: PlannedSchedule, choice: Choice, *, world_size: int, data_parallel_size: int
) -> Mapping[str, Any]:
    micro, batch_size = config.trainer.micro_batch_size, run.schedule.batch_size
    return {
        "ranks": world_size,
        "strategy": choice.strategy,
        "because": choice.because,
        "tensor_parallel": config.distributed.tensor_parallel_size,
        "replicas": config.distributed.replicate if choice.strategy in SHARDING else 1,
        "micro_batch_size": micro,
        "grad_accum_steps": -(-batch_size // (micro * data_parallel_size)),
        "batch_size": batch_size,
        "seq_len": config.data.seq_len,
        "precision": config.trainer.precision if config.trainer.in_float8 else target.precision,
        "compile": target.compiled,
        "activation_checkpointing": config.trainer.activation_checkpointing,
    }


def _memory(parts: Mapping[str, int], target: Target, *, available: int) -> Mapping[str, Any]:
    peak = sum(parts.values())
    return {
        "peak_bytes": peak,
        "parts": parts,
        "device_bytes": available,
        "fits": peak + (CUDA_CONTEXT_BYTES if target.on_gpu else 0) < available,
    }
