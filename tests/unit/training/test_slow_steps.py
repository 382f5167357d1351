"""Steps that became much slower than at the start are told once an episode, with what was measured meanwhile."""

from __future__ import annotations

import logging

import pytest

from llmtrain.distributed.limits import Throttling
from llmtrain.tracking.slowdown import Needs, Reading
from llmtrain.training.slow_steps import BLOCK_STEPS, WARM_UP_STEPS, SlowSteps

TOKENS = 4096
BLOCK = BLOCK_STEPS
"""Steps that close a block if each takes a second or more."""
NEEDS = Needs(cores=2, processes=1, threads=2, on_cpu=True)


class Machine:
    """Counters that go on by what the test says, for each second between two readings."""

    def __init__(self) -> None:
        self.now_sec = self.others_sec = 0.0
        self.num_readings = 0
        self.mhz = 2400.0

    def read(self) -> Reading:
        self.num_readings += 1
        return Reading(
            at_sec=self.now_sec,
            busy_sec=self.others_sec + 1.5 * self.now_sec,
            stolen_sec=0.0,
            own_sec={1: 1.5 * self.now_sec},
            throttling=Throttling(0, 0),
            swapped_bytes=0,
        )

    def clock_mhz(self) -> float:
        return self.mhz


class Run:
    """A run whose steps take what the test says."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.steps = SlowSteps(self.machine, needs=NEEDS)

    def go(self, steps: int, *, seconds: float, tokens: int = TOKENS, others_cores: float = 0.0) -> None:
        for _ in range(steps):
            self.machine.now_sec += seconds
            self.machine.others_sec += seconds * others_cores
            self.steps.stepped(seconds, tokens=tokens)


@pytest.fixture
def run(caplog: pytest.LogCaptureFixture) -> Run:
    """It has taken its first block's steps, a second each."""
    caplog.set_level(logging.INFO, logger="llmtrain")
    run = Run()
    run.go(WARM_UP_STEPS, seconds=30.0)  # slow, and not what the start is judged by
    run.go(BLOCK, seconds=1.0)
    return run


def test_steps_twice_as_long_beside_a_busy_process_are_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.go(BLOCK, seconds=2.1, others_cores=0.98)
    assert caplog.messages == [
        "steps take 2.1 times as long as at the start (2.1 s, was 1 s): other processes use 1.0 of the 2 cores that "
        "this run computes on; end them, or resume the run with GOMP_SPINCOUNT=10000 or fewer threads "
        "(OMP_NUM_THREADS=1)"
    ]
    assert caplog.records[0].levelname == "WARNING"


def test_an_episode_is_told_once_and_the_next_one_again(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.go(4 * BLOCK, seconds=2.0)
    run.go(2 * BLOCK, seconds=1.3)  # between slow and recovered: the episode goes on
    run.go(2 * BLOCK, seconds=2.0)
    assert len(caplog.messages) == 1
    run.go(2 * BLOCK, seconds=1.1)
    assert caplog.messages[1:] == ["steps take 1.1 s again"]
    run.go(3 * BLOCK, seconds=1.6)
    assert len(caplog.messages) == 3
    assert caplog.messages[2].startswith("steps take 1.6 times as long as at the start (1.6 s, was 1 s): no cause")


def test_a_few_slow_steps_are_no_episode(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        run.go(BLOCK - 3, seconds=1.0)
        run.go(3, seconds=9.0)
    run.go(5 * BLOCK, seconds=1.45)
    assert caplog.messages == []


def test_short_steps_are_judged_by_ten_seconds_of_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="llmtrain")
    run = Run()
    run.go(WARM_UP_STEPS + 640, seconds=1 / 64)
    run.go(300, seconds=1 / 32)  # 9.4 s
    assert caplog.messages == []
    run.go(20, seconds=1 / 32)
    assert len(caplog.messages) == 1


def test_steps_of_many_more_tokens_are_not_compared_and_the_rate_counts(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.go(BLOCK, seconds=4.0, tokens=2 * TOKENS)  # not similar
    run.go(BLOCK, seconds=1.7, tokens=TOKENS * 5 // 4)  # 1.36 times the seconds a token
    assert caplog.messages == []
    run.go(BLOCK, seconds=1.25, tokens=TOKENS * 3 // 4)
    assert len(caplog.messages) == 1


def test_steps_without_tokens_and_those_that_compiled_do_not_count(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.go(3 * BLOCK, seconds=5.0, tokens=0)
    run.go(3 * BLOCK, seconds=0.0)
    assert caplog.messages == []
    assert run.machine.num_readings == 2


def test_the_machine_is_read_once_a_block(run: Run) -> None:
    run.go(30 * BLOCK, seconds=1.0)
    assert run.machine.num_readings == 2 + 30


def test_a_machine_that_cannot_be_read_does_not_stop_the_run(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Reading:
        raise OSError("no /proc")

    monkeypatch.setattr(run.machine, "read", fail)
    run.go(3 * BLOCK, seconds=3.0)
    assert caplog.messages == ["the speed of steps is not watched any more (OSError: no /proc)"]
