"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from llmtrain.config.training import SchedulerConfig

DEFAULT_WARMUP_STEPS = 100
WSD_WARMUP_RATIO = 0.1


def learning_rate_scale(config: SchedulerConfig, *, step: int, total_steps: int) -> float:
    """The factor on the peak learning rate for the update numbered `step` (from 0) of `total_steps`.

    The first update is never at 0, and the last one is at `min_lr_ratio` (except for `constant`).
    """
    warmup = warmup_steps(config, total_steps=total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    decay_steps = total_steps - warmup
    if config.name == "wsd":
        decay_steps = min(decay_steps, max(1, round(config.decay_ratio * total_steps)))
    done = step + 1 - (total_steps - decay_steps)
    progress = min(1.0, max(0.0, done / max(1, decay_steps)))
    shape = 1.0 - progress if config.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


def warmup_steps(config: SchedulerConfig, *, total_steps: int) -> int:
    """Steps of linear warm-up; never all of a short run."""
    if config.warmup_ratio is not None:
        wanted = round(config.warmup_ratio * total_steps)
    elif config.warmup_steps is not None:
        wanted = config.warmup_steps
    else:
        wanted = round(WSD_WARMUP_RATIO * total_steps) if config.name == "wsd" else DEFAULT_WARMUP_STEPS
    return min(wanted, max(0, total_steps - 1))
