from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain.tracking.machine_monitor import (
    CPU_PERCENT,
    DISK_FREE_GB,
    DISK_WRITTEN,
    GPU_POWER_WATTS,
    NET_RECEIVED,
    PEAK_RSS_GB,
    PROCESS_CPU_PERCENT,
    RSS_GB,
    SYSTEM_NAMES,
    MachineMonitor,
    metrics_of_all_ranks,
)

CPU = torch.device("cpu")


def test_a_sample_has_cpu_memory_disk_and_network(tmp_path: Path) -> None:
    monitor = MachineMonitor(run=tmp_path, device=CPU, interval_sec=60)
    until = time.process_time() + 0.2
    while time.process_time() < until:
        math.sqrt(2.0)
    ballast = bytearray(50_000_000)
    monitor.sample_now()

    metrics = monitor.take()

    assert set(metrics) <= set(SYSTEM_NAMES)
    assert {CPU_PERCENT, PROCESS_CPU_PERCENT, RSS_GB, PEAK_RSS_GB, DISK_FREE_GB} <= set(metrics)
    assert 0 < metrics[CPU_PERCENT] <= 100
    assert 1 < metrics[PROCESS_CPU_PERCENT] < 150
    assert len(ballast) / 1e9 < metrics[RSS_GB] <= metrics[PEAK_RSS_GB] + 1e-3 < 64
    assert monitor.take() == {}, "each sample counts once"


def test_rates_are_bytes_over_the_time_between_two_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    now = [100.0]
    counters = {
        "disk": SimpleNamespace(read_bytes=0, write_bytes=5e9),
        "net": SimpleNamespace(bytes_recv=1, bytes_sent=0),
    }
    monkeypatch.setattr("llmtrain.tracking.machine_monitor.time.monotonic", lambda: now[0])
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: counters["disk"])
    monkeypatch.setattr(psutil, "net_io_counters", lambda: counters["net"])
    monitor = MachineMonitor(run=tmp_path, device=CPU, interval_sec=60)
    for written, received in ((20e6, 4e6), (60e6, 0)):
        now[0] += 2.0
        counters["disk"].write_bytes += written
        counters["net"].bytes_recv += received
        monitor.sample_now()

    metrics = monitor.take()

    assert metrics[DISK_WRITTEN] == pytest.approx((10 + 30) / 2)
    assert metrics[NET_RECEIVED] == pytest.approx((2 + 0) / 2)


def test_the_thread_samples_until_the_block_ends(tmp_path: Path) -> None:
    with MachineMonitor(run=tmp_path, device=CPU, interval_sec=0.01) as monitor:
        deadline = time.monotonic() + 30
        while not (metrics := monitor.take()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert RSS_GB in metrics
    assert not monitor._thread.is_alive()


def test_an_interval_of_0_turns_sampling_off(tmp_path: Path) -> None:
    with MachineMonitor(run=tmp_path, device=CPU, interval_sec=0) as monitor:
        assert monitor.take() == {}
        assert not monitor._thread.is_alive()


def test_a_sample_costs_less_than_half_a_percent_of_its_interval(tmp_path: Path) -> None:
    monitor = MachineMonitor(run=tmp_path, device=CPU, interval_sec=60)
    began = time.thread_time()
    for _ in range(50):
        monitor.sample_now()
    seconds = (time.thread_time() - began) / 50

    assert seconds < 0.005 * 2.0  # the default interval


class Gpu:
    """What NVML would tell of one."""

    NVMLError = RuntimeError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        return None

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=40_000_000_000)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61


def test_a_gpu_is_found_by_its_id_and_values_that_it_does_not_report_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, "pynvml", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1a2b"))
    monitor = MachineMonitor(run=tmp_path, device=torch.device("cuda", 0), interval_sec=60)
    monitor.sample_now()

    metrics = monitor.take()

    assert gpu.asked == ["GPU-1a2b"]
    assert (metrics["system/gpu_percent"], metrics["system/gpu_memory_gb"]) == (87, 40)
    assert metrics["system/gpu_temperature_celsius"] == 61
    assert GPU_POWER_WATTS not in metrics


def of_all(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """What every rank would get, from what each has; the vectors are added up here."""
    vectors: list[Sequence[float]] = []

    def note(values: Sequence[float]) -> list[float]:
        vectors.append(values)
        return list(values)

    for rank, row in enumerate(rows):
        metrics_of_all_ranks(row, rank=rank, world_size=len(rows), sum_floats=note)
    total = [sum(column) for column in zip(*vectors, strict=True)]
    return metrics_of_all_ranks(rows[0], rank=0, world_size=len(rows), sum_floats=lambda _: total)


def test_one_rank_has_plain_names() -> None:
    def refuse(values: Sequence[float]) -> list[float]:
        raise AssertionError("nothing to add up")

    assert metrics_of_all_ranks({RSS_GB: 2.0}, rank=0, world_size=1, sum_floats=refuse) == {RSS_GB: 2.0}


def test_several_ranks_have_their_own_metrics_a_mean_and_the_highest_peak() -> None:
    metrics = of_all([{RSS_GB: 1.0, PEAK_RSS_GB: 2.0}, {RSS_GB: 4.0, PEAK_RSS_GB: 5.0, GPU_POWER_WATTS: 300.0}])

    assert metrics == {
        RSS_GB: 2.5,
        f"{RSS_GB}/rank_0": 1.0,
        f"{RSS_GB}/rank_1": 4.0,
        PEAK_RSS_GB: 5.0,
        f"{PEAK_RSS_GB}/rank_0": 2.0,
        f"{PEAK_RSS_GB}/rank_1": 5.0,
        GPU_POWER_WATTS: 300.0,
        f"{GPU_POWER_WATTS}/rank_1": 300.0,
    }


def test_many_ranks_have_mean_min_and_max_only() -> None:
    metrics = of_all([{RSS_GB: float(rank)} for rank in range(17)])

    assert metrics == {RSS_GB: 8.0, f"{RSS_GB}/min": 0.0, f"{RSS_GB}/max": 16.0}


def test_the_first_sample_of_a_run_measures_the_cpu(tmp_path: Path) -> None:
    with MachineMonitor(run=tmp_path, device=CPU, interval_sec=0.3) as monitor:
        metrics: dict[str, float] = {}
        until = time.monotonic() + 20
        while not metrics and time.monotonic() < until:
            math.sqrt(2.0)
            metrics = monitor.take()
    assert metrics[PROCESS_CPU_PERCENT] > 5, "psutil's first measurement in a thread is 0"
    assert metrics[CPU_PERCENT] > 0
