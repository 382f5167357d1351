"""How many steps fit into a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.sections.training import SchedulerConfig, TrainerConfig
from llmtrain.errors import ConfigError
from llmtrain.training.schedule import Epoch, Schedule, make_schedule
from llmtrain.training.state import RunState
from llmtrain.training.time_limit import RESERVE, Speed, check_time, steps_within, with_steps

NO_EVALUATION: dict[str, object] = {"eval_every_steps": None}


def schedule_of(trainer: dict[str, object], *, items_per_epoch: int = 1000) -> Schedule:
    return make_schedule(
        TrainerConfig.model_validate({"max_minutes": 1, "micro_batch_size": 10, **trainer}),
        SchedulerConfig(),
        seed=1,
        epoch=Epoch(items_per_epoch, 32),
        state=RunState(),
        world_size=1,
        ask_every=7,
    )


@given(
    seconds=st.floats(0, 1e6),
    step=st.floats(1e-3, 1e3),
    validation=st.floats(0, 1e3),
    questions=st.floats(0, 1e3),
    every=st.sampled_from([{"eval_every_steps": 9}, {"eval_every_epochs": 2}, {"eval_every_seconds": 60.0}]),
)
def test_as_many_steps_as_fit_and_no_more(
    seconds: float, step: float, validation: float, questions: float, every: dict[str, object]
) -> None:
    schedule = schedule_of({**NO_EVALUATION, **every})
    speed = Speed(step=step, validation=validation, questions=questions)

    def duration(steps: int) -> float:
        assert schedule.evaluate is not None
        assert schedule.ask is not None
        evaluations = [
            cadence.times_within(steps, items_per_step=0.01, seconds=seconds) * each
            for cadence, each in ((schedule.evaluate, validation), (schedule.ask, questions))
        ]
        return steps * step + sum(evaluations)

    available = seconds * (1 - RESERVE)
    found = steps_within(seconds, speed=speed, schedule=schedule)
    assert found == 0 or duration(found) <= available
    assert duration(found + 1) > available


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ({"eval_every_steps": 10}, 6),
        ({"eval_every_steps": 50}, 2),
        ({"eval_every_steps": 30}, 2),
        ({"eval_every_steps": None}, 1),
        ({"eval_every_steps": None, "eval_every_epochs": 2}, 3),
        ({"eval_every_steps": None, "eval_every_seconds": 40.0}, 3),
    ],
)
def test_evaluations_are_counted_with_the_one_at_the_end(every: dict[str, object], expected: int) -> None:
    cadence = schedule_of(every).evaluate
    assert cadence is not None
    assert cadence.times_within(59, items_per_step=0.1, seconds=100) == expected


def test_a_run_without_other_limits_has_no_default_number_of_steps() -> None:
    assert schedule_of({}).total_steps > 10**9
    assert steps_within(10**6, speed=Speed(step=0.01), schedule=schedule_of(NO_EVALUATION)) > 90_000_000


def test_steps_take_the_place_of_every_limit() -> None:
    trainer = with_steps(TrainerConfig(max_tokens=7, max_minutes=3), 12)
    assert (trainer.max_steps, trainer.max_tokens, trainer.max_epochs, trainer.max_minutes) == (12, None, None, None)
    assert TrainerConfig.model_validate(trainer.model_dump()) == trainer


def test_a_time_too_short_names_what_took_it() -> None:
    check_time(1, minutes=2, spent_sec=60, speed=Speed(step=1))
    message = r"max_minutes is 2, but 1\.5 minutes passed .* a step takes 40 s, an evaluation 3 s"
    with pytest.raises(ConfigError, match=message):
        check_time(0, minutes=2, spent_sec=90, speed=Speed(step=40, validation=3))
