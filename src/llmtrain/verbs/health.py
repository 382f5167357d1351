"""`health`: has a run started, and does it get on? For the probes of a pod, on any of its machines. Needs no torch.

    <run>/heartbeat, summary.json ─▶ when the run last did something ┐
    /proc/1/stat ─▶ when this container began                        ┴─▶ healthy or not, and why

A container that is started again finds the files of the time before: what is older than the container does not count.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.runs.folders import find_run
from llmtrain.runs.heartbeat import HEARTBEAT_NAME
from llmtrain.runs.listing import config_section, last_metrics
from llmtrain.runs.stores import runs_folder
from llmtrain.tracking import metric_names as names

STAGE_FACTOR = 3
"""Times `distributed.timeout_sec`: the run's own watchdog allows this for a stage that compiles, and tells more."""


def health(
    ref: str, *, root_dir: str, started: bool, max_age_sec: float | None = None, proc: Path = Path("/proc")
) -> dict[str, Any]:
    """Return `healthy`, `why`, and what is known of the run that `ref` names.

    `started`: whether the run trains since this container began. Otherwise: whether it did something in the last
    `max_age_sec` seconds, or since the container began; three times the run's distributed.timeout_sec when not given.
    """
    began, now = container_began(proc), time.time()
    try:
        run, _ = find_run(ref, runs_folder(root_dir))
    except ConfigError as error:
        return {"healthy": False, "why": f"not started: {error}", "run": None, "step": None, "loss": None}
    beat, ended = _time_of(run / HEARTBEAT_NAME), _time_of(run / "summary.json")
    metrics = last_metrics(run / "metrics.jsonl")
    known = {"run": str(run), "step": metrics.get("step"), "loss": metrics.get(names.TRAIN_LOSS)}
    if ended >= max(beat, began):
        return {"healthy": True, "why": "the run is over", **known}
    if started:
        healthy = beat > 0 and beat >= began
        why = "the run trains" if healthy else "not started: the run has done nothing since this container began"
        return {"healthy": healthy, "why": why, **known}
    limit = STAGE_FACTOR * _timeout_sec(run) if max_age_sec is None else max_age_sec
    age = max(0.0, now - max(beat, began))
    healthy = age <= limit
    sign = f"the last sign of progress is {age:.0f} s old"
    why = sign if healthy else f"{sign}, over {limit:.0f} s: the run hangs or its process is gone"
    return {"healthy": healthy, "why": why, "age_sec": age, "limit_sec": limit, **known}


def container_began(proc: Path) -> float:
    """Return when process 1 started, in seconds since 1970; 0 where the system does not say (macOS).

    In a container it is the container's own first process, elsewhere the machine's.
    """
    try:
        ticks = int((proc / "1" / "stat").read_text().rpartition(")")[2].split()[19])
        booted = next(
            int(line.split()[1]) for line in (proc / "stat").read_text().splitlines() if line.startswith("btime ")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return 0.0
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _timeout_sec(run: Path) -> float:
    """Return the run's distributed.timeout_sec, or the schema's default where its config cannot be read."""
    value = config_section(run, "distributed").get("timeout_sec")
    if isinstance(value, int | float):
        return float(value)
    from llmtrain.config.sections.training import DistributedConfig  # here: probes are to be fast

    return float(DistributedConfig().timeout_sec)
