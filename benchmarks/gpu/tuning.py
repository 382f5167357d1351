"""LoRA on a model in the shape of Llama 3 8B with random weights: packed rows, with recomputation and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.llama import LLAMA_8B, TINY, write_llama
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.speeds import timed_run
from benchmarks.gpu.steps import StepClock

BATCH, LENGTH = 4, 2048
SMOKE_BATCH, SMOKE_LENGTH = 2, 32
RANK = 16


def measure(setting: Setting) -> None:
    """Write the model, and measure both."""
    folder = base_folder(setting)
    batch, length = sizes(setting)
    for recomputes in (False, True):
        name = case_name(recomputes=recomputes)
        config = {
            "run": {"device": setting.device.type},
            "model": {"name": "huggingface", "path": str(folder), "lora": {"r": RANK, "alpha": 2 * RANK}},
            "data": {
                "name": "benchmarks.gpu.motifs:Motifs",
                "seq_len": length,
                "options": {"vocab_size": base_shape(setting)["vocab_size"]},
            },
            "trainer": {"micro_batch_size": batch, "activation_checkpointing": "full" if recomputes else "none"},
        }
        with setting.recorder.trying(case=name):
            clock = tuning_clock(setting)
            setting.recorder.row(case=name, **timed_run(setting, f"tuning-{recomputes}".lower(), config, clock))


def case_name(*, recomputes: bool) -> str:
    """Return the name of a case in the table."""
    return f"8B LoRA {BATCH}×{LENGTH}, packed" + (", recomputing" if recomputes else "")


def base_shape(setting: Setting) -> dict[str, Any]:
    """Return the shape of the model."""
    return setting.sized(LLAMA_8B, smoke=TINY)


def base_folder(setting: Setting) -> Path:
    """Return the folder of the model, written by whichever section needs it first."""
    return write_llama(setting.work / "base", base_shape(setting), setting, dtype=torch.bfloat16)


def sizes(setting: Setting) -> tuple[int, int]:
    """Return rows and tokens of a batch."""
    return setting.sized((BATCH, LENGTH), smoke=(SMOKE_BATCH, SMOKE_LENGTH))


def tuning_clock(setting: Setting) -> StepClock:
    """Return a clock for few steps, each of which takes long."""
    return StepClock(setting, warm_up=setting.sized(3, smoke=1), steps=setting.sized(6, smoke=2), profiled=1)
