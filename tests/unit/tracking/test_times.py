from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.tracking.times import Activity, Spent, Throughput, Timings, Waiting


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def spend(times: Timings, clock: Clock, activity: Activity, seconds: float) -> None:
    with times.spent(activity):
        clock.now += seconds


def test_each_second_counts_once_and_goodput_is_the_share_of_steps() -> None:
    clock = Clock()
    times = Timings(clock=clock)
    clock.now += 1  # other
    spend(times, clock, "compile", 9)
    with times.spent("step"):
        clock.now += 20
        spend(times, clock, "data", 4)
        clock.now += 30
    spend(times, clock, "evaluation", 10)
    spend(times, clock, "saving", 6)

    summary = times.summary()

    expected = {"step": 50.0, "data": 4.0, "compile": 9.0, "evaluation": 10.0, "saving": 6.0, "other": 1.0}
    assert summary.seconds == expected
    assert (summary.wall_sec, summary.goodput, times.goodput()) == (80.0, 50 / 80, 50 / 80)
    assert times.training_seconds() == 55.0


def test_time_counts_when_a_block_fails_and_while_it_is_open() -> None:
    clock = Clock()
    times = Timings(clock=clock)

    def fail() -> None:
        with times.spent("evaluation"):
            clock.now += 3
            assert times.seconds("evaluation") == 3.0
            clock.now += 4
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    clock.now += 1

    assert times.summary().seconds["evaluation"] == 7.0
    assert times.summary().seconds["other"] == 1.0


def test_an_activity_that_does_not_exist_is_rejected() -> None:
    with pytest.raises(
        ValueError, match="'eval' is not an activity: use one of step, data, compile, evaluation, saving"
    ):
        Timings().spent("eval").__enter__()  # type: ignore[arg-type]


@given(st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=4), max_leaves=20), st.integers(0, 4))
def test_times_of_nested_blocks_add_up_to_the_wall_time(tree: object, first: int) -> None:
    clock = Clock()
    times = Timings(clock=clock)
    activities: list[Activity] = ["step", "data", "compile", "evaluation", "saving"]

    def walk(node: object, depth: int) -> None:
        if isinstance(node, int):
            clock.now += node
        elif isinstance(node, list):
            with times.spent(activities[(first + depth) % 5]):
                for child in node:
                    walk(child, depth + 1)

    walk(tree, 0)
    summary = times.summary()

    assert sum(summary.seconds.values()) == summary.wall_sec == clock.now - 1000.0
    assert min(summary.seconds.values()) >= 0


def test_tokens_per_second_leave_out_compiling_evaluating_and_saving() -> None:
    clock = Clock()
    times = Timings(clock=clock)
    throughput = Throughput(times)

    spend(times, clock, "compile", 60)
    throughput.add(4096)
    assert throughput.next_window() == {}
    assert throughput.tokens_per_sec() is None

    for _ in range(10):
        spend(times, clock, "data", 0.1)
        spend(times, clock, "step", 0.4)
        throughput.add(4096)
    assert throughput.next_window() == pytest.approx({"train/tokens_per_sec": 8192.0, "train/step_time_sec": 0.5})

    spend(times, clock, "evaluation", 30)
    spend(times, clock, "saving", 5)
    for _ in range(10):
        spend(times, clock, "step", 1.0)
        throughput.add(4096)
    assert throughput.next_window() == pytest.approx({"train/tokens_per_sec": 4096.0, "train/step_time_sec": 1.0})
    assert throughput.next_window() == {}
    assert throughput.tokens_per_sec() == pytest.approx(20 * 4096 / 15)


def test_a_step_that_compiles_again_does_not_change_the_speed() -> None:
    clock = Clock()
    times = Timings(clock=clock)
    throughput = Throughput(times)
    for step in range(10):
        spend(times, clock, "data", 0.25)
        spend(times, clock, "compile" if step == 5 else "step", 40.0 if step == 5 else 0.25)
        throughput.add(100)

    assert throughput.next_window() == pytest.approx({"train/tokens_per_sec": 200.0, "train/step_time_sec": 0.5})


def test_each_window_has_its_own_shares_of_waiting() -> None:
    clock = Clock()
    times = Timings(clock=clock)
    waiting = Waiting(times, advice={})
    spend(times, clock, "compile", 8)
    spend(times, clock, "step", 6)
    spend(times, clock, "data", 4)
    spend(times, clock, "saving", 2)
    first = waiting.next_window()
    spend(times, clock, "step", 20)
    second = waiting.next_window()

    assert first == {
        "perf/data_wait": 4 / 20,
        "perf/checkpoint_stall": 2 / 20,
        "perf/compile_sec": 8.0,
        "perf/goodput": 6 / 20,
    }
    assert second == {
        "perf/data_wait": 0.0,
        "perf/checkpoint_stall": 0.0,
        "perf/compile_sec": 8.0,
        "perf/goodput": 26 / 40,
    }


def test_too_much_waiting_is_one_line_that_says_what_to_change(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    times = Timings(clock=clock)
    waiting = Waiting(times, advice={"data": "raise data.num_workers (now 0)", "saving": "save less often"})
    spend(times, clock, "compile", 500)  # which is no training to be slow at
    for _ in range(20):
        spend(times, clock, "step", 6)
        spend(times, clock, "data", 3)
        spend(times, clock, "saving", 0.9)  # 9 %
        waiting.next_window()

    assert caplog.messages == ["waiting for data took 30 % of the time so far: raise data.num_workers (now 0)"]


def test_a_slow_beginning_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    times = Timings(clock=clock)
    waiting = Waiting(times, advice={"data": "raise data.num_workers (now 0)", "saving": "save less often"})
    spend(times, clock, "data", 10)
    spend(times, clock, "step", 15)
    waiting.next_window()
    spend(times, clock, "step", 100)
    waiting.next_window()

    assert caplog.messages == []


def test_a_resumed_run_adds_to_the_times_of_its_checkpoint() -> None:
    clock = Clock()
    times = Timings(clock=clock)
    throughput = Throughput(times)
    spend(times, clock, "step", 10)
    throughput.add(1000)
    clock.now += 2
    kept = throughput.add_to(Spent(times.summary().seconds))
    spend(times, clock, "step", 90)  # lost with the steps after the checkpoint

    again = Timings(before=kept.seconds, clock=clock)
    faster = Throughput(again, before=kept)
    spend(again, clock, "step", 10)
    faster.add(3000)

    assert again.summary().seconds == {
        **dict.fromkeys(("data", "compile", "evaluation", "saving"), 0.0),
        "step": 20.0,
        "other": 2.0,
    }
    assert (again.summary().wall_sec, again.goodput()) == (22.0, 20 / 22)
    assert faster.tokens_per_sec() == 4000 / 20
