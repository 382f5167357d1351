"""Names of the tracked metrics, which are the same for every sink, and short texts of their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

TRAIN_LOSS: Final = "train/loss"
"""Nats per supervised token, over the steps since the last metrics."""
TRAIN_LR: Final = "train/lr"
TRAIN_EPOCH: Final = "train/epoch"
"""Passes over the training data, as a fraction."""
TRAIN_GRAD_NORM: Final = "train/grad_norm"
"""Global norm before clipping."""
TRAIN_TOKENS_PER_SEC: Final = "train/tokens_per_sec"
"""All tokens of all ranks, supervised or not, without padding."""
TRAIN_STEP_TIME_SEC: Final = "train/step_time_sec"
TRAIN_TOKENS_TOTAL: Final = "train/tokens_total"
TRAIN_MFU: Final = "train/mfu"
"""Model FLOPs utilisation, from 0 to 1; missing if the device's peak is not known."""
TRAIN_SKIPPED_STEPS: Final = "train/skipped_steps"
"""Number of steps so far without an update because the loss or a gradient was not finite; missing while it is 0."""
TRAIN_LOSS_SCALE: Final = "train/loss_scale"
"""Factor on the loss with 16-mixed."""
VAL_LOSS: Final = "val/loss"
"""Nats per token."""
VAL_PERPLEXITY: Final = "val/perplexity"
VAL_BITS_PER_BYTE: Final = "val/bits_per_byte"
ANSWERS: Final = "eval/"
"""Prefix of the metrics that score answers: eval/rougeL."""
PERF_DATA_WAIT: Final = "perf/data_wait"
"""Share of the wall time since the last metrics that was spent waiting for batches, from 0 to 1."""
PERF_CHECKPOINT_STALL: Final = "perf/checkpoint_stall"
"""The same for checkpoints."""
PERF_COMPILE_SEC: Final = "perf/compile_sec"
"""Time of the first step so far, in which compilation happens."""
PERF_GOODPUT: Final = "perf/goodput"
"""Share of the process's wall time that was spent in training steps."""

METRIC_NAMES: Final = (
    TRAIN_LOSS,
    TRAIN_LR,
    TRAIN_EPOCH,
    TRAIN_GRAD_NORM,
    TRAIN_TOKENS_PER_SEC,
    TRAIN_STEP_TIME_SEC,
    TRAIN_TOKENS_TOTAL,
    TRAIN_MFU,
    TRAIN_SKIPPED_STEPS,
    TRAIN_LOSS_SCALE,
    VAL_LOSS,
    VAL_PERPLEXITY,
    VAL_BITS_PER_BYTE,
    PERF_DATA_WAIT,
    PERF_CHECKPOINT_STALL,
    PERF_COMPILE_SEC,
    PERF_GOODPUT,
)
"""Metrics of the training loop. Those of the machine (system/…) are in `machine_monitor`."""

# Name, format, whether it is also shown beside the bar.
_DESCRIPTIONS: Final = (
    (TRAIN_LOSS, "loss {:.3f}", True),
    (VAL_LOSS, "val {:.3f}", True),
    (VAL_PERPLEXITY, "perplexity {:.4g}", False),
    (VAL_BITS_PER_BYTE, "bits/byte {:.3f}", False),
    (TRAIN_LR, "lr {:.1e}", False),
    (TRAIN_GRAD_NORM, "grad {:.2f}", False),
    (TRAIN_TOKENS_PER_SEC, "{} tok/s", True),
    (TRAIN_MFU, "mfu {:.0%}", True),
)


def describe(metrics: Mapping[str, float], *, brief: bool = False) -> str:
    """Return `loss 3.210  lr 3.0e-03  grad 0.82  6.1k tok/s  mfu 41%`, with those metrics that are in `metrics`.

    `brief` leaves out metrics for which a bar has no room: learning rate, gradient norm, eval/, and all of val/ except
    the loss.
    """
    parts = [
        write.format(short_count(metrics[name]) if name == TRAIN_TOKENS_PER_SEC else metrics[name])
        for name, write, fits_bar in _DESCRIPTIONS
        if name in metrics and (fits_bar or not brief)
    ]
    if not brief:
        answers = ((name, value) for name, value in metrics.items() if name.startswith(ANSWERS))
        parts += [f"{name.removeprefix(ANSWERS)} {value:.4g}" for name, value in answers]
    return "  ".join(parts)


def short_count(number: float) -> str:
    """Return 6100 as 6.1k and 1234567 as 1.2M; whole numbers below 1000 stay as they are."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.1f}{unit}" if abs(scaled) < 99.95 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}" if float(number).is_integer() or abs(number) >= 10 else f"{number:.1f}"


def short_duration(seconds: float) -> str:
    """Return 12 seconds as 12s, 252 as 4m12s, 3900 as 1h05m, 180000 as 2d02h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
