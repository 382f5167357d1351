"""The likely cause of slow steps is what others took between two readings, beyond what they took at the start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from llmtrain.distributed.limits import Throttling
from llmtrain.tracking.slowdown import MachineCounters, Needs, Reading, Use, likely_cause, use_between

CALM = Use(others_cores=0.1, stolen_cores=0.0, throttled_share=0.05, swapped_mb_per_sec=0.0, clock_mhz=2600.0)
NEEDS = Needs(cores=4, processes=1, threads=4, on_cpu=True)
NO_CAUSE = "no cause was found on this machine (other processes, CPU limit, swapping, clock)"
START = Reading(
    at_sec=100.0,
    busy_sec=1000.0,
    stolen_sec=3.0,
    own_sec={7: 50.0, 8: 1.0},
    throttling=Throttling(periods=500, throttled=10),
    swapped_bytes=10**9,
)
BUSY = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time())"
"""Uses a core for 0.3 seconds, and says for how long it did."""


def test_use_is_the_cpu_time_of_others_per_second() -> None:
    after = Reading(
        at_sec=110.0,
        busy_sec=1035.0,
        stolen_sec=6.0,
        own_sec={7: 68.0, 9: 400.0},  # one process ended, and a new one has no begin
        throttling=Throttling(periods=600, throttled=85),
        swapped_bytes=10**9 + 50 * 10**6,
    )
    use = use_between(START, after, clock_mhz=2000.0)
    assert use == Use(
        others_cores=pytest.approx(1.7),  # type: ignore[arg-type]
        stolen_cores=pytest.approx(0.3),  # type: ignore[arg-type]
        throttled_share=pytest.approx(0.75),  # type: ignore[arg-type]
        swapped_mb_per_sec=pytest.approx(5.0),  # type: ignore[arg-type]
        clock_mhz=2000.0,
    )


def test_without_a_quota_nothing_is_throttled() -> None:
    assert use_between(START, replace(START, at_sec=101.0), clock_mhz=None) == Use(
        others_cores=0.0, stolen_cores=0.0, throttled_share=0.0, swapped_mb_per_sec=0.0, clock_mhz=None
    )


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (
            replace(CALM, others_cores=1.2),
            "other processes use 1.2 of the 4 cores that this run computes on; end them, or resume the run with "
            "GOMP_SPINCOUNT=10000 or fewer threads (OMP_NUM_THREADS=3)",
        ),
        (
            replace(CALM, throttled_share=0.8, others_cores=3.0),
            "the container used up its CPU quota in 80 % of the periods; end other processes in the "
            "container, or raise its CPU limit",
        ),
        (
            replace(CALM, swapped_mb_per_sec=12.0),
            "the machine swaps memory to and from the disk (12 MB/s); end processes that hold much memory, or lower "
            "trainer.micro_batch_size",
        ),
        (
            replace(CALM, stolen_cores=1.5),
            "the host of this virtual machine took 1.5 of the 4 cores that this run computes on; only another machine "
            "helps",
        ),
        (
            replace(CALM, clock_mhz=1200.0),
            "the CPU's clock fell from 2600 to 1200 MHz; the machine is too hot or saves power",
        ),
        (CALM, NO_CAUSE),
        (replace(CALM, clock_mhz=None), NO_CAUSE),
    ],
)
def test_the_cause_is_named_with_what_to_do(now: Use, expected: str) -> None:
    assert likely_cause(CALM, now, needs=NEEDS) == expected


def test_use_that_was_the_same_at_the_start_is_no_cause() -> None:
    busy = replace(CALM, others_cores=1.5, throttled_share=0.5, stolen_cores=0.5, swapped_mb_per_sec=3.0)
    assert likely_cause(busy, busy, needs=NEEDS) == NO_CAUSE


def test_other_processes_are_no_cause_if_enough_cores_are_left() -> None:
    now = replace(CALM, others_cores=3.0)
    assert likely_cause(CALM, now, needs=replace(NEEDS, cores=8)) == NO_CAUSE
    assert likely_cause(CALM, now, needs=replace(NEEDS, cores=8, processes=2)).startswith("other processes use 3.0")


@pytest.mark.parametrize(
    ("needs", "advice"),
    [
        (Needs(cores=1, processes=1, threads=1, on_cpu=True), "end them, or run them elsewhere"),
        (Needs(cores=2, processes=2, threads=1, on_cpu=True), "end them, or run them elsewhere"),
        (
            Needs(cores=8, processes=2, threads=4, on_cpu=True),
            "end them, or resume the run with GOMP_SPINCOUNT=10000 or fewer threads (OMP_NUM_THREADS=3)",
        ),
        (
            Needs(cores=8, processes=1, threads=4, on_cpu=True),
            "end them, or resume the run with GOMP_SPINCOUNT=10000",
        ),
        (Needs(cores=2, processes=1, threads=2, on_cpu=False), "end them, or run them elsewhere"),
    ],
)
def test_fewer_threads_are_advised_if_there_is_a_thread_to_spare(needs: Needs, advice: str) -> None:
    others = max(1.0, needs.cores - needs.processes * needs.threads + 0.5)
    cause = likely_cause(CALM, replace(CALM, others_cores=others), needs=needs)
    assert cause.startswith("other processes use ")
    assert cause.endswith(f"; {advice}")


def test_use_of_one_core_is_in_percent() -> None:
    needs = Needs(cores=1, processes=1, threads=1, on_cpu=True)
    cause = likely_cause(CALM, replace(CALM, others_cores=0.48), needs=needs)
    assert cause.startswith("other processes use 48 % of the one core that this run computes on")


def test_cpu_time_of_this_process_is_not_counted_as_that_of_others() -> None:
    counters = MachineCounters()
    before = counters.read()
    end = before.own_sec[os.getpid()] + 0.2
    while counters.read().own_sec[os.getpid()] < end:
        sum(range(10_000))
    after = counters.read()
    assert after.own_sec[os.getpid()] - before.own_sec[os.getpid()] > 0.19
    busy = subprocess.run([sys.executable, "-c", BUSY], check=True, capture_output=True, text=True)
    later = counters.read()
    assert later.busy_sec - after.busy_sec >= float(busy.stdout) - 0.1
    assert use_between(after, later, clock_mhz=None).others_cores > 0
    assert list(later.own_sec) == list(before.own_sec)


def test_a_reading_takes_milliseconds_at_most() -> None:
    counters = MachineCounters()
    counters.read()
    began = time.process_time()
    for _ in range(20):
        counters.read()
    assert time.process_time() - began < 20 * 0.02
    assert counters.clock_mhz() is None or counters.clock_mhz() > 0  # type: ignore[operator]
