"""The learning rate as a function of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.sections.training import SchedulerConfig
from llmtrain.training.learning_rate import highest_scale, learning_rate_scale, warmup_steps

NAMES = ["cosine", "linear", "constant", "wsd"]


def scales(total: int, **keys: object) -> list[float]:
    config = SchedulerConfig.model_validate(keys)
    return [learning_rate_scale(config, step=step, total_steps=total) for step in range(total)]


@given(name=st.sampled_from(NAMES), total=st.integers(1, 300), warmup=st.integers(0, 400), floor=st.floats(0, 1))
def test_every_update_has_a_rate_between_floor_and_peak(name: str, total: int, warmup: int, floor: float) -> None:
    rates = scales(total, name=name, warmup_steps=warmup, min_lr_ratio=floor)
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert rates[0] > 0, "the first update must not be at rate 0"
    if name != "constant" and total > 1:
        assert rates[-1] == pytest.approx(floor, abs=1e-12)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    rates = scales(201, name="cosine", warmup_steps=0, min_lr_ratio=0.0)
    assert rates[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 100 / 201)))


def test_linear_falls_by_equal_steps() -> None:
    rates = scales(10, name="linear", warmup_steps=0, min_lr_ratio=0.0)
    assert rates == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_wsd_is_ten_eighty_ten_unless_told_otherwise() -> None:
    rates = scales(1000, name="wsd")
    assert rates[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert set(rates[100:900]) == {1.0}
    assert rates[900] < 1.0
    assert rates[949] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[-1] == pytest.approx(0.1)


def test_constant_stays_after_its_warm_up() -> None:
    assert scales(300, name="constant")[100:] == [1.0] * 200


@pytest.mark.parametrize(("keys", "expected"), [({}, 100), ({"warmup_steps": 7}, 7), ({"warmup_ratio": 0.03}, 30)])
def test_warm_up_is_100_steps_unless_told_otherwise(keys: dict[str, object], expected: int) -> None:
    assert warmup_steps(SchedulerConfig.model_validate(keys), total_steps=1000) == expected


@pytest.mark.parametrize(
    ("keys", "total", "expected"),
    [
        ({}, 120, 30),
        ({}, 400, 100),
        ({"warmup_steps": 100}, 120, 30),
        ({"warmup_steps": 4}, 24, 4),
        ({}, 4, 1),
        ({}, 3, 0),
        ({"warmup_ratio": 0.5}, 120, 60),
        ({"name": "wsd"}, 120, 12),
    ],
)
def test_a_warm_up_in_steps_is_at_most_a_quarter_of_the_run(keys: dict[str, object], total: int, expected: int) -> None:
    assert warmup_steps(SchedulerConfig.model_validate(keys), total_steps=total) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_one_step_makes_it_at_the_peak(name: str) -> None:
    assert scales(1, name=name, min_lr_ratio=0.0) == [1.0]
    assert scales(1, name=name, min_lr_ratio=0.0, warmup_steps=100) == [1.0]


@given(name=st.sampled_from(NAMES), total=st.integers(1, 300), warmup=st.none() | st.integers(0, 400))
def test_the_highest_rate_is_that_of_the_run(name: str, total: int, warmup: int | None) -> None:
    config = SchedulerConfig.model_validate({"name": name, "warmup_steps": warmup})
    rates = scales(total, name=name, warmup_steps=warmup)
    assert highest_scale(config, total_steps=total) == max(rates)
