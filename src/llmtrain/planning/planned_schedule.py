"""The number of steps of a plan, and how many tokens and epochs these are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from llmtrain.config.sections.schema import Config
from llmtrain.data.mixture import Mixture
from llmtrain.planning.planned_data import PlannedData
from llmtrain.training.schedule import NO_LIMIT, Epoch, Schedule, make_schedule, stage_items
from llmtrain.training.state import RunState
from llmtrain.training.time_limit import with_steps

ENDLESS = 2**62
"""Number of sequences in an epoch if it is not known."""


@dataclass(frozen=True, kw_only=True)
class PlannedSchedule:
    """A schedule and its length. None: not known."""

    schedule: Schedule
    steps: int | None
    tokens: int | None
    epochs: float | None
    tokens_per_step: int
    mixture: Mixture | None = None
    """The mixture that the data are, whose stages begin where this schedule says; None without one, or if unread."""


def planned_schedule(
    config: Config, data: PlannedData, *, data_parallel_size: int, tokens_per_sec: float | None, assumed: list[str]
) -> PlannedSchedule:
    """Return the schedule of `config` on `data_parallel_size` ranks; add a line to `assumed` for what is not known."""
    scheduled = partial(_schedule, config, data_parallel_size=data_parallel_size, tokens_per_sec=tokens_per_sec)
    schedule, training = scheduled(data, assumed=assumed), data.training
    if training is not None and training.mixture is not None and not training.mixture.is_settled:
        training = training.with_stages_at(stage_items(training.mixture.spec.stages, schedule))
        schedule = scheduled(dataclasses.replace(data, training=training), assumed=[])
    endless = schedule.total_steps >= min(NO_LIMIT, ENDLESS // schedule.batch_size // 2)
    return PlannedSchedule(
        schedule=schedule,
        steps=None if endless else schedule.total_steps,
        tokens=None if endless else round(schedule.end_item * data.tokens_per_item),
        epochs=None if endless or data.items_per_epoch is None else schedule.end_item / data.items_per_epoch,
        tokens_per_step=round(schedule.batch_size * data.tokens_per_item),
        mixture=training.mixture if training else None,
    )


def _schedule(
    config: Config, data: PlannedData, *, data_parallel_size: int, tokens_per_sec: float | None, assumed: list[str]
) -> Schedule:
    if data.items_per_epoch is None and config.trainer.max_epochs is not None:
        what = "rows" if config.data.name == "chat" else "shards"
        assumed.append(f"steps and tokens are not known: trainer.max_epochs needs the {what}")
    schedule = _without_time_limit(config, data, data_parallel_size=data_parallel_size)
    minutes = config.trainer.max_minutes
    if minutes is None:
        return schedule
    if tokens_per_sec is None:
        assumed.append("steps and tokens are not known: trainer.max_minutes needs the device's speed")
        return schedule
    fit = max(1, int(60 * minutes * tokens_per_sec / (schedule.batch_size * data.tokens_per_item)))
    if fit >= schedule.total_steps:
        return schedule
    assumed.append(
        "steps: as many as trainer.max_minutes allows at this speed, less set-up and evaluations; `train` measures it"
    )
    limited = config.model_copy(update={"trainer": with_steps(config.trainer, fit)})
    return _without_time_limit(limited, data, data_parallel_size=data_parallel_size)


def _without_time_limit(config: Config, data: PlannedData, *, data_parallel_size: int) -> Schedule:
    return make_schedule(
        config.trainer,
        config.scheduler,
        seed=config.run.seed,
        epoch=Epoch.of(
            config.data,
            data.items_per_epoch or ENDLESS,
            end_item=data.training.end_item if data.training else None,
        ),
        state=RunState(),
        world_size=data_parallel_size,
    )
