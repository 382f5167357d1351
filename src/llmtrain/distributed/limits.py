"""Cores and memory that this process may use. A container or a pod sees all of the machine's, but may use fewer.

    the machine's · affinity      ┐
    control groups (version 1, 2) ┴─ the smallest ─▶ usable_cores, memory_bytes

A group's limits bind all groups below it, so the limits of this process's group and of all groups above it are read.
All code that counts cores calls this file: a test checks that no other file asks the operating system. No torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True)
class MemoryLimit:
    """Limit and use of the control group with the smallest memory limit, in bytes."""

    limit: int
    used: int
    """Memory used by all processes of the group, without the file cache that the kernel frees first."""


def memory_bytes(*, root: Path = _ROOT) -> int:
    """Return the machine's memory in bytes, or the smallest limit of the control groups."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit(root=root)
    return machine if limit is None else min(machine, limit.limit)


def memory_limit(*, root: Path = _ROOT) -> MemoryLimit | None:
    """Return the smallest limit on memory; None if no group sets one. /proc and /sys are read below `root`."""
    found: MemoryLimit | None = None
    for group in _groups("memory", root=root):
        for limit_file, used_file, cache_entry in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(_read(group / limit_file))
            if limit is not None and (found is None or limit < found.limit):
                used = _number(_read(group / used_file)) or 0
                cache = re.search(rf"^{cache_entry} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                found = MemoryLimit(limit, max(0, used - int(cache[1] if cache else 0)))
    return found


@dataclass(frozen=True)
class Throttling:
    """Number of times that the kernel paused this process's control groups because their CPU quota was used up."""

    periods: int
    """Periods of the quota (usually 0.1 s each) in which a group wanted to run."""
    throttled: int
    """Number of these periods in which a group was paused."""


def machine_cores() -> int:
    """Return the number of the machine's cores, to describe it. A run computes with `usable_cores`."""
    return os.cpu_count() or 1


def allowed_cores() -> list[int]:
    """Return the ids of the cores that this process's affinity allows."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(machine_cores()))


def usable_cores(*, root: Path = _ROOT) -> int:
    """Return the number of cores that this process's affinity and CPU quota let it use at the same time.

    A quota of 2.5 cores gives 3, since two threads would leave half a core unused.
    """
    cores = len(allowed_cores())
    for group in _groups("cpu", root=root):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        quota_us, period_us = _number(quota), _number(period)
        if quota_us and period_us:
            cores = min(cores, math.ceil(quota_us / period_us))
    return cores


def throttling(*, root: Path = _ROOT) -> Throttling:
    """Return the counts of the control groups with a CPU quota, since the groups exist; zeros without a quota."""
    periods = throttled = 0
    for group in _groups("cpu", root=root):
        counts = dict(re.findall(r"^(nr_\w+) (\d+)$", _read(group / "cpu.stat"), re.MULTILINE))
        periods = max(periods, int(counts.get("nr_periods", 0)))
        throttled += int(counts.get("nr_throttled", 0))
    return Throttling(periods, throttled)


def _groups(controller: str, *, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, each before the groups above it. Only Linux has any."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # the group is outside of what this process sees
            parts = []
        for top in (mounts / controller,) if controllers else (mounts, mounts / "unified"):
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth])


def _read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text().strip()
    return ""


def _number(text: str) -> int | None:
    """Parse a limit; None if there is none: the file does not exist, or contains `max` or -1."""
    return int(text) if text.isdigit() else None
