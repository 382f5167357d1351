"""What this process may use of the machine: cores and memory. A container or a pod sees all of both, and gets less.

    the machine's · affinity      ┐
    control groups (version 1, 2) ┴─ the smallest ─▶ usable_cores, memory_bytes

A group's limits bind all groups below it, so each from this process's up to the top is asked. No torch.
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
    """Of the control group that leaves this process the least, in bytes."""

    limit: int
    used: int
    """By all its processes, without what the kernel would give back first (files it has read)."""


def memory_bytes(*, root: Path = _ROOT) -> int:
    """The machine's memory, or what the control groups leave of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit(root=root)
    return machine if limit is None else min(machine, limit.limit)


def memory_limit(*, root: Path = _ROOT) -> MemoryLimit | None:
    """The tightest limit on memory; None: no group sets one. `root`: where /proc and /sys are."""
    found: MemoryLimit | None = None
    for group in _groups("memory", root=root):
        for limit_file, used_file, returned_first in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(_read(group / limit_file))
            if limit is not None and (found is None or limit < found.limit):
                used = _number(_read(group / used_file)) or 0
                soft = re.search(rf"^{returned_first} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                found = MemoryLimit(limit, max(0, used - int(soft[1] if soft else 0)))
    return found


def usable_cores(*, root: Path = _ROOT) -> int:
    """Cores that this process may run on at a time: by its affinity, and by a quota, a part of one as whole."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", root=root):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        of_time, in_time = _number(quota), _number(period)
        if of_time and in_time:
            cores = min(cores, math.ceil(of_time / in_time))
    return cores


def _groups(controller: str, *, root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, each before those above it; nothing but on Linux."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part]
        if ".." in parts:  # outside of what this process sees
            parts = []
        for top in (mounts / controller,) if controllers else (mounts, mounts / "unified"):
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth])


def _read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text().strip()
    return ""


def _number(text: str) -> int | None:
    """None where there is no limit: the file is absent, or says `max` or -1."""
    return int(text) if text.isdigit() else None
