"""A run folder as training leaves it, made in a moment: metrics, events, config, environment; a model if asked for."""

from __future__ import annotations

import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support.tiny_model import write_tiny_model

BEGAN = 1795170000.0
"""Seconds since 1970 at which the recorded runs began."""
CONFIG = """schema_version: 1
run:
  name: {name}
  seed: 7
model:
  d_model: 64
  num_layers: 2
data:
  name: tokens
  train: shards/train
optimizer:
  lr: {lr}
"""


def recorded_run(
    root: Path, run_id: str, *, num_steps: int = 200, lr: float = 0.003, state: str = "finished", **changes: Any
) -> Path:
    """`root/run_id`: a line of metrics a step, a second apart; an evaluation and a save every 50 steps.

    `changes`: of summary.json; there is none for the state "killed".
    """
    folder = root / run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=f"{run_id}-name", lr=lr))
    meta = {
        "run_id": run_id,
        "time": datetime.fromtimestamp(BEGAN, UTC).isoformat(),
        "argv": ["llmtrain", "train", "quickstart", f"optimizer.lr={lr}"],
        "working_folder": str(root),
        "notes": None,
        "tags": ["recorded"],
        "resolved": {"device": "cpu", "precision": "32"},
        "versions": {"llmtrain": "0.1", "torch": "2.13"},
        "hardware": {"cpu": "A CPU", "memory_bytes": 2**34, "gpus": []},
        "environment": {"OMP_NUM_THREADS": "1"},
        "hostname": "host",
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    events = []
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps(metrics_line(step, lr=lr)) + "\n")
            if step % 50 == 0:
                loss = 2.1 + 3 / math.sqrt(step)
                evaluated = {"val/loss": loss, "val/perplexity": math.exp(loss), "val/bits_per_byte": loss / 3}
                file.write(json.dumps({"step": step, "time": BEGAN + step + 0.5, **evaluated}) + "\n")
                events.append({"time": BEGAN + step + 0.6, "step": step, "event": "saved", "best": True})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if state != "killed":
        (folder / "summary.json").write_text(json.dumps(_summary(num_steps, state) | changes))
    return folder


def metrics_line(step: int, *, lr: float = 0.003) -> dict[str, float]:
    """The line of metrics.jsonl after a step, a second after the one before; the loss waves as it falls."""
    return {
        "step": step,
        "time": BEGAN + step,
        "train/loss": 2 + 3 / math.sqrt(step) + 0.3 * math.sin(step * 1.7),
        "train/lr": lr,
        "train/epoch": step / 1000,
        "train/grad_norm": 1 + 0.5 * math.sin(step),
        "train/tokens_total": step * 1024.0,
        "train/tokens_per_sec": 1024.0,
        "train/step_time_sec": 1.0,
        "system/cpu_percent": 50.0,
        "system/gpu_0/power_w": 300.0,
        "system/gpu_1/power_w": 310.0,
    }


def _summary(num_steps: int, state: str) -> dict[str, Any]:
    return {
        "state": state,
        "steps": num_steps,
        "resumed_from_step": None,
        "world_size": 1,
        "tokens": num_steps * 1024,
        "seconds": float(num_steps),
        "tokens_per_sec": 1024.0,
        "first_loss": 5.0,
        "last_loss": 2.2,
        "best_val_loss": 2.3,
        "val_loss": 2.3,
        "skipped_steps": 0,
        "parameters": {"total": 1_000_000, "trainable": 1_000_000},
        "peak_memory_bytes": 2**30,
        "goodput": 0.9,
        "time_spent": {"step": 0.9 * num_steps, "evaluation": 0.1 * num_steps},
    }


def recorded_run_with_model(root: Path, run_id: str) -> Path:
    """`recorded_run` with a checkpoint of its last step, whose model is a tiny one."""
    folder = recorded_run(root, run_id)
    checkpoint = folder / "checkpoints" / "step_000200"
    write_tiny_model(checkpoint / "model")
    shutil.copyfile(folder / "config.yaml", checkpoint / "config.yaml")
    (folder / "checkpoints" / "latest").symlink_to(checkpoint.name)
    return folder
