"""Choices that let a step fit into memory, and cost time: recomputed blocks, gradients summed after each micro-batch.

    trainer.activation_checkpointing ─┬─ none, selective, full ─────────────────────────┐
                                      └─ auto: memory of a step with no and with all blocks ─┴─▶ number of blocks

Models recompute in `checkpoint_blocks`; docs/decisions/0010-recomputation-by-blocks.md says why by blocks. When
gradients are summed is worked out in `auto_strategy`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import TrainerConfig
from llmtrain.distributed.resolve import Resolved
from llmtrain.planning.failed_allocation import available_memory

if TYPE_CHECKING:
    from llmtrain.planning.planned_model import PlannedModel
    from llmtrain.planning.step_memory import Trainable
    from llmtrain.training.schedule import Schedule
    from llmtrain.training.setup.trained import Trained
    from llmtrain.training.state import RunState
    from llmtrain.training.step import Learner

log = logging.getLogger("llmtrain.train")

MARGIN: Final = 0.95
"""Share of the memory that a step may be predicted to need, since predictions are a few percent off."""
Parts = dict[str, int]
"""Bytes by what holds them."""


class PlannableRun(Protocol):
    """Attributes of a run that decide the memory of its step; `training.job.Job` has them."""

    config: Config
    trained: Trained
    learner: Learner
    schedule: Schedule
    state: RunState
    process_bytes: int
    """Resident memory before the model was built."""


def blocks_of_mode(mode: str, model: Trainable) -> int:
    """Return the number of blocks of `model` that none, selective or full recomputes."""
    return {"none": 0, "selective": math.ceil(model.num_blocks / 2), "full": model.num_blocks}[mode]


def choose_recomputed_blocks(
    trainer: TrainerConfig, model: Trainable, predict: Callable[[int], int], *, available: float
) -> int:
    """Return the number of blocks of `model` to recompute.

    `predict` returns the bytes of a step that recomputes a number of blocks; `available` is how many a process can
    have. For auto it is called at most twice: the memory is convex in the number of blocks, since it is the largest of
    sums that each change by the same amount for each block. So the line between both ends is never below it.
    """
    if trainer.activation_checkpointing != "auto":
        return blocks_of_mode(trainer.activation_checkpointing, model)
    budget = trainer.memory_budget_gb
    limit = MARGIN * available if budget is None else budget * 1e9
    most = max(model.checkpointable)
    if most == 0 or (kept := predict(0)) <= limit:
        return 0
    if (recomputed := predict(most)) >= kept:
        return 0
    least = most if recomputed >= limit else math.ceil(most * (kept - limit) / (kept - recomputed))
    return next(count for count in model.checkpointable if count >= least)


def planned_choices(
    config: Config,
    model: PlannedModel,
    resolved: Resolved,
    *,
    world_size: int,
    schedule: Schedule,
    mask_documents: bool,
    available: int,
) -> tuple[Resolved, Parts]:
    """Return `resolved` with what a run of `config` would choose, and the bytes of its step by part."""
    from llmtrain.planning.auto_strategy import reduces_each_micro_batch
    from llmtrain.planning.memory import CUDA_CONTEXT_BYTES, planned_memory

    reduces = reduces_each_micro_batch(
        config,
        model.module,
        strategy=resolved.strategy,
        precision=resolved.precision,
        world_size=world_size,
        batch_size=schedule.batch_size,
        memory_bytes=available,
    )
    resolved = replace(resolved, reduce_each_micro_batch=reduces)
    predicted: dict[int, Parts] = {}

    def predict(count: int) -> int:
        chosen = replace(resolved, recomputed_blocks=count)
        predicted[count] = planned_memory(
            config, model, chosen, world_size=world_size, schedule=schedule, mask_documents=mask_documents
        )
        return sum(predicted[count].values()) + (CUDA_CONTEXT_BYTES if resolved.device.startswith("cuda") else 0)

    count = choose_recomputed_blocks(config.trainer, model.trained, predict, available=available)
    if count not in predicted:
        predict(count)
    return replace(resolved, recomputed_blocks=count), predicted[count]


def make_memory_choices(run: PlannableRun) -> None:
    """Choose, before the first step of a run, when gradients are summed and how many blocks are recomputed.

    It is a collective: the main process chooses by the memory of its device. A run that goes on keeps what was chosen.
    The choices are recorded in the engine, and the model is told. Raises ConfigError if the model cannot recompute
    them, or if its memory cannot be predicted.
    """
    trainer, engine, model = run.config.trainer, run.learner.engine, run.trained.module
    shared_by = 1 if engine.device.type == "cuda" else engine.local_world_size

    def predict(count: int) -> int:
        return sum(parts_of_run(run, run.config, replace(engine.resolved, recomputed_blocks=count)).values())

    def choose() -> int:
        available = available_memory(engine.device)[0] / shared_by
        return choose_recomputed_blocks(trainer, model, predict, available=available)

    if engine.is_sharded and engine.resolved.reduce_each_micro_batch is None:
        reduces = engine.from_main(partial(_reduces_each, run, total=available_memory(engine.device)[1] / shared_by))
        engine.resolved = replace(engine.resolved, reduce_each_micro_batch=reduces)
    count = engine.resolved.recomputed_blocks
    if trainer.activation_checkpointing != "auto":
        count = blocks_of_mode(trainer.activation_checkpointing, model)
    elif count is None:
        count = engine.from_main(choose)
        log.info("%d of %d blocks are recomputed in the backward pass, by the memory", count, model.num_blocks)
    engine.resolved = replace(engine.resolved, recomputed_blocks=count)
    if count:
        model.checkpoint_blocks(count)


def _reduces_each(run: PlannableRun, *, total: float) -> bool:
    from llmtrain.planning.auto_strategy import reduces_each_micro_batch

    engine = run.learner.engine
    reduces = reduces_each_micro_batch(
        run.config,
        run.trained.module,
        strategy=engine.resolved.strategy,
        precision=engine.resolved.precision,
        world_size=engine.world_size,
        batch_size=run.schedule.batch_size,
        memory_bytes=total,
    )
    if reduces:
        log.info("gradients are summed over the ranks after each micro-batch, since full ones do not fit")
    return reduces


def parts_of_run(run: PlannableRun, config: Config, resolved: Resolved) -> Parts:
    """Return the predicted bytes of a step of the run on this rank, with another config and other choices, by part.

    Most runs never need the prediction, so it is imported only here.
    """
    from llmtrain.planning.memory import CUDA_CONTEXT_BYTES, planned_memory
    from llmtrain.planning.planned_data import unread_data
    from llmtrain.planning.planned_model import planned_model

    engine = run.learner.engine
    data = unread_data(config, vocab_size=run.trained.module.vocab_size)
    model = planned_model(config, data, precision=resolved.precision, assumed=[])
    parts = planned_memory(
        config,
        replace(model, process_bytes=run.process_bytes),
        resolved,
        world_size=engine.world_size,
        schedule=run.schedule,
        mask_documents=data.mask_documents,
    )
    return parts | ({"CUDA": CUDA_CONTEXT_BYTES} if engine.device.type == "cuda" else {})
