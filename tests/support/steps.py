"""Steps of a training on the CPU, without data, a run folder or a loop around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, SchedulerConfig, TrainerConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.training.cadence import NOT_LATE
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.schedule import Epoch, Schedule, make_schedule
from llmtrain.training.signals import StopSignal
from llmtrain.training.state import LossScale, RunState
from llmtrain.training.step import Learner, StepDone, take_step
from llmtrain.training.stragglers import StragglerWatch
from tests.support.tiny import random_batch

MICRO_BATCHES = 2


@dataclass
class TinyTraining:
    """A training without a run."""

    learner: Learner
    schedule: Schedule
    state: RunState

    def step(self, micro_batches: Sequence[Batch]) -> StepDone:
        """Take the next step."""
        items = self.schedule.next_items(self.state)
        done = take_step(
            self.learner,
            micro_batches,
            items,
            schedule=self.schedule,
            state=self.state,
            stop=StopSignal(),
            stragglers=StragglerWatch(self.learner.model, engine=self.learner.engine),
            late=NOT_LATE,
        )
        self.state.advance(items, num_tokens=done.num_read)
        return done


def micro_batches(step: int, **batch: Any) -> list[Batch]:
    """The batches of a step; `batch` as for `random_batch`."""
    seeds = range(MICRO_BATCHES * step, MICRO_BATCHES * (step + 1))
    return [as_loaded(random_batch(seed=seed, ignored_fraction=0.4, **batch)) for seed in seeds]


def as_loaded(batch: Batch) -> Batch:
    """The batch as the loader gives it, with the supervised positions and the bounds of documents."""
    batch["supervised"] = (batch["labels"] != IGNORE_INDEX).flatten().nonzero()[:, 0]
    if "document_ids" in batch:
        batch["cu_seqlens"] = torch.from_numpy(cu_seqlens(batch["document_ids"].numpy()))
    return batch


def tiny_training(model: nn.Module, *, strategy: str = "auto", precision: str = "32", **optimizer: Any) -> TinyTraining:
    """A training of `model` for three steps; `optimizer` are keys of the config's section."""
    trainer = TrainerConfig.model_validate(
        {"precision": precision, "compile": False, "max_steps": 3, "micro_batch_size": MICRO_BATCHES}
    )
    distributed = DistributedConfig.model_validate({"timeout_sec": 60, "strategy": strategy})
    engine = Engine(resolve(RunConfig(device="cpu"), trainer, distributed), distributed=distributed)
    wrapped = engine.setup(model.train())
    state = RunState(loss_scale=LossScale() if precision == "16-mixed" else None)
    return TinyTraining(
        Learner(
            wrapped,
            build_optimizer(OptimizerConfig.model_validate({"lr": 0.01, **optimizer}), model, bf16=False),
            engine,
        ),
        make_schedule(
            trainer,
            SchedulerConfig(),
            seed=0,
            epoch=Epoch(num_items=64, seq_len=16),
            state=state,
            world_size=engine.data_parallel_size,
        ),
        state,
    )
