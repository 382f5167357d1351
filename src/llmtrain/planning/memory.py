"""Predicts a process's memory at the peak of a step, for `plan` and for a run that was out of memory.

    tensors of a step (step_memory) ─ shared by the ranks ─ + what the process holds besides ─▶ bytes by part

On a CPU, the process also holds its own code and the fragmentation of its heap: see the constants below, which were
measured (docs/performance.md).
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from llmtrain.config.sections.schema import Config
from llmtrain.distributed.resolve import Resolved
from llmtrain.distributed.sharding import layers_of
from llmtrain.distributed.strategy import SHARDING
from llmtrain.errors import ConfigError
from llmtrain.import_path import what_failed
from llmtrain.models.own_model import OwnModel
from llmtrain.planning.planned_model import PlannedModel
from llmtrain.planning.step_memory import Step, StepMemory, step_memory
from llmtrain.training.optimizers import trains_narrow_weights
from llmtrain.training.schedule import Schedule

FRAGMENTATION_EAGER = 0.43
FRAGMENTATION_COMPILED = 0.15
"""Memory that the heap wastes, as a share of the size of the temporary tensors (glibc 2.36). A trace of addresses
showed that many tensors did not use the hole that one of the same size had just left. Compiled code has far fewer."""
FRAGMENTATION_RECOMPUTED = 0.87
"""The same for eager code with activation checkpointing, as a share of the geometric mean of the temporary tensors of
all blocks and of one block without checkpointing, since each block allocates and frees its tensors. Fitted to data."""
FIRST_STEP_BYTES = 30_000_000
COMPILER_BYTES = 120_000_000
"""Bytes by which a process grows when it first computes (code and buffers of libraries), and when it first compiles."""
CUDA_CONTEXT_BYTES = 600_000_000
"""Memory that torch does not count: driver, kernels, cuBLAS workspaces."""


def planned_memory(
    config: Config,
    model: PlannedModel,
    resolved: Resolved,
    *,
    world_size: int,
    schedule: Schedule,
    mask_documents: bool,
) -> dict[str, int]:
    """Return the bytes at the peak of a step of `config` on one rank, by part.

    The step is run on tensors without storage. Parts that the strategy shards are divided by the number of ranks
    afterwards. Raises ConfigError if the user's own model cannot be run on such tensors.
    """
    trainer = config.trainer
    data_parallel_size = world_size // config.distributed.tensor_parallel_size
    step = Step(
        optimizer=config.optimizer,
        micro_batch_size=trainer.micro_batch_size,
        seq_len=config.data.seq_len,
        num_micro_batches=-(-schedule.batch_size // (trainer.micro_batch_size * data_parallel_size)),
        mask_documents=mask_documents,
        narrow_weights=trains_narrow_weights(config, resolved),
        recomputed_blocks=resolved.recomputed_blocks or 0,
    )
    try:
        tensors = step_memory(model.trained, step, resolved)
    except Exception as error:
        if isinstance(error, ConfigError) or not isinstance(model.trained, OwnModel):
            raise
        raise ConfigError(
            f"model.name: {config.model.name} cannot be planned: its memory is measured with tensors without values, "
            f"and it fails on these ({what_failed(error)})"
        ) from error
    if resolved.strategy in SHARDING:
        accumulates = step.num_micro_batches > 1 and not resolved.reduce_each_micro_batch
        tensors = sharded(
            tensors,
            model.module,
            ranks=world_size // config.distributed.replicate,
            precision=resolved.precision,
            accumulates=accumulates,
        )
    on_gpu = resolved.device.startswith("cuda")
    transient_if_kept = None
    if step.recomputed_blocks and not (on_gpu or resolved.compile):
        keeping = replace(step, recomputed_blocks=0)
        transient_if_kept = step_memory(model.trained, keeping, resolved).transient
    besides = overhead(
        tensors,
        on_gpu=on_gpu,
        compiled=resolved.compile,
        process_bytes=model.process_bytes,
        saves_on_the_way=_saves_on_the_way(schedule),
        transient_if_kept=transient_if_kept,
        num_blocks=model.trained.num_blocks,
        recomputed_share=step.recomputed_blocks / model.trained.num_blocks,
    )
    return {**tensors.parts, **besides}


def sharded(step: StepMemory, model: nn.Module, *, ranks: int, precision: str, accumulates: bool = False) -> StepMemory:
    """Return the memory of each of `ranks` ranks if the parameters of `model` are sharded over them, layer by layer.

    With several replicas these are the ranks of one. Full at the same time are the parameters outside of the layers,
    those of the layer in use and of the next one, and the gradients of one of these. With `accumulates` all gradients
    are full: the ranks exchange them only after the last of several micro-batches.
    """
    width = 4 if precision == "32" else 2
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model)]
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(layers)
    largest = max(layers, default=0)
    shared = {"parameters", "optimizer_state"} | (set() if accumulates else {"gradients"})
    parts = {part: size // ranks if part in shared else size for part, size in step.parts.items()}
    parts["gathered"] = width * (rest + 2 * largest) + 4 * max(rest, largest)
    return replace(step, parts=parts, persistent=step.persistent // ranks)


def overhead(
    step: StepMemory,
    *,
    on_gpu: bool,
    compiled: bool,
    process_bytes: int,
    saves_on_the_way: bool,
    transient_if_kept: int | None = None,
    num_blocks: int = 1,
    recomputed_share: float = 1.0,
) -> dict[str, int]:
    """Return the bytes that a process holds besides a step's tensors, by part.

    `process_bytes`: resident memory of a process that has imported everything and computed nothing.
    `transient_if_kept`: with activation checkpointing, the bytes that `step.transient` would be without it;
    `recomputed_share` is the share of the `num_blocks` blocks that are computed again.
    `saves_on_the_way`: the run saves before its last step, so the copy for a checkpoint exists during the peak.
    """
    if on_gpu:
        return {}  # torch only counts tensors, and so does a run's summary
    fragmentation = step.transient * (FRAGMENTATION_COMPILED if compiled else FRAGMENTATION_EAGER)
    if transient_if_kept is not None and not compiled:
        of_all = FRAGMENTATION_RECOMPUTED * transient_if_kept / math.sqrt(num_blocks)
        fragmentation += recomputed_share * (of_all - fragmentation)
    parts = {
        "heap_holes": round(fragmentation),
        "process": process_bytes + FIRST_STEP_BYTES + (COMPILER_BYTES if compiled else 0),
    }
    at_the_end = max(0, 2 * step.persistent - step.total - parts["heap_holes"])
    snapshot = step.persistent if saves_on_the_way else at_the_end
    return parts | ({"checkpoint_copy": snapshot} if snapshot else {})


def _saves_on_the_way(schedule: Schedule) -> bool:
    save = schedule.save
    by_steps = save.every_steps is not None and save.every_steps < schedule.total_steps
    by_epochs = save.every_epochs is not None and save.every_epochs * schedule.items_per_epoch < schedule.end_item
    return by_steps or by_epochs or save.every_seconds is not None
