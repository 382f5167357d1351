"""The memory that a config's training step is predicted to need, for `plan` and for a run that had too little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from llmtrain.config.schema import Config
from llmtrain.distributed.engine import CUTTING
from llmtrain.recipes.planning.planned import PlannedModel
from llmtrain.training.memory import StepMemory, cut, overhead, step_memory
from llmtrain.training.plan import Schedule


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Bytes at the peak of a step, on one rank."""

    step: StepMemory
    on_top: Mapping[str, int]
    """What the process holds besides a step's tensors."""

    @property
    def parts(self) -> dict[str, int]:
        """All of it, by what it is."""
        return {**{str(part): size for part, size in self.step.parts.items()}, **self.on_top}

    @property
    def peak_bytes(self) -> int:
        """All together."""
        return sum(self.parts.values())


def planned_memory(
    config: Config,
    model: PlannedModel,
    *,
    schedule: Schedule,
    documents_apart: bool,
    precision: str,
    compiled: bool,
    on_gpu: bool,
    world_size: int,
    strategy: str,
) -> PlannedMemory:
    """Run a step of `config` on tensors without storage. What a strategy cuts is shared out afterwards."""
    micro, dp_size = config.trainer.micro_batch_size, world_size // config.distributed.ranks_per_matrix
    num_micro_batches = schedule.batch_size // (micro * dp_size)
    memory_of = partial(
        step_memory,
        model.build,
        vocab_size=model.vocab_size,
        optimizer=config.optimizer,
        micro_batch_size=micro,
        seq_len=config.data.seq_len,
        num_micro_batches=num_micro_batches,
        documents=documents_apart,
        precision=precision,
        compiled=compiled,
        on_gpu=on_gpu,
    )
    checkpointing = config.trainer.activation_checkpointing
    step = memory_of(activation_checkpointing=checkpointing)
    if strategy in CUTTING:
        step = cut(step, model.module, ranks=world_size, precision=precision, num_micro_batches=num_micro_batches)
    recomputes = checkpointing and not (on_gpu or compiled)
    on_top = overhead(
        step,
        on_gpu=on_gpu,
        compiled=compiled,
        process_bytes=model.process_bytes,
        saves_on_the_way=_saves_on_the_way(schedule),
        kept_otherwise=memory_of(activation_checkpointing=False).transient if recomputes else None,
        num_blocks=model.num_blocks,
    )
    return PlannedMemory(step=step, on_top=on_top)


def _saves_on_the_way(schedule: Schedule) -> bool:
    save = schedule.save
    by_steps = save.every_steps is not None and save.every_steps < schedule.total_steps
    by_epochs = save.every_epochs is not None and save.every_epochs * schedule.items_per_epoch < schedule.end_item
    return by_steps or by_epochs or save.every_seconds is not None
