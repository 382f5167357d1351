"""Memory and cores are the smallest of what the machine has and what control groups of either version leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from llmtrain.distributed import process
from llmtrain.distributed.limits import MemoryLimit, Throttling, memory_bytes, memory_limit, throttling, usable_cores

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MB = 2**20


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def system(root: Path, *, groups: str, **files: str) -> Path:
    """A /proc and a /sys: `groups` is what /proc/self/cgroup says; two underscores in a file's name are a slash."""
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


def test_a_pod_has_the_cores_and_memory_of_its_control_group(tmp_path: Path, eight_cores: None) -> None:
    root = system(
        tmp_path,
        groups="0::/",
        **{
            "memory.max": str(512 * MB),
            "memory.current": str(300 * MB),
            "memory.stat": f"anon 1\ninactive_file {100 * MB}\nactive_file 7",
            "cpu.max": "200000 100000",
        },
    )
    assert memory_bytes(root=root) == 512 * MB
    assert memory_limit(root=root) == MemoryLimit(512 * MB, 200 * MB)
    assert usable_cores(root=root) == 2


def test_the_smallest_limit_of_the_groups_above_applies(tmp_path: Path, eight_cores: None) -> None:
    root = system(
        tmp_path,
        groups="0::/pods/mine",
        **{
            "memory.max": "max",
            "pods__memory.max": str(64 * MB),
            "pods__mine__memory.max": str(96 * MB),
            "pods__cpu.max": "max 100000",
            "pods__mine__cpu.max": "250000 100000",
        },
    )
    assert memory_bytes(root=root) == 64 * MB
    assert usable_cores(root=root) == 3


def test_limits_of_control_groups_of_version_1_are_read(tmp_path: Path, eight_cores: None) -> None:
    root = system(
        tmp_path,
        groups="9:name=systemd:/x\n4:memory:/docker/1a\n1:cpu,cpuacct:/docker/1a\n0::/",
        **{
            "memory__memory.limit_in_bytes": "9223372036854771712",
            "memory__docker__1a__memory.limit_in_bytes": str(80 * MB),
            "memory__docker__1a__memory.usage_in_bytes": str(50 * MB),
            "memory__docker__1a__memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MB}",
            "cpu__docker__1a__cpu.cfs_quota_us": "50000",
            "cpu__docker__1a__cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit(root=root) == MemoryLimit(80 * MB, 30 * MB)
    assert usable_cores(root=root) == 1


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/", {}),
        ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}),
        (
            "4:memory:/\n1:cpu:/",
            {"memory__memory.limit_in_bytes": "9223372036854771712", "cpu__cpu.cfs_quota_us": "-1"},
        ),
        ("0::/../elsewhere", {"elsewhere__memory.max": "1"}),
    ],
)
def test_without_a_limit_all_of_the_machine_is_usable(
    tmp_path: Path, eight_cores: None, groups: str, files: dict[str, str]
) -> None:
    root = system(tmp_path, groups=groups, **files)
    assert memory_bytes(root=root) == MACHINE
    assert usable_cores(root=root) == 8


def test_without_control_groups_all_of_the_machine_is_usable(tmp_path: Path, eight_cores: None) -> None:
    assert memory_limit(root=tmp_path) is None
    assert memory_bytes(root=tmp_path) == MACHINE
    assert usable_cores(root=tmp_path) == 8


def test_torch_computes_on_no_more_threads_than_a_quota_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(process, "usable_cores", lambda: 2)
    try:
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        process.keep_to_usable_cores()
        assert torch.get_num_threads() == 4  # somebody said so
        monkeypatch.delenv("OMP_NUM_THREADS")
        process.keep_to_usable_cores()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_ranks_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads(), inductor.compile_threads
    monkeypatch.setattr(process, "usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    try:
        torch.set_num_threads(8)
        inductor.compile_threads = 8
        process.keep_to_usable_cores(num_processes=4)
        assert torch.get_num_threads() == 1
        assert inductor.compile_threads == 1
        torch.set_num_threads(8)
        inductor.compile_threads = 8
        process.keep_to_usable_cores()
        assert torch.get_num_threads() == 6
        assert inductor.compile_threads == 6
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
        inductor.compile_threads = 7
        process.keep_to_usable_cores()
        assert inductor.compile_threads == 7
    finally:
        torch.set_num_threads(before[0])
        inductor.compile_threads = before[1]


def test_a_process_bound_to_one_core_has_one_usable_core() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    code = "from llmtrain.distributed.limits import usable_cores; print(usable_cores())"
    core = min(os.sched_getaffinity(0))
    started = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert started.stdout.strip() == "1"


def test_throttled_periods_are_those_of_all_groups_with_a_quota(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        groups="0::/pods/mine",
        **{
            "cpu.stat": "usage_usec 900",
            "pods__cpu.stat": "usage_usec 5\nnr_periods 40\nnr_throttled 3\nthrottled_usec 1",
            "pods__mine__cpu.stat": "usage_usec 5\nnr_periods 30\nnr_throttled 9\nthrottled_usec 1",
        },
    )
    assert throttling(root=root) == Throttling(periods=40, throttled=12)
    assert throttling(root=tmp_path / "nothing") == Throttling(periods=0, throttled=0)


def test_version_1_counts_throttled_periods_too(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        groups="1:cpu,cpuacct:/docker/1a",
        **{"cpu__docker__1a__cpu.stat": "nr_periods 12\nnr_throttled 5\nthrottled_time 87"},
    )
    assert throttling(root=root) == Throttling(periods=12, throttled=5)
