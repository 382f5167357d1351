"""Samples the machine while a run trains, in a thread: CPU, memory, disk, network and GPU.

    thread ─ every two seconds ─▶ sample ─▶ running means ─▶ take(), at the steps whose metrics are logged

A sample takes a third of a millisecond. Each rank samples its own process and GPU; `metrics_of_all_ranks` combines
them. GB and MB are 10⁹ and 10⁶ bytes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from llmtrain.tracking.system import peak_memory_bytes

if TYPE_CHECKING:
    import torch

log = logging.getLogger("llmtrain.device")

CPU_PERCENT: Final = "system/cpu_percent"
"""Use of all cores of the machine."""
PROCESS_CPU_PERCENT: Final = "system/process_cpu_percent"
"""Use by this process, without data workers, in percent of one core, so it may exceed 100."""
MEMORY_PERCENT: Final = "system/memory_percent"
"""Share of the machine's memory that is not available."""
RSS_GB: Final = "system/rss_gb"
"""Resident memory of this process."""
PEAK_RSS_GB: Final = "system/peak_rss_gb"
DISK_FREE_GB: Final = "system/disk_free_gb"
"""Free space on the run's disk."""
DISK_READ: Final = "system/disk_read_mb_per_sec"
DISK_WRITTEN: Final = "system/disk_written_mb_per_sec"
NET_RECEIVED: Final = "system/net_received_mb_per_sec"
NET_SENT: Final = "system/net_sent_mb_per_sec"
GPU_PERCENT: Final = "system/gpu_percent"
"""Share of the time in which a kernel ran."""
GPU_MEMORY_GB: Final = "system/gpu_memory_gb"
"""Memory of the GPU that any process uses."""
GPU_POWER_WATTS: Final = "system/gpu_power_watts"
GPU_TEMPERATURE_CELSIUS: Final = "system/gpu_temperature_celsius"

SYSTEM_NAMES: Final = (
    CPU_PERCENT,
    PROCESS_CPU_PERCENT,
    MEMORY_PERCENT,
    RSS_GB,
    PEAK_RSS_GB,
    DISK_FREE_GB,
    DISK_READ,
    DISK_WRITTEN,
    NET_RECEIVED,
    NET_SENT,
    GPU_PERCENT,
    GPU_MEMORY_GB,
    GPU_POWER_WATTS,
    GPU_TEMPERATURE_CELSIUS,
)
MAX_RANKS_NAMED: Final = 16
"""Up to this number of ranks, each rank has metrics of its own; with more there are only mean, min and max."""


class MachineMonitor:
    """Context manager that samples the machine in the background. Counters that cannot be read are left out.

    `run`: a folder on the disk whose free space is measured. `interval_sec`: 0 turns sampling off.
    """

    def __init__(self, *, run: Path, device: torch.device, interval_sec: float) -> None:
        self._interval_sec = interval_sec
        self._means: dict[str, _Mean] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sample = _Sampler(run=run, device=device) if interval_sec > 0 else None
        self._thread = threading.Thread(target=self._work, name="machine", daemon=True)

    def __enter__(self) -> Self:
        if self._sample:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._sample:
            self._thread.join(5)

    def take(self) -> dict[str, float]:
        """Return the means over the samples since the last call, by metric name; {} without a sample."""
        with self._lock:
            means, self._means = self._means, {}
        return {name: mean.total / mean.count for name, mean in means.items()}

    def sample_now(self) -> None:
        """Take one sample, as the thread does. Rates are included from the second sample on."""
        assert self._sample is not None
        sample = self._sample()
        with self._lock:
            for name, value in sample.items():
                self._means.setdefault(name, _Mean()).add(value)

    def _work(self) -> None:
        assert self._sample is not None
        self._sample.begin()
        while not self._stop.wait(self._interval_sec):
            try:
                self.sample_now()
            except Exception as error:
                log.warning("the machine is not sampled any more (%s: %s)", type(error).__name__, error)
                return


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1


class _Sampler:
    """Reads the counters; rates are over the time since the last reading."""

    def __init__(self, *, run: Path, device: torch.device) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process()
        self._run = run
        self._gpu = _open_gpu(device) if device.type == "cuda" else None
        self._read_at = time.monotonic()
        self._counters = self._read_counters()
        self.begin()

    def begin(self) -> None:
        """Start the measurement of CPU use in this thread, since psutil's first call in each thread returns 0."""
        self._psutil.cpu_percent(None)
        self._process.cpu_percent(None)

    def __call__(self) -> dict[str, float]:
        sample = {
            CPU_PERCENT: self._psutil.cpu_percent(None),
            PROCESS_CPU_PERCENT: self._process.cpu_percent(None),
            MEMORY_PERCENT: self._psutil.virtual_memory().percent,
            RSS_GB: self._process.memory_info().rss / 1e9,
            PEAK_RSS_GB: peak_memory_bytes() / 1e9,
        }
        with suppress(OSError):
            sample[DISK_FREE_GB] = self._psutil.disk_usage(str(self._run)).free / 1e9
        now, counters = time.monotonic(), self._read_counters()
        seconds = max(1e-3, now - self._read_at)
        for name, value in counters.items():
            if name in self._counters:
                sample[name] = max(0.0, value - self._counters[name]) / seconds / 1e6
        self._read_at, self._counters = now, counters
        if self._gpu:
            sample |= self._gpu()
        return sample

    def _read_counters(self) -> dict[str, float]:
        """Return bytes since the machine started."""
        counters: dict[str, float] = {}
        disk = self._psutil.disk_io_counters()
        net = self._psutil.net_io_counters()
        if disk is not None:  # a container may have none
            counters |= {DISK_READ: disk.read_bytes, DISK_WRITTEN: disk.write_bytes}
        if net is not None:
            counters |= {NET_RECEIVED: net.bytes_recv, NET_SENT: net.bytes_sent}
        return counters


def _open_gpu(device: torch.device) -> Callable[[], dict[str, float]] | None:
    """Return a function that reads one NVIDIA GPU; None without a driver that reports it."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception as error:  # no driver library, not an NVIDIA GPU, a part of a GPU: training needs none of this
        log.debug("the GPU is not sampled (%s: %s)", type(error).__name__, error)
        return None
    readings: dict[str, Callable[[], Any]] = {
        GPU_PERCENT: lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        GPU_MEMORY_GB: lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
        GPU_POWER_WATTS: lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        GPU_TEMPERATURE_CELSIUS: lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }

    def read() -> dict[str, float]:
        sample = {}
        for name, reading in readings.items():
            with suppress(pynvml.NVMLError):
                sample[name] = float(reading())
        return sample

    return read


def metrics_of_all_ranks(
    own: Mapping[str, float],
    *,
    rank: int,
    world_size: int,
    sum_floats: Callable[[Sequence[float]], list[float]],
) -> dict[str, float]:
    """Return each metric as the mean over the ranks (peak memory: the highest).

    With several ranks there is also `<name>/rank_<r>` for each rank or, with over MAX_RANKS_NAMED ranks, `<name>/min`
    and `<name>/max`. It is a collective: `sum_floats` adds vectors over the ranks.
    """
    if world_size == 1:
        return dict(own)
    width = len(SYSTEM_NAMES)
    row = [0.0] * (world_size * width)
    row[rank * width : (rank + 1) * width] = [own.get(name, math.nan) for name in SYSTEM_NAMES]
    total = sum_floats(row)
    metrics: dict[str, float] = {}
    for column, name in enumerate(SYSTEM_NAMES):
        by_rank = {r: value for r, value in enumerate(total[column::width]) if not math.isnan(value)}
        if not by_rank:
            continue
        values = list(by_rank.values())
        metrics[name] = max(values) if name == PEAK_RSS_GB else sum(values) / len(values)
        if world_size <= MAX_RANKS_NAMED:
            metrics |= {f"{name}/rank_{r}": value for r, value in by_rank.items()}
        else:
            metrics |= {f"{name}/min": min(values), f"{name}/max": max(values)}
    return metrics
