"""`trainer.max_minutes`: how many steps fit into the time of a run, fixed before the first real step.

    steps with learning rate 0 on the first batches ─▶ seconds a step ─┐
    two batches of validation, once the questions ─▶ seconds of each ──┴─▶ number of steps

A schedule that ends on the clock would give another learning rate to each run, and to a resumed one. So the clock is
read here once; what the run then follows, and records in its config.yaml, is a number of steps.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from llmtrain.config.sections.training import TrainerConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.training.job import Job
from llmtrain.training.schedule import Schedule
from llmtrain.training.setup.build import schedule_of
from llmtrain.training.step import Learner, agree, compute_gradients, gradient_norm, update

log = logging.getLogger("llmtrain.schedule")

WARM_UP_STEPS = 2
"""The first step compiles, and the second still maps memory."""
MIN_STEPS, MAX_STEPS = 2, 20
MEASURED_SHARE = 0.03
"""Share of the time limit that the measured steps may take: the shorter a step, the more of them."""
MEASURED_BATCHES = 2
"""Batches of validation that are timed."""
RESERVE = 0.08
"""Share of the remaining time that is left free for saves and for steps that become slower.

On two virtual machines that did little else, steps of a run took 1.16 and 1.17 times as long as the measured ones."""


@dataclass(frozen=True)
class Speed:
    """Seconds that the parts of a run take on this machine."""

    step: float
    validation: float = 0.0
    """One evaluation on all of its batches."""
    questions: float = 0.0
    """One round of answers to the questions."""


SpeedCheck = Callable[[int, float], None]
"""Gets the number of steps that fit and the seconds of each, and raises ConfigError if that is too slow."""


def fix_number_of_steps(job: Job, *, began: float, check: SpeedCheck | None = None) -> None:
    """Put the number of steps that fit into trainer.max_minutes in its place, in config and schedule.

    `began`: start of the run, by `time.monotonic`. Raises ConfigError if not even one step fits, and what `check` does.
    """
    trainer, engine = job.config.trainer, job.engine
    if trainer.max_minutes is None:
        return
    steps = engine.resolved.max_steps  # of a run that goes on
    if steps is None:
        limit_sec = 60 * trainer.max_minutes
        speed = _measure_speed(job, limit_sec=limit_sec)
        spent_sec = engine.from_main(lambda: time.monotonic() - began)
        steps = steps_within(limit_sec - spent_sec, speed=speed, schedule=job.schedule)
        check_time(steps, minutes=trainer.max_minutes, spent_sec=spent_sec, speed=speed)
        message = "a step takes %.3g s, an evaluation %.3g s: %s steps fit into the rest of %g minutes"
        log.info(message, speed.step, speed.validation, f"{steps:,}", trainer.max_minutes)
        if check is not None:
            check(steps, speed.step)
        steps += job.state.step
    engine.resolved = dataclasses.replace(engine.resolved, max_steps=steps)
    fits = job.schedule.total_steps <= steps
    limited = trainer.model_copy(update={"max_minutes": None}) if fits else with_steps(trainer, steps)
    job.config = job.config.model_copy(update={"trainer": limited})
    job.schedule = schedule_of(job.config, job.data, job.state, engine)


def _measure_speed(job: Job, *, limit_sec: float) -> Speed:
    log.info("measuring the speed on steps that are thrown away")
    with closing(job.batches()) as batches:
        step = measure_step(job.learner, batches, limit_sec=limit_sec)
    if job.position.checkpoint is not None:
        job.load_tensors(job.position.checkpoint)  # measuring dropped the optimizer's state
    validation = questions = 0.0
    if job.data.validation is not None:
        num_batches = job.data.validation.num_batches(**job.evaluation_options())
        measured = min(num_batches, MEASURED_BATCHES)
        measure = partial(job.validate, max_batches=measured, before_batch=lambda: None)
        measure()  # compiles what has no gradients
        validation = timed(measure, engine=job.engine) * num_batches / measured
    if job.answers is not None:
        questions = timed(partial(job.answers.generate, before_batch=lambda: None), engine=job.engine)
    return Speed(step=step, validation=validation, questions=questions)


def measure_step(learner: Learner, batches: Iterator[list[Batch]], *, limit_sec: float) -> float:
    """Return the median seconds of a step over the first `batches`, and leave weights and optimizer as they were.

    The updates are made with learning rate 0, which moves no weight, and the optimizer's state is dropped at the end.
    A gradient that is not finite is not applied, since infinity times 0 is no number. All ranks call it together and
    return the first rank's time.
    """
    model, optimizer, engine = learner.model, learner.optimizer, learner.engine
    model.train()
    optimizer.set_lr_scale(0.0)
    seconds: list[float] = []
    try:
        for index, micro_batches in enumerate(batches):
            began = time.perf_counter()
            num_tokens = agree(micro_batches, engine=engine, stop_requested=False).num_tokens
            compute_gradients(model, micro_batches, engine=engine, num_tokens=num_tokens)
            norm = gradient_norm(optimizer)
            update(optimizer, grad_norm=norm, max_grad_norm=1.0)
            optimizer.zero_grad()
            float(norm)  # waits until a GPU has done the step
            if index >= WARM_UP_STEPS:
                seconds.append(time.perf_counter() - began)
            long_enough = len(seconds) >= MIN_STEPS and sum(seconds) >= MEASURED_SHARE * limit_sec
            if engine.from_main(lambda done=long_enough: done) or len(seconds) >= MAX_STEPS:  # type: ignore[misc]
                break
    finally:
        optimizer.drop_state()
    return engine.from_main(lambda: statistics.median(seconds or [time.perf_counter() - began]))


def timed(measure: Callable[[], object], *, engine: Engine) -> float:
    """Return the seconds that `measure` takes on the first rank. All ranks call it together."""
    began = time.perf_counter()
    measure()
    return engine.from_main(lambda: time.perf_counter() - began)


def steps_within(seconds: float, *, speed: Speed, schedule: Schedule) -> int:
    """Return how many steps fit into `seconds`, with the evaluations that `schedule` makes among them."""
    available = seconds * (1 - RESERVE)
    fits, too_many = 0, max(1, int(available / speed.step)) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _duration(middle, speed=speed, schedule=schedule, seconds=seconds) <= available:
            fits = middle
        else:
            too_many = middle
    return fits


def _duration(num_steps: int, *, speed: Speed, schedule: Schedule, seconds: float) -> float:
    items_per_step = schedule.batch_size / schedule.items_per_epoch
    total = num_steps * speed.step
    for cadence, each in ((schedule.evaluate, speed.validation), (schedule.ask, speed.questions)):
        if cadence is not None:
            total += each * cadence.times_within(num_steps, items_per_step=items_per_step, seconds=seconds)
    return total


def with_steps(trainer: TrainerConfig, num_steps: int) -> TrainerConfig:
    """Return `trainer` with a number of steps in place of its limits: what a run records, and a resumed run follows."""
    limits = {"max_steps": num_steps, "max_epochs": None, "max_tokens": None, "max_minutes": None}
    return trainer.model_copy(update=limits)


def check_time(num_steps: int, *, minutes: float, spent_sec: float, speed: Speed) -> None:
    """Raise ConfigError if not even one step fits."""
    if num_steps < 1:
        raise ConfigError(
            f"trainer.max_minutes is {minutes:g}, but {spent_sec / 60:.1f} minutes passed before the first step, and a "
            f"step takes {speed.step:.3g} s, an evaluation {speed.validation + speed.questions:.3g} s: raise "
            "trainer.max_minutes, or make the model, the batch or trainer.eval_steps smaller"
        )
