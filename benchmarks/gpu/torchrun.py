"""Checks the strategies for several processes with one: a group of nccl, sharding, saving, all but the waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.small_runs import Config, adapted, difference, run_small, small_config, small_run, write_config

LIMIT = 1e-4
STEPS = 8


def measure(setting: Setting) -> None:
    """Train ddp, fsdp and fsdp with DoRA under torchrun, and the same without it."""
    plain = small_config(setting, trainer=_trainer(setting))
    alone = run_small(setting, "alone", plain)
    tuned = adapted(plain, setting, base=alone, dora=True)
    configs = {"ddp": plain, "fsdp": plain, "fsdp-dora": tuned}
    summaries = _under_torchrun(setting, configs)
    references = {"fsdp-dora": lambda: run_small(setting, "alone-dora", tuned)}

    def compared(name: str) -> float:
        found = summaries.get(name, {"error": "torchrun ended before this run"})
        if "error" in found:
            raise RuntimeError(found["error"])
        return difference(references.get(name, lambda: alone)(), small_run(found))

    for name in configs:
        setting.recorder.checked(f"{name} = one process", lambda name=name: compared(name), limit=LIMIT)  # type: ignore[misc]


def _trainer(setting: Setting) -> dict[str, Any]:
    return {**small_config(setting)["trainer"], "max_steps": STEPS, "save_every_steps": STEPS // 2}


def _under_torchrun(setting: Setting, configs: dict[str, Config]) -> dict[str, Any]:
    """Return the summary of each run, or its error."""
    files = []
    for name, config in configs.items():
        distributed = {"strategy": name.partition("-")[0]}
        files.append(str(write_config(setting.work, name, {**config, "distributed": distributed})))
    results = setting.work / "ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    subprocess.run([*command, "-m", "benchmarks.gpu.ranks", str(results), *files], check=False, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    return found
