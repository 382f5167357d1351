"""The rank that all others wait for is named once, and only if it is slow for long and the others lose by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain.training.stragglers import EVERY_STEPS, StragglerWatch, others_median

NAMED = "rank {} on here is slow, and all wait for it"


class Engine:
    """Rank 0's; what the other ranks take for a step is said by the test."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, num_ranks: int, *, tensor_parallel_size: int = 1, is_sharded: bool = False) -> None:
        self.world_size, self.is_sharded = num_ranks, is_sharded
        self.tensor_parallel_size = tensor_parallel_size
        self.data_parallel_size = num_ranks // tensor_parallel_size
        self.others_sec = [1.0] * (self.world_size - 1)
        self.num_exchanges = 0
        self.own_sec = 0.0

    def sum_floats(self, values: list[float]) -> list[float]:
        self.num_exchanges += 1
        self.own_sec = values[0]
        return [values[0], *self.others_sec]

    def gather(self, value: str) -> list[str]:
        return ["here"] * self.world_size


def make(num_ranks: int, **options: Any) -> tuple[StragglerWatch, Engine]:
    engine = Engine(num_ranks, **options)
    return StragglerWatch(torch.nn.Linear(2, 2), engine=engine), engine  # type: ignore[arg-type]


def go_on(watch: StragglerWatch, *, comparisons: int, first: int, own_sec: float = 1.0, step_sec: float = 2.0) -> int:
    """Steps up to the end of so many comparisons; the step after them."""
    end = (first // EVERY_STEPS + comparisons) * EVERY_STEPS
    for step in range(first, end + 1):
        watch.stepped(step, waited_sec=own_sec, seconds=step_sec)
    return end + 1


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_at_half_speed_is_named_once_within_50_steps(num_ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    watch, engine = make(num_ranks)
    engine.others_sec[-1] = 2.0
    step = go_on(watch, comparisons=2, first=1)
    assert step <= 50
    assert NAMED.format(num_ranks - 1) in caplog.text
    assert "takes 2 s a step, 2.0 times the 1 s of the others" in caplog.text
    go_on(watch, comparisons=5, first=step)
    assert len(caplog.records) == 1


def test_it_is_said_that_a_rank_is_fast_again_and_it_can_be_named_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    watch, engine = make(3)
    engine.others_sec = [2.0, 1.0]
    step = go_on(watch, comparisons=2, first=1)
    engine.others_sec = [1.3, 1.0]  # neither slow nor well
    step = go_on(watch, comparisons=3, first=step)
    engine.others_sec = [1.0, 1.0]
    step = go_on(watch, comparisons=3, first=step)
    engine.others_sec = [2.0, 1.0]
    go_on(watch, comparisons=2, first=step)
    said = [record.getMessage().split(",")[0] for record in caplog.records]
    assert said == ["rank 1 on here is slow", "rank 1 is as fast as the others again", "rank 1 on here is slow"]


def test_one_slow_comparison_is_no_straggler(caplog: pytest.LogCaptureFixture) -> None:
    watch, engine = make(2)
    step = 1
    for seconds in (2.0, 1.0, 3.0, 1.1):
        engine.others_sec = [seconds]
        step = go_on(watch, comparisons=1, first=step)
    assert caplog.text == ""


def test_what_costs_the_others_little_is_not_worth_naming(caplog: pytest.LogCaptureFixture) -> None:
    watch, engine = make(2)
    engine.others_sec = [2.0]
    go_on(watch, comparisons=5, first=1, step_sec=10.0)  # most of a step is the exchange of gradients
    assert caplog.text == ""


def test_ranks_that_share_matrices_are_named_as_one(caplog: pytest.LogCaptureFixture) -> None:
    watch, engine = make(4, tensor_parallel_size=2, is_sharded=True)
    engine.others_sec = [1.0, 1.0, 2.0]  # rank 0 waits for rank 1 in a layer, and that for rank 3 between two
    go_on(watch, comparisons=2, first=1, own_sec=2.0)
    assert caplog.text == ""
    engine.others_sec[1] = 2.0  # as rank 2 does in a layer
    go_on(watch, comparisons=2, first=31, own_sec=2.0)
    assert "one of the ranks 2 to 3 on here is slow" in caplog.text


@pytest.mark.parametrize(("num_ranks", "tensor_parallel_size"), [(1, 1), (2, 2)])
def test_where_there_is_nothing_to_compare_nothing_is_exchanged(num_ranks: int, tensor_parallel_size: int) -> None:
    watch, engine = make(num_ranks, tensor_parallel_size=tensor_parallel_size, is_sharded=tensor_parallel_size > 1)
    go_on(watch, comparisons=3, first=1)
    assert engine.num_exchanges == 0


def test_a_ranks_time_ends_with_its_own_last_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the backward pass, at whose end it waits for the others."""
    now = [0.0]
    monkeypatch.setattr("llmtrain.training.stragglers.time.perf_counter", lambda: now[0])
    engine = Engine(2)
    model = torch.nn.Linear(2, 1)
    watch = StragglerWatch(model, engine=engine)  # type: ignore[arg-type]
    watch.stepped(9, waited_sec=0.0, seconds=1.0)
    with watch.computing():
        for _ in range(2):  # micro-batches
            out = model(torch.ones(1, 2)).sum()
            now[0] += 5.0
            out.backward()
        now[0] += 100.0
    watch.stepped(10, waited_sec=0.25, seconds=110.25)
    assert engine.own_sec == 10.25


def test_the_median_leaves_the_rank_itself_out() -> None:
    assert others_median([1.0, 2.0, 9.0]) == [(0, 5.5), (1, 5.0), (2, 1.5)]
