"""Finds the likely cause if a run's steps became slower: other processes, a CPU limit, swapping, a lower clock.

    MachineCounters.read() at two moments ─▶ Use between them ─▶ likely_cause(at the start, now)

A reading takes about a millisecond and needs no thread. A counter that the operating system lacks counts as 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import psutil

from llmtrain.distributed.limits import Throttling, allowed_cores, throttling

WORTH_NAMING_CORES: Final = 0.2
"""Increase of other processes' CPU use, in cores, that explains slower steps."""
WORTH_NAMING_PERIODS: Final = 0.2
"""Increase of the share of the quota's periods in which the run was paused that explains slower steps."""
WORTH_NAMING_MB_PER_SEC: Final = 1.0
"""Increase of swapping that explains slower steps."""
LOWER_CLOCK: Final = 0.8
"""A clock below this share of the clock at the start explains slower steps."""
FEWER_SPINS: Final = 10_000
"""Number of times that a waiting OpenMP thread spins before it sleeps, to suggest; libgomp's default is 300,000."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Counters of the machine at one moment. Only the difference of two readings has a meaning."""

    at_sec: float
    busy_sec: float
    """CPU time of all processes on the cores that this process may use."""
    stolen_sec: float
    """Time that the host of the virtual machine took from these cores for other guests (steal time)."""
    own_sec: Mapping[int, float]
    """CPU time of each process of this run, by process id."""
    throttling: Throttling
    swapped_bytes: int


@dataclass(frozen=True, kw_only=True)
class Use:
    """Use of the machine by others between two readings, and the clock at the second one."""

    others_cores: float
    """CPU use of other processes, in cores, on the cores that this process may use."""
    stolen_cores: float
    throttled_share: float
    """Share of the quota's periods in which the run was paused."""
    swapped_mb_per_sec: float
    clock_mhz: float | None
    """None if the machine does not report it."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Cores, processes and threads that the run uses on this machine."""

    cores: int
    """Number of cores that this process may use, regardless of a quota."""
    processes: int
    threads: int
    """Busy threads of each process."""
    on_cpu: bool
    """True if these threads compute the steps; otherwise they feed a GPU."""


class MachineCounters:
    """Reads the counters that show what slows a run down. `num_processes`: processes of the run on this machine."""

    def __init__(self, *, num_processes: int = 1) -> None:
        self._num_processes = num_processes
        self._cores = allowed_cores()
        self._own: list[psutil.Process] | None = None

    def read(self) -> Reading:
        """Read all counters except the clock. The first call also looks for the processes of the run."""
        each = psutil.cpu_times(percpu=True)
        # If the ids of cores have gaps, psutil lists fewer cores than the highest id: then count all of them.
        cores = [each[core] for core in self._cores] if self._cores[-1] < len(each) else each
        swap_in, swap_out = _swapped_bytes()
        return Reading(
            at_sec=time.monotonic(),
            busy_sec=sum(_busy_sec(core) for core in cores),
            stolen_sec=sum(getattr(core, "steal", 0.0) for core in cores),
            own_sec=self._own_sec(),
            throttling=throttling(),
            swapped_bytes=swap_in + swap_out,
        )

    def clock_mhz(self) -> float | None:
        """Return the mean clock of the cores. On a machine with many cores this is slower than `read`."""
        with suppress(Exception):  # psutil reads files that differ between machines or do not exist
            frequency = psutil.cpu_freq()
            return float(frequency.current) if frequency and frequency.current else None
        return None

    def _own_sec(self) -> dict[int, float]:
        if self._own is None:
            me = psutil.Process()
            parent = me.parent() if self._num_processes > 1 else None
            self._own = [me, *(parent or me).children(recursive=True)]
        seconds = {}
        for process in self._own:
            with suppress(psutil.Error):
                times = process.cpu_times()
                seconds[process.pid] = times.user + times.system
        return seconds


def use_between(before: Reading, after: Reading, *, clock_mhz: float | None) -> Use:
    """Return the use of the machine by others between two readings."""
    seconds = max(1e-3, after.at_sec - before.at_sec)
    own = sum(after.own_sec[pid] - before.own_sec[pid] for pid in after.own_sec.keys() & before.own_sec.keys())
    periods = after.throttling.periods - before.throttling.periods
    throttled = after.throttling.throttled - before.throttling.throttled
    return Use(
        others_cores=max(0.0, after.busy_sec - before.busy_sec - own) / seconds,
        stolen_cores=(after.stolen_sec - before.stolen_sec) / seconds,
        throttled_share=min(1.0, throttled / periods) if periods > 0 else 0.0,
        swapped_mb_per_sec=(after.swapped_bytes - before.swapped_bytes) / seconds / 1e6,
        clock_mhz=clock_mhz,
    )


def likely_cause(at_start: Use, now: Use, *, needs: Needs) -> str:
    """Return what slows the run down and what to do about it, or that no cause was found on this machine."""
    if now.throttled_share - at_start.throttled_share >= WORTH_NAMING_PERIODS:
        return (
            f"the container used up its CPU quota in {_percent(now.throttled_share)} of the periods; end other "
            "processes in the container, or raise its CPU limit"
        )
    if now.swapped_mb_per_sec - at_start.swapped_mb_per_sec >= WORTH_NAMING_MB_PER_SEC:
        return (
            f"the machine swaps memory to and from the disk ({now.swapped_mb_per_sec:.0f} MB/s); end processes that "
            "hold much memory, or lower trainer.micro_batch_size"
        )
    if now.stolen_cores - at_start.stolen_cores >= WORTH_NAMING_CORES:
        return f"the host of this virtual machine took {_cores(now.stolen_cores, needs)}; only another machine helps"
    more = now.others_cores - at_start.others_cores
    lacking = needs.processes * needs.threads + now.others_cores - needs.cores
    if more >= WORTH_NAMING_CORES and lacking >= WORTH_NAMING_CORES:
        return f"other processes use {_cores(now.others_cores, needs)}; {_advice(now.others_cores, needs)}"
    if at_start.clock_mhz and now.clock_mhz and now.clock_mhz < LOWER_CLOCK * at_start.clock_mhz:
        return (
            f"the CPU's clock fell from {at_start.clock_mhz:.0f} to {now.clock_mhz:.0f} MHz; the machine is too hot or "
            "saves power"
        )
    return "no cause was found on this machine (other processes, CPU limit, swapping, clock)"


def _cores(used: float, needs: Needs) -> str:
    if needs.cores == 1:
        return f"{_percent(used)} of the one core that this run computes on"
    return f"{used:.1f} of the {needs.cores} cores that this run computes on"


def _advice(others_cores: float, needs: Needs) -> str:
    """Return what to do. Spinning threads take cores from the thread that they wait for (docs/decisions, 0005)."""
    if not needs.on_cpu or needs.threads == 1:
        return "end them, or run them elsewhere"
    sooner = f"end them, or resume the run with GOMP_SPINCOUNT={FEWER_SPINS}"
    left = max(1, round(needs.cores - others_cores) // needs.processes)
    return f"{sooner} or fewer threads (OMP_NUM_THREADS={left})" if left < needs.threads else sooner


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _busy_sec(core: object) -> float:
    return sum(getattr(core, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))


def _swapped_bytes() -> tuple[int, int]:
    with suppress(OSError, RuntimeError):
        swap = psutil.swap_memory()
        return int(swap.sin), int(swap.sout)
    return 0, 0
