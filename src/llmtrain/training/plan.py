"""How long a run is and how large its batches are, worked out from the config before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llmtrain.config.errors import ConfigError
from llmtrain.config.training import SchedulerConfig, TrainerConfig
from llmtrain.distributed.asked import global_batch_size
from llmtrain.tracking.metrics import VAL_LOSS
from llmtrain.training.cadence import Cadence, Due
from llmtrain.training.non_finite import Policy
from llmtrain.training.schedules import learning_rate_scale
from llmtrain.training.state import RunState

DEFAULT_MAX_STEPS = 10_000


@dataclass(frozen=True)
class Schedule:
    """How long the run is and what happens when; all in optimizer steps, but for the items."""

    total_steps: int
    end_item: int
    batch_size: int
    """Items of one step, over all ranks."""
    items_per_epoch: int
    log_every: int
    evaluate: Cadence | None
    """When the validation loss is measured, if there are such data."""
    ask: Cadence | None
    """When the model is asked questions, if it is."""
    save: Cadence
    patience: int | None
    """Evaluations in a row without a gain that end the run."""
    min_delta: float
    keep_best: str | None
    """The figure by which a checkpoint is the best."""
    stop_by: str
    """The figure that has to gain."""
    non_finite: Policy
    max_grad_norm: float | None
    seed: int
    learning_rate_scale: Callable[[int], float]
    """Step (from 0) → factor on the peak learning rate."""

    def evaluations_due(self, state: RunState, *, late: bool) -> Due:
        """When their cadences say so, by the state's numbers or the clock (`late`), and at the end; once a step."""
        ends = 0 < self.total_steps <= state.step
        validation = self.evaluate is not None and (late or ends or self._due(self.evaluate, state))
        questions = self.ask is not None and (ends or self._due(self.ask, state))
        return Due(validation and state.evaluated_step != state.step, questions and state.asked_step != state.step)

    def save_due(self, state: RunState, *, late: bool) -> bool:
        """When its cadence says so, by the state's numbers or the clock (`late`)."""
        return late or self._due(self.save, state)

    def is_over(self, state: RunState) -> bool:
        """Whether the last step is done, or the figure that early stopping watches gets no better."""
        gave_up = self.patience is not None and state.evaluations_without_gain >= self.patience
        return state.step >= self.total_steps or gave_up

    def next_items(self, state: RunState) -> range:
        """The items of the step after `state`, over all ranks."""
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
    seq_len: int,
    items_per_epoch: int,
    state: RunState,
    world_size: int,
    validates: bool = True,
    ask_every: int | None = None,
) -> Schedule:
    """The schedule of a run that stands at `state` (a new one at the start). Raises ConfigError if it cannot be.

    `validates`: whether there are validation data. `ask_every`: steps between two times that the model is asked.
    """
    batch_size = global_batch_size(trainer, world_size=world_size)
    if items_per_epoch < batch_size:
        raise ConfigError(
            f"the training data has {items_per_epoch} items of {seq_len} tokens, fewer than one batch of "
            f"{batch_size}: lower trainer.micro_batch_size, trainer.grad_accum_steps or data.seq_len, or add data"
        )
    if trainer.max_epochs is not None:
        end_item = math.ceil(trainer.max_epochs * items_per_epoch)
    elif trainer.max_tokens is not None:
        end_item = math.ceil(trainer.max_tokens / seq_len / batch_size) * batch_size
    else:
        end_item = state.item + ((trainer.max_steps or DEFAULT_MAX_STEPS) - state.step) * batch_size
    total_steps = state.step + math.ceil(max(0, end_item - state.item) / batch_size)
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
        learning_rate_scale=partial(_scale, scheduler=scheduler, total_steps=total_steps),
    )


def _scale(step: int, *, scheduler: SchedulerConfig, total_steps: int) -> float:
    return learning_rate_scale(scheduler, step=step, total_steps=total_steps)
