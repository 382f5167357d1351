"""Work out the length of a run and the size of its batches from the config, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import DataConfig
from llmtrain.config.sections.training import SchedulerConfig, TrainerConfig
from llmtrain.data.mixture import MixtureStage
from llmtrain.distributed.strategy import global_batch_size
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.tracking.metric_names import VAL_LOSS
from llmtrain.training.cadence import Cadence, Due
from llmtrain.training.learning_rate import learning_rate_scale, warmup_steps
from llmtrain.training.non_finite import Policy
from llmtrain.training.state import RunState

DEFAULT_MAX_STEPS = 10_000
NO_LIMIT = 2**40
"""Steps of a run that only time limits, until it is known how many fit."""


class Epoch(NamedTuple):
    """Once through the data."""

    num_items: int
    seq_len: int
    """Tokens of an item."""
    may_be_few: bool = False
    """Items that a person wrote, row by row: a batch is no larger than an epoch of them. Fewer windows of a text than
    a batch are a mistake in the config or in the data."""
    end_item: int | None = None
    """The item at which the data end, since every source is used up; None: they go on from epoch to epoch."""

    @classmethod
    def of(cls, data: DataConfig, num_items: int, *, end_item: int | None = None) -> Epoch:
        """Return an epoch of `num_items` items of these data."""
        return cls(num_items, data.seq_len, may_be_few=isinstance(data, ChatConfig), end_item=end_item)


@dataclass(frozen=True)
class Schedule:
    """Length of the run and the times of its events, all in optimizer steps except for the items."""

    total_steps: int
    end_item: int
    batch_size: int
    """Items of one step, over all ranks."""
    items_per_epoch: int
    log_every: int
    evaluate: Cadence | None
    """Cadence of the validation loss; None without validation data."""
    ask: Cadence | None
    """Cadence of the questions to the model; None if it is asked none."""
    save: Cadence
    patience: int | None
    """Evaluations in a row without a gain that end the run."""
    min_delta: float
    keep_best: str | None
    """The metric by which a checkpoint is the best."""
    stop_by: str
    """The metric that has to gain."""
    non_finite: Policy
    max_grad_norm: float | None
    seed: int
    warmup_steps: int
    learning_rate_scale: Callable[[int], float]
    """Step (from 0) → factor on the peak learning rate."""

    def evaluations_due(self, state: RunState, *, late: bool) -> Due:
        """Return the measurements due by state or clock (`late`), or since the run ends; call it once a step."""
        ends = 0 < self.total_steps <= state.step
        validation = self.evaluate is not None and (late or ends or self._due(self.evaluate, state))
        questions = self.ask is not None and (ends or self._due(self.ask, state))
        return Due(validation and state.evaluated_step != state.step, questions and state.asked_step != state.step)

    def save_due(self, state: RunState, *, late: bool) -> bool:
        """Return whether a save is due by the state or by the clock (`late`)."""
        return late or self._due(self.save, state)

    def is_over(self, state: RunState) -> bool:
        """Return whether the last step is done, or the metric that early stopping watches no longer improves."""
        gave_up = self.patience is not None and state.evaluations_without_gain >= self.patience
        return state.step >= self.total_steps or gave_up

    def next_items(self, state: RunState) -> range:
        """Return the items of the step after `state`, over all ranks."""
        return range(state.item, min(state.item + self.batch_size, self.end_item))

    def _due(self, cadence: Cadence, state: RunState) -> bool:
        return cadence.due(
            step=state.step, item=state.item, batch_size=self.batch_size, items_per_epoch=self.items_per_epoch
        )


def make_schedule(
    trainer: TrainerConfig,
    scheduler: SchedulerConfig,
    *,
    seed: int,
    epoch: Epoch,
    state: RunState,
    world_size: int,
    validates: bool = True,
    ask_every: int | None = None,
) -> Schedule:
    """Return the schedule of a run that stands at `state` (a new one at the start). Raises ConfigError if it cannot be.

    `validates`: whether there are validation data. `ask_every`: steps between two times that the model is asked.
    """
    batch_size = global_batch_size(trainer, world_size=world_size)
    items_per_epoch, seq_len = epoch.num_items, epoch.seq_len
    if epoch.may_be_few:
        batch_size = min(batch_size, items_per_epoch)
    if items_per_epoch < batch_size:
        raise ConfigError(
            f"the training data has {counted(items_per_epoch, 'sequence')} of {counted(seq_len, 'token')}, fewer "
            "than one batch of "
            f"{batch_size}: lower trainer.micro_batch_size, trainer.grad_accum_steps or data.seq_len, or add data"
        )
    end_item = _end_item(trainer, epoch, state, batch_size=batch_size)
    total_steps = state.step + math.ceil(max(0, end_item - state.item) / batch_size)
    warmup = warmup_steps(scheduler, total_steps=total_steps)
    if state.warmup_steps is not None and state.warmup_asked == warmup_asked(scheduler):
        warmup = state.warmup_steps  # a run that is made longer goes on with the rates that it has used
    return Schedule(
        total_steps=total_steps,
        end_item=end_item,
        batch_size=batch_size,
        items_per_epoch=items_per_epoch,
        log_every=trainer.log_every_steps,
        evaluate=Cadence(trainer.eval_every_steps, trainer.eval_every_epochs, trainer.eval_every_seconds)
        if validates
        else None,
        ask=None if ask_every is None else Cadence(ask_every),
        save=Cadence(trainer.save_every_steps, trainer.save_every_epochs, trainer.save_every_seconds),
        patience=trainer.early_stopping.patience if trainer.early_stopping else None,
        min_delta=trainer.early_stopping.min_delta if trainer.early_stopping else 0.0,
        keep_best=trainer.keep_best,
        stop_by=trainer.early_stopping.metric if trainer.early_stopping else VAL_LOSS,
        non_finite=trainer.non_finite,
        max_grad_norm=trainer.max_grad_norm,
        seed=seed,
        warmup_steps=warmup,
        learning_rate_scale=partial(_scale, scheduler=scheduler, total_steps=total_steps, warmup=warmup),
    )


def _end_item(trainer: TrainerConfig, epoch: Epoch, state: RunState, *, batch_size: int) -> int:
    """Return the item after the last one of a run: where its limit is reached, or where the data end before that."""
    if trainer.max_epochs is not None:
        end_item = math.ceil(trainer.max_epochs * epoch.num_items)
    elif trainer.max_tokens is not None:
        end_item = math.ceil(trainer.max_tokens / epoch.seq_len / batch_size) * batch_size
    else:
        is_limited = trainer.max_minutes is not None or epoch.end_item is not None
        steps = trainer.max_steps or (NO_LIMIT if is_limited else DEFAULT_MAX_STEPS)
        end_item = state.item + (steps - state.step) * batch_size
    return end_item if epoch.end_item is None else min(end_item, epoch.end_item)


def stage_items(stages: Sequence[MixtureStage], schedule: Schedule) -> tuple[int, ...]:
    """Return the items at which stages begin in a run of this schedule.

    Raises ConfigError if they do not follow each other.
    """
    steps = [0]
    for number, stage in enumerate(stages):
        begins = stage.from_step or max(1, round((stage.from_fraction or 0.0) * schedule.total_steps))
        if begins <= steps[-1]:
            raise ConfigError(
                f"data.mixture.stages[{number}] begins at step {begins:,}, but the stage before it at step "
                f"{steps[-1]:,}: let each stage begin after the one before it"
            )
        steps.append(begins)
    return tuple(step * schedule.batch_size for step in steps[1:])


def _scale(step: int, *, scheduler: SchedulerConfig, total_steps: int, warmup: int) -> float:
    return learning_rate_scale(scheduler, step=step, total_steps=total_steps, warmup=warmup)


def warmup_asked(scheduler: SchedulerConfig) -> list[Any]:
    """Return what of the config decides the steps of warm-up, besides the length of the run."""
    return [scheduler.name == "wsd", scheduler.warmup_ratio, scheduler.warmup_steps]
