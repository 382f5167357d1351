"""Stages of a mixture: the items at which they begin, decided once for a run, before its first step.

    from_step, from_fraction ─▶ steps × items of a batch ─▶ items, which the run records

A batch may be larger when the run is resumed, and its steps more. The items stay, so that the order of the data does.
"""

from __future__ import annotations

import dataclasses

from llmtrain.training.job import Job
from llmtrain.training.schedule import stage_items
from llmtrain.training.setup.build import schedule_of


def fix_stages(job: Job) -> None:
    """Decide where the later stages of the mixture begin, or take what the run decided before.

    Data and schedule of the job follow. Raises ConfigError if they do not follow each other.
    """
    training, engine = job.data.training, job.engine
    if training.mixture is None or training.mixture.is_settled:
        return
    items = engine.resolved.stage_items or stage_items(training.mixture.spec.stages, job.schedule)
    engine.resolved = dataclasses.replace(engine.resolved, stage_items=items)
    job.data = dataclasses.replace(job.data, training=training.with_stages_at(items))
    job.schedule = schedule_of(job.config, job.data, job.state, engine)
