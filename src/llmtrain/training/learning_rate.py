"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from llmtrain.config.sections.training import SchedulerConfig

DEFAULT_WARMUP_STEPS = 100
WSD_WARMUP_RATIO = 0.1
MAX_WARMUP_SHARE = 0.25
"""Share of a run that a warm-up given in steps takes at most, so that a short run does not end in it."""


def learning_rate_scale(config: SchedulerConfig, *, step: int, total_steps: int, warmup: int | None = None) -> float:
    """Return the factor on the peak learning rate for the update numbered `step` (from 0) of `total_steps`.

    `warmup`: the steps of warm-up that the run began with; those of a new run when not given. The first update is never
    at 0, and the last one is at `min_lr_ratio` (except for `constant`). A run of one step makes it at the peak.
    """
    if total_steps == 1:
        return 1.0
    warmup = warmup_steps(config, total_steps=total_steps) if warmup is None else warmup
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
    """Return the steps of linear warm-up: given in steps, at most a quarter of the run; by a ratio, never all of it."""
    ratio = config.warmup_ratio
    if ratio is None and config.warmup_steps is None and config.name == "wsd":
        ratio = WSD_WARMUP_RATIO
    if ratio is not None:
        return min(round(ratio * total_steps), max(0, total_steps - 1))
    wanted = DEFAULT_WARMUP_STEPS if config.warmup_steps is None else config.warmup_steps
    return min(wanted, int(MAX_WARMUP_SHARE * total_steps))


def highest_scale(config: SchedulerConfig, *, total_steps: int, warmup: int | None = None) -> float:
    """Return the highest factor of a run: that of the last step of warm-up, or of the step after it."""
    warmup = warmup_steps(config, total_steps=total_steps) if warmup is None else warmup
    around = {min(max(0, warmup - 1), total_steps - 1), min(warmup, total_steps - 1)}
    return max(learning_rate_scale(config, step=step, total_steps=total_steps, warmup=warmup) for step in around)
